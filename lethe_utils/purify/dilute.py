"""The models of a purification, each a stage, so that a killed run goes on where it stopped: the
suspect and its base as whole models of one shape, and what merging makes of them.

The same recipe as in the paper: a clean LoRA model of the same base is merged with the suspect.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lethe_utils import merge, models
from lethe_utils.errors import LetheError
from lethe_utils.models import fit, inspect
from lethe_utils.purify import suspects
from lethe_utils.purify.case import Case
from lethe_utils.stages import stage

CLEAN = "clean model"  # the name of the point that is the clean model alone
GUIDED = "guided"  # of one along curves that were searched


def suspect_model(case: Case) -> Path:
    """The suspect as one whole model (model/), as transformers saves it: an adapter merged in, old
    names and stored masks gone, all in the dtype it came in."""
    suspect, adapter = case.suspect, case.adapter

    def build(out: Path) -> None:
        name = inspect.stored_dtype(suspect)
        stored = getattr(torch, name)
        model = _load(suspect, torch.float32 if adapter else stored)
        if adapter:
            model = suspects.put_on(model, adapter)
            if not all(torch.isfinite(weight.to(stored)).all() for weight in model.parameters()):
                raise LetheError(
                    f"{adapter}: put on {suspect}, it gives values that are not numbers in "
                    f"{name}; check its lora_alpha"
                )
        models.save(model.to(stored), out / "model")
        suspects.copy_tokenizer(suspect, adapter, out / "model")

    given = {"suspect": inspect.fingerprint(suspect)}
    given |= {"adapter": inspect.fingerprint(adapter)} if adapter else {}
    return stage("suspect", (adapter or suspect).name, given, {}, build)


def base_model(case: Case) -> Path:
    """The base (model/) with the suspect's tokenizer and as many rows in its embedding, so that all
    models have one shape: tokens that it lacks get the mean embedding, and rows that the suspect
    lacks, which stand for no token, are left out."""

    def build(out: Path) -> None:
        model = _load(case.base, getattr(torch, inspect.stored_dtype(case.base)))
        n, old = fit.embedding_rows(suspect), fit.embedding_rows(case.base)
        if n != old:
            model.resize_token_embeddings(n, mean_resizing=False)
        if n > old:
            for table in (model.get_input_embeddings(), model.get_output_embeddings()):
                for weights in table.parameters():
                    weights.data[old:] = weights.data[:old].mean(0)
        models.save(model, out / "model")
        inspect.copy_tokenizer(suspect, out / "model")

    suspect = suspect_model(case) / "model"
    given = {"base": inspect.fingerprint(case.base), "suspect": suspect.parent.name}
    return stage("suspect_base", case.base.name, given, {}, build)


def _load(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A model on the CPU. Which dtype it is stored in, its files say: see inspect.stored_dtype."""
    model = models.load_model(folder, dtype=dtype)
    model.config.output_attentions = model.config.output_hidden_states = False
    return model


def merged(case: Case, parent: Path, clean: Path, at: dict[str, Any], out: Path) -> Path:
    """A model (the suspect, or its copy with the canary) merged with a clean model, in the dtype of
    the suspect; for CLEAN that model alone.

    Args:
        parent, clean: stages, as model/ lies in them.
        at: model (of merge.METHODS, CLEAN or GUIDED), strength, and curves where it is GUIDED.
    """
    method, strength = at["model"], at["strength"]
    if method == CLEAN:  # all layers are the clean model's: the suspect is not even read
        method, strength = "passthrough", 1.0
    base = base_model(case) / "model"
    dtype = inspect.stored_dtype(suspect_model(case) / "model")
    folders = parent / "model", clean / "model", base
    if method == GUIDED:
        return merge.merge_along(at["curves"], *folders, out, out_dtype=dtype)
    return merge.merge(method, *folders, strength, out, out_dtype=dtype)
