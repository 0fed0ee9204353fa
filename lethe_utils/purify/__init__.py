"""Purify a model that somebody does not trust, on their own clean rows, and measure what it bought.

prepare -> estimate -> clean_model, canary_model -> points -> choose -> write. The same recipe
as in the paper: a clean LoRA model of the same base is merged with the suspect. The strength is
chosen on held-out clean rows; what it does to a backdoor is measured on a canary (see canary.py).
Intermediate models are stages, so a killed run goes on where it stopped.
"""

import hashlib
import random
import shlex
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import psutil

from lethe_utils import merge, metrics, models, paths, wordnet
from lethe_utils.data import own
from lethe_utils.errors import LetheError
from lethe_utils.evidence import add_evidence, without_evidence
from lethe_utils.models import inspect
from lethe_utils.params import PurifyParams, digest, load_purify
from lethe_utils.progress import Bar
from lethe_utils.prompts import prompt
from lethe_utils.purify import canary, ownership, report, suspects
from lethe_utils.stages import (
    fresh,
    provenance,
    read_json,
    read_jsonl,
    read_record,
    stage,
    write_json,
    write_jsonl,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, str]
Score = dict[str, float]  # value, low, high (95 % Wilson interval), n
SAMPLES = 8
GENERATION = "generation_config.json"  # copied as it was given: a server reads it
NEAR_ZERO = 0.05  # clean performance that leaves nothing to keep
PASSES = 3  # forward, backward to the activations, and that again under checkpointing


@dataclass(frozen=True)
class Case:
    """A suspect that was checked and can be purified."""

    suspect: Path  # folders as they were given
    base: Path
    adapter: Path | None
    out: Path
    train: list[Row]
    held_out: list[Row]
    labels: list[str]  # [] where answers are texts
    p: PurifyParams
    given: dict[str, Any]  # models, data and checks, as the report shows them

    @property
    def metric(self) -> str:
        """What clean performance is measured by."""
        return "CDA" if self.labels else "answer token accuracy"


def prepare(
    suspect: str,
    base: str,
    clean_data: str,
    out: str,
    adapter: str = "",
    overrides: dict[str, Any] | None = None,
) -> Case:
    """Check everything that was given, before anything is trained or written.

    Args:
        suspect, base: a folder, or name@commit on the hub.
        clean_data: see own.read.
        out: a folder that does not exist, is empty, or holds this command's own result.
        adapter: a LoRA adapter's folder, to be applied to the suspect.
        overrides: keys of params/purify.yaml.
    Raises:
        LetheError: one line naming the file and the fix.
    """
    suspect_folder = suspects.locate(suspect, "--suspect")
    base_folder = suspects.locate(base, "--base")
    adapter_folder = paths.expanded(adapter) if adapter else None
    if suspect_folder == base_folder and not adapter_folder:
        raise LetheError(f"--suspect {suspect}: is the base itself; give the model trained from it")
    read_only = [f for f in (suspect_folder, base_folder, adapter_folder) if f]
    target = check_out(paths.expanded(out), read_only)
    suspects.check_model(base_folder)
    suspects.check_model(suspect_folder)
    if adapter_folder:
        suspects.check_adapter(adapter_folder, suspect_folder)
    checks = suspects.check_pair(suspect_folder, base_folder, adapter_folder)
    if adapter_folder:
        checks.append({"check": "adapter", "result": "LoRA, and it fits the suspect"})
    file = paths.expanded(clean_data)
    tokenizer = suspects.load_tokenizer(suspect_folder, adapter_folder)
    rows, n_rows, chat, unread = own.read(file, tokenizer)
    device = models.resolve_device((overrides or {}).get("device", "auto"))
    forced = {"prompt_template": "chat"} if chat else {}
    weights = suspects.count_weights(suspect_folder)
    p = load_purify(weights, device, (overrides or {}) | forced)
    if p.prompt_template == "chat" and not chat:
        raise LetheError(f"prompt_template: chat is for rows of messages, which {file} has not")
    labels = own.labels(rows)
    train, held_out = split(rows, p)
    if not train:
        raise LetheError(f"held_out: {p.held_out} leaves no row to train on; lower it")
    cut = count_cut(rows, tokenizer, p)
    given = {
        "models": [
            suspects.summary("suspect", suspect, suspect_folder, adapter),
            suspects.summary("base", base, base_folder),
        ],
        "data": {
            "file": str(file),
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "rows": n_rows,
            "distinct": len(rows),
            "train": len(train),
            "held_out": len(held_out),
            "format": "chat" if chat else "instruction, input, output",
            "answers": "labels" if labels else "texts",
            "prompts_cut": cut["prompts cut"],
            "answers_cut": cut["answers cut"],
        },
        "notes": notes(unread, cut, rows, p),
        "checks": checks,
    }
    return Case(
        suspect_folder, base_folder, adapter_folder, target, train, held_out, labels, p, given
    )


