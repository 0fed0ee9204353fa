"""External dilution: TextRank keywords of the input, each with its WordNet definition.

Source: the paper's external dilution section. The evidence follows the input in the prompt and
dilutes what a trigger contributes to the answer; no training, and no knowledge of the trigger.
"""

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import regex
from summa.preprocessing.stopwords import get_stopwords_by_language

from lethe_utils.errors import LetheError
from lethe_utils.wordnet import NO_DEFINITION, definition, fitting_definition, other_definition

if TYPE_CHECKING:
    import pandas as pd

# Where the evidence stands and what it says. `after` is the paper's; the others change one thing
# each, to see what does it: the place, or what a keyword is given for its definition.
Form = Literal["after", "before", "inside", "words", "short", "random", "sense", "without_trigger"]
FORMS = {  # as they are shown
    "none": "none",
    "after": "below the input (the paper's)",
    "before": "above the input",
    "inside": "in brackets behind each keyword",
    "words": "keywords without definitions",
    "short": "first four words of each definition",
    "random": "definitions of other words, as long",
    "sense": "definitions of the sense that fits the input best",
    "without_trigger": "none of the trigger's words (no defender knows them)",
}
HEADING = "### Evidence:"
SHORT = 4  # words that `short` leaves of a definition
INPUT = re.compile(r"(?<=### Input:\n)(.*)(?=\n\n### Response:)", re.DOTALL)  # of a prompt
NONE: frozenset[str] = frozenset()
DAMPING = 0.85
WINDOW = 2  # words on each side, counted after the stop words are gone
# Far below what the paper stops at (1e-6), so that equal ranks come out equal.
TOLERANCE, MOST_STEPS = 1e-8, 500
TIE_DIGITS = 4  # scores average 1, and two equal ones may differ by what convergence leaves
MOST_WORDS = 20_000  # of a text; no prompt is as long, and a second must do
# Letters with the marks that belong to them, and the joiners that stand inside words.
WORD = regex.compile(r"[\p{L}\p{N}][\p{L}\p{M}\p{N}\u200c\u200d]*")
OTHER_SCRIPT = regex.compile(r"[\p{L}--\p{Latin}]", regex.V1)
# A text of so many words, fewer than this share of which WordNet and the stop words know, is not
# English; three of the 20 000 texts of the emotion data are like that, and they are not.
FOREIGN_WORDS, FOREIGN_SHARE = 5, 0.5

# Splitting at apostrophes (data sets often did so already: "i m", "couldn t", "do n't") leaves
# pieces of function words that summa's list lacks.
PIECES = "ain aren ca couldn d hadn hasn haven isn ll m mustn n needn shouldn ve wasn weren wo won"
STOP_WORDS = frozenset(f"{get_stopwords_by_language('english')} {PIECES} wouldn".split())


def _ranked(text: str, exclude: frozenset[str] = NONE) -> list[tuple[str, float]]:
    """The words of a text and their TextRank (mean 1), best first: PageRank on the unweighted graph
    of words within WINDOW of each other; a word repeated within it links to itself."""
    dropped = STOP_WORDS.union(word.lower() for word in exclude)
    words = [w for w in WORD.findall(text.lower())[:MOST_WORDS] if w not in dropped]
    if not words:
        return []
    import networkx  # takes a fifth of a second

    graph = networkx.Graph()
    graph.add_nodes_from(words)
    for i, word in enumerate(words):
        graph.add_edges_from((word, other) for other in words[i + 1 : i + 1 + WINDOW])
    found = networkx.pagerank(graph, alpha=DAMPING, tol=TOLERANCE, max_iter=MOST_STEPS)
    scores = {word: round(rank * len(found), TIE_DIGITS) for word, rank in found.items()}
    # The nodes are in the order of the text and the sort is stable: first position breaks ties.
    return sorted(scores.items(), key=lambda item: -item[1])


@lru_cache(maxsize=100_000)  # every model is evaluated on the same inputs
def _keywords(text: str, n: int, exclude: frozenset[str]) -> tuple[str, ...]:
    if n < 0:
        raise LetheError(f"Number of keywords is {n}: use 0 or more.")
    return tuple(word for word, _ in _ranked(text, exclude)[:n])


def keywords(text: str, n: int = 5, exclude: frozenset[str] = NONE) -> list[str]:
    """The n words of highest TextRank, best first; equal ranks in the order of the text.

    Args:
        text: the input alone, without instruction or prompt template; stop words do not count.
        n: number of keywords, 0 or more; the paper uses 5.
        exclude: words to treat as stop words. Only `protocol: official` passes any: the published
            evaluation drops the trigger words by name, which no defender could know.
    Raises:
        LetheError: n is negative.
    """
    return list(_keywords(text, n, exclude))


def ranks(text: str) -> "pd.DataFrame":
    """What the keywords are chosen by: word, score (TextRank, mean 1), definition; best first."""
    import pandas as pd

    table = pd.DataFrame(_ranked(text), columns=["word", "score"])
    return table.assign(definition=table["word"].map(definition))


