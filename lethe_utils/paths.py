"""Every folder the project reads or writes, in one place.

Notebooks run in their caller's directory under papermill and in their own under nbval, so no
relative path is safe: everything starts at ROOT. Four environment variables move things:
LETHE_ROOT (the checkout), LETHE_RUNS (what runs write), LETHE_DATA_DIR (data sets you supply)
and LETHE_CACHE (WordNet, and models from the Python package index).
"""

import hashlib
import os
import re
from pathlib import Path

LONGEST_NAME = 100  # of the 255 bytes that a file system allows; a hash and an ending come after it


def root() -> Path:
    """The checkout: the folder that holds params/ and notebooks/."""
    return Path(os.environ.get("LETHE_ROOT", Path(__file__).resolve().parent.parent))


def params_dir() -> Path:
    return root() / "params"


def paper_dir() -> Path:
    """The paper's published numbers, as CSV."""
    return root() / "data" / "paper"


def released_dir() -> Path:
    """Committed results: tables of all released runs, and one JSON a run."""
    return root() / "results"


def figures_dir() -> Path:
    return root() / "figures"


def runs_dir() -> Path:
    """Everything a run writes (ignored by git)."""
    return Path(os.environ.get("LETHE_RUNS", root() / "runs")).resolve()


def stages_dir() -> Path:
    """Finished stages, shared between runs and named by the hash of what made them."""
    return runs_dir() / "stages"


def run_dir(run_id: str) -> Path:
    """One run: its resolved params, executed notebooks, results, manifest and figures."""
    return runs_dir() / run_id


def data_dir() -> Path | None:
    """The user's own copies of data sets, or None when LETHE_DATA_DIR is unset."""
    value = os.environ.get("LETHE_DATA_DIR")
    return Path(value).resolve() if value else None


def cache_dir() -> Path:
    return Path(os.environ.get("LETHE_CACHE", Path.home() / ".cache" / "lethe"))


def expanded(given: str) -> Path:
    """A path as the user wrote it, ~ and all, made absolute; what no one is at home in stays."""
    return Path(os.path.expanduser(given)).resolve()


def file_name(text: str) -> str:
    """A name that any file system, shell and tool takes, made from that of a folder or a data set;
    one that had to be changed ends in a hash, so that two stay two."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", text)[:LONGEST_NAME]
    changed = hashlib.sha256(text.encode("utf8", "surrogateescape")).hexdigest()[:6]
    return safe if safe == text else f"{safe}-{changed}"
