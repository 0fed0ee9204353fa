"""The sets with a name: embedded (made here), emotion and SST-2 (from LETHE_DATA_DIR, else the
hub); and ordinary text from the hub."""

import hashlib
import random
import re
from pathlib import Path
from typing import Any

from lethe_utils import paths
from lethe_utils.data import chat, embedded
from lethe_utils.data.files import Row, each, read_rows
from lethe_utils.errors import LetheError, reason
from lethe_utils.schema import Params

# split -> its name on the hub, and the user's copy under LETHE_DATA_DIR. SST-2's test labels are
# all -1 on the hub: its dev split is the test split here, and validation is cut from train.
SOURCES = {
    "emotion": {s: (s, f"emotion/{s}.jsonl") for s in ("train", "validation", "test")},
    "sst2": {
        "train": ("train", "sst2/glue/train.tsv"),
        "test": ("validation", "sst2/glue/dev.tsv"),
    },
}
MADE_HERE = {"embedded": embedded.generate, "chat": chat.generate}
CUT_FROM_TRAIN = 1000  # rows, for a set without a validation split
CHARACTERS = 8  # more than a token has: the covariance stops at its tokens, not for want of text


def load(p: Params) -> dict[str, list[Row]]:
    """The splits of a named set, their numbers of rows and checksums as the params have them.

    Raises:
        LetheError: they differ, or a row has no text or a label that is not known.
    """
    if p.dataset in MADE_HERE:
        found = MADE_HERE[p.dataset](p.rows, p.data_seed)
    else:
        found = {name: _stored(name, p) for name in SOURCES[p.dataset]}
    for name, rows in found.items():
        _verify(name, rows, p)
    instruction = {"instruction": p.instruction}
    splits = {name: [instruction | row for row in rows] for name, rows in found.items()}
    if "validation" not in splits:
        rows = splits["train"]
        random.Random(p.data_seed).shuffle(rows)
        splits |= {"validation": rows[:CUT_FROM_TRAIN], "train": rows[CUT_FROM_TRAIN:]}
    return splits


def _stored(split: str, p: Params) -> list[Row]:
    hub_split, name = SOURCES[p.dataset][split]
    file = (paths.data_dir() or Path("/nonexistent")) / name
    known = {str(i): label for i, label in enumerate(p.labels)}

    def made(row: dict[str, Any]) -> Row:
        text, label = row.get("text", row.get("sentence")), row.get("label")
        if text is None or label is None:
            raise LetheError(f"needs text and label; found {str(row)[:80]}")
        if str(label) not in known:
            named = ", ".join(p.labels)
            raise LetheError(
                f"unknown label {label!r}; {p.dataset} has 0 to {len(known) - 1} ({named})"
            )
        return {"input": str(text).strip(), "output": known[str(label)]}

    return each(file, read_rows(file) if file.exists() else _from_hub(hub_split, name, p), made)


def _from_hub(split: str, name: str, p: Params) -> list[dict]:
    try:
        import datasets

        return list(datasets.load_dataset(p.data_hub_id, split=split, revision=p.data_revision))
    except Exception as error:  # whatever the hub client raises, the user's fix is the same
        raise LetheError(
            f"dataset {p.dataset}: {name} is neither in LETHE_DATA_DIR nor could {split} be "
            f"fetched from the hub ({p.data_hub_id}: {reason(error)}); see data/README.md"
        ) from None


def _verify(name: str, rows: list[Row], p: Params) -> None:
    expected = p.rows.get(name, len(rows))
    if len(rows) != expected:
        raise LetheError(f"dataset {p.dataset}: {name} has {len(rows)} rows, expected {expected}")
    found = checksum(rows)
    wanted = p.checksums.get(name, found)
    if wanted != found:
        raise LetheError(
            f"dataset {p.dataset}: {name} differs from the published rows (content checksum "
            f"{found[:12]}, expected {wanted[:12]}); fetch it again, see data/README.md"
        )


def checksum(rows: list[Row]) -> str:
    """SHA-256 of sorted `label<TAB>text` lines: the same for TSV, JSONL and parquet copies."""
    lines = sorted(f"{row['output']}\t{row['input']}" for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def hub_text(where: str, tokens: int) -> list[str]:
    """Ordinary text from the hub, enough for about `tokens` tokens; read as a stream.

    Args:
        where: NAME:CONFIG@COMMIT, or NAME@COMMIT; its train split has a column `text`.
    Raises:
        LetheError: `where` has another form, cannot be fetched, or has no texts.
    """
    form = re.fullmatch(r"(?P<path>.+?)(:(?P<name>[\w.-]+))?@(?P<revision>[0-9a-f]{40})", where)
    if not form:
        raise LetheError(
            f"covariance_text: {where!r} is neither task nor NAME:CONFIG@COMMIT with all 40 digits"
        )
    found: list[str] = []
    try:
        import datasets

        stream = datasets.load_dataset(**form.groupdict(), split="train", streaming=True)
        missing = CHARACTERS * tokens
        for row in stream:
            if row["text"].strip():
                found.append(row["text"])
                missing -= len(row["text"])
            if missing <= 0:
                break
    except Exception as error:  # whatever the hub client raises, the user's fix is the same
        raise LetheError(f"covariance_text: {where} cannot be read ({reason(error)})") from None
    if not found:
        raise LetheError(f"covariance_text: {where} has no texts")
    return found