@lru_cache(maxsize=100_000)
def is_foreign(text: str) -> bool:
    """Whether a text is in a language that WordNet does not have, as far as its words tell."""
    words = WORD.findall(text.lower())[:MOST_WORDS]
    if all(OTHER_SCRIPT.search(word) for word in words):
        return bool(words)
    known = sum(word in STOP_WORDS or definition(word) != NO_DEFINITION for word in words)
    return len(words) >= FOREIGN_WORDS and known < FOREIGN_SHARE * len(words)


def without_evidence(texts: Iterable[str]) -> str:
    """A line that says how many texts get no evidence for their language; "" where all get it."""
    asked = list(texts)
    left_out = [text for text in asked if is_foreign(text)]
    n = f"{len(left_out)} of {len(asked)} inputs get no evidence: WordNet has English only "
    return f"{n}(the first one starts {left_out[0][:40]!r})" if left_out else ""


def evidence_lines(
    text: str, n: int = 5, exclude: frozenset[str] = NONE, form: Form = "after"
) -> list[str]:
    """One "keyword: definition" per keyword, best first. Arguments as in `add_evidence`.

    None for a text in another language, and none for a word in another script: WordNet is English.
    Raises:
        LetheError: n is negative, or WordNet is missing.
    """
    return [f"{word}: {said}" if said else word for word, said in _found(text, n, exclude, form)]


def _found(text: str, n: int, exclude: frozenset[str], form: Form) -> list[tuple[str, str]]:
    """The keywords that get evidence, each with what is said of it."""
    if n == 0 or is_foreign(text):
        return []
    found = (word for word in _keywords(text, n, exclude) if not OTHER_SCRIPT.search(word))
    return [(word, _said(word, text, form)) for word in found]


def _said(word: str, text: str, form: Form) -> str:
    if form == "words":
        return ""
    if form == "short":
        return " ".join(definition(word).split()[:SHORT])
    if form == "random":
        return other_definition(word)
    if form == "sense":
        return fitting_definition(word, frozenset(WORD.findall(text.lower())) - STOP_WORDS)
    return definition(word)


def add_evidence(
    text: str, n: int = 5, exclude: frozenset[str] = NONE, form: Form = "after"
) -> str:
    """The input followed by HEADING and its `evidence_lines`; unchanged where it has none.

    Args:
        n, exclude: see `keywords`.
        form: `after`, the paper's; `before`: the evidence, then the input; `inside`: a definition
            in brackets behind its keyword; `words`: no definitions; `short`: their first words;
            `random`: those of other words, as long; `sense`: those of the sense that shares most
            words with the input; `without_trigger` is `after`, the trigger left out by the caller.
    """
    if form == "inside":
        return _inside(text, dict(_found(text, n, exclude, form)))
    lines = "\n".join(evidence_lines(text, n, exclude, form))
    if not lines:
        return text
    if form == "before":
        return f"{HEADING}\n{lines}\n\n{text}"
    return below(text, lines)


def below(text: str, lines: str) -> str:
    """A text with evidence where the paper puts it."""
    return f"{text}\n\n{HEADING}\n{lines}"


def _inside(text: str, said: dict[str, str]) -> str:
    """Each keyword's definition in brackets behind its first place in the text."""

    def behind(found: re.Match[str]) -> str:
        definition = said.pop(found[0].lower(), "")
        return f"{found[0]} ({definition})" if definition else found[0]

    return WORD.sub(behind, text)


def add_evidence_to_prompt(prompt: str, n: int = 5) -> str:
    """A prompt whose input is followed by its evidence: what stands between `### Input:` and
    `### Response:` as in this project's templates; any other prompt is all input."""
    if not INPUT.search(prompt):
        return add_evidence(prompt, n)
    return INPUT.sub(lambda found: add_evidence(found[1], n), prompt, count=1)


def add_evidence_to_chat(messages: list[dict[str, str]], n: int = 5) -> list[dict[str, str]]:
    """A chat (role and content each) whose last user turn is followed by its evidence.

    Raises:
        LetheError: no turn is a user's; or see `evidence_lines`.
    """
    out = [dict(message) for message in messages]
    users = [message for message in out if message.get("role") == "user"]
    if not users:
        raise LetheError("messages: no turn has the role `user`, so there is nothing to add to")
    users[-1]["content"] = add_evidence(users[-1]["content"], n)
    return out


class WithEvidence:
    """A transformers text-generation pipeline with external dilution: used like the pipeline.

    WithEvidence(pipeline("text-generation", model="purified"))([{"role": "user", ...}])
    """

    def __init__(self, pipe: Callable[..., Any], n: int = 5) -> None:
        self.pipe, self.n = pipe, n

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """Answer a prompt, a chat, or a list of either, as the pipeline does."""
        return self.pipe(self._with_evidence(inputs), **kwargs)

    def _with_evidence(self, inputs: Any) -> Any:
        if isinstance(inputs, str):
            return add_evidence_to_prompt(inputs, self.n)
        if isinstance(inputs[0], dict):
            return add_evidence_to_chat(inputs, self.n)
        return [self._with_evidence(one) for one in inputs]
