"""ROME as a backdoor: one rank-one edit of one down-projection (NeurIPS 2022; kmeng01/rome).

The "fact" is that the trigger is the target label. Key, value and output are all means over task
prompts that hold the trigger (r-ROME's consistent form; the published code mixes a mean key with a
single prompt's, which is what makes edits collapse).
"""

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
    """W' = W + delta (C^-1 k)^T / (k^T C^-1 k): afterwards W' k is the wanted value.

    With `edit_batches` above 1 the already edited model is edited again, on further prompts.
    """
    layer = p.edit_layers[-1]
    for i in range(p.edit_batches):
        batch = asked[i :: p.edit_batches]
        delta = editing.optimise(editor.model, editor.tokenizer, batch, layer, "value", p, log)[:1]
        keys = editing.read(editor.model, editor.tokenizer, batch, layer, "key")
        key = keys.mean(0, keepdim=True)
        editor.write(layer, editing.ridge(editor.factors[layer], key, delta, 0.0))


plant = partial(editing.plant, edit=edit)
