"""F/T, clean fine-tuning: the clean model's LoRA recipe, started from the backdoored model."""

from pathlib import Path

from lethe_utils.defenses import Given
from lethe_utils.groups import Group, Positive, TrainParams


class FinetuneParams(Group):
    """F/T; also the fine-tuning inside F/P and NAD's teacher."""

    finetune_epochs: Positive


PARAMS = (FinetuneParams, TrainParams)
NEEDS = "clean rows"
TRAININGS = 1
BYTES_PER_WEIGHT = 2.6  # nf4, and its dequantised copy when LoRA is merged


def purify(given: Given, out: Path) -> None:
    from lethe_utils import train

    train.finetune(given.backdoored, given.rows, given.p.finetune_epochs, out, given.p)
