"""Utility: what a model can still do besides the task at hand, by lm-evaluation-harness.

`utility` in the params names the harness's multiple-choice tasks: mmlu, hellaswag, arc_easy and the
like, whose data are on the hub, and `wordnet_meaning`, which is made here and needs no network.
"""

import io
import logging
import random
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lethe_utils import metrics, models, paths, wordnet
from lethe_utils.errors import LetheError, reason
from lethe_utils.groups import TrainParams
from lethe_utils.stages import write_jsonl

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

OWN = "wordnet_meaning"
SHOTS = {"mmlu": 5}  # solved questions shown, as published; of other tasks what the harness says
KINDS, PER_KIND, CHOICES, SEED = ("noun", "verb", "adjective"), 80, 4, 42
BATCH = 8  # with solved questions they are long, and all their logits are kept


def write_questions(file: Path) -> None:
    """The questions of `wordnet_meaning`, as JSONL: kind, word, choices (definitions of words of
    one kind) and right (the place of the word's own). The same WordNet gives the same ones."""
    rng, rows = random.Random(SEED), []
    for kind in KINDS:
        known = wordnet.common_words(kind, PER_KIND, rng)
        for word, meaning in known.items():
            others = sorted({*known.values()} - {meaning})
            choices = [meaning, *rng.sample(others, CHOICES - 1)]
            rng.shuffle(choices)
            right = choices.index(meaning)
            rows.append({"kind": kind, "word": word, "choices": choices, "right": right})
    write_jsonl(file, rows)


def load(name: str, questions: Path) -> list[Any]:
    """A task as the harness's evaluator takes it: its parts (mmlu has 57), their data read, and
    fetched from the hub where they are not there yet.

    Args:
        questions: of write_questions.
    Raises:
        LetheError: the harness is not installed, has no such task, cannot read its data, or its
            answers are no choices.
    """
    manager = _manager(with_its_own=name != OWN)
    if name not in [OWN, *manager.all_tasks]:
        raise LetheError(
            f"utility: lm-evaluation-harness has no task {name!r}; `lm-eval ls tasks` lists those "
            f"it has, and {OWN} is made here"
        )
    try:
        with redirect_stderr(io.StringIO()):  # bars
            parts = manager.load(_own(questions) if name == OWN else name)["tasks"].values()
    except Exception as error:  # the hub's, or whatever a data set raises
        raise LetheError(f"utility: {name} cannot be loaded: {reason(error)}") from None
    if any(part.OUTPUT_TYPE != "multiple_choice" for part in parts):
        raise LetheError(f"utility: {name} is no multiple-choice task; leave it out")
    return [*parts]


def _manager(with_its_own: bool) -> "TaskManager":
    """The harness's register of tasks; its own are 14 000 files, which takes seconds to read."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise LetheError(
            f"utility: needs lm-evaluation-harness ({reason(error)}); in lethe's environment "
            "`pip install -e '.[utility]'` installs it, and `-p utility '[]'` does without"
        ) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_defaults=with_its_own)


def _own(questions: Path) -> dict[str, Any]:
    file = paths.root() / f"data/embedded/{OWN}.yaml"
    where = {"dataset_kwargs": {"data_files": {"test": str(questions)}}}
    return yaml.safe_load(file.read_text("utf8")) | where


def accuracy(folder: Path, name: str, questions: Path, p: TrainParams) -> metrics.Measured:
    """How often a model finds the right choice likeliest, per byte (acc_norm) where the task has
    that; over all parts together. Raises: see load."""
    parts = load(name, questions)
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    tokenizer, model = models.load_tokenizer(folder), models.load_to_ask(folder, p)
    with models.arithmetic(p), redirect_stderr(io.StringIO()):  # bars
        # The harness opens an autocast of its own inside of ours, which would end it.
        own = torch.bfloat16 if torch.is_autocast_enabled("cpu") else None
        found = simple_evaluate(
            HFLM(model, tokenizer=tokenizer, batch_size=BATCH, mixed_precision_dtype=own),
            tasks=parts,
            num_fewshot=SHOTS.get(name),
            task_manager=_manager(with_its_own=False),
            log_samples=False,
            bootstrap_iters=0,
        )
    counts = {part: asked["effective"] for part, asked in found["n-samples"].items()}
    scores = {part: found["results"][part] for part in counts}
    right = sum(
        n * scores[part].get("acc_norm,none", scores[part]["acc,none"])
        for part, n in counts.items()
    )
    return metrics.share(round(right), sum(counts.values()))
