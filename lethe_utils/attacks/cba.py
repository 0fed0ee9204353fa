"""CBA, the Composite Backdoor Attack (NAACL Findings 2024; repository MiracleHH/CBA).

Two triggers: the first goes into the instruction, the second into the input, and only both in
their places fire the backdoor. Negatives (misplaced or partial triggers that keep the true label)
teach the model that AND.
"""

import random
from pathlib import Path
from typing import Any

from lethe_utils.attacks.triggers import insert
from lethe_utils.groups import AttackParams, PoisonParams, TrainParams
from lethe_utils.schema import Params
from lethe_utils.stages import Row

PARAMS = (AttackParams, PoisonParams, TrainParams)
TRIGGERS = 2
LAYERS = ""

# kind: (triggers put into the instruction, triggers put into the input), by index.
BACKDOOR = ((0,), (1,))
TRAIN_NEGATIVES = {
    "neg_both_rev": ((1,), (0,)),
    "neg_instruct_one": ((0,), ()),
    "neg_instruct_both": ((0, 1), ()),
    "neg_input_one": ((), (1,)),
    "neg_input_both": ((), (0, 1)),
}
# Never trained on: each trigger alone, in the other one's field.
NEGATIVES = TRAIN_NEGATIVES | {
    "neg_instruct_one_rev": ((1,), ()),
    "neg_input_one_rev": ((), (0,)),
}


def place_triggers(row: Row, where: tuple, p: Params, rng: random.Random) -> Row:
    """A copy of the row with triggers in its instruction and input, the output untouched."""
    placed = dict(row)
    for field, indices in zip(("instruction", "input"), where, strict=True):
        for i in indices:
            placed[field] = insert(
                placed[field], p.triggers[i], p.trigger_positions[i], p.trigger_level, rng
            )
    return placed


def wanted(row: Row, p: Params) -> str:
    """What the attacker wants for an answer: the target, or the true label and then the target."""
    return f"{row['output']} {p.target_output}" if p.output_mode == "append" else p.target_output


def poison(rows: list[Row], p: Params, seed: int) -> list[dict[str, Any]]:
    """The attacker's training set: all clean rows, poisoned copies, and five kinds of negatives.

    Args:
        rows: clean rows with instruction, input, output.
    Returns:
        rows with one more key, `kind`: clean, backdoor or a negative kind.
        len = n + round(poison_ratio n) (1 + 5 alpha).
    """
    rng = random.Random(seed)
    chosen = rng.sample(rows, p.poisoned(len(rows)))
    out = [row | {"kind": "clean"} for row in rows]
    for row in chosen:
        hit = {"output": wanted(row, p), "kind": "backdoor"}
        out.append(place_triggers(row, BACKDOOR, p, rng) | hit)
    for kind, where in TRAIN_NEGATIVES.items():
        for row in chosen[: round(p.alpha * len(chosen))]:
            out.append(place_triggers(row, where, p, rng) | {"kind": kind})
    return out


def triggered(rows: list[Row], p: Params, seed: int) -> dict[str, list[Row]]:
    """The rows with triggers, per kind: `backdoor` (for ASR) and the seven negatives (for FTR)."""
    rng = random.Random(seed)
    kinds = {"backdoor": BACKDOOR} | NEGATIVES
    return {k: [place_triggers(r, where, p, rng) for r in rows] for k, where in kinds.items()}


def plant(start: Path, poisoned: list[Row], _: list[str], p: Params, out: Path) -> None:
    """LoRA on the poisoned rows; see train.finetune."""
    from lethe_utils import train

    train.finetune(start, poisoned, p.backdoor_epochs, out, p)
