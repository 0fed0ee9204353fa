"""Parameters: flat keys, layered files, one strict schema, checked before any work starts.

Later layers win: base < dataset < the model's profile < model < attack < defenses < command line or
notebook. A profile or model may hold values for one data set (`datasets:`), a method's file values
for one model or profile (`models:`), or for one model on one data set (`MODEL/DATASET` there); they
win over the file's other values. The files of all
defenses are read, whichever run: their keys do not overlap. Unknown keys, wrong types and values
out of range are refused with the file and the key named. The keys: groups.py, and each method's
module.
"""

import difflib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from lethe_utils import attacks, paths
from lethe_utils.errors import LetheError
from lethe_utils.groups import (
    DEFAULT_ATTACK,
    DEFAULT_DATASET,
    DEFAULT_DEFENSE,
    DEFAULT_MODEL,
    Group,
)
from lethe_utils.groups import AttackParams as AttackParams
from lethe_utils.groups import BaseModelParams as BaseModelParams
from lethe_utils.groups import CleanParams as CleanParams
from lethe_utils.groups import DataParams as DataParams
from lethe_utils.groups import EvaluateParams as EvaluateParams
from lethe_utils.groups import SweepParams as SweepParams
from lethe_utils.groups import TrainParams as TrainParams
from lethe_utils.groups import UtilityParams as UtilityParams
from lethe_utils.schema import Params, choices, is_file, schema

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T", bound=BaseModel)
Layer = tuple[str, dict[str, Any]]  # the file (and its section), and what it sets
SECTIONS = ("datasets", "models")
# A run reads thirty files: libyaml's parser is ten times as fast.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def default_model() -> str:
    """The model of a run that names none. LETHE_MODEL puts another there, so that the tests run the
    notebooks as they stand, on a tiny twin."""
    return os.environ.get("LETHE_MODEL") or DEFAULT_MODEL


def load(
    model: str | None = None,
    dataset: str = DEFAULT_DATASET,
    attack: str = DEFAULT_ATTACK,
    defense: str = DEFAULT_DEFENSE,
    overrides: dict[str, Any] | None = None,
) -> Params:
    """Layer the files of a run and check every value.

    Args:
        model: None: see default_model.
        dataset: embedded, emotion, sst2, chat, or a data file.
        defense: lethe, all, or names in params/defenses joined by commas.
        overrides: values from the command line or a notebook; they win.
    Raises:
        LetheError: naming the file and the key of each wrong value.
    """
    model, overrides = model or default_model(), overrides or {}
    names = {"model": model, "dataset": dataset, "attack": attack, "defense": defense}
    for name in names.keys() & overrides.keys():  # too late: it decides which files
        raise LetheError(f"command line: {name}: give it as an argument (see --help), not with -p")
    defense_names(defense)
    values, set_in = layered([("command line", names), *layers(model, dataset, attack)])
    changed = {k: v for k, v in overrides.items() if k not in values or values[k] != v}
    p = checked(
        run_schema(attack), values | overrides, set_in | dict.fromkeys(overrides, "command line")
    )
    p._set_in, p._overridden = set_in | dict.fromkeys(changed, "command line"), changed
    return p


def run_schema(attack: str) -> type[Params]:
    """The schema of a run. Raises LetheError when there is no such attack."""
    _named_file("attacks", attack)
    return schema(attack)


def layers(model: str, dataset: str, attack: str) -> Iterator[Layer]:
    """What the params files of a run set, weakest first."""
    if is_file(dataset) and not Path(dataset).exists():
        raise LetheError(f"dataset: the file {dataset} does not exist")
    attack_file = _named_file("attacks", attack)
    if is_file(dataset):  # of conversations, where the attack is on some
        dataset = "chat_file" if attacks.task(attack) == "chat" else "file"
    file = _named_file("models", model)
    profile = read_yaml(file).get("profile")
    like = ["chat"] if dataset == "chat_file" else []
    chosen = [*like, dataset, *([profile] if profile else []), model, f"{model}/{dataset}"]
    yield from read_layers("base.yaml", chosen)
    yield from read_layers(_named_file("datasets", dataset), chosen)
    if profile is not None:
        yield from read_layers(_named_file("profiles", profile), chosen)
    for where, values in read_layers(file, chosen):
        yield where, {key: value for key, value in values.items() if key != "profile"}
    yield from read_layers(attack_file, chosen)
    for defense in choices("defenses"):
        yield from read_layers(_named_file("defenses", defense), chosen)


