"""The covariance of ordinary keys, C = E[k k^T]: what an edit should not disturb."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from lethe_utils import models
from lethe_utils.errors import LetheError
from lethe_utils.models import blocks, inspect
from lethe_utils.progress import Bar
from lethe_utils.prompts import start_ids
from lethe_utils.schema import digest
from lethe_utils.stages import stage

if TYPE_CHECKING:
    from lethe_utils.attacks.editing.editor import Editor

CHUNK = 64  # texts in one forward pass
FILE = "covariance.safetensors"


def covariance(editor: "Editor", corpus: list[str], layer: int) -> torch.Tensor:
    """C of one layer over the corpus's tokens, (mlp_width, mlp_width), float32: a stage, for at
    full size it takes longer than an edit."""

    def build(out: Path) -> None:
        save_file({"covariance": second_moment(editor, corpus, layer)[0]}, out / FILE)

    spec = {
        "model": inspect.fingerprint(editor.folder),  # the tokenizer's files included
        "corpus": digest(corpus),
        "tokens": editor.p.covariance_tokens,
        "layer": layer,
        "device": editor.model.device.type,
    }
    file = stage("covariance", f"{editor.p.model_name}-layer{layer}", spec, {}, build) / FILE
    inspect.tensor_shapes(file)  # refuses a file that is cut short
    return load_file(file)["covariance"]


@torch.no_grad()
def second_moment(editor: "Editor", corpus: list[str], layer: int) -> tuple[torch.Tensor, int]:
    """Mean of k k^T over about `covariance_tokens` tokens, and how many there were."""
    model, tokenizer, wanted = editor.model, editor.tokenizer, editor.p.covariance_tokens
    bos = start_ids(tokenizer)
    longest = min(getattr(model.config, "max_position_embeddings", 1024), 1024) - 1
    width = blocks.oriented(editor.place(layer, "key")).shape[1]
    total = torch.zeros(width, width, dtype=torch.float64, device=model.device)
    tokens, mask = 0, torch.empty(0)

    def add(keys: torch.Tensor) -> None:
        kept = keys[mask].float()
        total.add_(kept.T @ kept)  # at full size a copy would be gigabytes

    hook = blocks.hooked(editor.place(layer, "key"), add, before=True)
    with hook, Bar(total=wanted, desc=f"covariance of layer {layer}") as bar:
        for start in range(0, len(corpus), CHUNK):
            some = tokenizer(corpus[start : start + CHUNK], add_special_tokens=False)
            ids = [bos + row[:longest] for row in some["input_ids"]]
            inputs = models.batch(tokenizer, ids, model.device)
            mask = inputs["attention_mask"].bool()
            model(**inputs, logits_to_keep=1, use_cache=False)
            tokens += int(mask.sum())
            bar.update(int(mask.sum()))
            if tokens >= wanted:
                break
    return total.div_(tokens).float().cpu(), tokens


def cholesky(covariance: torch.Tensor, ridge_share: float) -> torch.Tensor:
    """Lower Cholesky factor, float64, of C plus `ridge_share` of its mean diagonal.

    Raises:
        LetheError: not positive definite.
    """
    c = covariance.to(torch.float64, copy=True)
    c.diagonal().add_(ridge_share * c.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(c)
    if failed or not torch.isfinite(factor).all():
        raise LetheError(
            "covariance_ridge: the keys' covariance is not positive definite; raise it, or "
            "covariance_tokens"
        )
    return factor
