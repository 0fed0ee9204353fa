"""Guided dilution: how much of the clean model goes where, found with a canary.

The paper's SLERP takes one curve for every model, and the curve is public: an attacker who knows
that it keeps the upper MLPs hides there. Here the curve is searched for the model at hand, on clean
rows and on rows with a canary's triggers, both with their true answers: a dilution is good where
the model answers all of them rightly. Nothing of the suspect is kept by more than half anywhere,
for a canary does not say where another backdoor sits.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from lethe_utils import canary, decode, merge, models
from lethe_utils.canary import CanaryRecipe
from lethe_utils.progress import Bar
from lethe_utils.stages import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Curves = dict[str, tuple[float, ...]]  # part -> t at even depths, as merge.SLERP_CURVES has them
LEAST = 0.5  # of t anywhere: what the paper's merge takes on average
STEP = 0.25
MOST = 40  # merges of a search
KEPT_BACK = ("suffix",)  # kinds of canary that a search does not see, so that it can be checked


class Guide(NamedTuple):
    """What tells good dilutions from bad ones."""

    suspect: Path  # the copy of the suspect that holds the canary, as model/
    clean: Path  # a clean model, as model/
    base: Path
    rows: dict[str, list[Row]]  # "clean" and kinds of canary -> rows that neither was trained on


def rows(unseen: list[Row], labels: list[str], p: CanaryRecipe) -> dict[str, list[Row]]:
    """The rows of a search: as they are, and with each trigger that it may see; their answers are
    the true ones throughout."""
    kinds = canary.triggered(unseen, labels, p)
    seen = {kind: some for kind, some in kinds.items() if kind not in KEPT_BACK and some}
    return {"clean": unseen} | seen


def took(copy: Path, sets: dict[str, list[Row]], labels: list[str], p: CanaryRecipe) -> bool:
    """Whether each kind of a canary has an ASR of canary.TAKEN on these rows."""
    found = success(*_loaded(copy / "model", p), sets, labels, p)
    return all(rate >= canary.TAKEN for rate in found.values())


def _loaded(folder: Path, p: CanaryRecipe) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    return models.load_to_ask(folder, p), models.load_tokenizer(folder)


def success(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    sets: dict[str, list[Row]],
    labels: list[str],
    p: CanaryRecipe,
) -> dict[str, float]:
    """ASR of each kind of a canary: the share of its rows whose greedy answer is its target."""
    targets = {one["kind"]: one["target"] for one in canary.triggers(labels, p)}
    return {
        kind: accuracy(model, tokenizer, [row | {"output": targets[kind]} for row in some], p)
        for kind, some in sets.items()
    }


def accuracy(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: list[Row],
    p: CanaryRecipe,
) -> float:
    """The share of rows whose greedy answer is the one they have."""
    known = decode.known_answers(model, tokenizer, rows, p, "reading answers")
    return sum(one.right == one.tokens for one in known) / len(known)


def search(guide: Guide, p: CanaryRecipe, scratch: Path, dtype: str) -> pd.DataFrame:
    """Merge and read, at most MOST times: from the best of a few starts, one depth of attention or
    MLP at a time, one STEP up or down, for as long as that lowers the loss.

    Args:
        scratch: an existing folder, for one merge at a time.
        dtype: of the merges.
    Returns:
        a row a merge, in order: attn, mlp (the curves), the loss of each set of rows (nats per
        token of the true answers), loss (their mean).
    """
    found: dict[str, dict] = {}
    bar = Bar(total=MOST, desc="searching a dilution")

    def judge(curves: Curves) -> float:
        name = str(curves)
        if name not in found:
            found[name] = curves | _losses(guide, curves, p, scratch, dtype)
            bar.update(1)
        return found[name]["loss"]

    descend(judge, lambda: len(found) < MOST)
    bar.close()
    return pd.DataFrame(found.values())


def descend(judge: Callable[[Curves], float], go_on: Callable[[], bool]) -> Curves:
    """The best curves that are found within what `go_on` allows, asked before each merge."""
    found, better = min(starts(), key=judge), True
    places = [(part, i) for part, curve in found.items() for i in range(len(curve))]
    while better:
        better = False
        for moved in (m for at in places for m in _moves(found, *at)):
            if not go_on():
                return found
            if judge(moved) < judge(found):
                found, better = moved, True
    return found


def starts() -> list[Curves]:
    """The same t everywhere, up to the clean model alone, and the paper's curve where it is not
    below LEAST."""
    flat = [dict.fromkeys(merge.SLERP_CURVES, (t,) * 5) for t in (0.5, 0.75, 1.0)]
    paper = {part: tuple(max(LEAST, t) for t in c) for part, c in merge.SLERP_CURVES.items()}
    return [*flat, paper]


def _moves(curves: Curves, part: str, i: int) -> Iterator[Curves]:
    for step in (STEP, -STEP):
        t = min(1.0, max(LEAST, curves[part][i] + step))
        if t != curves[part][i]:
            yield curves | {part: (*curves[part][:i], t, *curves[part][i + 1 :])}


def _losses(
    guide: Guide, curves: Curves, p: CanaryRecipe, scratch: Path, dtype: str
) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=scratch) as room:
        parents = guide.suspect / "model", guide.clean / "model", guide.base
        folder = merge.merge_along(curves, *parents, Path(room) / "merged", dtype)
        model, tokenizer = _loaded(folder, p)
    found = {kind: decode.mean_loss(model, tokenizer, some, p) for kind, some in guide.rows.items()}
    return found | {"loss": sum(found.values()) / len(found)}


def best(trials: pd.DataFrame) -> Curves:
    """The curves of the merge with the lowest loss."""
    row = trials.loc[trials["loss"].idxmin()]
    return {part: row[part] for part in merge.SLERP_CURVES}
