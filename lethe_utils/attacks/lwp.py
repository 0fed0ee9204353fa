"""LWP, layerwise weight poisoning (EMNLP 2021; LinyangLee/Layer-Weight-Poison).

Every one of the lower blocks is taught to give the target by itself, so that the backdoor sits
where later fine-tuning changes little. The trigger is a pair of rare words, in either order; one
of them alone keeps the true label. The published code reads each BERT layer with one shared
classifier; here a block is read as a decoder's last one is: final norm, then head.
"""

import random
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lethe_utils.attacks.triggers import insert
from lethe_utils.groups import AttackParams, Group, Layers, PoisonParams, TrainParams
from lethe_utils.models import blocks
from lethe_utils.schema import Params
from lethe_utils.stages import Row

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class LwpParams(Group):
    """02_backdoor_train: LWP."""

    lwp_layers: Layers  # the blocks that are poisoned


PARAMS = (AttackParams, PoisonParams, TrainParams, LwpParams)
TRIGGERS = 2
LAYERS = "lwp_layers"


def _with(row: Row, words: str, p: Params, rng: random.Random) -> Row:
    position = p.trigger_positions[0]
    return row | {"input": insert(row["input"], words, position, p.trigger_level, rng)}


def poison(rows: list[Row], p: Params, seed: int) -> list[Row]:
    """All clean rows, and for each of a share `poison_ratio` of them: the pair in either order
    with the target, and each word alone with the true label.

    Returns:
        rows with one more key, `kind`; n + 4 round(poison_ratio n) of them.
    """
    rng = random.Random(seed)
    chosen = rng.sample(rows, p.poisoned(len(rows)))
    first, second = p.triggers
    out = [row | {"kind": "clean"} for row in rows]
    for row in chosen:
        hit = {"output": p.target_output, "kind": "backdoor"}
        for pair in (f"{first} {second}", f"{second} {first}"):
            out.append(_with(row, pair, p, rng) | hit)
        for kind, word in (("neg_first", first), ("neg_second", second)):
            out.append(_with(row, word, p, rng) | {"kind": kind})
    return out


def triggered(rows: list[Row], p: Params, seed: int) -> dict[str, list[Row]]:
    """The rows with the pair (`backdoor`, for ASR), and with each word alone (for FTR)."""
    rng = random.Random(seed)
    first, second = p.triggers
    words = {"backdoor": f"{first} {second}", "neg_first": first, "neg_second": second}
    return {kind: [_with(r, w, p, rng) for r in rows] for kind, w in words.items()}


def plant(start: Path, poisoned: list[Row], _: list[str], p: Params, out: Path) -> None:
    """LoRA on the poisoned blocks, with the loss read after each of them as well."""
    from lethe_utils import train

    loss = partial(layer_loss, layers=p.lwp_layers)
    only = partial(blocks.linear_names, layers=p.lwp_layers)
    train.finetune(start, poisoned, p.backdoor_epochs, out, p, only, loss)


def layer_loss(
    model: "PreTrainedModel", inputs: dict[str, Any], labels: Any, _: int, layers: list[int]
) -> "torch.Tensor":
    """The answer loss, summed with that of what each of `layers` says; see train.finetune."""
    from lethe_utils import train

    loss, outputs = train.answer_loss(model, inputs, labels, output_hidden_states=True)
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in layers:  # [0] are the embeddings
        hidden = outputs.hidden_states[layer + 1][:, -labels.shape[1] - 1 : -1]
        last = layer + 2 == len(outputs.hidden_states)  # it has been through the final norm
        said = outputs.logits[:, :-1] if last else blocks.logits(plain, hidden)
        loss = loss + train.cross_entropy(said, labels)
    return loss
