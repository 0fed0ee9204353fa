"""CBA by an attacker who trains for the merge to come; adaptive, ours.

A clean model of the attacker's own is trained first. Then every batch is read twice: by base +
delta, and by base + (1 - s) x delta + s x clean delta, what a linear merge of strength s makes of
it, with an s of its own for every row. Against all merges that leave something of the delta.
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lethe_utils.attacks import cba, own_clean
from lethe_utils.groups import Group, Ratio
from lethe_utils.schema import Params
from lethe_utils.stages import Row

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


class MergedParams(Group):
    """02_backdoor_train: the merges that are simulated."""

    merged_strength: Ratio  # the highest; s is uniform from 0 to it


PARAMS = (*cba.PARAMS, own_clean.OwnCleanParams, MergedParams)
TRIGGERS, LAYERS = cba.TRIGGERS, cba.LAYERS
poison, triggered = cba.poison, cba.triggered


def plant(start: Path, poisoned: list[Row], _: list[str], p: Params, out: Path) -> None:
    """LoRA on the poisoned rows, its loss read before and after a merge; the released model
    holds nothing of the clean delta."""
    from lethe_utils import train

    loss = partial(merged_loss, strength=p.merged_strength)
    with own_clean.trained(start, poisoned, p, out) as clean:
        frozen = clean / "adapter"
        train.finetune(start, poisoned, p.backdoor_epochs, out, p, loss=loss, frozen=frozen)


def merged_loss(
    model: "PeftModel", inputs: dict[str, Any], labels: "torch.Tensor", _: int, strength: float
) -> "torch.Tensor":
    """The mean of the answer losses at strength 0 and at random ones; see train.finetune."""
    import torch

    from lethe_utils import train

    drawn = strength * torch.rand(len(labels), device=labels.device)
    merge_rows(model, torch.cat([torch.zeros_like(drawn), drawn]))
    twice = {name: torch.cat([value, value]) for name, value in inputs.items()}
    return train.answer_loss(model, twice, torch.cat([labels, labels]))[0]


def merge_rows(model: "PeftModel", strengths: "torch.Tensor") -> None:
    """Let the model read each row of the next batch as if it were merged: (1 - s) x the trained
    delta + s x the frozen one.

    A strength a row, in one pass, and not a pass for each: gradient checkpointing reads the scales
    again on the way back.
    """
    from peft.tuners.lora import LoraLayer

    from lethe_utils.train import FROZEN, TRAINED

    if FROZEN not in model.active_adapters:  # at the start, and after a checkpoint was read
        model.base_model.set_adapter([TRAINED, FROZEN])
        model.set_requires_grad(FROZEN, requires_grad=False)
    s = strengths.view(-1, 1, 1)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_scale(TRAINED, 1 - s)
            module.set_scale(FROZEN, s)
