"""Results: one tidy table a run, a row per measured value with its interval, and a manifest."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lethe_utils import defenses, metrics, paths, pipeline
from lethe_utils.errors import LetheError
from lethe_utils.params import Params
from lethe_utils.progress import Bar
from lethe_utils.stages import provenance, read_jsonl, read_record, write_json, write_text

COLUMNS = [
    "model",
    "dataset",
    "attack",
    "defense",
    "evidence",
    "seed",
    "split",
    "metric",
    "value",
    "n",
    "ci_low",
    "ci_high",
    "run_id",
]
SWEEP_COLUMNS = ["sweep", "x", *COLUMNS]
COST_COLUMNS = [
    "model",
    "dataset",
    "attack",
    "seed",
    "defense",
    "acts",
    "trainings",
    "optimizer_steps",
    "seconds",
    "peak_memory_gib",
    "ms_per_query",
    "query_ratio",
]
RELEASED_FILES = ("results.csv", "sweeps.csv", "costs.csv", "params.json", "provenance.json")


def rows(
    p: Params, predictions: list[dict], split: str, labels: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Tidy rows of one set of predictions (one defense, evidence on or off).

    Args:
        labels: the data set's, where the params do not name them; see metrics.says.
    """
    common = {
        "model": p.model,
        "dataset": p.dataset_name,
        "attack": p.attack,
        "defense": predictions[0]["defense"],
        "evidence": predictions[0]["evidence"],
        "seed": p.seed,
        "split": split,
    }
    out = []
    found = metrics.score(predictions, p.protocol, p.output_mode, labels or p.labels)
    for metric, (hits, n) in found.items():
        low, high = metrics.wilson(hits, n)
        numbers = {"value": hits / n, "n": n, "ci_low": low, "ci_high": high}
        out.append(common | {"metric": metric, "run_id": p.run_id} | numbers)
    return out


def measure(p: Params) -> pd.DataFrame:
    """ASR, CDA and FTR of every model of the run, with and without evidence, on the test split."""
    out, labels = [], pipeline.labels(p)
    for c, k in Bar(_asked(p), desc="evaluating"):
        out += rows(p, read_jsonl(pipeline.tested_file(p, c, k)), "test", labels)
    return pd.DataFrame(out)[COLUMNS]


def _asked(p: Params) -> list[tuple[pipeline.Contender, int]]:
    """Every model of the run without evidence, then those that are also asked with it."""
    everyone = pipeline.contenders(p)
    plain = [(c, 0) for c in everyone]
    return plain + [(c, p.n_keywords) for c in everyone if c.evidence and p.n_keywords]


def costs(p: Params) -> pd.DataFrame:
    """What each defense took, from the records of its stages.

    Returns:
        COST_COLUMNS: acts ("on weights" or "while decoding"), trainings, optimizer_steps, seconds
        and peak_memory_gib of making it (the clean model's, which is shared, are those of `clean`),
        ms_per_query, and query_ratio: to `none` of the same run.
    """
    out = []
    for c in pipeline.contenders(p):
        if c.name == "base":
            continue
        file = pipeline.tested_file(p, c, 0)
        answers, timing = len(read_jsonl(file)), file.with_name("timing.json")
        asked = read_record(file.parent)
        decodes = c.respond is not None
        made = None if decodes or c.name == "none" else read_record(c.folder.parent)
        trainings = int(c.name == "clean")
        if c.defense:
            trainings = defenses.trainings(c.defense, c.name)
        line = {
            "model": p.model,
            "dataset": p.dataset_name,
            "attack": p.attack,
            "seed": p.seed,
            "defense": c.name,
            "acts": "while decoding" if decodes else "on weights",
            "trainings": trainings,
            "optimizer_steps": pipeline.optimizer_steps(c.folder.parent) if made else 0,
            "seconds": made["seconds"] if made else 0.0,
            "peak_memory_gib": (made or asked)["peak_memory_gib"],
            "ms_per_query": round(1000 * json.loads(timing.read_text())["seconds"] / answers, 2),
        }
        out.append(line)
    table = pd.DataFrame(out)
    plain = table.loc[table["defense"] == "none", "ms_per_query"].iloc[0]
    return table.assign(query_ratio=(table["ms_per_query"] / plain).round(2))[COST_COLUMNS]


def measure_sweeps(p: Params) -> pd.DataFrame:
    """The sweeps, on the validation split: picking a strength here is not tuning on test."""
    out, labels = [], pipeline.labels(p)
    for point in Bar(pipeline.sweep_points(p), desc="evaluating the sweeps"):
        merged = pipeline.merged_stage(
            p, point["method"], point.get("strength"), point.get("clean_ratio")
        )
        k = point.get("n_keywords", 0)
        c = pipeline.Contender(point["method"], merged / "model")
        file = pipeline.predictions_file(p, c, k, "validation", p.sweep_items, 0)
        place = {"sweep": point["sweep"], "x": float(point["x"])}
        out += [place | row for row in rows(p, read_jsonl(file), "validation", labels)]
    return pd.DataFrame(out, columns=SWEEP_COLUMNS)


