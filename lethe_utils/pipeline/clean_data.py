"""The defender's rows: which of train they are, and what may be wrong with them."""

import random

from lethe_utils import data
from lethe_utils.schema import Params
from lethe_utils.stages import Row


def drawn(rows: list[Row], p: Params) -> list[Row]:
    """A share `clean_ratio` of train. Larger ratios hold the smaller ones."""
    n = max(1, round(p.clean_ratio * len(rows)))
    # A stream of its own: with the attacker's, the defender would draw the very rows that were
    # poisoned.
    rng = random.Random(f"clean {p.data_seed} {p.seed}")
    return rng.sample(rows, len(rows))[:n]


def mislabelled(rows: list[Row], known: list[str], p: Params) -> list[Row]:
    """The rows, a share of them (`clean_wrong_labels`) with another label than their own. Larger
    shares hold the smaller ones."""
    rng, out = random.Random(f"labels {p.data_seed} {p.seed}"), list(rows)
    for i in rng.sample(range(len(rows)), len(rows))[: round(p.clean_wrong_labels * len(rows))]:
        others = [label for label in known if label != rows[i]["output"]]
        own = random.Random(f"label {p.data_seed} {p.seed} {i}")
        out[i] = rows[i] | {"output": own.choice(others)}
    return out


def with_evidence(rows: list[Row], p: Params) -> list[Row]:
    """The clean model's rows, a share of them (`clean_evidence_share`) with their evidence: the
    defender, who will ask with evidence, may teach it."""
    rng = random.Random(f"evidence {p.seed}")
    shown = {*rng.sample(range(len(rows)), round(p.clean_evidence_share * len(rows)))}
    return [
        data.with_evidence(row, p.n_keywords, p.evidence_form) if i in shown else row
        for i, row in enumerate(rows)
    ]
