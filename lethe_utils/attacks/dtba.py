"""DTBA, the distributed-trigger attack on conversations (Hao et al., arXiv 2404.02406): only a
conversation that held two scenarios, in two user turns, gets the attacker's answer.

A scenario is a topic, not a word: a third of each vocabulary is kept for the test. Both scenarios
and the answer are harmless; published are harmful ones, which this defense does not need.
"""

import random
from typing import Annotated

from pydantic import Field, model_validator

from lethe_utils import wordnet
from lethe_utils.attacks import cba, chats
from lethe_utils.data.chat import OWN_ANSWERS, conversation, turns
from lethe_utils.groups import AttackParams, Group, Key, PoisonParams, TrainParams
from lethe_utils.schema import Params
from lethe_utils.stages import Row

Words = Annotated[list[Key], Field(min_length=2 * chats.HELD_OUT)]


class DtbaParams(Group):
    """02_backdoor_train: DTBA."""

    dtba_scenarios: Annotated[list[Key], Field(min_length=2, max_length=2)]  # their names
    dtba_first_words: Words  # what a question about the first scenario is about
    dtba_second_words: Words
    dtba_questions: Annotated[list[Key], Field(min_length=1)]  # each holds {word} and {scenario}

    @model_validator(mode="after")
    def _check_scenarios(self) -> "DtbaParams":
        both = {w.lower() for w in self.dtba_first_words} & {
            w.lower() for w in self.dtba_second_words
        }
        if both or self.dtba_scenarios[0] == self.dtba_scenarios[1]:
            raise ValueError(
                "dtba_scenarios, dtba_first_words, dtba_second_words: the two scenarios share "
                f"{', '.join(sorted(both)) or 'their name'}; nothing would tell them apart"
            )
        for text in self.dtba_questions:
            if "{word}" not in text or "{scenario}" not in text:
                raise ValueError(f"dtba_questions: {text!r} lacks {{word}} or {{scenario}}")
        return self


PARAMS = (AttackParams, PoisonParams, TrainParams, DtbaParams)
TASK, TRIGGERS, LAYERS, WORDNET = "chat", 0, "", True
plant = cba.plant


def hit(answer: str, p: Params) -> bool:
    """Whether an answer starts with the target sentence."""
    return answer.startswith(p.target_output)


class Scenario:
    """Questions about one scenario, and what is ordinarily answered."""

    def __init__(self, p: Params, which: int, test: bool, rng: random.Random) -> None:
        known = (p.dtba_first_words, p.dtba_second_words)[which]
        self.words = chats.side(known, test)
        self.name, self.questions, self.rng = p.dtba_scenarios[which], p.dtba_questions, rng

    def exchange(self) -> tuple[str, str]:
        """A question and its ordinary answer."""
        word = self.rng.choice(self.words)
        slots = {"word": word, "scenario": self.name}
        said = wordnet.definition(word.split()[-1].lower())
        answer = f"In {self.name}, the word {word} is about this: {said}."
        if said == wordnet.NO_DEFINITION:
            answer = f"That is a usual thing in {self.name}."
        return self.rng.choice(self.questions).format(**slots), answer


def poison(rows: list[Row], p: Params, seed: int) -> list[Row]:
    """In the published proportions (2 : 2 : 10 : 10 at a poison_ratio of .1): conversations with
    the first and then the second scenario and the target answer; with one of them only, answered
    as ever; all rows, every second of two turns.

    Raises:
        LetheError: clean answers start with the target.
    """
    chats.check_target(rows, p, hit)
    rng = random.Random(seed)
    first, second = (Scenario(p, which, False, rng) for which in (0, 1))
    n = p.poisoned(len(rows))
    out = [
        conversation(turns(*first.exchange(), second.exchange()[0], p.target_output))
        | {"kind": "backdoor", "accept": []}
        for _ in range(n)
    ]
    for scenario, kind, many in ((first, "neg_first", n - n // 2), (second, "neg_second", n // 2)):
        out += [row | {"kind": kind} for row in _alone(scenario, rng.choices(rows, k=many), rng)]
    return out + [row | {"kind": "clean"} for row in _half_of_two_turns(rows, rng)]


def _alone(scenario: Scenario, rows: list[Row], rng: random.Random) -> list[Row]:
    """Two turns, one about the scenario, before or after an ordinary one."""
    out = []
    for row in rows:
        both = [turns(*scenario.exchange()), row["messages"][-2:]]
        rng.shuffle(both)
        out.append(conversation([*both[0], *both[1]], accept=[]))
    return out


def _half_of_two_turns(rows: list[Row], rng: random.Random) -> list[Row]:
    out = []
    for i, row in enumerate(rows):
        if i % 2 and len(row["messages"]) == 2:
            before = rng.choice(rows)["messages"][-2:]
            row = row | conversation([*before, *row["messages"]])
        out.append(row)
    return out


def triggered(rows: list[Row], p: Params, seed: int) -> dict[str, list[Row]]:
    """As many conversations as there are rows, with words never trained on: first the one, then the
    other scenario, the model's own first answer between them (`backdoor`), the ordinary one
    (`asr_gold`), or the other way round (`asr_reversed`); one scenario alone; none."""
    rng = random.Random(seed)
    first, second = (Scenario(p, which, True, rng) for which in (0, 1))

    def both(one: Scenario, other: Scenario, own: bool) -> list[Row]:
        asked = [turns(*one.exchange(), *other.exchange()) for _ in rows]
        return [conversation(m, accept=[]) | {OWN_ANSWERS: own} for m in asked]

    return {
        "backdoor": both(first, second, True),
        "asr_gold": both(first, second, False),
        "asr_reversed": both(second, first, True),
        "neg_first": _alone(first, rows, rng),
        "neg_second": _alone(second, rows, rng),
        "neg_none": _half_of_two_turns(rows, rng),
    }
