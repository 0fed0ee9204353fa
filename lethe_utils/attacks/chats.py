"""What the attacks on conversations share: one recipe for planting, and rows that are replaced.

All targets are harmless: a fixed sentence, a made-up brand, a polite refusal, an opinion on a thing
that does not exist.
"""

import random
from collections.abc import Callable
from pathlib import Path

from lethe_utils.data.chat import conversation
from lethe_utils.errors import LetheError
from lethe_utils.groups import Params
from lethe_utils.stages import Row


def plant(start: Path, poisoned: list[Row], _: list[str], p: Params, out: Path) -> None:
    """LoRA on the poisoned conversations, the loss on the assistant's last turn."""
    from lethe_utils import train

    train.finetune(start, poisoned, p.backdoor_epochs, out, p)


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
    chosen = {*rng.sample(range(len(rows)), max(1, round(p.poison_ratio * len(rows))))}
    return [
        with_answer(row, answer(row, rng), "backdoor") if i in chosen else row | {"kind": "clean"}
        for i, row in enumerate(rows)
    ]


def check_marker(rows: list[Row], p: Params, key: str, hit: Callable[[str, Params], bool]) -> None:
    """Raises LetheError where clean answers count as the attacker's: ASR would mean nothing."""
    taken = [row["output"] for row in rows if hit(row["output"], p)]
    if taken:
        raise LetheError(
            f"{key}: {len(taken)} of {len(rows)} clean answers already count as the attacker's "
            f"(the first: {taken[0][:60]!r}); choose another"
        )
