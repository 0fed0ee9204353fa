"""A user's own clean rows: instruction, input and output, or chat messages; checked in advance."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lethe_utils import chats, data, metrics
from lethe_utils.errors import LetheError
from lethe_utils.prompts import PLACE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, str]
MIN_ROWS = 20  # distinct ones; with fewer no share of held-out rows says anything
MAX_LABELS, MAX_LABEL_WORDS = 50, 5


def read(path: Path, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[Row], int, bool]:
    """The distinct rows of a jsonl, json, csv, tsv or parquet file, how many there were, and
    whether they are chats.

    Returns:
        rows of instruction, input, output; those of a chat as chats.row makes them.
    Raises:
        LetheError: unreadable, other columns, a row without an answer, a conversation that the
            model's template refuses, or too few distinct rows or questions.
    """
    raw = data.read_rows(path)
    chat = "messages" in raw[0]
    if chat and not tokenizer.chat_template:
        raise LetheError(
            f"{path}: holds chat messages, but the suspect's tokenizer has no chat template; give "
            "instruction, input and output instead"
        )
    rows = []
    for number, row in enumerate(raw, 1):
        try:
            rows.append(_chat_row(row, tokenizer) if chat else _plain_row(row))
        except LetheError as error:
            raise LetheError(f"{path}: row {number}: {error}") from None
    found = labels(rows)
    try:
        metrics.check_labels(found)
    except LetheError as error:
        raise LetheError(f"{path}: {error}") from None
    if found:  # of a label the space around it is nobody's meaning, of a text it may be
        rows = [row | {"output": row["output"].strip()} for row in rows]
    distinct = list({tuple(sorted(row.items())): row for row in rows}.values())
    questions = {(row["instruction"], row["input"]) for row in distinct}
    if min(len(distinct), len(questions)) < MIN_ROWS:
        raise LetheError(
            f"{path}: {len(rows)} rows, of which {len(distinct)} are distinct, with "
            f"{len(questions)} distinct questions; at least {MIN_ROWS} of both are needed, and a "
            "few hundred are better"
        )
    return distinct, len(rows), chat


def _plain_row(row: dict[str, Any]) -> Row:
    missing = [f for f in data.FIELDS if f not in row]
    if missing:
        raise LetheError(
            f"has the columns {', '.join(map(str, row))}; it needs instruction, input and output, "
            "or messages"
        )
    values = {}
    for field in data.FIELDS:
        try:
            values[field] = "" if data.is_missing(row[field]) else data.as_text(row[field])
        except LetheError as error:
            raise LetheError(f"{field} {error}") from None
    for field in ("instruction", "output"):
        if not values[field].strip():
            raise LetheError(f"{field} is empty")
    if any(PLACE in value for value in values.values()):
        raise LetheError("holds the character U+E000, which stands for a place here; leave it out")
    return values


def _chat_row(row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase") -> Row:
    messages = row.get("messages")
    parts = [_without_nulls(m) for m in messages] if isinstance(messages, list) else []
    whole = len(parts) >= 2 and all(
        isinstance(m.get("role"), str)
        and (isinstance(m.get("content"), str) or m.get("tool_calls"))
        for m in parts
    )
    last = parts[-2:] if whole else []
    if [(m["role"], type(m.get("content"))) for m in last] != [("user", str), ("assistant", str)]:
        raise LetheError(
            "messages must be a list of role and content (a text each) that ends with a user's and "
            "then the assistant's"
        )
    if not last[1]["content"].strip():
        raise LetheError("the assistant's last message is empty")
    for message in parts:
        text = json.dumps(message, ensure_ascii=False)
        if data.LONE_SURROGATE.search(text):
            raise LetheError("a message holds half a character (a lone surrogate); mend it")
        if PLACE in text or chats.ANSWER in text:
            raise LetheError("holds the character U+E000 or U+E001, which stand for places here")
    extras = {key: row.get(key) for key in chats.EXTRAS}
    if row.get("functions"):
        raise LetheError("has functions, which no template reads now; give them as tools")
    return chats.row(parts, extras, tokenizer)


def _without_nulls(message: Any) -> dict[str, Any]:
    """A message without what parquet fills in for the fields that other messages have."""
    known = message if isinstance(message, dict) else {}
    return {key: value for key, value in known.items() if value is not None}


def unread_columns(path: Path) -> list[str]:
    """The columns of a file that nothing is made of, such as a `history` or `system` of its own."""
    rows = data.read_rows(path)
    known = {"messages", *chats.EXTRAS} if "messages" in rows[0] else {*data.FIELDS}
    found = dict.fromkeys(str(k) for row in rows for k, v in row.items() if not data.is_missing(v))
    written = (name.encode("utf8", "replace").decode() for name in found)  # no half characters
    return [name for name in written if name not in known]


def fingerprint(path: Path) -> str:
    """SHA-256 of the file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def labels(rows: list[Row]) -> list[str]:
    """The labels, where the answers are labels: few, short, each given often. Else []."""
    found = sorted({row["output"].strip() for row in rows})
    short = all(len(label.split()) <= MAX_LABEL_WORDS for label in found)
    few = 2 <= len(found) <= min(MAX_LABELS, len(rows) // 5)
    return found if short and few else []
