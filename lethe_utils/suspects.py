"""A model nobody trusts and the base it came from: found, checked, brought into one form.

All checks read names, shapes and settings only, so a wrong folder is refused in seconds. Nothing
is ever written into a folder that was given.
"""

import hashlib
import json
import math
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from lethe_utils import models
from lethe_utils.errors import LetheError
from lethe_utils.stages import stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What both transformers and mergekit know, and SLERP's attention and MLP filters fit.
ARCHITECTURES = (
    "GPT2LMHeadModel",
    "GPTJForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
# Two models whose weights have the same shapes still differ if one of these does.
SAME_SETTINGS = (
    "n_head",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rotary_dim",
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
    "activation_function",
    "hidden_act",
    "layer_norm_epsilon",
    "rms_norm_eps",
    "sliding_window",
    "tie_word_embeddings",
)
# Masks and tables that older checkpoints store: made from the settings, not trained.
BUFFERS = re.compile(r"\.attn\.(bias|masked_bias|embed_positions)$|rotary_emb\.inv_freq$")
PER_TOKEN = ("wte.weight", "embed_tokens.weight", "lm_head.weight", "lm_head.bias")
LORA = re.compile(r"^base_model\.model\.(.+)\.lora_([AB])\.weight$")
Shapes = dict[str, tuple[int, ...]]


def locate(given: str, option: str) -> Path:
    """A model's folder: a local one, or the hub's at a commit (name@sha), fetched once.

    Args:
        option: the command line's name for it, for the error.
    Raises:
        LetheError: neither, or the download failed.
    """
    if Path(given).expanduser().is_dir():
        return Path(given).expanduser().resolve()
    hub = re.fullmatch(r"([\w.-]+(?:/[\w.-]+)?)@([0-9a-f]{40})", given)
    if not hub:
        raise LetheError(
            f"{option} {given}: no such folder; a model on the hub is given as NAME@COMMIT, with "
            "all 40 digits of the commit, for a name alone may be another model tomorrow"
        )
    return models.download(hub[1], hub[2])


def check_model(folder: Path) -> None:
    """Refuse a folder that is incomplete, runs code, is quantised, or is of an unknown class.

    Raises:
        LetheError: naming the file and the fix.
    """
    models.check_folder(folder)
    config = models.read_config(folder)
    if "auto_map" in config:
        raise LetheError(
            f"{folder / 'config.json'}: auto_map asks for code of the model's own, which is never "
            "run here; use a copy in one of transformers' own classes"
        )
    if "quantization_config" in config:
        raise LetheError(
            f"{folder / 'config.json'}: the weights are quantised; merging needs them as they were "
            "trained (float32, float16 or bfloat16)"
        )
    name = models.architecture(folder)
    if name not in ARCHITECTURES:
        raise LetheError(
            f"{folder / 'config.json'}: architecture {name} is not supported; one of "
            f"{', '.join(ARCHITECTURES)} is"
        )
    if not [*folder.glob("tokenizer*"), *folder.glob("vocab.json")]:
        raise LetheError(f"{folder}: no tokenizer files; copy them from where the model came from")


def weight_shapes(folder: Path) -> Shapes:
    """Name -> shape of all trained tensors, under one name whatever the file's prefix; a head tied
    to the embedding is left out."""
    from transformers import AutoConfig

    tied = AutoConfig.from_pretrained(folder, trust_remote_code=False).tie_word_embeddings
    found = {n.removeprefix("transformer."): s for n, s in models.folder_shapes(folder).items()}
    return {
        name: shape
        for name, shape in found.items()
        if not BUFFERS.search(f".{name}") and not (tied and name == "lm_head.weight")
    }


def check_pair(suspect: Path, base: Path) -> list[dict[str, str]]:
    """Refuse a suspect that cannot have come from this base.

    The suspect may have more tokens than the base: fine-tuners often add one for padding.
    Returns:
        what was compared: check, result.
    Raises:
        LetheError: another class, other settings, shapes or token ids.
    """
    ours, theirs = models.architecture(suspect), models.architecture(base)
    if ours != theirs:
        raise LetheError(f"{suspect} is a {ours}, but {base} is a {theirs}; {_SAME_BASE}")
    settings = models.read_config(suspect), models.read_config(base)
    for key in SAME_SETTINGS:
        values = [s.get(key) for s in settings]
        if None not in values and values[0] != values[1]:
            raise LetheError(
                f"{suspect / 'config.json'}: {key} is {values[0]}, but {values[1]} in "
                f"{base / 'config.json'}; {_SAME_BASE}"
            )
    added = _check_shapes(weight_shapes(suspect), weight_shapes(base), suspect, base)
    new_tokens = _check_vocabulary(suspect, base)
    return [
        {"check": "architecture", "result": f"both {ours}"},
        {"check": "settings", "result": "the same heads, positions, norms and activation"},
        {"check": "shapes", "result": f"the same, but for {added} more rows for tokens"}
        if added
        else {"check": "shapes", "result": "the same in every tensor"},
        {"check": "tokenizer", "result": f"the same ids; the suspect adds {new_tokens} tokens"},
        {"check": "weights", "result": "safetensors, whole, no code, no pickle"},
    ]


_SAME_BASE = "give the base model that the suspect was trained from"


def _check_shapes(ours: Shapes, theirs: Shapes, suspect: Path, base: Path) -> int:
    """How many rows the suspect's embedding has more than the base's."""
    added = 0
    for name in sorted({*ours, *theirs}):
        a, b = ours.get(name), theirs.get(name)
        if a == b:
            continue
        per_token = a and b and name.endswith(PER_TOKEN) and a[1:] == b[1:]
        if not per_token or a[0] < b[0]:
            raise LetheError(
                f"{suspect}: {name} has shape {a or 'none'}, but {b or 'none'} in {base}; "
                f"{_SAME_BASE}"
            )
        added = a[0] - b[0]
    return added


def _check_vocabulary(suspect: Path, base: Path) -> int:
    """How many tokens the suspect's tokenizer has more than the base's."""
    ours, theirs = (models.load_tokenizer(f).get_vocab() for f in (suspect, base))
    other = next((token for token, i in theirs.items() if ours.get(token) != i), None)
    if other is not None:
        raise LetheError(
            f"{suspect}: its tokenizer differs from the one of {base} (token {other!r} is "
            f"{ours.get(other, 'missing')}, not {theirs[other]}); {_SAME_BASE}"
        )
    return len(ours) - len(theirs)


def check_adapter(adapter: Path, base: Path) -> None:
    """Refuse an adapter that is not a plain LoRA for this base.

    Raises:
        LetheError: files missing, a pickle, another method, or matrices that do not fit.
    """
    settings = adapter / "adapter_config.json"
    if not settings.exists():
        raise LetheError(f"{adapter}: no adapter_config.json, so this is not an adapter's folder")
    method = json.loads(settings.read_text("utf8")).get("peft_type")
    if method != "LORA":
        raise LetheError(f"{settings}: peft_type {method} is not supported; only LORA is")
    file = adapter / "adapter_model.safetensors"
    if not file.exists():
        raise LetheError(
            f"{adapter}: no adapter_model.safetensors (a .bin is a pickle, which can run code when "
            "loaded); save the adapter as safetensors"
        )
    weights = weight_shapes(base)
    for name, shape in models.tensor_shapes(file).items():
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


@cache
def fingerprint(folder: Path) -> str:
    """SHA-256 over the names and contents of a model's (or an adapter's) files."""
    digest = hashlib.sha256()
    files = sorted(f for f in folder.iterdir() if f.suffix in {".safetensors", ".json", ".txt"})
    size = sum(f.stat().st_size for f in files)
    look = {"unit": "B", "unit_scale": True, "leave": False, "delay": 2}
    with tqdm(total=size, desc=f"hashing {folder.name}", **look) as bar:
        for file in files:
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                while block := stream.read(2**24):
                    digest.update(block)
                    bar.update(len(block))
    return digest.hexdigest()


def count_weights(folder: Path) -> int:
    """How many trained weights a model has."""
    return sum(map(math.prod, weight_shapes(folder).values()))


def summary(role: str, given: str, folder: Path, adapter: str = "") -> dict[str, Any]:
    """What was given, for the report: role, given, adapter, architecture, weights (how many),
    dtype, sha256."""
    return {
        "role": role,
        "given": given,
        "adapter": adapter,
        "architecture": models.architecture(folder),
        "weights": count_weights(folder),
        "dtype": models.stored_dtype(folder),
        "sha256": fingerprint(folder),
    }


def suspect_stage(suspect: Path, base: Path, adapter: Path | None) -> Path:
    """The suspect as one whole model (model/), as transformers saves it: an adapter merged in, old
    names and stored masks gone, all in the dtype it came in."""

    def build(out: Path) -> None:
        model = load(suspect)
        if adapter:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
        _save(model, suspect, out)

    spec = {"suspect": fingerprint(suspect), "base": base.name}
    spec |= {"adapter": fingerprint(adapter)} if adapter else {}
    return stage("suspect", (adapter or suspect).name, spec, {}, build)


def base_stage(suspect: Path, base: Path) -> Path:
    """The base with the suspect's tokenizer (model/); tokens that it lacks get the mean embedding,
    so that all models have one shape."""

    def build(out: Path) -> None:
        import torch

        model, n = load(base), models.folder_shapes(suspect)
        n = next(shape[0] for name, shape in n.items() if name.endswith(PER_TOKEN[:2]))
        old = model.get_input_embeddings().weight.shape[0]
        if n > old:
            model.resize_token_embeddings(n, mean_resizing=False)
            with torch.no_grad():
                for table in (model.get_input_embeddings(), model.get_output_embeddings()):
                    table.weight[old:] = table.weight[:old].mean(0)
                    if getattr(table, "bias", None) is not None:
                        table.bias[old:] = table.bias[:old].mean(0)
        _save(model, suspect, out)

    spec = {"base": fingerprint(base), "suspect": suspect.parent.name}
    return stage("suspect_base", base.name, spec, {}, build)


def load(folder: Path) -> "PreTrainedModel":
    """A model on the CPU in the dtype it is stored in.

    Raises:
        LetheError: tensors that its class needs are not in the files.
    """
    from transformers import AutoModelForCausalLM

    models.quiet()
    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="auto",
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    missing = sorted(report["missing_keys"])
    if missing:
        raise LetheError(
            f"{folder}: tensors are missing ({', '.join(missing[:3])}, {len(missing)} in all); "
            "copy the model again"
        )
    return model


def _save(model: "PreTrainedModel", tokenizer_from: Path, out: Path) -> None:
    model.save_pretrained(out / "model", safe_serialization=True, max_shard_size=models.SHARD)
    models.load_tokenizer(tokenizer_from).save_pretrained(out / "model")
