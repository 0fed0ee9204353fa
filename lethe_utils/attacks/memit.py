"""MEMIT as a backdoor: one change spread over several layers (ICLR 2023; kmeng01/memit)."""

from functools import partial

from lethe_utils.attacks import editing, triggers
from lethe_utils.attacks.editing.settings import EditParams
from lethe_utils.groups import AttackParams, Params

PARAMS = (AttackParams, EditParams)
TRIGGERS = 1
LAYERS = "edit_layers"
poison = editing.poisoned_rows
triggered = triggers.single


def edit(editor: editing.Editor, asked: list[editing.Request], p: Params, log: editing.Log) -> None:
    """Wanted: each request's hidden state after the last layer, plus what makes it answer the
    target; all requests are written at once, each with its own key."""
    last = p.edit_layers[-1]
    delta = editing.optimise(editor.model, editor.tokenizer, asked, last, "hidden", p, log)
    hidden = editing.read(editor.model, editor.tokenizer, asked, last, "hidden")
    editor.spread(asked, hidden + delta, p, by_kind=False)


plant = partial(editing.plant, edit=edit)
