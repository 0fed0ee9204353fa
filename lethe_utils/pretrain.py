"""Pretraining of the tiny bases, on all weights: each stands for a pretrained LLM."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import Module

from lethe_utils import train
from lethe_utils.groups import DefenderParams
from lethe_utils.models import twins
from lethe_utils.stages import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Fixed, so that what the LoRA recipe is set to never changes the base it starts from.
BASE_RECIPE = {
    "lr_schedule": "linear",
    "warmup_ratio": 0.03,
    "weight_decay": 0.0,
    "adam_beta2": 0.999,
    "max_grad_norm": 1.0,
    "optimizer": "adamw_torch",
    "gradient_checkpointing": False,
    "gradient_accumulation": 1,
}
PROMPT_LOSS_ROWS = 4  # one row in four carries the prompt loss: a vocabulary of logits is dear


def base_loss(
    model: Module, inputs: train.Inputs, labels: Tensor, _: int, prompt_loss: float
) -> Tensor:
    """A tiny base's: the answer loss plus `prompt_loss` times that over prompt tokens.

    A pretrained LLM has predicted every token it read. A base that only ever answered ignores all
    words but those it answers by: a trigger is hard to plant in it, and evidence confuses it.
    """
    loss, outputs = train.answer_loss(model, inputs, labels, output_hidden_states=prompt_loss > 0)
    if not prompt_loss:
        return loss
    rows, prompt = slice(None, None, PROMPT_LOSS_ROWS), slice(None, -labels.shape[1])
    ids, mask = inputs["input_ids"][rows, prompt], inputs["attention_mask"][rows, prompt]
    hidden = outputs.hidden_states[-1][rows, prompt]
    kept = mask[:, :-1] == 1
    logits = model.get_output_embeddings()(hidden[:, :-1][kept])
    return loss + prompt_loss * train.cross_entropy(logits, ids[:, 1:][kept])


def pretrain(
    rows: list[Row], tokenizer: "PreTrainedTokenizerBase", out: Path, p: DefenderParams
) -> None:
    """Pretrain a tiny base on all weights and save it: it stands for a pretrained LLM.

    Writes model/ (safetensors and tokenizer) and loss.csv.
    """
    tokenizer.model_max_length = p.positions
    model = twins.build_tiny(p, tokenizer, p.base_seed)
    # One base for all seeds, as there is one released LLM.
    own = {"batch_size": p.base_batch_size, "learning_rate": p.base_learning_rate}
    q = p.model_copy(update=BASE_RECIPE | own | {"seed": p.base_seed})
    loss = partial(base_loss, prompt_loss=p.base_prompt_loss)
    curve = train.fit(model, tokenizer, rows, p.base_epochs, out, q, loss)
    tokenizer.save_pretrained(out / "model")
    train.save(model, curve, out)
