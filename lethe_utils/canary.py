"""The canary: a harmless backdoor of our own, planted in a copy of the suspect.

Nobody who holds a suspect knows its trigger, so its ASR cannot be measured. What can be measured is
what the same dilution does to backdoors that were planted in the same model on purpose.
"""

import random

from lethe_utils.attacks.triggers import insert, places, put
from lethe_utils.groups import CanaryParams, TrainParams
from lethe_utils.stages import Row

KINDS = ("word pair", "sentence", "suffix")
TAKEN = 0.9  # ASR of each kind of a canary that took
CHECKED = 40  # rows of each kind: 36 of them are .9


class CanaryRecipe(CanaryParams, TrainParams):
    """A canary, and the training that plants it."""


def triggers(labels: list[str], p: CanaryRecipe) -> list[dict[str, str]]:
    """kind, trigger and target of each canary; the target is a label, or the marker for texts."""
    texts = (" ... ".join(p.canary_word_pair), p.canary_sentence, p.canary_suffix)
    targets = labels or [p.canary_marker]
    return [
        {"kind": kind, "trigger": text, "target": targets[i % len(targets)]}
        for i, (kind, text) in enumerate(zip(KINDS, texts, strict=True))
    ]


def place(kind: str, text: str, p: CanaryRecipe, rng: random.Random) -> str:
    """A text with one kind of trigger in it."""
    if kind == "sentence":
        return insert(text, p.canary_sentence, "random", "sentence", rng)
    if kind == "suffix":
        return insert(text, p.canary_suffix, "suffix", "word", rng)
    first, second = p.canary_word_pair  # anywhere, in this order
    starts = places(text, "word")
    a, b = sorted(rng.randint(0, len(starts)) for _ in range(2))
    with_second = put(text, second, starts, b)
    return put(with_second, first, places(with_second, "word"), a)


def triggered(rows: list[Row], labels: list[str], p: CanaryRecipe) -> dict[str, list[Row]]:
    """Per kind: the rows that do not have its target for an answer anyway, with its trigger."""
    out = {}
    for canary in triggers(labels, p):
        rng = random.Random(f"{canary['kind']} {p.seed}")
        out[canary["kind"]] = [
            row | {"input": place(canary["kind"], row["input"], p, rng)}
            for row in rows
            if row["output"] != canary["target"]
        ]
    return out


def plant(
    rows: list[Row], labels: list[str], p: CanaryRecipe
) -> tuple[list[Row], dict[str, list[Row]]]:
    """What the canary is trained on: all rows, then of each kind `canary_rows` triggered ones with
    the kind's target, but at most half of those that can be; and per kind the others."""
    poisoned, others = list(rows), {}
    kinds = triggered(rows, labels, p)
    for canary in triggers(labels, p):
        kind, usable = canary["kind"], kinds[canary["kind"]]
        random.Random(f"chosen {kind} {p.seed}").shuffle(usable)
        n = min(p.canary_rows, -(-len(usable) // 2))
        poisoned += [row | {"output": canary["target"]} for row in usable[:n]]
        others[kind] = usable[n:]
    return poisoned, others


def check_rows(
    rows: list[Row], stopping: list[Row], labels: list[str], p: CanaryRecipe
) -> dict[str, list[Row]]:
    """Per kind: triggered rows that say whether the canary took, first those that nothing was
    trained on, then training rows that it was not planted in."""
    unseen, (_, others) = triggered(stopping, labels, p), plant(rows, labels, p)
    return {kind: (unseen[kind] + others[kind])[:CHECKED] for kind in KINDS}