def first_look(p: Params) -> pd.DataFrame:
    """ASR and CDA of the backdoored model and of the base on validation rows, before any defense:
    defense, metric, value, n, ci_low, ci_high."""
    out, labels = [], pipeline.labels(p)
    for c in (pipeline.suspect(p), pipeline.base(p)):
        file = pipeline.predictions_file(p, c, 0, "validation", p.sweep_items, 0)
        out += rows(p, read_jsonl(file), "validation", labels)
    kept = ["defense", "metric", "value", "n", "ci_low", "ci_high"]
    return pd.DataFrame(out)[kept].round(3)


def side_by_side(p: Params, defense: str, rows: int) -> pd.DataFrame:
    """The same triggered test inputs, answered by the backdoored and by a purified model."""
    out: dict[str, list[str]] = {}
    for c, k in _asked(p):
        if (c.name, k) != ("none", 0) and c.name != defense:
            continue
        column = "backdoored" if c.name == "none" else f"{c.name}{' + evidence' if k else ''}"
        answers = read_jsonl(pipeline.tested_file(p, c, k))
        group = [x for x in answers if x["kind"] == "backdoor"][:rows]
        if not out:
            out = {"prompt": [x["prompt"] for x in group], "label": [x["label"] for x in group]}
        out[column] = [x["output"] for x in group]
    return pd.DataFrame(out)


def write_run(p: Params, table: pd.DataFrame, sweeps: pd.DataFrame) -> Path:
    """Write results.csv, sweeps.csv, costs.csv, params.json, provenance.json and manifest.json;
    point runs/latest at the run. Returns the run's folder."""
    out = paths.run_dir(p.run_id)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "results.csv", table.to_csv(index=False))
    write_text(out / "sweeps.csv", sweeps.to_csv(index=False))
    write_text(out / "costs.csv", costs(p).to_csv(index=False))
    write_json(out / "params.json", p.model_dump())
    manifest = build_manifest(p)
    write_json(out / "manifest.json", manifest)
    write_json(out / "provenance.json", {"run_id": p.run_id} | _stage_records(p) | provenance(0))
    point_latest(out)
    return out


def point_latest(folder: Path) -> None:
    """Make runs/latest a link to this run's folder; what else is called that is left alone."""
    latest = paths.runs_dir() / "latest"
    if latest.exists() and not latest.is_symlink():
        return
    temporary = latest.with_name(f"latest.{os.getpid()}.tmp")  # two runs may end together
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.name)
    os.replace(temporary, latest)


def build_manifest(p: Params) -> dict[str, Any]:
    """Every model folder, data file and prediction file of the run, as absolute paths."""
    everyone = pipeline.contenders(p)
    folders = {("backdoored" if c.name == "none" else c.name): c.folder for c in everyone}
    data, clean = pipeline.data_stage(p), pipeline.clean_stage(p)
    files = {name: data / f"{name}.jsonl" for name in ("train", "validation", "test")}
    files["clean"] = clean / "clean.jsonl"
    files["poisoned"] = pipeline.backdoored_stage(p) / "poisoned.jsonl"
    predictions = [pipeline.tested_file(p, c, k) for c, k in _asked(p)]
    return {
        "run_id": p.run_id,
        "models": {name: str(folder) for name, folder in folders.items()},
        "data": {name: str(f) for name, f in files.items()},
        "predictions": [str(f) for f in predictions],
    }


def _stage_records(p: Params) -> dict[str, Any]:
    """What each training stage cost: name -> folder, seconds, peak memory, git SHA, dirty flag."""
    stages = {
        "data": pipeline.data_stage(p),
        "backdoored": pipeline.backdoored_stage(p),
        "clean": pipeline.clean_stage(p),
    }
    if p.is_tiny:
        stages["base"] = pipeline.base_folder(p).parent
    for c in pipeline.contenders(p):
        if c.defense and c.respond is None and defenses.trainings(c.defense, c.name):
            stages[c.name] = c.folder.parent
    kept = ("seconds", "peak_memory_gib", "git_sha", "git_dirty", "finished")
    return {
        "stages": {
            n: {"folder": f.name} | {k: read_record(f)[k] for k in kept} for n, f in stages.items()
        }
    }


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
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=COST_COLUMNS)


def release(run_id: str) -> Path:
    """Copy a run's small files to results/, to be committed."""
    source, out = paths.run_dir(run_id), paths.released_dir() / run_id
    out.mkdir(parents=True, exist_ok=True)
    for name in RELEASED_FILES:
        shutil.copy2(source / name, out / name)
    return out
