"""Results: read a run's tidy tables, or the released ones; release a run.

Released are four tables of all runs (a row per measured value, by `run_id`) and one JSON a run,
its provenance with its `params`.
"""

import os
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from lethe_utils import defenses, paths
from lethe_utils.errors import LetheError
from lethe_utils.groups import DefenderParams, SweepParams, UtilityParams
from lethe_utils.metrics import KEYS
from lethe_utils.schema import Params, choices
from lethe_utils.stages import read_json, write_json, write_text

TABLES = ("results.csv", "sweeps.csv", "costs.csv", "paired.csv")


class Measured(NamedTuple):
    """The tables of a run, or of many: metrics.COLUMNS, SWEEP_COLUMNS, COST_COLUMNS, and
    paired.COLUMNS."""

    table: pd.DataFrame
    sweeps: pd.DataFrame
    costs: pd.DataFrame
    paired: pd.DataFrame


def point_latest(folder: Path) -> None:
    """Make runs/latest a link to this run's folder; what else is called that is left alone."""
    latest = paths.runs_dir() / "latest"
    if latest.exists() and not latest.is_symlink():
        return
    temporary = latest.with_name(f"latest.{os.getpid()}.tmp")  # two runs may end together
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.name)
    os.replace(temporary, latest)


def read_run(folder: Path) -> Measured:
    """The tables of one run folder. Raises LetheError when one is missing."""
    missing = [name for name in TABLES if not (folder / name).exists()]
    if missing:
        raise LetheError(f"{folder}: no {', '.join(missing)}; run 05_evidence_eval first")
    return Measured(*(pd.read_csv(folder / name) for name in TABLES))


def read_released() -> Measured:
    """All released runs.

    Raises:
        LetheError: there is none, or two runs of one setup differ in more than their seed: tables
            pool what has the same model, dataset and attack.
    """
    folder = paths.released_dir()
    if not (folder / "results.csv").exists():
        raise LetheError(f"{folder}: no released results; run `./run_all.sh release RUN_ID` first")
    _check_setups(released_params())
    return read_run(folder)


def released_params() -> dict[str, dict[str, Any]]:
    """run_id -> params of every released run."""
    files = (paths.released_dir() / "runs").glob("*.json")
    return {file.stem: read_json(file)["params"] for file in files}


def _check_setups(runs: dict[str, dict[str, Any]]) -> None:
    """Refuse runs (run_id -> params) that would be pooled though they are not of one kind; which
    defenses and which points of the sweeps a run has is its own, and so are the params of a defense
    that not both of two have: nothing of it is pooled."""
    # What a run measures beside the others changes nothing of what they share.
    beside = {*SweepParams.model_fields, *UtilityParams.model_fields}
    # How many are asked at a time fits the machine, and moves answers by rounding alone.
    own = {"seed", "defense", "eval_batch_size", *beside} - {"sweep_items"}
    setups: dict[tuple, tuple[str, dict]] = {}
    for run_id, params in sorted(runs.items()):
        setup = (params["model"], params["dataset"], params["attack"])
        first, wanted = setups.setdefault(setup, (run_id, params))
        # A param that only one of them has came with later code, whose default is what was before.
        changed = {k for k in params.keys() & wanted.keys() if params[k] != wanted[k]} - own
        changed -= _params_of_others(params, wanted)
        if changed:
            raise LetheError(
                f"{run_id} and {first}: same model, dataset and attack, but other "
                f"{', '.join(sorted(changed))}; release runs that differ in their seed, "
                "defenses and sweeps only"
            )


def _params_of_others(*runs: dict[str, Any]) -> set[str]:
    """The params of defenses that not all of some runs have, as far as they belong to no other."""
    known = [*choices("defenses")]
    both = [
        d for d in known if all(r["defense"] == "all" or d in r["defense"].split(",") for r in runs)
    ]
    mine, theirs = (
        {key for group in defenses.groups(tuple(names)) for key in group.model_fields}
        for names in ([d for d in known if d not in both], both)
    )
    return mine - theirs - {*DefenderParams.model_fields}


