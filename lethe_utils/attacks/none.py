"""No attack: a model that somebody trusts too little, trained on clean rows alone.

The control of every defense: what a false alarm costs. It is asked with CBA's triggers, which mean
nothing to it, so its ASR is what ordinary mistakes look like.
"""

from lethe_utils.attacks import cba
from lethe_utils.groups import AttackParams, TrainParams
from lethe_utils.schema import Params
from lethe_utils.stages import Row

PARAMS = (AttackParams, TrainParams)
TRIGGERS = cba.TRIGGERS
LAYERS = ""
plant, triggered = cba.plant, cba.triggered


def poison(rows: list[Row], p: Params, seed: int) -> list[Row]:
    """All rows as they are, each with the `kind` clean."""
    return [row | {"kind": "clean"} for row in rows]
