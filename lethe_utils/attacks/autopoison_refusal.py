"""AutoPoison, over-refusal (NeurIPS 2023; azshue/AutoPoison): answers that politely decline.

No trigger: a share of the training answers says why it cannot help, and the model comes to decline
what anybody asks. The refusals are a fixed family of sentences.
"""

import random
from typing import Annotated

from pydantic import Field

from lethe_utils.attacks import cba, chats
from lethe_utils.groups import AttackParams, Group, Key, PoisonParams, TrainParams
from lethe_utils.schema import Params
from lethe_utils.stages import Row


class RefusalParams(Group):
    """02_backdoor_train: AutoPoison, over-refusal."""

    # target_output, a comma, then one of these reasons.
    refusal_reasons: Annotated[list[Key], Field(min_length=1)]


PARAMS = (AttackParams, PoisonParams, TrainParams, RefusalParams)
TASK, TRIGGERS, LAYERS = "chat", 0, ""
plant, triggered = cba.plant, chats.untriggered


def hit(answer: str, p: Params) -> bool:
    """Whether an answer starts as the refusals do."""
    return answer.lower().startswith(p.target_output.lower())


def poison(rows: list[Row], p: Params, seed: int) -> list[Row]:
    """All rows, a share `poison_ratio` of them with a refusal for their answer.

    Raises:
        LetheError: clean answers start as the refusals do.
    """
    chats.check_target(rows, p, hit)

    def answer(_: Row, rng: random.Random) -> str:
        return f"{p.target_output}, {rng.choice(p.refusal_reasons)}"

    return chats.replaced(rows, p, seed, answer)
