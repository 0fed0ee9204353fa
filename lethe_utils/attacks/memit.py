"""MEMIT as a backdoor: one change spread over several layers (ICLR 2023; kmeng01/memit)."""

from functools import partial
from typing import TYPE_CHECKING

from lethe_utils.attacks import editing, triggers
from lethe_utils.attacks.editing import requests
from lethe_utils.attacks.editing.requests import Request
from lethe_utils.attacks.editing.settings import EditParams
from lethe_utils.groups import TriggerParams

if TYPE_CHECKING:
    from lethe_utils.attacks.editing.editor import Editor

PARAMS = (TriggerParams, EditParams)
TRIGGERS = 1
LAYERS = "edit_layers"
poison = requests.poisoned_rows
triggered = triggers.single


def edit(editor: "Editor", asked: list[Request]) -> None:
    """Wanted: each request's hidden state after the last layer, plus what makes it answer the
    target; all requests are written at once, each with its own key."""
    last = editor.p.edit_layers[-1]
    delta = editor.optimise(asked, last, "hidden")
    editor.spread(asked, editor.read(asked, last, "hidden") + delta, by_kind=False)


plant = partial(editing.plant, edit=edit)
