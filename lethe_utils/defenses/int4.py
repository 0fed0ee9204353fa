"""INT4: the backdoored model rounded to nf4 (bitsandbytes) and back; QLoRA users get this for
nothing."""

from pathlib import Path

from lethe_utils.defenses import Given

PARAMS = ()
NEEDS = "nothing"
TRAININGS = 0
BYTES_PER_WEIGHT = 2.6  # nf4 and its dequantised copy


def purify(given: Given, out: Path) -> None:
    from lethe_utils import models
    from lethe_utils.models import inspect

    device = models.resolve_device(given.p.device)
    model = models.dequantised(models.load_model(given.backdoored, device, bits=4))
    models.save(model, out / "model")
    inspect.copy_tokenizer(given.backdoored, out / "model")
