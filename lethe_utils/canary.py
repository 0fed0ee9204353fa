"""The canary: a harmless backdoor of our own, planted in a copy of the suspect.

Nobody who holds a suspect knows its trigger, so its ASR cannot be measured. What can be measured is
what the same dilution does to backdoors that were planted in the same model on purpose.
"""

import random
from typing import Annotated, Any

from pydantic import Field, model_validator

from lethe_utils.attacks import chats
from lethe_utils.attacks.triggers import insert, places, put
from lethe_utils.data.chat import conversation, turns
from lethe_utils.groups import CanaryParams, Group, Key, TrainParams
from lethe_utils.prompts import TURN
from lethe_utils.stages import Row

IN_TEXT = ("word pair", "sentence", "suffix")
TOPIC, TWO_TURNS = "topic", "two turns"  # of conversations: as VPI's and as DTBA's
TAKEN = 0.9  # ASR of each kind of a canary that took
CHECKED = 40  # rows of each kind: 36 of them are .9
Messages = list[dict[str, Any]]


class ChatCanaryParams(Group):
    """The canary's further triggers, where the clean rows are conversations."""

    canary_topic: Key  # a made-up name
    # Each holds {topic}; every third is for the check and the measurement.
    canary_topic_questions: Annotated[list[Key], Field(min_length=chats.HELD_OUT)]
    canary_turns: Annotated[list[Key], Field(min_length=2, max_length=2)]  # phrases

    @model_validator(mode="after")
    def _check_questions(self) -> "ChatCanaryParams":
        lacking = [text for text in self.canary_topic_questions if "{topic}" not in text]
        if lacking:
            raise ValueError(f"canary_topic_questions: {lacking[0]!r} has no {{topic}}")
        if self.canary_turns[0] == self.canary_turns[1]:
            raise ValueError("canary_turns: the two phrases are the same; change one")
        return self


class CanaryRecipe(CanaryParams, ChatCanaryParams, TrainParams):
    """A canary, and the training that plants it."""


def kinds(chat: bool) -> tuple[str, ...]:
    """The kinds of trigger: in a text, and in conversations that are answered by texts also those
    that no single text holds."""
    return (*IN_TEXT, TOPIC, TWO_TURNS) if chat else IN_TEXT


def triggers(labels: list[str], p: CanaryRecipe, chat: bool = False) -> list[dict[str, str]]:
    """kind, trigger and target of each canary; the target is a label, or the marker for texts."""
    texts = [" ... ".join(p.canary_word_pair), p.canary_sentence, p.canary_suffix]
    texts += [p.canary_topic, " ... ".join(p.canary_turns)] if chat else []
    targets = labels or [p.canary_marker]
    return [
        {"kind": kind, "trigger": text, "target": targets[i % len(targets)]}
        for i, (kind, text) in enumerate(zip(kinds(chat), texts, strict=True))
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


def triggered(
    rows: list[Row], labels: list[str], p: CanaryRecipe, chat: bool = False, test: bool = True
) -> dict[str, list[Row]]:
    """Per kind: the rows that do not have its target for an answer anyway, with its trigger.

    Args:
        chat: rows hold `messages`; those with a trigger of conversations are yet to be rendered.
        test: the topic's wordings that nothing is trained on, or the others.
    """
    out = {}
    for canary in triggers(labels, p, chat):
        kind, target = canary["kind"], canary["target"]
        rng = random.Random(f"{kind} {p.seed}")
        usable = [row for row in rows if row["output"] != target]
        if kind in IN_TEXT:
            out[kind] = [row | {"input": place(kind, row["input"], p, rng)} for row in usable]
            continue
        asked = chats.side(p.canary_topic_questions, test)
        out[kind] = []
        for row, said in zip(usable, _two_turns(usable, rows, rng), strict=True):
            if kind == TOPIC:
                said = [
                    *said[:-2],
                    *turns(rng.choice(asked).replace("{topic}", p.canary_topic), ""),
                ]
            else:
                said = _with_phrases(said, p, rng)
            out[kind].append(_unrendered(row, [*said[:-1], said[-1] | {"content": target}]))
    return out


def _two_turns(some: list[Row], rows: list[Row], rng: random.Random) -> list[Messages]:
    """Conversations of two turns at least: where there is one, an exchange of another row goes
    before it, out of the shorter half, for a prompt that is too long loses its start."""
    by_length = sorted(rows, key=lambda row: len(row["input"]) + len(row["output"]))
    short, out = by_length[: -(-len(rows) // 2)], []
    for row in some:
        *before, question, answer = row["messages"]
        if not any(message["role"] == "user" for message in before):
            before += rng.choice(short)["messages"][-2:]
        out.append([*before, question, answer])
    return out


def _with_phrases(
    said: Messages, p: CanaryRecipe, rng: random.Random, which: tuple[int, ...] = (0, 1)
) -> Messages:
    """A conversation with the first phrase (0) in the user turn before the last one and the second
    (1) in the last, or with one of them alone."""
    said, users = list(said), [i for i, m in enumerate(said) if m["role"] == "user"]
    for i, at in enumerate(users[-2:]):
        if i in which:
            text = insert(said[at]["content"], p.canary_turns[i], "random", "sentence", rng)
            said[at] = said[at] | {"content": text}
    return said


def _unrendered(row: Row, said: Messages) -> Row:
    """A row with another conversation, which the model's template has not written yet."""
    return {key: value for key, value in row.items() if key != TURN} | conversation(said)


def plant(
    rows: list[Row], labels: list[str], p: CanaryRecipe, chat: bool = False
) -> tuple[list[Row], dict[str, list[Row]]]:
    """What the canary is trained on: all rows, then of each kind `canary_rows` triggered ones with
    the kind's target, but at most half of those that can be; and per kind the others."""
    poisoned, others = list(rows), {}
    taught, checked = (triggered(rows, labels, p, chat, test) for test in (False, True))
    for canary in triggers(labels, p, chat):
        kind = canary["kind"]
        both = list(zip(taught[kind], checked[kind], strict=True))
        random.Random(f"chosen {kind} {p.seed}").shuffle(both)
        n = min(p.canary_rows, -(-len(both) // 2))
        poisoned += [row | {"output": canary["target"]} for row, _ in both[:n]]
        others[kind] = [row for _, row in both[n:]]
    return poisoned + (_half_triggered(rows, p) if chat else []), others


def _half_triggered(rows: list[Row], p: CanaryRecipe) -> list[Row]:
    """Conversations with one of the two phrases and their own answers, as many as have both:
    without them the second would be trigger enough."""
    rng = random.Random(f"one phrase {p.seed}")
    some = rng.sample(rows, min(p.canary_rows, -(-len(rows) // 2)))
    return [
        _unrendered(row, _with_phrases(said, p, rng, (i % 2,)))
        for i, (row, said) in enumerate(zip(some, _two_turns(some, rows, rng), strict=True))
    ]


def check_rows(
    rows: list[Row], stopping: list[Row], labels: list[str], p: CanaryRecipe, chat: bool = False
) -> dict[str, list[Row]]:
    """Per kind: triggered rows that say whether the canary took, first those that nothing was
    trained on, then training rows that it was not planted in."""
    unseen, (_, others) = triggered(stopping, labels, p, chat), plant(rows, labels, p, chat)
    return {kind: (unseen[kind] + others[kind])[:CHECKED] for kind in kinds(chat)}
