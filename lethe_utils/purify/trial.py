"""What a purification will take, measured in advance: a few real training steps and answers of the
suspect itself, on this machine, with the rows that were given."""

import gc
import shutil
import time
from collections.abc import Callable
from typing import NamedTuple

import pandas as pd
import torch
from torch.nn import Module
from transformers import PreTrainedTokenizerBase as Tokenizer

from lethe_utils import canary, guided, models, paths, train
from lethe_utils.models import inspect
from lethe_utils.purify import room, suspects
from lethe_utils.purify.ask import ask
from lethe_utils.purify.case import Case
from lethe_utils.purify.dilute import GUIDED
from lethe_utils.stages import Row, forget_peak_memory, peak_memory

TYPICAL = 2  # rounds of each training: one that is enough, and one that shows it
ANSWERED = 32  # rows
# Bytes of weights a second, in reading, writing and checking models: what a merge takes, and what a
# training takes beside its steps. Measured on a laptop's disk; a small part of the whole.
COPIED = 120e6


class Pace(NamedTuple):
    """What this machine needs for a case."""

    token: float  # seconds for a token of training
    question: float  # seconds for an answer
    memory: float  # bytes at the peak of a training, this program included


def estimate(case: Case) -> pd.DataFrame:
    """Memory, disk and time (GiB, minutes): a row each of what, needed, there.

    Raises:
        LetheError: too little memory or disk.
    """
    pace = measured_pace(case)
    name, there = room.check_memory(pace.memory, case.p)
    runs = paths.runs_dir()
    free = shutil.disk_usage(next(f for f in (runs, *runs.parents) if f.exists())).free
    disk, where = _disk(case), f"disk at {runs}"
    room.check(where, disk, free, "free some space or point LETHE_RUNS at a larger disk")
    table = [(f"{name} (GiB)", pace.memory / room.GIB, there / room.GIB)]
    table.append((f"{where} (GiB)", disk / room.GIB, free / room.GIB))
    for rounds in sorted({min(TYPICAL, case.p.max_rounds), case.p.max_rounds}):
        title = f"time (minutes), {rounds} rounds of each training"
        title += ", the most" if rounds == case.p.max_rounds else ", as is usual"
        table.append((title, minutes(case, pace, rounds), float("nan")))
    return pd.DataFrame(table, columns=["what", "needed, estimated", "there"]).round(1)


def _disk(case: Case) -> float:
    """Bytes, at most: suspect, base, a merge at a time and the result in their own dtype, and each
    round of each training in float32 (bfloat16 on a GPU)."""
    trainings = 2 + sum(fold != case.main for fold in case.folds)
    each = case.given["models"][0]["weights"] * (2 if case.p.device == "cuda" else 4)
    return 4 * inspect.weights_size(case.base) + trainings * case.p.max_rounds * each


def measured_pace(case: Case) -> Pace:
    """The pace of a trial: the suspect answers some held-out questions, and is trained for three
    steps, the first of them on the longest rows."""
    p = case.p
    room.check_memory(room.weights_bytes(case.given["models"][0]["weights"], p), p)
    models.quiet()
    forget_peak_memory()
    tokenizer = suspects.load_tokenizer(case.suspect, case.adapter)
    model, asked = suspects.load(case.suspect, case.adapter, p.device), case.held_out[:ANSWERED]
    ask(case, model, tokenizer, {"clean": asked[:1]}, progress="trying")  # the first is slow
    _, seconds = ask(case, model, tokenizer, {"clean": asked}, progress="trying")
    del model
    token = _token_seconds(case, tokenizer)
    gc.collect()
    memory = torch.cuda.max_memory_allocated() if p.device == "cuda" else peak_memory()
    # What is saved in the end is loaded beside what the training leaves.
    memory += room.weights_bytes(case.given["models"][0]["weights"], p)
    return Pace(token, seconds / len(asked), memory)


def _token_seconds(case: Case, tokenizer: Tokenizer) -> float:
    """Seconds for a token of training: the better of two steps on rows of usual length."""
    size = case.p.batch_size
    items = sorted(train.encode(case.train, tokenizer, case.p), key=lambda item: item["length"])
    middle = max(0, (len(items) - size) // 2)
    usual = train.collate(items[middle : middle + size], tokenizer)
    step = _stepper(case, train.lora_model(case.suspect, case.p))
    step(train.collate(items[-size:], tokenizer))
    return min(step(usual), step(usual)) / usual["input_ids"].numel()


def _stepper(case: Case, model: Module) -> Callable[[train.Inputs], float]:
    """A training step as train.fit makes it: called with a batch, it returns its seconds."""
    optimizer = torch.optim.AdamW(w for w in model.parameters() if w.requires_grad)
    if case.p.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    model.train()

    def step(batch: train.Inputs) -> float:
        start = time.perf_counter()
        inputs = {name: tensor.to(case.p.device) for name, tensor in batch.items()}
        labels = inputs.pop("labels")
        with models.arithmetic(case.p):
            loss = train.plain_loss(model, inputs, labels, 1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for a GPU
        return time.perf_counter() - start

    return step


def minutes(case: Case, pace: Pace, rounds: int) -> float:
    """The whole run's, where each training takes so many rounds."""
    p = case.p
    tokenizer = suspects.load_tokenizer(case.suspect, case.adapter)
    copied = room.weights_bytes(case.given["models"][0]["weights"], p) / COPIED

    def trained(rows: list[Row], epochs: int) -> float:
        tokens = sum(item["length"] for item in train.encode(rows, tokenizer, p))
        return tokens * epochs * pace.token + copied

    planted, _ = canary.plant(case.train, case.labels, p, case.chat)
    main = trained(case.train, p.clean_epochs) + trained(planted, p.canary_epochs)
    crossed = [fold for fold in case.folds if fold != case.main]
    # The round that shows that another one is enough is not trained for them.
    thirds = sum(trained(fold.train, p.clean_epochs) for fold in crossed)
    thirds *= rounds if rounds == p.max_rounds else rounds - 1
    kinds = canary.triggered(case.held_out, case.labels, p, case.chat).values()
    triggered, held_out = sum(map(len, kinds)), len(case.held_out)
    merges = len({*p.merge_methods} - {GUIDED}) * len({*p.strengths})
    every = sum(len(fold.held_out) for fold in case.folds) + triggered
    # Evidence makes a prompt two to three times as long.
    rest = (1 + 2.5) * (held_out + triggered) + rounds * len(case.kinds) * canary.CHECKED
    asked = ((merges + 2) * every + rest) * pace.question
    merged = merges * (len(case.folds) + 1) * copied
    searched = 0.0
    if GUIDED in p.merge_methods:
        judged = sum(map(len, guided.rows(case.stopping, case.labels, p).values()))
        searched = guided.MOST * (judged * pace.question + copied)
    return (rounds * main + thirds + asked + merged + searched) / 60