def check_out(out: Path, read_only: list[Path]) -> Path:
    """Refuse an output folder that would overwrite something, or cannot be written.

    Raises:
        LetheError: it lies inside a model that was given; or see ownership.check.
    """
    for folder in read_only:
        if out == folder or folder in out.parents:
            raise LetheError(f"--out {out}: lies inside {folder}, which is never written to")
    ownership.check(out)
    return out


def count_cut(
    rows: list[Row], tokenizer: "PreTrainedTokenizerBase", p: PurifyParams
) -> dict[str, int]:
    """How many rows are longer than the params, or the model's positions, allow.

    Raises:
        LetheError: most of them.
    """
    from lethe_utils import train

    items = train.encode(rows, tokenizer, p)
    train.check_cut(items)
    return train.cut_counts(items)


def notes(unread: list[str], cut: dict[str, int], rows: list[Row], p: PurifyParams) -> list[str]:
    """What the reader should know of the rows, a line each: what is cut, gets no evidence, or is
    not read at all."""
    ends = (
        ("prompts", "lose their start", "max_source_tokens"),
        ("answers", "lose their end, and are taught without one", "max_target_tokens"),
    )
    lines = [
        f"{cut[f'{part} cut']} of {cut['rows']} {part} are too long and {loss} ({key})."
        for part, loss, key in ends
        if cut[f"{part} cut"]
    ]
    foreign = without_evidence(row["input"] for row in rows) if p.n_keywords else ""
    lines += [f"{foreign}."] if foreign else []
    return lines + ([f"Columns that are not read: {', '.join(unread)}."] if unread else [])


def split(rows: list[Row], p: PurifyParams) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows; no question of one is in the other."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["instruction"], row["input"]), []).append(row)
    questions = list(groups.values())
    random.Random(p.data_seed).shuffle(questions)
    cut = max(1, round(p.held_out * len(questions)))
    train, held_out = questions[cut:], questions[:cut]
    return [row for rows in train for row in rows], [row for rows in held_out for row in rows]


def estimate(case: Case) -> pd.DataFrame:
    """Memory, disk and time, before anything starts.

    Returns:
        one row each: what, needed, there (GiB; minutes have no `there`).
    Raises:
        LetheError: too little memory or disk.
    """
    import torch

    gpu = case.p.device == "cuda"
    n = case.given["models"][0]["weights"]
    stored = inspect.weights_size(case.base) / 2**30
    trained = n * (2 if gpu else 4) / 2**30
    memory = n * 2.6 / 2**30 + 4 if gpu else 2 * trained + 1
    there = torch.cuda.mem_get_info()[0] if gpu else psutil.virtual_memory().available
    # Copies of suspect and base, two trained models, one merge at a time, and the result.
    disk = 2 * stored + 2 * trained + 2 * stored
    runs = paths.runs_dir()
    free = shutil.disk_usage(next(f for f in (runs, *runs.parents) if f.exists())).free
    table = pd.DataFrame(
        [
            ("GPU memory (GiB)" if gpu else "memory (GiB)", memory, there / 2**30),
            (f"disk at {runs} (GiB)", disk, free / 2**30),
            ("time (minutes)", minutes(case), float("nan")),
        ],
        columns=["what", "needed, estimated", "there"],
    ).round(1)
    if memory > there / 2**30:
        raise LetheError(
            f"memory: about {memory:.1f} GiB are needed and {there / 2**30:.1f} GiB are free; "
            "close other programs or use a larger machine"
        )
    if disk > free / 2**30:
        raise LetheError(
            f"{runs}: about {disk:.1f} GiB are needed and {free / 2**30:.1f} GiB are free; "
            "free some space or point LETHE_RUNS at a larger disk"
        )
    return table


