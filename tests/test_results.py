"""Released results: tidy tables of all runs; only finished runs of committed code join them."""

import json
import os
import subprocess
import sys

import pandas as pd
import pytest
from measured import frame, row, sweep_rows

from lethe_utils import metrics, paired, params, paths, results
from lethe_utils.errors import LetheError


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """An empty results/ and an empty runs/."""
    released = tmp_path / "results"
    monkeypatch.setenv("LETHE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(paths, "released_dir", lambda: released)
    return tmp_path


def finished_run(run_id, hits=90, stage_dirty=False, dirty=False, **changed):
    """A run as measure.write_run leaves it."""
    folder = paths.run_dir(run_id)
    folder.mkdir(parents=True, exist_ok=True)
    own = {"run_id": run_id, "seed": changed.get("seed", 0)}
    frame(row(hits=hits, **own)).to_csv(folder / "results.csv", index=False)
    sweep_rows().assign(**own).to_csv(folder / "sweeps.csv", index=False)
    costs = dict.fromkeys(metrics.COST_COLUMNS, "0.10")
    pd.DataFrame([costs]).to_csv(folder / "costs.csv", index=False)
    pd.DataFrame(columns=paired.COLUMNS).to_csv(folder / "paired.csv", index=False)
    settings = {"model": "tiny-gpt2", "dataset": "embedded", "attack": "cba", "seed": 0}
    settings |= {"defense": "lethe"} | changed
    (folder / "params.json").write_text(json.dumps(settings))
    records = {"run_id": run_id, "git_dirty": dirty, "git_sha": "abc"}
    stages = {"stages": {"clean": {"folder": "c-1", "git_dirty": stage_dirty}}}
    (folder / "provenance.json").write_text(json.dumps(records | stages))
    return folder


def test_a_released_run_is_read_back_and_replaces_its_own_rows_only(checkout):
    for run_id, seed in (("b", 1), ("a", 0)):
        finished_run(run_id, seed=seed)
        written = results.release(run_id)
    assert json.loads(written.read_text())["params"]["model"] == "tiny-gpt2"
    assert json.loads(written.read_text())["git_sha"] == "abc"
    finished_run("b", hits=33, seed=1)
    results.release("b")
    table, sweeps, costs, _ = results.read_released()
    assert table[["run_id", "value"]].to_numpy().tolist() == [["a", 0.9], ["b", 0.33]]
    assert len(sweeps) == 2 * len(sweep_rows())
    assert costs["run_id"].tolist() == ["a", "b"]
    assert "0.10" in (checkout / "results" / "costs.csv").read_text()  # as it was written


def test_an_unfinished_run_is_not_released(checkout):
    with pytest.raises(LetheError, match="never: no results.csv, .*; finish the run"):
        results.release("never")
    (finished_run("a") / "costs.csv").unlink()
    with pytest.raises(LetheError, match="no costs.csv; finish"):
        results.release("a")
    (finished_run("a") / "done").mkdir()  # at work again
    with pytest.raises(LetheError, match="no 05_evidence_eval; finish"):
        results.release("a")
    assert not (checkout / "results").exists()


@pytest.mark.parametrize(
    ("dirty", "named"), [({"dirty": True}, "the evaluation"), ({"stage_dirty": True}, "clean")]
)
def test_a_run_of_code_that_was_not_committed_is_not_released(checkout, dirty, named):
    finished_run("a", **dirty)
    with pytest.raises(LetheError, match=rf"not committed \(git_dirty of {named}\)") as caught:
        results.release("a")
    assert "\n" not in str(caught.value) and not (checkout / "results").exists()


def test_runs_of_one_setup_differ_in_their_seed_only(checkout):
    finished_run("a", seed=0, strength=0.75, eval_batch_size=32)
    # What a run measures beside the others is its own, and so is a param that came with later code.
    own = {"defense": "all", "strengths_sweep": [0.5], "a_later_param": 1, "eval_batch_size": 64}
    finished_run("b", seed=1, strength=0.5, **own)
    finished_run("c", seed=1, strength=0.75, **own)
    results.release("a")
    with pytest.raises(LetheError, match="b and a: same model, dataset and attack, but other str"):
        results.release("b")
    results.release("c")
    assert results.read_released().table["run_id"].tolist() == ["a", "c"]
    other = checkout / "results" / "runs" / "b.json"
    other.write_text(json.dumps({"params": results.released_params()["a"] | {"strength": 1}}))
    with pytest.raises(LetheError, match="but other strength"):
        results.read_released()


def test_params_of_a_defense_that_one_run_lacks_keep_no_runs_apart(checkout):
    finished_run("a", seed=0, defense="lethe,beear", beear_rounds=6, finetune_epochs=4)
    finished_run("b", seed=1, defense="lethe,finetune", beear_rounds=2, finetune_epochs=6)
    finished_run("c", seed=2, defense="all", beear_rounds=2, finetune_epochs=6)
    results.release("a")
    results.release("b")
    with pytest.raises(LetheError, match="c and a: .* but other beear_rounds; release"):
        results.release("c")


def test_no_item_is_released_twice(checkout):
    """A second run of one seed, with more defenses, replaces the first; never with less."""
    finished_run("a", seed=0)
    results.release("a")
    more = finished_run("a-all", seed=0, defense="all")
    wanted = pd.concat([frame(row(defense=name, hits=80)) for name in ("slerp", "nad")])
    wanted.assign(run_id="a-all").to_csv(more / "results.csv", index=False)
    with pytest.raises(
        LetheError, match="results of backdoored, which the released a of the same seed"
    ):
        results.release("a-all")
    assert results.read_released().table["run_id"].tolist() == ["a"]
    both = pd.concat([frame(row(hits=80)), wanted]).assign(run_id="a-all")
    both.to_csv(more / "results.csv", index=False)
    results.release("a-all")
    assert results.read_released().table["run_id"].tolist() == ["a-all"] * 3
    assert [*results.released_params()] == ["a-all"]


def test_what_is_shown_is_the_released_results_or_the_runs_own(checkout):
    p = params.load()
    with pytest.raises(LetheError, match="no released results"):
        results.load(p, "released")
    folder = finished_run(p.run_id)
    measured, out = results.load(p, "run")
    assert len(measured.table) == 1 and out == folder / "figures"
    with pytest.raises(LetheError, match="neither released nor run"):
        results.load(p, "both")


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "release: give one run's name"), (["never"], "no results.csv")],
)
def test_the_command_says_in_one_line_what_it_cannot_release(tmp_path, words, message):
    command = [sys.executable, paths.root() / "workflow" / "run.py", "release", *words]
    env = os.environ | {"LETHE_RUNS": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 1 and message in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not done.stdout
