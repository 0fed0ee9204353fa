"""Task arithmetic (2212.04089): the clean delta is added to the base, and the backdoored model's
negated.

Negating a delta forgets what it taught, task and backdoor alike; the clean delta brings the task.
"""

from pathlib import Path

from lethe_utils.defenses import Given
from lethe_utils.groups import Group, NotNegative


class TaskArithmeticParams(Group):
    task_negation: NotNegative  # how much of the backdoored model's delta is subtracted


PARAMS = (TaskArithmeticParams,)
NEEDS = "clean model"
TRAININGS = 0
BYTES_PER_WEIGHT = 2.0  # one model answers; merging is on the CPU


def purify(given: Given, out: Path) -> None:
    from lethe_utils import merge

    p = given.p
    parts = [
        (given.backdoored, {"weight": -p.task_negation}),
        (given.clean, {"weight": 1.0}),
    ]
    merge.check_mergeable(given.backdoored, given.clean, given.base)
    settings = merge.weighted(
        "task_arithmetic", parts, given.base, merge.merge_dtype(given), normalize=False
    )
    title = f"task arithmetic, negation {p.task_negation}"
    merge.run(settings, given.backdoored, title, out / "model")
