"""Purify a model that somebody does not trust, on their own clean rows, and measure what it bought.

prepare -> estimate -> clean_model, canary_model -> points -> choose -> write; each in its module:
case (what was given), dilute (models and what they answer), result (what is left).
"""

from lethe_utils.purify.case import Case, estimate, prepare
from lethe_utils.purify.dilute import canary_model, choose, clean_model, points, suspect_performance
from lethe_utils.purify.result import samples, table, write

__all__ = ["Case", "canary_model", "choose", "clean_model", "estimate", "points", "prepare"]
__all__ += ["samples", "suspect_performance", "table", "write"]
