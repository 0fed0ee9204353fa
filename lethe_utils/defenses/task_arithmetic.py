"""Task arithmetic (2212.04089): the clean delta is added to the base, and the suspect's negated.

Negating a delta forgets what it taught, task and backdoor alike; the clean delta brings the task.
"""

from pathlib import Path

from lethe_utils import merge
from lethe_utils.defenses import Given
from lethe_utils.params import MoreMergeParams

PARAMS = (MoreMergeParams,)
NEEDS = "clean model"
TRAININGS = 0
BYTES_PER_WEIGHT = 2.0  # one model answers; merging is on the CPU


def purify(given: Given, out: Path) -> None:
    p = given.p
    parts = [
        (given.suspect, {"weight": -p.task_negation}),
        (given.reference, {"weight": 1.0}),
    ]
    merge.check_mergeable(given.suspect, given.reference, given.base)
    settings = merge.weighted(
        "task_arithmetic", parts, given.base, merge.merge_dtype(p.device), normalize=False
    )
    title = f"task arithmetic, negation {p.task_negation}"
    merge.run(settings, given.suspect, title, out / "model")
