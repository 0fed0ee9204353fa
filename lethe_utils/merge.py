"""Internal dilution: merge a backdoored and a clean model with mergekit.

`strength` s in [0, 1] is how much of the clean model goes in: 0 is the backdoored model, 1 the
clean one, .5 the paper's setting, for all four methods:
  linear       weights 1-s and s
  slerp        t = clip(curve + 2s - 1, 0, 1), the paper's curves over the layers at s = .5
  ties         weights 1-s and s, density .5 at s = .5 rising to 1 at either end
  passthrough  the lowest layers from the backdoored model, the round(s L) highest from the clean
"""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from lethe_utils import models
from lethe_utils.errors import LetheError
from lethe_utils.models import fit, inspect
from lethe_utils.stages import fresh, write_text

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from lethe_utils.defenses import Given

METHODS = ("linear", "slerp", "ties", "passthrough")
PAPER_STRENGTH = 0.5
# The published anchors of t over the depth, at that strength. A filter is part of a tensor's name:
# "attn" is found in LLaMA's self_attn and in GPT's attn alike.
SLERP_CURVES = {"attn": (0, 0.5, 0.3, 0.7, 1), "mlp": (1, 0.5, 0.7, 0.3, 0)}
SLERP_REST = 0.5
TIES_DENSITY = 0.5


def configuration(
    method: str,
    backdoored: Path,
    clean: Path,
    base: Path,
    strength: float,
    n_layers: int,
    dtype: str,
) -> dict[str, Any]:
    """The mergekit configuration of one merge.

    Args:
        strength: 0 (backdoored) to 1 (clean).
        n_layers: of the models; `layer_range` is half-open, so it must reach n_layers (the
            published example stops one short and drops the last block).
    Raises:
        LetheError: unknown method, or strength out of range.
    """
    if method not in METHODS:
        raise LetheError(f"merge_methods: unknown method {method!r}; one of {', '.join(METHODS)}")
    if not 0 <= strength <= 1:
        raise LetheError(f"strength: {strength} is out of range; it goes from 0 to 1")
    bad, good = str(backdoored.resolve()), str(clean.resolve())
    parts = [(backdoored, {"weight": 1 - strength}), (clean, {"weight": strength})]
    if method == "ties":
        density = TIES_DENSITY + abs(strength - 0.5) * (1 - TIES_DENSITY) / 0.5
        parts = [(model, weight | {"density": density}) for model, weight in parts]
        return weighted(method, parts, base, dtype, normalize=False, int8_mask=True)
    common = {"dtype": dtype, "merge_method": method}
    if method == "linear":
        return linear(parts, dtype)
    if method == "slerp":
        curves = {part: slerp_anchors(part, n_layers, strength) for part in SLERP_CURVES}
        return _slerp(curves, _shifted(SLERP_REST, strength), bad, good, n_layers, dtype)
    cut = n_layers - round(strength * n_layers)
    kept = [_layers(bad, 0, cut)] * (cut > 0) + [_layers(good, cut, n_layers)] * (cut < n_layers)
    return common | {"slices": [{"sources": [one]} for one in kept]}


def _slerp(
    curves: dict[str, list[float]], rest: float, bad: str, good: str, n_layers: int, dtype: str
) -> dict[str, Any]:
    """SLERP with t over the depth of each part of a block, and `rest` of all else."""
    t = [{"filter": part, "value": anchors} for part, anchors in curves.items()]
    return {
        "dtype": dtype,
        "merge_method": "slerp",
        "slices": [{"sources": [_layers(bad, 0, n_layers), _layers(good, 0, n_layers)]}],
        "base_model": bad,
        "parameters": {"t": [*t, {"value": rest}]},
    }


def linear(parts: list[tuple[Path, dict[str, float]]], dtype: str) -> dict[str, Any]:
    """A mergekit configuration of a weighted mean of models, however many; see `weighted`."""
    return {"dtype": dtype, "merge_method": "linear", "models": _models(parts)}


def _models(parts: list[tuple[Path, dict[str, float]]]) -> list[dict[str, Any]]:
    return [{"model": str(model.resolve()), "parameters": values} for model, values in parts]


def _layers(model: str, first: int, end: int) -> dict[str, Any]:
    return {"model": model, "layer_range": [first, end]}


def _shifted(t: float, strength: float) -> float:
    return min(1.0, max(0.0, t + 2 * strength - 1))


def slerp_anchors(part: str, n_layers: int, strength: float) -> list[float]:
    """What mergekit is given for t of "attn" or "mlp", evenly over the depth."""
    return [_shifted(t, strength) for t in _anchors(SLERP_CURVES[part], n_layers)]


