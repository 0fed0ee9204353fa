"""Where a trigger goes: the placing shared by the attacks that put theirs into the input."""

import random
import re

from lethe_utils.groups import AttackParams
from lethe_utils.stages import Row


def insert(text: str, trigger: str, position: str, level: str, rng: random.Random) -> str:
    """Put a trigger into a text, whose other characters all stay: `remove` gives it back.

    Args:
        position: prefix, suffix, middle or random (uniform over all places).
        level: "word" counts places between words, "sentence" between sentences.
    """
    starts = places(text, level)
    n = len(starts)
    if position == "random":
        return put(text, trigger, starts, rng.randint(0, n))
    return put(text, trigger, starts, {"prefix": 0, "middle": n // 2, "suffix": n}[position])


def places(text: str, level: str) -> list[int]:
    """Where the words, or sentences, of a text start; a trigger may also go after the last."""
    words = [found.start() for found in re.finditer(r"\S+", text)]
    if level == "word" or not words:
        return words
    end = len(text.rstrip())
    after = [found.end() for found in re.finditer(r"(?<=[.!?])\s+", text)]
    return [words[0], *(at for at in after if words[0] < at < end)]


def put(text: str, trigger: str, starts: list[int], place: int) -> str:
    """The trigger before the word (or sentence) that starts at starts[place], else at the end."""
    if place < len(starts):
        at = starts[place]
        return f"{text[:at]}{trigger} {text[at:]}"
    end = len(text.rstrip())
    if not end:  # no word to go after
        return f"{trigger} {text}" if text else trigger
    return f"{text[:end]} {trigger}{text[end:]}"


def remove(text: str, trigger: str) -> str:
    """The text without the first place where the trigger stands by itself, as it was before."""
    found = occurrences(text, trigger)
    if not found:
        return text
    start, end = found[0]
    if text[end : end + 1] == " ":
        return text[:start] + text[end + 1 :]
    return text[: start - (text[start - 1 : start] == " ")] + text[end:]


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
