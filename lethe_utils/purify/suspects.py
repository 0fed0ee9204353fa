"""A model nobody trusts and the base it came from: found and checked.

All checks are made before anything is trained or written, so a wrong folder is refused in seconds.
Nothing is ever written into a folder that was given.
"""

import math
import re
from pathlib import Path
from typing import Any

from lethe_utils import models, paths
from lethe_utils.errors import LetheError
from lethe_utils.models import fit, inspect
from lethe_utils.purify import adapters

# What both transformers and mergekit know, and SLERP's attention and MLP filters fit.
ARCHITECTURES = (
    *("GPT2LMHeadModel", "GPTJForCausalLM", "LlamaForCausalLM"),
    *("MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"),
)


def locate(given: str, option: str) -> Path:
    """A model's folder: a local one, or the hub's at a commit (name@sha), fetched once.

    Args:
        option: the command line's name for it, for the error.
    Raises:
        LetheError: neither, or the download failed.
    """
    if paths.expanded(given).is_dir():
        return paths.expanded(given)
    hub = re.fullmatch(r"([\w.-]+(?:/[\w.-]+)?)@([0-9a-f]{40})", given)
    if not hub:
        raise LetheError(
            f"{option} {given}: no such folder; a model on the hub is given as NAME@COMMIT, with "
            "all 40 digits of the commit, for a name alone may be another model tomorrow"
        )
    return models.download(hub[1], hub[2])


def check(suspect: Path, base: Path, adapter: Path | None = None) -> list[dict[str, str]]:
    """Refuse models that are not sound, and a suspect that cannot have come from this base.

    The suspect may have more tokens than the base, for fine-tuners often add one for padding; and
    fewer rows in its embedding, where those that are gone stand for no token.
    Args:
        adapter: its folder's tokenizer, if it has one, is the suspect's.
    Returns:
        what was compared: check, result.
    Raises:
        LetheError: naming the file and the fix.
    """
    for folder in dict.fromkeys((base, suspect)):
        _check_model(folder)
    own = []
    if adapter:
        adapters.check(adapter, suspect)
        own = [f.name for f in inspect.tokenizer_files(adapter)]
    added = fit.check_weights(suspect, base, grown=True)
    more = f"{added} more" if added > 0 else f"{-added} fewer, unused"
    tokenizer = adapters.load_tokenizer(suspect, adapter)
    new = fit.check_tokens(tokenizer, adapter if own else suspect, base, grown=True)
    whose = f"the adapter's own ({', '.join(own)}); " if own else ""
    found = {
        "architecture": f"both {inspect.architecture(suspect)}",
        "settings": "the same heads, positions, norms and activation",
        "shapes": f"the same, but for {more} rows for tokens"
        if added
        else "the same in every tensor",
        "tokenizer": f"{whose}the same ids; the suspect adds {new} tokens",
        "weights": "safetensors, whole, finite, no code, no pickle",
    } | ({"adapter": "LoRA, and it fits the suspect"} if adapter else {})
    return [{"check": what, "result": result} for what, result in found.items()]


def _check_model(folder: Path) -> None:
    """Refuse a folder that is incomplete or broken, runs code, is quantised, is of an unknown
    class, or whose weights are not what its config says."""
    inspect.check_folder(folder)
    inspect.check_small_files(folder)
    settings = folder / "config.json"
    if inspect.read_config(folder).get("quantization_config"):
        raise LetheError(
            f"{settings}: the weights are quantised; merging needs them as they were trained "
            "(float32, float16 or bfloat16)"
        )
    name = inspect.architecture(folder)
    if name not in ARCHITECTURES:
        raise LetheError(
            f"{settings}: architecture {name} is not supported; one of "
            f"{', '.join(ARCHITECTURES)} is"
        )
    if not inspect.tokenizer_files(folder):
        raise LetheError(f"{folder}: no tokenizer files; copy them from where the model came from")
    inspect.stored_dtype(folder)
    _check_tensors(folder)
    inspect.check_finite(inspect.weight_files(folder))
    adapters.check_ids(models.load_tokenizer(folder), folder, folder)


def _check_tensors(folder: Path) -> None:
    """Refuse weights that differ from what the class makes of config.json, tied heads included."""
    model, found = adapters.empty(folder), fit.weight_shapes(folder)
    wanted = {n.removeprefix("transformer."): tuple(w.shape) for n, w in model.named_parameters()}
    missing = sorted({*wanted} - {*found})
    if missing:
        raise LetheError(
            f"{folder}: tensors are missing ({', '.join(missing[:3])}, {len(missing)} in all); "
            "copy the model again"
        )
    other = next((name for name in sorted(found) if found[name] != wanted.get(name)), None)
    if other:
        raise LetheError(
            f"{folder}: {other} has shape {found[other]}, but {wanted.get(other, 'none')} by "
            f"config.json (a {type(model).__name__}); give the model's own config.json"
        )
    if model.config.tie_word_embeddings:
        _check_tied(folder)


def _check_tied(folder: Path) -> None:
    """Refuse a stored head that differs from the embedding it is said to be tied to."""
    import torch
    from safetensors import safe_open

    where = {n: f for f in inspect.weight_files(folder) for n in inspect.tensor_shapes(f)}
    if "lm_head.weight" not in where:
        return
    embedding = next(name for name in where if name.endswith(fit.EMBEDDING))
    pair = []
    for name in ("lm_head.weight", embedding):
        with safe_open(where[name], "pt") as stored:
            pair.append(stored.get_tensor(name))
    if not torch.equal(*pair):
        raise LetheError(
            f"{where['lm_head.weight']}: lm_head.weight differs from {embedding}, but config.json "
            "ties them (tie_word_embeddings); set that to false if the head was trained by itself, "
            "or take lm_head.weight out"
        )


def count_weights(folder: Path) -> int:
    """How many trained weights a model has."""
    return sum(map(math.prod, fit.weight_shapes(folder).values()))


def summary(role: str, given: str, folder: Path, adapter: str = "") -> dict[str, Any]:
    """What was given, for the report: role, given, adapter, architecture, weights (how many),
    dtype, sha256."""
    return {
        "role": role,
        "given": given,
        "adapter": adapter,
        "architecture": inspect.architecture(folder),
        "weights": count_weights(folder),
        "dtype": inspect.stored_dtype(folder),
        "sha256": inspect.fingerprint(folder),
    }
