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
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from lethe_utils.defenses import Given
from lethe_utils.errors import LetheError
from lethe_utils.groups import DefenderParams, Group, NotNegative, Positive, Rate, TrainParams

if TYPE_CHECKING:
    import torch


class CrowParams(Group):
    """CROW, internal consistency regularisation."""

    crow_alpha: NotNegative  # weight of the consistency term
    crow_epsilon: Rate  # perturbation, times the embeddings' deviation
    crow_epochs: Positive
    crow_learning_rate: Rate


PARAMS = (CrowParams, TrainParams)
NEEDS = "clean rows"
TRAININGS = 1
BYTES_PER_WEIGHT = 2.6  # nf4, and its dequantised copy when LoRA is merged
SCHEDULE = {"lr_schedule": "cosine", "warmup_ratio": 0.1}  # as published


def purify(given: Given, out: Path) -> None:
    from lethe_utils import train

    p = given.p.model_copy(update=SCHEDULE | {"learning_rate": given.p.crow_learning_rate})
    train.finetune(given.backdoored, given.rows, p.crow_epochs, out, p, loss=Consistency(p))


class Consistency:
    """A loss (see train.finetune): cross-entropy plus crow_alpha times C, C after a step of
    crow_epsilon deviations."""

    def __init__(self, p: DefenderParams) -> None:
        self.p, self.step_size = p, 0.0

    def __call__(
        self, model: "torch.nn.Module", inputs: dict, labels: "torch.Tensor", step: int
    ) -> "torch.Tensor":
        from lethe_utils import train

        embedding = model.get_input_embeddings()  # LoRA leaves it frozen
        if not self.step_size:
            if model.config.num_hidden_layers < 3:
                raise LetheError("n_layers: CROW compares blocks below the last; it needs 3 blocks")
            deviation = embedding.weight.detach().float().std().item()
            self.step_size = self.p.crow_epsilon * deviation
        mask, wanted = inputs["attention_mask"], {"output_hidden_states": True, "use_cache": False}
        others = {name: tensor for name, tensor in inputs.items() if name != "input_ids"}
        embedded = embedding(inputs["input_ids"]).detach().requires_grad_()
        loss, outputs = train.answer_loss(
            model, others | {"inputs_embeds": embedded}, labels, **wanted
        )
        moved = adversarial(embedded, consistency(outputs.hidden_states, mask), self.step_size)
        after = model(**others, inputs_embeds=moved, logits_to_keep=1, **wanted)
        loss = loss + self.p.crow_alpha * consistency(after.hidden_states, mask)
        if not loss.isfinite():
            raise LetheError(
                f"crow_learning_rate: CROW's loss is {loss.item()} at step {step}; lower it, or "
                "crow_alpha"
            )
        return loss


def adversarial(
    embedded: "torch.Tensor", inconsistency: "torch.Tensor", step_size: float
) -> "torch.Tensor":
    """FGSM: the embeddings (batch, tokens, width), each entry moved by `step_size` to raise C.

    Padding does not move, for C does not depend on it. No parameter gets a gradient.
    """
    import torch

    # The graph is kept: the same forward pass carries the cross-entropy.
    (gradient,) = torch.autograd.grad(inconsistency, embedded, retain_graph=True)
    return embedded.detach() + step_size * gradient.sign()


def consistency(states: "Sequence[torch.Tensor]", mask: "torch.Tensor") -> "torch.Tensor":
    """C: the mean of 1 - cos(h_l, h_l+1) over real tokens and neighbouring blocks; 0 is constant.

    Args:
        states: all hidden states, (batch, tokens, width) each, the embeddings first.
        mask: attention mask, (batch, tokens).
    """
    import torch

    inner = [state[mask == 1].float() for state in states[1:-1]]
    gaps = [1 - torch.cosine_similarity(a, b, dim=-1).mean() for a, b in pairwise(inner)]
    return torch.stack(gaps).mean()
