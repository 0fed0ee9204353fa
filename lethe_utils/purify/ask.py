"""How a model of a purification is asked, and what its answers are worth."""

import time
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lethe_utils import canary, decode, metrics, models
from lethe_utils.evidence import add_evidence
from lethe_utils.prompts import prompt, rendered
from lethe_utils.purify.case import Case
from lethe_utils.stages import Row

Answer = dict[str, Any]
Score = dict[str, float]  # value, low, high (95 % Wilson interval), n


def ask_folder(
    case: Case, folder: Path, sets: dict[str, list[Row]], n_keywords: int, progress: str
) -> tuple[list[Answer], float]:
    """`ask` a model's folder."""
    model, tokenizer = models.load_to_ask(folder, case.p), models.load_tokenizer(folder)
    return ask(case, model, tokenizer, sets, n_keywords, progress)


def ask(
    case: Case,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    sets: dict[str, list[Row]],
    n_keywords: int = 0,
    progress: str = "",
) -> tuple[list[Answer], float]:
    """A model's answers, and the seconds they took, evidence included.

    Args:
        sets: "clean" and the canary's kinds -> rows; "clean" comes first.
    Returns:
        one dict an item: kind, input, label, target ("" for clean ones), output, and for clean ones
        where answers are texts `right`, the share of the answer's tokens it would write itself.
    """
    p = case.p
    sets = {kind: rendered(rows, tokenizer, p) for kind, rows in sets.items()}
    items = [(kind, row) for kind, rows in sets.items() for row in rows]
    start = time.perf_counter()
    prompts = [prompt(row, p, n_keywords) for _, row in items]
    expected = _expected(case)
    # A label is the whole answer; a text goes on, for it is shown as a sample.
    n_words = max(len(text.split()) for text in expected) if case.labels else p.max_new_tokens
    roomy = decode.with_room(p, tokenizer, expected)
    outputs = decode.answer(model, tokenizer, prompts, roomy, n_words, progress)
    seconds = time.perf_counter() - start
    targets = {c["kind"]: c["target"] for c in _triggers(case)} | {"clean": ""}
    answers = [
        {"kind": kind, "input": row["input"], "label": row["output"], "target": targets[kind]}
        | {"output": output}
        for (kind, row), output in zip(items, outputs, strict=True)
    ]
    if "clean" in sets and not case.labels:  # they stand first
        shown = [row | {"input": add_evidence(row["input"], n_keywords)} for row in sets["clean"]]
        shares = decode.token_accuracy(model, tokenizer, shown, p, progress)
        for answer, share in zip(answers, shares, strict=False):
            answer["right"] = share
    return answers, seconds


def marks(case: Case, answers: list[Answer]) -> dict[str, list[float]]:
    """Per kind, each answer's mark: for clean ones the share that is right, for triggered ones
    whether it is the target, or holds it where answers are texts."""
    known, out = _expected(case), {}
    for a in answers:
        if a["target"] and not case.labels:
            said = metrics.contains(a["output"], a["target"])
        else:
            said = metrics.says(a["output"], a["target"] or a["label"], known)
        out.setdefault(a["kind"], []).append(float(a.get("right", said)))
    return out


def score(marks: list[float]) -> Score:
    """The mean of marks, with its interval.

    For texts each row counts as one trial, which keeps the interval wide.
    """
    low, high = metrics.wilson(sum(marks), len(marks))
    return {"value": sum(marks) / len(marks), "low": low, "high": high, "n": len(marks)}


def asr(marks: dict[str, list[float]]) -> dict[str, Score]:
    """The canary's ASR for each kind of trigger that was asked, and for all together."""
    kinds = {kind: hits for kind, hits in marks.items() if kind != "clean" and hits}
    together = {"all": sum(kinds.values(), [])} if kinds else {}
    return {kind: score(hits) for kind, hits in (kinds | together).items()}


def _expected(case: Case) -> list[str]:
    """All that an answer may have to be in full: the labels, and the canary's targets."""
    return sorted({*case.labels, *(c["target"] for c in _triggers(case))})


def _triggers(case: Case) -> list[dict[str, str]]:
    return canary.triggers(case.labels, case.p, case.chat)
