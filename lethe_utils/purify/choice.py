"""Which point is offered, and what may be said of it.

Dilution costs clean performance, and a few held-out rows cannot show a small loss: a rule that asks
for one keeps the weakest merge, and the backdoor with it. So a point is given up only for a loss
that is larger than allowed and shown, and of the others the canary decides.
"""

from lethe_utils import metrics
from lethe_utils.errors import LetheError
from lethe_utils.purify import rounds
from lethe_utils.purify.ask import Score
from lethe_utils.purify.case import Case
from lethe_utils.purify.measure import Point

DILUTED, UNKNOWN, NOT_DILUTED = "diluted", "unknown", "not diluted"
EXIT = {DILUTED: 0, UNKNOWN: 3, NOT_DILUTED: 4}  # 1 is an error, and 2 a wrong use of the shell's


def choose(case: Case, points: list[Point]) -> Point:
    """The point with the lowest canary ASR among those that keep clean performance; of points whose
    ASR differs by no more than chance, the one that keeps it best.

    Where no kind of the canary took, its ASR tells nothing apart: then the strongest that keeps it.

    Args:
        points: see measure.points; the suspect is the first.
    Raises:
        LetheError: none keeps it.
    """
    suspect, *tried = points
    kept = [point for point in tried if keeps(case, suspect, point)]
    if not kept:
        best = max(tried, key=lambda point: point["performance"]["value"])
        raise LetheError(
            f"no merge keeps {case.metric} within {case.p.max_cda_loss} of the suspect's "
            f"{suspect['performance']['value']:.3f}: the best, {best['model']} {best['strength']}, "
            f"has {best['performance']['value']:.3f}. Give more clean rows, add weaker strengths "
            "(-p strengths '[0.1, 0.25]'), or raise --max-cda-loss; what was trained is kept"
        )
    kinds = rounds.took(rounds.canary_best(case).asr, case.kinds)
    if not kinds:
        return max(kept, key=lambda point: point["strength"])
    hits = [sum((point["marks"][kind] for kind in kinds), []) for point in kept]
    least = min(hits, key=sum)
    tied = [i for i, some in enumerate(hits) if not metrics.shown_lower(some, least)]

    def rank(i: int) -> tuple[float, ...]:  # where all is equal, the less of the suspect the better
        return kept[i]["performance"]["value"], -sum(hits[i]), kept[i]["strength"]

    return kept[max(tied, key=rank)]


def keeps(case: Case, suspect: Point, point: Point) -> bool:
    """Whether a point's clean performance is within max_cda_loss of the suspect's, as far as the
    rows tell: a larger loss counts where a paired test shows it, or where there are so many rows
    that a loss of max_cda_loss would be significant."""
    own, its = suspect["marks"]["clean"], point["marks"]["clean"]
    lost = (sum(own) - sum(its)) / len(own)
    if lost <= case.p.max_cda_loss + 1e-9:  # .98 - .96 is a little more than .02
        return True
    return not (rows_needed(case, suspect, point) <= len(own) or metrics.shown_lower(own, its))


def rows_needed(case: Case, suspect: Point, point: Point) -> int:
    """About how many clean rows would show a loss of max_cda_loss."""
    marks = (at["marks"]["clean"] for at in (suspect, point))
    return metrics.items_to_show(*marks, case.p.max_cda_loss)


def verdict(case: Case, chosen: Point) -> str:
    """DILUTED where the canary took and no kind of it is above canary_limit at the chosen point;
    NOT_DILUTED where it took and is; else UNKNOWN."""
    before = rounds.canary_best(case).asr
    return judged(before, chosen["canary"], case.kinds, case.p.canary_limit)


def judged(
    before: dict[str, Score], after: dict[str, Score], kinds: tuple[str, ...], limit: float
) -> str:
    """The verdict on a canary's ASR by kind before anything is merged, and at the chosen point."""
    if len(rounds.took(before, kinds)) < len(kinds):
        return UNKNOWN
    return NOT_DILUTED if any(after[kind]["value"] > limit for kind in kinds) else DILUTED