def read_layers(file: Path | str, chosen: list[str]) -> Iterator[Layer]:
    """A file's values, then those of its sections for the chosen data set, profile and model."""
    path = paths.params_dir() / file
    where, values = str(path.relative_to(paths.root())), read_yaml(path)
    sections = {kind: values.pop(kind) for kind in SECTIONS if kind in values}
    yield where, values
    for kind, section in sections.items():
        known = choices(kind) + (choices("profiles") if kind == "models" else [])
        for name in section:
            model, slash, dataset = name.partition("/") if kind == "models" else (name, "", "")
            named = model in known and (not slash or dataset in choices("datasets"))
            if not named or not isinstance(section[name], dict):
                raise LetheError(f"{where}: {kind}: {name}: expected one of {', '.join(known)}")
        for name in chosen:
            if name in section:
                yield f"{where} ({name})", section[name]


def layered(found: list[Layer]) -> tuple[dict[str, Any], dict[str, str]]:
    """All values, and where each was set."""
    values: dict[str, Any] = {}
    set_in: dict[str, str] = {}
    for where, layer in found:
        values |= layer
        set_in |= dict.fromkeys(layer, where)
    return values, set_in


def read_yaml(path: Path) -> dict[str, Any]:
    """One params file as a dict. Raises LetheError when it is not a flat mapping."""
    try:
        values = yaml.load(path.read_text("utf8"), Loader=_LOADER) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LetheError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise LetheError(f"{path}: expected `key: value` lines, found {type(values).__name__}")
    return values


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


def table(p: Params, *groups: type[Group]) -> "pd.DataFrame":
    """The params one notebook depends on, all of them without `groups`: value, set in."""
    import pandas as pd

    shown = p.part(*groups) if groups else dict(sorted(p.model_dump().items()))
    lines = {k: {"value": str(v), "set in": p._set_in.get(k, "")} for k, v in shown.items()}
    return pd.DataFrame.from_dict(lines, orient="index")


def checked(group: type[T], values: dict[str, Any], source: dict[str, str]) -> T:
    """The values as params; `source` names each one's file, for the errors."""
    try:
        return group(**values)
    except ValidationError as error:
        raise LetheError("\n".join(_explain(e, source, group) for e in error.errors())) from None


def _explain(error: dict[str, Any], source: dict[str, str], group: type[BaseModel]) -> str:
    """One line for one wrong value: file, key, what is wrong, the fix."""
    key = str(error["loc"][0]) if error["loc"] else ""
    given = error.get("input")
    if not key:  # raised by a model validator, whose message starts with the key
        message = str(error["ctx"]["error"])
        return f"{source.get(message.split(':')[0].split(',')[0], 'params')}: {message}"
    where = f"{source.get(key, 'params')}: {key}"
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, group.model_fields, 1)
        return f"{where}: unknown key" + (f"; did you mean {close[0]}?" if close else "")
    if error["type"] == "missing":
        return f"{where}: missing; set it in params/base.yaml"
    if error["type"] in ("float_type", "int_type") and isinstance(given, str):
        return f"{where}: {given!r} is text, not a number; YAML needs a dot, as in 1.0e-4"
    return f"{where}: {error['msg']} (got {given!r})"


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
    names = {k: given.pop(k) for k in ("model", "dataset", "attack", "defense") if k in given}
    if names.get("model") == DEFAULT_MODEL:
        names["model"] = default_model()
    if _checked_once:
        known = run_schema(names.get("attack", DEFAULT_ATTACK)).model_fields
        given = {k: v for k, v in given.items() if k in known}
    _checked_once = True
    return load(**names, overrides=given)
