"""Lethe's internal dilution: the suspect merged with the clean model, a variant per merge method.

External dilution, evidence, needs no model of its own: every model of a Lethe run is also asked
with it (n_keywords: 0 leaves it out; merge_methods: [] leaves the merges out).
"""

from pathlib import Path
from typing import Any

from lethe_utils import merge
from lethe_utils.defenses import Given
from lethe_utils.params import DefenderParams, MergeParams

PARAMS = (MergeParams,)
NEEDS = "clean model"
TRAININGS = 0
BYTES_PER_WEIGHT = 2.0  # one model answers; merging is on the CPU


def variants(p: DefenderParams) -> dict[str, dict[str, Any]]:
    return {method: {"merge_methods": [method]} for method in p.merge_methods}


def purify(given: Given, out: Path) -> None:
    p = given.p
    (method,) = p.merge_methods
    models = given.suspect, given.reference, given.base
    merge.merge(method, *models, p.strength, out / "model", merge.merge_dtype(p.device))
