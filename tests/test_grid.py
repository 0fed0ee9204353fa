"""The grid: cells become runs that share what can be shared, and a failed run stops no other."""

import subprocess
import sys

import pandas as pd
import pytest

from lethe_utils import attacks, params, paths
from lethe_utils.errors import LetheError

sys.path.insert(0, str(paths.root() / "workflow"))
import grid  # noqa: E402

EVERYTHING = {"model": None, "dataset": None, "attack": None}


def test_table_2_has_three_twins_every_attack_both_data_sets_and_all_defenses():
    runs = grid.read("table2-tiny", EVERYTHING)
    assert {r.model for r in runs} == {"tiny-gpt2", "tiny-llama2", "tiny-qwen2"}
    on_labels = {a for a in params.choices("attacks") if attacks.task(a) == "label"}
    assert {r.attack for r in runs} == on_labels
    assert {r.dataset for r in runs} == {"embedded", "sst2"}
    assert {r.defense for r in runs} == {"all"} and len(runs) == 3 * 5 * 2
    assert len({r.params.run_id for r in runs}) == len(runs)


def test_only_the_cells_that_were_asked_for():
    runs = grid.read("table2-tiny", EVERYTHING | {"attack": "cba", "model": "tiny-gpt2"})
    assert [(r.model, r.dataset, r.attack) for r in runs] == [
        ("tiny-gpt2", "sst2", "cba"),
        ("tiny-gpt2", "embedded", "cba"),
    ]
    with pytest.raises(LetheError, match=r"table2-tiny.csv: no cell of .*'vpi'"):
        grid.read("table2-tiny", EVERYTHING | {"attack": "vpi"})
    with pytest.raises(LetheError, match="grid 'table3' has no file .*choose one of table2-tiny"):
        grid.read("table3", EVERYTHING)


@pytest.fixture
def cells(monkeypatch, tmp_path):
    """Write a list of cells and read its runs."""

    def write(*lines):
        table = pd.DataFrame(lines, columns=grid.COLUMNS)
        (tmp_path / "grids").mkdir(exist_ok=True)
        table.to_csv(tmp_path / "grids" / "mine.csv", index=False)
        monkeypatch.setattr(paths, "params_dir", lambda: tmp_path)
        return grid.read("mine", EVERYTHING)

    return write


def test_cells_of_one_backdoored_model_are_one_run(cells):
    runs = cells(
        ["tiny-gpt2", "embedded", "cba", "nad", 0],
        ["tiny-gpt2", "embedded", "cba", "wanda", 0],
        ["tiny-gpt2", "embedded", "cba", "nad", 1],
        ["tiny-gpt2", "embedded", "lwp", "all", 0],
        ["tiny-gpt2", "embedded", "lwp", "nad", 0],
    )
    assert [(r.attack, r.seed, r.defense) for r in runs] == [
        ("cba", 0, "nad,wanda"),
        ("cba", 1, "nad"),
        ("lwp", 0, "all"),
    ]


def test_trainings_are_counted_with_and_without_sharing():
    line = ["tiny-gpt2", "embedded", "cba", 0]
    # Wanda trains nothing and needs no clean model; F/T trains once; temperature decodes.
    runs = [grid.Run(*line, "wanda,finetune,temperature")]
    # Shared: base, clean, backdoored, F/T. Alone: three times two, and F/T.
    assert grid.trainings(runs) == "4 trainings (one for each cell by itself: 7)"
    second = [*runs, grid.Run("tiny-gpt2", "embedded", "lwp", 0, "finetune")]
    assert grid.trainings(second) == "6 trainings (one for each cell by itself: 10)"


def test_table_2_trains_less_than_half_of_the_naive_count():
    text = grid.trainings(grid.read("table2-tiny", EVERYTHING | {"attack": "cba"}))
    run, naive = (int(word) for word in text.replace(")", "").split() if word.isdigit())
    assert 0 < run <= naive / 2


def test_runs_side_by_side_fit_cores_and_memory(monkeypatch):
    memory = type("Memory", (), {"available": 5 * 2**30})
    monkeypatch.setattr(grid.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr("lethe_utils.models.resolve_device", lambda _: "cpu")
    assert (grid.parallel(1), grid.parallel(8)) == (1, 2)
    memory.available = 0
    assert grid.parallel(8) == 1
    monkeypatch.setattr("lethe_utils.models.resolve_device", lambda _: "cuda")
    assert grid.parallel(8) == 1


def fake(monkeypatch, script):
    """Runs whose command is a line of Python."""
    command = property(lambda run: [sys.executable, "-c", script, run.attack])
    monkeypatch.setattr(grid.Run, "command", command)


def test_a_failed_run_is_named_and_the_others_go_on(monkeypatch, tmp_path):
    fake(
        monkeypatch,
        "import sys, pathlib\n"
        "if sys.argv[1] == 'rome': sys.exit('error: no disk')\n"
        f"pathlib.Path(r'{tmp_path}', sys.argv[1]).touch()",
    )
    runs = [grid.Run("tiny-gpt2", "embedded", a, 0, "lethe") for a in ("rome", "cba", "lwp")]
    failed = grid.run_all(runs, 2, tmp_path / "logs")
    assert failed == [f"{runs[0].params.run_id}: error: no disk"]
    assert (tmp_path / "cba").exists() and (tmp_path / "lwp").exists()


def test_a_run_left_over_from_a_killed_grid_is_waited_for(monkeypatch, tmp_path):
    fake(
        monkeypatch,
        f"import sys, pathlib\nseen = pathlib.Path(r'{tmp_path}', 'seen')\n"
        f"if not seen.exists(): seen.touch(); sys.exit('error: {grid.BUSY}; wait for it')",
    )
    slept = []
    monkeypatch.setattr(grid.time, "sleep", slept.append)
    run = grid.Run("tiny-gpt2", "embedded", "cba", 0, "lethe")
    assert grid.finish(run, tmp_path) == "" and slept == [10]


def test_the_command_is_the_front_doors_and_gives_the_same_run():
    run = grid.Run("tiny-qwen2", "embedded", "lwp", 2, "nad,wanda")
    done = subprocess.run([*run.command, "--dry-run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"run {run.params.run_id} -> " in done.stdout


def test_a_dry_run_of_the_grid_counts_and_lists(capsys):
    assert grid.main(["table2-tiny", "--attack", "cba", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "6 runs" in shown and "tiny-qwen2-sst2-cba-s0-all" in shown
    assert not paths.runs_dir().exists()
