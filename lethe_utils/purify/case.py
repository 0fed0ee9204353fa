"""What was given: checked, split and estimated before anything is trained or written."""

import hashlib
import random
import shutil
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from lethe_utils import models, paths, train
from lethe_utils.data import own
from lethe_utils.errors import LetheError
from lethe_utils.evidence import without_evidence
from lethe_utils.models import inspect
from lethe_utils.purify import canary, ownership, settings, suspects
from lethe_utils.purify.settings import PurifyParams
from lethe_utils.stages import Row

PASSES = 3  # forward, backward to the activations, and that again under checkpointing
USED = 0.3  # of the rate of a matrix product, in training


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
    given: dict[str, Any]  # models, data, notes and checks, as the report shows them

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
    folders = suspects.locate(suspect, "--suspect"), suspects.locate(base, "--base")
    adapter_folder = paths.expanded(adapter) if adapter else None
    if folders[0] == folders[1] and not adapter:
        raise LetheError(f"--suspect {suspect}: is the base itself; give the model trained from it")
    target, file = paths.expanded(out), paths.expanded(clean_data)
    ownership.check(target, [*folders, *([adapter_folder] if adapter_folder else [])])
    checks = suspects.check(*folders, adapter_folder)
    tokenizer = suspects.load_tokenizer(folders[0], adapter_folder)
    rows, n_rows, chat, unread = own.read(file, tokenizer)
    given = {
        "models": [
            suspects.summary("suspect", suspect, folders[0], adapter),
            suspects.summary("base", base, folders[1]),
        ],
        "checks": checks,
    }
    p = _params(given["models"][0]["weights"], chat, overrides or {}, file)
    labels, (taught, held_out) = own.labels(rows), split(rows, p)
    given["data"] = {
        "file": str(file),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "rows": n_rows,
        "distinct": len(rows),
        "train": len(taught),
        "held_out": len(held_out),
        "format": "chat" if chat else "instruction, input, output",
        "answers": "labels" if labels else "texts",
    } | _lengths(rows, tokenizer, p)
    given["notes"] = _notes(given["data"], rows, unread)
    return Case(*folders, adapter_folder, target, taught, held_out, labels, p, given)


def _params(weights: int, chat: bool, overrides: dict[str, Any], file: Path) -> PurifyParams:
    device = models.resolve_device(overrides.get("device", "auto"))
    p = settings.load(weights, device, overrides | ({"prompt_template": "chat"} if chat else {}))
    if p.prompt_template == "chat" and not chat:
        raise LetheError(f"prompt_template: chat is for rows of messages, which {file} has not")
    return p


def split(rows: list[Row], p: PurifyParams) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows; no question of one is in the other."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["instruction"], row["input"]), []).append(row)
    questions = list(groups.values())
    random.Random(p.data_seed).shuffle(questions)
    cut = max(1, round(p.held_out * len(questions)))
    if cut == len(questions):
        raise LetheError(f"held_out: {p.held_out} leaves no row to train on; lower it")
    return [*chain(*questions[cut:])], [*chain(*questions[:cut])]


def _lengths(rows: list[Row], tokenizer: Tokenizer, p: PurifyParams) -> dict[str, int]:
    """The rows' tokens, and how many rows are too long; refused where most of them are."""
    items = train.encode(rows, tokenizer, p)
    train.check_cut(items)
    cut = train.cut_counts(items)
    tokens = {"tokens": sum(item["length"] for item in items)}
    return tokens | {f"{part}_cut": cut[f"{part} cut"] for part in ("prompts", "answers")}


def _notes(data: dict[str, Any], rows: list[Row], unread: list[str]) -> list[str]:
    """A line for what is cut, gets no evidence, or is not read at all."""
    lost = {
        "prompts": "lose their start (max_source_tokens)",
        "answers": "lose their end, and are taught without one (max_target_tokens)",
    }
    lines = [
        f"{data[f'{part}_cut']} of {len(rows)} {part} are too long and {loss}."
        for part, loss in lost.items()
        if data[f"{part}_cut"]
    ]
    foreign = without_evidence(row["input"] for row in rows)
    lines += [f"{foreign}."] if foreign else []
    return lines + ([f"Columns that are not read: {', '.join(unread)}."] if unread else [])


def estimate(case: Case) -> pd.DataFrame:
    """Memory, disk and time (GiB, minutes): a row each of what, needed, there.

    Raises:
        LetheError: too little memory or disk.
    """
    gpu = case.p.device == "cuda"
    n = case.given["models"][0]["weights"] / 2**30
    trained = n * (2 if gpu else 4)
    memory = n * 2.6 + 4 if gpu else 2 * trained + 1
    there = torch.cuda.mem_get_info()[0] if gpu else psutil.virtual_memory().available
    # Copies of suspect and base, two trained models, one merge at a time, and the result.
    disk = 4 * inspect.weights_size(case.base) / 2**30 + 2 * trained
    runs = paths.runs_dir()
    free = shutil.disk_usage(next(f for f in (runs, *runs.parents) if f.exists())).free
    name = "GPU memory" if gpu else "memory"
    table = []
    for what, needed, have, fix in (
        (name, memory, there, "close other programs or use a larger machine"),
        (f"disk at {runs}", disk, free, "free some space or point LETHE_RUNS at a larger disk"),
    ):
        table.append((f"{what} (GiB)", needed, have / 2**30))
        if needed > have / 2**30:
            raise LetheError(
                f"{what}: about {needed:.1f} GiB are needed and {have / 2**30:.1f} GiB are free; "
                f"{fix}"
            )
    table.append(("time (minutes)", _minutes(case), float("nan")))
    return pd.DataFrame(table, columns=["what", "needed, estimated", "there"]).round(1)


def _minutes(case: Case) -> float:
    """The trainings' minutes: their operations over what this machine's matrix product reaches."""
    p, data = case.p, case.given["data"]
    tokens = data["tokens"] * data["train"] / data["distinct"]
    planted = tokens * (1 + len(canary.KINDS) * p.canary_share)
    seen = tokens * p.clean_epochs + planted * p.canary_epochs
    square = torch.ones(1024, 1024, device=p.device)
    square @ square
    start = time.perf_counter()
    for _ in range(5):
        product = square @ square
    product.sum().item()  # waits for a GPU
    rate = 5 * 2 * 1024**3 / (time.perf_counter() - start)
    return 2 * PASSES * case.given["models"][0]["weights"] * seen / (rate * USED) / 60
