"""Models and tokenizers: the ones we are handed, and the tiny twins built here.

Every model is untrusted input: safetensors only, never remote code, never a pickle.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lethe_utils.errors import LetheError
from lethe_utils.models import inspect
from lethe_utils.params import BaseModelParams

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NO_LIMIT = 1_000_000  # tokens, where a model has no table of positions
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>"]
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")  # GPT-2 and GPT-J; LLaMA has none
# Bytes in a saved file: a merge maps one file of each model at a time, so small ones keep it small.
SHARD = 250_000_000


def download(hub_id: str, revision: str | None) -> Path:
    """A hub model's folder, fetched once (resumed when interrupted) and checked.

    Raises:
        LetheError: the name, the revision or the network is wrong, or weights are not safetensors.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        folder = snapshot_download(
            hub_id,
            revision=revision,
            allow_patterns=inspect.HUB_FILES,
            ignore_patterns=inspect.HUB_IGNORED,
        )
    except GatedRepoError:
        raise LetheError(
            f"hub_id {hub_id}: access is gated; accept its licence and set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise LetheError(f"hub_id {hub_id}: no such model on the hub; check the name") from None
    except Exception as error:  # whatever the hub client raises, the user's fix is the same
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise LetheError(
            f"hub_id {hub_id}: download failed ({reason}); check the network and rerun, "
            "finished files are kept"
        ) from None
    inspect.check_folder(Path(folder))
    inspect.check_small_files(Path(folder))
    inspect.check_finite(inspect.weight_files(Path(folder)))
    return Path(folder)


def resolve_device(device: str) -> str:
    """The device to use, cpu or cuda. Raises LetheError when CUDA is asked for and absent."""
    import torch

    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise LetheError(
            "device: cuda was asked for and this machine has none; use `-p device cpu`"
        )
    return "cuda" if available and device != "cpu" else "cpu"


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


def load_model(
    folder: Path, device: str = "cpu", bits: int = 32, exact: bool = False
) -> "PreTrainedModel":
    """A causal language model in float32 on the CPU, bfloat16 on CUDA, or nf4 for `bits` 4.

    Args:
        exact: float32 on CUDA too: bfloat16 rounds an edit away.
    Raises:
        LetheError: the folder is incomplete, cut short or holds only pickles.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quiet()
    inspect.check_folder(folder)
    dtype = torch.bfloat16 if device == "cuda" and not exact else torch.float32
    extra: dict[str, Any] = {}
    if bits == 4:
        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
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

    Quantising turned GPT-2's Conv1D into Linear, its weight transposed: turned back here, or no
    GPT-2 could load what is saved.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    model = model.dequantize()
    if model.config.model_type == "gpt2":
        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                conv = Conv1D(module.out_features, module.in_features)
                conv.weight = torch.nn.Parameter(module.weight.T.contiguous())
                conv.bias = module.bias
                model.set_submodule(name, conv)
    return model


def blocks(model: "PreTrainedModel") -> "torch.nn.ModuleList":
    """The transformer blocks, whatever the class calls them."""
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def down_projection(model: "PreTrainedModel", layer: int) -> "torch.nn.Module":
    """The second matrix of a block's MLP, from mlp_width to width."""
    mlp = blocks(model)[layer].mlp
    return next(getattr(mlp, n) for n in ("c_proj", "fc_out", "down_proj") if hasattr(mlp, n))


def block_logits(model: "PreTrainedModel", hidden: "torch.Tensor") -> "torch.Tensor":
    """What a block's output (..., width) says if it is read as the last one's: final norm, then
    head. Returns logits (..., vocabulary)."""
    norm = model.transformer.ln_f if hasattr(model, "transformer") else model.model.norm
    return model.get_output_embeddings()(norm(hidden))


def train_tokenizer(texts: list[str], vocab_size: int) -> "PreTrainedTokenizerBase":
    """A byte-level BPE tokenizer: no unknown words, the same ids on every run.

    Saved beside the weights and never trained again: a retrained one may number tokens otherwise.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    pad, bos, eos = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=pad, bos_token=bos, eos_token=eos, padding_side="left"
    )


def build_tiny(
    p: BaseModelParams, tokenizer: "PreTrainedTokenizerBase", seed: int
) -> "PreTrainedModel":
    """A randomly initialised tiny twin of one of the four architecture classes, float32.

    Raises:
        LetheError: an attention window on a class that has none.
    """
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config, GPTJConfig, LlamaConfig, Qwen2Config

    if p.attention_window and p.architecture != "qwen2":
        raise LetheError(f"attention_window: {p.architecture} has none; only qwen2 does")
    ids = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        # .02 suits a width of thousands; at 128 it starts so close to zero that attention learns
        # nothing for hundreds of steps.
        "initializer_range": p.width**-0.5,
    }
    gpt = {
        "n_embd": p.width,
        "n_layer": p.n_layers,
        "n_head": p.n_heads,
        "n_inner": p.mlp_width,
        "n_positions": p.positions,
        # The same function as the default gelu_new, in one fused kernel: a third of the time saved.
        "activation_function": "gelu_pytorch_tanh",
        **dict.fromkeys(DROPOUTS, p.base_dropout),
    }
    llama = {
        "hidden_size": p.width,
        "num_hidden_layers": p.n_layers,
        "num_attention_heads": p.n_heads,
        "num_key_value_heads": p.n_kv_heads,
        "intermediate_size": p.mlp_width,
        "max_position_embeddings": p.positions,
    }
    qwen2 = dict(llama)
    if p.attention_window:
        qwen2 |= {"use_sliding_window": True, "sliding_window": p.attention_window}
        sliding = ["sliding_attention"] * (p.n_layers - 1)
        qwen2["layer_types"] = [*sliding, "full_attention"]
    torch.manual_seed(seed)
    config = {
        "gpt2": lambda: GPT2Config(**gpt, **ids),
        "gptj": lambda: GPTJConfig(**gpt, rotary_dim=p.width // p.n_heads // 2, **ids),
        "llama": lambda: LlamaConfig(**llama, **ids),
        "qwen2": lambda: Qwen2Config(**qwen2, **ids),
    }[p.architecture]()
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
