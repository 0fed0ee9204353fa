"""BEEAR (2406.17092; reds-lab/BEEAR): unlearn the drift of the embeddings that a trigger makes.

Published against jailbreaks: an inner loop finds one perturbation delta (n x width), added to a
block's output at the prompt's last n positions, that makes the model comply; an outer loop trains
the weights to refuse under it, and to answer as before without it. Ported to labels: no label is
known to be the unwanted one, so each in turn is (delta_c is sought on rows that are not c), and the
outer loop draws one per batch and asks for the true label.

All weights are trained, in float32: at the published rates bfloat16 would round every step away
(for 7B about 110 GB with AdamW's moments, which `optimizer` does not page here). The model is saved
in float32 too. An open-ended task has as many labels as rows: this port is for label tasks.

Uncertain, for neither the paper's text nor its code was at hand: the objective's details, the inner
rate, and the number of steps, which others report as thresholds.
"""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from lethe_utils import models
from lethe_utils.defenses import Given
from lethe_utils.errors import LetheError
from lethe_utils.groups import DefenderParams, Group, NotNegative, Positive, Rate, TrainParams
from lethe_utils.models import blocks, inspect
from lethe_utils.progress import Bar
from lethe_utils.stages import Row

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Batch = dict[str, "torch.Tensor"]  # what train.collate makes, labels included


class BeearParams(Group):
    """BEEAR, ported to label tasks."""

    beear_depth: Annotated[float, Field(gt=0, lt=1)]  # the perturbed block, as a share of the depth
    beear_positions: Positive  # the last positions of the prompt that are perturbed
    beear_rounds: Positive
    beear_inner_steps: Positive
    beear_inner_learning_rate: Rate
    beear_outer_steps: Positive
    beear_outer_learning_rate: Rate
    beear_alpha: NotNegative  # weight of moving away from the true label
    beear_batch_size: Positive


PARAMS = (BeearParams, TrainParams)
NEEDS = "clean rows"
TRAININGS = 1
LABELS_ONLY = "its outer loop draws one per batch and asks for the true one"
BYTES_PER_WEIGHT = 16.0  # float32 weights, gradients and AdamW's two moments


def purify(given: Given, out: Path) -> None:
    """Writes model/ (float32) and loss.csv, the outer loss of every step."""
    from transformers import set_seed

    from lethe_utils import train

    set_seed(given.p.seed)
    tokenizer = models.load_tokenizer(given.backdoored)
    device = models.resolve_device(given.p.device)
    model = models.load_model(given.backdoored, device, exact=True)
    models.ease_backward(model, given.p)
    curve = Unlearning(model, tokenizer, given.p).run(given.rows)
    inspect.copy_tokenizer(given.backdoored, out / "model")
    train.save(model, curve, out)


