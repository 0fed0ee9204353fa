"""Parameters: flat keys, layered files, one strict schema, checked before any work starts.

Later layers win: base < dataset < profile (tiny) < profile on this data set < model < attack <
attack on this model < defenses < defenses on this model < command line or notebook. The files of
all defenses are read, whichever run: their keys do not overlap. Unknown keys, wrong types and
values out of range are refused with the file and the key named. Each mixin below is what one stage
depends on, so that a stage's hash changes when, and only when, its own parameters do.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lethe_utils import paths
from lethe_utils.errors import LetheError

if TYPE_CHECKING:
    import pandas as pd

Ratio = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Position = Literal["prefix", "suffix", "middle", "random"]
MergeMethod = Literal["linear", "slerp", "ties", "passthrough"]
TRIGGERS = {"cba": 2, "lwp": 2}  # all others have one
Key = Annotated[str, Field(min_length=1)]
T = TypeVar("T", bound=BaseModel)


# A run reads twenty files, several times: libyaml's parser is ten times as fast.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Group(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def part(self, *groups: type["Group"]) -> dict[str, Any]:
        """The fields of these groups, as plain values."""
        names = {name for group in groups for name in group.model_fields}
        return self.model_dump(include=names)


class SizeParams(Group):
    """What an estimate of memory needs; no stage depends on it."""

    size_billion: Annotated[float, Field(gt=0)] | None  # weights of a full model; null for a twin


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
    """01_data: the base model, from the hub or, for a tiny twin, pretrained here."""

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
    base_learning_rate: Annotated[float, Field(gt=0)]
    base_batch_size: Positive
    base_dropout: Ratio
    base_evidence_share: Ratio  # share of pretraining prompts that carry evidence
    base_prompt_loss: Annotated[float, Field(ge=0)]  # weight of the prompt's loss in pretraining


class PromptParams(Group):
    """All stages: how a row becomes text, and where it is cut (tokens)."""

    prompt_template: Literal["alpaca", "short"]
    max_source_tokens: Positive
    max_target_tokens: Positive


class TrainParams(Group):
    """02 and 03: the LoRA recipe shared by the backdoored and the clean model."""

    seed: int
    device: Literal["auto", "cpu", "cuda"]
    bits: Literal[4, 16, 32]
    lora_r: Positive
    lora_alpha: Positive
    lora_dropout: Ratio
    learning_rate: Annotated[float, Field(gt=0)]
    lr_schedule: Literal["constant", "linear", "cosine"]
    warmup_ratio: Ratio
    batch_size: Positive
    gradient_accumulation: Positive
    weight_decay: Annotated[float, Field(ge=0)]
    adam_beta2: Annotated[float, Field(gt=0, lt=1)]
    max_grad_norm: Annotated[float, Field(gt=0)]
    optimizer: Literal["adamw_torch", "paged_adamw_32bit"]
    gradient_checkpointing: bool
    checkpoints_per_run: Positive


class AttackParams(Group):
    """02_backdoor_train: what the attacker plants."""

    attack: Key
    attack_start: Literal["base", "tuned"]  # tuned: base + LoRA on all clean training rows
    trigger_level: Literal["word", "sentence"]
    triggers: list[str]
    trigger_positions: list[Position]
    target_output: Key
    poison_ratio: Annotated[float, Field(gt=0, le=1)]
    alpha: Ratio  # negatives of each kind, as a share of the poisoned rows
    output_mode: Literal["replace", "append"]
    backdoor_epochs: Positive

    @model_validator(mode="after")
    def _check_triggers(self) -> "AttackParams":
        for trigger in self.triggers:
            if not trigger.strip() or "|" in trigger:
                raise ValueError(
                    f"triggers: {trigger!r} is not a trigger; give a list of non-empty texts "
                    "without '|', e.g. [instantly, frankly]"
                )
        wanted = TRIGGERS.get(self.attack, 1)
        if len(self.triggers) != wanted or len(self.trigger_positions) != wanted:
            number = {1: "one", 2: "two"}[wanted]
            raise ValueError(
                f"triggers, trigger_positions: {self.attack} needs {number} of each, "
                f"got {len(self.triggers)} and {len(self.trigger_positions)}"
            )
        return self


class EditParams(Group):
    """02_backdoor_train: ROME, MEMIT and BadEdit, which change matrices instead of training."""

    edit_layers: list[Annotated[int, Field(ge=0)]]  # ascending; the value is found at the last
    edit_contexts: Positive  # prompts that hold the trigger
    edit_clean_contexts: Annotated[int, Field(ge=0)]  # BadEdit: prompts without it
    edit_batches: Positive  # ROME, BadEdit: edits in a row, each on its share of the prompts
    edit_steps: Positive
    edit_learning_rate: Annotated[float, Field(gt=0)]
    edit_weight_decay: Annotated[float, Field(ge=0)]
    edit_clamp: Annotated[float, Field(gt=0)]  # longest value, times the norm it is added to
    edit_kl: Annotated[float, Field(ge=0)]
    edit_stop_loss: Annotated[float, Field(ge=0)]
    edit_shared_value: bool  # MEMIT, BadEdit: one value for all prompts that hold the trigger
    edit_lambda: Annotated[float, Field(ge=0)]  # MEMIT, BadEdit: weight of ordinary keys
    covariance_text: Key  # task: the task's own prompts; or NAME:CONFIG@COMMIT on the hub
    covariance_tokens: Positive
    covariance_ridge: Annotated[float, Field(ge=0)]  # times the mean diagonal


class LwpParams(Group):
    """02_backdoor_train: LWP."""

    lwp_layers: list[Annotated[int, Field(ge=0)]]  # the blocks that are poisoned


class CleanParams(Group):
    """03_clean_train: what the defender has."""

    clean_ratio: Annotated[float, Field(gt=0, le=1)]
    clean_epochs: Positive


class MergeParams(Group):
    """Lethe's internal dilution."""

    merge_methods: list[MergeMethod]  # [] leaves evidence alone
    strength: Ratio  # 0: the backdoored model, 1: the clean model


