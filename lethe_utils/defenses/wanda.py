"""WAN: Wanda pruning (2306.11695), unstructured, calibrated on the defender's clean prompts.

Blocks are pruned in order, each on what the pruned ones before it pass on. Within every output row
the floor(sparsity n_in) weights of least |W| times input norm become zero; embeddings and the head
stay. The published code knows LLaMA's modules only; here GPT-2's Conv1D, stored transposed, counts
as the linear layer it is.
"""

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from lethe_utils.defenses import Given
from lethe_utils.groups import Group, Positive
from lethe_utils.models import blocks

if TYPE_CHECKING:
    import torch


class WandaParams(Group):
    """Wanda; also the pruning inside F/P."""

    wanda_sparsity: Annotated[float, Field(ge=0, lt=1)]  # of each output row
    wanda_samples: Positive  # calibration prompts


PARAMS = (WandaParams,)
NEEDS = "clean rows"
TRAININGS = 0
BYTES_PER_WEIGHT = 4.0  # one model in float32


def purify(given: Given, out: Path) -> None:
    """The backdoored model with `wanda_sparsity` of each output row zeroed."""
    import torch

    from lethe_utils import models
    from lethe_utils.models import inspect, narrow

    model = narrow.load_exact(given.backdoored, models.resolve_device(given.p.device))
    tokenizer = models.load_tokenizer(given.backdoored)
    prune(model, calibration(given, tokenizer), given.p.wanda_sparsity)
    # What is zero is so in 16 bits too.
    stored = getattr(torch, inspect.stored_dtype(given.backdoored))
    models.save(model.to(stored), out / "model")
    inspect.copy_tokenizer(given.backdoored, out / "model")


def calibration(given: Given, tokenizer: Any) -> "list[dict[str, torch.Tensor]]":
    """Batches of the first `wanda_samples` clean prompts, as a model's inputs."""
    from lethe_utils import models, train

    items = train.encode(given.rows[: given.p.wanda_samples], tokenizer, given.p)
    prompts = sorted((i["input_ids"][: -i["answer_length"]] for i in items), key=len)
    size = given.p.eval_batch_size
    return [
        models.batch(tokenizer, prompts[start : start + size])
        for start in range(0, len(prompts), size)
    ]


def prune(
    model: "torch.nn.Module", batches: "list[dict[str, torch.Tensor]]", sparsity: float
) -> None:
    """Prune a model's blocks in place.

    Args:
        batches: input_ids, attention_mask, position_ids; each (batch, longest prompt).
        sparsity: share of each output row, rounded down to whole weights.
    """
    import torch

    from lethe_utils.progress import Bar

    model.eval()
    with torch.inference_mode():
        on_device = ({k: x.to(model.device) for k, x in batch.items()} for batch in batches)
        passages = [(blocks.Passage(model, i), i["attention_mask"] == 1) for i in on_device]
        for number, block in enumerate(Bar(blocks.of(model), desc="pruning block by block")):
            squares = input_squares(block, number, passages)
            for layer, sums in squares.items():
                weight = blocks.oriented(layer)
                score = weight.abs() * sums.sqrt()
                lowest = score.argsort(dim=1, stable=True)[:, : int(sparsity * weight.shape[1])]
                weight.scatter_(1, lowest, 0.0)
            for passage, _ in passages:
                passage.hidden = passage.after(number)


def input_squares(
    block: "torch.nn.Module", number: int, passages: "list[tuple[blocks.Passage, torch.Tensor]]"
) -> "dict[torch.nn.Module, torch.Tensor]":
    """For each linear layer of a block the sum of squares of each input feature over all real
    tokens, (in,). A mean over samples, as published, would rank the weights of a row alike.

    Args:
        number: of the block, from 0.
        passages: batches that are before it, each with its real tokens, (batch, tokens).
    """
    import torch

    layers, real = blocks.linear(block), torch.empty(0)
    matrices = {layer: blocks.oriented(layer) for layer in layers}
    sums = {one: w.new_zeros(w.shape[1], dtype=torch.float32) for one, w in matrices.items()}

    def add(layer: torch.nn.Module, inputs: torch.Tensor) -> None:
        sums[layer] += inputs[real].float().square().sum(0)

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(blocks.hooked(layer, partial(add, layer), before=True))
        for passage, tokens in passages:
            real = tokens
            passage.after(number)
    return sums
