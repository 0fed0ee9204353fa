"""F/P, fine-pruning (1805.12185) as CleanGen's repository ports it: Wanda, then F/T.

The LoRA that F/T adds would refill the zeros: the merged weights are masked again.
"""

import shutil
from pathlib import Path

from lethe_utils.defenses import Given, wanda
from lethe_utils.defenses.finetune import FinetuneParams
from lethe_utils.defenses.wanda import WandaParams
from lethe_utils.groups import TrainParams
from lethe_utils.models import blocks, inspect

PARAMS = (WandaParams, FinetuneParams, TrainParams)
NEEDS = "clean rows"
TRAININGS = 1
BYTES_PER_WEIGHT = 4.0  # one model in float32


def purify(given: Given, out: Path) -> None:
    import torch

    from lethe_utils import models, train

    pruned = out / "pruned"
    if not (pruned / "done").exists():  # a killed run goes on from the pruned model
        wanda.purify(given, pruned)
        (pruned / "done").touch()
    tuned = out / "tuned"
    train.finetune(pruned / "model", given.rows, given.p.finetune_epochs, tuned, given.p)
    zeros = models.load_model(pruned / "model")
    model = models.load_model(tuned / "model")
    with torch.no_grad():
        for before, after in zip(blocks.of(zeros), blocks.of(model), strict=True):
            layers = zip(blocks.linear(before), blocks.linear(after), strict=True)
            for old, new in layers:
                new.weight[old.weight == 0] = 0
    inspect.copy_tokenizer(tuned / "model", out / "model")
    models.save(model, out / "model")
    shutil.copy(tuned / "loss.csv", out)
    for folder in (pruned, tuned):
        shutil.rmtree(folder)
