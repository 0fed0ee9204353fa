"""Fine-mixing (2210.09545): each weight is the backdoored model's or the pretrained base's, drawn
at random; the mix is then fine-tuned on the clean rows.

What differs from the paper: LoRA where it trains all weights; E-PUR, its cleaning of the word
embeddings, is left out, as LoRA and our edits leave embeddings alone; and `mixing_ratio` is one
value, where the paper looks for the share that keeps the accuracy it asks for.
"""

import shutil
from pathlib import Path

from lethe_utils.defenses import Given
from lethe_utils.groups import Group, Positive, Ratio, TrainParams


class MixingParams(Group):
    """Fine-mixing."""

    mixing_ratio: Ratio  # share of each tensor's weights that stay the backdoored model's
    mixing_epochs: Positive


PARAMS = (MixingParams, TrainParams)
NEEDS = "clean rows"
TRAININGS = 1
BYTES_PER_WEIGHT = 2.6  # nf4, and its dequantised copy when LoRA is merged; mixing is on the CPU


def purify(given: Given, out: Path) -> None:
    from lethe_utils import train

    mixed = out / "mixed"
    if not (mixed / "done").exists():  # a killed run goes on from the mix
        mix(given, mixed)
        (mixed / "done").touch()
    train.finetune(mixed / "model", given.rows, given.p.mixing_epochs, out, given.p)
    shutil.rmtree(mixed)


def mix(given: Given, out: Path) -> None:
    """Write the mix of weights; of the base one tensor is read at a time."""
    import torch

    from lethe_utils import merge, models
    from lethe_utils.models import fit, inspect

    fit.check_weights(given.backdoored, given.base)
    model = models.load_model(given.backdoored)
    base = {name.removeprefix("transformer."): r for name, r in merge.readers(given.base).items()}
    rng = torch.Generator().manual_seed(given.p.seed)
    for name, weight in model.named_parameters():
        kept = torch.rand(weight.shape, generator=rng) < given.p.mixing_ratio
        pretrained = base[name.removeprefix("transformer.")]().to(weight.dtype)
        weight.data = torch.where(kept, weight.data, pretrained)
    models.save(model, out / "model")
    inspect.copy_tokenizer(given.backdoored, out / "model")