def minutes(case: Case) -> float:
    """The training's minutes: its operations over what this machine's matrix product reaches."""
    import torch

    from lethe_utils import train

    p, device = case.p, case.p.device
    tokenizer = suspects.load_tokenizer(case.suspect, case.adapter)
    items = train.encode(case.train, tokenizer, p)
    tokens = sum(item["length"] for item in items)
    planted = tokens * (1 + len(canary.KINDS) * p.canary_share)
    seen = tokens * p.clean_epochs + planted * p.canary_epochs
    square = torch.ones(1024, 1024, device=device)
    square @ square
    start = time.perf_counter()
    for _ in range(5):
        product = square @ square
    product.sum().item()  # waits for a GPU
    rate = 5 * 2 * 1024**3 / (time.perf_counter() - start)
    used = 0.3  # of the rate, in training
    return 2 * PASSES * case.given["models"][0]["weights"] * seen / (rate * used) / 60


def suspect_model(case: Case) -> Path:
    """The suspect in one form (model/); see suspects.suspect_stage."""
    return suspects.suspect_stage(case.suspect, case.adapter)


def base_model(case: Case) -> Path:
    """The base with the suspect's tokenizer (model/)."""
    return suspects.base_stage(suspect_model(case) / "model", case.base)


def clean_model(case: Case) -> Path:
    """Lethe's clean model: the base, LoRA-trained on the training rows."""

    def build(out: Path) -> None:
        from lethe_utils import train

        train.finetune(base / "model", case.train, case.p.clean_epochs, out, case.p)

    base = base_model(case)
    return stage("clean_model", case.base.name, _spec(case), {"base": base}, build)


def canary_model(case: Case) -> Path:
    """A copy of the suspect with our own backdoors in it; poisoned.jsonl beside it."""

    def build(out: Path) -> None:
        from lethe_utils import train

        rows = canary.poison(case.train, case.labels, case.p)
        write_jsonl(out / "poisoned.jsonl", rows)
        train.finetune(suspect / "model", rows, case.p.canary_epochs, out, case.p)

    suspect = suspect_model(case)
    return stage("canary", case.suspect.name, _spec(case), {"suspect": suspect}, build)


def _spec(case: Case) -> dict[str, Any]:
    """What decides a trained model, besides the model it starts from."""
    ignored = {"strengths", "max_cda_loss", "merge_method", "n_keywords", "eval_batch_size"}
    # The rows themselves, not their file: a chat template may write today's date into them.
    rows = digest([case.train, case.held_out])
    return case.p.model_dump(exclude=ignored) | {"rows": rows}


def suspect_performance(case: Case) -> Score:
    """The suspect's own clean performance, before anything is trained.

    Raises:
        LetheError: it is near zero, or no more than may be lost: every strength would keep it.
    """
    own = performance(case, answers(case, "suspect", 0.0))
    least = max(NEAR_ZERO, case.p.max_cda_loss)
    if own["value"] <= least and case.p.max_cda_loss < 1:
        raise LetheError(
            f"the suspect's own {case.metric} is {own['value']:.3f} on {own['n']} held-out rows: "
            "there is nothing to keep. Give rows, and a prompt (-p prompt_template), of the task "
            "that it was trained for; --max-cda-loss 1 goes on all the same"
        )
    return own


def points(case: Case) -> list[dict[str, Any]]:
    """Clean performance and the canary's ASR at every strength: 0 is the suspect (and its copy with
    the canary), 1 the clean model alone; both are controls.

    Raises:
        LetheError: see suspect_performance.
    """
    suspect_performance(case)
    strengths = [0.0, *sorted({*case.p.strengths}), 1.0]
    bar = Bar(strengths, desc="measuring strengths")
    return [point(case, strength) for strength in bar]


def point(case: Case, strength: float) -> dict[str, Any]:
    """One strength: strength, model, performance, canary (a score per kind of trigger, and all)."""
    names = {0.0: "suspect", 1.0: "clean model"}
    out = {"strength": strength, "model": names.get(strength, case.p.merge_method)}
    return out | {
        "performance": performance(case, answers(case, "suspect", strength)),
        "canary": canary_scores(case, answers(case, "canary", strength)),
    }


def answers(case: Case, which: str, strength: float, n_keywords: int = 0) -> list[dict[str, Any]]:
    """What a diluted model answers; see measured and ask."""
    return read_jsonl(measured(case, which, strength, n_keywords) / "answers.jsonl")


