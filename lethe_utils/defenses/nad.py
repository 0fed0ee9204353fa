"""NAD, neural attention distillation (2101.05930; bboylyg/NAD), ported to decoders.

A student, the backdoored model with a fresh LoRA, answers the clean rows while its attention maps
are drawn to those of a frozen teacher. Published for convolutions: a map is sum_c |F_c|^p over an
image, L2- normalised. Here a map is sum_d |h_d|^p over a row's tokens, of the hidden state after
the block at a quarter, a half and three quarters of the depth. Each row's first token is left out:
it draws so much activation in a decoder that it alone would make the norm. One beta serves all
three maps.

Published teacher: the backdoored model fine-tuned on the same clean rows, so what F/T leaves of a
backdoor the teacher has too. The low ASR that Lethe's paper reports for NAD suggests that its
teacher was the clean model, which it does not say: that is the variant `nad_clean_teacher`.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lethe_utils import models
from lethe_utils.defenses import Given
from lethe_utils.defenses.finetune import FinetuneParams
from lethe_utils.errors import LetheError
from lethe_utils.groups import DefenderParams, Group, NotNegative, Positive, Rate, TrainParams

if TYPE_CHECKING:
    import torch


class NadParams(Group):
    """Neural attention distillation."""

    nad_teacher: Literal["finetuned", "clean"]
    nad_epochs: Positive
    nad_power: Rate
    nad_beta: NotNegative  # weight of the distillation


PARAMS = (NadParams, FinetuneParams, TrainParams)
NEEDS = "clean rows"
TRAININGS = 2  # the teacher and the student
EXCEPTIONS = {"nad_clean_teacher": {"NEEDS": "clean model", "TRAININGS": 1}}  # its teacher is there
BYTES_PER_WEIGHT = 2.6  # nf4 student, bfloat16 teacher


def variants(_: DefenderParams) -> dict[str, dict[str, Any]]:
    return {"nad": {}, "nad_clean_teacher": {"nad_teacher": "clean"}}


def purify(given: Given, out: Path) -> None:
    from lethe_utils import train

    p, folder, scratch = given.p, given.clean, out / "teacher"
    if p.nad_teacher == "finetuned":
        folder = scratch / "model"
        train.finetune(given.backdoored, given.rows, p.finetune_epochs, scratch, p)
    # Never in nf4: the teacher only reads, and is to be the model that was trained.
    teacher = models.load_model(folder, models.resolve_device(p.device))
    loss = Distillation(teacher.eval().requires_grad_(False), p)
    train.finetune(given.backdoored, given.rows, p.nad_epochs, out, p, loss=loss)
    if p.nad_teacher == "finetuned":
        (scratch / "loss.csv").replace(out / "teacher_loss.csv")  # its steps count as a cost
        shutil.rmtree(scratch)


class Distillation:
    """A loss (see train.finetune): cross-entropy plus nad_beta times the distillation."""

    def __init__(self, teacher: "torch.nn.Module", p: DefenderParams) -> None:
        self.teacher, self.p = teacher, p

    def __call__(
        self, model: "torch.nn.Module", inputs: dict, labels: "torch.Tensor", step: int
    ) -> "torch.Tensor":
        import torch

        from lethe_utils import train

        wanted = {"output_hidden_states": True, "use_cache": False}
        loss, outputs = train.answer_loss(model, inputs, labels, **wanted)
        with torch.no_grad():
            taught = self.teacher(**inputs, logits_to_keep=1, **wanted)
        states = outputs.hidden_states, taught.hidden_states
        apart = distillation(*states, inputs["attention_mask"], self.p.nad_power)
        loss = loss + self.p.nad_beta * apart
        if not torch.isfinite(loss):
            raise LetheError(
                f"learning_rate: NAD's loss is {loss.item()} at step {step}; lower it, or nad_beta"
            )
        return loss


def distilled_layers(n_layers: int) -> list[int]:
    """How many blocks lie below each map: a quarter, a half, three quarters, at least one."""
    return sorted({max(1, quarters * n_layers // 4) for quarters in (1, 2, 3)})


def distillation(
    student: "Sequence[torch.Tensor]",
    teacher: "Sequence[torch.Tensor]",
    mask: "torch.Tensor",
    power: float,
) -> "torch.Tensor":
    """Sum over the maps of the mean squared difference over tokens.

    Args:
        student, teacher: all hidden states, (batch, tokens, width) each, the embeddings first.
        mask: attention mask, (batch, tokens).
    """
    import torch

    counted = (mask == 1) & (mask.cumsum(1) > 1)
    total = torch.zeros((), device=mask.device)
    for layer in distilled_layers(len(student) - 1):
        ours, theirs = (attention_map(s[layer], counted, power) for s in (student, teacher))
        total = total + (ours - theirs)[counted].square().mean()
    return total


def attention_map(hidden: "torch.Tensor", counted: "torch.Tensor", power: float) -> "torch.Tensor":
    """sum_d |h_d|^power per token, of length 1 over a row's counted tokens and 0 at the others.

    In float32: a power of a large activation leaves bfloat16's precision behind.
    """
    energy = hidden.float().abs().pow(power).sum(2) * counted
    return energy / (energy.norm(dim=1, keepdim=True) + 1e-6)
