"""Lethe's internal dilution: the backdoored model merged with the clean one, a variant per method.

External dilution, evidence, needs no model of its own: the controls and the merges are also asked
with it (n_keywords: 0 leaves it out; merge_methods: [] leaves the merges out).
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from lethe_utils.defenses import Given
from lethe_utils.evidence import Form
from lethe_utils.groups import DefenderParams, Group, Key, Ratio

MergeMethod = Literal["linear", "slerp", "ties", "passthrough"]


class MergeParams(Group):
    """Internal dilution."""

    strength: Ratio  # 0: the backdoored model, 1: the clean model


class LetheParams(Group):
    merge_method: MergeMethod  # the one that keyword and clean-ratio sweeps use


class LetheColumns(Group):
    """What is asked, beside the sweeps."""

    merge_methods: list[MergeMethod]
    n_keywords: Annotated[int, Field(ge=0)]  # external dilution; 0: no evidence
    evidence_form: Form  # where it stands and what it says, see evidence.add_evidence
    evidence_models: list[Key]  # those asked with it; empty: the controls and all merges


PARAMS = (MergeParams, LetheParams)
COLUMNS = (LetheColumns,)
NEEDS = "clean model"
TRAININGS = 0
BYTES_PER_WEIGHT = 2.0  # one model answers; merging is on the CPU


def variants(p: DefenderParams) -> dict[str, dict[str, Any]]:
    return {method: {"merge_method": method} for method in p.merge_methods}


def purify(given: Given, out: Path) -> None:
    from lethe_utils import merge

    p, models = given.p, (given.backdoored, given.clean, given.base)
    merge.merge(p.merge_method, *models, p.strength, out / "model", merge.merge_dtype(given))
