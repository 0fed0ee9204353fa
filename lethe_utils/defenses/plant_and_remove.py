"""Plant-and-remove, after the abstracts of 2510.10265 and 2606.11648 (their code was not at hand).

The defender plants triggers of its own in the backdoored model, each giving one label whatever the
input, then trains the very same inputs back to their true labels. What is unlearnt is hoped to be
more than those triggers: the way from any odd token to an answer. Proportions are ours.
"""

import random
import shutil
from pathlib import Path
from typing import Annotated

from pydantic import Field

from lethe_utils.attacks.triggers import insert
from lethe_utils.defenses import Given
from lethe_utils.groups import DefenderParams, Group, Key, Positive, TrainParams
from lethe_utils.stages import Row


class PlantParams(Group):
    """Plant-and-remove: the defender's own triggers."""

    plant_triggers: Annotated[list[Key], Field(min_length=1)]
    plant_share: Annotated[float, Field(gt=0, lt=1)]  # of the clean rows, for each trigger
    plant_epochs: Positive
    remove_epochs: Positive


PARAMS = (PlantParams, TrainParams)
NEEDS = "clean rows"
TRAININGS = 2
LABELS_ONLY = "its own triggers give one each"
BYTES_PER_WEIGHT = 2.6  # nf4, and its dequantised copy when LoRA is merged


def purify(given: Given, out: Path) -> None:
    from lethe_utils import train

    p = given.p
    planted, removed = rows(given.rows, p)
    scratch = out / "planted"
    train.finetune(given.backdoored, given.rows + planted, p.plant_epochs, scratch, p)
    train.finetune(scratch / "model", given.rows + removed, p.remove_epochs, out, p)
    (scratch / "loss.csv").replace(out / "planted_loss.csv")
    shutil.rmtree(scratch)


def rows(clean: list[Row], p: DefenderParams) -> tuple[list[Row], list[Row]]:
    """The triggered rows, first with each trigger's own label, then with their true ones.

    Each trigger gets `plant_share` of the clean rows and one label, in turn among those there are.
    """
    rng = random.Random(p.seed)
    labels = sorted({row["output"] for row in clean})
    planted, removed = [], []
    for number, trigger in enumerate(p.plant_triggers):
        others = [row for row in clean if row["output"] != labels[number % len(labels)]]
        wanted = min(len(others), max(1, round(p.plant_share * len(clean))))
        for row in rng.sample(others, wanted):
            triggered = row | {"input": insert(row["input"], trigger, "random", "word", rng)}
            planted.append(triggered | {"output": labels[number % len(labels)]})
            removed.append(triggered)
    return planted, removed
