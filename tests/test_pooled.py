"""Tidy rows are checked before anything is made of them: impossible and mixed ones are refused."""

import pytest
from measured import frame, row

from lethe_utils import pooled
from lethe_utils.errors import LetheError
from lethe_utils.metrics import COLUMNS


def test_select_returns_the_rows_and_only_the_known_columns():
    chosen = pooled.select(frame(row(evidence=True, extra="x")))
    assert list(chosen) == COLUMNS
    assert chosen["evidence"].tolist() == [1]


def test_a_bound_off_by_rounding_is_accepted():
    assert len(pooled.select(frame(row(hits=0, ci_low=1e-19), row("base", hits=100)))) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": 1.2, "ci_high": 1.3}, "not within \\[0, 1\\]"),
        ({"value": float("nan")}, "not within \\[0, 1\\]"),
        ({"value": "failed"}, "not within \\[0, 1\\]"),
        ({"value": 0.5}, "not within its interval"),
        ({"n": 0}, "not a count"),
        ({"n": 2.5}, "not a count"),
        ({"evidence": 3}, "not 0 or 1"),
        ({"run_id": None}, "empty"),
        ({"defense": None}, "empty"),
    ],
)
def test_impossible_rows_are_refused(change, message):
    with pytest.raises(LetheError, match=message):
        pooled.select(frame(row("base"), row() | change))


def test_a_missing_column_and_an_empty_table_are_named():
    with pytest.raises(LetheError, match="ci_low, run_id"):
        pooled.select(frame(row()).drop(columns=["ci_low", "run_id"]))
    with pytest.raises(LetheError, match="no rows"):
        pooled.select(frame(row()).head(0))


def test_one_run_given_twice_is_refused():
    with pytest.raises(LetheError, match="twice for run-a"):
        pooled.select(frame(row(), row()))


def test_runs_that_differ_in_seed_are_not_mixed():
    assert len(pooled.select(frame(row(), row(seed=1, run_id="run-b")))) == 2
