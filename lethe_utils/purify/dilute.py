"""The models of a purification, each a stage, so that a killed run goes on where it stopped.

The same recipe as in the paper: a clean LoRA model of the same base is merged with the suspect.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lethe_utils import merge, models
from lethe_utils.errors import LetheError
from lethe_utils.models import fit, inspect
from lethe_utils.params import digest
from lethe_utils.purify import adapters, canary
from lethe_utils.purify.case import Case
from lethe_utils.stages import stage, write_jsonl

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

MEASURING = {"strengths", "max_cda_loss", "merge_method", "n_keywords", "eval_batch_size"}


def spec(case: Case) -> dict[str, Any]:
    """What decides a trained model, besides the model it starts from."""
    # The rows themselves, not their file: a chat template may write today's date into them.
    rows = digest([case.train, case.held_out])
    return case.p.model_dump(exclude=MEASURING) | {"rows": rows}


def suspect_model(case: Case) -> Path:
    """The suspect as one whole model (model/), as transformers saves it: an adapter merged in, old
    names and stored masks gone, all in the dtype it came in."""
    suspect, adapter = case.suspect, case.adapter

    def build(out: Path) -> None:
        import torch

        name = inspect.stored_dtype(suspect)
        stored = getattr(torch, name)
        model = _load(suspect, torch.float32 if adapter else stored)
        if adapter:
            from peft import PeftModel

            with inspect.explained(adapter, "adapter"):
                model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
            if not all(torch.isfinite(weight.to(stored)).all() for weight in model.parameters()):
                raise LetheError(
                    f"{adapter}: put on {suspect}, it gives values that are not numbers in "
                    f"{name}; check its lora_alpha"
                )
        _save(model.to(stored), out)
        adapters.copy_tokenizer(suspect, adapter, out / "model")

    given = {"suspect": inspect.fingerprint(suspect)}
    given |= {"adapter": inspect.fingerprint(adapter)} if adapter else {}
    return stage("suspect", (adapter or suspect).name, given, {}, build)


def base_model(case: Case) -> Path:
    """The base (model/) with the suspect's tokenizer and as many rows in its embedding, so that all
    models have one shape: tokens that it lacks get the mean embedding, and rows that the suspect
    lacks, which stand for no token, are left out."""

    def build(out: Path) -> None:
        import torch

        model = _load(case.base, getattr(torch, inspect.stored_dtype(case.base)))
        n, old = fit.embedding_rows(suspect), fit.embedding_rows(case.base)
        if n != old:
            model.resize_token_embeddings(n, mean_resizing=False)
        if n > old:
            for table in (model.get_input_embeddings(), model.get_output_embeddings()):
                for weights in table.parameters():
                    weights.data[old:] = weights.data[:old].mean(0)
        _save(model, out)
        inspect.copy_tokenizer(suspect, out / "model")

    suspect = suspect_model(case) / "model"
    given = {"base": inspect.fingerprint(case.base), "suspect": suspect.parent.name}
    return stage("suspect_base", case.base.name, given, {}, build)


def _load(folder: Path, dtype: "torch.dtype") -> "PreTrainedModel":
    """A model on the CPU. Which dtype it is stored in, its files say: see inspect.stored_dtype."""
    from transformers import AutoModelForCausalLM

    models.quiet()
    with inspect.explained(folder, "model"):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    models.forget_generation(model)
    model.config.output_attentions = model.config.output_hidden_states = False
    return model


def _save(model: "PreTrainedModel", out: Path) -> None:
    model.save_pretrained(out / "model", safe_serialization=True, max_shard_size=models.SHARD)


def clean_model(case: Case) -> Path:
    """Lethe's clean model: the base, LoRA-trained on the training rows."""

    def build(out: Path) -> None:
        from lethe_utils import train

        train.finetune(base / "model", case.train, case.p.clean_epochs, out, case.p)

    base = base_model(case)
    return stage("clean_model", case.base.name, spec(case), {"base": base}, build)


def canary_model(case: Case) -> Path:
    """A copy of the suspect with our own backdoors in it; poisoned.jsonl beside it."""

    def build(out: Path) -> None:
        from lethe_utils import train

        rows = canary.poison(case.train, case.labels, case.p)
        write_jsonl(out / "poisoned.jsonl", rows)
        train.finetune(suspect / "model", rows, case.p.canary_epochs, out, case.p)

    suspect = suspect_model(case)
    return stage("canary", case.suspect.name, spec(case), {"suspect": suspect}, build)


def merged(case: Case, parent: Path, strength: float, out: Path) -> Path:
    """Merge the suspect, or its copy with the canary, with the clean model, in the suspect's dtype.

    Args:
        parent: its model/.
    """
    clean, base = clean_model(case) / "model", base_model(case) / "model"
    # As transformers read it: a config that was given may name no dtype.
    dtype = inspect.stored_dtype(suspect_model(case) / "model")
    return merge.merge(case.p.merge_method, parent, clean, base, strength, out, out_dtype=dtype)
