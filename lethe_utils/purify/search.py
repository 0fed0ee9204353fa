"""Guided dilution of a suspect: curves of t found with its own canary; see lethe_utils.guided."""

import ast
from pathlib import Path
from typing import Any

import pandas as pd

from lethe_utils import guided, merge
from lethe_utils.models import inspect
from lethe_utils.purify.case import Case
from lethe_utils.purify.dilute import GUIDED, base_model, suspect_model
from lethe_utils.purify.rounds import asked_by, canary_model, clean_model
from lethe_utils.schema import digest
from lethe_utils.stages import stage


def searched(case: Case) -> Path:
    """The merges that the search tried, as search.csv, judged on the stopping rows: neither the
    clean model nor the canary was trained on them."""
    rows = guided.rows(case.stopping, case.labels, case.p)
    inputs = {"suspect": canary_model(case), "clean": clean_model(case)}

    def build(out: Path) -> None:
        guide = guided.Guide(inputs["suspect"], inputs["clean"], base_model(case) / "model", rows)
        dtype = inspect.stored_dtype(suspect_model(case) / "model")
        guided.search(guide, case.p, out, dtype).to_csv(out / "search.csv", index=False)

    made_of = asked_by(case) | {"rows": digest(rows), "most": guided.MOST}
    return stage("search", case.suspect.name, made_of, inputs, build)


def trials(case: Case) -> pd.DataFrame:
    """What the search tried; see guided.search."""
    read = dict.fromkeys(merge.SLERP_CURVES, ast.literal_eval)
    return pd.read_csv(searched(case) / "search.csv", converters=read)


def found(case: Case) -> dict[str, Any]:
    """The point that the search found: model, strength (the mean of t) and curves."""
    curves = guided.best(trials(case))
    return {"model": GUIDED, "strength": merge.mean_t(curves), "curves": curves}
