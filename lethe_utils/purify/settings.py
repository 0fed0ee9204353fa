"""The params of `purify`: the recipe, the merge strengths to try, and the canary."""

from typing import Annotated, Any, Literal

from pydantic import Field

from lethe_utils import params, paths
from lethe_utils.canary import CanaryRecipe
from lethe_utils.defenses.lethe import MergeMethod
from lethe_utils.groups import Positive, Ratio, Recipe


class PurifyParams(Recipe, CanaryRecipe):
    """Purifying a user's model: the recipe, the merge strengths to try, and the canary."""

    prompt_template: Literal["alpaca", "short", "chat"]
    data_seed: int
    protocol: Literal["lethe"]
    clean_epochs: Positive
    n_keywords: Annotated[int, Field(gt=0)]
    held_out: Annotated[float, Field(gt=0, lt=1)]
    few_held_out: Annotated[int, Field(ge=0)]  # rows; with fewer, performance is cross-fitted
    max_rounds: Positive  # of each training
    merge_methods: Annotated[list[MergeMethod | Literal["guided"]], Field(min_length=1)]
    strengths: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1)]
    max_cda_loss: Ratio
    canary_limit: Ratio  # ASR of each kind after the merge, up to which the verdict is "diluted"


SIZES = {50_000_000: "under_50m", 1_000_000_000: "under_1b"}  # weights -> the file for fewer


def load(weights: int, device: str, overrides: dict[str, Any] | None = None) -> PurifyParams:
    """The params of `purify`: base < purify < purify/cpu < the model's size < command line.

    Args:
        weights: how many the model has; smaller ones train with other recipes.
        device: cpu or cuda.
    Raises:
        LetheError: naming the file and the key of each wrong value.
    """
    own = ["purify.yaml"]
    own += ["purify/cpu.yaml"] if device == "cpu" else []
    own += [f"purify/{name}.yaml" for limit, name in SIZES.items() if weights < limit][:1]
    base = params.read_yaml(paths.params_dir() / "base.yaml")
    shared = {k: v for k, v in base.items() if k in PurifyParams.model_fields}
    found = [
        ("params/base.yaml", shared),
        *(layer for file in own for layer in params.read_layers(file, [])),
    ]
    values, set_in = params.layered([*found, ("command line", overrides or {})])
    return params.checked(PurifyParams, values, set_in).model_copy(update={"device": device})
