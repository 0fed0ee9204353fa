"""The stages of utility: each model of a run on each task of lm-evaluation-harness; see harness."""

from pathlib import Path
from typing import Any

from lethe_utils import harness, metrics, pipeline, wordnet
from lethe_utils.pipeline import contenders
from lethe_utils.progress import Bar
from lethe_utils.schema import Params
from lethe_utils.stages import read_json, stage, write_json


def questions_file() -> Path:
    """The questions of the task that is made here; written once."""

    def build(out: Path) -> None:
        harness.write_questions(out / "questions.jsonl")

    spec = {"wordnet": wordnet.fingerprint(), "per_kind": harness.PER_KIND, "seed": harness.SEED}
    return stage("questions", harness.OWN, spec, {}, build) / "questions.jsonl"


def check(p: Params) -> None:
    """Read every task of `utility`, before anything is trained. Raises: see harness.load."""
    for name in p.utility:
        harness.load(name, questions_file())


def measured_file(p: Params, c: contenders.Contender, task: str) -> Path:
    """How one model does at one task, as JSON; see metrics.Measured."""
    questions = questions_file()

    def build(out: Path) -> None:
        found = harness.accuracy(c.folder, task, questions, p)
        write_json(out / "accuracy.json", found._asdict())

    spec = pipeline.device(p) | {"task": task}
    inputs = {"model": contenders.source(p, c)}
    inputs |= {"questions": questions.parent} if task == harness.OWN else {}
    label = f"{p.model_name}-{p.dataset_name}-{contenders.named(c)}-{task}-s{p.seed}"
    return stage("utility", label, spec, inputs, build) / "accuracy.json"


def measure(p: Params) -> list[dict[str, Any]]:
    """Tidy rows `utility_<task>` of every model of the run; a defense that acts while a model
    answers has no weights of its own, and so none."""
    from lethe_utils import evaluate

    out = []
    asked = [c for c in contenders.everyone(p) if c.respond is None] if p.utility else []
    for c in Bar(asked, desc="measuring utility") if asked else []:
        files = {task: measured_file(p, c, task) for task in p.utility}
        found = {f"utility_{t}": metrics.Measured(**read_json(f)) for t, f in files.items()}
        out += evaluate.tidy(p, c.name, 0, "test", found)
    return out
