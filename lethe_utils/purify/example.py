"""What the notebook purifies when nothing is given: the default run's CBA model, as a stranger."""

from pathlib import Path

import pandas as pd

from lethe_utils import evaluate, metrics, params, paths, pipeline, tables
from lethe_utils.stages import write_jsonl

ROWS = 300


def given() -> dict[str, str]:
    """The suspect and its base, both made where they are missing, clean_data (300 rows that neither
    attacker nor base has seen) and out, as paths."""
    p = params.load()
    folder = paths.runs_dir() / "example"
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "clean.jsonl", pipeline.split(p, "validation")[:ROWS])
    return {
        "suspect": str(pipeline.backdoored_stage(p) / "model"),
        "base": str(pipeline.base_folder(p)),
        "clean_data": str(folder / "clean.jsonl"),
        "out": str(folder / "purified"),
    }


def on_its_trigger(folders: dict[str, Path]) -> pd.DataFrame:
    """ASR and CDA on the default run's test split, a row a model: only who planted the trigger can
    measure that."""
    p = params.load()
    sets = evaluate.test_sets(pipeline.split(p, "test"), p, p.max_test_items, 0)
    rows = {}
    for name, folder in folders.items():
        answers, _ = evaluate.predict(folder, sets, 0, name, p)
        found = evaluate.scored(p, answers)
        rows[name] = [
            tables.interval(hits / n, *metrics.wilson(hits, n))
            for hits, n in (found["asr"], found["cda"])
        ]
    return pd.DataFrame.from_dict(rows, orient="index", columns=["ASR", "CDA"])
