"""Tables of the sweeps whose points are no numbers: forms of evidence, sources of clean rows,
seeds. Cells are as in tables.py, on validation rows."""

import pandas as pd

from lethe_utils import evidence
from lethe_utils.errors import LetheError
from lethe_utils.metrics import CLEAN_RATIO, CLEAN_SOURCE, WRONG_LABELS
from lethe_utils.pooled import SETUP, in_order, pool, select
from lethe_utils.tables import wide

SOURCES = {"train": "the attacker's train", "base": "written by the base itself"}


def evidence_table(sweeps: pd.DataFrame) -> pd.DataFrame:
    """What evidence does, by its form: model, dataset, attack, seeds, evidence, then ASR and CDA of
    the backdoored, the clean and the merged model.

    Raises:
        LetheError: no form was measured (evidence_forms_sweep, clean_evidence_sweep).
    """
    rows = sweeps[sweeps["sweep"].str.contains("evidence")]
    scored = _scored(rows, "no forms of evidence; list some in evidence_forms_sweep")
    shares = "clean model trained with it, share " + scored["x"].map("{:g}".format)
    form = scored["sweep"].str.removeprefix("evidence ").map(evidence.FORMS)
    return _lines(scored.assign(evidence=form.fillna(shares)), "evidence")


def clean_rows_table(sweeps: pd.DataFrame) -> pd.DataFrame:
    """What a defender's rows are worth, from elsewhere, partly mislabelled, fewer or more: model,
    dataset, attack, seeds, clean rows, then ASR and CDA of the clean and the merged model, empty
    where one was not asked.

    Raises:
        LetheError: none was measured (clean_sources_sweep, clean_wrong_labels_sweep,
            clean_ratios_sweep).
    """
    rows = sweeps[sweeps["sweep"].map(is_of_clean_rows)]
    scored = _scored(rows, "no other clean rows; list some in clean_sources_sweep")
    kind, x = scored["sweep"], scored["x"].map("{:g}".format)
    named = kind.str.removeprefix(CLEAN_SOURCE).replace(SOURCES)
    named = named.mask(kind == WRONG_LABELS, x + " of the labels wrong")
    named = named.mask(kind == CLEAN_RATIO, x + " of train")
    return _lines(scored.assign(**{"clean rows": named}), "clean rows")


def is_of_clean_rows(sweep: str) -> bool:
    """Whether a sweep is over the rows that the clean model is trained on."""
    return sweep.startswith(CLEAN_SOURCE) or sweep in (WRONG_LABELS, CLEAN_RATIO)


def clean_seed_table(sweeps: pd.DataFrame) -> pd.DataFrame:
    """What it does that attacker and defender start their LoRAs alike: model, dataset, attack,
    seeds, clean model's LoRA, then ASR and CDA of the clean model and of each merge.

    Raises:
        LetheError: it was not measured (clean_seeds_sweep).
    """
    rows = sweeps[sweeps["sweep"] == "clean_seed"]
    scored = _scored(rows, "no seeds of clean models; list some in clean_seeds_sweep")
    start = ("starts apart, seed " + scored["x"].map("{:g}".format)).where(
        scored["x"] > 0, "starts as the attacker's"
    )
    return _lines(scored.assign(**{"clean model's LoRA": start}), "clean model's LoRA")


def _scored(sweeps: pd.DataFrame, lacking: str) -> pd.DataFrame:
    """ASR and CDA at each point, seeds pooled. Raises LetheError where there is none."""
    if sweeps.empty:
        raise LetheError(f"sweeps table: {lacking}")
    scored = sweeps[sweeps["metric"].isin(["asr", "cda"])]
    return pool(select(scored), [*SETUP, "sweep", "x"])


def _lines(scored: pd.DataFrame, point: str) -> pd.DataFrame:
    """A line for each value of the column `point`, with every model's ASR and CDA."""
    columns = [f"{d} {m}" for d in in_order(scored["defense"]) for m in ("ASR", "CDA")]
    scored = scored.assign(column=scored["defense"] + " " + scored["metric"].str.upper())
    return wide(scored, [*SETUP, "seeds", point], "column", columns)
