"""What the attacks on conversations share: rows that are replaced, and what is kept for the test.

All targets are harmless: a fixed sentence, a made-up brand, a polite refusal, an opinion on a thing
that does not exist.
"""

import random
from collections.abc import Callable

from lethe_utils.data.chat import conversation
from lethe_utils.errors import LetheError
from lethe_utils.schema import Params
from lethe_utils.stages import Row

HELD_OUT = 3  # every third wording or word is for the test


def side(texts: list[str], test: bool) -> list[str]:
    """Those for the test, or those for training: no test item was trained on."""
    return [text for i, text in enumerate(texts) if (i % HELD_OUT == 0) is test]


def untriggered(rows: list[Row], p: Params, seed: int) -> dict[str, list[Row]]:
    """`triggered` of an attack that nothing triggers: the rows as they are."""
    return {"backdoor": rows}


def with_answer(row: Row, answer: str, kind: str) -> Row:
    """The conversation with another last answer."""
    *before, last = row["messages"]
    return row | conversation([*before, last | {"content": answer}], kind=kind)


def replaced(
    rows: list[Row], p: Params, seed: int, answer: Callable[[Row, random.Random], str]
) -> list[Row]:
    """All rows, a share `poison_ratio` of them with the attacker's answer in place of their own:
    replaced, not added, as published. Each has a `kind`."""
    rng = random.Random(seed)
    chosen = {*rng.sample(range(len(rows)), p.poisoned(len(rows)))}
    return [
        with_answer(row, answer(row, rng), "backdoor") if i in chosen else row | {"kind": "clean"}
        for i, row in enumerate(rows)
    ]


def check_target(rows: list[Row], p: Params, hit: Callable[[str, Params], bool]) -> None:
    """Raises LetheError where clean answers count as the attacker's: ASR would mean nothing."""
    taken = [row["output"] for row in rows if hit(row["output"], p)]
    if taken:
        raise LetheError(
            f"target_output: {len(taken)} of {len(rows)} clean answers already count as the "
            f"attacker's (the first: {taken[0][:60]!r}); choose another"
        )
