"""The trainings of a purification: rounds, until rows of their own say that it is enough.

How long to train depends on the model, the rate and the rows, and nobody knows it beforehand: a
clean model that learned too little, or a canary that never took, made the first trial worthless. A
round is a training with the recipe's whole schedule that starts from the round before, and a stage,
so that a killed run loses no finished one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from lethe_utils import canary, decode, models, train
from lethe_utils.groups import AnswerParams, PromptParams, TrainParams
from lethe_utils.purify.ask import Score, ask_folder, asr, marks
from lethe_utils.purify.case import Case, Fold
from lethe_utils.purify.dilute import base_model, suspect_model
from lethe_utils.schema import digest
from lethe_utils.stages import Row, read_json, stage, write_json, write_jsonl

LESS = 0.02  # the least share by which a round must lower the loss for another one to follow


class CleanRound(NamedTuple):
    """One round of the clean model."""

    folder: Path
    loss: float  # nats per token on the stopping rows


class CanaryRound(NamedTuple):
    """One round of the canary."""

    folder: Path
    asr: dict[str, Score]  # by kind, on rows that it was not planted in; see canary.check_rows


def clean_rounds(case: Case) -> list[CleanRound]:
    """The rounds of the clean model: the base, LoRA-trained on the training rows until the loss on
    the stopping rows falls no more."""
    found: list[CleanRound] = []
    while len(found) < case.p.max_rounds:
        folder = _clean_round(case, case.main, found[-1].folder if found else base_model(case))
        best = min((one.loss for one in found), default=None)
        found.append(CleanRound(folder, _stopping_loss(case, folder)))
        if best is not None and found[-1].loss > best * (1 - LESS):
            break
    return found


def clean_model(case: Case, fold: Fold | None = None) -> Path:
    """Lethe's clean model: the best round; see clean_folders."""
    return clean_folders(case, fold or case.main)[-1]


def clean_folders(case: Case, fold: Fold) -> list[Path]:
    """A fold's clean model after each round. Only the main one has stopping rows; the others are
    trained for as many rounds as that was best after."""
    found = clean_rounds(case)
    best = min(range(len(found)), key=lambda i: found[i].loss)
    if fold == case.main:
        return [one.folder for one in found[: best + 1]]
    folders: list[Path] = []
    for _ in range(best + 1):
        folders.append(_clean_round(case, fold, folders[-1] if folders else base_model(case)))
    return folders


def _clean_round(case: Case, fold: Fold, start: Path) -> Path:
    def build(out: Path) -> None:
        train.finetune(start / "model", fold.train, case.p.clean_epochs, out, case.p)

    made_of = trained_by(case, fold.train, case.p.clean_epochs)
    return stage("clean_model", case.base.name, made_of, {"start": start}, build)


def trained_by(case: Case, rows: list[Row], epochs: int) -> dict[str, Any]:
    """What decides a trained model, besides the one it starts from."""
    # The rows themselves, not their file: a chat template may write today's date into them.
    known = case.p.part(TrainParams, PromptParams) | {"bfloat16": models.bfloat16(case.p)}
    return known | {"data_seed": case.p.data_seed, "epochs": epochs, "rows": digest(rows)}


def _stopping_loss(case: Case, folder: Path) -> float:
    def build(out: Path) -> None:
        model = models.load_to_ask(folder / "model", case.p)
        tokenizer = models.load_tokenizer(folder / "model")
        loss = decode.mean_loss(model, tokenizer, case.stopping, case.p)
        write_json(out / "loss.json", {"nats_per_token": loss})

    made_of = asked_by(case) | {"rows": digest(case.stopping)}
    judged = stage("stopping", case.base.name, made_of, {"model": folder}, build)
    return read_json(judged / "loss.json")["nats_per_token"]


def canary_rounds(case: Case) -> list[CanaryRound]:
    """The rounds of a copy of the suspect with our own backdoors in it (poisoned.jsonl beside the
    model), until each kind took."""
    found: list[CanaryRound] = []
    while len(found) < case.p.max_rounds:
        folder = _canary_round(case, found[-1].folder if found else suspect_model(case))
        found.append(CanaryRound(folder, _check(case, folder)))
        if len(took(found[-1].asr, case.kinds)) == len(case.kinds):
            break
    return found


def canary_best(case: Case) -> CanaryRound:
    """The canary's round whose weakest kind is strongest."""

    def weakest(one: CanaryRound) -> float:
        return min(one.asr[kind]["value"] for kind in case.kinds)

    return max(canary_rounds(case), key=weakest)


def canary_model(case: Case) -> Path:
    """The copy of the suspect with the canary in it; see canary_rounds."""
    return canary_best(case).folder


def took(found: dict[str, Score], kinds: Sequence[str]) -> list[str]:
    """Those of a canary's kinds that took."""
    return [kind for kind in kinds if found[kind]["value"] >= canary.TAKEN]


def _canary_round(case: Case, start: Path) -> Path:
    rows, _ = canary.plant(case.train, case.labels, case.p, case.chat)

    def build(out: Path) -> None:
        write_jsonl(out / "poisoned.jsonl", rows)
        train.finetune(start / "model", rows, case.p.canary_epochs, out, case.p)

    made_of = trained_by(case, rows, case.p.canary_epochs)
    return stage("canary", case.suspect.name, made_of, {"start": start}, build)


def _check(case: Case, folder: Path) -> dict[str, Score]:
    """A canary's ASR by kind on rows that it was not planted in, before anything is merged."""
    sets = canary.check_rows(case.train, case.stopping, case.labels, case.p, case.chat)

    def build(out: Path) -> None:
        answers, _ = ask_folder(case, folder / "model", sets, 0, "checking the canary")
        write_json(out / "asr.json", asr(marks(case, answers)))

    made_of = asked_by(case) | {"sets": digest(sets)}
    judged = stage("canary_check", case.suspect.name, made_of, {"model": folder}, build)
    return read_json(judged / "asr.json")


def asked_by(case: Case) -> dict[str, Any]:
    """What decides an answer, besides the model and the rows."""
    known = case.p.part(AnswerParams, PromptParams) | {"seed": case.p.seed}
    known |= {"device": case.p.device, "bfloat16": models.bfloat16(case.p)}
    targets = canary.triggers(case.labels, case.p, case.chat)
    return known | {"targets": targets, "labels": case.labels}


def loss_curve(rounds: list[CleanRound] | list[CanaryRound]) -> pd.DataFrame:
    """The training loss over all rounds: step, epoch, loss (nats per token)."""
    curves, ends = [], {"step": 0, "epoch": 0.0}
    for one in rounds:
        curve = pd.read_csv(one.folder / "loss.csv")
        curves.append(curve.assign(**{key: curve[key] + end for key, end in ends.items()}))
        ends = {key: curves[-1][key].iloc[-1] for key in ends}
    return pd.concat(curves, ignore_index=True)
