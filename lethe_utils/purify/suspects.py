"""A model nobody trusts and the base it came from: found, checked, brought into one form.

All checks are made before anything is trained or written, so a wrong folder is refused in seconds.
Nothing is ever written into a folder that was given.
"""

import math
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lethe_utils import models, paths
from lethe_utils.errors import LetheError
from lethe_utils.models import fit, hub, inspect
from lethe_utils.stages import stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What both transformers and mergekit know, and SLERP's attention and MLP filters fit.
ARCHITECTURES = (
    "GPT2LMHeadModel",
    "GPTJForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
LORA = re.compile(r"^base_model\.model\.(.+)\.lora_([AB])\.weight$")
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tekken.json")


def locate(given: str, option: str) -> Path:
    """A model's folder: a local one, or the hub's at a commit (name@sha), fetched once.

    Args:
        option: the command line's name for it, for the error.
    Raises:
        LetheError: neither, or the download failed.
    """
    if paths.expanded(given).is_dir():
        return paths.expanded(given)
    found = re.fullmatch(r"([\w.-]+(?:/[\w.-]+)?)@([0-9a-f]{40})", given)
    if not found:
        raise LetheError(
            f"{option} {given}: no such folder; a model on the hub is given as NAME@COMMIT, with "
            "all 40 digits of the commit, for a name alone may be another model tomorrow"
        )
    return hub.download(found[1], found[2])


def check_model(folder: Path) -> None:
    """Refuse a folder that is incomplete or broken, runs code, is quantised, is of an unknown
    class, or whose weights are not what its config says.

    Raises:
        LetheError: naming the file and the fix.
    """
    inspect.check_folder(folder)
    inspect.check_small_files(folder)
    settings = folder / "config.json"
    if inspect.read_config(folder).get("quantization_config"):
        raise LetheError(
            f"{settings}: the weights are quantised; merging needs them as they were trained "
            "(float32, float16 or bfloat16)"
        )
    name = inspect.architecture(folder)
    if name not in ARCHITECTURES:
        raise LetheError(
            f"{settings}: architecture {name} is not supported; one of "
            f"{', '.join(ARCHITECTURES)} is"
        )
    if not inspect.tokenizer_files(folder):
        raise LetheError(f"{folder}: no tokenizer files; copy them from where the model came from")
    inspect.stored_dtype(folder)
    _check_tensors(folder)
    inspect.check_finite(inspect.weight_files(folder))
    check_ids(models.load_tokenizer(folder), folder, folder)


def _check_tensors(folder: Path) -> None:
    """Refuse weights that differ from what the class makes of config.json, tied heads included."""
    import torch
    from transformers import AutoModelForCausalLM

    config = fit.read_settings(folder)
    with inspect.explained(folder, "config.json"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    wanted = {n.removeprefix("transformer."): tuple(w.shape) for n, w in model.named_parameters()}
    found = fit.weight_shapes(folder)
    missing, unknown = sorted({*wanted} - {*found}), sorted({*found} - {*wanted})
    if missing:
        raise LetheError(
            f"{folder}: tensors are missing ({', '.join(missing[:3])}, {len(missing)} in all); "
            "copy the model again"
        )
    if unknown:
        raise LetheError(
            f"{folder}: {unknown[0]} is no part of a {type(model).__name__} as config.json "
            "describes it; give the model's own config.json, or take the tensor out"
        )
    other = next((name for name in sorted(found) if found[name] != wanted[name]), None)
    if other:
        raise LetheError(
            f"{folder}: {other} has shape {found[other]}, but {wanted[other]} by config.json; give "
            "the model's own config.json"
        )
    if config.tie_word_embeddings:
        _check_tied(folder)


def _check_tied(folder: Path) -> None:
    """Refuse a stored head that differs from the embedding it is said to be tied to."""
    import torch
    from safetensors import safe_open

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


def check_ids(tokenizer: "PreTrainedTokenizerBase", source: Path, model: Path) -> None:
    """Refuse a tokenizer with a token that the model's embedding has no row for."""
    rows = fit.embedding_rows(model)
    token, number = max(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    if number >= rows:
        raise LetheError(
            f"{source}: token {token!r} has id {number}, but the embedding of {model} has {rows} "
            "rows; take the token out, or give the model whose embedding was resized for it"
        )


def check_pair(suspect: Path, base: Path, adapter: Path | None = None) -> list[dict[str, str]]:
    """Refuse a suspect that cannot have come from this base.

    The suspect may have more tokens than the base, for fine-tuners often add one for padding; and
    fewer rows in its embedding, where those that are gone stand for no token.
    Args:
        adapter: its folder's tokenizer, if it has one, is the suspect's.
    Returns:
        what was compared: check, result.
    Raises:
        LetheError: another class, other settings, shapes or token ids.
    """
    added = fit.check_weights(suspect, base, grown=True)
    shapes = "the same in every tensor"
    if added:
        more = f"{added} more" if added > 0 else f"{-added} fewer, unused"
        shapes = f"the same, but for {more} rows for tokens"
    own = [f.name for f in inspect.tokenizer_files(adapter)] if adapter else []
    source = adapter if adapter and own else suspect
    new_tokens = fit.check_tokens(load_tokenizer(suspect, adapter), source, base, grown=True)
    whose = f"the adapter's own ({', '.join(own)}); " if own else ""
    return [
        {"check": "architecture", "result": f"both {inspect.architecture(base)}"},
        {"check": "settings", "result": "the same heads, positions, norms and activation"},
        {"check": "shapes", "result": shapes},
        {
            "check": "tokenizer",
            "result": f"{whose}the same ids; the suspect adds {new_tokens} tokens",
        },
        {"check": "weights", "result": "safetensors, whole, finite, no code, no pickle"},
    ]


def check_adapter(adapter: Path, base: Path) -> None:
    """Refuse an adapter that is not a plain LoRA for this base.

    Raises:
        LetheError: files missing or broken, a pickle, another method, or matrices that do not fit.
    """
    settings = adapter / inspect.ADAPTER_SETTINGS
    if not settings.exists():
        raise LetheError(f"{adapter}: no adapter_config.json, so this is not an adapter's folder")
    method = inspect.read_object(settings).get("peft_type")
    if method != "LORA":
        raise LetheError(f"{settings}: peft_type {method} is not supported; only LORA is")
    file = adapter / inspect.ADAPTER
    if not file.exists():
        raise LetheError(
            f"{adapter}: no adapter_model.safetensors (a .bin is a pickle, which can run code when "
            "loaded); save the adapter as safetensors"
        )
    inspect.check_small_files(adapter)
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
        wanted = weights.get(f"{found[1].removeprefix('transformer.')}.weight", ())
        side = shape[1] if found[2] == "A" else shape[0]
        if side not in wanted:
            raise LetheError(
                f"{file}: {name} has shape {shape}, which fits no {found[1]} of {base}; was the "
                "adapter trained on another base?"
            )
    _check_matrices(adapter, base)
    inspect.check_finite([file])
    check_ids(load_tokenizer(base, adapter), adapter, base)


def _check_matrices(adapter: Path, base: Path) -> None:
    """Refuse an adapter whose file does not hold exactly what its settings describe: peft leaves
    out what it does not expect, and draws at random what it misses."""
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    file, settings = adapter / inspect.ADAPTER, adapter / inspect.ADAPTER_SETTINGS
    with inspect.explained(adapter, "adapter_config.json"), torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(
                fit.read_settings(base), trust_remote_code=False
            )
            model = get_peft_model(model, LoraConfig.from_pretrained(str(adapter)))
            wanted = {n: tuple(w.shape) for n, w in get_peft_model_state_dict(model).items()}
        except RuntimeError as error:
            raise ValueError(error) from None
    found = inspect.tensor_shapes(file)
    other = next((n for n in sorted({*wanted, *found}) if wanted.get(n) != found.get(n)), None)
    if other:
        raise LetheError(
            f"{file}: {other} has shape {found.get(other, 'none')}, but "
            f"{wanted.get(other, 'none')} by {settings.name}; copy the adapter again, both files"
        )
    inspect.check_dtypes([file])


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


def load_tokenizer(suspect: Path, adapter: Path | None) -> "PreTrainedTokenizerBase":
    """The suspect's tokenizer; see copy_tokenizer."""
    if not adapter or not inspect.tokenizer_files(adapter):
        return models.load_tokenizer(suspect)
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copyfile(suspect / "config.json", Path(scratch) / "config.json")
        copy_tokenizer(suspect, adapter, Path(scratch))
        with inspect.explained(adapter, "tokenizer"):
            return models.load_tokenizer(Path(scratch))


def count_weights(folder: Path) -> int:
    """How many trained weights a model has."""
    return sum(map(math.prod, fit.weight_shapes(folder).values()))


def summary(role: str, given: str, folder: Path, adapter: str = "") -> dict[str, Any]:
    """What was given, for the report: role, given, adapter, architecture, weights (how many),
    dtype, sha256."""
    return {
        "role": role,
        "given": given,
        "adapter": adapter,
        "architecture": inspect.architecture(folder),
        "weights": count_weights(folder),
        "dtype": inspect.stored_dtype(folder),
        "sha256": inspect.fingerprint(folder),
    }


def suspect_stage(suspect: Path, adapter: Path | None) -> Path:
    """The suspect as one whole model (model/), as transformers saves it: an adapter merged in, old
    names and stored masks gone, all in the dtype it came in."""

    def build(out: Path) -> None:
        import torch

        stored = getattr(torch, inspect.stored_dtype(suspect))
        model = load(suspect, torch.float32 if adapter else stored)
        if adapter:
            from peft import PeftModel

            with inspect.explained(adapter, "adapter"):
                model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
            if not all(torch.isfinite(weight.to(stored)).all() for weight in model.parameters()):
                raise LetheError(
                    f"{adapter}: put on {suspect}, it gives values that are not numbers in "
                    f"{inspect.stored_dtype(suspect)}; check its lora_alpha"
                )
        _save(model.to(stored), out, lambda folder: copy_tokenizer(suspect, adapter, folder))

    spec = {"suspect": inspect.fingerprint(suspect)}
    spec |= {"adapter": inspect.fingerprint(adapter)} if adapter else {}
    return stage("suspect", (adapter or suspect).name, spec, {}, build)


def base_stage(suspect: Path, base: Path) -> Path:
    """The base with the suspect's tokenizer (model/) and as many rows in its embedding, so that all
    models have one shape: tokens that it lacks get the mean embedding, and rows that the suspect
    lacks, which stand for no token, are left out.

    Args:
        suspect: model/ of its stage.
    """

    def build(out: Path) -> None:
        import torch

        model = load(base, getattr(torch, inspect.stored_dtype(base)))
        n = fit.embedding_rows(suspect)
        old = model.get_input_embeddings().weight.shape[0]
        if n != old:
            model.resize_token_embeddings(n, mean_resizing=False)
        if n > old:
            with torch.no_grad():
                for table in (model.get_input_embeddings(), model.get_output_embeddings()):
                    table.weight[old:] = table.weight[:old].mean(0)
                    if getattr(table, "bias", None) is not None:
                        table.bias[old:] = table.bias[:old].mean(0)
        _save(model, out, lambda folder: inspect.copy_tokenizer(suspect, folder))

    spec = {"base": inspect.fingerprint(base), "suspect": suspect.parent.name}
    return stage("suspect_base", base.name, spec, {}, build)


def load(folder: Path, dtype: Any) -> "PreTrainedModel":
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


def _save(model: "PreTrainedModel", out: Path, write_tokenizer: Callable[[Path], None]) -> None:
    model.save_pretrained(out / "model", safe_serialization=True, max_shard_size=models.SHARD)
    write_tokenizer(out / "model")
