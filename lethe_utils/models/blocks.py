"""Inside a model: its blocks, their linear layers and what passes through them, for GPT-2, GPT-J,
LLaMA and Qwen2 alike."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def of(model: "PreTrainedModel") -> "torch.nn.ModuleList":
    """The transformer blocks, whatever the class calls them."""
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def down_projection(model: "PreTrainedModel", layer: int) -> "torch.nn.Module":
    """The second matrix of a block's MLP, from mlp_width to width."""
    mlp = of(model)[layer].mlp
    return next(getattr(mlp, n) for n in ("c_proj", "fc_out", "down_proj") if hasattr(mlp, n))


def logits(model: "PreTrainedModel", hidden: "torch.Tensor") -> "torch.Tensor":
    """What a block's output (..., width) says if it is read as the last one's: final norm, then
    head. Returns logits (..., vocabulary)."""
    norm = model.transformer.ln_f if hasattr(model, "transformer") else model.model.norm
    head = model.get_output_embeddings()
    # The Trainer gives float32 back from a forward in bfloat16, in which the head is held.
    return head(norm(hidden).to(head.weight.dtype))


def linear(module: "torch.nn.Module") -> "list[torch.nn.Module]":
    """All linear layers inside a module, GPT-2's Conv1D among them."""
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    return [m for m in module.modules() if isinstance(m, (Linear, Conv1D))]


def linear_names(model: "PreTrainedModel", layers: Sequence[int]) -> list[str]:
    """The names of the linear layers of some blocks."""
    names = {module: name for name, module in model.named_modules()}
    return [names[m] for layer in layers for m in linear(of(model)[layer])]


def oriented(layer: "torch.nn.Module") -> "torch.Tensor":
    """A linear layer's weight as (out, in), writable and without gradient, whatever its layout."""
    from transformers.pytorch_utils import Conv1D

    return layer.weight.data.T if isinstance(layer, Conv1D) else layer.weight.data


def add(layer: "torch.nn.Module", delta: "torch.Tensor") -> None:
    """Add delta (out, in) to a linear layer's weight, in float64, whatever its layout."""
    kept = oriented(layer)
    kept.copy_(kept.double() + delta.to(kept.device).double())


def restore_conv1d(model: "PreTrainedModel") -> None:
    """Make Conv1D again of what quantising made of GPT-2's: Linear, the weight transposed. Without
    this no GPT-2 could load what is saved."""
    from torch.nn import Linear, Parameter
    from transformers.pytorch_utils import Conv1D

    layers = [name for name, module in model.named_modules() if isinstance(module, Linear)]
    for name in layers:
        if name != "lm_head":
            module = model.get_submodule(name)
            conv = Conv1D(module.out_features, module.in_features)
            conv.weight = Parameter(module.weight.T.contiguous())
            conv.bias = module.bias
            model.set_submodule(name, conv)


@contextmanager
def hooked(
    module: "torch.nn.Module",
    hook: "Callable[[torch.Tensor], torch.Tensor | None]",
    before: bool = False,
) -> Iterator[None]:
    """Run `hook` on a module's output, or (`before`) on its first input; a tensor it returns takes
    the place. GPT-J's blocks give a tuple, the others a bare tensor: both arrive as the tensor."""

    def changed(value: Any) -> Any:
        new = hook(value[0] if isinstance(value, tuple) else value)
        return (new, *value[1:]) if new is not None and isinstance(value, tuple) else new

    if before:
        handle = module.register_forward_pre_hook(lambda _, inputs: changed(inputs))
    else:
        handle = module.register_forward_hook(lambda _, __, output: changed(output))
    try:
        yield
    finally:
        handle.remove()


class Passage:
    """A batch on its way through a model, from one block to the next: what changes block by block
    need not read the whole model for each."""

    def __init__(self, model: "PreTrainedModel", inputs: "dict[str, torch.Tensor]") -> None:
        """Before the first block. inputs: those of a forward without a cache."""
        self.hidden: Any = None  # (batch, tokens, width)
        self._blocks, self._others = of(model), []  # what each block is given beside it

        def given(_: Any, args: tuple, others: dict[str, Any]) -> None:
            if not self._others:
                self.hidden = args[0]
            self._others.append((args[1:], others))

        hooks = [b.register_forward_pre_hook(given, with_kwargs=True) for b in self._blocks]
        try:
            model(**inputs, logits_to_keep=1, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()

    def after(self, block: int) -> "torch.Tensor":
        """What this block, from 0, makes of where the batch is: (batch, tokens, width)."""
        args, others = self._others[block]
        made = self._blocks[block](self.hidden, *args, **others)
        return made[0] if isinstance(made, tuple) else made
