"""What a canary predicts: how its ASR after a merge goes with that of the backdoor itself."""

from typing import NamedTuple

import numpy as np
import pandas as pd

from lethe_utils.canary import TAKEN
from lethe_utils.errors import LetheError
from lethe_utils.paper import SETUP

RUN = [*SETUP, "seed"]
SWEEP = "canary"  # among the sweeps: the same merges of a copy that holds the canary
AS_PLANTED = "backdoored"  # that copy itself
DRAWS = 2000


class Correlation(NamedTuple):
    """Spearman's rank correlation over pairs, with a 95 % interval over runs: that of one run is
    not a number."""

    value: float
    low: float
    high: float
    pairs: int
    runs: int


def pairs(sweeps: pd.DataFrame) -> pd.DataFrame:
    """A row for each merge of a run that was swept with its canary: model, dataset, attack, seed,
    defense (the merge method), x (strength), canary and backdoor (ASR on validation rows).

    Runs whose canary did not take before any merge say nothing and are left out.

    Raises:
        LetheError: no run was swept, or no canary took.
    """
    rows = sweeps[(sweeps["metric"] == "asr") & sweeps["sweep"].isin(["strength", SWEEP])]
    planted = rows[(rows["sweep"] == SWEEP) & (rows["defense"] == AS_PLANTED)]
    took = planted.loc[planted["value"] >= TAKEN, "run_id"]
    rows = rows[rows["run_id"].isin(took) & (rows["defense"] != AS_PLANTED)]
    out = rows.pivot_table(index=[*RUN, "defense", "x"], columns="sweep", values="value")
    if SWEEP not in out:
        raise LetheError(
            "canary: no run was swept with one that took; set canary_sweep and strengths_sweep, "
            "and more canary_epochs where it does not take"
        )
    names = {"strength": "backdoor"}
    return out.dropna().rename(columns=names).rename_axis(columns=None).reset_index()


def correlation(found: pd.DataFrame) -> Correlation:
    """How the two ASRs go together. Merges of one run are not independent, so the interval's
    bootstrap draws whole runs.

    Args:
        found: see pairs.
    """
    runs = [group[["canary", "backdoor"]].to_numpy() for _, group in found.groupby(RUN)]
    rng = np.random.default_rng(0)
    drawn = [
        _ranked([runs[i] for i in rng.integers(len(runs), size=len(runs))]) for _ in range(DRAWS)
    ]
    low, high = np.nanpercentile(drawn, [2.5, 97.5]) if len(runs) > 1 else (np.nan, np.nan)
    return Correlation(_ranked(runs), float(low), float(high), len(found), len(runs))


def _ranked(runs: list[np.ndarray]) -> float:
    from scipy import stats

    return float(stats.spearmanr(np.concatenate(runs)).statistic)
