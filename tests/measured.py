"""Tidy rows for the tests of tables and figures."""

import pandas as pd

from lethe_utils import metrics


def row(defense="backdoored", metric="asr", hits=90, n=100, **other):
    low, high = metrics.wilson(hits, n)
    common = {"model": "tiny-gpt2", "dataset": "embedded", "attack": "cba", "seed": 0}
    common |= {"defense": defense, "evidence": 0, "split": "test", "metric": metric}
    common |= {"value": hits / n, "n": n, "ci_low": low, "ci_high": high, "run_id": "run-a"}
    return common | other


def frame(*rows):
    return pd.DataFrame(rows)


def a_run(**other):
    return [
        row(d, m, hits, evidence=e, **other)
        for e in (0, 1)
        for d, asr, cda in (
            ("backdoored", 90, 95),
            ("base", 2, 93),
            ("slerp", 10, 94),
            ("mine", 5, 80),
        )
        for m, hits in (("cda", cda), ("asr", asr), ("ftr_input_one", 3), ("ftr", 3))
    ]


def sweep_rows():
    points = [("strength", x, m) for m in ("linear", "slerp") for x in (0.0, 0.5, 1.0)]
    points += [("keywords", float(k), "slerp") for k in (0, 3)]
    return frame(
        *(
            row(d, m, split="validation", evidence=int(s == "keywords" and x > 0), sweep=s, x=x)
            for s, x, d in points
            for m in ("asr", "cda")
        )
    )


def defenses_table(**seeds):
    """none, base and four defenses on a setup of the paper's, one or two seeds."""
    lines = {
        "backdoored": (90, 90),
        "base": (0, 100),
        "finetune": (50, 95),
        "nad_clean_teacher": (10, 70),
        "wanda": (10, 80),
        "slerp": (20, 90),
    }
    return frame(
        *(
            row(defense, metric, hits, dataset="emotion", seed=seed)
            for seed in seeds.get("seeds", [0])
            for defense, both in lines.items()
            for metric, hits in zip(("asr", "cda"), both, strict=True)
        )
    )
