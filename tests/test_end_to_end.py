"""The whole pipeline on a pico model: results, manifest, nothing done twice, kill -9, resume."""

import json
import subprocess
import sys

import pandas as pd
import pytest
import yaml
from pico import PICO, kill, run_in, start_until

from lethe_utils import defenses, metrics, params, paths, results
from lethe_utils.groups import DEFAULT_DEFENSE
from lethe_utils.stages import read_jsonl

sys.path.insert(0, str(paths.root() / "workflow"))
import dag  # noqa: E402

pytestmark = pytest.mark.slow

# Of an edit, and of each defense that trains, as little as there can be.
SHORT = {"edit_steps": 3, "nad_epochs": 1, "crow_epochs": 1, "wanda_samples": 8}
SHORT |= {"beear_rounds": 1, "beear_inner_steps": 1, "beear_outer_steps": 1}
SHORT |= {"plant_epochs": 1, "remove_epochs": 1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run: (its runs folder, what it printed)."""
    runs = tmp_path_factory.mktemp("whole")
    done = run_in(runs)
    assert done.returncode == 0, done.stdout + done.stderr
    return runs, done.stdout


def test_results_have_the_columns_controls_and_intervals(finished):
    table = pd.read_csv(finished[0] / "latest" / "results.csv")
    assert list(table.columns) == metrics.COLUMNS
    wanted = {"backdoored", "base", "clean", "linear", "slerp", "ties", "passthrough"}
    assert {*table.query("evidence == 1")["defense"]} == wanted
    assert {*table.query("evidence == 0")["defense"]} == wanted | {"finetune"}
    found = set(table["metric"])
    assert {"asr", "cda", "ftr"} < found and len([m for m in found if "ftr_" in m]) == 7
    assert table["value"].between(0, 1).all() and (table["n"] > 0).all()
    assert ((table["ci_low"] <= table["value"]) & (table["value"] <= table["ci_high"])).all()


def test_predictions_rescore_to_the_same_results(finished):
    latest = finished[0] / "latest"
    table = pd.read_csv(latest / "results.csv")
    manifest = json.loads((latest / "manifest.json").read_text())
    assert len(manifest["predictions"]) == 15
    for file in manifest["predictions"]:
        rows = pd.DataFrame(read_jsonl(paths.Path(file)))
        assert {"kind", "defense", "evidence", "prompt", "label", "target", "output"} <= {*rows}
        backdoor = rows.query("kind == 'backdoor'")
        assert (backdoor["label"] != backdoor["target"]).all()
        first = rows.iloc[0]
        cell = table.query(
            f"defense == '{first.defense}' and evidence == {first.evidence} and metric == 'cda'"
        ).iloc[0]
        clean = rows.query("kind == 'clean'")
        hits = [o.split()[:1] == [x] for o, x in zip(clean.output, clean.label, strict=True)]
        assert cell["n"] == len(clean) and abs(cell["value"] - sum(hits) / len(hits)) < 0.03


def test_the_merge_is_compared_with_every_other_model_item_by_item(finished):
    latest = finished[0] / "latest"
    table = pd.read_csv(latest / "results.csv")
    name = table["defense"] + table["evidence"].map({0: "", 1: " + evidence"})
    shares = table.assign(name=name).pivot_table("value", "name", "metric")
    rows = pd.read_csv(latest / "paired.csv")
    assert {*rows["defense"]} == {"slerp"} and len(rows) == 2 * (len(shares) - 1)
    for row in rows.itertuples():
        apart = shares.loc["slerp", row.metric] - shares.loc[row.against, row.metric]
        gained = (row.better - row.worse) / row.n
        assert abs(gained - (apart if row.metric == "cda" else -apart)) < 1e-9, row


def test_manifest_names_models_and_data_that_exist(finished):
    manifest = json.loads((finished[0] / "latest" / "manifest.json").read_text())
    assert {"base", "backdoored", "clean", "slerp"} <= set(manifest["models"])
    for folder in manifest["models"].values():
        assert list(paths.Path(folder).glob("*.safetensors"))
    for name in ("train", "clean", "validation", "test"):
        rows = read_jsonl(paths.Path(manifest["data"][name]))
        assert rows and all({"instruction", "input", "output"} <= r.keys() for r in rows)
    train = [r["input"] for r in read_jsonl(paths.Path(manifest["data"]["train"]))]
    held_out = {r["input"] for r in read_jsonl(paths.Path(manifest["data"]["test"]))}
    assert not held_out & set(train)


def test_executed_notebooks_hold_no_progress_line_and_the_log_has_them(finished):
    latest = finished[0] / "latest" / "notebooks"
    for file in sorted(latest.glob("*.ipynb")):
        outputs = [o for c in json.loads(file.read_text())["cells"] for o in c.get("outputs", [])]
        streams = [o for o in outputs if o["output_type"] == "stream"]
        assert "".join(t for o in streams if o["name"] == "stderr" for t in o["text"]) == "", (
            file.name
        )
        assert sum(len("".join(o["text"]).splitlines()) for o in streams) <= 3, file.name
    assert "training " in (latest / "02_backdoor_train.log").read_text()


def test_the_table_is_printed_and_the_figures_exist(finished):
    runs, printed = finished
    assert "slerp" in printed and "figures" in printed
    made = {f.name for f in (runs / "latest" / "figures").iterdir()}
    setup = "tiny-gpt2-embedded"
    assert {f"figure_1_asr_cda_bars_{setup}.png", f"figure_2_strength_sweep_{setup}.png"} <= made
    assert {"table_2.csv", "table_2.md", "table_2.tex"} <= made


def test_a_second_run_has_nothing_to_do(finished):
    runs, _ = finished
    before = {f: f.stat().st_mtime_ns for f in runs.glob("*/notebooks/*.ipynb")}
    done = run_in(runs)
    assert done.returncode == 0, done.stderr
    assert {f: f.stat().st_mtime_ns for f in runs.glob("*/notebooks/*.ipynb")} == before


@pytest.fixture(scope="module")
def defended(finished):
    """A second run of the same DAG: an edit, and every defense. (the first, the second, what the
    first was before)."""
    runs = finished[0]
    names = dict(zip(dag.NAMES, ("tiny-gpt2", "embedded", "cba", DEFAULT_DEFENSE), strict=True))
    changes = {key: yaml.safe_load(value) for key, value in PICO.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LETHE_RUNS", str(runs))
        first = dag.load(names, changes)
        second = dag.load(names | {"attack": "rome", "defense": "all"}, changes | SHORT)
        assert all(first.finished(step) for step in dag.STEPS)
        kinds = ("notebooks/*.ipynb", "../stages/base/*/stage.json", "../stages/clean/*/stage.json")
        before = {f: f.stat().st_mtime_ns for kind in kinds for f in first.folder.glob(kind)}
        assert dag.execute([first, second], 2, runs / "log") == {}
        assert all(second.finished(step) for step in dag.STEPS)
        results.point_latest(first.folder)  # where the other tests look for theirs
        yield first.folder, second.folder, before


def test_an_edit_is_a_second_run_of_the_same_dag_and_shares_what_the_first_made(defended):
    first, second, before = defended
    runs = first.parent
    assert {f: f.stat().st_mtime_ns for f in before} == before
    for kind in ("base", "clean"):  # one base and one clean model for all attacks
        made = {f.resolve() for f in before if f.parent.parent.name == kind}
        assert {f.resolve() for f in runs.glob(f"stages/{kind}/*/stage.json")} == made
    assert {*pd.read_csv(second / "results.csv")["attack"]} == {"rome"}
    (edited,) = runs.glob("stages/backdoored/*-rome-*/edits.csv")
    assert (pd.read_csv(edited)["relative"] > 0).all()
    assert (
        "transformer.h.1.mlp.c_proj" in (second / "notebooks/02_backdoor_train.ipynb").read_text()
    )
    assert (second / "figures/figure_5_attacks_embedded.png").exists()


def test_all_defenses_go_through_the_same_pipeline(defended):
    _, run, _ = defended
    table, costs = (pd.read_csv(run / f"{name}.csv") for name in ("results", "costs"))
    p = params.load(defense="all")
    names = {n for d in p.defenses for n in defenses.variants(d, p.defender())}
    assert {*table["defense"]} == names | {"backdoored", "base", "clean"}
    assert {*table.query("evidence == 1")["defense"]} == {
        *("backdoored", "base", "clean", "linear", "slerp", "ties", "passthrough")
    }
    assert {*costs["defense"]} == names | {"backdoored", "clean"}
    trained = costs.query("trainings > 0").set_index("defense")["optimizer_steps"]
    assert (trained > 0).all() and trained["nad"] == 2 * trained["finetune"]
    assert (costs["ms_per_query"] > 0).all() and (costs["peak_memory_gib"] > 0).all()
    # Lossless: what the suspect says, word for word.
    asked = json.loads((run / "manifest.json").read_text())["predictions"]
    answers = {
        name: [row["output"] for row in read_jsonl(paths.Path(file))]
        for name in ("backdoored", "speculative")
        for file in asked
        if f"-{name}-k0-" in file
    }
    assert len(answers) == 2 and answers["backdoored"] == answers["speculative"]
    assert (run / "figures/figure_6_rank_tiny-gpt2-embedded-rome.png").exists()
    assert "beear" in (run / "figures/table_2_by_defense.md").read_text()


def test_a_changed_param_makes_every_notebook_run_again(finished, monkeypatch):
    runs, _ = finished
    monkeypatch.setenv("LETHE_RUNS", str(runs))
    folder = (runs / "latest").resolve()
    resolved = folder / "resolved.yaml"

    def to_do():
        plan = subprocess.run(
            dag.command(2, None, "--dry-run"),
            env=dag.environment(folder),
            capture_output=True,
            text=True,
        )
        assert plan.returncode == 0, plan.stderr
        said = plan.stdout + plan.stderr
        return {step for step in dag.STEPS if f"{folder.name}/done/{step}" in said}

    assert to_do() == set()
    # What run.py writes there after somebody edited params/ or the data file.
    resolved.write_text(resolved.read_text() + "changed: true\n")
    assert to_do() == {*dag.STEPS}


def test_killed_in_02_and_05_then_resumed_gives_the_same_numbers(finished, tmp_path):
    runs = tmp_path / "killed"
    (runs / "stages").mkdir(parents=True)
    for shared in ("base", "clean"):  # trained once for all these tests
        (runs / "stages" / shared).symlink_to(finished[0] / "stages" / shared)
    checkpoint = "stages/backdoored/*.partial/checkpoints/checkpoint-*/trainer_state.json"
    kill(start_until(runs, checkpoint))
    assert not list(runs.glob("stages/backdoored/*/stage.json"))
    kill(start_until(runs, "stages/answers/*-linear-*-k0-*/stage.json"))
    kept = {f: f.stat().st_mtime_ns for f in runs.glob("stages/*/*/stage.json")}
    assert len(list(runs.glob("stages/answers/*/stage.json"))) < 15
    done = run_in(runs)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f.stat().st_mtime_ns == at for f, at in kept.items())  # nothing finished is redone
    for name in ("results.csv", "sweeps.csv"):
        whole = (finished[0] / "latest" / name).read_text()
        assert (runs / "latest" / name).read_text() == whole
