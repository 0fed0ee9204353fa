"""A LoRA adapter: checked against its base, and the tokenizer that goes with it."""

import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from lethe_utils import models
from lethe_utils.errors import LetheError
from lethe_utils.models import fit, inspect

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

LORA = re.compile(r"^base_model\.model\.(.+)\.lora_([AB])\.weight$")
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tekken.json")


def check(adapter: Path, base: Path) -> None:
    """Refuse an adapter that is not a plain LoRA for this base.

    Raises:
        LetheError: files missing or broken, a pickle, another method, or matrices that do not fit.
    """
    settings, file = adapter / inspect.ADAPTER_SETTINGS, adapter / inspect.ADAPTER
    if not settings.exists():
        raise LetheError(f"{adapter}: no adapter_config.json, so this is not an adapter's folder")
    method = inspect.read_object(settings).get("peft_type")
    if method != "LORA":
        raise LetheError(f"{settings}: peft_type {method} is not supported; only LORA is")
    if not file.exists():
        raise LetheError(
            f"{adapter}: no adapter_model.safetensors (a .bin is a pickle, which can run code when "
            "loaded); save the adapter as safetensors"
        )
    inspect.check_small_files(adapter)
    _check_names(file, base)
    _check_matrices(adapter, base)
    inspect.check_finite([file])
    check_ids(load_tokenizer(base, adapter), adapter, base)


def _check_names(file: Path, base: Path) -> None:
    """Refuse tensors that are no LoRA matrices, or belong to no matrix of the base."""
    weights, tied = fit.weight_shapes(base), fit.read_settings(base).tie_word_embeddings
    for name, shape in inspect.tensor_shapes(file).items():
        if tied and name.startswith("base_model.model.lm_head."):
            raise LetheError(
                f"{file}: {name} changes the head, which {base} ties to its embedding, so both "
                "would change; train the adapter without lm_head, or on a base whose config.json "
                "has tie_word_embeddings false"
            )
        found = LORA.match(name)
        if not found:
            raise LetheError(
                f"{file}: {name} is not one of LoRA's two matrices; merge the adapter into its "
                "base and give the whole model"
            )
        side = shape[1] if found[2] == "A" else shape[0]
        if side not in weights.get(f"{found[1].removeprefix('transformer.')}.weight", ()):
            raise LetheError(
                f"{file}: {name} has shape {shape}, which fits no {found[1]} of {base}; was the "
                "adapter trained on another base?"
            )


def _check_matrices(adapter: Path, base: Path) -> None:
    """Refuse an adapter whose file does not hold exactly what its settings describe: peft leaves
    out what it does not expect, and draws at random what it misses."""
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    file = adapter / inspect.ADAPTER
    with inspect.explained(adapter, "adapter_config.json"), torch.device("meta"):
        try:
            model = get_peft_model(empty(base), LoraConfig.from_pretrained(str(adapter)))
        except RuntimeError as error:
            raise ValueError(error) from None
    wanted = {n: tuple(w.shape) for n, w in get_peft_model_state_dict(model).items()}
    found = inspect.tensor_shapes(file)
    other = next((n for n in sorted({*wanted, *found}) if wanted.get(n) != found.get(n)), None)
    if other:
        raise LetheError(
            f"{file}: {other} has shape {found.get(other, 'none')}, but "
            f"{wanted.get(other, 'none')} by adapter_config.json; copy the adapter again"
        )
    inspect.check_dtypes([file])


def empty(folder: Path) -> "PreTrainedModel":
    """The model that config.json describes, without memory for its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with inspect.explained(folder, "config.json"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(fit.read_settings(folder), trust_remote_code=False)


def check_ids(tokenizer: "Tokenizer", source: Path, model: Path) -> None:
    """Refuse a tokenizer with a token that the model's embedding has no row for."""
    rows = fit.embedding_rows(model)
    token, number = max(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    if number >= rows:
        raise LetheError(
            f"{source}: token {token!r} has id {number}, but the embedding of {model} has {rows} "
            "rows; take the token out, or give the model whose embedding was resized for it"
        )


def copy_tokenizer(suspect: Path, adapter: Path | None, out: Path) -> None:
    """The suspect's tokenizer, as files: an adapter was trained with what lies in its own folder.

    Where that has a vocabulary it is the whole tokenizer; where it has a chat template alone, that
    goes with the suspect's.
    """
    own = inspect.tokenizer_files(adapter) if adapter else []
    if not any(f.name in VOCABULARIES or f.suffix == ".model" for f in own):
        inspect.copy_tokenizer(suspect, out)
    if adapter:
        inspect.copy_tokenizer(adapter, out)


def load_tokenizer(suspect: Path, adapter: Path | None) -> "Tokenizer":
    """The suspect's tokenizer; see copy_tokenizer."""
    if not adapter or not inspect.tokenizer_files(adapter):
        return models.load_tokenizer(suspect)
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copyfile(suspect / "config.json", Path(scratch) / "config.json")
        copy_tokenizer(suspect, adapter, Path(scratch))
        with inspect.explained(adapter, "tokenizer"):
            return models.load_tokenizer(Path(scratch))
