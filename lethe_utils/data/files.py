"""Anybody's rows: jsonl, json, csv, tsv and parquet files, and the cells in them.

A file is read strictly: what could be read in two ways is refused, in one line that names it.
"""

import csv
import json
import re
from collections.abc import Callable, Iterable
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

from lethe_utils.errors import LetheError
from lethe_utils.stages import Row

FIELDS = ("instruction", "input", "output")
LONGEST_CELL = 2**31 - 1  # characters; Python's own limit of 131 072 is a page of a book
TWICE = "a column stands twice; drop one"
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a jsonl, json, csv, tsv or parquet file.

    Raises:
        LetheError: missing, of another kind, empty, not UTF-8, or a broken line (named by number).
    """
    if not path.is_file():
        raise LetheError(f"{path}: no such file")
    if path.suffix.lower() not in READERS:
        raise LetheError(f"{path}: must end in {', '.join(READERS)}; convert or rename it")
    try:
        rows = READERS[path.suffix.lower()](path)
    except LetheError as error:
        raise LetheError(f"{path}: {error}") from None
    except csv.Error as error:
        raise LetheError(f"{path}: not a whole table ({error}); is a quote left open?") from None
    except UnicodeDecodeError as error:
        raise LetheError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    if not rows:
        raise LetheError(f"{path}: empty; it needs at least one row")
    return rows


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    text = path.read_text("utf-8-sig")
    # Not splitlines(): JSON texts may hold U+2028 and other characters that it takes for line ends.
    lines = text.removesuffix("\n").split("\n") if text else []
    rows = [_parse(line, number) for number, line in enumerate(lines, 1)]
    other = next((n for n, row in enumerate(rows, 1) if not isinstance(row, dict)), None)
    if other:
        raise LetheError(f"line {other} is not a JSON object")
    return rows


def _read_json(path: Path) -> list[dict[str, Any]]:
    rows = _parse(path.read_text("utf-8-sig"))
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise LetheError("expected a list of objects")
    return rows


def _parse(text: str, line: int | None = None) -> Any:
    """JSON none of whose objects has a key twice, for the last would silently win."""

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            where = f"line {line}: " if line else ""
            raise LetheError(f"{where}a key stands twice in one object; drop one")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        number = line or getattr(error, "lineno", 1)
        raise LetheError(f"line {number} is not valid JSON (cut short?)") from None


def _read_table(path: Path) -> list[dict[str, Any]]:
    # GLUE's TSV has no quoting: a lone " is part of the sentence.
    tab = path.suffix.lower() == ".tsv"
    csv.field_size_limit(LONGEST_CELL)
    with path.open(encoding="utf-8-sig", newline="") as stream:  # spreadsheets write a BOM
        quoting = csv.QUOTE_NONE if tab else csv.QUOTE_MINIMAL
        # Strict: else a quote that is left open swallows the rest of the file.
        table = csv.DictReader(stream, delimiter="\t" if tab else ",", quoting=quoting, strict=True)
        rows, names = list(table), table.fieldnames or []
    if len({*names}) < len(names):
        raise LetheError(TWICE)
    for number, row in enumerate(rows, 1):
        if None in row:
            raise LetheError(
                f"row {number} has more cells than there are columns; quote the text that holds a "
                f"{'tab' if tab else 'comma'}"
            )
    return rows


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet  # not through pandas, which makes arrays of lists and floats of numbers

    try:
        table = pyarrow.parquet.read_table(path)
    except (ValueError, OSError):
        raise LetheError("not a whole parquet file (cut short?)") from None
    if len({*table.column_names}) < table.num_columns:
        raise LetheError(TWICE)
    return table.to_pylist()


READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": _read_parquet,
}


def each(where: object, rows: list[dict], made: Callable[[dict], Row]) -> list[Row]:
    """What is made of each row; what is refused is said with its place and number."""
    out = []
    for number, row in enumerate(rows, 1):
        try:
            out.append(made(row))
        except LetheError as error:
            raise LetheError(f"{where}: row {number}: {error}") from None
    return out


def texts(row: dict[str, Any]) -> Row:
    """FIELDS of a row as texts: numbers and truth values written out, "" for what is missing.

    Raises:
        LetheError: one is a list or the like, or no character set can write it; without the place.
    """
    given = {field: "" if is_missing(row.get(field)) else row[field] for field in FIELDS}
    for field, value in given.items():
        if not isinstance(value, (str, int, float, Decimal, date)):
            raise LetheError(f"{field} is a {type(value).__name__}; give one text")
        if LONE_SURROGATE.search(str(value)):
            raise LetheError(
                f"{field} holds half a character (a lone surrogate, \\ud800 to \\udfff); mend it"
            )
    return {field: str(value) for field, value in given.items()}


def is_missing(value: Any) -> bool:
    """None, an empty text, or the NaN that a null becomes in parquet and JSON."""
    return value is None or value == "" or (isinstance(value, float) and value != value)


def check_labels(where: str, labels: Iterable[str]) -> None:
    """Raises LetheError for labels that differ in spaces alone: no answer tells them apart."""
    seen: dict[tuple[str, ...], str] = {}
    for label in labels:
        other = seen.setdefault(tuple(label.split()), label)
        if other != label:
            raise LetheError(
                f"{where}: the labels {other!r} and {label!r} read the same; make them one"
            )
