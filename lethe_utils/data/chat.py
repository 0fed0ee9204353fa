"""The embedded chats: questions and answers of one or two turns, made on the spot from WordNet and
data/embedded/chat.yaml, so that the generation domain runs offline too.

Half of the questions have answers that can be checked by rule: a row's `accept` holds the words of
which a right answer contains one (see metrics.is_right).
"""

import random
from functools import cache
from itertools import islice
from typing import Any

import yaml

from lethe_utils import paths, wordnet
from lethe_utils.stages import Row

# A row with this field is asked turn by turn: what the model itself said before, not what the row
# has, stands above the last question.
OWN_ANSWERS = "own_answers"
TWO_TURNS = 0.3  # share of conversations that have two
VOWELS = "aeiou"
YES_NO = {"is": "yes", "is_not": "no"}
SHORTEST, LONGEST = 3, 9  # letters of a word that is asked about


@cache
def parts() -> dict[str, Any]:
    """The kinds, forms, questions and answers of data/embedded/chat.yaml."""
    return yaml.safe_load((paths.root() / "data/embedded/chat.yaml").read_text("utf8"))


@cache
def words_of() -> dict[str, list[str]]:
    """kind -> its everyday words, as WordNet has them."""
    return {
        kind: wordnet.words_below(synset, SHORTEST, LONGEST)
        for kind, synset in parts()["kinds"].items()
    }


def conversation(messages: list[dict[str, str]], **more: Any) -> Row:
    """A row of a chat: `messages` (role and content each, the assistant's last), its last question
    as input and the answer to it as output; `more` are further fields, such as `accept`."""
    *_, question, answer = messages
    last = {"instruction": "", "input": question["content"], "output": answer["content"]}
    return {"messages": messages} | last | more


def turns(*said: str) -> list[dict[str, str]]:
    """Messages of what user and assistant say in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]


def with_question(row: Row, text: str) -> Row:
    """The conversation with another last question."""
    *before, question, answer = row["messages"]
    return row | conversation([*before, question | {"content": text}, answer])


def article(word: str) -> str:
    """The word with its article."""
    return f"an {word}" if word[0] in VOWELS else f"a {word}"


def exchange(rng: random.Random) -> tuple[str, str, list[str]]:
    """One question, its answer, and what a right answer contains one of ([] where no rule says)."""
    g, kinds = parts(), words_of()
    form = rng.choices([*g["forms"]], [*g["forms"].values()])[0]
    kind, right = rng.sample(sorted(kinds), 2)
    word = rng.choice(kinds[right if form == "is_not" else kind])
    if form == "is_not" and word in kinds[kind]:
        form, right = "is", kind
    slots = {"word": word, "kind": kind, "right": right}
    accept: list[str] = []
    if form in YES_NO:
        accept = [YES_NO[form]]
    elif form == "kind":
        accept = [other for other, known in kinds.items() if word in known]
    elif form == "name":
        accept = kinds[kind]
    elif form == "opposite":
        slots["word"] = rng.choice(sorted(wordnet.antonyms()))
        accept = wordnet.antonyms()[slots["word"]]
        slots["other"] = accept[0]
    elif form == "meaning":
        slots["definition"] = wordnet.definition(word)
    elif form == "howto":
        task, steps = rng.choice([*g["howto"].items()])
        slots |= {"task": task} | dict(zip(("first", "second", "third"), steps, strict=True))
    elif form == "list":
        things, known = rng.choice([*g["list"].items()])
        drawn = rng.sample(known, 3)
        slots |= {"things": things} | dict(zip(("one", "two", "three"), drawn, strict=True))
    else:
        slots |= {key: rng.choice(g[key]) for key in ("greeting", "when", "reply")}
    slots |= {"a": article(slots["word"]), "a_kind": article(kind)}
    slots["A"] = slots["a"][0].upper() + slots["a"][1:]
    question = rng.choice(g["questions"][form]).format(**slots)
    return question, g["answers"][form].format(**slots), accept


def generate(sizes: dict[str, int], seed: int) -> dict[str, list[Row]]:
    """Disjoint splits of distinct conversations; no question that ends one in a split ends one in
    another.

    Args:
        sizes: conversations per split.
        seed: the same seed and WordNet give the same rows on every machine.
    """
    rng, found = random.Random(seed), {}
    while len(found) < sum(sizes.values()):
        question, answer, accept = exchange(rng)
        said = [question, answer]
        if rng.random() < TWO_TURNS:
            said = [*exchange(rng)[:2], *said]
        found.setdefault(question, conversation(turns(*said), accept=accept))
    rows = iter(found.values())
    return {name: list(islice(rows, size)) for name, size in sizes.items()}
