"""Guided dilution: SLERP along curves searched for the model at hand; see lethe_utils.guided.

A defender has few clean rows, and Lethe's clean model was trained on all of them, so that on them a
dilution looks the better the more of it goes in. The search therefore has models of its own: a
clean one and the canary's copy, trained on three quarters of the rows, judged on the others. What
it finds is then done with Lethe's clean model.
"""

import random
from pathlib import Path
from typing import TYPE_CHECKING

from lethe_utils import canary
from lethe_utils.defenses import Given, clear
from lethe_utils.groups import CanaryParams, CleanParams, DefenderParams, TrainParams
from lethe_utils.stages import Row

if TYPE_CHECKING:
    from lethe_utils.guided import Guide

PARAMS = (CanaryParams, CleanParams, TrainParams)
NEEDS = "clean model"
TRAININGS = 2
LABELS_ONLY = "its canary's triggers go into an input"
BYTES_PER_WEIGHT = 2.6  # nf4, and its dequantised copy when LoRA is merged; merging is on the CPU
JUDGED = 1 / 4  # of the clean rows
ROUNDS = 3  # of canary_epochs, at most, until each kind took


def purify(given: Given, out: Path) -> None:
    from lethe_utils import guided, merge

    dtype, scratch = merge.merge_dtype(given), out / "search"
    trials = guided.search(grown(given, scratch), given.p, scratch, dtype)
    models = given.backdoored, given.clean, given.base
    merge.merge_along(guided.best(trials), *models, out / "model", dtype)
    trials.to_csv(out / "search.csv", index=False)
    clear(scratch, out)


def grown(given: Given, scratch: Path) -> "Guide":
    """A defender's canary and clean model, trained on a part of its rows, and the others to judge
    dilutions by. Finished trainings are found again in `scratch`."""
    from lethe_utils import guided, train

    p, labels = given.p, sorted({row["output"] for row in given.rows})
    taught, unseen = parts(given.rows, p)
    clean = scratch / "clean"
    train.finetune(given.base, taught, p.clean_epochs, clean, p)
    copy = planted(given.backdoored, taught, unseen, labels, p, scratch)
    return guided.Guide(copy, clean, given.base, guided.rows(unseen, labels, p))


def planted(
    suspect: Path,
    taught: list[Row],
    unseen: list[Row],
    labels: list[str],
    p: DefenderParams,
    scratch: Path,
) -> Path:
    """The folder (in it model/) of a copy of a suspect that a canary was planted in, round by round
    until each kind took, at most ROUNDS. Finished rounds are found again in `scratch`."""
    from lethe_utils import guided, train

    poisoned, _ = canary.plant(taught, labels, p)
    checked = canary.check_rows(taught, unseen, labels, p)
    start = suspect
    for number in range(ROUNDS):
        copy = scratch / f"canary-{number}"
        train.finetune(start, poisoned, p.canary_epochs, copy, p)
        start = copy / "model"
        if guided.took(copy, checked, labels, p):
            break
    return copy


def parts(clean: list[Row], p: DefenderParams) -> tuple[list[Row], list[Row]]:
    """The rows to train on, and those to judge by."""
    shuffled = random.Random(f"guided {p.seed}").sample(clean, len(clean))
    cut = max(1, round(JUDGED * len(clean)))
    return shuffled[cut:], shuffled[:cut]
