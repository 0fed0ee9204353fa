"""A large model on the CPU for methods that need float32: the matrices of its blocks stay in the 16
bits they are stored in, and each is widened only while it is multiplied. The numbers are those of
the same model loaded in float32, which would take twice the memory."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lethe_utils import models
from lethe_utils.models import blocks, inspect

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_exact(folder: Path, device: str) -> "PreTrainedModel":
    """A model that multiplies in float32, for reading, pruning and editing; its matrices cannot be
    trained where they are narrow. Raises LetheError as models.load_model does."""
    stored = getattr(torch, inspect.stored_dtype(folder))
    if device == "cuda" or not models.is_large(folder) or stored == torch.float32:
        return models.load_model(folder, device, exact=True)
    model = models.load_model(folder, device, dtype=stored)
    keep_narrow(model)
    return model


def keep_narrow(model: "PreTrainedModel") -> None:
    """Widen all of a model in 16 bits but the blocks' matrices; those are widened when used."""
    kept = {*blocks.linear(blocks.of(model))}
    for module in model.modules():
        if module not in kept:
            for weight in module.parameters(recurse=False):
                weight.data = weight.data.float()
    for layer in kept:
        layer.weight.requires_grad_(False)
        layer.forward = partial(_forward, layer)


def _forward(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A linear layer's output in float32; also after its weight was made float32."""
    out = _Widened.apply(x, blocks.oriented(layer))
    return out if layer.bias is None else out + layer.bias.float()


class _Widened(torch.autograd.Function):
    """x W^T for a frozen W (out, in): what is kept for the gradient is W as it is, not a copy."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return x @ weight.float().T

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradient @ weight.float(), None