def _anchors(curve: Sequence[float], n_layers: int) -> list[float]:
    """A curve over the depth for so many layers.

    A model with fewer layers than the curve has anchors would meet its ends only (two layers: all
    of one parent's attention, all of the other's MLP), so there each layer takes the curve's mean
    over its share of the depth.
    """
    if n_layers >= len(curve):
        return list(curve)
    depth = np.linspace(0, 1, len(curve))
    shares = [(i + (np.arange(100) + 0.5) / 100) / n_layers for i in range(n_layers)]
    return [round(float(np.interp(share, depth, curve).mean()), 4) for share in shares]


def slerp_t(part: str, n_layers: int, strength: float) -> list[float]:
    """t of "attn" or "mlp" in every block, as mergekit interpolates it: 0 is the backdoored
    model's, 1 the clean model's."""
    anchors = slerp_anchors(part, n_layers, strength)
    depths = np.linspace(0, 1, n_layers), np.linspace(0, 1, len(anchors))
    return np.interp(*depths, anchors).tolist()


def slerp_table(n_layers: int, strengths: Iterable[float]) -> "pd.DataFrame":
    """t over the blocks: block (from 0), part (attention, MLP), strength, t."""
    import pandas as pd

    lines = [
        {"block": block, "part": name, "strength": strength, "t": t}
        for strength in dict.fromkeys(strengths)
        for part, name in (("attn", "attention"), ("mlp", "MLP"))
        for block, t in enumerate(slerp_t(part, n_layers, strength))
    ]
    return pd.DataFrame(lines)


def merge_dtype(given: "Given") -> str:
    """The dtype that a defender's models are merged in: as they are loaded."""
    return models.held(given.backdoored, models.resolve_device(given.p.device))


def check_mergeable(backdoored: Path, clean: Path, base: Path) -> None:
    """Refuse models that do not fit together, before anything is written; see models.fit."""
    models.load_tokenizer(backdoored)  # a broken one that all three share is refused too
    for other in (clean, base):
        fit.check_weights(other, backdoored)
        if not fit.same_tokenizer(other, backdoored):
            fit.check_tokens(models.load_tokenizer(other), other, backdoored)


def merge(
    method: str,
    backdoored: Path,
    clean: Path,
    base: Path,
    strength: float,
    out: Path,
    dtype: str = "float32",
    out_dtype: str | None = None,
) -> Path:
    """Merge two model folders into `out`: weights, tokenizer, merge config and model card.

    Args:
        base: the pretrained model both come from (TIES measures deltas from it).
        dtype: float32 on the CPU, bfloat16 at full size (published: float16).
        out_dtype: of the result, where it differs.
    Raises:
        LetheError: the models do not fit together, the disk is too full for the result, or `out`
            holds something that is not a stage's.
    """
    check_mergeable(backdoored, clean, base)
    n_layers = inspect.count_blocks(backdoored)
    settings = configuration(method, backdoored, clean, base, strength, n_layers, dtype)
    settings |= {"out_dtype": out_dtype} if out_dtype else {}
    return run(settings, backdoored, f"{method}, strength {strength}", out)


def merge_along(
    curves: dict[str, Sequence[float]],
    backdoored: Path,
    clean: Path,
    base: Path,
    out: Path,
    dtype: str = "float32",
    out_dtype: str | None = None,
) -> Path:
    """SLERP along curves of one's own; see `merge`.

    Args:
        curves: of "attn" and "mlp", t at even depths (0: backdoored, 1: clean); whatever is in
            neither (embeddings, norms) takes their mean.
    """
    check_mergeable(backdoored, clean, base)
    n_layers = inspect.count_blocks(backdoored)
    folders = [str(model.resolve()) for model in (backdoored, clean)]
    fitted = {part: _anchors(curve, n_layers) for part, curve in curves.items()}
    settings = _slerp(fitted, mean_t(curves), *folders, n_layers, dtype)
    settings |= {"out_dtype": out_dtype} if out_dtype else {}
    return run(settings, backdoored, f"guided, mean t {mean_t(curves):g}", out)


def mean_t(curves: dict[str, Sequence[float]]) -> float:
    """The mean of t over all parts and depths."""
    return round(float(np.mean([t for curve in curves.values() for t in curve])), 3)