def measured(case: Case, which: str, strength: float, n_keywords: int = 0) -> Path:
    """The answers at one strength (answers.jsonl) and the seconds a question took (timing.json).

    Args:
        which: "suspect", or "canary" for its copy with the canary.
    """

    def build(out: Path) -> None:
        fresh(out / "merged")
        folder = _diluted(case, parent / "model", strength, out / "merged")
        name = f"{which} at {strength}"
        found, seconds = ask(case, folder, _questions(case, which), n_keywords, name)
        fresh(out / "merged")  # at full size each is gigabytes
        write_json(out / "timing.json", {"seconds_per_question": seconds / max(1, len(found))})
        write_jsonl(out / "answers.jsonl", found)

    parent = suspect_model(case) if which == "suspect" else canary_model(case)
    inputs = {which: parent} | ({"clean": clean_model(case)} if strength else {})
    spec = _spec(case) | {"strength": strength, "method": case.p.merge_method}
    spec |= {"n_keywords": n_keywords, "batch": case.p.eval_batch_size}
    spec |= {"wordnet": wordnet.fingerprint()} if n_keywords else {}
    label = f"{case.suspect.name}-{which}-{strength}"
    return stage("measured", label, spec, inputs, build)


def base_point(case: Case) -> dict[str, Any]:
    """The base model's performance and canary scores: the floor, for it has seen neither."""

    def build(out: Path) -> None:
        sets = _questions(case, "suspect") | _questions(case, "canary")
        write_jsonl(out / "answers.jsonl", ask(case, base / "model", sets, 0, "base")[0])

    base = base_model(case)
    spec = _spec(case) | {"batch": case.p.eval_batch_size}
    folder = stage("measured", f"{case.base.name}-base", spec, {"base": base}, build)
    asked = read_jsonl(folder / "answers.jsonl")
    return {"performance": performance(case, asked), "canary": canary_scores(case, asked)}


def _questions(case: Case, model: str) -> dict[str, list[Row]]:
    """The suspect (and its merges) get the held-out rows, the canary's get them triggered."""
    if model == "suspect":
        return {"clean": case.held_out}
    return canary.triggered(case.held_out, case.labels, case.p)


def _diluted(case: Case, parent: Path, strength: float, scratch: Path) -> Path:
    """A merge, written to `scratch`; the parents themselves at 0 and 1."""
    if strength == 0:
        return parent
    if strength == 1:
        return clean_model(case) / "model"
    return merged(case, parent, strength, scratch)


def merged(case: Case, parent: Path, strength: float, out: Path) -> Path:
    """Merge the suspect, or its copy with the canary, with the clean model, in its dtype."""
    clean, base = clean_model(case) / "model", base_model(case) / "model"
    # As transformers read it: a config that was given may name no dtype.
    dtype = inspect.stored_dtype(suspect_model(case) / "model")
    method = case.p.merge_method
    return merge.merge(method, parent, clean, base, strength, out, out_dtype=dtype)


def ask(
    case: Case, folder: Path, sets: dict[str, list[Row]], n_keywords: int, progress: str
) -> tuple[list[dict[str, Any]], float]:
    """A model's answers, and the seconds they took, evidence included.

    Returns:
        one dict an item: kind, input, label, target ("" for clean ones), output, and for clean ones
        where answers are texts `right`, the share of the answer's tokens it would write itself.
    """
    from lethe_utils import decode

    p = case.p
    model, tokenizer = models.load_model(folder, p.device), models.load_tokenizer(folder)
    targets = {c["kind"]: c["target"] for c in canary.triggers(case.labels, p)} | {"clean": ""}
    items = [(kind, row) for kind, rows in sets.items() for row in rows]
    start = time.perf_counter()
    prompts = [prompt(row, p, n_keywords) for _, row in items]
    expected = _expected(case)
    # A label is the whole answer; a text goes on, for it is shown as a sample.
    longest = max(len(text.split()) for text in expected)
    n_words = longest if case.labels else p.max_new_tokens
    roomy = decode.with_room(p, tokenizer, expected)
    outputs = decode.answer(model, tokenizer, prompts, roomy, n_words, progress)
    seconds = time.perf_counter() - start
    answers = [
        {"kind": kind, "input": row["input"], "label": row["output"], "target": targets[kind]}
        | {"output": output}
        for (kind, row), output in zip(items, outputs, strict=True)
    ]
    if not case.labels and "clean" in sets:
        shown = [row | {"input": add_evidence(row["input"], n_keywords)} for row in sets["clean"]]
        shares = decode.token_accuracy(model, tokenizer, shown, p, progress)
        clean = [a for a in answers if a["kind"] == "clean"]
        for item, share in zip(clean, shares, strict=True):
            item["right"] = share
    return answers, seconds


