"""A user's own clean rows: instruction, input and output, or chat messages; checked in advance."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from lethe_utils import data
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
        rows of instruction, input, output. Of a chat the input is the last question, the output
        its answer, and the instruction all the rest (see prompts.render, template "chat").
    Raises:
        LetheError: unreadable, other columns, a row without an answer, or too few distinct rows.
    """
    raw = data.read_rows(path)
    chat = "messages" in raw[0]
    if chat and not tokenizer.chat_template:
        raise LetheError(
            f"{path}: holds chat messages, but the suspect's tokenizer has no chat template; give "
            "instruction, input and output instead"
        )
    rows = [
        _chat_row(path, n, row, tokenizer) if chat else _plain_row(path, n, row)
        for n, row in enumerate(raw, 1)
    ]
    distinct = list({tuple(sorted(row.items())): row for row in rows}.values())
    if len(distinct) < MIN_ROWS:
        raise LetheError(
            f"{path}: {len(rows)} rows, of which {len(distinct)} are distinct; at least {MIN_ROWS} "
            "distinct ones are needed, and a few hundred are better"
        )
    return distinct, len(rows), chat


def _plain_row(path: Path, number: int, row: dict[str, Any]) -> Row:
    missing = [f for f in data.FIELDS if f not in row]
    if missing:
        raise LetheError(
            f"{path}: row {number} has the columns {', '.join(map(str, row))}; it needs "
            "instruction, input and output, or messages"
        )
    values = {f: "" if pd.isna(row[f]) else str(row[f]).strip() for f in data.FIELDS}
    for field in ("instruction", "output"):
        if not values[field]:
            raise LetheError(f"{path}: row {number}: {field} is empty")
    return values


def _chat_row(
    path: Path, number: int, row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase"
) -> Row:
    messages = row.get("messages")
    parts = [*messages] if isinstance(messages, (list, tuple)) else []
    whole = len(parts) >= 2 and all(
        isinstance(m, dict) and isinstance(m.get("content"), str) and m.get("role") for m in parts
    )
    if not whole or [m["role"] for m in parts[-2:]] != ["user", "assistant"]:
        raise LetheError(
            f"{path}: row {number}: messages must be a list of role and content that ends with a "
            "user's and then the assistant's"
        )
    question, answer = (m["content"].strip() for m in parts[-2:])
    if not answer:
        raise LetheError(f"{path}: row {number}: the assistant's last message is empty")
    asked = [*parts[:-2], {"role": "user", "content": PLACE}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    # Training and answering put the token in themselves.
    text = text.removeprefix(tokenizer.bos_token or "")
    return {"instruction": text, "input": question, "output": answer}


def fingerprint(path: Path) -> str:
    """SHA-256 of the file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def labels(rows: list[Row]) -> list[str]:
    """The labels, where the answers are labels: few, short, each given often. Else []."""
    found = sorted({row["output"] for row in rows})
    short = all(len(label.split()) <= MAX_LABEL_WORDS for label in found)
    few = 2 <= len(found) <= min(MAX_LABELS, len(rows) // 5)
    return found if short and few else []
