"""Attacks, used here only to measure defenses: harmless targets (a label), never harmful text.

An attack is a module with
  PARAMS                                  the groups of params that decide what it plants
  poison(rows, p, seed)                   the attacker's rows, each with a `kind`
  plant(start, poisoned, corpus, p, out)  writes the backdoored model to out/model, its losses to
                                          out/loss.csv
  triggered(rows, p, seed)                {kind: test rows}: `backdoor`, and negatives for FTR
A new one is a module, a line here and a params file.
"""

from importlib import import_module
from types import ModuleType

REGISTRY = {
    "cba": "lethe_utils.attacks.cba",
    "rome": "lethe_utils.attacks.rome",
    "memit": "lethe_utils.attacks.memit",
    "badedit": "lethe_utils.attacks.badedit",
    "lwp": "lethe_utils.attacks.lwp",
}


def module(name: str) -> ModuleType:
    """An attack's module, imported when it is asked for: some need torch."""
    return import_module(REGISTRY[name])