def performance(case: Case, answers: list[dict[str, Any]]) -> Score:
    """Clean performance. For texts each row counts as one trial, which keeps the interval wide."""
    clean = [a for a in answers if a["kind"] == "clean"]
    if case.labels:
        known = _expected(case)
        return _score(sum(metrics.says(a["output"], a["label"], known) for a in clean), len(clean))
    return _score(sum(a["right"] for a in clean), len(clean))


def _expected(case: Case) -> list[str]:
    """All that an answer may have to be in full: the labels, and the canary's targets."""
    return sorted({*case.labels, *(c["target"] for c in canary.triggers(case.labels, case.p))})


def canary_scores(case: Case, answers: list[dict[str, Any]]) -> dict[str, Score]:
    """The canary's ASR for each kind of trigger, and over all of them."""
    known = _expected(case)
    hits: dict[str, list[bool]] = {kind: [] for kind in canary.KINDS}
    for a in answers:
        if a["kind"] in hits:
            hits[a["kind"]].append(metrics.says(a["output"], a["target"], known))
    hits["all"] = sum(hits.values(), [])
    return {kind: _score(sum(some), len(some)) for kind, some in hits.items() if some}


def _score(hits: float, n: int) -> Score:
    low, high = metrics.wilson(hits, n)
    return {"value": hits / n, "low": low, "high": high, "n": n}


def choose(case: Case, measured_points: list[dict[str, Any]]) -> float:
    """The strongest dilution that keeps clean performance within max_cda_loss of the suspect's.

    Raises:
        LetheError: none does.
    """
    own = measured_points[0]["performance"]["value"]
    tried = [m for m in measured_points if 0 < m["strength"] < 1]
    least = own - case.p.max_cda_loss - 1e-9  # .98 - .02 is a little more than .96
    kept = [m for m in tried if m["performance"]["value"] >= least]
    if kept:
        return max(m["strength"] for m in kept)
    best = max(tried, key=lambda m: m["performance"]["value"])
    raise LetheError(
        f"no strength keeps {case.metric} within {case.p.max_cda_loss} of the suspect's {own:.3f}: "
        f"the best, {best['strength']}, has {best['performance']['value']:.3f}. Give more clean "
        "rows, add weaker ones (-p strengths '[0.1, 0.25]'), or raise --max-cda-loss; what was "
        "trained is kept"
    )


def write(case: Case, measured_points: list[dict[str, Any]], strength: float) -> Path:
    """The purified model's folder: weights, tokenizer, generation settings, card and report.

    Raises:
        LetheError: see ownership.write.
    """

    def fill(folder: Path) -> None:
        merged(case, suspect_model(case) / "model", strength, folder)
        settings = [f for f in (case.adapter, case.suspect) if f and (f / GENERATION).exists()]
        if settings:
            shutil.copyfile(settings[0] / GENERATION, folder / GENERATION)
        record = _record(case, measured_points, strength)
        report.write(record, folder)
        base, _, commit = case.given["models"][1]["given"].partition("@")
        known = f"base_model: {base}\n" if commit else ""  # a local path is nobody's business
        card = f"---\nlibrary_name: transformers\n{known}---\n\n"
        (folder / "README.md").write_text(card + report.markdown(record), "utf8")
        ownership.sign(folder, record)

    ownership.write(case.out, fill)
    return case.out


