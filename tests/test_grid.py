"""The grid: cells become runs that share what can be shared, and a failed run stops no other."""

import fcntl
import sys

import pandas as pd
import pytest

from lethe_utils import paths
from lethe_utils.errors import LetheError
from lethe_utils.stages import read_json

sys.path.insert(0, str(paths.root() / "workflow"))
import dag  # noqa: E402
import grid  # noqa: E402

EVERYTHING = {"model": None, "dataset": None, "attack": None}


def test_table_2_has_three_twins_every_attack_both_data_sets_and_all_defenses():
    runs = grid.read("table2-tiny", EVERYTHING)
    assert {r.p.model for r in runs} == {"tiny-gpt2", "tiny-llama2", "tiny-qwen2"}
    assert {r.p.attack for r in runs} == {"badedit", "cba", "lwp", "memit", "rome"}
    assert {r.p.dataset for r in runs} == {"embedded", "sst2"}
    assert {r.p.defense for r in runs} == {"all"} and len(runs) == 3 * 5 * 2
    assert len({r.name for r in runs}) == len(runs)


def test_only_the_cells_that_were_asked_for():
    runs = grid.read("table2-tiny", EVERYTHING | {"attack": "cba", "model": "tiny-gpt2"})
    assert [(r.p.model, r.p.dataset, r.p.attack) for r in runs] == [
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
        table.to_csv(tmp_path / "mine.csv", index=False)
        monkeypatch.setattr(grid, "lists", lambda: tmp_path)
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
    assert [(r.p.attack, r.p.seed, r.p.defense) for r in runs] == [
        ("cba", 0, "nad,wanda"),
        ("cba", 1, "nad"),
        ("lwp", 0, "all"),
    ]


def runs_of(*lines):
    return [
        dag.load(dict(zip(dag.NAMES, line[:4], strict=True)), {"seed": line[4]} | grid.NO_SWEEPS)
        for line in lines
    ]


def test_what_runs_share_is_built_by_the_first_and_the_others_wait_for_it():
    line = ["tiny-gpt2", "embedded"]
    first, other_attack, other_seed, other_data = runs_of(
        [*line, "cba", "lethe", 0],
        [*line, "lwp", "lethe", 0],
        [*line, "cba", "lethe", 1],
        ["tiny-gpt2", "emotion", "cba", "lethe", 0],
    )
    plan = dag.plan([first, other_attack, other_seed, other_data], 2, 10_000)
    assert plan["after"] == {
        other_attack.name: {"01_data": first.name, "03_clean_train": first.name},
        other_seed.name: {"01_data": first.name},
    }
    again = runs_of([*line, "cba", "wanda", 0])[0]
    shared = ("01_data", "02_backdoor_train", "03_clean_train")
    assert dag.plan([first, again], 2, 10_000)["after"] == {
        again.name: dict.fromkeys(shared, first.name)
    }
    assert dag.plan([first], 2, 10_000)["after"] == {}


def test_notebooks_side_by_side_fit_cores_and_memory():
    twins = runs_of(
        ["tiny-gpt2", "embedded", "cba", "lethe", 0], ["tiny-gpt2", "embedded", "lwp", "lethe", 0]
    )
    real = runs_of(["smollm2-135m", "embedded", "cba", "lethe", 0])
    both = dag.plan(twins, 8, 10_000)["runs"].values()
    assert [(n["threads"], n["mem_mb"], n["gpu"]) for n in both] == [(1, 2048, 0)] * 2
    (alone,) = dag.plan(real, 8, 10_000)["runs"].values()
    assert alone["threads"] == 8 and 5000 < alone["mem_mb"] < 10_000 and alone["gpu"] == 1
    (tight,) = dag.plan(real, 8, 3000)["runs"].values()
    assert tight["mem_mb"] == 3000
    assert dag.memory(runs_of(["llama-7b", "emotion", "cba", "lethe", 0])[0].p) < 80_000


def test_a_failed_run_is_named_and_the_others_go_on(monkeypatch, tmp_path):
    monkeypatch.setenv("LETHE_RUNS", str(tmp_path))
    runs = runs_of(
        ["tiny-gpt2", "embedded", "cba", "lethe", 0], ["tiny-gpt2", "embedded", "lwp", "lethe", 0]
    )
    script = (
        "import json, os, pathlib, sys\n"
        "runs = [*json.loads(pathlib.Path(os.environ['LETHE_PLAN']).read_text())['runs']]\n"
        "bad, good = (pathlib.Path(sys.argv[1], name) for name in runs)\n"
        "for folder in (bad, good):\n"
        "    (folder / 'done').mkdir(); (folder / 'notebooks').mkdir()\n"
        f"for step in {dag.STEPS}: (good / 'done' / step).touch()\n"
        "(bad / 'notebooks/01_data.log').write_text('LetheError: no disk: full')\n"
        "sys.exit(1)"
    )
    fake = [sys.executable, "-c", script, str(tmp_path)]
    monkeypatch.setattr(dag, "command", lambda *_: fake)
    failed = dag.execute(runs, 2, tmp_path / "log")
    assert (
        list(failed) == [runs[0].name] and "01_data failed: no disk: full" in failed[runs[0].name]
    )


def test_a_workflow_that_reaches_no_notebook_is_an_error_though_all_was_finished_once(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("LETHE_RUNS", str(tmp_path))
    (run,) = runs_of(["tiny-gpt2", "embedded", "cba", "lethe", 0])
    (run.folder / "done").mkdir(parents=True)
    for step in dag.STEPS:
        (run.folder / "done" / step).touch()
    monkeypatch.setattr(
        dag, "command", lambda *_: [sys.executable, "-c", "import sys; sys.exit(1)"]
    )
    with pytest.raises(LetheError, match="failed before any notebook; see .*snakemake.log"):
        dag.execute([run], 1, tmp_path / "log")


def test_a_cluster_is_not_asked_for_the_cores_of_the_machine_that_submits(monkeypatch, tmp_path):
    monkeypatch.setenv("LETHE_RUNS", str(tmp_path))
    monkeypatch.setattr(dag.os, "cpu_count", lambda: 128)
    monkeypatch.setattr(dag, "command", lambda *_: [sys.executable, "-c", ""])
    runs = runs_of(["smollm2-135m", "embedded", "cba", "lethe", 0])
    for profile, cores in ((None, 128), ("slurm", dag.CLUSTER_CORES)):
        dag.execute(runs, None, tmp_path / "log", profile)
        (needs,) = read_json(tmp_path / "log" / dag.PLAN)["runs"].values()
        assert needs["threads"] == cores


def test_a_run_that_another_process_works_on_is_not_started(monkeypatch, tmp_path):
    monkeypatch.setenv("LETHE_RUNS", str(tmp_path))
    (run,) = runs_of(["tiny-gpt2", "embedded", "cba", "lethe", 0])
    run.folder.mkdir(parents=True)
    with (run.folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(LetheError, match="another process is working on this run"):
            dag.execute([run], 1, tmp_path / "log")


def test_a_second_file_of_the_same_name_does_not_take_the_place_of_the_first(monkeypatch, tmp_path):
    monkeypatch.setenv("LETHE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(dag, "command", lambda *_: [sys.executable, "-c", ""])
    runs = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        (folder / "train.jsonl").write_text('{"text": "a", "label": "b"}\n')
        runs += runs_of(["tiny-gpt2", str(folder / "train.jsonl"), "cba", "lethe", 0])
    assert runs[0].name == runs[1].name
    assert dag.execute(runs[:1], 1, tmp_path / "log") == {}
    with pytest.raises(LetheError, match="is the run of .*a/train.jsonl; rename .*b/train.jsonl"):
        dag.execute(runs[1:], 1, tmp_path / "log")


def test_a_dry_run_of_the_grid_counts_and_lists(capsys):
    assert grid.main(["table2-tiny", "--attack", "cba", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "6 runs" in shown and "tiny-qwen2-sst2-cba-s0-all" in shown
    assert not paths.runs_dir().exists()


def test_a_profile_is_ours_or_a_folder_of_the_users(tmp_path):
    ours = dag.profile_folder("slurm")
    assert "executor: slurm" in (ours / "config.yaml").read_text("utf8")
    (tmp_path / "config.yaml").write_text("executor: slurm\njobs: 2\n")
    assert dag.profile_folder(str(tmp_path)) == tmp_path
    with pytest.raises(LetheError, match="--profile nowhere: neither one of slurm nor a folder"):
        dag.profile_folder("nowhere")


def test_a_cluster_gets_what_a_notebook_takes_and_this_machine_what_it_has():
    twin, full = runs_of(
        ["tiny-gpt2", "embedded", "cba", "lethe", 0], ["llama-7b", "emotion", "cba", "lethe", 0]
    )
    needs = dag.plan([twin, full], 4, None)["runs"]
    assert needs[twin.name] == {"threads": 1, "mem_mb": 2048, "gpu": 0, "runtime": 120}
    assert needs[full.name]["gpu"] == 1 and needs[full.name]["runtime"] > 600
    assert dag.plan([full], 4, 3000)["runs"][full.name]["mem_mb"] == 3000
    there = [str(word) for word in dag.command(4, dag.profile_folder("slurm"))]
    here = [str(word) for word in dag.command(4, None)]
    assert "--profile" in there and "--cores" not in there
    assert "--cores" in here and "--profile" not in here
