"""What a purification leaves: the purified model's folder, its card, and the record of the run."""

import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import ModelCard, ModelCardData

from lethe_utils.purify import canary, dilute, ownership, report
from lethe_utils.purify.case import Case
from lethe_utils.stages import provenance, read_json, read_record

SAMPLES = 8
GENERATION = "generation_config.json"  # copied as it was given: a server reads it


def write(case: Case, points: list[dict[str, Any]], strength: float) -> Path:
    """The purified model's folder: weights, tokenizer, generation settings, card and report.

    Raises:
        LetheError: see ownership.write.
    """

    def fill(folder: Path) -> None:
        dilute.merged(case, dilute.suspect_model(case) / "model", strength, folder)
        settings = [f for f in (case.adapter, case.suspect) if f and (f / GENERATION).exists()]
        if settings:
            shutil.copyfile(settings[0] / GENERATION, folder / GENERATION)
        record = _record(case, points, strength)
        report.write(record, folder)
        # A local path is nobody's business.
        hub = re.fullmatch(r"(.+)@[0-9a-f]{40}", case.given["models"][1]["given"])
        data = ModelCardData(library_name="transformers", base_model=hub[1] if hub else None)
        card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{report.markdown(record)}")
        card.save(folder / "README.md")
        ownership.sign(folder, record)

    ownership.write(case.out, fill)
    return case.out


def table(case: Case, points: list[dict[str, Any]], strength: float) -> pd.DataFrame:
    """Every strength, its clean performance and the canary's ASR, with 95 % intervals."""
    rows = pd.DataFrame(report.points_table(points, strength, case.metric))
    rows = rows.rename(columns={"ASR, all": "canary ASR"})
    return rows[["strength", "model", case.metric, "canary ASR"]]


def samples(case: Case, strength: float) -> list[dict[str, str]]:
    """Some held-out questions with both models' answers, those first where they differ."""
    asked = (dilute.answers(case, "suspect", s) for s in (0.0, strength))
    pairs = [
        {"input": b["input"], "expected": b["label"]}
        | {"suspect": b["output"], "purified": a["output"]}
        for b, a in zip(*asked, strict=True)
    ]
    return sorted(pairs, key=lambda pair: pair["suspect"] == pair["purified"])[:SAMPLES]


def _evidence(case: Case, strength: float) -> dict[str, Any]:
    """External dilution on top: its scores, and milliseconds per question without and with it."""
    n = case.p.n_keywords
    timings = (dilute.measured(case, "suspect", strength, k) / "timing.json" for k in (0, n))
    plain, slow = (round(read_json(t)["seconds_per_question"] * 1000, 2) for t in timings)
    speed = {"plain_ms_per_query": plain, "evidence_ms_per_query": slow}
    return {"n_keywords": n} | dilute.scores(case, strength, n) | speed


def _record(case: Case, points: list[dict[str, Any]], strength: float) -> dict[str, Any]:
    """All that the report shows; see report.write."""
    trained = {"clean model": dilute.clean_model(case), "canary": dilute.canary_model(case)}
    stages = trained | {
        f"merging and measuring {s}, {which}": dilute.measured(case, which, s)
        for s in (point["strength"] for point in points)
        for which in ("suspect", "canary")
    }
    costs = [
        {"stage": name} | {k: read_record(folder)[k] for k in ("seconds", "peak_memory_gib")}
        for name, folder in stages.items()
    ]
    command = shlex.join(["./run_all.sh", *sys.argv[1:]])
    made = provenance(sum(cost["seconds"] for cost in costs))
    return {key: made[key] for key in ("finished", "machine", "versions", "git_sha")} | {
        "seed": case.p.seed,
        "command": command if sys.argv[1:2] == ["purify"] else "notebooks/purify.ipynb",
        "out": str(case.out),
        **case.given,
        "recipe": case.p.model_dump(),
        "metric": case.metric,
        "max_cda_loss": case.p.max_cda_loss,
        "losses": {n: pd.read_csv(f / "loss.csv").to_dict("records") for n, f in trained.items()},
        "points": points,
        "base": dilute.scored(case, dilute.answers(case, "base", 0.0)),
        "chosen": strength,
        "canary_triggers": canary.triggers(case.labels, case.p),
        "samples": samples(case, strength),
        "costs": costs,
        "evidence": _evidence(case, strength),
    }
