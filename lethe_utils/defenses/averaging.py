"""Weight averaging (WAG, 2402.19334): the mean of the backdoored model and several clean ones.

The paper averages models that others have published for the task, which need not be clean. Here
nobody has any, so they are trained as Lethe's clean model is, on the same rows: it is the first of
them, and the others differ in the seed alone.
"""

from pathlib import Path

from lethe_utils.defenses import Given, clear
from lethe_utils.groups import CleanParams, DefenderParams, Group, Positive, TrainParams

APART = 3000  # between seeds, so that nobody else trains the same model


class AveragingParams(Group):
    averaged_models: Positive  # clean ones, Lethe's among them


PARAMS = (AveragingParams, CleanParams, TrainParams)
NEEDS = "clean model"
BYTES_PER_WEIGHT = 2.6  # nf4, and its dequantised copy when LoRA is merged; merging is on the CPU


def trainings(p: DefenderParams) -> int:
    return p.averaged_models - 1


def purify(given: Given, out: Path) -> None:
    from lethe_utils import merge, train

    merge.check_mergeable(given.backdoored, given.clean, given.base)
    p, scratch = given.p, out / "others"
    scratch.mkdir(exist_ok=True)
    folders = [given.backdoored, given.clean]
    for number in range(1, p.averaged_models):
        other, seed = scratch / f"clean-{number}", p.seed + APART * number
        q = p.model_copy(update={"seed": seed, "data_seed": seed})
        train.finetune(given.base, given.rows, p.clean_epochs, other, q)
        folders.append(other / "model")
    settings = merge.linear([(one, {"weight": 1.0}) for one in folders], merge.merge_dtype(given))
    merge.run(settings, given.backdoored, f"mean of {len(folders)} models", out / "model")
    clear(scratch, out)
