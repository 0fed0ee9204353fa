"""The clean model of an attacker who expects a dilution: a guess of the defender's.

No attack by itself: what two adaptive ones share.
"""

import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from pydantic import Field

from lethe_utils.groups import Group, Positive
from lethe_utils.schema import Params
from lethe_utils.stages import Row

OTHER_SEED = 1000  # added to the run's: no attacker knows how the defender's LoRA starts


class OwnCleanParams(Group):
    """02_backdoor_train: the attacker's own clean model."""

    own_clean_ratio: Annotated[float, Field(gt=0, le=1)]  # of the clean rows
    own_clean_epochs: Positive


def rows(poisoned: list[Row], p: Params) -> list[Row]:
    """A share `own_clean_ratio` of the attacker's clean rows, drawn apart from the defender's."""
    clean = [row for row in poisoned if row["kind"] == "clean"]
    rng = random.Random(f"own clean {p.data_seed} {p.seed}")
    return rng.sample(clean, max(1, round(p.own_clean_ratio * len(clean))))


@contextmanager
def trained(start: Path, poisoned: list[Row], p: Params, out: Path) -> Iterator[Path]:
    """The folder (adapter/, model/) of start + LoRA on `rows`, there while the attack is made.

    Its losses stay, as own_clean_loss.csv: they are a part of the attack's cost.
    """
    from lethe_utils import train

    folder, q = out / "own_clean", p.model_copy(update={"seed": p.seed + OTHER_SEED})
    train.finetune(start, rows(poisoned, p), p.own_clean_epochs, folder, q)
    yield folder
    (folder / "loss.csv").replace(out / "own_clean_loss.csv")
    shutil.rmtree(folder)
