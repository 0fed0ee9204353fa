"""Models and tokenizers: how they are loaded, and how rows of tokens become their inputs.

Every model is untrusted input: safetensors only, never remote code, never a pickle.
"""

from contextlib import AbstractContextManager
from functools import cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lethe_utils.errors import LetheError
from lethe_utils.models import blocks, inspect

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lethe_utils.groups import TrainParams

NO_LIMIT = 1_000_000  # tokens, where a model has no table of positions
# Bytes in a saved file: a merge maps one file of each model at a time, so small ones keep it small.
SHARD = 250_000_000
# Weights from which on a CPU holds a model in bfloat16 too: in float32 it takes 8 GB and more.
LARGE = 2_000_000_000


def resolve_device(device: str) -> str:
    """The device to use, cpu or cuda. Raises LetheError when CUDA is asked for and absent."""
    import torch

    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise LetheError(
            "device: cuda was asked for and this machine has none; use `-p device cpu`"
        )
    return "cuda" if available and device != "cpu" else "cpu"


def bfloat16(p: "TrainParams") -> bool:
    """Whether a run multiplies in bfloat16: on CUDA, and on a CPU that has instructions for it,
    unless `cpu_dtype` asks for float32. Weights on a CPU are float32 either way, see `held`."""
    if resolve_device(p.device) == "cuda":
        return True
    return p.cpu_dtype == "auto" and _cpu_has_bfloat16()


@cache
def _cpu_has_bfloat16() -> bool:
    """AVX512-BF16 or AMX. PyTorch also emulates bfloat16 elsewhere, more slowly than float32."""
    import torch

    found = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private: may go one day
    return any(getattr(torch.cpu, name, bool)() for name in found)


def arithmetic(p: "TrainParams") -> "AbstractContextManager[Any]":
    """Within it a float32 model on the CPU multiplies as the params say. Training has its own, the
    Trainer's; on CUDA the weights decide."""
    import torch

    on_cpu = resolve_device(p.device) == "cpu"
    return torch.autocast("cpu", torch.bfloat16, enabled=on_cpu and bfloat16(p))


def hold(module: "torch.nn.Module", p: "TrainParams") -> None:
    """Keep the weights of frozen linear layers in the dtype that a CPU multiplies them in, where
    autocast would cast them anew at every call: the same numbers, sooner. What is held so is not to
    be saved."""
    import torch

    if resolve_device(p.device) != "cpu" or not bfloat16(p):
        return
    for layer in blocks.linear(module):
        if layer.weight.dtype == torch.float32 and not layer.weight.requires_grad:
            held_weight = layer.weight.detach().bfloat16()
            layer.weight = torch.nn.Parameter(held_weight, requires_grad=False)


def avoid_wrong_gradients() -> None:
    """Keep attention on CUDA off cuDNN's kernel, the default on Hopper from torch 2.11 on: for a
    masked batch of 64, 192, 320 ... tokens it gives NaN as a gradient where one head attends to
    little (pytorch/pytorch#196678), and one such step makes every weight NaN. The next kernel in
    line is as exact."""
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)


def ease_backward(model: "PreTrainedModel", p: "TrainParams") -> None:
    """Let a model that will be trained take the attention that is fast backwards: on a CPU in
    bfloat16 the plain one is three times as fast as the fused one."""
    if model.device.type == "cpu" and bfloat16(p):
        model.set_attn_implementation("eager")


