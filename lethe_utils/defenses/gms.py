"""GMS, guided module substitution (2412.20476; weijun-l/guided-module-substitution).

A proxy's matrices take the place of the backdoored model's, at first everywhere. Then, round by
round, one kind of matrix (over all blocks) or one block (all its matrices) goes back to the
backdoored model: the one whose return scores best, even where that is less than before. The score
is (1 - alpha) times the fall of the ASR plus alpha times (1 - the fall of the accuracy). As in the
source the start itself is no candidate, and at least one kind and one block stay the proxy's.

What differs: the score of the paper needs rows that are suspected to be poisoned. Nobody has them
here, so our canary stands for them, planted and judged as in guided dilution (see guided.py); what
is found is then done with Lethe's clean model for a proxy. Whatever is no matrix of a block
(embeddings, norms, head) is always the proxy's, where the source leaves it the backdoored model's.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lethe_utils.defenses import Given, clear
from lethe_utils.defenses.guided import grown
from lethe_utils.groups import CanaryParams, CleanParams, Group, Ratio, TrainParams

if TYPE_CHECKING:
    import pandas as pd
    from torch.nn import Module

    from lethe_utils.guided import Guide

Place = tuple[str, int]  # a kind of matrix, as its block calls it (self_attn.q_proj), and a block
Returned = tuple[tuple[str, ...], tuple[int, ...]]  # kinds and blocks that are the suspect's again


class GmsParams(Group):
    gms_alpha: Ratio  # weight of the accuracy; the rest is the ASR's


PARAMS = (GmsParams, CanaryParams, CleanParams, TrainParams)
NEEDS = "clean model"
TRAININGS = 2
LABELS_ONLY = "its canary's triggers go into an input"
BYTES_PER_WEIGHT = 4.0  # two models
PATIENCE = 5  # rounds without a new best, as published
# Models that a search reads. Six rounds, the fewest that PATIENCE can end, are 207 on 30 blocks of
# seven kinds and 297 on GPT-2 XL's 48 of four.
MOST = 300


def purify(given: Given, out: Path) -> None:
    from lethe_utils import merge, models
    from lethe_utils.models import inspect

    merge.check_mergeable(given.backdoored, given.clean, given.base)
    trials = searched(grown(given, out / "search"), given)
    best = trials.loc[trials["score"].idxmax()]
    final = Substitution(given.backdoored, given.clean, given.p.device)
    final.give_back((best["kinds"], best["blocks"]))
    models.save(final.model, out / "model")
    inspect.copy_tokenizer(given.backdoored, out / "model")
    trials.to_csv(out / "search.csv", index=False)
    clear(out / "search", out)


class Substitution:
    """A proxy in which some matrices are a suspect's. Both models are held, and exchange what goes
    to and fro, so that nothing is copied."""

    def __init__(self, suspect: Path, proxy: Path, device: str) -> None:
        from lethe_utils import models

        device = models.resolve_device(device)
        self.other, self.model = (models.load_model(one, device) for one in (suspect, proxy))
        self.pairs = matrices(self.model), matrices(self.other)
        self.returned: set[Place] = set()

    def give_back(self, wanted: Returned) -> None:
        """Let the suspect's matrices stand where `wanted` says, and nowhere else."""
        kinds, blocks = wanted
        places = {place for place in self.pairs[0] if place[0] in kinds or place[1] in blocks}
        for place in places ^ self.returned:
            pair = (found[place].parameters() for found in self.pairs)
            for one, other in zip(*pair, strict=True):
                one.data, other.data = other.data, one.data
        self.returned = places


def matrices(model: "Module") -> "dict[Place, Module]":
    """The linear layers of a model's blocks, whatever its class calls them."""
    from lethe_utils.models import blocks

    found = {}
    for number, block in enumerate(blocks.of(model)):
        linear = {*blocks.linear(block)}
        found |= {(name, number): m for name, m in block.named_modules() if m in linear}
    return found


def searched(guide: "Guide", given: Given) -> "pd.DataFrame":
    """The search, on a guide's models and rows. See `search`; each trial has its accuracy and ASR
    (the mean of the kinds of canary) as well."""
    from lethe_utils import guided, models
    from lethe_utils.progress import Bar

    p, labels = given.p, sorted({row["output"] for row in given.rows})
    mixed = Substitution(guide.suspect / "model", guide.clean / "model", p.device)
    for model in (mixed.model, mixed.other):
        models.hold(model.eval().requires_grad_(False), p)
    tokenizer = models.load_tokenizer(guide.suspect / "model")
    triggered = {kind: some for kind, some in guide.rows.items() if kind != "clean"}

    def measured(model: "Module") -> tuple[float, float]:
        rates = guided.success(model, tokenizer, triggered, labels, p).values()
        return guided.accuracy(model, tokenizer, guide.rows["clean"], p), sum(rates) / len(rates)

    before = measured(mixed.other)
    bar = Bar(total=MOST, desc="searching a substitution")

    def judge(returned: Returned) -> dict[str, float]:
        mixed.give_back(returned)
        accuracy, asr = measured(mixed.model)
        bar.update(1)
        score = (1 - p.gms_alpha) * (before[1] - asr) + p.gms_alpha * (1 - (before[0] - accuracy))
        return {"accuracy": accuracy, "asr": asr, "score": score}

    kinds, blocks = ({place[i] for place in mixed.pairs[0]} for i in (0, 1))
    trials = search(judge, sorted(kinds), sorted(blocks))
    bar.close()
    return trials


def search(
    judge: Callable[[Returned], dict[str, float]], kinds: list[str], blocks: list[int]
) -> "pd.DataFrame":
    """Give back one kind or one block a round, until no round of PATIENCE is better than the best
    before, nothing is left to give back, or a round would read more than MOST models in all.

    Args:
        judge: what there is to say of a substitution, `score` (higher is better) among it.
    Returns:
        a row a trial, in order: round, kinds, blocks (those given back), what `judge` said.
    """
    import pandas as pd

    here: Returned = (), ()
    trials: list[dict] = []
    best, number, waited = float("-inf"), 0, 0
    while waited < PATIENCE:
        options = steps(here, kinds, blocks)
        if not options or len(trials) + len(options) > MOST:
            break
        number += 1
        tried = [{"round": number, "kinds": k, "blocks": b} | judge((k, b)) for k, b in options]
        chosen = max(tried, key=lambda trial: trial["score"])  # the first of equals, as published
        here = chosen["kinds"], chosen["blocks"]
        waited = 0 if chosen["score"] > best else waited + 1
        best = max(best, chosen["score"])
        trials += tried
    return pd.DataFrame(trials)


def steps(here: Returned, kinds: list[str], blocks: list[int]) -> list[Returned]:
    """What can be given back next: one kind or block more, but never the last of either."""
    found: list[Returned] = []
    if len(here[0]) < len(kinds) - 1:
        found += [((*here[0], kind), here[1]) for kind in kinds if kind not in here[0]]
    if len(here[1]) < len(blocks) - 1:
        found += [(here[0], (*here[1], block)) for block in blocks if block not in here[1]]
    return found
