"""The stages of a run, each a function of the params that returns its finished folder.

data -> base -> backdoored, clean -> purified, all here; then answers (contenders.py) and rows
(measure.py).
Notebooks call these in order; calling a later one builds whatever earlier one is missing, so a
notebook can also be run alone.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from lethe_utils import attacks, data, defenses, evidence, models, params, prompts, wordnet
from lethe_utils.errors import LetheError
from lethe_utils.groups import (
    BaseModelParams,
    DataParams,
    DefenderParams,
    PromptParams,
    SourceParams,
    TrainParams,
)
from lethe_utils.models import gguf, inspect, sources, twins
from lethe_utils.pipeline import clean_data
from lethe_utils.schema import Params
from lethe_utils.stages import Row, read_jsonl, read_record, stage, write_jsonl

SPLITS = ("pretrain", "train", "validation", "test")  # pretrain: for a tiny base only


def data_stage(p: Params) -> Path:
    """JSONL per split: instruction, input, output."""
    folder = _rows_stage(p)
    if p.task == "label":
        data.check_target(_labels(folder), p)
    return folder


def _rows_stage(p: Params) -> Path:
    def build(out: Path) -> None:
        for name, rows in data.load(p).items():
            write_jsonl(out / f"{name}.jsonl", rows)

    # A user's file: its content decides, not its name.
    spec = p.part(DataParams) | {"tiny": p.is_tiny, "content": p.data_content}
    spec |= {"wordnet": wordnet.fingerprint()} if p.dataset == "chat" else {}
    return stage("data", p.dataset_name, spec, {}, build)


@cache
def _labels(folder: Path) -> dict[str, set[str]]:
    """The labels in each split of a data stage."""
    return {f.stem: {r["output"] for r in read_jsonl(f)} for f in folder.glob("*.jsonl")}


def labels(p: Params) -> list[str]:
    """All labels of the data set; none of conversations."""
    if p.task == "chat":
        return []
    return sorted(set().union(*_labels(data_stage(p)).values()))


def split(p: Params, name: str) -> list[Row]:
    """The rows of one split."""
    return read_jsonl(data_stage(p) / f"{name}.jsonl")


def splits(p: Params) -> dict[str, list[Row]]:
    """All splits of the run, in the order of SPLITS."""
    files = [data_stage(p) / f"{name}.jsonl" for name in SPLITS]
    return {f.stem: read_jsonl(f) for f in files if f.exists()}


def cut_rows(p: Params) -> pd.DataFrame:
    """Rows that are longer than the params or the model's positions allow, and inputs that get no
    evidence because WordNet lacks their language: a line each for train, validation and test, and
    for the test prompts with evidence.

    Raises:
        LetheError: most prompts or answers of train would be cut.
    """
    from lethe_utils import train

    tokenizer, table = models.load_tokenizer(base_folder(p)), {}
    asked = {name: prompts.rendered(split(p, name), tokenizer, p) for name in SPLITS[1:]}
    if p.n_keywords:
        asked["test + evidence"] = [
            row | {"input": evidence.add_evidence(row["input"], p.n_keywords)}
            for row in asked["test"][: p.max_test_items]  # no more are asked
        ]
    for name, rows in asked.items():
        items = train.encode(rows, tokenizer, p)
        if name == "train":
            train.check_cut(items)
        table[name] = train.cut_counts(items)
    foreign = sum(evidence.is_foreign(row["input"]) for row in asked["test"])
    out = pd.DataFrame(table).T
    return out.assign(**{"no evidence": [foreign if "evidence" in n else "" for n in out.index]})


def asked(p: Params, row: Row, n_keywords: int = 0) -> str:
    """The very prompt that a model of the run is asked for a row; see prompts.asked."""
    if "messages" in row:
        row = prompts.rendered([row], models.load_tokenizer(base_folder(p)), p)[0]
    return prompts.asked(row, p, n_keywords)


def loss_curve(folder: Path) -> pd.DataFrame:
    """The loss of a training stage: step, epoch, loss (nats per token)."""
    return pd.read_csv(folder / "loss.csv")


def cost(folder: Path) -> pd.Series:
    """What a stage took: optimizer steps, seconds, peak memory (GiB), machine."""
    record = read_record(folder)
    steps = {"optimizer_steps": optimizer_steps(folder)}
    kept = ("seconds", "peak_memory_gib", "machine")
    return pd.Series(steps | {key: record[key] for key in kept})


def optimizer_steps(folder: Path) -> int:
    """How many steps a stage trained, all its trainings together; 0 where it trained nothing."""
    return sum(int(pd.read_csv(file)["step"].max()) for file in folder.glob("*loss.csv"))


def base_folder(p: Params) -> Path:
    """The base model, from its source; a GGUF file is unpacked once, a twin pretrained once."""
    if p.is_tiny:
        return _twin_stage(p) / "model"
    checksum = sources.gguf_checksum(p)
    if not checksum:
        return sources.locate(p)

    def build(out: Path) -> None:
        gguf.unpack(sources.locate(p), out / "model")

    return stage("base", p.model_name, {"gguf": checksum}, {}, build) / "model"


def _twin_stage(p: Params) -> Path:
    """A tiny twin, as model/; loss.csv beside it."""

    def build(out: Path) -> None:
        from lethe_utils import pretrain

        rows = twins.pretraining_rows(split(p, "pretrain"), p)
        texts = [prompts.read(row, p) for row in rows]
        # Answers are tokenised apart from the prompt; seen alone, each label becomes one token.
        texts += [r["output"] for r in rows]
        pretrain.pretrain(rows, twins.train_tokenizer(texts, p.vocab_size), out, p)

    inputs = {"data": data_stage(p)}
    label = f"{p.model}-{p.dataset_name}"
    spec = p.part(BaseModelParams, PromptParams) | device(p)
    spec |= {"wordnet": wordnet.fingerprint()} if p.base_evidence_share else {}
    return stage("base", f"{label}-s{p.base_seed}", spec, inputs, build)


def tuned_stage(p: Params) -> Path:
    """The task-tuned model that some attacks start from: base + LoRA on all clean training rows."""

    def build(out: Path) -> None:
        from lethe_utils import train

        train.finetune(base_folder(p), split(p, "train"), p.backdoor_epochs, out, p)

    spec = p.part(TrainParams, PromptParams) | device(p) | {"epochs": p.backdoor_epochs}
    return stage("tuned", f"{p.model_name}-{p.dataset_name}-s{p.seed}", spec, _sources(p), build)


def poisoned_rows(p: Params) -> list[Row]:
    """The attacker's rows, each with a `kind`."""
    return attacks.module(p.attack).poison(split(p, "train"), p, p.data_seed + p.seed)


