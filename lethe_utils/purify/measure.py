"""What every point of a comparison answers: the suspect, each merge at each strength, and the clean
model alone. Each measurement is a stage."""

from pathlib import Path
from typing import Any

from lethe_utils import canary, wordnet
from lethe_utils.errors import LetheError
from lethe_utils.purify import search
from lethe_utils.purify.ask import Answer, Score, ask_folder, asr, marks, score
from lethe_utils.purify.case import Case, Fold
from lethe_utils.purify.dilute import CLEAN, GUIDED, base_model, merged, suspect_model
from lethe_utils.purify.rounds import asked_by, canary_model, clean_model
from lethe_utils.schema import digest
from lethe_utils.stages import fresh, read_jsonl, stage, write_json, write_jsonl

Point = dict[str, Any]  # model, strength; measured: performance, canary, and the marks of each
SUSPECT = {"model": "suspect", "strength": 0.0}
ALONE = {"model": CLEAN, "strength": 1.0}
NEAR_ZERO = 0.05  # clean performance that leaves nothing to keep


def suspect_performance(case: Case) -> Score:
    """The suspect's own clean performance, before anything is trained.

    Raises:
        LetheError: it is near zero, or no more than may be lost: every strength would keep it.
    """
    own = score(clean_marks(case, SUSPECT))
    least = max(NEAR_ZERO, case.p.max_cda_loss)
    if own["value"] <= least and case.p.max_cda_loss < 1:
        raise LetheError(
            f"the suspect's own {case.metric} is {own['value']:.3f} on {own['n']} clean rows: "
            "there is nothing to keep. Give rows, and a prompt (-p prompt_template), of the task "
            "that it was trained for; --max-cda-loss 1 goes on all the same"
        )
    return own


def points(case: Case) -> list[Point]:
    """All that is compared, the suspect first, the clean model alone last; both are controls, and
    the latter may be the best. Each has model, strength, performance and canary (scores), and the
    marks that they are made of. Raises: see suspect_performance."""
    suspect_performance(case)
    canary_model(case)
    tried = [
        {"model": method, "strength": strength}
        for method in dict.fromkeys(case.p.merge_methods)
        if method != GUIDED
        for strength in sorted({*case.p.strengths})
    ]
    tried += [search.found(case)] if GUIDED in case.p.merge_methods else []
    return [measured(case, at) for at in (SUSPECT, *tried, ALONE)]


def measured(case: Case, at: Point) -> Point:
    """A point with what it gave."""
    clean = clean_marks(case, at)
    hits = marks(case, answers(case, "canary", at))
    found = {"performance": score(clean), "canary": asr(hits)}
    return at | found | {"marks": {"clean": clean} | hits}


def clean_marks(case: Case, at: Point) -> list[float]:
    """How right each clean row is answered that a clean model has not seen."""
    found = (marks(case, answers(case, "suspect", at, 0, fold)) for fold in case.folds)
    return sum((of_fold["clean"] for of_fold in found), [])


def answers(
    case: Case, which: str, at: Point, n_keywords: int = 0, fold: Fold | None = None
) -> list[Answer]:
    """What a point answers; see answered."""
    return read_jsonl(answered(case, which, at, n_keywords, fold) / "answers.jsonl")


def answered(
    case: Case, which: str, at: Point, n_keywords: int = 0, fold: Fold | None = None
) -> Path:
    """The answers of a point (answers.jsonl) and the seconds a question took (timing.json).

    Args:
        which: "suspect", which gets the held-out rows; "canary", its copy that gets them triggered;
            or "base", which gets both.
        at: model and strength; curves where it is guided.
        fold: whose rows and clean model; the main ones by default.
    """
    held_out = (fold or case.main).held_out
    triggered = canary.triggered(held_out, case.labels, case.p, case.chat)
    parent, sets = {
        "suspect": (suspect_model, {"clean": held_out}),
        "canary": (canary_model, triggered),
        "base": (base_model, {"clean": held_out} | triggered),
    }[which]
    method, strength = at["model"], at["strength"]
    inputs: dict[str, Path] = {}
    if method != CLEAN:
        inputs["parent"] = parent(case)
    if strength:
        inputs["clean"] = clean_model(case, fold)
    name = which if method == which else f"{which}, {method} {strength:g}"

    def build(out: Path) -> None:
        scratch = out / "merged"
        fresh(scratch)
        folder = inputs.get("parent", inputs.get("clean")) / "model"
        if len(inputs) == 2:
            folder = merged(case, *inputs.values(), at, scratch)
        found, seconds = ask_folder(case, folder, sets, n_keywords, name)
        fresh(scratch)  # at full size each is gigabytes
        write_json(out / "timing.json", {"seconds_per_question": seconds / max(1, len(found))})
        write_jsonl(out / "answers.jsonl", found)

    made_of = asked_by(case) | {"sets": digest(sets), "n_keywords": n_keywords}
    if len(inputs) == 2:
        made_of |= {"method": method, "strength": strength}
        made_of |= {"curves": at["curves"]} if method == GUIDED else {}
    made_of |= {"wordnet": wordnet.fingerprint()} if n_keywords else {}
    label = name.replace(", ", "-").replace(" ", "-")
    return stage("measured", f"{case.suspect.name}-{label}", made_of, inputs, build)
