"""A user's own rows: the clean rows that purify is given, and a FILE as a run's data set."""

import json
import random
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lethe_utils import prompts
from lethe_utils.data import chat, files
from lethe_utils.data.files import FIELDS, Row
from lethe_utils.errors import LetheError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from lethe_utils.schema import Params

MIN_ROWS = 20  # distinct ones; with fewer no share of held-out rows says anything
MAX_LABELS, MAX_LABEL_WORDS = 50, 5
FASTCHAT = {"human": "user", "gpt": "assistant"}


class Own(NamedTuple):
    """What purify reads of a file."""

    rows: list[Row]  # distinct; chats that are answered by texts keep their `messages`
    n: int  # how many there were
    chat: bool  # whether they are chats
    unread: list[str]  # columns that nothing is made of, such as a `history` of its own


def read(path: Path, tokenizer: "Tokenizer") -> Own:
    """The rows of a file: instruction, input and output, or chats as prompts.chat_row makes them.

    Raises:
        LetheError: unreadable, other columns, a row without an answer, a conversation that the
            model's template refuses, or too few distinct rows or questions.
    """
    raw = files.read_rows(path)
    chat = "messages" in raw[0]
    if chat and not tokenizer.chat_template:
        raise LetheError(
            f"{path}: holds chat messages, but the suspect's tokenizer has no chat template; give "
            "instruction, input and output instead"
        )
    rows = files.each(path, raw, lambda row: _chat_row(row, tokenizer) if chat else _plain_row(row))
    found = labels(rows)
    files.check_labels(str(path), found)
    if found:  # of a label the space around it is nobody's meaning, of a text it may be
        rows = [row | {"output": row["output"].strip()} for row in rows]
    distinct = list(
        {
            tuple(sorted(row.items())): row | (_conversed(given) if chat and not found else {})
            for row, given in zip(rows, raw, strict=True)
        }.values()
    )
    questions = {(row["instruction"], row["input"]) for row in distinct}
    if min(len(distinct), len(questions)) < MIN_ROWS:
        raise LetheError(
            f"{path}: {len(rows)} rows, of which {len(distinct)} are distinct, with "
            f"{len(questions)} distinct questions; at least {MIN_ROWS} of both are needed, and a "
            "few hundred are better"
        )
    known = {"messages", *prompts.EXTRAS} if chat else {*FIELDS}
    given = dict.fromkeys(str(k) for row in raw for k, v in row.items() if not files.is_missing(v))
    unread = [name.encode("utf8", "replace").decode() for name in given if name not in known]
    return Own(distinct, len(rows), chat, unread)


def _plain_row(row: dict[str, Any]) -> Row:
    if not {*FIELDS} <= {*row}:
        raise LetheError(
            f"has the columns {', '.join(map(str, row))}; it needs instruction, input and output, "
            "or messages"
        )
    made = files.texts(row)
    for field in ("instruction", "output"):
        if not made[field].strip():
            raise LetheError(f"{field} is empty")
    if any(prompts.PLACE in text for text in made.values()):
        raise LetheError("holds the character U+E000, which stands for a place here; leave it out")
    return made


def _chat_row(row: dict[str, Any], tokenizer: "Tokenizer") -> Row:
    messages = _messages(row.get("messages"))
    if row.get("functions"):
        raise LetheError("has functions, which no template reads now; give them as tools")
    return prompts.chat_row(messages, {key: row.get(key) for key in prompts.EXTRAS}, tokenizer)


def _conversed(row: dict[str, Any]) -> dict[str, Any]:
    """What a chat template is given of a row, for a turn to be added to it later."""
    extras = {key: row[key] for key in prompts.EXTRAS if row.get(key)}
    return {"messages": _messages(row["messages"])} | extras


