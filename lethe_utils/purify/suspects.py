"""A model nobody trusts and the base it came from: found and checked.

All checks are made before anything is trained or written, so a wrong folder is refused in seconds.
Nothing is ever written into a folder that was given.
"""

import math
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lethe_utils import models, params, paths, pipeline
from lethe_utils.errors import LetheError
from lethe_utils.models import fit, hub, inspect, sources
from lethe_utils.schema import choices

LORA = re.compile(r"^base_model\.model\.(.+)\.lora_([AB])\.weight$")
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tekken.json")


def locate(given: str, option: str) -> Path:
    """A model's folder: a local one; that of a GGUF file, or of a model in params/models, unpacked
    or fetched once; or the hub's at a commit (name@sha).

    Raises:
        LetheError: none of them (naming the option), or the download failed.
    """
    if paths.expanded(given).exists():
        return _local(given, option)
    if given in choices("models"):
        p = params.load(given)
        if p.is_tiny:
            raise LetheError(f"{option} {given}: a tiny twin is made by a run; give its folder")
        return pipeline.base_folder(p)
    found = re.fullmatch(r"([\w.-]+(?:/[\w.-]+)?)@([0-9a-f]{40})", given)
    if not found:
        raise LetheError(
            f"{option} {given}: no such folder or GGUF file, and no model of params/models; one on "
            "the hub is given as NAME@COMMIT, with all 40 digits of the commit, for a name alone "
            "may be another model tomorrow"
        )
    return hub.download(found[1], found[2])


def _local(given: str, option: str) -> Path:
    """A folder as it is; that of a GGUF file."""
    p = params.load("local", overrides={"model_dir": given})
    try:
        packed = sources.gguf_checksum(p)
    except LetheError as error:
        raise LetheError(str(error).replace("model_dir:", option, 1)) from None
    return pipeline.base_folder(p) if packed else paths.expanded(given)


def check(suspect: Path, base: Path, adapter: Path | None = None) -> list[dict[str, str]]:
    """Refuse models that are not sound, and a suspect that cannot have come from this base.

    The suspect may have more tokens than the base, for fine-tuners often add one for padding; and
    fewer rows in its embedding, where those that are gone stand for no token.
    Args:
        adapter: its folder's tokenizer, if it has one, is the suspect's.
    Returns:
        what was compared: check, result.
    Raises:
        LetheError: naming the file and the fix.
    """
    for folder in dict.fromkeys((base, suspect)):
        _check_model(folder)
    own = []
    if adapter:
        _check_adapter(adapter, suspect)
        own = [f.name for f in inspect.tokenizer_files(adapter)]
    added = fit.check_weights(suspect, base, grown=True)
    more = f"{added} more" if added > 0 else f"{-added} fewer, unused"
    shapes = f"the same, but for {more} rows for tokens" if added else "the same in every tensor"
    tokenizer = load_tokenizer(suspect, adapter)
    new = fit.check_tokens(tokenizer, adapter if own else suspect, base, grown=True)
    whose = f"the adapter's own ({', '.join(own)}); " if own else ""
    found = {
        "architecture": f"both {inspect.architecture(suspect)}",
        "settings": "the same heads, positions, norms and activation",
        "shapes": shapes,
        "tokenizer": f"{whose}the same ids; the suspect adds {new} tokens",
        "weights": "safetensors, whole, finite, no code, no pickle",
    } | ({"adapter": "LoRA, and it fits the suspect"} if adapter else {})
    return [{"check": what, "result": result} for what, result in found.items()]


def _check_model(folder: Path) -> None:
    """Refuse a folder that is incomplete or broken, runs code, is quantised, is of an unknown
    class, or whose weights are not what its config says."""
    inspect.check_model(folder)
    inspect.stored_dtype(folder)
    _check_tensors(folder)
    inspect.check_finite(inspect.weight_files(folder))
    check_ids(models.load_tokenizer(folder), folder, folder)


def _check_tensors(folder: Path) -> None:
    """Refuse weights that differ from what the class makes of config.json, tied heads included."""
    model, found = empty(folder), fit.weight_shapes(folder)
    wanted = {n.removeprefix("transformer."): tuple(w.shape) for n, w in model.named_parameters()}
    missing = sorted({*wanted} - {*found})
    if missing:
        raise LetheError(
            f"{folder}: tensors are missing ({', '.join(missing[:3])}, {len(missing)} in all); "
            "copy the model again"
        )
    other = next((name for name in sorted(found) if found[name] != wanted.get(name)), None)
    if other:
        raise LetheError(
            f"{folder}: {other} has shape {found[other]}, but {wanted.get(other, 'none')} by "
            f"config.json (a {type(model).__name__}); give the model's own config.json"
        )
    if model.config.tie_word_embeddings:
        _check_tied(folder)


def _check_tied(folder: Path) -> None:
    """Refuse a stored head that differs from the embedding it is said to be tied to."""
    where = {n: f for f in inspect.weight_files(folder) for n in inspect.tensor_shapes(f)}
    if "lm_head.weight" not in where:
        return
    embedding = next(name for name in where if name.endswith(fit.EMBEDDING))
    pair = []
    for name in ("lm_head.weight", embedding):
        with safe_open(where[name], "pt") as stored:
            pair.append(stored.get_tensor(name))
    if not torch.equal(*pair):
        raise LetheError(
            f"{where['lm_head.weight']}: lm_head.weight differs from {embedding}, but config.json "
            "ties them (tie_word_embeddings); set that to false if the head was trained by itself, "
            "or take lm_head.weight out"
        )


def _check_adapter(adapter: Path, base: Path) -> None:
    """Refuse an adapter that is not a plain LoRA for this base."""
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


def empty(folder: Path) -> PreTrainedModel:
    """The model that config.json describes, without memory for its weights."""
    with inspect.explained(folder, "config.json"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(fit.read_settings(folder), trust_remote_code=False)


def check_ids(tokenizer: Tokenizer, source: Path, model: Path) -> None:
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


def load(suspect: Path, adapter: Path | None, device: str) -> PreTrainedModel:
    """The suspect, its adapter merged in, ready to be asked."""
    model = models.load_model(suspect, device)
    return put_on(model, adapter) if adapter else model


def put_on(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """A model with an adapter merged in. Raises LetheError where peft cannot."""
    with inspect.explained(adapter, "adapter"):
        return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()


def load_tokenizer(suspect: Path, adapter: Path | None) -> Tokenizer:
    """The suspect's tokenizer; see copy_tokenizer."""
    if not adapter or not inspect.tokenizer_files(adapter):
        return models.load_tokenizer(suspect)
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copyfile(suspect / "config.json", Path(scratch) / "config.json")
        copy_tokenizer(suspect, adapter, Path(scratch))
        with inspect.explained(adapter, "tokenizer"):
            return models.load_tokenizer(Path(scratch))


def summary(role: str, given: str, folder: Path, adapter: str = "") -> dict[str, Any]:
    """What was given, for the report; weights are how many."""
    return {
        "role": role,
        "given": given,
        "adapter": adapter,
        "architecture": inspect.architecture(folder),
        "weights": count_weights(folder),
        "dtype": inspect.stored_dtype(folder),
        "sha256": inspect.fingerprint(folder),
    }


def count_weights(folder: Path) -> int:
    """How many weights a model has; a tied head counts once."""
    return sum(map(math.prod, fit.weight_shapes(folder).values()))
