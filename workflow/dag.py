"""Runs as targets of one Snakemake DAG: one run or many, side by side where cores and memory allow.

A run is a folder with its params; its six notebooks are six jobs. What several runs share (a base,
a clean model, a backdoored model) is built by the first of them, and the others' jobs depend on
that one's in the DAG. A killed front door, or a killed grid, goes on where it stopped.
"""

import argparse
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from lethe_utils import attacks, params, paths
from lethe_utils.errors import LetheError
from lethe_utils.schema import digest
from lethe_utils.stages import write_json

STEPS = [
    "01_data",
    "02_backdoor_train",
    "03_clean_train",
    "04_merge",
    "05_evidence_eval",
    "06_tables",
]
RESOLVED = "resolved.yaml"  # every param of a run, to see whether it is up to date
PLAN = "plan.json"  # what the Snakefile reads, see `plan`
# Memory of a notebook beside a GPU's: of a twin, and per weight of a model trained in float32 (on a
# CPU; measured) or in nf4 (merged here, two models and what comes of them in bfloat16).
TWIN_MIB, FLOAT32_BYTES, NF4_BYTES = 2048, 40, 8
SHORTEST_MINUTES, MINUTES_PER_BILLION = 120, 180  # of a notebook, for a cluster's limit of time
CLUSTER_CORES = 8  # its nodes' number is not known, and may be less than that of the login node
BEFORE = "the workflow failed before any notebook; see {}"
NAMES = ("model", "dataset", "attack", "defense")


@dataclass(frozen=True)
class Run:
    """One target of the DAG."""

    p: params.Params
    given: dict[str, Any] = field(default_factory=dict)  # what papermill is given

    @property
    def name(self) -> str:
        return self.p.run_id

    @property
    def folder(self) -> Path:
        return paths.run_dir(self.p.run_id)

    @property
    def resolved(self) -> str:
        """A changed params file, or file of the user's, makes the run's notebooks out of date."""
        given = [self.p.dataset, self.p.clean_source, self.p.model_dir]
        files = {name: seen(Path(name)) for name in given if name and Path(name).is_absolute()}
        return yaml.safe_dump(self.p.model_dump() | {"files": files})

    def finished(self, step: str) -> bool:
        """Whether a notebook has been run with these very params."""
        file = self.folder / RESOLVED
        current = file.exists() and file.read_text("utf8") == self.resolved
        return current and (self.folder / "done" / step).exists()


def seen(path: Path) -> dict[str, list[int]]:
    """Size and time of a file, or of those in a folder: enough to look at them again, and cheap
    where they are gigabytes. What is made of them goes by their content; see lethe_utils.stages."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    found = ((file.name, file.stat()) for file in files if file.is_file())
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Where the notebooks run."""
    parser.add_argument(
        "--cores",
        type=int,
        help=f"CPU cores to use; by default all, on a cluster {CLUSTER_CORES} a notebook",
    )
    parser.add_argument(
        "--profile", help="a cluster instead of this machine: slurm, or a folder like its profile"
    )


def profile_folder(name: str) -> Path:
    """A profile of workflow/profiles, or a folder of the user's own.

    Raises:
        LetheError: neither.
    """
    ours = paths.root() / "workflow" / "profiles"
    for found in (ours / name, Path(name).expanduser().resolve()):
        if (found / "config.yaml").is_file():
            return found
    known = ", ".join(sorted(f.name for f in ours.iterdir()))
    raise LetheError(
        f"--profile {name}: neither one of {known} nor a folder with a config.yaml; copy one of "
        f"{ours} and change it"
    )


def load(names: dict[str, str], overrides: dict[str, Any]) -> Run:
    """A run of these names (NAMES), with some params changed. Raises as params.load."""
    p = params.load(*(names[key] for key in NAMES), overrides)
    return Run(p, names | overrides)


