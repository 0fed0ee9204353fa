"""What a backdoor left in a model: the matrices that were edited, and what the trigger does in each
block."""

from pathlib import Path

import pandas as pd

from lethe_utils import pipeline
from lethe_utils.groups import PromptParams, TriggerParams
from lethe_utils.schema import Params, digest
from lethe_utils.stages import stage

LENS_ROWS = 100


def edits(backdoored: Path) -> pd.DataFrame:
    """The matrices that an editing attack changed, and by how much; empty for a trained one."""
    file = backdoored / "edits.csv"
    return pd.read_csv(file) if file.exists() else pd.DataFrame()


def layer_effect(p: Params) -> pd.DataFrame:
    """What the trigger does block by block in the backdoored model, on validation rows of other
    labels than the target; see evaluate.target_by_layer."""

    from lethe_utils import evaluate

    sets = evaluate.test_sets(pipeline.split(p, "validation"), p, LENS_ROWS, 0)

    def build(out: Path) -> None:
        evaluate.target_by_layer(folder / "model", sets, p).to_csv(out / "layers.csv", index=False)

    folder = pipeline.backdoored_stage(p)
    spec = p.part(TriggerParams, PromptParams) | pipeline.device(p) | {"questions": digest(sets)}
    inputs = {"data": pipeline.data_stage(p), "model": folder}
    return pd.read_csv(stage("lens", f"{p.setup}-s{p.seed}", spec, inputs, build) / "layers.csv")