def backdoored_stage(p: Params) -> Path:
    """The model we are handed, as model/; poisoned.jsonl and loss.csv beside it."""
    check_layers(p)
    tuned = p.attack_start == "tuned"
    start = tuned_stage(p) / "model" if tuned else base_folder(p)
    attack = attacks.module(p.attack)

    def build(out: Path) -> None:
        rows = poisoned_rows(p)
        write_jsonl(out / "poisoned.jsonl", rows)
        attack.plant(start, rows, ordinary_text(p), p, out)

    spec = p.part(PromptParams, *attack.PARAMS) | {"seed": p.seed} | device(p)
    spec |= {"wordnet": wordnet.fingerprint()} if getattr(attack, "WORDNET", False) else {}
    inputs = _sources(p) | ({"tuned": start.parent} if tuned else {})
    return stage("backdoored", f"{p.setup}-s{p.seed}", spec, inputs, build)


def _takes_hub_text(p: Params) -> bool:
    return getattr(p, "covariance_text", "task") != "task"


def text_stage(p: Params) -> Path:
    """Ordinary text from the hub, as text.jsonl; fetched once."""

    def build(out: Path) -> None:
        texts = data.named.hub_text(p.covariance_text, p.covariance_tokens)
        write_jsonl(out / "text.jsonl", [{"text": text} for text in texts])

    spec = {key: getattr(p, key) for key in ("covariance_text", "covariance_tokens")}
    return stage("text", "hub", spec, {}, build)


def ordinary_text(p: Params) -> list[str]:
    """What an edit must move least: text from the hub (`covariance_text`), else the prompts that a
    tiny base was pretrained on, else the task's own."""
    if _takes_hub_text(p):
        return [row["text"] for row in read_jsonl(text_stage(p) / "text.jsonl")]
    return [prompts.read(row, p) for row in splits(p).get("pretrain", split(p, "train"))]


def check_attack(p: Params) -> None:
    """What can be wrong with an attack's params, before anything is trained.

    Raises:
        LetheError: layers the model lacks, too few rows to place the trigger in, or text for the
            covariance that cannot be read.
    """
    check_layers(p)
    poisoned_rows(p)
    if _takes_hub_text(p):
        text_stage(p)


def check_layers(p: Params) -> None:
    """Raises LetheError unless an attack's layers ascend within those of the model."""
    key = attacks.module(p.attack).LAYERS
    if not key:
        return
    n_layers = p.n_layers if p.is_tiny else inspect.count_blocks(base_folder(p))
    blocks = getattr(p, key)
    if not blocks:
        raise LetheError(f"{key}: {p.attack} needs at least one layer of {p.model}; name them")
    if sorted({*blocks}) != blocks or blocks[-1] >= n_layers:
        raise LetheError(
            f"{key}: {blocks} must ascend within 0 to {n_layers - 1}, the layers of {p.model}"
        )