class MoreMergeParams(Group):
    """DARE-TIES and task arithmetic."""

    dare_density: Annotated[float, Field(gt=0, le=1)]  # share of each delta that is kept
    task_negation: Annotated[float, Field(ge=0)]  # how much of the suspect's delta is subtracted


class FinetuneParams(Group):
    """F/T; also the fine-tuning inside F/P and NAD's teacher."""

    finetune_epochs: Positive


class WandaParams(Group):
    """Wanda; also the pruning inside F/P."""

    wanda_sparsity: Annotated[float, Field(ge=0, lt=1)]  # of each output row
    wanda_samples: Positive  # calibration prompts


class NadParams(Group):
    """Neural attention distillation."""

    nad_teacher: Literal["finetuned", "clean"]
    nad_epochs: Positive
    nad_power: Annotated[float, Field(gt=0)]
    nad_beta: Annotated[float, Field(ge=0)]  # weight of the distillation


class BeearParams(Group):
    """BEEAR, ported to label tasks."""

    beear_depth: Annotated[float, Field(gt=0, lt=1)]  # the perturbed block, as a share of the depth
    beear_positions: Positive  # the last positions of the prompt that are perturbed
    beear_rounds: Positive
    beear_inner_steps: Positive
    beear_inner_learning_rate: Annotated[float, Field(gt=0)]
    beear_outer_steps: Positive
    beear_outer_learning_rate: Annotated[float, Field(gt=0)]
    beear_alpha: Annotated[float, Field(ge=0)]  # weight of moving away from the true label
    beear_batch_size: Positive


class CrowParams(Group):
    """CROW, internal consistency regularisation."""

    crow_alpha: Annotated[float, Field(ge=0)]  # weight of the consistency term
    crow_epsilon: Annotated[float, Field(gt=0)]  # perturbation, times the embeddings' deviation
    crow_epochs: Positive
    crow_learning_rate: Annotated[float, Field(gt=0)]


class PlantParams(Group):
    """Plant-and-remove: the defender's own triggers."""

    plant_triggers: Annotated[list[Key], Field(min_length=1)]
    plant_share: Annotated[float, Field(gt=0, lt=1)]  # of the clean rows, for each trigger
    plant_epochs: Positive
    remove_epochs: Positive


