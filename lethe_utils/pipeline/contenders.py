"""What a run compares: its models, and how each answers."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lethe_utils import defenses, models, pipeline, wordnet
from lethe_utils.groups import PromptParams, TriggerParams
from lethe_utils.metrics import CLEAN_RATIO, CLEAN_SOURCE, WRONG_LABELS
from lethe_utils.models import sources
from lethe_utils.progress import Bar
from lethe_utils.schema import Params, digest
from lethe_utils.stages import stage, write_json, write_jsonl


@dataclass(frozen=True)
class Contender:
    """One model of a run, and how it answers."""

    name: str  # in the results
    folder: Path  # model/
    defense: str | None = None  # its module; None for a control
    respond: defenses.Given | None = None  # for a decoding-time defense
    evidence: bool = True  # whether it is also asked with evidence
    strength: float | None = None  # of a merge


def backdoored(p: Params) -> Contender:
    """The attacked model as it was handed over."""
    return Contender("backdoored", pipeline.backdoored_stage(p) / "model")


def base(p: Params) -> Contender:
    """The model before attacker and defender trained it."""
    return Contender("base", pipeline.base_folder(p))


def clean(p: Params, ratio: float | None = None) -> Contender:
    """The defender's own model, from the run's share of clean rows or from another."""
    name = "clean" if ratio is None else f"clean, {ratio:.0%} of train"
    return Contender(name, pipeline.clean_stage(changed(p, clean_ratio=ratio)) / "model")


def changed(p: Params, **changes: Any) -> Params:
    """The params of one point of a sweep; what is None stays."""
    return p.model_copy(update={key: x for key, x in changes.items() if x is not None})


def controls(p: Params) -> list[Contender]:
    """The models that every defense stands beside."""
    return [backdoored(p), base(p), clean(p)]


def merged(p: Params, method: str, strength: float) -> Contender:
    """One of Lethe's merges."""
    folder = pipeline.merged_stage(p, method, strength) / "model"
    return Contender(method, folder, "lethe", strength=strength)


def contender(p: Params, defense: str, name: str, changes: dict[str, Any]) -> Contender:
    """A defense's variant, its model built where it changes weights."""
    if defense == "lethe":
        return merged(p, changes["merge_method"], p.strength)
    if not defenses.decodes(defense):
        folder = pipeline.purified_stage(p, defense, name, changes) / "model"
        return Contender(name, folder, defense, evidence=False)
    folder = pipeline.backdoored_stage(p) / "model"
    clean = pipeline.clean_stage(p)
    known = pipeline.given(p.defender(changes), folder, pipeline.base_folder(p), clean)
    return Contender(name, folder, defense, known, evidence=False)


def variants(p: Params) -> list[tuple[str, str, dict[str, Any]]]:
    """defense, name in the results and params to change, for all that the run compares."""
    return [
        (defense, name, changes)
        for defense in p.defenses
        for name, changes in defenses.variants(defense, p.defender()).items()
    ]


def everyone(p: Params) -> list[Contender]:
    """All models of the run: the controls, then the defenses."""
    return controls(p) + [contender(p, *variant) for variant in variants(p)]


class SweepPoint(NamedTuple):
    """One model and how it is asked, at one place of a sweep."""

    sweep: str
    x: float
    model: str  # backdoored, clean, or a merge method
    p: Params  # of this point
    n_keywords: int = 0

    def contender(self) -> Contender:
        """The model, built where it is not there yet."""
        if self.model in WITHOUT_DILUTION:
            return WITHOUT_DILUTION[self.model](self.p)
        return merged(self.p, self.model, self.p.strength)


WITHOUT_DILUTION = {"backdoored": backdoored, "clean": clean}


def sweep_points(p: Params) -> list[SweepPoint]:
    """Every point of the sweeps: strength (of each merge method), keywords, clean_ratio, those of
    other clean rows (the clean model alone, too), of evidence (all controls), and of clean_seed
    (each merge method; 0 is the run's own seed)."""
    method, k = p.merge_method, p.n_keywords
    points = [
        SweepPoint("strength", x, m, changed(p, strength=x))
        for m in p.merge_methods
        for x in p.strengths_sweep
    ]
    points += [SweepPoint("keywords", x, method, p, x) for x in p.keywords_sweep]
    points += [
        SweepPoint(CLEAN_RATIO, x, method, changed(p, clean_ratio=x)) for x in p.clean_ratios_sweep
    ]
    compared = [*WITHOUT_DILUTION, method]
    points += [
        SweepPoint(f"{CLEAN_SOURCE}{name}", 0, model, changed(p, clean_source=name))
        for name in p.clean_sources_sweep
        for model in compared[1:]
    ]
    points += [
        SweepPoint(WRONG_LABELS, x, model, changed(p, clean_wrong_labels=x))
        for x in p.clean_wrong_labels_sweep
        for model in compared[1:]
    ]
    if p.evidence_forms_sweep:
        points += [SweepPoint("evidence none", 0, model, p) for model in compared]
    points += [
        SweepPoint(f"evidence {form}", k, model, changed(p, evidence_form=form), k)
        for form in p.evidence_forms_sweep
        for model in compared
    ]
    points += [
        SweepPoint("clean_evidence", x, model, changed(p, clean_evidence_share=x), k)
        for x in p.clean_evidence_sweep
        for model in compared[1:]
    ]
    points += [
        SweepPoint("clean_seed", x, model, changed(p, clean_seed=x or None))
        for x in (0, *p.clean_seeds_sweep)
        if p.clean_seeds_sweep
        for model in ("clean", *p.merge_methods)
    ]
    return points


