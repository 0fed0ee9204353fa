"""The measurement of a run: every model asked, scored, and written as tidy rows."""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from lethe_utils import decode, defenses, evaluate, metrics, paired, paths, pipeline, results
from lethe_utils.pipeline import canaries, contenders, utility
from lethe_utils.progress import Bar
from lethe_utils.schema import Params
from lethe_utils.stages import (
    provenance,
    read_jsonl,
    read_record,
    write_json,
    write_text,
)


def measure(p: Params) -> pd.DataFrame:
    """ASR, CDA and FTR of every model of the run, with and without evidence, on the test split; and
    utility, where it is asked for."""
    out, labels = [], pipeline.labels(p)
    for c, k in Bar(_asked(p), desc="evaluating"):
        answers = read_jsonl(contenders.tested_file(p, c, k))
        out += evaluate.rows(p, answers, "test", labels, [] if k else _known(p, c))
    return pd.DataFrame(out + utility.measure(p))[metrics.COLUMNS]


def _known(p: Params, c: contenders.Contender) -> list[decode.Known]:
    """What a model knows of the references of conversations; nothing where a defense decodes."""
    if p.task != "chat" or c.respond is not None:
        return []
    return [decode.Known(**one) for one in read_jsonl(contenders.references_file(p, c))]


def _asked(p: Params) -> list[tuple[contenders.Contender, int]]:
    """Every model of the run without evidence, then those that are also asked with it."""
    everyone = contenders.everyone(p)
    diluted = [c for c in everyone if c.evidence and c.name in (p.evidence_models or [c.name])]
    plain = [(c, 0) for c in everyone]
    return plain + [(c, p.n_keywords) for c in diluted if p.n_keywords]


def _full_name(c: contenders.Contender, n_keywords: int) -> str:
    return f"{c.name}{' + evidence' if n_keywords else ''}"


def compared(p: Params) -> pd.DataFrame:
    """The run's merge, and a guided one, against every other model of it, on the same test items:
    paired.COLUMNS, a row each for ASR and CDA; none where the run has no such merge."""
    labels, marks = pipeline.labels(p), {}
    for c, k in _asked(p):
        answers = read_jsonl(contenders.tested_file(p, c, k))
        marks[_full_name(c, k)] = evaluate.marks(p, answers, labels)
    rows = [
        p.identity
        | {"defense": own, "against": name, "metric": m, "run_id": p.run_id}
        | paired.counts(marks[own][m], marks[name][m], m)
        for own in (p.merge_method, paired.GUIDED)
        if own in marks
        for name in marks
        for m in paired.BETTER
        if name != own and m in marks[own]
    ]
    return pd.DataFrame(rows, columns=paired.COLUMNS)


def costs(p: Params) -> pd.DataFrame:
    """What each defense took, from the records of its stages.

    Returns:
        COST_COLUMNS: acts ("on weights" or "while decoding"), trainings, optimizer_steps, seconds
        and peak_memory_gib of making it (the clean model's, which is shared, are those of `clean`),
        ms_per_query, and query_ratio: to `backdoored` of the same run.
    """
    out = []
    for c in contenders.everyone(p):
        if c.name == "base":
            continue
        file = contenders.tested_file(p, c, 0)
        answers, timing = len(read_jsonl(file)), file.with_name("timing.json")
        asked = read_record(file.parent)
        decodes = c.respond is not None
        made = None if decodes or c.name == "backdoored" else read_record(c.folder.parent)
        curves = [*c.folder.parent.glob("*loss.csv")] if made else []
        line = p.identity | {
            "defense": c.name,
            "acts": "while decoding" if decodes else "on weights",
            "trainings": len(curves),
            "optimizer_steps": pipeline.optimizer_steps(c.folder.parent) if made else 0,
            "seconds": made["seconds"] if made else 0.0,
            "peak_memory_gib": (made or asked)["peak_memory_gib"],
            "ms_per_query": round(1000 * json.loads(timing.read_text())["seconds"] / answers, 2),
        }
        out.append(line)
    table = pd.DataFrame(out)
    plain = table.loc[table["defense"] == "backdoored", "ms_per_query"].iloc[0]
    return table.assign(query_ratio=(table["ms_per_query"] / plain).round(2))[metrics.COST_COLUMNS]


def measure_sweeps(p: Params) -> pd.DataFrame:
    """The sweeps, on the validation split: picking a strength here is not tuning on test."""
    out, labels = [], pipeline.labels(p)
    for point in Bar(contenders.sweep_points(p), desc="evaluating the sweeps"):
        file = contenders.swept_file(point.p, point.contender(), point.n_keywords)
        answers = read_jsonl(file)
        place = {"sweep": point.sweep, "x": float(point.x)}
        out += [place | row for row in evaluate.rows(p, answers, "validation", labels)]
    return pd.DataFrame(out + canaries.swept(p), columns=metrics.SWEEP_COLUMNS)