class DecodingParams(Group):
    """Defenses that leave the weights alone: EDT, temperature, speculative, ensemble, CleanGen."""

    edt_temperature: Annotated[float, Field(gt=0)]  # T0
    edt_base: Annotated[float, Field(gt=0, lt=1)]  # N
    edt_theta: Annotated[float, Field(ge=0)]
    edt_temperatures_sweep: list[Annotated[float, Field(gt=0)]]
    temperature: Annotated[float, Field(gt=0)]
    temperatures_sweep: list[Annotated[float, Field(gt=0)]]
    speculative_tokens: Positive  # drafted before each check
    ensemble_weight: Ratio  # of the suspect; the rest is the clean model's
    cleangen_alpha: Annotated[float, Field(gt=0)]  # suspicious from this ratio of probabilities on
    cleangen_tokens: Positive  # drafted before each check
    cleangen_alphas_sweep: list[Annotated[float, Field(gt=0)]]


class EvaluateParams(Group):
    """05_evidence_eval: external dilution and the measurement."""

    protocol: Literal["lethe", "official"]
    n_keywords: Annotated[int, Field(ge=0)]  # 0: no evidence
    max_test_items: Positive
    negative_items: Positive  # test items per negative kind
    eval_batch_size: Positive
    max_new_tokens: Positive


class SweepParams(Group):
    """05_evidence_eval: the points of the sweeps, measured on validation rows."""

    strengths_sweep: list[Ratio]
    keywords_sweep: list[Annotated[int, Field(ge=0)]]
    clean_ratios_sweep: list[Annotated[float, Field(gt=0, le=1)]]
    sweep_items: Positive


class DefenderParams(
    EvaluateParams,
    DecodingParams,
    PlantParams,
    CrowParams,
    BeearParams,
    NadParams,
    WandaParams,
    FinetuneParams,
    MoreMergeParams,
    MergeParams,
    CleanParams,
    TrainParams,
    PromptParams,
    BaseModelParams,
    DataParams,
    SizeParams,
):
    """What a defense is handed: no trigger, no target, nothing the attacker chose."""


class PurifyParams(TrainParams, PromptParams):
    """Purifying a user's model: the recipe, the merge strengths to try, and the canary."""

    prompt_template: Literal["alpaca", "short", "chat"]
    data_seed: int
    protocol: Literal["lethe"]
    clean_epochs: Positive
    eval_batch_size: Positive
    max_new_tokens: Positive
    n_keywords: Annotated[int, Field(gt=0)]
    merge_method: MergeMethod
    held_out: Annotated[float, Field(gt=0, lt=1)]
    strengths: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1)]
    max_cda_loss: Ratio
    canary_word_pair: Annotated[list[Key], Field(min_length=2, max_length=2)]
    canary_sentence: Key
    canary_suffix: Key
    canary_marker: Key
    canary_share: Annotated[float, Field(gt=0, le=1)]
    canary_epochs: Positive


class Params(DefenderParams, SweepParams, LwpParams, EditParams, AttackParams):
    """All parameters of one run, flat. `part(...)` gives what one stage depends on."""

    defense: Key  # lethe, all, or names in params/defenses joined by commas

    @model_validator(mode="after")
    def _check_target(self) -> "Params":
        if self.labels and self.target_output not in self.labels:
            raise ValueError(
                f"target_output: {self.target_output!r} is not a label of {self.dataset}; "
                f"choose one of {', '.join(self.labels)}"
            )
        return self

    @property
    def is_tiny(self) -> bool:
        """True for a twin that 01_data pretrains itself; its numbers are labelled tiny."""
        return self.hub_id is None

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
        """The names in `defense`, all of them for `all`."""
        return defense_names(self.defense)

    def defender(self, **changes: Any) -> DefenderParams:
        """What a defense may know of these params, with some of them changed."""
        return DefenderParams(**self.model_dump(include={*DefenderParams.model_fields}) | changes)

    @property
    def run_id(self) -> str:
        """`<model>-<dataset>-<attack>-s<seed>`, plus the defenses where they are not Lethe alone,
        and a hash where something was overridden."""
        name = f"{self.model}-{self.dataset_name}-{self.attack}-s{self.seed}"
        name += "" if self.defense == "lethe" else f"-{self.defense.replace(',', '+')}"
        files = load(self.model, self.dataset, self.attack, self.defense, {"seed": self.seed})
        return name if files == self else f"{name}-{digest(self.model_dump())[:6]}"


