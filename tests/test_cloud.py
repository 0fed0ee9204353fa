"""The container and the cloud task: every path, variable and command that they name is real."""

import fnmatch
import os
import re
import shlex
import string
import subprocess
import sys

import pytest
import yaml

from lethe_utils import paths

DOCKERFILE = (paths.root() / "Dockerfile").read_text("utf8")
SKY_FILE = "workflow/cloud/sky.yaml"
SKY = yaml.safe_load((paths.root() / SKY_FILE).read_text("utf8"))
COMMANDS = re.findall(r"^\./run_all\.sh (.+?)(?:  #.*)?$", SKY["setup"] + SKY["run"], re.M)


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions and what each is given, lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.M).replace("\\\n", "")
    lines = [line for line in text.splitlines() if line.strip()]
    return [tuple(line.split(maxsplit=1)) for line in lines]


def given(name: str) -> list[str]:
    return [words for instruction, words in instructions() if instruction == name]


def tracked() -> list[str]:
    command = ["git", "-C", str(paths.root()), "ls-files"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def ignored(name: str, patterns: list[str]) -> bool:
    """Docker's rule, for our patterns: one matches a file or a folder above it, from the top."""
    parts = name.split("/")
    above = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
    plain = [(p.removeprefix("**/"), p.startswith("**/")) for p in patterns]
    return any(
        fnmatch.fnmatchcase(path.rpartition("/")[2] if anywhere else path, pattern)
        for pattern, anywhere in plain
        for path in above
    )


def test_the_image_is_made_of_files_that_exist_and_starts_the_front_door():
    copied = [words.split()[-2] for words in given("COPY")]
    assert copied == ["requirements.lock", "."]
    named = re.findall(r"(?:python |-r )(\S+\.(?:py|lock))", " ".join(given("RUN")))
    assert len(named) == 3
    assert [name for name in [*copied, *named] if not (paths.root() / name).exists()] == []
    (door,) = yaml.safe_load(given("ENTRYPOINT")[0])
    assert os.access(paths.root() / door, os.X_OK)


def test_the_image_is_pinned_is_not_root_and_keeps_runs_and_data_outside():
    (base,) = given("FROM")
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu[\d.]+", base)
    # torch's wheel and the image name the same CUDA.
    wheels = (paths.root() / "requirements.lock").read_text("utf8")
    (cuda,) = re.findall(r"^cuda-toolkit==(\d+\.\d+)", wheels, re.M)
    assert base.split(":")[1].startswith(cuda + ".")
    assert given("USER") == ["$LETHE_UID"] and "LETHE_UID=1000" in given("ARG")
    variables = dict(word.split("=", 1) for word in " ".join(given("ENV")).split())
    home = given("WORKDIR")[0]
    assert yaml.safe_load(given("VOLUME")[0]) == [f"{home}/runs", variables["LETHE_DATA_DIR"]]
    assert variables["HF_HOME"].startswith(f"{home}/runs/")


def test_the_image_gets_all_that_git_holds_and_nothing_that_it_ignores():
    lines = (paths.root() / ".dockerignore").read_text("utf8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert [name for name in tracked() if ignored(name, patterns)] == []
    made = {".venv": ".venv/bin/python", "runs": "runs/stages/base/x/model/model.safetensors"}
    made |= {"cache": "lethe_utils/models/__pycache__/hub.pyc", "egg": "lethe.egg-info/PKG-INFO"}
    assert [name for name, file in made.items() if not ignored(file, patterns)] == []
    ours = {line.strip("/") for line in (paths.root() / ".gitignore").read_text("utf8").split()}
    assert ours == {pattern.removeprefix("**/") for pattern in patterns}


def test_the_cloud_task_copies_the_checkout_and_its_scripts_are_bash():
    assert SKY["workdir"] == "." and SKY["name"]
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=SKY[part], text=True, check=True)
    known = {"MODEL", "OPTIONS", "HOME", "PATH"}
    assert {*re.findall(r"\$\{?(\w+)", SKY["setup"] + SKY["run"])} == known


@pytest.mark.parametrize("words", COMMANDS, ids=["setup", "run"])
def test_the_front_door_takes_the_cloud_tasks_commands(words):
    filled = shlex.split(string.Template(words).substitute(SKY["envs"]))
    command = [sys.executable, str(paths.root() / "workflow/run.py"), *filled]
    if "--dry-run" not in filled:
        command.append("--dry-run")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name = f"{SKY['envs']['MODEL']}-emotion-cba-s0"
    assert f"run {name} -> {paths.runs_dir() / name}" in done.stdout