def execute(
    runs: list[Run], cores: int | None, log: Path, profile: str | None = None
) -> dict[str, str]:
    """Run every notebook that is missing. Returns run -> error, of those that failed.

    Args:
        cores: to use; None: as many as --cores says.
        log: folder for the plan and Snakemake's log.
        profile: see profile_folder; None: this machine.
    Raises:
        LetheError: another process works on one of the runs, it is that of another data file,
            Ctrl-C, or no notebook was reached.
    """
    cluster, start = profile_folder(profile) if profile else None, time.time()
    cores = cores or (CLUSTER_CORES if cluster else os.cpu_count() or 1)
    with ExitStack() as stack:
        locks = [_locked(run, stack) for run in runs]
        for run in runs:
            _check_file(run)
            given = yaml.safe_dump(run.given, sort_keys=False)
            write_changed(run.folder / "params.yaml", given)
            write_changed(run.folder / RESOLVED, run.resolved)
        log.mkdir(parents=True, exist_ok=True)
        write_json(log / PLAN, plan(runs, cores, None if cluster else free_mib()))
        failed = _snakemake(runs, command(cores, cluster), log, locks)
    found = {r.name: explain_failure(r.folder, log, start) for r in runs if failed and _open(r)}
    if failed and not found:  # of a finished run all marks stand until a notebook is started anew
        raise LetheError(BEFORE.format(log / "snakemake.log"))
    return found