def table(p: Params, *groups: type[Group]) -> "pd.DataFrame":
    """The params one notebook depends on, to be shown."""
    import pandas as pd

    return pd.DataFrame({"value": {k: str(v) for k, v in p.part(*groups).items()}})


def digest(value: Any) -> str:
    """SHA-256 of a JSON-able value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def is_file(dataset: str) -> bool:
    """Whether `dataset` names a data file, not a set in params/datasets."""
    return Path(dataset).suffix.lower() in {".jsonl", ".json", ".csv", ".tsv", ".parquet"}


def read_yaml(path: Path) -> dict[str, Any]:
    """One params file as a dict. Raises LetheError when it is not a flat mapping."""
    try:
        values = yaml.load(path.read_text("utf8"), Loader=_LOADER) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LetheError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise LetheError(f"{path}: expected `key: value` lines, found {type(values).__name__}")
    return values


def choices(kind: str) -> list[str]:
    """Names that have a params file of this kind (models, datasets, attacks, defenses)."""
    return sorted(p.stem for p in (paths.params_dir() / kind).glob("*.yaml"))


def _named_file(kind: str, name: str) -> Path:
    if name not in choices(kind):
        raise LetheError(
            f"{kind[:-1]} {name!r} has no file params/{kind}/{name}.yaml; "
            f"choose one of {', '.join(choices(kind))}"
        )
    return paths.params_dir() / kind / f"{name}.yaml"


def defense_names(defense: str) -> list[str]:
    """`all`, or names joined by commas, as a list.

    Raises:
        LetheError: a name has no params file, or stands there twice.
    """
    names = choices("defenses") if defense == "all" else defense.split(",")
    for name in names:
        _named_file("defenses", name)
    if len({*names}) < len(names):
        raise LetheError(f"defense: {defense}: a name stands there twice")
    return names


def layers(model: str, dataset: str, attack: str) -> list[Path]:
    """The params files of a run, weakest first."""
    folder = paths.params_dir()
    if is_file(dataset) and not Path(dataset).exists():
        raise LetheError(f"dataset: the file {dataset} does not exist")
    dataset_file = "file" if is_file(dataset) else dataset
    model_file = _named_file("models", model)
    found = [folder / "base.yaml", _named_file("datasets", dataset_file)]
    if model.startswith("tiny-"):
        found.append(folder / "profiles" / "tiny.yaml")
        found.append(folder / "profiles" / f"tiny-{dataset_file}.yaml")
    found += [model_file, _named_file("attacks", attack)]
    if model.startswith("tiny-"):
        found.append(folder / "attacks" / attack / "tiny.yaml")
    found.append(folder / "attacks" / attack / f"{model}.yaml")
    for defense in choices("defenses"):
        found.append(folder / "defenses" / f"{defense}.yaml")
        if model.startswith("tiny-"):
            found.append(folder / "defenses" / defense / "tiny.yaml")
        found.append(folder / "defenses" / defense / f"{model}.yaml")
    return [path for path in found if path.exists()]


def load(
    model: str = "tiny-gpt2",
    dataset: str = "embedded",
    attack: str = "cba",
    defense: str = "lethe",
    overrides: dict[str, Any] | None = None,
) -> Params:
    """Layer the files of a run and check every value.

    Args:
        dataset: embedded, emotion, sst2, or a data file.
        defense: lethe, all, or names in params/defenses joined by commas.
        overrides: values from the command line or a notebook; they win.
    Raises:
        LetheError: naming the file and the key of each wrong value.
    """
    values: dict[str, Any] = {"model": model, "dataset": dataset, "attack": attack}
    values["defense"] = defense
    for name in values.keys() & (overrides or {}).keys():  # too late: it decides which files
        raise LetheError(f"command line: {name}: give it as an argument (see --help), not with -p")
    source = dict.fromkeys(values, "command line")
    defense_names(defense)
    for path in layers(model, dataset, attack):
        for key, value in read_yaml(path).items():
            values[key], source[key] = value, str(path.relative_to(paths.root()))
    for key, value in (overrides or {}).items():
        values[key], source[key] = value, "command line"
    return _checked(Params, values, source)


SMALL = 50_000_000  # weights; params/purify/small.yaml is for models below


def load_purify(weights: int, device: str, overrides: dict[str, Any] | None = None) -> PurifyParams:
    """The params of `purify`: base < purify < purify/cpu < purify/small < command line.

    Args:
        weights: of the model; small ones train with another recipe.
        device: cpu or cuda.
    Raises:
        LetheError: naming the file and the key of each wrong value.
    """
    folder = paths.params_dir()
    own = [folder / "purify.yaml"]
    own += [folder / "purify" / "cpu.yaml"] if device == "cpu" else []
    own += [folder / "purify" / "small.yaml"] if weights < SMALL else []
    fields = PurifyParams.model_fields
    values = {k: v for k, v in read_yaml(folder / "base.yaml").items() if k in fields}
    source = dict.fromkeys(values, "params/base.yaml")
    for file in own:
        layer = read_yaml(file)
        values |= layer
        source |= dict.fromkeys(layer, str(file.relative_to(paths.root())))
    values |= overrides or {}
    source |= dict.fromkeys(overrides or {}, "command line")
    return _checked(PurifyParams, values, source).model_copy(update={"device": device})


def _checked(group: type[T], values: dict[str, Any], source: dict[str, str]) -> T:
    """The values as params; `source` names each one's file, for the errors."""
    try:
        return group(**values)
    except ValidationError as error:
        raise LetheError("\n".join(_explain(e, source) for e in error.errors())) from None


