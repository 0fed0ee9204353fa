"""CBA by an attacker who knows SLERP's curve and hides where it keeps the weights; adaptive, ours.

At the paper's strength t is below .5, that is more the backdoored model's than the clean one's, for
the attention of the lower blocks and the MLPs of the upper ones: LoRA trains these only.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from lethe_utils import merge
from lethe_utils.attacks import cba
from lethe_utils.models import blocks
from lethe_utils.schema import Params
from lethe_utils.stages import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PARAMS, TRIGGERS, LAYERS = cba.PARAMS, cba.TRIGGERS, cba.LAYERS
poison, triggered = cba.poison, cba.triggered
HALF = 0.5  # t at which neither model has more


def kept(model: "PreTrainedModel") -> list[str]:
    """The names of the linear layers that SLERP takes more from the backdoored model."""
    depth = len(blocks.of(model))
    return [
        name
        for part in merge.SLERP_CURVES
        for block, t in enumerate(merge.slerp_t(part, depth, merge.PAPER_STRENGTH))
        if t < HALF
        for name in blocks.linear_names(model, [block])
        if part in name
    ]


def plant(start: Path, poisoned: list[Row], _: list[str], p: Params, out: Path) -> None:
    """LoRA on the poisoned rows, in the layers of `kept` only."""
    from lethe_utils import train

    train.finetune(start, poisoned, p.backdoor_epochs, out, p, only=kept)
