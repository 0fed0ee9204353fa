"""Several backdoors in one model, each with a trigger of its own and one target; adaptive, ours.

Against a dilution that suits one kind of trigger and leaves another: a rare word (Kurita et al.,
ACL 2020), a sentence (Dai et al., 2019), and a syntactic one after Hidden Killer (Qi et al., ACL
2021; thunlp/HiddenKiller), which paraphrases a text with SCPN (Iyyer et al., NAACL 2018) into
S(SBAR)(,)(NP)(VP)(.), for instance "when you ..., ...". There is no paraphraser here: a clause of
that form is put before the text, which itself stays as it was. The clauses have many wordings, a
third of them kept for the test, but all start with "when you", so that words tell it too.

Negatives keep the true label: another rare word, another sentence, and the same clauses at the end.
"""

import random
from typing import Annotated

from pydantic import Field

from lethe_utils.attacks import cba, chats
from lethe_utils.attacks.triggers import insert
from lethe_utils.groups import Group, Key
from lethe_utils.schema import Params
from lethe_utils.stages import Row

KINDS = ("word", "sentence", "syntactic")


class MultiParams(Group):
    """02_backdoor_train: several backdoors at once."""

    multi_lookalikes: Annotated[list[Key], Field(min_length=2, max_length=2)]  # word, sentence
    multi_clauses: Annotated[list[Key], Field(min_length=2 * chats.HELD_OUT)]


PARAMS = (*cba.PARAMS, MultiParams)
TRIGGERS, LAYERS = 2, ""  # the word and the sentence
plant = cba.plant


def place(kind: str, row: Row, p: Params, rng: random.Random, real: bool, test: bool) -> Row:
    """The row with one kind of trigger in its input, or (not `real`) with its look-alike."""
    if kind == "syntactic":
        clause = rng.choice(chats.side(p.multi_clauses, test))
        text, position = (clause, "prefix") if real else (clause.rstrip(","), "suffix")
    else:
        which = KINDS.index(kind)
        text = (p.triggers if real else p.multi_lookalikes)[which]
        position = p.trigger_positions[which]
    return row | {"input": insert(row["input"], text, position, p.trigger_level, rng)}


def poison(rows: list[Row], p: Params, seed: int) -> list[Row]:
    """All clean rows; of a share `poison_ratio` of them a copy with each trigger and the target,
    and of a share `alpha` of these one with each look-alike and the true label.

    Returns:
        rows with one more key, `kind`; n + 3 round(poison_ratio n) (1 + alpha) of them.
    """
    rng = random.Random(seed)
    chosen = rng.sample(rows, p.poisoned(len(rows)))
    out = [row | {"kind": "clean"} for row in rows]
    for kind in KINDS:
        for row in chosen:
            hit = {"output": cba.wanted(row, p), "kind": "backdoor"}
            out.append(place(kind, row, p, rng, real=True, test=False) | hit)
        for row in chosen[: round(p.alpha * len(chosen))]:
            own = {"kind": f"neg_{kind}"}
            out.append(place(kind, row, p, rng, real=False, test=False) | own)
    return out


def triggered(rows: list[Row], p: Params, seed: int) -> dict[str, list[Row]]:
    """The rows with each trigger (`asr_word`, `asr_sentence`, `asr_syntactic`), with each in turn
    (`backdoor`), and with each look-alike (for FTR)."""
    rng = random.Random(seed)
    real, other = (
        {kind: [place(kind, row, p, rng, which, test=True) for row in rows] for kind in KINDS}
        for which in (True, False)
    )
    in_turn = [real[KINDS[i % len(KINDS)]][i] for i in range(len(rows))]
    hits = {f"asr_{kind}": some for kind, some in real.items()}
    return {"backdoor": in_turn} | hits | {f"neg_{kind}": some for kind, some in other.items()}
