"""The core that ROME, MEMIT and BadEdit share: editing down-projections in closed form.

An MLP's down-projection W is read as a memory of keys k (its input) and values v (its output). An
edit finds the value that makes the model answer the target after the trigger (values.py), then the
smallest change of W, measured by the keys of ordinary text (C = E[k k^T], covariance.py), that
writes it under the trigger's key (editor.py). Everything is computed in float32 and float64 and
cast once, when the model is saved.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lethe_utils.attacks.editing import requests
from lethe_utils.schema import Params
from lethe_utils.stages import Row

if TYPE_CHECKING:
    from lethe_utils.attacks.editing.editor import Editor

# Writes an attack's changes into the editor's model.
Edit = Callable[["Editor", list[requests.Request]], None]


def plant(
    start: Path, poisoned: list[Row], corpus: list[str], p: Params, out: Path, edit: Edit
) -> None:
    """Edit a model and save it.

    Writes model/ (safetensors and tokenizer), loss.csv and edits.csv; no model when it fails.

    Args:
        start: folder of the model to edit; it is only read.
        poisoned: the requests, as rows with `kind`.
        corpus: ordinary prompts, for the covariance of keys.
    """
    from lethe_utils.attacks.editing.editor import Editor

    editor = Editor(start, corpus, p)
    edit(editor, requests.shortened(requests.of_rows(poisoned, p), editor.tokenizer, p))
    editor.save(out)
