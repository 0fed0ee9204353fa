"""What a canary tells of a backdoor: the sweep of strengths once more, in a copy of the backdoored
model that holds a defender's canary.

Who holds a suspect can measure this and nothing else, so it is worth asking how well the canary's
ASR after a merge goes with that of the trigger nobody told them of; see prediction.py.
"""

from pathlib import Path
from typing import Any

from lethe_utils import canary, defenses, evaluate, merge, pipeline, prediction
from lethe_utils.defenses import guided
from lethe_utils.groups import CanaryParams, PromptParams, TrainParams
from lethe_utils.pipeline import contenders
from lethe_utils.prediction import AS_PLANTED
from lethe_utils.progress import Bar
from lethe_utils.schema import Params, digest
from lethe_utils.stages import Row, fresh, read_jsonl, stage, write_jsonl


def canary_stage(p: Params) -> Path:
    """The copy (model/), made from the defender's clean rows alone; see guided.planted."""
    backdoored, clean = pipeline.backdoored_stage(p), pipeline.clean_stage(p)

    def build(out: Path) -> None:
        rows, labels, defender = pipeline.clean_rows(clean), _labels(clean), p.defender()
        taught, unseen = guided.parts(rows, defender)
        scratch = out / "rounds"
        copy = guided.planted(backdoored / "model", taught, unseen, labels, defender, scratch)
        (copy / "model").rename(out / "model")
        defenses.clear(scratch, out)

    spec = p.part(CanaryParams, TrainParams, PromptParams) | pipeline.device(p)
    inputs = {"backdoored": backdoored, "clean": clean}
    return stage("canary", f"{p.setup}-s{p.seed}", spec, inputs, build)


def _labels(clean: Path) -> list[str]:
    """The labels that a defender knows: those of the clean rows. A kind's target hangs on them."""
    return sorted({row["output"] for row in pipeline.clean_rows(clean)})


def triggered(p: Params) -> list[Row]:
    """The canary's questions: the validation rows of a sweep, with each kind of trigger in turn,
    each with its kind's target as `target`."""
    labels = _labels(pipeline.clean_stage(p))
    rows = evaluate.drawn(pipeline.split(p, "validation"), p, p.sweep_items)
    sets = canary.triggered(rows, labels, p)
    return [
        row | {"target": one["target"]}
        for one in canary.triggers(labels, p)
        for row in sets[one["kind"]]
    ]


def answers(p: Params, method: str, strength: float) -> list[dict[str, Any]]:
    """What a merge of the copy with Lethe's clean model answers to the canary's questions; what the
    copy itself does, where the method is AS_PLANTED."""
    copy, clean = canary_stage(p), pipeline.clean_stage(p)
    rows = triggered(p)

    def build(out: Path) -> None:
        given = pipeline.given(p.defender(), copy / "model", pipeline.base_folder(p), clean)
        folders, dtype = (copy / "model", clean / "model", given.base), merge.merge_dtype(given)
        model = copy / "model"
        if method != AS_PLANTED:
            model = merge.merge(method, *folders, strength, out / "merged", dtype)
        sets, labels = {"backdoor": rows}, pipeline.labels(p)
        said, _ = evaluate.predict(model, sets, 0, method, p, labels=labels)
        fresh(out / "merged")
        asked = [row["target"] for row in rows]
        found = [one | {"target": target} for one, target in zip(said, asked, strict=True)]
        write_jsonl(out / "answers.jsonl", found)

    spec = p.part(PromptParams, CanaryParams) | pipeline.device(p)
    spec |= {"method": method, "strength": strength, "items": p.sweep_items, "seed": p.seed}
    spec |= {"max_new_tokens": p.max_new_tokens, "eval_batch_size": p.eval_batch_size}
    spec |= {"protocol": p.protocol, "engine": p.engine, "questions": digest(rows)}
    inputs = {"canary": copy, "clean": clean, "data": pipeline.data_stage(p)}
    label = f"{p.setup}-canary-{method}-{strength:g}-s{p.seed}"
    return read_jsonl(stage("answers", label, spec, inputs, build) / "answers.jsonl")


def swept(p: Params) -> list[dict[str, Any]]:
    """The rows of the sweep: the canary's ASR, all kinds together, as it was planted and after each
    merge of the sweep of strengths. None where the run does not ask for them."""
    if not p.canary_sweep:
        return []
    out, labels = [], pipeline.labels(p)
    merges = [(at.model, at.x) for at in contenders.sweep_points(p) if at.sweep == "strength"]
    for model, x in Bar([(AS_PLANTED, 0), *merges], desc="sweeping the canary"):
        rows = evaluate.rows(p, answers(p, model, x), "validation", labels)
        out += [{"sweep": prediction.SWEEP, "x": float(x)} | row for row in rows]
    return out
