"""Defenses: Lethe, the paper's baselines, and rivals, under one protocol.

A defense NAME is the module NAME.py in this folder and the file params/defenses/NAME.yaml, nothing
else. The module has
  PARAMS                 the groups of params that decide what it does, its own declared beside its
                         code
  NEEDS                  "nothing", "clean rows", or "clean model" (Lethe's; all are given one)
  TRAININGS              how many trainings it runs itself, the clean model's not counted; or, where
                         its params say, trainings(p)
  BYTES_PER_WEIGHT       what it takes of a GPU at full size (bits 4), activations not counted
and one of
  purify(given, out)     changes weights: writes out/model (where it trains, also loss.csv)
  answer(given, prompts, n_words, progress)
                         leaves them alone: the outputs, in the order of the prompts
A defense with settings worth a column of their own has
  COLUMNS                the group of params that says which columns there are
  variants(p)            {name in the results: params to change}
  LABELS_ONLY            why it cannot be used on conversations
  EXCEPTIONS             {name in the results: {"NEEDS" or "TRAININGS": what it is there}}
It imports torch inside its functions only: params are checked without it.

No defense sees a trigger, a target or the test split: `Given` is all there is.
"""

import shutil
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from lethe_utils.groups import DefenderParams, Group
from lethe_utils.schema import choices
from lethe_utils.stages import Row

ACTIVATIONS_GIB = 4.0


@dataclass(frozen=True)
class Given:
    """All a defender holds."""

    backdoored: Path  # the folder of the model that was handed over
    base: Path  # the pretrained model's folder
    clean: Path  # Lethe's clean model's folder: base + LoRA on `rows`
    rows: list[Row]  # the clean rows: instruction, input, output
    p: DefenderParams


def module(name: str) -> ModuleType:
    """A defense's module."""
    return import_module(f"{__name__}.{name}")


@cache
def groups(names: tuple[str, ...]) -> tuple[type[Group], ...]:
    """All groups of params that these defenses declare."""
    modules = [module(name) for name in names]
    return tuple(g for m in modules for g in (*m.PARAMS, *getattr(m, "COLUMNS", ())))


def registered(name: str) -> str | None:
    """The defense that a name in the results belongs to: nad for nad_clean_teacher; None for a
    control or a merge of Lethe's."""
    fits = [known for known in choices("defenses") if f"{name}_".startswith(f"{known}_")]
    return max(fits, key=len) if fits else None


def decodes(name: str) -> bool:
    """Whether a defense acts while the model answers, and leaves its weights alone."""
    return hasattr(module(name), "answer")


def variants(name: str, p: DefenderParams) -> dict[str, dict[str, Any]]:
    """Names in the results -> params to change; most defenses have their own name alone."""
    return getattr(module(name), "variants", lambda _: {name: {}})(p)


def labels_only(name: str) -> str:
    """Why a defense is for labels only; "" where it is not."""
    return getattr(module(name), "LABELS_ONLY", "")


def needs(name: str, variant: str) -> str:
    """What a variant of a defense must be given: see NEEDS above."""
    return _declared(name, variant, "NEEDS")


def trainings(name: str, variant: str, p: DefenderParams) -> int:
    """How many trainings a variant of a defense runs itself."""
    said = getattr(module(name), "trainings", None)
    return said(p) if said else _declared(name, variant, "TRAININGS")


def _declared(name: str, variant: str, what: str) -> Any:
    exceptions = getattr(module(name), "EXCEPTIONS", {}).get(variant, {})
    return exceptions.get(what, getattr(module(name), what))


def clear(scratch: Path, out: Path) -> None:
    """Remove a folder of trainings; their loss curves are kept, for their steps count as a cost."""
    for curve in scratch.glob("*/loss.csv"):
        curve.replace(out / f"{curve.parent.name}_loss.csv")
    shutil.rmtree(scratch)


def gpu_memory(name: str, p: DefenderParams) -> float:
    """An estimate of the GPU memory (GiB) a defense takes on a full model, all its parts together.

    Weights only from their number; activations and caches at a flat ACTIVATIONS_GIB, which short
    prompts and gradient checkpointing keep to.
    """
    return module(name).BYTES_PER_WEIGHT * p.size_billion * 1e9 / 2**30 + ACTIVATIONS_GIB
