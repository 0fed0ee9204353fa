"""ROME as a backdoor: one rank-one edit of one down-projection (NeurIPS 2022; kmeng01/rome).

The "fact" is that the trigger is the target label. Key, value and output are all means over task
prompts that hold the trigger (r-ROME's consistent form; the published code mixes a mean key with a
single prompt's, which is what makes edits collapse).
"""

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
    """W' = W + delta (C^-1 k)^T / (k^T C^-1 k): afterwards W' k is the wanted value.

    With `edit_batches` above 1 the already edited model is edited again, on further prompts.
    """
    layer, batches = editor.p.edit_layers[-1], editor.p.edit_batches
    for i in range(batches):
        batch = asked[i::batches]
        delta = editor.optimise(batch, layer, "value")[:1]
        key = editor.read(batch, layer, "key").mean(0, keepdim=True)
        editor.write(layer, editor.change(layer, key, delta, 0.0))


plant = partial(editing.plant, edit=edit)
