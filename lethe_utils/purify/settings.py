"""The params of `purify`: the recipe, the merge strengths to try, and the canary."""

from typing import Annotated, Any, Literal

from pydantic import Field

from lethe_utils import params, paths
from lethe_utils.defenses.lethe import MergeMethod
from lethe_utils.groups import Key, Positive, Ratio, Recipe


class PurifyParams(Recipe):
    """Purifying a user's model: the recipe, the merge strengths to try, and the canary."""

    prompt_template: Literal["alpaca", "short", "chat"]
    data_seed: int
    protocol: Literal["lethe"]
    clean_epochs: Positive
    n_keywords: Annotated[int, Field(gt=0)]
    merge_method: MergeMethod
    held_out: Annotated[float, Field(gt=0, lt=1)]
    strengths: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1)]
    max_cda_loss: Ratio
    canary_word_pair: Annotated[list[Key], Field(min_length=2, max_length=2)]
    canary_sentence: Key
    canary_suffix: Key
    canary_marker: Key
    canary_share: Annotated[float, Field(gt=0, le=1)]
    canary_epochs: Positive


SMALL = 50_000_000  # weights; params/purify/small.yaml is for models below


def load(weights: int, device: str, overrides: dict[str, Any] | None = None) -> PurifyParams:
    """The params of `purify`: base < purify < purify/cpu < purify/small < command line.

    Args:
        weights: of the model; small ones train with another recipe.
        device: cpu or cuda.
    Raises:
        LetheError: naming the file and the key of each wrong value.
    """
    own = ["purify.yaml"]
    own += ["purify/cpu.yaml"] if device == "cpu" else []
    own += ["purify/small.yaml"] if weights < SMALL else []
    base = params.read_yaml(paths.params_dir() / "base.yaml")
    shared = {k: v for k, v in base.items() if k in PurifyParams.model_fields}
    found = [
        ("params/base.yaml", shared),
        *(layer for file in own for layer in params.read_layers(file, [])),
    ]
    values, set_in = params.layered([*found, ("command line", overrides or {})])
    return params.checked(PurifyParams, values, set_in).model_copy(update={"device": device})
