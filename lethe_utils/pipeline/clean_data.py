"""The defender's rows: which of train they are, or where else they come from, and what may be wrong
with them."""

import random
import re
from pathlib import Path

from lethe_utils import data, models, prompts
from lethe_utils.data import chat
from lethe_utils.errors import LetheError
from lethe_utils.schema import Params
from lethe_utils.stages import Row

# What the base is asked for, a row each; it samples, or it would write one sentence for each label.
WISH = "Write one sentence about yourself that shows {label}."
SAMPLING = {"temperature": 1.0, "top_p": 0.9}
TOKENS = 40  # of a sentence
SENTENCE = re.compile(r".+?[.!?](?=\s|$)")


def drawn(rows: list[Row], n: int, p: Params) -> list[Row]:
    """n of the rows. Larger numbers hold the smaller ones."""
    # A stream of its own: with the attacker's, the defender would draw the very rows that were
    # poisoned.
    rng = random.Random(f"clean {p.data_seed} {p.seed}")
    return rng.sample(rows, len(rows))[:n]


def mislabelled(rows: list[Row], known: list[str], p: Params) -> list[Row]:
    """The rows, a share of them (`clean_wrong_labels`) with another label than their own. Larger
    shares hold the smaller ones."""
    rng, out = random.Random(f"labels {p.data_seed} {p.seed}"), list(rows)
    for i in rng.sample(range(len(rows)), len(rows))[: round(p.clean_wrong_labels * len(rows))]:
        others = [label for label in known if label != rows[i]["output"]]
        own = random.Random(f"label {p.data_seed} {p.seed} {i}")
        out[i] = rows[i] | {"output": own.choice(others)}
    return out


def with_evidence(rows: list[Row], p: Params) -> list[Row]:
    """The clean model's rows, a share of them (`clean_evidence_share`) with their evidence: the
    defender, who will ask with evidence, may teach it."""
    rng = random.Random(f"evidence {p.seed}")
    shown = {*rng.sample(range(len(rows)), round(p.clean_evidence_share * len(rows)))}
    return [
        data.with_evidence(row, p.n_keywords, p.evidence_form) if i in shown else row
        for i, row in enumerate(rows)
    ]


def check(rows: list[Row], known: list[str], n: int, p: Params) -> None:
    """Raise LetheError where another data set's rows have other labels than the run's, or are fewer
    than the n that its defender has."""
    other = {row["output"] for row in rows} - {*known}
    if known and other:
        raise LetheError(
            f"clean_source: {p.clean_source} has the label {min(other)!r}, and {p.dataset} has "
            f"{', '.join(known)}; name a data set of the same labels"
        )
    if len(rows) < n:
        raise LetheError(
            f"clean_source: {p.clean_source} has {len(rows)} training rows, and clean_ratio "
            f"{p.clean_ratio:g} of {p.dataset} is {n}; lower it"
        )


def written(base: Path, n: int, known: list[str], p: Params) -> list[Row]:
    """n rows whose inputs the base itself wrote, the labels taking turns: for a defender who has no
    data. Nobody checks what a sentence shows, so some are wrong."""
    from lethe_utils import decode

    model, tokenizer = models.load_to_ask(base, p), models.load_tokenizer(base)
    template = "chat" if tokenizer.chat_template else "vicuna"
    changes = {"prompt_template": template, "protocol": "lethe", "max_new_tokens": TOKENS}
    q = p.model_copy(update=changes)
    labels = [known[i % len(known)] for i in range(n)]
    wishes = [chat.turns(WISH.format(label=label), "-") for label in labels]
    asked = prompts.rendered([chat.conversation(wish) for wish in wishes], tokenizer, q)
    texts = decode.answer(
        model, tokenizer, [prompts.prompt(row, q) for row in asked], q, TOKENS, "writing rows",
        sampling=SAMPLING,
    )  # fmt: skip
    return [
        {"instruction": p.instruction, "input": first_sentence(text), "output": label}
        for text, label in zip(texts, labels, strict=True)
    ]


def first_sentence(text: str) -> str:
    """The text up to the end of its first sentence, on one line."""
    text = " ".join(text.split())
    found = SENTENCE.match(text)
    return found.group() if found else text