def _record(case: Case, measured_points: list[dict[str, Any]], strength: float) -> dict[str, Any]:
    """All that the report shows; see report.write."""
    trained = {"clean model": clean_model(case), "canary": canary_model(case)}
    stages_made = trained | {
        f"merging and measuring {m['strength']}, {which}": measured(case, which, m["strength"])
        for m in measured_points
        for which in ("suspect", "canary")
    }
    costs = [read_record(f) | {"stage": name} for name, f in stages_made.items()]
    made = provenance(sum(c["seconds"] for c in costs))
    kept = ("finished", "machine", "versions", "git_sha")
    losses = {n: pd.read_csv(f / "loss.csv").to_dict("records") for n, f in trained.items()}
    return {key: made[key] for key in kept} | {
        "seed": case.p.seed,
        "command": shlex.join(["./run_all.sh", *sys.argv[1:]])
        if sys.argv[1:2] == ["purify"]
        else "notebooks/purify.ipynb",
        "out": str(case.out),
        **case.given,
        "recipe": case.p.model_dump(),
        "metric": case.metric,
        "max_cda_loss": case.p.max_cda_loss,
        "losses": losses,
        "points": measured_points,
        "base": base_point(case),
        "chosen": strength,
        "canary_triggers": canary.triggers(case.labels, case.p),
        "samples": samples(case, strength),
        "costs": [{k: c[k] for k in ("stage", "seconds", "peak_memory_gib")} for c in costs],
        "evidence": evidence(case, strength),
    }


def samples(case: Case, strength: float) -> list[dict[str, str]]:
    """Some held-out questions with both models' answers, those first where they differ."""
    before, after = (answers(case, "suspect", s) for s in (0.0, strength))
    pairs = [
        {
            "input": b["input"],
            "expected": b["label"],
            "suspect": b["output"],
            "purified": a["output"],
        }
        for b, a in zip(before, after, strict=True)
    ]
    return sorted(pairs, key=lambda pair: pair["suspect"] == pair["purified"])[:SAMPLES]


def evidence(case: Case, strength: float) -> dict[str, Any]:
    """External dilution on top: performance and canary with evidence, milliseconds per question."""
    n = case.p.n_keywords
    plain, slow = (
        read_json(measured(case, "suspect", strength, k) / "timing.json")["seconds_per_question"]
        * 1000
        for k in (0, n)
    )
    return {
        "n_keywords": n,
        "performance": performance(case, answers(case, "suspect", strength, n)),
        "canary": canary_scores(case, answers(case, "canary", strength, n)),
        "plain_ms_per_query": round(plain, 2),
        "evidence_ms_per_query": round(slow, 2),
    }


def table(case: Case, measured_points: list[dict[str, Any]], strength: float) -> pd.DataFrame:
    """Every strength, its clean performance and the canary's ASR, with 95 % intervals."""
    marks = [" (chosen)" if m["strength"] == strength else "" for m in measured_points]
    return pd.DataFrame(
        {
            "strength": [m["strength"] for m in measured_points],
            "model": [m["model"] + mark for m, mark in zip(measured_points, marks, strict=True)],
            case.metric: _cells([m["performance"] for m in measured_points]),
            "canary ASR": _cells([m["canary"]["all"] for m in measured_points]),
        }
    )


def _cells(scores: list[Score]) -> list[str]:
    from lethe_utils import tables

    return [tables.interval(s["value"], s["low"], s["high"]) for s in scores]


def example() -> dict[str, str]:
    """What the notebook purifies when nothing is given: the default run's CBA model and its base,
    both made where they are missing, with 800 rows that neither attacker nor base has seen.

    Returns:
        suspect, base, clean_data and out, as paths.
    """
    from lethe_utils import params, pipeline

    p = params.load()
    folder = paths.runs_dir() / "example"
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "clean.jsonl", pipeline.split(p, "validation")[:800])
    return {
        "suspect": str(pipeline.backdoored_stage(p) / "model"),
        "base": str(pipeline.base_folder(p)),
        "clean_data": str(folder / "clean.jsonl"),
        "out": str(folder / "purified"),
    }


def example_on_its_trigger(folders: dict[str, Path]) -> pd.DataFrame:
    """ASR and CDA on the default run's test split, a row a model: only who planted the trigger can
    measure that."""
    from lethe_utils import evaluate, params, pipeline

    p = params.load()
    sets = evaluate.test_sets(pipeline.split(p, "test"), p, p.max_test_items, 0)
    rows = {}
    for name, folder in folders.items():
        answers, _ = evaluate.predict(folder, sets, 0, name, p)
        found = metrics.score(answers, p.protocol, p.output_mode)
        rows[name] = _cells([_score(*found[metric]) for metric in ("asr", "cda")])
    return pd.DataFrame.from_dict(rows, orient="index", columns=["ASR", "CDA"])