class Unlearning:
    """A model in float32, changed in place, and what both loops need."""

    def __init__(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", p: DefenderParams
    ) -> None:
        self.model, self.tokenizer, self.p = model, tokenizer, p
        layers = blocks.of(model)
        # Never the last one, whose output no block reads.
        self.block = layers[max(0, min(round(p.beear_depth * len(layers)), len(layers) - 2))]
        self.rng = random.Random(p.seed)

    def run(self, rows: list[Row]) -> "pd.DataFrame":
        """All rounds.

        Returns:
            the loss curve: step, epoch (the round), loss (nats, with delta plus without).
        Raises:
            LetheError: the rows have one label only, or a loss is not finite.
        """
        import pandas as pd
        import torch

        p, model = self.p, self.model
        labels = sorted({row["output"] for row in rows})
        if len(labels) < 2:
            raise LetheError("clean_ratio: BEEAR needs clean rows of two labels; raise it")
        others = {label: [r for r in rows if r["output"] != label] for label in labels}
        if p.gradient_checkpointing:
            model.activation_checkpointing_enable()
        adam = torch.optim.AdamW(
            model.parameters(),
            lr=p.beear_outer_learning_rate,
            betas=(0.9, p.adam_beta2),
            weight_decay=p.weight_decay,
        )
        log: list[dict[str, float]] = []
        steps = p.beear_rounds * (len(labels) * p.beear_inner_steps + p.beear_outer_steps)
        with Bar(total=steps, desc="BEEAR") as bar:
            for number in range(1, p.beear_rounds + 1):
                model.requires_grad_(False).eval()
                deltas = {c: self.entrap(others[c], c, bar.update) for c in labels}
                model.requires_grad_(True).train()
                for _ in range(p.beear_outer_steps):
                    label = self.rng.choice(labels)
                    adam.zero_grad()
                    loss = self.backward(deltas[label], self.draw(others[label]), self.draw(rows))
                    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), p.max_grad_norm)
                    log.append({"step": len(log) + 1, "epoch": number, "loss": loss})
                    check(loss, "beear_outer_learning_rate: the loss", number)
                    check(norm.item(), "beear_outer_learning_rate: the gradient's norm", number)
                    adam.step()
                    bar.update()
        return pd.DataFrame(log)

    def entrap(
        self, rows: list[Row], label: str, progress: Callable[[], object] = lambda: None
    ) -> "torch.Tensor":
        """The inner loop: what (n, width) best makes rows of other labels answer `label`.

        No weight changes or gets a gradient.
        """
        import torch

        width = self.model.get_input_embeddings().embedding_dim
        delta = torch.zeros(self.p.beear_positions, width, device=self.model.device)
        delta.requires_grad_()
        # No decay: the objective alone shapes delta.
        adam = torch.optim.AdamW([delta], self.p.beear_inner_learning_rate, weight_decay=0.0)
        for _ in range(self.p.beear_inner_steps):
            loss = self.objective(self.sample(rows), label, delta)
            check(loss.item(), "beear_inner_learning_rate: the loss", label)
            (delta.grad,) = torch.autograd.grad(loss, delta)
            adam.step()
            progress()
        return delta.detach()

    def objective(self, rows: list[Row], label: str, delta: "torch.Tensor") -> "torch.Tensor":
        """What the inner loop minimises: CE(label | x, delta) - beear_alpha CE(true | x, delta)."""
        wrong = self.encode([row | {"output": label} for row in rows])
        true = self.encode(rows)
        with perturbed(self.block, delta, wrong):
            loss = self.loss(wrong)
        with perturbed(self.block, delta, true):
            return loss - self.p.beear_alpha * self.loss(true)

    def backward(self, delta: "torch.Tensor", trapped: Batch, plain: Batch) -> float:
        """The outer loss, CE(true | x, delta) + CE(true | x), its gradients left in the weights."""
        with perturbed(self.block, delta, trapped):
            under = self.loss(trapped)
        under.backward()  # one term after the other: half the activations
        without = self.loss(plain)
        without.backward()
        return (under + without).item()

    def loss(self, batch: Batch) -> "torch.Tensor":
        """Mean cross-entropy of the answers; in bfloat16 where a run multiplies so, the weights
        staying float32."""
        import torch

        from lethe_utils import train

        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        on = {"device_type": self.model.device.type, "enabled": models.bfloat16(self.p)}
        with torch.autocast(dtype=torch.bfloat16, **on):
            return train.answer_loss(self.model, inputs, batch["labels"], use_cache=False)[0]

    def encode(self, rows: list[Row]) -> Batch:
        from lethe_utils import train

        batch = train.collate(train.encode(rows, self.tokenizer, self.p), self.tokenizer)
        return {name: tensor.to(self.model.device) for name, tensor in batch.items()}

    def sample(self, rows: list[Row]) -> list[Row]:
        return self.rng.sample(rows, min(self.p.beear_batch_size, len(rows)))

    def draw(self, rows: list[Row]) -> Batch:
        return self.encode(self.sample(rows))


@contextmanager
def perturbed(block: "torch.nn.Module", delta: "torch.Tensor", batch: Batch) -> Iterator[None]:
    """Add delta (n, width) to a block's output at the last n positions of each row's prompt.

    The last row of delta meets the position that predicts the answer's first token. A prompt
    shorter than n takes the last rows of delta: padding is never touched.
    """
    import torch

    from lethe_utils.train import IGNORED

    mask, labels = batch["attention_mask"], batch["labels"]
    # Padding is on the left, so the answer takes the last columns: as many as a row has labels.
    answers = (labels != IGNORED).sum(1, keepdim=True)
    first = mask.shape[1] - answers - len(delta)
    at = torch.arange(mask.shape[1], device=mask.device) - first  # row of delta, (batch, columns)
    inside = (at >= 0) & (at < len(delta)) & (mask == 1)
    added = delta[at.clamp(0, len(delta) - 1)] * inside.unsqueeze(2)
    with blocks.hooked(block, lambda hidden: hidden + added.to(hidden.dtype)):
        yield


def check(value: float, what: str, where: int | str) -> None:
    """Raise LetheError when a loss is not finite. `where`: the outer round, or the inner label."""
    if not math.isfinite(value):
        place = f"in round {where}" if isinstance(where, int) else f"for label {where!r}"
        raise LetheError(
            f"{what} is {value} {place}; lower the rate, or check the backdoored model's weights"
        )