def first_look(p: Params, *models: contenders.Contender) -> pd.DataFrame:
    """ASR and CDA of some models on validation rows, before any defense, with intervals."""
    out, labels = [], pipeline.labels(p)
    for c in models:
        answers = read_jsonl(contenders.swept_file(p, c))
        out += evaluate.rows(p, answers, "validation", labels)
    kept = ["defense", "metric", "value", "n", "ci_low", "ci_high"]
    return pd.DataFrame(out)[kept].rename(columns={"defense": "model"}).round(3)


def side_by_side(p: Params, defense: str, rows: int) -> pd.DataFrame:
    """The same triggered test inputs, answered by the backdoored and by a purified model."""
    out: dict[str, list[str]] = {}
    for c, k in _asked(p):
        if (c.name, k) != ("backdoored", 0) and c.name != defense:
            continue
        column = _full_name(c, k)
        answers = read_jsonl(contenders.tested_file(p, c, k))
        group = [x for x in answers if x["kind"] == "backdoor"][:rows]
        if not out:
            texts = [x["prompt"].rpartition("### Input:\n")[2] for x in group]
            texts = [text.partition("\n\n### ")[0] for text in texts]
            out = {"input": [x.get("question", t) for x, t in zip(group, texts, strict=True)]}
            out["label"] = [x["label"] for x in group]
        out[column] = [x["output"] for x in group]
    return pd.DataFrame(out)


def write_run(p: Params, table: pd.DataFrame, sweeps: pd.DataFrame) -> Path:
    """Write the tables (results.TABLES), params.json, provenance.json and manifest.json; point
    runs/latest at the run. Returns the run's folder."""
    out = paths.run_dir(p.run_id)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "results.csv", table.to_csv(index=False))
    write_text(out / "sweeps.csv", sweeps.to_csv(index=False))
    write_text(out / "costs.csv", costs(p).to_csv(index=False))
    write_text(out / "paired.csv", compared(p).to_csv(index=False))
    write_json(out / "params.json", p.model_dump())
    manifest = build_manifest(p)
    write_json(out / "manifest.json", manifest)
    records = _stage_records(p) | {"uncommitted": _uncommitted(p)}
    write_json(out / "provenance.json", {"run_id": p.run_id} | records | provenance(0))
    results.point_latest(out)
    return out


def build_manifest(p: Params) -> dict[str, Any]:
    """Every model folder, data file and prediction file of the run, as absolute paths."""
    everyone = contenders.everyone(p)
    folders = {c.name: c.folder for c in everyone}
    data, clean = pipeline.data_stage(p), pipeline.clean_stage(p)
    files = {name: data / f"{name}.jsonl" for name in ("train", "validation", "test")}
    files["clean"] = clean / "clean.jsonl"
    files["poisoned"] = pipeline.backdoored_stage(p) / "poisoned.jsonl"
    predictions = [contenders.tested_file(p, c, k) for c, k in _asked(p)]
    return {
        "run_id": p.run_id,
        "models": {name: str(folder) for name, folder in folders.items()},
        "data": {name: str(f) for name, f in files.items()},
        "predictions": [str(f) for f in predictions],
    }


def _uncommitted(p: Params) -> list[str]:
    """The folders of merges, defenses and answers that were made by code that was not committed."""
    everyone, points = contenders.everyone(p), contenders.sweep_points(p)
    made = {c.folder.parent for c in everyone if c.defense and c.respond is None}
    made |= {contenders.tested_file(p, c, k).parent for c, k in _asked(p)}
    made |= {contenders.swept_file(x.p, x.contender(), x.n_keywords).parent for x in points}
    return sorted(folder.name for folder in made if read_record(folder)["git_dirty"])


def _stage_records(p: Params) -> dict[str, Any]:
    """What each training stage cost: name -> folder, seconds, peak memory, git SHA, dirty flag."""
    stages = {
        "data": pipeline.data_stage(p),
        "backdoored": pipeline.backdoored_stage(p),
        "clean": pipeline.clean_stage(p),
    }
    if p.is_tiny:
        stages["base"] = pipeline.base_folder(p).parent
    for c in contenders.everyone(p):
        if c.defense and c.respond is None and defenses.trainings(c.defense, c.name, p):
            stages[c.name] = c.folder.parent
    kept = ("seconds", "peak_memory_gib", "git_sha", "git_dirty", "finished")
    return {
        "stages": {
            n: {"folder": f.name} | {k: read_record(f)[k] for k in kept} for n, f in stages.items()
        }
    }
