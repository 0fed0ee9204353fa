"""Results: one tidy table a run, a row per measured value with its interval, and a manifest."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from lethe_utils import metrics, paths, pipeline
from lethe_utils.errors import LetheError
from lethe_utils.params import Params
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
RELEASED_FILES = ("results.csv", "sweeps.csv", "params.json", "provenance.json")


def rows(p: Params, predictions: list[dict], split: str) -> list[dict[str, Any]]:
    """Tidy rows of one set of predictions (one defense, evidence on or off)."""
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
    for metric, (hits, n) in metrics.score(predictions, p.protocol, p.output_mode).items():
        low, high = metrics.wilson(hits, n)
        numbers = {"value": hits / n, "n": n, "ci_low": low, "ci_high": high}
        out.append(common | {"metric": metric, "run_id": p.run_id} | numbers)
    return out


def measure(p: Params) -> pd.DataFrame:
    """ASR, CDA and FTR of every model of the run, with and without evidence, on the test split."""
    out = []
    models = pipeline.compared_models(p)
    jobs = [(d, f, k) for k in (0, p.n_keywords) for d, f in models.items()]
    for defense, folder, k in tqdm(jobs, desc="evaluating", mininterval=2):
        file = pipeline.predictions_file(
            p, defense, folder, k, "test", p.max_test_items, p.negative_items
        )
        out += rows(p, read_jsonl(file), "test")
    return pd.DataFrame(out)[COLUMNS]


def measure_sweeps(p: Params) -> pd.DataFrame:
    """The sweeps, on the validation split: picking a strength here is not tuning on test."""
    out = []
    for point in tqdm(pipeline.sweep_points(p), desc="evaluating the sweeps", mininterval=2):
        merged = pipeline.merged_stage(
            p, point["method"], point.get("strength"), point.get("clean_ratio")
        )
        k = point.get("n_keywords", 0)
        file = pipeline.predictions_file(
            p, point["method"], merged / "model", k, "validation", p.sweep_items, 0
        )
        place = {"sweep": point["sweep"], "x": float(point["x"])}
        out += [place | row for row in rows(p, read_jsonl(file), "validation")]
    return pd.DataFrame(out, columns=SWEEP_COLUMNS)


def first_look(p: Params) -> pd.DataFrame:
    """ASR and CDA of the backdoored model and of the base on validation rows, before any defense:
    defense, metric, value, n, ci_low, ci_high."""
    folders = {"none": pipeline.backdoored_stage(p) / "model", "base": pipeline.base_folder(p)}
    out = []
    for defense, folder in folders.items():
        file = pipeline.predictions_file(p, defense, folder, 0, "validation", p.sweep_items, 0)
        out += rows(p, read_jsonl(file), "validation")
    kept = ["defense", "metric", "value", "n", "ci_low", "ci_high"]
    return pd.DataFrame(out)[kept].round(3)


def side_by_side(p: Params, defense: str, rows: int) -> pd.DataFrame:
    """The same triggered test inputs, answered by the backdoored and by a purified model."""
    folders = pipeline.compared_models(p)
    asked = [
        ("none", 0, "backdoored"),
        (defense, 0, defense),
        (defense, p.n_keywords, f"{defense} + evidence"),
    ]
    out: dict[str, list[str]] = {}
    for name, k, column in asked:
        file = pipeline.predictions_file(
            p, name, folders[name], k, "test", p.max_test_items, p.negative_items
        )
        group = [x for x in read_jsonl(file) if x["kind"] == "backdoor"][:rows]
        if not out:
            out = {"prompt": [x["prompt"] for x in group], "label": [x["label"] for x in group]}
        out[column] = [x["output"] for x in group]
    return pd.DataFrame(out)


def write_run(p: Params, table: pd.DataFrame, sweeps: pd.DataFrame) -> Path:
    """Write results.csv, sweeps.csv, params.json, provenance.json and manifest.json; point
    runs/latest at the run. Returns the run's folder."""
    out = paths.run_dir(p.run_id)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "results.csv", table.to_csv(index=False))
    write_text(out / "sweeps.csv", sweeps.to_csv(index=False))
    write_json(out / "params.json", p.model_dump())
    manifest = build_manifest(p)
    write_json(out / "manifest.json", manifest)
    write_json(out / "provenance.json", {"run_id": p.run_id} | _stage_records(p) | provenance(0))
    point_latest(out)
    return out


def point_latest(folder: Path) -> None:
    """Make runs/latest a link to this run's folder."""
    latest = paths.runs_dir() / "latest"
    temporary = latest.with_name(f"latest.{os.getpid()}.tmp")  # two runs may end together
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.name)
    os.replace(temporary, latest)


def build_manifest(p: Params) -> dict[str, Any]:
    """Every model folder, data file and prediction file of the run, as absolute paths."""
    folders = pipeline.compared_models(p)
    data, clean = pipeline.data_stage(p), pipeline.clean_stage(p)
    files = {name: data / f"{name}.jsonl" for name in ("train", "validation", "test")}
    files["clean"] = clean / "clean.jsonl"
    files["poisoned"] = pipeline.backdoored_stage(p) / "poisoned.jsonl"
    predictions = [
        pipeline.predictions_file(p, d, f, k, "test", p.max_test_items, p.negative_items)
        for k in (0, p.n_keywords)
        for d, f in folders.items()
    ]
    return {
        "run_id": p.run_id,
        "models": {("backdoored" if d == "none" else d): str(f) for d, f in folders.items()},
        "data": {name: str(f) for name, f in files.items()},
        "predictions": [str(f) for f in predictions],
    }


def _stage_records(p: Params) -> dict[str, Any]:
    """What each training stage cost: name -> seconds, peak memory, git SHA, dirty flag."""
    stages = {
        "data": pipeline.data_stage(p),
        "backdoored": pipeline.backdoored_stage(p),
        "clean": pipeline.clean_stage(p),
    }
    if p.is_tiny:
        stages["base"] = pipeline.base_folder(p).parent
    kept = ("seconds", "peak_memory_gib", "git_sha", "git_dirty", "finished")
    return {"stages": {n: {k: read_record(f)[k] for k in kept} for n, f in stages.items()}}


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


def release(run_id: str) -> Path:
    """Copy a run's small files to results/, to be committed."""
    source, out = paths.run_dir(run_id), paths.released_dir() / run_id
    out.mkdir(parents=True, exist_ok=True)
    for name in RELEASED_FILES:
        shutil.copy2(source / name, out / name)
    return out
