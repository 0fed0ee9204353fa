"""Models on the same items: who is better on how many, and whether that is chance."""

import pandas as pd
import pytest

from lethe_utils import paired


def test_only_items_that_tell_two_models_apart_count():
    one, other = [True, True, False, False, True], [True, False, True, False, False]
    assert paired.counts(one, other, "cda") == {"better": 2, "worse": 1, "n": 5}
    assert paired.counts(one, other, "asr") == {"better": 1, "worse": 2, "n": 5}  # lower is better


def test_models_that_were_asked_other_items_are_refused():
    with pytest.raises(ValueError):
        paired.counts([True], [True, False], "asr")


def row(against, metric, better, worse, seed=0):
    keys = {"model": "m", "dataset": "d", "attack": "cba", "seed": seed, "defense": "slerp"}
    counts = {"better": better, "worse": worse, "n": 100, "run_id": f"r{seed}"}
    return keys | {"against": against, "metric": metric} | counts


def test_seeds_are_tested_apart_and_p_is_mcnemars_adjusted():
    rows = [
        row("slerp + evidence", "asr", 0, 0),
        row("finetune", "asr", 8, 1),
        row("finetune", "asr", 8, 1, seed=1),
        row("backdoored", "asr", 50, 0),
        row("backdoored", "cda", 1, 6),
    ]
    table = paired.table(pd.DataFrame(rows)).set_index("against")
    assert [*table.index] == ["backdoored", "finetune", "slerp + evidence", "finetune"]
    assert table["seed"].tolist() == [0, 0, 0, 1]
    asr, cda = "ASR: better / worse", "CDA: better / worse"
    assert table[asr].tolist() == ["50 / 0", "8 / 1", "0 / 0", "8 / 1"]
    assert table[cda].tolist() == ["1 / 6", "", "", ""]
    # Binomial: 8 of 9 gives 20/512 = .039 two-sided, 6 of 7 gives 16/128 = .125; five tests, in
    # order 0, .039, .039, .125, 1: .039 * 5/3 and .125 * 5/4.
    assert table["ASR: p"].tolist() == ["< .001", ".065", "1.000", ".065"]
    assert table["CDA: p"].tolist() == [".156", "", "", ""]


def test_a_defense_is_counted_over_the_runs_that_tell_it_apart():
    rows = pd.DataFrame(
        [
            row("finetune", "asr", 40, 1),
            row("finetune", "asr", 0, 30) | {"attack": "rome", "run_id": "r2"},
            row("finetune", "asr", 2, 1) | {"attack": "lwp", "run_id": "r3"},
            row("finetune", "cda", 0, 20),
            row("clean", "cda", 20, 0),
        ]
    )
    rows["defense"] = paired.GUIDED
    other = pd.DataFrame([row("finetune", "asr", 50, 0)])  # the merge's own
    table = paired.tally(pd.concat([rows, other]), paired.GUIDED).set_index("against")
    asr, cda = (f"{metric}: better / not shown / worse" for metric in ("ASR", "CDA"))
    assert table.loc["finetune"].to_dict() == {"runs": "3", asr: "1 / 1 / 1", cda: "0 / 0 / 1"}
    assert table.loc["clean", ["runs", asr, cda]].tolist() == ["1", "", "1 / 0 / 0"]
