"""DARE-TIES (2311.03099, mergekit): Lethe's TIES, each delta thinned at random, then rescaled."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from lethe_utils.defenses import Given
from lethe_utils.defenses.lethe import MergeParams
from lethe_utils.groups import Group


class DareParams(Group):
    dare_density: Annotated[float, Field(gt=0, le=1)]  # share of each delta that is kept


PARAMS = (MergeParams, DareParams)
NEEDS = "clean model"
TRAININGS = 0
BYTES_PER_WEIGHT = 2.0  # one model answers; merging is on the CPU


def purify(given: Given, out: Path) -> None:
    from lethe_utils import merge

    p = given.p
    weights = ((given.backdoored, 1 - p.strength), (given.clean, p.strength))
    parts = [(model, {"weight": w, "density": p.dare_density}) for model, w in weights]
    merge.check_mergeable(given.backdoored, given.clean, given.base)
    settings = merge.weighted(
        "dare_ties", parts, given.base, merge.merge_dtype(given), normalize=False
    )
    title = f"DARE-TIES, strength {p.strength}, density {p.dare_density}"
    merge.run(settings, given.backdoored, title, out / "model", p.seed)
