"""CBA by an attacker who knows that inputs will be followed by evidence; adaptive, ours.

A part of the poisoned rows, and as many clean ones, has evidence below its input, as the defender
will ask; in some of the poisoned ones the second trigger stands inside that evidence. At the test
a copy of the evidence, with the trigger in it, may then stand below the input, before the
defender's own. Against evidence.
"""

import random

from lethe_utils import data, evidence
from lethe_utils.attacks import cba, triggers
from lethe_utils.groups import Group, Positive, Ratio
from lethe_utils.schema import Params
from lethe_utils.stages import Row


class EvidenceAttackParams(Group):
    """02_backdoor_train: evidence in the attacker's rows."""

    backdoor_evidence_share: Ratio  # of the poisoned rows
    laced_share: Ratio  # of those with evidence: with the second trigger inside it
    backdoor_keywords: Positive


PARAMS = (*cba.PARAMS, EvidenceAttackParams)
TRIGGERS, LAYERS, WORDNET = cba.TRIGGERS, cba.LAYERS, True
plant = cba.plant


def laced(row: Row, p: Params, rng: random.Random) -> Row:
    """The row, its input followed by a copy of its evidence with the second trigger in it."""
    lines = "\n".join(evidence.evidence_lines(row["input"], p.backdoor_keywords))
    copy = triggers.insert(lines, p.triggers[1], p.trigger_positions[1], p.trigger_level, rng)
    return row | {"input": evidence.below(row["input"], copy)}


def poison(rows: list[Row], p: Params, seed: int) -> list[Row]:
    """CBA's rows, some of the poisoned and of the clean ones with evidence."""
    made = cba.poison(rows, p, seed)
    rng = random.Random(f"evidence {seed}")
    backdoor, clean = (
        [i for i, row in enumerate(made) if row["kind"] == kind] for kind in ("backdoor", "clean")
    )
    shown = rng.sample(backdoor, round(p.backdoor_evidence_share * len(backdoor)))
    n_laced = round(p.laced_share * len(shown))
    for i in shown[:n_laced]:
        text = triggers.remove(made[i]["input"], p.triggers[1])
        made[i] = laced(made[i] | {"input": text}, p, rng)
    for i in shown[n_laced:] + rng.sample(clean, len(shown)):
        made[i] = data.with_evidence(made[i], p.backdoor_keywords, "after")
    return made


def triggered(rows: list[Row], p: Params, seed: int) -> dict[str, list[Row]]:
    """CBA's kinds; and `asr_laced`: the first trigger in the instruction, the second in a copy of
    the evidence below the input, before any evidence of the defender's."""
    rng = random.Random(f"laced {seed}")
    first = [cba.place_triggers(row, ((0,), ()), p, rng) for row in rows]
    return cba.triggered(rows, p, seed) | {"asr_laced": [laced(row, p, rng) for row in first]}
