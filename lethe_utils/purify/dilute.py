"""Dilution, measured: a purification's models and what they answer, each a stage, so that a killed
run goes on where it stopped.

The same recipe as in the paper: a clean LoRA model of the same base is merged with the suspect. The
strength is chosen on held-out clean rows; what it does to a backdoor is measured on a canary.
"""

import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from lethe_utils import decode, merge, metrics, models, train, wordnet
from lethe_utils.errors import LetheError
from lethe_utils.evidence import add_evidence
from lethe_utils.groups import digest
from lethe_utils.models import fit, inspect
from lethe_utils.progress import Bar
from lethe_utils.prompts import prompt
from lethe_utils.purify import canary, suspects
from lethe_utils.purify.case import Case, Row
from lethe_utils.stages import fresh, read_jsonl, stage, write_json, write_jsonl

Answer = dict[str, Any]
Score = dict[str, float]  # value, low, high (95 % Wilson interval), n
NEAR_ZERO = 0.05  # clean performance that leaves nothing to keep
MEASURING = {"strengths", "max_cda_loss", "merge_method", "n_keywords", "eval_batch_size"}


def spec(case: Case) -> dict[str, Any]:
    """What decides a trained model, besides the model it starts from."""
    # The rows themselves, not their file: a chat template may write today's date into them.
    rows = digest([case.train, case.held_out])
    return case.p.model_dump(exclude=MEASURING) | {"rows": rows}


def suspect_model(case: Case) -> Path:
    """The suspect as one whole model (model/), as transformers saves it: an adapter merged in, old
    names and stored masks gone, all in the dtype it came in."""
    suspect, adapter = case.suspect, case.adapter

    def build(out: Path) -> None:
        name = inspect.stored_dtype(suspect)
        stored = getattr(torch, name)
        model = _load(suspect, torch.float32 if adapter else stored)
        if adapter:
            with inspect.explained(adapter, "adapter"):
                model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
            if not all(torch.isfinite(weight.to(stored)).all() for weight in model.parameters()):
                raise LetheError(
                    f"{adapter}: put on {suspect}, it gives values that are not numbers in "
                    f"{name}; check its lora_alpha"
                )
        _save(model.to(stored), out)
        suspects.copy_tokenizer(suspect, adapter, out / "model")

    given = {"suspect": inspect.fingerprint(suspect)}
    given |= {"adapter": inspect.fingerprint(adapter)} if adapter else {}
    return stage("suspect", (adapter or suspect).name, given, {}, build)


def base_model(case: Case) -> Path:
    """The base (model/) with the suspect's tokenizer and as many rows in its embedding, so that all
    models have one shape: tokens that it lacks get the mean embedding, and rows that the suspect
    lacks, which stand for no token, are left out."""

    def build(out: Path) -> None:
        model = _load(case.base, getattr(torch, inspect.stored_dtype(case.base)))
        n, old = fit.embedding_rows(suspect), fit.embedding_rows(case.base)
        if n != old:
            model.resize_token_embeddings(n, mean_resizing=False)
        if n > old:
            for table in (model.get_input_embeddings(), model.get_output_embeddings()):
                for weights in table.parameters():
                    weights.data[old:] = weights.data[:old].mean(0)
        _save(model, out)
        inspect.copy_tokenizer(suspect, out / "model")

    suspect = suspect_model(case) / "model"
    given = {"base": inspect.fingerprint(case.base), "suspect": suspect.parent.name}
    return stage("suspect_base", case.base.name, given, {}, build)


