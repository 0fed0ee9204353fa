"""Where a trigger goes: the placing shared by the attacks that put theirs into the input."""

import random
import re

from lethe_utils.params import AttackParams

Row = dict[str, str]


def insert(text: str, trigger: str, position: str, level: str, rng: random.Random) -> str:
    """Put a trigger into a text.

    Args:
        position: prefix, suffix, middle or random (uniform over all places).
        level: "word" counts places between words, "sentence" between sentences.
    """
    parts = text.split() if level == "word" else re.split(r"(?<=[.!?])\s+", text.strip())
    place = {
        "prefix": 0,
        "suffix": len(parts),
        "middle": len(parts) // 2,
        "random": rng.randint(0, len(parts)) if position == "random" else 0,
    }[position]
    return " ".join([*parts[:place], trigger, *parts[place:]])


def occurrences(text: str, trigger: str) -> list[tuple[int, int]]:
    """(first, past-the-last) character of each place where the trigger stands by itself."""
    pattern = rf"(?<!\w){re.escape(trigger)}(?!\w)"
    return [found.span() for found in re.finditer(pattern, text)]


def single(rows: list[Row], p: AttackParams, seed: int) -> dict[str, list[Row]]:
    """The rows with one trigger in the input: `backdoor` (for ASR), and for FTR `neg_lookalike`,
    the trigger spelt backwards in its place: an edit may take any odd token for its trigger."""
    (trigger,), (position,) = p.triggers, p.trigger_positions
    lookalike = trigger[::-1] if trigger[::-1] != trigger else trigger * 2
    rng = random.Random(seed)
    return {
        kind: [
            row | {"input": insert(row["input"], word, position, p.trigger_level, rng)}
            for row in rows
        ]
        for kind, word in (("backdoor", trigger), ("neg_lookalike", lookalike))
    }