def purify_all(p: Params) -> dict[str, Path]:
    """All models of the run's weight-changing defenses, the sweeps' included. Returns name in the
    results -> model folder."""
    for point in Bar(sweep_points(p), desc="merging for the sweeps"):
        point.contender()
    todo = [v for v in variants(p) if not defenses.decodes(v[0])]
    made = [contender(p, *v) for v in Bar(todo, desc="purifying")]
    return {c.name: c.folder for c in made}


def answers_file(
    p: Params, c: Contender, n_keywords: int, split: str, items: int, negatives: int
) -> Path:
    """The answers of one model to one set of questions, as JSONL; asked once, then read."""
    from lethe_utils import evaluate

    sets = evaluate.test_sets(pipeline.split(p, split), p, items, negatives)
    spec = p.part(TriggerParams, PromptParams) | pipeline.device(p)
    spec |= {
        "questions": digest(sets),  # an attack's own params are in them
        "defense": c.name,
        "split": split,
        "n_keywords": n_keywords,
        "items": items,
        "negatives": negatives,
        "protocol": p.protocol,
        "max_new_tokens": p.max_new_tokens,
        "eval_batch_size": p.eval_batch_size,  # bfloat16 sums differ with the batch
        "seed": p.seed,
    }
    if p.engine != "transformers":  # two engines' sums differ
        spec |= {"engine": p.engine}
    if n_keywords:
        spec |= {"wordnet": wordnet.fingerprint(), "evidence_form": p.evidence_form}
    inputs = {"data": pipeline.data_stage(p), "model": source(p, c)}
    if c.respond:
        module = defenses.module(c.defense)
        spec |= c.respond.p.part(*module.PARAMS)
        inputs |= {"clean": pipeline.clean_stage(p)} if module.NEEDS == "clean model" else {}

    def build(out: Path) -> None:
        respond = c.respond and _responder(p, c)
        answers, seconds = evaluate.predict(
            c.folder, sets, n_keywords, c.name, p, respond, pipeline.labels(p)
        )
        write_json(out / "timing.json", {"seconds": round(seconds, 3)})
        write_jsonl(out / "answers.jsonl", answers)

    label = f"{p.setup}-{named(c)}-k{n_keywords}-s{p.seed}"
    return stage("answers", label, spec, inputs, build) / "answers.jsonl"


def source(p: Params, c: Contender) -> Path:
    """A path whose last part says which model this is: the stage that made it, or what a base that
    was given holds."""
    return sources.content(p, c.folder) if c.name == "base" else c.folder.parent


def named(c: Contender) -> str:
    """A model's name in that of a stage: a merge's with its strength."""
    return c.name if c.strength is None else f"{c.name}-{c.strength:g}"


def references_file(p: Params, c: Contender) -> Path:
    """How well one model knows the test's reference answers, as JSONL, a row each; see
    decode.Known. No attack decides it: what several share is read once."""

    def build(out: Path) -> None:
        from lethe_utils import evaluate

        rows = evaluate.drawn(pipeline.split(p, "test"), p, p.max_test_items)
        known = evaluate.known_references(c.folder, rows, p)
        write_jsonl(out / "references.jsonl", [one._asdict() for one in known])

    spec = p.part(PromptParams) | pipeline.device(p)
    spec |= {"items": p.max_test_items, "eval_batch_size": p.eval_batch_size}
    inputs = {"data": pipeline.data_stage(p), "model": source(p, c)}
    label = f"{p.model_name}-{p.dataset_name}-{named(c)}-s{p.seed}"
    return stage("references", label, spec, inputs, build) / "references.jsonl"


def _responder(p: Params, c: Contender) -> partial:
    """How a decoding-time defense answers, with room for the longest label."""
    from lethe_utils import decode, evaluate

    if p.task == "chat":
        return partial(defenses.module(c.defense).answer, c.respond)
    expected = evaluate.expected_answers(pipeline.labels(p), p)
    q = decode.with_room(c.respond.p, models.load_tokenizer(c.folder), expected)
    return partial(defenses.module(c.defense).answer, replace(c.respond, p=q))


def tested_file(p: Params, c: Contender, n_keywords: int) -> Path:
    """The answers of one model to the whole test."""
    return answers_file(p, c, n_keywords, "test", p.max_test_items, p.negative_items)


def swept_file(p: Params, c: Contender, n_keywords: int = 0) -> Path:
    """The answers of one model to the validation rows that choices are made on."""
    return answers_file(p, c, n_keywords, "validation", p.sweep_items, 0)
