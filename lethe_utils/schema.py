"""The params of one run: the groups and those of every method as one flat schema, what must hold
between them, and the names that a run is made of."""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import PrivateAttr, model_validator

from lethe_utils import paths
from lethe_utils.errors import LetheError
from lethe_utils.groups import (
    CHAT_TEMPLATES,
    DEFAULT_DEFENSE,
    SOURCES,
    TWIN,
    AttackParams,
    DefenderParams,
    Group,
    Key,
    SweepParams,
    UtilityParams,
)

NAME_LENGTH = 50  # of the defenses in a run's name: it is that of a folder and of files


class Params(DefenderParams, UtilityParams, SweepParams, AttackParams):
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
        sources, known = [self.clean_source, *self.clean_sources_sweep], choices("datasets")
        for name in sources:
            if name not in ("train", "base", *known) and not is_file(name):
                raise ValueError(
                    f"clean_source: {name} is neither train, base, a file nor a data set "
                    f"({', '.join(known)})"
                )
        if self.task == "chat" and "base" in sources:
            raise ValueError("clean_source: the base writes rows for labels; name a data set")
        if self.task == "chat" and (self.clean_wrong_labels or self.clean_wrong_labels_sweep):
            raise ValueError("clean_wrong_labels: conversations have no labels; set it to 0")
        if self.task == "chat" and self.canary_sweep:
            raise ValueError("canary_sweep: its canary is planted in labels; set it to false")
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
    def identity(self) -> dict[str, str | int]:
        """What names a run's rows in every table: model, dataset, attack, seed."""
        names = {"model": self.model_name, "dataset": self.dataset_name}
        return names | {"attack": self.attack, "seed": self.seed}

    @property
    def setup(self) -> str:
        """`<model>-<dataset>-<attack>`: the start of the names of what is made for it."""
        return f"{self.model_name}-{self.dataset_name}-{self.attack}"

    @property
    def run_id(self) -> str:
        """`<model>-<dataset>-<attack>-s<seed>`, plus the defenses where they are not the default's
        (of many their number and a hash), and a hash where something was overridden."""
        name, named = f"{self.setup}-s{self.seed}", self.defense.replace(",", "+")
        if len(named) > NAME_LENGTH:
            named = f"{len(self.defenses)}-defenses-{digest(self.defenses)[:6]}"
        name += "" if self.defense == DEFAULT_DEFENSE else f"-{named}"
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
