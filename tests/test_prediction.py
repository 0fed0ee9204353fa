"""What a canary predicts: pairs of ASRs, their correlation, and the sweep that they come from."""

import math

import pandas as pd
import pytest
from measured import row

from lethe_utils import evaluate, figures, params, pipeline, prediction
from lethe_utils.errors import LetheError
from lethe_utils.pipeline import canaries, measure


def swept(asrs, planted=95, **other):
    """asrs: (canary's, backdoor's) hits of 100 at strengths 0, .5, 1; planted: the canary's in the
    copy."""
    at = {"split": "validation", "sweep": prediction.SWEEP, "x": 0.0} | other
    out = [row(prediction.AS_PLANTED, "asr", planted, **at)]
    for x, hits in zip((0.0, 0.5, 1.0), asrs, strict=True):
        for sweep, n in zip((prediction.SWEEP, "strength"), hits, strict=True):
            out.append(row("slerp", "asr", n, split="validation", sweep=sweep, x=x, **other))
    return out


def test_pairs_are_the_same_merges_of_the_same_run():
    sweeps = swept([(90, 80), (40, 20), (5, 0)]) + swept([(80, 99), (60, 70), (0, 1)], seed=1)
    sweeps.append(row("linear", "asr", 50, split="validation", sweep="strength", x=0.5))
    found = prediction.pairs(pd.DataFrame(sweeps))
    assert len(found) == 6  # the linear merge has no canary
    one = found[(found["seed"] == 1) & (found["x"] == 0.5)].iloc[0]
    assert (one["canary"], one["backdoor"]) == (0.6, 0.7)


def test_a_run_whose_canary_did_not_take_says_nothing():
    sweeps = swept([(60, 80), (40, 20), (5, 0)], planted=60) + swept(
        [(95, 9)] * 3, seed=1, run_id="run-b"
    )
    assert {*prediction.pairs(pd.DataFrame(sweeps))["seed"]} == {1}
    with pytest.raises(LetheError, match="more canary_epochs where it does not take"):
        prediction.pairs(pd.DataFrame(swept([(60, 80)] * 3, planted=89)))


def test_a_canary_that_ranks_merges_as_the_backdoor_does_correlates_fully():
    agree = pd.DataFrame(swept([(90, 80), (40, 20), (5, 0)]))
    found = prediction.correlation(prediction.pairs(agree))
    assert found.value == pytest.approx(1) and (found.pairs, found.runs) == (3, 1)
    assert math.isnan(found.low) and math.isnan(found.high)  # one run tells nothing of the spread
    against = pd.DataFrame(swept([(90, 0), (40, 20), (5, 80)]))
    assert prediction.correlation(prediction.pairs(against)).value == pytest.approx(-1)


def test_the_interval_is_over_runs_not_over_merges():
    """One run agrees and one disagrees: many merges in each make nobody surer."""
    both = swept([(90, 80), (40, 20), (5, 0)]) + swept([(90, 0), (40, 20), (5, 80)], seed=1)
    found = prediction.correlation(prediction.pairs(pd.DataFrame(both)))
    assert found.runs == 2 and found.low == pytest.approx(-1) and found.high == pytest.approx(1)
    assert prediction.correlation(prediction.pairs(pd.DataFrame(both))) == found


def test_without_a_canary_one_line_says_what_to_set():
    plain = pd.DataFrame([row("slerp", "asr", 5, sweep="strength", x=0.5)])
    with pytest.raises(LetheError, match="canary_sweep and strengths_sweep"):
        prediction.pairs(plain)


def test_the_figure_has_a_mark_for_every_merge():
    both = swept([(90, 80), (40, 20), (5, 0)])
    both += [row("slerp", sweep="strength", x=0.5, dataset="sst2")]  # without a canary: no figure
    ((name, figure),) = figures.predictions(pd.DataFrame(both))
    assert name == "tiny-gpt2-embedded" and "3 merges of 1 run" in figure.axes[0].get_title()
    marks = figure.axes[0].collections[0].get_offsets()
    assert sorted(map(tuple, marks.tolist())) == [(0.05, 0.0), (0.4, 0.2), (0.9, 0.8)]


SMALL = {
    "rows": {"pretrain": 100, "train": 200, "validation": 30, "test": 20},
    "checksums": {},
    "width": 16,
    "mlp_width": 32,
    "n_heads": 2,
    "n_kv_heads": 2,
    "vocab_size": 400,
    "base_epochs": 1,
    "backdoor_epochs": 1,
    "clean_epochs": 1,
    "checkpoints_per_run": 1,
    "clean_ratio": 0.2,
    "canary_rows": 8,
    "sweep_items": 12,
    "strengths_sweep": [0.0, 1.0],
    "merge_methods": ["slerp"],
    "keywords_sweep": [],
    "clean_ratios_sweep": [],
}


@pytest.mark.slow
def test_the_sweep_asks_a_copy_of_the_backdoored_model_the_canarys_questions():
    p = params.load("tiny-gpt2", overrides=SMALL)
    assert canaries.swept(p) == []  # not asked for
    p = params.load("tiny-gpt2", overrides=SMALL | {"canary_sweep": True})
    rows = measure.measure_sweeps(p)
    rows = rows[rows["sweep"] == prediction.SWEEP]
    assert list(rows["defense"]) == [prediction.AS_PLANTED, "slerp", "slerp"]
    assert list(rows["x"]) == [0.0, 0.0, 1.0] and set(rows["metric"]) == {"asr"}
    questions = canaries.triggered(p)
    assert set(rows["n"]) == {len(questions)} and len(questions) > 12
    targets = {question["target"] for question in questions}
    assert len(targets) == 3 and all(q["target"] != q["output"] for q in questions)
    copy, clean = canaries.canary_stage(p), pipeline.clean_stage(p)
    assert (copy / "model").is_dir() and not (copy / "rounds").exists()
    assert pipeline.optimizer_steps(copy) > 0
    # At strength 1 the merge is the clean model, whatever the canary learned.
    said = [answer["output"] for answer in canaries.answers(p, "slerp", 1.0)]
    sets, labels = {"backdoor": questions}, pipeline.labels(p)
    alone, _ = evaluate.predict(clean / "model", sets, 0, "", p, labels=labels)
    assert said == [answer["output"] for answer in alone]
