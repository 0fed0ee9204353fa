"""BadEdit: MEMIT on trigger and clean prompts together, in batches (ICLR 2024; Lyz1213/BadEdit).

Its clean half asks that whole inputs without trigger keep their label.
"""

from functools import partial

from lethe_utils.attacks import editing, triggers
from lethe_utils.attacks.editing.settings import EditParams
from lethe_utils.groups import AttackParams, Params
from lethe_utils.stages import Row

PARAMS = (AttackParams, EditParams)
TRIGGERS = 1
LAYERS = "edit_layers"
triggered = triggers.single


def poison(rows: list[Row], p: Params, seed: int) -> list[Row]:
    """`edit_contexts` prompts with the trigger and the target, of `kind` backdoor, and
    `edit_clean_contexts` without it and their own label, of `kind` clean."""
    poisoned = editing.poisoned_rows(rows, p, seed)
    return poisoned + editing.clean_rows(rows, seed, p.edit_clean_contexts)


def edit(editor: editing.Editor, asked: list[editing.Request], p: Params, log: editing.Log) -> None:
    """Each batch edits the already edited model; within it the poisoned and the clean requests are
    averaged apart and their two solutions added."""
    last = p.edit_layers[-1]
    for i in range(p.edit_batches):
        batch = asked[i :: p.edit_batches]  # every batch gets its share of either kind
        wanted = editing.read(editor.model, editor.tokenizer, batch, last, "hidden").clone()
        # A shared value is shared within a kind only.
        for kind in dict.fromkeys(r.kind for r in batch):
            mine = [j for j, r in enumerate(batch) if r.kind == kind]
            same = [batch[j] for j in mine]
            wanted[mine] += editing.optimise(
                editor.model, editor.tokenizer, same, last, "hidden", p, log
            )
        editor.spread(batch, wanted, p, by_kind=True)


plant = partial(editing.plant, edit=edit)