def run(
    settings: dict[str, Any], backdoored: Path, title: str, out: Path, seed: int | None = None
) -> Path:
    """Let mergekit merge models that fit together; see `merge`.

    Args:
        settings: mergekit's configuration.
        seed: of what a method draws at random (DARE).
    """
    import torch
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    out.parent.mkdir(parents=True, exist_ok=True)
    check_disk(out.parent, inspect.weights_size(backdoored))
    fresh(out)
    # mergekit's own model card writer asks the hub about every model: ours stays offline.
    options = MergeOptions(
        write_model_card=False,
        quiet=True,
        copy_tokenizer=False,  # it may save it anew; ours is copied byte for byte
        trust_remote_code=False,
        random_seed=seed,
        out_shard_size=models.SHARD,
        # TIES sorts whole matrices, on a CPU for an hour; small models merge alike on any machine.
        cuda=torch.cuda.is_available() and models.is_large(backdoored),
    )
    run_merge(MergeConfiguration.model_validate(as_paths(settings)), str(out), options=options)
    inspect.copy_tokenizer(backdoored, out)
    inspect.check_finite(inspect.weight_files(out))  # float16 may be too small for what was added
    write_text(out / "mergekit_config.yml", yaml.safe_dump(settings, sort_keys=False))
    write_text(out / "README.md", _card(title, settings))
    return out


def as_paths(settings: Any) -> Any:
    """A configuration whose models are paths beyond doubt: in a text mergekit takes `+` for a LoRA
    and `@` for a revision, but a folder may be called by either."""
    if isinstance(settings, list):
        return [as_paths(one) for one in settings]
    if not isinstance(settings, dict):
        return settings
    return {
        key: {"model": {"path": value}}
        if key in ("model", "base_model") and isinstance(value, str)
        else as_paths(value)
        for key, value in settings.items()
    }


def weighted(
    method: str,
    parts: list[tuple[Path, dict[str, float]]],
    base: Path,
    dtype: str,
    **shared: Any,
) -> dict[str, Any]:
    """A mergekit configuration of a method that adds weighted deltas to the base.

    Args:
        parts: model folder, and its parameters (weight, density).
        shared: parameters of the whole merge.
    """
    common = {"dtype": dtype, "merge_method": method, "models": _models(parts)}
    return common | {"base_model": str(base.resolve()), "parameters": shared}


def distances(merged: dict[str, Path], backdoored: Path, clean: Path) -> "pd.DataFrame":
    """How far each merged model is from its parents, and whether it is whole.

    Returns:
        one row a model: tensors, NaN values, and the distance to either parent as a share of the
        distance between the parents (Euclidean, over all weights; linear .5 gives .5 and .5).
    """
    import pandas as pd
    import torch

    parents = readers(backdoored), readers(clean)
    apart = _distance(*parents)
    table = []
    for name, folder in merged.items():
        weights = readers(folder)
        far = [_distance(weights, parent) / apart for parent in parents]
        nan = sum(int(torch.isnan(read()).sum()) for read in weights.values())
        table.append([name, len(weights), nan, *(round(f.item(), 3) for f in far)])
    columns = ["defense", "tensors", "NaN", "from backdoored", "from clean"]
    return pd.DataFrame(table, columns=columns).set_index("defense")


def readers(folder: Path) -> "dict[str, Callable[[], torch.Tensor]]":
    """For every tensor of a folder how to read it, in float32: one at a time, for large models."""
    return {
        name: partial(_weight, file, name)
        for file in inspect.weight_files(folder)
        for name in inspect.tensor_shapes(file)
    }


def _weight(file: Path, name: str) -> "torch.Tensor":
    from safetensors import safe_open

    with safe_open(file, "pt") as stored:
        return stored.get_tensor(name).float()


def _distance(
    one: "dict[str, Callable[[], torch.Tensor]]", other: "dict[str, Callable[[], torch.Tensor]]"
) -> "torch.Tensor":
    """Euclidean distance of two models, over the tensors of the second."""
    return sum((one[name]() - read()).square().sum() for name, read in other.items()).sqrt()


def check_disk(folder: Path, needed: int) -> None:
    """Raise LetheError when `folder`'s disk has fewer than `needed` bytes (plus 1 %) free."""
    free = shutil.disk_usage(folder).free
    if free < needed * 1.01:
        raise LetheError(
            f"{folder}: the merge needs {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are "
            "free; free some space or point LETHE_RUNS at a larger disk"
        )


def _card(title: str, settings: dict[str, Any]) -> str:
    return (
        f"# Purified model: {title}\n\n"
        "Made by lethe: a backdoored model diluted with a clean one trained from the same base\n"
        "(internal dilution). It is a research artifact: the backdoored parent was poisoned on\n"
        "purpose, and dilution lowers the attack success rate without a guarantee.\n\n"
        f"```json\n{json.dumps(settings, indent=1)}\n```\n"
    )
