"""CROW, internal consistency regularisation (2411.12768; NayMyatMin/CROW).

A trigger makes hidden states turn sharply from block to block. LoRA training on clean rows, with
C = the mean of 1 - cos(h_l, h_l+1) under an adversarial step on the embeddings as a regulariser,
smooths that out. As in the source the embeddings and the last state, which is normed, are left out
of C. Unlike it: padding is masked in attention and in C; gradients of C reach the embeddings alone
(the source zeroes what earlier accumulated batches left); the step's size is in units of the
embedding matrix's deviation, for the published .1 exceeds LLaMA's (about .02) several times.

Uncertain: the repository's trainer has been seen with a KL divergence in place of the cosine, which
the paper describes; the published rate and alpha were chosen with the larger step.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from lethe_utils import train
from lethe_utils.defenses import Given
from lethe_utils.errors import LetheError
from lethe_utils.params import CrowParams, TrainParams

PARAMS = (CrowParams, TrainParams)
NEEDS = "clean rows"
TRAININGS = 1
BYTES_PER_WEIGHT = 2.6  # nf4, and its dequantised copy when LoRA is merged
SCHEDULE = {"lr_schedule": "cosine", "warmup_ratio": 0.1}  # as published


def purify(given: Given, out: Path) -> None:
    p = given.p.model_copy(update=SCHEDULE | {"learning_rate": given.p.crow_learning_rate})
    make = partial(CrowTrainer, alpha=p.crow_alpha, epsilon=p.crow_epsilon)
    train.finetune(given.suspect, given.rows, p.crow_epochs, out, p, make_trainer=make)


class CrowTrainer(train.AnswerTrainer):
    """Cross-entropy on the answer plus `alpha` times C, C after a step of `epsilon` deviations."""

    def __init__(self, *args: Any, alpha: float, epsilon: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.model.config.num_hidden_layers < 3:
            raise LetheError("n_layers: CROW compares blocks below the last one and needs 3 blocks")
        self.embedding = self.model.get_input_embeddings()  # LoRA leaves it frozen
        self.alpha = alpha
        self.step_size = epsilon * self.embedding.weight.detach().float().std().item()

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict, return_outputs: bool = False, **_: Any
    ) -> torch.Tensor:
        labels, mask = inputs.pop("labels"), inputs["attention_mask"]
        wanted = {"output_hidden_states": True, "use_cache": False}
        embedded = self.embedding(inputs.pop("input_ids")).detach().requires_grad_()
        loss, outputs = train.answer_loss(
            model, inputs | {"inputs_embeds": embedded}, labels, **wanted
        )
        moved = adversarial(embedded, consistency(outputs.hidden_states, mask), self.step_size)
        after = model(**inputs, inputs_embeds=moved, logits_to_keep=1, **wanted)
        loss = loss + self.alpha * consistency(after.hidden_states, mask)
        if not torch.isfinite(loss):
            raise LetheError(
                f"crow_learning_rate: CROW's loss is {loss.item()} at step "
                f"{self.state.global_step + 1}; lower it, or crow_alpha"
            )
        return (loss, outputs) if return_outputs else loss


def adversarial(
    embedded: torch.Tensor, inconsistency: torch.Tensor, step_size: float
) -> torch.Tensor:
    """FGSM: the embeddings (batch, tokens, width), each entry moved by `step_size` to raise C.

    Padding does not move, for C does not depend on it. No parameter gets a gradient.
    """
    # The graph is kept: the same forward pass carries the cross-entropy.
    (gradient,) = torch.autograd.grad(inconsistency, embedded, retain_graph=True)
    return embedded.detach() + step_size * gradient.sign()


def consistency(states: Sequence[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """C: the mean of 1 - cos(h_l, h_l+1) over real tokens and neighbouring blocks; 0 is constant.

    Args:
        states: all hidden states, (batch, tokens, width) each, the embeddings first.
        mask: attention mask, (batch, tokens).
    """
    inner = [state[mask == 1].float() for state in states[1:-1]]
    gaps = [1 - torch.cosine_similarity(a, b, dim=-1).mean() for a, b in pairwise(inner)]
    return torch.stack(gaps).mean()
