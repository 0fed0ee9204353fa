"""Purify a model that somebody does not trust, on their own clean rows, and measure what it bought.

prepare -> estimate -> clean_model, canary_model -> points -> choose, verdict -> write; each in its
module: case and formats (what was given), trial (the estimate), dilute (models), rounds
(trainings), ask and measure (answers), choice, result and report (what is left).
"""

from lethe_utils.purify.case import Case, prepare
from lethe_utils.purify.choice import choose, verdict
from lethe_utils.purify.measure import points, suspect_performance
from lethe_utils.purify.result import samples, table, write
from lethe_utils.purify.rounds import (
    canary_model,
    canary_rounds,
    clean_model,
    clean_rounds,
    loss_curve,
)
from lethe_utils.purify.trial import estimate

__all__ = ["Case", "canary_model", "canary_rounds", "choose", "clean_model", "clean_rounds"]
__all__ += ["estimate", "loss_curve", "points", "prepare", "samples", "suspect_performance"]
__all__ += ["table", "verdict", "write"]
