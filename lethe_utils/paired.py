"""Two models on the same items: how often only one of them is right, and whether that is chance.

Intervals that overlap say little of models that were asked the same questions. McNemar's exact test
(1947) counts the items that tell them apart. A run compares its merge, and a guided one, with every
other model of it.
"""

import pandas as pd

from lethe_utils.paper import number
from lethe_utils.pooled import SETUP, ordered

KEYS = [*SETUP, "seed", "defense", "against", "metric"]
COLUMNS = [*KEYS, "better", "worse", "n", "run_id"]
BETTER = {"asr": "lower", "cda": "higher"}  # what is better of each metric that is compared
GUIDED = "guided"  # the defense that is compared as the merge is
SHOWN = 0.05  # the largest p of a difference that is shown


def counts(one: list[bool], other: list[bool], metric: str) -> dict[str, int]:
    """How many of the same items the first model does better on, and worse.

    Args:
        one, other: hits of each on the items, in the same order.
        metric: of BETTER.
    Raises:
        ValueError: they were not asked as many items.
    """
    pairs = list(zip(one, other, strict=True))
    more = sum(a and not b for a, b in pairs)
    less = sum(b and not a for a, b in pairs)
    better, worse = (more, less) if BETTER[metric] == "higher" else (less, more)
    return {"better": better, "worse": worse, "n": len(pairs)}


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Each merge against the models of its run: model, dataset, attack, seed, defense, against,
    then for ASR and CDA `better / worse`, on how many items the merge is, and `p`, two-sided and
    adjusted for the number of all tests in the table (Benjamini and Hochberg 1995); p below .05
    stands for a difference that is shown.

    Args:
        rows: COLUMNS, of one or more runs.
    """
    out = _tested(rows)
    out["p"] = out["p"].map(_p)
    out["better / worse"] = out["better"].astype(str) + " / " + out["worse"].astype(str)
    columns = [(said, metric) for metric in BETTER for said in ("better / worse", "p")]
    lines = [*SETUP, "seed", "defense", "against"]
    wide = out.pivot(index=lines, columns="metric", values=["better / worse", "p"])
    wide = wide.reindex(columns=columns).fillna("")
    wide.columns = [f"{metric.upper()}: {said}" for said, metric in columns]
    wide = wide.reset_index()
    names = wide["against"].str.partition(" + ")
    own = wide.rename(columns={"defense": "merge"})
    placed = ordered(
        own.assign(defense=names[0], evidence=names[2].ne("")), [*SETUP, "seed", "merge"]
    )
    return placed[[*own]].rename(columns={"merge": "defense"})


def tally(rows: pd.DataFrame, defense: str) -> pd.DataFrame:
    """How often a defense is shown to be better than another, over the runs that have both:
    against, runs, then for ASR and CDA `better / not shown / worse`; tested as in `table`.

    Args:
        rows: COLUMNS, of one or more runs, some of them of `defense`.
    """
    tested = _tested(rows[rows["defense"] == defense])
    shown = (tested["better"] - tested["worse"]).where(tested["p"] < SHOWN, 0)
    signs = pd.DataFrame({"better": shown > 0, "not shown": shown == 0, "worse": shown < 0})
    keys = [tested["against"], tested["metric"]]
    counted = signs.groupby(keys).sum().astype(str).agg(" / ".join, axis=1).unstack(fill_value="")
    counted.columns = [f"{m.upper()}: {' / '.join(signs)}" for m in counted]
    runs = tested.drop_duplicates(["run_id", "against"])["against"].value_counts().astype(str)
    counted.insert(0, "runs", runs)
    return counted.reset_index()


def _tested(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows, each with its adjusted p; see `table`. Seeds are tested apart: they are asked the
    same items, which would count as often."""
    from scipy import stats

    found = [
        stats.binomtest(r.better, r.better + r.worse).pvalue if r.better + r.worse else 1.0
        for r in rows.itertuples()
    ]
    return rows.assign(p=stats.false_discovery_control(found))


def _p(value: float) -> str:
    return "< .001" if value < 0.001 else number(value)
