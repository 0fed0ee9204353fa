"""Results: one tidy table a run, a row per measured value with its interval, and a manifest."""

import json
import os
import shutil
from pathlib import Path

import pandas as pd

from lethe_utils import metrics, paths
from lethe_utils.errors import LetheError
from lethe_utils.params import Params

RELEASED_FILES = ("results.csv", "sweeps.csv", "costs.csv", "params.json", "provenance.json")


def point_latest(folder: Path) -> None:
    """Make runs/latest a link to this run's folder; what else is called that is left alone."""
    latest = paths.runs_dir() / "latest"
    if latest.exists() and not latest.is_symlink():
        return
    temporary = latest.with_name(f"latest.{os.getpid()}.tmp")  # two runs may end together
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.name)
    os.replace(temporary, latest)


def read_run(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """results.csv and sweeps.csv of one run folder. Raises LetheError when it has none."""
    if not (folder / "results.csv").exists():
        raise LetheError(f"{folder}: no results.csv; run 05_evidence_eval first")
    return pd.read_csv(folder / "results.csv"), pd.read_csv(folder / "sweeps.csv")


def read_released() -> tuple[pd.DataFrame, pd.DataFrame]:
    """All committed runs under results/, concatenated.

    Raises:
        LetheError: there is none, or two runs of one setup differ in more than their seed: tables
            pool what has the same model, dataset and attack.
    """
    folders = sorted(f.parent for f in paths.released_dir().glob("*/results.csv"))
    if not folders:
        raise LetheError(f"{paths.released_dir()}: no released results; run `./run_all.sh` first")
    setups: dict[tuple, tuple[Path, dict]] = {}
    for folder in folders:
        params = json.loads((folder / "params.json").read_text("utf8")) | {"seed": None}
        setup = (params["model"], params["dataset"], params["attack"])
        first, wanted = setups.setdefault(setup, (folder, params))
        changed = sorted(k for k in {*params, *wanted} if params.get(k) != wanted.get(k))
        if changed:
            raise LetheError(
                f"{folder} and {first}: same model, dataset and attack, but other "
                f"{', '.join(changed)}; release runs that differ in their seed only"
            )
    tables, sweeps = zip(*(read_run(f) for f in folders), strict=True)
    return pd.concat(tables, ignore_index=True), pd.concat(sweeps, ignore_index=True)


def load(p: Params, results_from: str) -> tuple[pd.DataFrame, pd.DataFrame, Path]:
    """What 06_tables shows, and the folder its figures and tables go to.

    Args:
        results_from: "released" (the committed results, no training) or "run" (this run's own).
    """
    if results_from == "released":
        return *read_released(), paths.figures_dir()
    if results_from == "run":
        folder = paths.run_dir(p.run_id)
        return *read_run(folder), folder / "figures"
    raise LetheError(f"results_from: {results_from!r} is neither released nor run")


def load_costs(p: Params, results_from: str) -> pd.DataFrame:
    """The costs (see `costs`) beside what `load` gives; runs released without any have none."""
    if results_from == "run":
        return pd.read_csv(paths.run_dir(p.run_id) / "costs.csv")
    files = sorted(paths.released_dir().glob("*/costs.csv"))
    found = [pd.read_csv(file) for file in files]
    return (
        pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=metrics.COST_COLUMNS)
    )


def release(run_id: str) -> Path:
    """Copy a run's small files to results/, to be committed."""
    source, out = paths.run_dir(run_id), paths.released_dir() / run_id
    out.mkdir(parents=True, exist_ok=True)
    for name in RELEASED_FILES:
        shutil.copy2(source / name, out / name)
    return out
