"""What a purification leaves: the chosen model's folder, its card, and the record of the run."""

import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import ModelCard, ModelCardData

from lethe_utils import canary
from lethe_utils.paper import number
from lethe_utils.purify import (
    choice,
    dilute,
    measure,
    ownership,
    report,
    rounds,
    search,
    serve,
)
from lethe_utils.purify.ask import asr, marks, score
from lethe_utils.purify.case import Case
from lethe_utils.purify.measure import SUSPECT, Point
from lethe_utils.stages import provenance, read_json, read_record

SAMPLES = 8
GENERATION = "generation_config.json"  # copied as it was given: a server reads it
BASE = {"model": "base", "strength": 0.0}


def write(case: Case, points: list[Point], chosen: Point) -> Path:
    """The chosen model's folder: weights, tokenizer, generation settings, card and report.

    Raises:
        LetheError: see ownership.write.
    """

    def fill(folder: Path) -> None:
        parents = dilute.suspect_model(case), rounds.clean_model(case)
        dilute.merged(case, *parents, chosen, folder)
        settings = [f for f in (case.adapter, case.suspect) if f and (f / GENERATION).exists()]
        if settings:
            shutil.copyfile(settings[0] / GENERATION, folder / GENERATION)
        serve.ready(folder)
        record = _record(case, points, chosen)
        report.write(record, folder)
        # A local path is nobody's business.
        hub = re.fullmatch(r"(.+)@[0-9a-f]{40}", case.given["models"][1]["given"])
        data = ModelCardData(library_name="transformers", base_model=hub[1] if hub else None)
        card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{report.markdown(record)}")
        card.save(folder / "README.md")
        ownership.sign(folder, record)

    ownership.write(case.out, fill)
    return case.out


def table(case: Case, points: list[Point], chosen: Point) -> pd.DataFrame:
    """Every point, its clean performance and the canary's ASR, with 95 % intervals."""
    rows = pd.DataFrame(report.points_table(points, _place(chosen), case.metric))
    rows = rows.rename(columns={"ASR, all": "canary ASR"})
    return rows[["model", "strength", case.metric, "canary ASR"]]


def samples(case: Case, chosen: Point) -> list[dict[str, str]]:
    """Some held-out questions with the answers of the suspect and of the result, those first where
    they differ."""
    asked = (measure.answers(case, "suspect", at) for at in (SUSPECT, chosen))
    pairs = [
        {"input": b["input"], "expected": b["label"]}
        | {"suspect": b["output"], "result": a["output"]}
        for b, a in zip(*asked, strict=True)
    ]
    return sorted(pairs, key=lambda pair: pair["suspect"] == pair["result"])[:SAMPLES]


def _place(point: Point) -> dict[str, Any]:
    return {key: point[key] for key in ("model", "strength")}


def _evidence(case: Case, chosen: Point) -> dict[str, Any]:
    """External dilution on top: the result on the held-out rows without and with it."""
    n = case.p.n_keywords
    out: dict[str, Any] = {"n_keywords": n}
    for name, k in (("without", 0), ("with", n)):
        found = {}
        for which in ("suspect", "canary"):
            found |= marks(case, measure.answers(case, which, chosen, k))
        timing = read_json(measure.answered(case, "suspect", chosen, k) / "timing.json")
        out[name] = {"performance": score(found["clean"]), "canary": asr(found)}
        out[name]["ms_per_query"] = round(timing["seconds_per_question"] * 1000, 2)
    return out


def _stages(case: Case, points: list[Point]) -> Iterator[tuple[str, Path]]:
    """The stages that took time, each with its name."""
    trained = {"clean model": rounds.clean_rounds(case), "canary": rounds.canary_rounds(case)}
    for name, found in trained.items():
        yield from ((f"{name}, round {i}", one.folder) for i, one in enumerate(found, 1))
    for i, fold in enumerate(case.folds, 1):
        if fold != case.main:
            for n, folder in enumerate(rounds.clean_folders(case, fold), 1):
                yield f"clean model without third {i}, round {n}", folder
        for at in points:
            name = f"{at['model']} {at['strength']:g}, clean rows {i}"
            yield name, measure.answered(case, "suspect", at, 0, fold)
    if dilute.GUIDED in case.p.merge_methods:
        yield f"guided, search of {len(search.trials(case))} merges", search.searched(case)
    for at in points:
        yield f"{at['model']} {at['strength']:g}, canary", measure.answered(case, "canary", at)


def _trainings(case: Case) -> dict[str, Any]:
    """Of the clean model and the canary: what each round gave, the one kept, and the loss curve."""
    clean, planted = rounds.clean_rounds(case), rounds.canary_rounds(case)
    said = {
        one.folder: f"{one.loss:.3f} nats per token on {len(case.stopping)} stopping rows"
        for one in clean
    }
    said |= {
        one.folder: ", ".join(f"{kind} {number(s['value'])}" for kind, s in one.asr.items())
        for one in planted
    }
    kept = rounds.clean_model(case), rounds.canary_model(case)
    trainings = {"clean model": clean, "canary": planted}
    lines = [
        {"training": f"{name}, round {i}", "result": said[one.folder], "kept": one.folder in kept}
        for name, found in trainings.items()
        for i, one in enumerate(found, 1)
    ]
    curves = {n: rounds.loss_curve(found).to_dict("records") for n, found in trainings.items()}
    return {"rounds": lines, "losses": curves}


def _record(case: Case, points: list[Point], chosen: Point) -> dict[str, Any]:
    """All that the report shows; see report.write."""
    costs = [
        {"stage": name} | {k: read_record(folder)[k] for k in ("seconds", "peak_memory_gib")}
        for name, folder in _stages(case, points)
    ]
    command = shlex.join(["./run_all.sh", *sys.argv[1:]])
    made = provenance(sum(cost["seconds"] for cost in costs))
    base = marks(case, measure.answers(case, "base", BASE))
    return {key: made[key] for key in ("finished", "machine", "versions", "git_sha")} | {
        "verdict": choice.verdict(case, chosen),
        "chosen": _place(chosen),
        "seed": case.p.seed,
        "command": command if sys.argv[1:2] == ["purify"] else "notebooks/purify.ipynb",
        "out": str(case.out),
        **case.given,
        "recipe": case.p.model_dump(),
        "metric": case.metric,
        "folds": len(case.folds),
        "max_cda_loss": case.p.max_cda_loss,
        "rows_needed": choice.rows_needed(case, points[0], chosen),
        "canary_limit": case.p.canary_limit,
        "canary_check": rounds.canary_best(case).asr,
        **_trainings(case),
        "points": [{k: at[k] for k in at if k != "marks"} for at in points],
        "base": {"performance": score(base["clean"]), "canary": asr(base)},
        "canary_triggers": canary.triggers(case.labels, case.p, case.chat),
        "samples": samples(case, chosen),
        "costs": costs,
        "evidence": _evidence(case, chosen),
    }