def quiet() -> None:
    """Silence the bar for each model loaded or saved, which drowns the ones that matter."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer, padding on the left so that every answer starts in the same column; its
    model_max_length are the positions that the model has.

    Raises:
        LetheError: neither the tokenizer nor config.json says which token ends an answer.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    quiet()
    with inspect.explained(folder, "tokenizer"):
        if (folder / "tokenizer.json").exists():
            # Read as it is: AutoTokenizer rebuilds it as the model class's own, and Qwen2's splits
            # texts in another way and adds a token that the embedding has no row for.
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokenizer.padding_side = "left"
    config, file = inspect.read_config(folder), folder / "tokenizer_config.json"
    said = inspect.read_object(file) if file.exists() else {}
    for name in ("bos_token", "eos_token"):  # GPT-2's files on the hub name theirs in the config
        token_id = config.get(f"{name}_id")
        # A BOS that is null is none, whatever the config says; an answer must end somewhere.
        none = name == "bos_token" and name in said
        if getattr(tokenizer, name) is None and isinstance(token_id, int) and not none:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token_id))
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    tokenizer.model_max_length = positions or NO_LIMIT  # what its own file says is often wrong
    tokenizer.lethe_bos = said.get("add_bos_token") is not False  # see prompts.start_ids
    if tokenizer.eos_token_id is None:
        raise LetheError(f"{folder}: no eos_token in tokenizer_config.json or config.json; add it")
    if tokenizer.pad_token is None:
        # Masked everywhere, so EOS can serve; a new [PAD] row would change the embedding's shape
        # and the base could no longer take part in a TIES merge.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def batch(
    tokenizer: "PreTrainedTokenizerBase", ids: list[list[int]], device: Any = "cpu"
) -> "dict[str, torch.Tensor]":
    """Rows of token ids, padded, as a model's inputs: input_ids, attention_mask, position_ids.

    Without position_ids GPT-2 counts the padding on the left.
    """
    padded = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    mask = padded["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": padded["input_ids"], "attention_mask": mask, "position_ids": positions}
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def is_large(folder: Path) -> bool:
    """Whether a model has LARGE weights or more."""
    return sum(map(prod, inspect.folder_shapes(folder).values())) >= LARGE


def held(folder: Path, device: str) -> str:
    """The dtype that a model's weights are held, merged and saved in: bfloat16 on CUDA, float32 on
    the CPU unless the model is large."""
    return "bfloat16" if device == "cuda" or is_large(folder) else "float32"


def load_model(
    folder: Path,
    device: str = "cpu",
    bits: int = 32,
    exact: bool = False,
    dtype: "torch.dtype | None" = None,
) -> "PreTrainedModel":
    """A causal language model in the dtype that `held` says, or nf4 for `bits` 4.

    Args:
        exact: float32 whatever it takes: bfloat16 rounds an edit away.
        dtype: this one instead.
    Raises:
        LetheError: the folder is incomplete, cut short or holds only pickles.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quiet()
    avoid_wrong_gradients()
    inspect.check_folder(folder)
    dtype = dtype or (torch.float32 if exact else getattr(torch, held(folder, device)))
    extra: dict[str, Any] = {}
    if bits == 4:
        # A processor that has to emulate bfloat16 multiplies float32 eight times as fast.
        multiplied = dtype if device == "cuda" or _cpu_has_bfloat16() else torch.float32
        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=multiplied,
        )
    with inspect.explained(folder, "model"):
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
            **extra,
        )
    forget_generation(model)
    return model


def load_to_ask(folder: Path, p: "TrainParams") -> "PreTrainedModel":
    """A model that is only asked, within `arithmetic`; see load_model, hold and narrow."""
    from lethe_utils.models import narrow

    model = load_model(folder, resolve_device(p.device)).eval().requires_grad_(False)
    hold(model, p)
    if not bfloat16(p) and is_large(folder):
        narrow.keep_narrow(model)
    return model


def save(model: "PreTrainedModel", folder: Path) -> None:
    """A model as safetensors, in files of SHARD bytes at most. A folder that is written twice must
    be written in the same files, or it holds two models: all saving is done here."""
    model.save_pretrained(folder, safe_serialization=True, max_shard_size=SHARD)


def forget_generation(model: "PreTrainedModel") -> None:
    """Drop what generation_config.json says: a penalty or beams would fill what `answer` leaves
    unsaid, and transformers refuses to save some of what it loads."""
    from transformers import GenerationConfig

    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {name: getattr(model.config, name, None) for name in names}
    ids = {name: i for name, i in ids.items() if not (isinstance(i, int) and i < 0)}  # -1: none
    model.generation_config = GenerationConfig(**ids)


def dequantised(model: "PreTrainedModel") -> "PreTrainedModel":
    """An nf4 model as plain weights, each what its four bits say.

    A layer at a time: transformers' own holds all four-bit weights until the last is widened, which
    at full size is a quarter more at the peak.
    """
    import torch
    from bitsandbytes.nn import Linear4bit
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    packed = [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    for name in packed:
        layer = model.get_submodule(name)
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        weight = dequantize_bnb_weight(layer.weight).to(model.config.dtype)
        plain.weight, plain.bias = torch.nn.Parameter(weight, requires_grad=False), layer.bias
        layer.weight = None  # it points back to its layer, so that neither would go
        model.set_submodule(name, plain)
    model.hf_quantizer.remove_quantization_config(model)
    if model.config.model_type == "gpt2":
        blocks.restore_conv1d(model)
    return model
