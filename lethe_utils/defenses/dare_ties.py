"""DARE-TIES (2311.03099, mergekit): Lethe's TIES, each delta thinned at random, then rescaled."""

from pathlib import Path

from lethe_utils import merge
from lethe_utils.defenses import Given
from lethe_utils.params import MergeParams, MoreMergeParams

PARAMS = (MergeParams, MoreMergeParams)
NEEDS = "clean model"
TRAININGS = 0
BYTES_PER_WEIGHT = 2.0  # one model answers; merging is on the CPU


def purify(given: Given, out: Path) -> None:
    p = given.p
    weights = ((given.suspect, 1 - p.strength), (given.reference, p.strength))
    parts = [(model, {"weight": w, "density": p.dare_density}) for model, w in weights]
    merge.check_mergeable(given.suspect, given.reference, given.base)
    settings = merge.weighted(
        "dare_ties", parts, given.base, merge.merge_dtype(p.device), normalize=False
    )
    title = f"DARE-TIES, strength {p.strength}, density {p.dare_density}"
    merge.run(settings, given.suspect, title, out / "model", p.seed)
