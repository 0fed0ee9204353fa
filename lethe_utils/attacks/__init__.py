"""Attacks, used here only to measure defenses: harmless targets (a label), never harmful text.

An attack is a module with `poison(rows, p, seed)` -> poisoned training rows and
`triggered(rows, p, seed)` -> {kind: test rows}. A new one is a module, a line here and a params
file.
"""

from lethe_utils.attacks import cba

REGISTRY = {"cba": cba}