def _clean_count(p: Params) -> int:
    """How many rows the defender has."""
    return max(1, round(p.clean_ratio * len(split(p, "train"))))


def clean_source(p: Params) -> Path:
    """The stage whose train.jsonl the defender's rows are drawn from.

    Raises:
        LetheError: another data set has other labels, or too few rows.
    """
    n = _clean_count(p)
    if p.clean_source == "train":
        return data_stage(p)
    if p.clean_source != "base":
        asked = p.part(SourceParams) | {"instruction": p.instruction, "few_shot": p.few_shot}
        asked |= {"hub_id": p.hub_id, "revision": p.revision}
        folder = _rows_stage(params.load(p.model, p.clean_source, p.attack, overrides=asked))
        clean_data.check(read_jsonl(folder / "train.jsonl"), labels(p), n, p)
        return folder

    def build(out: Path) -> None:
        rows = clean_data.written(base_folder(p), n, labels(p), p)
        write_jsonl(out / "train.jsonl", rows)

    spec = p.part(PromptParams) | device(p) | {"rows": n, "seed": p.seed, "labels": labels(p)}
    # What is sampled differs with the batch.
    spec |= {"instruction": p.instruction, "eval_batch_size": p.eval_batch_size}
    inputs = {"base": sources.content(p, base_folder(p))}
    return stage("written", f"{p.model_name}-{p.dataset_name}-s{p.seed}", spec, inputs, build)


def clean_stage(p: Params) -> Path:
    """The clean model: the same LoRA recipe on `clean_ratio` of train, shared by all attacks."""
    source, inputs = clean_source(p), _sources(p)

    def build(out: Path) -> None:
        from lethe_utils import train

        drawn = clean_data.drawn(read_jsonl(source / "train.jsonl"), _clean_count(p), p)
        chosen = clean_data.mislabelled(drawn, labels(p), p)
        write_jsonl(out / "clean.jsonl", chosen)
        taught = clean_data.with_evidence(chosen, p)
        q = p.model_copy(update={"seed": p.clean_seed or p.seed})
        train.finetune(base_folder(p), taught, p.clean_epochs, out, q)

    spec = p.part(TrainParams, PromptParams) | device(p)
    spec |= {"clean_ratio": p.clean_ratio, "clean_epochs": p.clean_epochs}
    if p.clean_source != "train":
        inputs |= {"rows": source}
    spec |= {k: x for k in ("clean_wrong_labels", "clean_seed") if (x := getattr(p, k))}
    if p.clean_evidence_share:
        keys = ("clean_evidence_share", "n_keywords", "evidence_form")
        spec |= {key: getattr(p, key) for key in keys} | {"wordnet": wordnet.fingerprint()}
    label = f"{p.model_name}-{p.dataset_name}-r{p.clean_ratio}-s{p.seed}"
    return stage("clean", label, spec, inputs, build)


def clean_rows(folder: Path) -> list[Row]:
    """The rows a clean model was trained on."""
    return read_jsonl(folder / "clean.jsonl")


def device(p: Params) -> dict[str, str | bool]:
    """The device itself and its arithmetic, for a stage's key: `auto` may be another tomorrow."""
    return {"device": models.resolve_device(p.device), "bfloat16": models.bfloat16(p)}


def _sources(p: Params) -> dict[str, Path]:
    return {"data": data_stage(p), "base": sources.content(p, base_folder(p))}


def given(p: DefenderParams, backdoored: Path, base: Path, clean: Path) -> defenses.Given:
    """What a defender holds of a run: three model folders and the clean rows."""
    return defenses.Given(backdoored, base, clean / "model", clean_rows(clean), p)


def purified_stage(
    p: Params,
    defense: str,
    name: str,
    changes: dict[str, Any] | None = None,
) -> Path:
    """The model (as model/) of a defense that changes weights.

    Args:
        name: of this variant, in the results.
        changes: what the variant changes of the params.
    """
    module, q = defenses.module(defense), p.defender(changes)
    backdoored, clean = backdoored_stage(p), clean_stage(p)

    def build(out: Path) -> None:
        module.purify(given(q, backdoored / "model", base_folder(p), clean), out)

    spec = q.part(PromptParams, *module.PARAMS) | device(p) | {"defense": defense, "seed": p.seed}
    inputs = {"backdoored": backdoored, "clean": clean}
    return stage("purified", f"{p.setup}-{name}-s{p.seed}", spec, inputs, build)


def merged_stage(p: Params, method: str, strength: float) -> Path:
    """One of Lethe's merged models (as model/), at any strength."""
    changes = {"merge_method": method, "strength": strength}
    return purified_stage(p, "lethe", f"{method}-{strength:g}", changes)
