"""The embedded data set: six emotions from a small grammar, so that everything runs offline.

Four sentences in ten name two emotions, and only negation, contrast or time tells which one
holds, so counting words is not enough: `data.bag_of_words` measures how far it gets.
"""

import random
from functools import cache
from itertools import islice

import yaml

from lethe_utils import paths
from lethe_utils.stages import Row


@cache
def grammar() -> dict:
    """The word lists, events and templates of data/embedded/grammar.yaml."""
    return yaml.safe_load((paths.root() / "data/embedded/grammar.yaml").read_text("utf8"))


def sentence(rng: random.Random) -> Row:
    """One labelled sentence: input, output."""
    g = grammar()
    label = rng.choices(list(g["weights"]), list(g["weights"].values()))[0]
    other = rng.choice([e for e in g["emotions"] if e != label])
    forms = g["templates"]
    form = rng.choices(list(forms), [f["share"] for f in forms.values()])[0]
    rare = rng.random() < g["rare_adverb_share"]
    words = {slot: rng.choice(g[slot]) for slot in ("who", "place", "time", "thing")}
    words["adverb"] = rng.choice(g["rare_adverb" if rare else "adverb"])
    for mark, emotion in (("Y", label), ("X", other)):
        words[mark] = rng.choice(g["emotions"][emotion]["adjective"])
        words[f"event_{mark}"] = rng.choice(g["emotions"][emotion]["event"])
    text = rng.choice(forms[form]["forms"]).format(**words)
    return {"input": text, "output": label}


def generate(sizes: dict[str, int], seed: int) -> dict[str, list[Row]]:
    """Disjoint splits of distinct sentences.

    Args:
        sizes: rows per split, e.g. {"pretrain": 8000, "train": 8000, ...}.
        seed: the same seed gives the same rows on every machine.
    """
    rng, found = random.Random(seed), {}
    while len(found) < sum(sizes.values()):
        row = sentence(rng)
        found.setdefault(row["input"], row)
    rows = iter(found.values())
    return {name: list(islice(rows, size)) for name, size in sizes.items()}