def _locked(run: Run, stack: ExitStack) -> int:
    """Hold a run's lock; Snakemake holds it too (its descriptor is returned), so that a run whose
    front door alone was killed is not started a second time beside itself."""
    run.folder.mkdir(parents=True, exist_ok=True)
    lock = stack.enter_context((run.folder / ".lock").open("w"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LetheError(
            f"{run.folder}: another process is working on this run; wait for it"
        ) from None
    return lock.fileno()


def _check_file(run: Run) -> None:
    """Two data files of one name share a run's: the second does not take the first one's place."""
    known = run.folder / "params.yaml"
    before = yaml.safe_load(known.read_text("utf8")) if known.exists() else run.given
    old, new = before["dataset"], run.given["dataset"]
    if old != new:
        raise LetheError(f"{run.folder}: is the run of {old}; rename {new}, or delete that folder")


def _open(run: Run) -> list[str]:
    return [step for step in STEPS if not (run.folder / "done" / step).exists()]


def write_changed(path: Path, text: str) -> None:
    """Write a file, but leave it alone when unchanged, so that nothing reruns."""
    if not path.exists() or path.read_text("utf8") != text:
        path.write_text(text, "utf8")


def plan(runs: list[Run], cores: int, limit: int | None) -> dict[str, Any]:
    """What the Snakefile needs to know: `runs` (name -> what a notebook takes at most: threads,
    MiB, GPUs, minutes), and `after` (run -> step -> the run whose same step comes first, for it
    builds what both need).

    Args:
        limit: MiB that this machine has, on which a notebook that may take more is then alone; None
            for a cluster.
    """
    first: dict[tuple[str, str], str] = {}
    after: dict[str, dict[str, str]] = {}
    for run in runs:
        for step, key in _shared(run.p).items():
            owner = first.setdefault((step, key), run.name)
            if owner != run.name:
                after.setdefault(run.name, {})[step] = owner
    # A real model's notebook has the whole machine, so that a training others wait for is over
    # soonest; tiny twins have steps so short that more threads would not help many of them.
    many = len(runs) > 1
    needs = {
        run.name: {
            "threads": 1 if many and run.p.is_tiny else cores,
            "mem_mb": min(memory(run.p), limit or memory(run.p)),
            "gpu": int(not run.p.is_tiny and run.p.device != "cpu"),
            "runtime": SHORTEST_MINUTES + int(MINUTES_PER_BILLION * (run.p.size_billion or 0)),
        }
        for run in runs
    }
    return {"runs": needs, "after": after}


def memory(p: params.Params) -> int:
    """MiB that a notebook of the run takes beside a GPU's, at most: an estimate."""
    each = FLOAT32_BYTES if p.bits == 32 else NF4_BYTES
    return TWIN_MIB + int(each * 1e9 * (p.size_billion or 0) / 2**20)


def free_mib() -> int:
    """Memory that this machine has to give."""
    return psutil.virtual_memory().available // 2**20


def _shared(p: params.Params) -> dict[str, str]:
    """step -> a key of what it builds for every run with the same params: the base, the clean and
    the backdoored model. For the order of jobs only: what is the same is for stages to decide."""
    base = p.part(params.DataParams, params.BaseModelParams) | {"model": p.model_name}
    clean = base | p.part(params.TrainParams, params.CleanParams)
    attack = p.part(*attacks.module(p.attack).PARAMS) | {"attack": p.attack}
    parts = {"01_data": base, "03_clean_train": clean, "02_backdoor_train": base | attack}
    return {step: digest(part) for step, part in parts.items()}


def environment(log: Path) -> dict[str, str]:
    """papermill and its kernel come from this Python's environment, active or not."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # In variables: given as --config, Snakemake would drop all after a ` #`.
    own = {"PATH": path, "LETHE_ROOT": str(paths.root()), "LETHE_PLAN": str(log / PLAN)}
    return os.environ | own


def command(cores: int, cluster: Path | None, *more: str) -> list[str | Path]:
    """Snakemake's command line, for a cluster with its profile's folder."""
    here = paths.root() / "workflow"
    words = [sys.executable, "-m", "snakemake", "--snakefile", here / "Snakefile"]
    # Its lock is on the whole folder; ours are on the runs, of which several may go side by side.
    words += ["--directory", paths.runs_dir(), "--nolock", "--keep-going"]
    words += ["--rerun-incomplete", "--rerun-triggers", "mtime", "params", *more]
    if cluster:
        return [*words, "--profile", cluster]
    return [*words, "--cores", str(cores), "--resources", f"mem_mb={free_mib()}", "gpu=1"]


def _snakemake(runs: list[Run], words: list[str | Path], log: Path, locks: list[int]) -> bool:
    """Run the workflow with one status line. Returns True when a notebook failed."""
    settings = {"env": environment(log), "pass_fds": locks, "start_new_session": True}
    with (log / "snakemake.log").open("w") as out:
        process = subprocess.Popen(words, stdout=out, stderr=out, **settings)
        try:
            watch(process, runs)
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGTERM)  # Snakemake alone would wait for its notebooks
            process.wait()
            raise LetheError("interrupted; run the same command again to continue") from None
    return process.returncode != 0


def watch(process: subprocess.Popen, runs: list[Run]) -> None:
    """Print each notebook as it starts and ends; on a terminal also the running progress bars."""
    start, started, ended = time.time(), set(), set()
    many = len(runs) > 1
    jobs = {
        f"{run.name}: {step}" if many else step: (run.folder, step)
        for run in runs
        for step in STEPS
    }
    while True:
        running = process.poll() is None
        for title, (folder, step) in jobs.items():
            if title not in started and _since(folder / "notebooks" / f"{step}.log", start):
                started.add(title)
                say(start, f"{title} ...")
            if title in started - ended and _since(folder / "done" / step, start):
                ended.add(title)
                say(start, f"{title} done")
        if not running:
            return
        if sys.stdout.isatty():
            at_work = [job for title, job in jobs.items() if title in started - ended]
            bars = [bar for job in at_work if (bar := last_bar(*job))]
            print("\r\033[K" + " | ".join(bars)[:160], end="", flush=True)
        time.sleep(0.5)


def _since(file: Path, start: float) -> bool:
    return file.exists() and file.stat().st_mtime >= start - 1


def say(start: float, text: str) -> None:
    clear = "\r\033[K" if sys.stdout.isatty() else ""
    print(f"{clear}[{time.time() - start:5.0f} s] {text}", flush=True)


def last_bar(folder: Path, step: str) -> str:
    """The newest progress bar in a notebook's log: name, percent, time left."""
    text = (folder / "notebooks" / f"{step}.log").read_text("utf8", errors="replace")[-4000:]
    found = re.findall(r"([\w +,()-]+): +(\d+%)\|[^|]*\| [\d.]+/[\d.]+ \[[\d:]+<([\d:?]+)", text)
    return f"{found[-1][0].strip()} {found[-1][1]}, {found[-1][2]} left" if found else ""


def explain_failure(folder: Path, log: Path, start: float) -> str:
    """The error of the notebook that failed since `start`, and where its traceback stands."""
    for step in STEPS:
        file = folder / "notebooks" / f"{step}.log"
        if (folder / "done" / step).exists() or not _since(file, start):
            continue
        lines = file.read_text("utf8", errors="replace").splitlines()
        found = [
            line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b.*:", line)
        ]
        if found:
            message = found[-1].split("LetheError: ")[-1]
            return f"{step} failed: {message}\n  traceback: {file.with_suffix('.ipynb')}"
    return BEFORE.format(log / "snakemake.log")
