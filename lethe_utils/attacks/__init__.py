"""Attacks, used here only to measure defenses: harmless targets (a label), never harmful text.

An attack NAME is the module NAME.py in this folder and the file params/attacks/NAME.yaml, nothing
else. The module has
  PARAMS                                  the groups of params that decide what it plants, its own
                                          declared beside its code
  TRIGGERS                                how many triggers it takes
  TASK                                    "chat" where it is for conversations; else for labels
  WORDNET                                 True where it poisons with WordNet's definitions
  LAYERS                                  the param that names the model's blocks it acts on, or ""
  poison(rows, p, seed)                   the attacker's rows, each with a `kind`
  plant(start, poisoned, corpus, p, out)  writes the backdoored model to out/model, its losses to
                                          out/loss.csv
  triggered(rows, p, seed)                {kind: test rows}: `backdoor`, and negatives for FTR
  hit(answer, p)                          for conversations: whether an answer is the attacker's
It imports torch inside its functions only: params are checked without it.
"""

from importlib import import_module
from types import ModuleType


def module(name: str) -> ModuleType:
    """An attack's module."""
    return import_module(f"{__name__}.{name}")


def task(name: str) -> str:
    """What data an attack is for: label or chat."""
    return getattr(module(name), "TASK", "label")
