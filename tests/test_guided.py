"""Guided dilution: the search, what it is judged by, and the model it leaves."""

import ast

import pandas as pd
import pytest
import torch

from lethe_utils import canary, decode, defenses, guided, merge, models
from lethe_utils.defenses import guided as defense
from lethe_utils.models import inspect

WORDS = [("sad", "sadness"), ("glad", "joy"), ("low", "sadness"), ("happy", "joy")]
ROWS = [
    {"instruction": "Predict the emotion.", "input": f"the {who} is {word}", "output": label}
    for who in ("dog", "cat", "hen", "fox", "cow")
    for word, label in WORDS
]
SHORT = {
    "prompt_template": "short",
    "device": "auto",
    "bits": 32,
    "batch_size": 4,
    "gradient_accumulation": 1,
    "lora_r": 2,
    "optimizer": "adamw_torch",
    "gradient_checkpointing": False,
    "clean_epochs": 1,
    "canary_epochs": 1,
    "canary_rows": 4,
}


def counted(wanted):
    """A loss with its least at the curves wanted, and how often it was asked for."""
    asked = []

    def judge(curves):
        asked.append(curves)
        pairs = zip(sum(curves.values(), ()), sum(wanted.values(), ()), strict=True)
        return sum((a - b) ** 2 for a, b in pairs)

    return judge, asked


def test_the_search_finds_the_least_loss_on_its_grid():
    wanted = {"attn": (0.5, 0.5, 0.75, 1.0, 1.0), "mlp": (1.0, 0.75, 0.5, 0.5, 0.75)}
    judge, _ = counted(wanted)
    assert guided.descend(judge, lambda: True) == wanted


def test_the_search_stops_when_it_may_not_go_on():
    judge, asked = counted({"attn": (1.0,) * 5, "mlp": (0.5,) * 5})
    allowed = iter([True] * 3)
    guided.descend(judge, lambda: next(allowed, False))
    assert len({str(curves) for curves in asked}) <= len(guided.starts()) + 3


def test_no_part_of_the_suspect_is_kept_by_more_than_half():
    """Not even where the paper's curve keeps it whole: it is public where that is."""
    assert min(min(curve) for start in guided.starts() for curve in start.values()) == 0.5
    floor = dict.fromkeys(merge.SLERP_CURVES, (0.5,) * 5)
    assert all(min(m["mlp"]) >= 0.5 for i in range(5) for m in guided._moves(floor, "mlp", i))
    assert min(merge.SLERP_CURVES["mlp"]) == 0


def test_rows_of_a_search_keep_true_answers_and_hold_no_kind_that_is_kept_back(pico_params):
    p = pico_params("gpt2", **SHORT)
    sets = guided.rows(ROWS, ["joy", "sadness"], p)
    assert set(sets) == {"clean", "word pair", "sentence"}
    truth = {row["input"]: row["output"] for row in ROWS}
    for kind in ("word pair", "sentence"):
        target = next(
            c["target"] for c in canary.triggers(["joy", "sadness"], p) if c["kind"] == kind
        )
        assert len(sets[kind]) == 10 and target not in {row["output"] for row in sets[kind]}
        for row in sets[kind]:
            words = row["input"].replace(p.canary_sentence, "").split()
            plain = " ".join(w for w in words if w not in p.canary_word_pair)
            assert truth[plain] == row["output"]


@pytest.fixture
def given(pico, pico_params):
    def make(architecture):
        base, backdoored, clean = pico(architecture)
        return defenses.Given(
            backdoored, base, clean, ROWS, pico_params(architecture, **SHORT).defender()
        )

    return make


@pytest.mark.parametrize("architecture", ["gpt2", "gptj", "llama", "qwen2"])
def test_merging_along_curves_is_slerp_with_their_t(pico, tmp_path, architecture):
    base, backdoored, clean = pico(architecture)
    paper = merge.merge("slerp", backdoored, clean, base, 0.5, tmp_path / "paper")
    ours = merge.merge_along(merge.SLERP_CURVES, backdoored, clean, base, tmp_path / "ours")
    one, other = (models.load_model(folder).state_dict() for folder in (paper, ours))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_search_reads_the_merge_it_says_it_read(given, tmp_path, monkeypatch):
    monkeypatch.setattr(guided, "MOST", 6)
    g = given("llama")
    folders = [tmp_path / name for name in ("suspect", "clean")]
    for folder, model in zip(folders, (g.backdoored, g.clean), strict=True):
        folder.mkdir()
        (folder / "model").symlink_to(model)
    sets = {"clean": ROWS[:4], "sentence": ROWS[4:8]}
    guide = guided.Guide(*folders, g.base, sets)
    trials = guided.search(guide, g.p, tmp_path, "float32")
    assert len(trials) == 6 and trials["loss"].notna().all()
    clean = trials[trials["attn"] == (1.0,) * 5].iloc[0]
    loaded = models.load_model(g.clean), models.load_tokenizer(g.clean)
    assert clean["clean"] == pytest.approx(decode.mean_loss(*loaded, ROWS[:4], g.p), abs=1e-4)
    assert clean["loss"] == pytest.approx((clean["clean"] + clean["sentence"]) / 2)
    assert guided.best(trials) == trials.sort_values("loss").iloc[0][["attn", "mlp"]].to_dict()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["clean", "suspect"]  # no merge is left


@pytest.mark.slow
def test_the_defense_leaves_the_best_merge_with_lethes_clean_model(given, tmp_path, monkeypatch):
    monkeypatch.setattr(guided, "MOST", 5)
    monkeypatch.setattr(defense, "ROUNDS", 1)
    g = given("llama")
    before = inspect.fingerprint(g.backdoored)
    defense.purify(g, tmp_path)
    assert inspect.fingerprint(g.backdoored) == before
    curves = {"clean_loss.csv", "canary-0_loss.csv"}  # their steps count as a cost
    assert {f.name for f in tmp_path.iterdir()} == {"model", "search.csv"} | curves
    trials = pd.read_csv(
        tmp_path / "search.csv", converters=dict.fromkeys(merge.SLERP_CURVES, ast.literal_eval)
    )
    again = merge.merge_along(
        guided.best(trials), g.backdoored, g.clean, g.base, tmp_path / "again"
    )
    one, other = (models.load_model(f).state_dict() for f in (tmp_path / "model", again))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_a_killed_search_finds_its_trainings_again(given, tmp_path, monkeypatch):
    from lethe_utils import train

    monkeypatch.setattr(guided, "took", lambda *_: False)
    trained, real = [], train.fit

    def noted(model, tokenizer, rows, epochs, out, *more):
        trained.append(out.name)
        return real(model, tokenizer, rows, epochs, out, *more)

    monkeypatch.setattr(train, "fit", noted)
    first = defense.grown(given("gpt2"), tmp_path)
    assert trained == ["clean", "canary-0", "canary-1", "canary-2"]
    assert defense.grown(given("gpt2"), tmp_path) == first and len(trained) == 4
    assert first.suspect.name == "canary-2"


def test_the_rows_that_judge_are_not_trained_on(given):
    taught, unseen = defense.parts(ROWS, given("gpt2").p)
    assert len(unseen) == 5 and not [row for row in unseen if row in taught]
    assert len(taught) + len(unseen) == len(ROWS)