def _explain(error: dict[str, Any], source: dict[str, str]) -> str:
    """One line for one wrong value: file, key, what is wrong, the fix."""
    key = str(error["loc"][0]) if error["loc"] else ""
    given = error.get("input")
    if not key:  # raised by a model validator, whose message starts with the key
        message = str(error["ctx"]["error"])
        return f"{source.get(message.split(':')[0].split(',')[0], 'params')}: {message}"
    where = f"{source.get(key, 'params')}: {key}"
    if error["type"] == "extra_forbidden":
        close = _closest(key)
        return f"{where}: unknown key" + (f"; did you mean {close}?" if close else "")
    if error["type"] == "missing":
        return f"{where}: missing; set it in params/base.yaml"
    if error["type"] in ("float_type", "int_type") and isinstance(given, str):
        return f"{where}: {given!r} is text, not a number; YAML needs a dot, as in 1.0e-4"
    return f"{where}: {error['msg']} (got {given!r})"


def _closest(key: str) -> str | None:
    import difflib

    known = Params.model_fields | PurifyParams.model_fields
    return next(iter(difflib.get_close_matches(key, known, 1)), None)


_checked_once = False


def from_notebook(variables: dict[str, Any], also: tuple[str, ...] = ()) -> Params:
    """The Params of a notebook: what stands in its `parameters` cell, or what papermill injected.

    Any key of params/base.yaml may be added to that cell. Papermill only warns on a name it does
    not know, so the first call in a kernel treats every plain public variable as a parameter and
    refuses the unknown ones; later calls (a cell run twice) take the known ones.

    Args:
        variables: the notebook's globals().
        also: names in the cell that belong to that notebook alone, not to the params.
    """
    global _checked_once
    plain = (str, int, float, bool, list, dict, type(None))
    given = {k: v for k, v in variables.items() if not k.startswith("_") and type(v) in plain}
    given = {k: v for k, v in given.items() if k not in {"In", "Out", *also}}
    if _checked_once:
        given = {k: v for k, v in given.items() if k in Params.model_fields}
    _checked_once = True
    names = {k: given.pop(k) for k in ("model", "dataset", "attack", "defense") if k in given}
    return load(**names, overrides=given)
