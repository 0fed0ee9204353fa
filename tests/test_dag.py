"""Runs as targets of one DAG, and a run that is not started beside itself."""

import sys

import pytest
import yaml
from pico import PICO, kill, run_in, start_until

from lethe_utils import paths

sys.path.insert(0, str(paths.root() / "workflow"))
import dag  # noqa: E402

pytestmark = pytest.mark.slow


def test_runs_of_one_dag_share_what_the_first_builds(tmp_path, monkeypatch):
    monkeypatch.setenv("LETHE_RUNS", str(tmp_path))
    changes = {key: yaml.safe_load(value) for key, value in PICO.items()}
    changes |= {"merge_methods": ["slerp"], "strengths_sweep": [], "clean_ratios_sweep": []}
    names = {"model": "tiny-gpt2", "dataset": "embedded", "defense": "lethe"}
    runs = [dag.load(names | {"attack": attack}, changes) for attack in ("cba", "lwp")]
    assert dag.execute(runs, 2, tmp_path / "log") == {}
    assert all(run.finished(step) for run in runs for step in dag.STEPS)
    made = {
        kind: len([*tmp_path.glob(f"stages/{kind}/*/stage.json")]) for kind in ("base", "clean")
    }
    assert made == {"base": 1, "clean": 1}
    assert len([*tmp_path.glob("stages/backdoored/*/stage.json")]) == 2
    # Of what both need, the second run's notebook started when the first one's had ended.
    first, second = (run.folder for run in runs)
    assert (second / "notebooks/03_clean_train.log").stat().st_mtime_ns > (
        first / "done/03_clean_train"
    ).stat().st_mtime_ns


def test_a_run_whose_front_door_was_killed_is_not_started_beside_itself(tmp_path):
    runs = tmp_path / "orphan"
    runs.mkdir()
    front_door, *others = start_until(runs, "*/notebooks/01_data.log")
    kill([front_door])
    again = run_in(runs)
    alive = [p for p in others if p.is_running()]
    kill([*alive, *(child for p in alive for child in p.children(recursive=True))])
    assert again.returncode == 1
    assert "another process is working on this run" in again.stderr
