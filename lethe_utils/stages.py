"""Stages are folders: a finished one is never redone, a half-written one is never read.

A stage's folder is named by the hash of everything that decides its content: its own params and
the names of the stages it reads (which carry their own hashes). It is built under `.partial` and
renamed when whole. Work that can continue (checkpoints, per-set predictions) stays in `.partial`
when a run is killed and is picked up by the next one.
"""

import contextlib
import errno
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock

from lethe_utils import paths
from lethe_utils.errors import LetheError
from lethe_utils.schema import digest

RECORD = "stage.json"
Row = dict[str, str]  # instruction, input, output; with `kind` where triggers were placed
PACKAGES = [
    *("torch", "transformers", "peft", "mergekit", "bitsandbytes", "datasets"),
    *("tokenizers", "safetensors", "numpy", "summa", "nltk"),
]


def stage(
    name: str, label: str, spec: dict[str, Any], inputs: dict[str, Path], build: Callable
) -> Path:
    """Return the stage's folder, building it first where it does not exist yet.

    Args:
        name: kind of stage, e.g. "backdoor"; the folder above.
        label: readable start of the folder name, e.g. "tiny-gpt2-embedded"; see paths.file_name.
        spec: the params this stage depends on.
        inputs: folders of earlier stages it reads.
        build: called with the folder to fill.
    Raises:
        LetheError: the disk is full. Everything finished is kept.
    """
    key = digest({"spec": spec, "inputs": {k: p.name for k, p in inputs.items()}})[:12]
    final = paths.stages_dir() / name / f"{paths.file_name(label)}-{key}"
    if (final / RECORD).exists():
        return final
    partial = final.with_name(final.name + ".partial")
    final.parent.mkdir(parents=True, exist_ok=True)
    # Two runs that share a stage (one clean model, many attacks) must not build it twice.
    with FileLock(f"{final}.lock"):
        if (final / RECORD).exists():
            return final
        partial.mkdir(exist_ok=True)
        start = time.time()
        forget_peak_memory()
        try:
            build(partial)
        except Exception as error:
            # safetensors raises an error of its own, not an OSError
            full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
            if not full or isinstance(error, LetheError):
                raise
            raise LetheError(
                f"{partial}: no space left on this disk; free some (or point LETHE_RUNS at a "
                "larger disk) and rerun: finished stages are kept"
            ) from None
        record = {"stage": name, "params": spec, "inputs": {k: p.name for k, p in inputs.items()}}
        write_json(partial / RECORD, record | provenance(time.time() - start))
        os.replace(partial, final)
    return final


def fresh(folder: Path) -> None:
    """Empty a folder for what is to be written there: only what a killed run left among the stages
    is ever deleted, for that is ours.

    Raises:
        LetheError: the folder holds something, and is none of ours.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if paths.stages_dir().resolve() not in folder.resolve().parents:
        raise LetheError(f"{folder}: is not empty; give a new folder")
    shutil.rmtree(folder)


def read_record(folder: Path) -> dict[str, Any]:
    """The stage.json of a finished stage."""
    return read_json(folder / RECORD)


def provenance(seconds: float) -> dict[str, Any]:
    """What a reader needs to judge or repeat a stage: code, versions, machine, time (s), memory."""
    git_sha, dirty = _git("rev-parse", "HEAD"), bool(_git("status", "--porcelain"))
    return {
        "git_sha": git_sha,
        "git_dirty": dirty,
        "versions": {p: metadata.version(p) for p in PACKAGES},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {_processor()}{_gpu()}",
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(seconds, 1),
        "peak_memory_gib": round(peak_memory() / 2**30, 2),
    }


def forget_peak_memory() -> None:
    """Let the next peak be this stage's own, not that of an earlier one in the same process."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # not Linux, or not allowed: the peak is then the process's
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """The peak of this process's memory, in bytes."""
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if peak:
        return int(peak[1]) * 1024
    import resource  # macOS counts bytes, others kibibytes

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def _git(*words: str) -> str:
    command = ["git", "-C", str(paths.root()), *words]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def _processor() -> str:
    """What numbers depend on: another number of threads, or other instructions, round otherwise."""
    cores, torch = f"{os.cpu_count()} cores", sys.modules.get("torch")
    if torch is None:
        return cores
    amx = " with AMX" * getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    kind = torch.backends.cpu.get_cpu_capability() + amx
    return f"{cores} ({torch.get_num_threads()} in use, {kind})"


def _gpu() -> str:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return ""
    peak = torch.cuda.max_memory_allocated() / 2**30
    return f", {torch.cuda.get_device_name()} (peak {peak:.1f} GiB)"


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """Write one JSON object a line, whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, "utf8")
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """Read a JSON file that this project wrote."""
    return json.loads(path.read_text("utf8"))


def read_jsonl(path: Path) -> list[dict]:
    """Read a file that this project wrote; user files go through data.read_rows."""
    # Not splitlines(): texts may hold U+2028 and other characters that it takes for line ends.
    return [json.loads(line) for line in path.read_text("utf8").split("\n") if line]