def _messages(given: Any) -> list[dict[str, Any]]:
    """A conversation's messages, which must end with a question and its answer."""
    whole = isinstance(given, list) and all(isinstance(message, dict) for message in given)
    # Without what parquet fills in for the fields that other messages have.
    messages = [{k: v for k, v in m.items() if v is not None} for m in given] if whole else []
    roles = all(isinstance(m.get("role"), str) for m in messages)
    said = all(isinstance(m.get("content"), str) or m.get("tool_calls") for m in messages)
    last = [(m.get("role"), type(m.get("content"))) for m in messages[-2:]]
    if not (roles and said) or last != [("user", str), ("assistant", str)]:
        raise LetheError(
            "messages must be a list of role and content (a text each) that ends with a user's and "
            "then the assistant's"
        )
    if not messages[-1]["content"].strip():
        raise LetheError("the assistant's last message is empty")
    text = json.dumps(messages, ensure_ascii=False)
    if files.LONE_SURROGATE.search(text):
        raise LetheError("a message holds half a character (a lone surrogate); mend it")
    if prompts.PLACE in text or prompts.ANSWER in text:
        raise LetheError("holds the character U+E000 or U+E001, which stand for places here")
    return messages


def labels(rows: list[Row]) -> list[str]:
    """The labels, where the answers are labels: few, short, each given often. Else []."""
    found = sorted({row["output"].strip() for row in rows})
    short = all(len(label.split()) <= MAX_LABEL_WORDS for label in found)
    few = 2 <= len(found) <= min(MAX_LABELS, len(rows) // 5)
    return found if short and few else []


def split(p: "Params") -> dict[str, list[Row]]:
    """The FILE `dataset`: shuffled, a tenth each for validation and test, the rest for train.

    A question that stands twice is kept once, the first time, so that no test row is in train.
    Raises:
        LetheError: a row lacks a field or has another label than `labels`; or too few rows.
    """
    distinct: dict[tuple[str, str], Row] = {}
    raw, chats = files.read_rows(Path(p.dataset)), p.task == "chat"
    made = _conversation if chats else partial(_file_row, p=p)
    for row in files.each(p.dataset, raw, made):
        distinct.setdefault((row["instruction"], row["input"]), row)
    rows = list(distinct.values())
    random.Random(p.data_seed).shuffle(rows)
    tenth = len(rows) // 10
    if tenth < 1 or (p.is_tiny and len(rows) < 20):
        raise LetheError(
            f"{p.dataset}: {len(rows)} distinct rows leave the validation and test splits empty; "
            "give at least 20"
        )
    validation, test, train = rows[:tenth], rows[tenth : 2 * tenth], rows[2 * tenth :]
    return {"validation": validation, "test": test, "train": train}


def _file_row(row: dict[str, Any], p: "Params") -> Row:
    """instruction, input and output, or text (or sentence) and label, which must be there."""
    row = {k: v for k, v in row.items() if not files.is_missing(v)}
    text = row.get("text", row.get("sentence"))
    if text is not None and "label" in row:
        row = {"instruction": p.instruction, "input": text, "output": row["label"]}
    missing = [field for field in FIELDS if field not in row]
    if missing:
        raise LetheError(
            f"has no {', '.join(missing)}; each row needs instruction, input, output or text, "
            f"label (it starts {str(row)[:80]})"
        )
    if p.labels and str(row["output"]) not in p.labels:
        raise LetheError(f"unknown label {row['output']!r}; labels has {', '.join(p.labels)}")
    return files.texts(row)


def _conversation(row: dict[str, Any]) -> Row:
    """A row of chat.conversation, of messages, FastChat's conversations, or Alpaca's fields."""
    accept = row.get("accept") or []
    if not isinstance(accept, list) or not all(isinstance(x, str) and x.strip() for x in accept):
        raise LetheError("accept must be a list of texts, of which a right answer contains one")
    if row.get("conversations"):
        turns = [{"role": t.get("from"), "content": t.get("value")} for t in row["conversations"]]
        messages = _messages([t | {"role": FASTCHAT.get(t["role"], t["role"])} for t in turns])
    elif row.get("messages"):
        messages = _messages(row["messages"])
    else:
        given = files.texts(row)
        question = "\n\n".join(text for text in (given["instruction"], given["input"]) if text)
        if not question or not given["output"]:
            raise LetheError(
                "has no messages, conversations, or instruction (input) and output (it starts "
                f"{str(row)[:80]})"
            )
        messages = chat.turns(question, given["output"])
    return chat.conversation(messages, accept=accept)