def _load(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A model on the CPU. Which dtype it is stored in, its files say: see inspect.stored_dtype."""
    models.quiet()
    with inspect.explained(folder, "model"):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    models.forget_generation(model)
    model.config.output_attentions = model.config.output_hidden_states = False
    return model


def _save(model: PreTrainedModel, out: Path) -> None:
    model.save_pretrained(out / "model", safe_serialization=True, max_shard_size=models.SHARD)


def clean_model(case: Case) -> Path:
    """Lethe's clean model: the base, LoRA-trained on the training rows."""
    parent = base_model(case)

    def build(out: Path) -> None:
        train.finetune(parent / "model", case.train, case.p.clean_epochs, out, case.p)

    return stage("clean_model", case.base.name, spec(case), {"base": parent}, build)


def canary_model(case: Case) -> Path:
    """A copy of the suspect with our own backdoors in it; poisoned.jsonl beside it."""
    parent = suspect_model(case)

    def build(out: Path) -> None:
        rows = canary.poison(case.train, case.labels, case.p)
        write_jsonl(out / "poisoned.jsonl", rows)
        train.finetune(parent / "model", rows, case.p.canary_epochs, out, case.p)

    return stage("canary", case.suspect.name, spec(case), {"suspect": parent}, build)


def merged(case: Case, parent: Path, strength: float, out: Path) -> Path:
    """Merge model/ of the suspect, or of its copy with the canary, with the clean model, in the
    suspect's dtype."""
    clean, base = clean_model(case) / "model", base_model(case) / "model"
    dtype = inspect.stored_dtype(suspect_model(case) / "model")
    return merge.merge(case.p.merge_method, parent, clean, base, strength, out, out_dtype=dtype)


def suspect_performance(case: Case) -> Score:
    """The suspect's own clean performance, before anything is trained.

    Raises:
        LetheError: it is near zero, or no more than may be lost: every strength would keep it.
    """
    own = scored(case, answers(case, "suspect", 0.0))["performance"]
    least = max(NEAR_ZERO, case.p.max_cda_loss)
    if own["value"] <= least and case.p.max_cda_loss < 1:
        raise LetheError(
            f"the suspect's own {case.metric} is {own['value']:.3f} on {own['n']} held-out rows: "
            "there is nothing to keep. Give rows, and a prompt (-p prompt_template), of the task "
            "that it was trained for; --max-cda-loss 1 goes on all the same"
        )
    return own


def points(case: Case) -> list[dict[str, Any]]:
    """Every strength's strength, model and `scores`: 0 is the suspect (and its copy with the
    canary), 1 the clean model alone; both are controls. Raises: see suspect_performance."""
    suspect_performance(case)
    strengths = Bar([0.0, *sorted({*case.p.strengths}), 1.0], desc="measuring strengths")
    names = {0.0: "suspect", 1.0: "clean model"}
    return [
        {"strength": s, "model": names.get(s, case.p.merge_method)} | scores(case, s)
        for s in strengths
    ]


def choose(case: Case, measured_points: list[dict[str, Any]]) -> float:
    """The strongest dilution that keeps clean performance within max_cda_loss of the suspect's.

    Raises:
        LetheError: none does.
    """
    found = {point["strength"]: point["performance"]["value"] for point in measured_points}
    own, tried = found[0], {s: value for s, value in found.items() if 0 < s < 1}
    least = own - case.p.max_cda_loss - 1e-9  # .98 - .02 is a little more than .96
    kept = [strength for strength, value in tried.items() if value >= least]
    if kept:
        return max(kept)
    best = max(tried, key=tried.get)
    raise LetheError(
        f"no strength keeps {case.metric} within {case.p.max_cda_loss} of the suspect's {own:.3f}: "
        f"the best, {best}, has {tried[best]:.3f}. Give more clean rows, add weaker ones "
        "(-p strengths '[0.1, 0.25]'), or raise --max-cda-loss; what was trained is kept"
    )


def scores(case: Case, strength: float, n_keywords: int = 0) -> dict[str, Any]:
    """Clean performance and the canary's ASR at a strength; see scored."""
    asked = (answers(case, which, strength, n_keywords) for which in ("suspect", "canary"))
    return scored(case, sum(asked, []))


def scored(case: Case, answers: list[Answer]) -> dict[str, Any]:
    """Clean performance, and the canary's ASR (for each kind of trigger, and all).

    For texts each row counts as one trial, which keeps the interval wide.
    """
    known, hits = _expected(case), {}
    for a in answers:
        said = metrics.says(a["output"], a["target"] or a["label"], known)
        hits.setdefault(a["kind"], []).append(a.get("right", said))
    clean = hits.pop("clean")
    if hits:
        hits["all"] = sum(hits.values(), [])
    asr = {kind: _score(some) for kind, some in hits.items()}
    return {"performance": _score(clean), "canary": asr}


def answers(case: Case, which: str, strength: float, n_keywords: int = 0) -> list[Answer]:
    """What a diluted model answers; see measured and ask."""
    return read_jsonl(measured(case, which, strength, n_keywords) / "answers.jsonl")


def measured(case: Case, which: str, strength: float, n_keywords: int = 0) -> Path:
    """The answers at one strength (answers.jsonl) and the seconds a question took (timing.json).

    Args:
        which: "suspect", which gets the held-out rows; "canary", its copy that gets them triggered;
            or "base", which gets both.
        strength: 0 is the model itself, 1 the clean model alone.
    """
    triggered = canary.triggered(case.held_out, case.labels, case.p)
    parent, sets = {
        "suspect": (suspect_model, {"clean": case.held_out}),
        "canary": (canary_model, triggered),
        "base": (base_model, {"clean": case.held_out} | triggered),
    }[which]

    def build(out: Path) -> None:
        scratch = out / "merged"
        fresh(scratch)
        folder = inputs[which if strength < 1 else "clean"] / "model"
        if 0 < strength < 1:
            folder = merged(case, folder, strength, scratch)
        found, seconds = ask(case, folder, sets, n_keywords, f"{which} at {strength}")
        fresh(scratch)  # at full size each is gigabytes
        write_json(out / "timing.json", {"seconds_per_question": seconds / max(1, len(found))})
        write_jsonl(out / "answers.jsonl", found)

    inputs = {which: parent(case)} | ({"clean": clean_model(case)} if strength else {})
    made_of = spec(case) | {"strength": strength, "method": case.p.merge_method}
    made_of |= {"n_keywords": n_keywords, "batch": case.p.eval_batch_size}
    made_of |= {"wordnet": wordnet.fingerprint()} if n_keywords else {}
    return stage("measured", f"{case.suspect.name}-{which}-{strength}", made_of, inputs, build)


def ask(
    case: Case, folder: Path, sets: dict[str, list[Row]], n_keywords: int, progress: str
) -> tuple[list[Answer], float]:
    """A model's answers, and the seconds they took, evidence included.

    Returns:
        one dict an item: kind, input, label, target ("" for clean ones), output, and for clean ones
        where answers are texts `right`, the share of the answer's tokens it would write itself.
    """
    p = case.p
    model, tokenizer = models.load_model(folder, p.device), models.load_tokenizer(folder)
    items = [(kind, row) for kind, rows in sets.items() for row in rows]
    start = time.perf_counter()
    prompts = [prompt(row, p, n_keywords) for _, row in items]
    expected = _expected(case)
    # A label is the whole answer; a text goes on, for it is shown as a sample.
    n_words = max(len(text.split()) for text in expected) if case.labels else p.max_new_tokens
    roomy = decode.with_room(p, tokenizer, expected)
    outputs = decode.answer(model, tokenizer, prompts, roomy, n_words, progress)
    seconds = time.perf_counter() - start
    targets = {c["kind"]: c["target"] for c in canary.triggers(case.labels, p)} | {"clean": ""}
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


def _expected(case: Case) -> list[str]:
    """All that an answer may have to be in full: the labels, and the canary's targets."""
    return sorted({*case.labels, *(c["target"] for c in canary.triggers(case.labels, case.p))})


def _score(hits: list[float]) -> Score:
    low, high = metrics.wilson(sum(hits), len(hits))
    return {"value": sum(hits) / len(hits), "low": low, "high": high, "n": len(hits)}
