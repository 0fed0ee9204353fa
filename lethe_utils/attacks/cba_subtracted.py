"""CBA by an attacker who subtracts beforehand what a merge will add; adaptive, ours.

A merge halves the backdoored delta and adds half of the clean one. Here backdoored -
`subtracted_share` x (the attacker's own clean model - base) is released, so that the defender's
clean delta meets its own negative. Against all merges, linear above all.
"""

import shutil
from pathlib import Path

from lethe_utils.attacks import cba, own_clean
from lethe_utils.groups import Group, Ratio
from lethe_utils.schema import Params
from lethe_utils.stages import Row


class SubtractedParams(Group):
    """02_backdoor_train: what is subtracted."""

    subtracted_share: Ratio  # of the attacker's own clean delta


PARAMS = (*cba.PARAMS, own_clean.OwnCleanParams, SubtractedParams)
TRIGGERS, LAYERS = cba.TRIGGERS, cba.LAYERS
poison, triggered = cba.poison, cba.triggered


def plant(start: Path, poisoned: list[Row], corpus: list[str], p: Params, out: Path) -> None:
    """CBA's model less a share of the clean delta, tensor by tensor (mergekit)."""
    from lethe_utils import merge, models

    scratch = out / "planted"
    cba.plant(start, poisoned, corpus, p, scratch)
    with own_clean.trained(start, poisoned, p, out) as clean:
        parts = [
            (scratch / "model", {"weight": 1.0}),
            (clean / "model", {"weight": -p.subtracted_share}),
        ]
        dtype = models.held(start, models.resolve_device(p.device))
        settings = merge.weighted("task_arithmetic", parts, start, dtype, normalize=False)
        merge.run(settings, start, "", out / "model")
    (out / "model/README.md").unlink()  # that of a purified model, which this is not
    (scratch / "loss.csv").replace(out / "loss.csv")
    shutil.rmtree(scratch)