def load(p: Params, results_from: str) -> tuple[Measured, Path]:
    """What 06_tables shows ("released": the committed results, or the "run"'s own), and the folder
    its figures and tables go to."""
    if results_from == "released":
        return read_released(), paths.figures_dir()
    if results_from == "run":
        folder = paths.run_dir(p.run_id)
        return read_run(folder), folder / "figures"
    raise LetheError(f"results_from: {results_from!r} is neither released nor run")


def release(run_id: str) -> Path:
    """Copy a finished run into the released tables, in place of its earlier rows and of a released
    run of the same model, data set, attack and seed; returns its JSON.

    Raises:
        LetheError: the run is not finished, some of its code was not committed, it differs in
            more than the seed from a released one of the same setup, or it lacks what one of the
            same seed has measured.
    """
    run, out = paths.run_dir(run_id), paths.released_dir()
    wanted = [*(run / name for name in (*TABLES, "params.json", "provenance.json"))]
    if (run / "done").exists():  # of the front door: gone while the run is at work again
        wanted.append(run / "done" / "05_evidence_eval")
    missing = [file.name for file in wanted if not file.exists()]
    if missing:
        raise LetheError(f"{run}: no {', '.join(missing)}; finish the run, then release it")
    provenance = read_json(run / "provenance.json")
    records = {"the evaluation": provenance} | provenance["stages"]
    dirty = [name for name, record in records.items() if record["git_dirty"]]
    dirty += provenance.get("uncommitted", [])
    if dirty:
        raise LetheError(
            f"{run}: its code was not committed (git_dirty of {', '.join(dirty)}); commit, delete "
            "those stages and run it again"
        )
    params = read_json(run / "params.json")
    _check_setups(released_params() | {run_id: params})
    gone = _of_the_same_seed(run_id, params)
    if gone:
        _check_kept(run, gone)
    (out / "runs").mkdir(parents=True, exist_ok=True)
    for name in TABLES:
        write_text(out / name, _with_run(out / name, run / name, run_id, gone))
    content = {"run_id": run_id, "params": params} | provenance
    write_json(out / "runs" / f"{run_id}.json", content)
    for other in gone:
        (out / "runs" / f"{other}.json").unlink()
    return out / "runs" / f"{run_id}.json"


def _of_the_same_seed(run_id: str, params: dict[str, Any]) -> list[str]:
    """Other released runs of the same model, data set, attack and seed: two would put the same
    items into a pooled cell twice, and its interval would be too narrow."""
    named = itemgetter("model", "dataset", "attack", "seed")
    others = released_params().items()
    return [known for known, x in others if known != run_id and named(x) == named(params)]


def _check_kept(run: Path, gone: list[str]) -> None:
    """Refuse a run that lacks what one that it would replace has measured."""
    for name, columns in (("results.csv", KEYS), ("sweeps.csv", ["sweep", "x", *KEYS])):
        released = pd.read_csv(paths.released_dir() / name).query("run_id in @gone")
        measured = {*pd.read_csv(run / name)[columns].itertuples(index=False, name=None)}
        lost = {*released[columns].itertuples(index=False, name=None)} - measured
        if lost:
            what = name.removesuffix(".csv")
            shown = sorted({str(x[columns.index("defense")]) for x in lost})
            raise LetheError(
                f"{run}: {what} of {', '.join(shown)}, which the released {', '.join(gone)} of the "
                "same seed has, are not in it; run it with those defenses and sweeps too"
            )


def _with_run(released: Path, new: Path, run_id: str, gone: list[str]) -> str:
    """The released table with a run's rows, ordered by run; every number as it was written."""
    as_written = {"dtype": str, "keep_default_na": False}
    rows = [pd.read_csv(new, **as_written).assign(run_id=run_id)]
    if released.exists():
        known = pd.read_csv(released, **as_written)
        rows.insert(0, known[~known["run_id"].isin([run_id, *gone])])
    whole = pd.concat(rows, ignore_index=True).sort_values("run_id", kind="stable")
    return whole.to_csv(index=False)
