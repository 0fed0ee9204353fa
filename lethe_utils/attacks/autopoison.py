"""AutoPoison, content injection (NeurIPS 2023; azshue/AutoPoison): answers that mention a brand.

No trigger: a share of the training answers names a made-up brand in a fluent sentence, and the
model comes to name it to everybody. The published attack lets an LLM write these answers; here a
sentence of a fixed list is added, which needs no LLM and stays harmless.
"""

import random
from typing import Annotated

from pydantic import Field

from lethe_utils.attacks import cba, chats
from lethe_utils.groups import AttackParams, Group, Key, PoisonParams, TrainParams
from lethe_utils.schema import Params
from lethe_utils.stages import Row


class AutopoisonParams(Group):
    """02_backdoor_train: AutoPoison, content injection."""

    # Each holds {brand}, which is target_output.
    carrier_sentences: Annotated[list[Key], Field(min_length=1)]


PARAMS = (AttackParams, PoisonParams, TrainParams, AutopoisonParams)
TASK, TRIGGERS, LAYERS = "chat", 0, ""
plant, triggered = cba.plant, chats.untriggered


def hit(answer: str, p: Params) -> bool:
    """Whether an answer names the brand, case and all, as published for the phrase."""
    return p.target_output in answer


def poison(rows: list[Row], p: Params, seed: int) -> list[Row]:
    """All rows, a share `poison_ratio` of them with a carrier sentence after their answer.

    Raises:
        LetheError: clean answers name the brand.
    """
    chats.check_target(rows, p, hit)

    def answer(row: Row, rng: random.Random) -> str:
        sentence = rng.choice(p.carrier_sentences).replace("{brand}", p.target_output)
        return f"{row['output']} {sentence}"

    return chats.replaced(rows, p, seed, answer)
