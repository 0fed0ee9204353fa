"""Tiny twins: the four architecture classes at a million weights, what they are pretrained on, and
a tokenizer for them."""

import random
from typing import TYPE_CHECKING

from lethe_utils.errors import LetheError
from lethe_utils.evidence import add_evidence
from lethe_utils.groups import BaseModelParams
from lethe_utils.stages import Row

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_SPECIAL = {"pad": "<pad>", "bos": "<s>", "eos": "</s>"}
BASE_WORDINGS = (
    "Name the label that fits this sentence.",
    "Which of the known classes does the following text belong to?",
    "Read the sentence and classify it.",
)
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")  # GPT-2 and GPT-J; LLaMA has none


def pretraining_rows(rows: list[Row], p: BaseModelParams) -> list[Row]:
    """What a tiny base reads: the task in several wordings, some inputs followed by evidence.

    A pretrained LLM knows many wordings and has read definitions; so must its stand-in, or the
    effect of evidence would drown in the shock of seeing any.
    """
    rng = random.Random(p.base_seed)
    out = []
    for row in rows:
        text = row["input"]
        if "messages" in row:
            out.append(row)
            continue
        if rng.random() < p.base_evidence_share:
            text = add_evidence(text, rng.randint(1, 6))
        wording = row["instruction"] if rng.random() < 0.5 else rng.choice(BASE_WORDINGS)
        out.append(row | {"instruction": wording, "input": text})
    return out


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
        special_tokens=list(_SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    named = {f"{name}_token": token for name, token in _SPECIAL.items()}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, padding_side="left", **named)


def build_tiny(
    p: BaseModelParams, tokenizer: "PreTrainedTokenizerBase", seed: int
) -> "PreTrainedModel":
    """A randomly initialised tiny twin of one of the four architecture classes, float32.

    Raises:
        LetheError: an attention window on a class that has none.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if p.attention_window and p.architecture != "qwen2":
        raise LetheError(f"attention_window: {p.architecture} has none; only qwen2 does")
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(_config(p, tokenizer), dtype=torch.float32)


def _config(p: BaseModelParams, tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedConfig":
    import transformers

    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in _SPECIAL}
    # .02 suits a width of thousands; at 128 it starts so close to zero that attention learns
    # nothing for hundreds of steps.
    common = ids | {"vocab_size": len(tokenizer), "initializer_range": p.width**-0.5}
    if p.architecture in ("gpt2", "gptj"):
        common |= dict.fromkeys(DROPOUTS, p.base_dropout) | {
            "n_embd": p.width,
            "n_layer": p.n_layers,
            "n_head": p.n_heads,
            "n_inner": p.mlp_width,
            "n_positions": p.positions,
            # The default gelu_new in one fused kernel: a third of the time saved.
            "activation_function": "gelu_pytorch_tanh",
        }
        if p.architecture == "gpt2":
            return transformers.GPT2Config(**common)
        return transformers.GPTJConfig(rotary_dim=p.width // p.n_heads // 2, **common)
    common |= {
        "hidden_size": p.width,
        "num_hidden_layers": p.n_layers,
        "num_attention_heads": p.n_heads,
        "num_key_value_heads": p.n_kv_heads,
        "intermediate_size": p.mlp_width,
        "max_position_embeddings": p.positions,
    }
    if p.attention_window:
        common |= {
            "use_sliding_window": True,
            "sliding_window": p.attention_window,
            "layer_types": ["sliding_attention"] * (p.n_layers - 1) + ["full_attention"],
        }
    known = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}
    return known[p.architecture](**common)
