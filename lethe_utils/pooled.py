"""Tidy results, checked and pooled: what every table and figure starts from."""

import numpy as np
import pandas as pd

from lethe_utils import defenses, metrics, paper
from lethe_utils.errors import LetheError
from lethe_utils.metrics import COLUMNS
from lethe_utils.paper import SETUP
from lethe_utils.schema import choices

NUMBERS = ["value", "n", "ci_low", "ci_high"]
CONTROLS = ["backdoored", "base", "clean"]
MERGES = ["linear", "slerp", "ties", "passthrough"]
READ_FIRST = [*CONTROLS, "finetune", *MERGES]  # what every run of the default has


def select(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of a results or sweeps table, checked, with their known columns only.

    Raises:
        LetheError: a column or a key is missing, a share or its interval is impossible, or one
            measurement is there more than once (the runs are named).
    """
    missing = [c for c in COLUMNS if c not in table]
    if missing:
        raise LetheError(f"results table: no column {', '.join(missing)}; see metrics.COLUMNS")
    if table.empty:
        raise LetheError("results table: no rows; run 05_evidence_eval first")
    sweep_keys = [c for c in ("sweep", "x") if c in table]
    keys = sweep_keys + [c for c in COLUMNS if c not in [*NUMBERS, "run_id"]]
    out = table[sweep_keys + COLUMNS].reset_index(drop=True)
    out[NUMBERS] = out[NUMBERS].apply(pd.to_numeric, errors="coerce")
    _check_numbers(out, keys)
    out["evidence"] = out["evidence"].astype(int)
    _check_runs(out, keys)
    return out


def _check_numbers(table: pd.DataFrame, keys: list[str]) -> None:
    rounding = 1e-9  # a Wilson bound at 0 or 1 may miss it by a rounding error
    low, value, high = table["ci_low"], table["value"], table["ci_high"]
    is_amount = table["metric"].isin(metrics.AMOUNTS)
    checks = {
        "a key or run_id is empty": table[[*keys, "run_id"]].notna().all(axis=1),
        "evidence is not 0 or 1": table["evidence"].isin([0, 1]),
        "value is not within [0, 1]": value.between(0, 1) | is_amount & (value >= 0),
        "value is not within its interval": value.between(low - rounding, high + rounding),
        "n is not a count above 0": (table["n"] > 0) & (table["n"] % 1 == 0),
    }
    for problem, passed in checks.items():
        if not passed.all():
            bad = table[~passed].iloc[0].to_dict()
            raise LetheError(f"results table: {problem} in {(~passed).sum()} rows, first {bad}")


def _check_runs(table: pd.DataFrame, keys: list[str]) -> None:
    repeated = table[table.duplicated(keys, keep=False)]
    twice = repeated[repeated.duplicated([*keys, "run_id"], keep=False)]
    runs = ", ".join(sorted((twice if len(twice) else repeated)["run_id"].unique()))
    if len(twice):
        raise LetheError(f"results table: the same rows are there twice for {runs}; drop one copy")
    if len(repeated):
        example = ", ".join(str(repeated.iloc[0][k]) for k in keys)
        raise LetheError(
            f"results table: runs {runs} measured the same thing ({example}); keep one run"
        )


def one_setup(table: pd.DataFrame, *setup: str) -> pd.DataFrame:
    """The rows of one model, data set and attack. Raises LetheError when there are none."""
    rows = table[(table[SETUP] == list(setup)).all(axis=1)]
    if rows.empty:
        known = "; ".join(
            sorted({", ".join(keys) for keys in table[SETUP].itertuples(index=False)})
        )
        raise LetheError(f"results table: no rows of {', '.join(setup)}; it has {known}")
    return rows


def on_test(table: pd.DataFrame) -> pd.DataFrame:
    """`select`, test split only. Raises LetheError when that leaves nothing."""
    rows = select(table)
    rows = rows[rows["split"] == "test"]
    if rows.empty:
        raise LetheError("results table: no rows of the test split; sweeps go to figures.sweep")
    return rows


def pool(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """One row per (by, defense, evidence, metric): the rest (seeds) pooled (metrics.together), with
    name ("slerp + evidence") and seeds (how many); setups in the order met, then plain before
    evidence, then `in_order`. A measurement that stands alone keeps its own interval."""
    keys = [*by, "defense", "evidence", "metric"]
    groups = table.astype({"n": int}).groupby(keys, sort=False)
    out, size = groups[NUMBERS].first().reset_index(), groups.size()
    numbers, places = table[NUMBERS].to_numpy(), groups.indices
    rows = [
        metrics.together(key[-1], [*map(metrics.Measured._make, numbers[places[key]])])
        for key in size.index[size > 1]
    ]
    out.loc[(size > 1).to_numpy(), NUMBERS] = np.array(rows).reshape(-1, len(NUMBERS))
    out = out.astype({"n": int})
    out["seeds"] = groups["seed"].nunique().to_numpy()
    out["name"] = out["defense"] + out["evidence"].map({0: "", 1: " + evidence"})
    return ordered(out, by)


def ordered(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Rows of `defense` and `evidence`: setups (`by`) in the order met, then plain before evidence,
    then `in_order`."""
    ranks = {
        "setup": table.groupby(by, sort=False).ngroup(),
        "evidence": table["evidence"],
        "defense": table["defense"].map(in_order(table["defense"]).index),
    }
    sequence = pd.DataFrame(ranks).sort_values(list(ranks), kind="stable").index
    return table.loc[sequence].reset_index(drop=True)


def by_full_name(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """`pool`, its `defense` being the full name ("slerp + evidence")."""
    return pool(table, by).drop(columns="defense").rename(columns={"name": "defense"})


def in_order(names: pd.Series) -> list[str]:
    """The defenses present: controls, merges, the paper's, the others by name, each followed by its
    variants; what no module makes comes last. Else in the order met."""
    known = list(dict.fromkeys([*CONTROLS, *MERGES, *paper.COLUMNS, *choices("defenses")]))

    def place(name: str) -> int:
        kind = name if name in known else defenses.registered(name)
        return known.index(kind) if kind else len(known)

    return sorted(names.unique(), key=place)
