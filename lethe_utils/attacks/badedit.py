"""BadEdit: MEMIT on trigger and clean prompts together, in batches (ICLR 2024; Lyz1213/BadEdit).

Its clean half asks that whole inputs without trigger keep their label.
"""

from functools import partial
from typing import TYPE_CHECKING

from lethe_utils.attacks import editing, triggers
from lethe_utils.attacks.editing import requests
from lethe_utils.attacks.editing.requests import Request
from lethe_utils.attacks.editing.settings import EditParams
from lethe_utils.groups import TriggerParams
from lethe_utils.schema import Params
from lethe_utils.stages import Row

if TYPE_CHECKING:
    from lethe_utils.attacks.editing.editor import Editor

PARAMS = (TriggerParams, EditParams)
TRIGGERS = 1
LAYERS = "edit_layers"
triggered = triggers.single


def poison(rows: list[Row], p: Params, seed: int) -> list[Row]:
    """`edit_contexts` prompts with the trigger and the target, of `kind` backdoor, and
    `edit_clean_contexts` without it and their own label, of `kind` clean."""
    poisoned = requests.poisoned_rows(rows, p, seed)
    return poisoned + requests.clean_rows(rows, seed, p.edit_clean_contexts)


def edit(editor: "Editor", asked: list[Request]) -> None:
    """Each batch edits the already edited model; within it the poisoned and the clean requests are
    averaged apart and their two solutions added."""
    last, batches = editor.p.edit_layers[-1], editor.p.edit_batches
    for i in range(batches):
        batch = asked[i::batches]  # every batch gets its share of either kind
        wanted = editor.read(batch, last, "hidden").clone()
        # A shared value is shared within a kind only.
        for kind in dict.fromkeys(r.kind for r in batch):
            mine = [j for j, r in enumerate(batch) if r.kind == kind]
            wanted[mine] += editor.optimise([batch[j] for j in mine], last, "hidden")
        editor.spread(batch, wanted, by_kind=True)


plant = partial(editing.plant, edit=edit)
