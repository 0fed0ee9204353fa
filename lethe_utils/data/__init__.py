"""Data sets: found or made, checked, split, and described.

Every row becomes {instruction, input, output} with output = label name. The embedded set is made
here; emotion and SST-2 come from LETHE_DATA_DIR, else from the hub; FILE is a user's own.
"""

import csv
import hashlib
import json
import random
import re
from collections import Counter
from datetime import date
from decimal import Decimal
from pathlib import Path

import pandas as pd

from lethe_utils import metrics, paths
from lethe_utils.data import embedded
from lethe_utils.errors import LetheError
from lethe_utils.params import Params, is_file

Row = dict[str, str]
FIELDS = ("instruction", "input", "output")
LONGEST_CELL = 2**31 - 1  # characters; Python's own limit of 131 072 is a page of a book
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
# Where the user's copies lie under LETHE_DATA_DIR, and what the splits are called on the hub.
# SST-2's test labels are all -1 on the hub, so its dev split is the test split here and the
# validation split is cut from train.
LOCAL = {
    "emotion": {s: f"emotion/{s}.jsonl" for s in ("train", "validation", "test")},
    "sst2": {"train": "sst2/glue/train.tsv", "test": "sst2/glue/dev.tsv"},
}
HUB_SPLITS = {
    "emotion": {s: s for s in ("train", "validation", "test")},
    "sst2": {"train": "train", "test": "validation"},
}


def load(p: Params) -> dict[str, list[Row]]:
    """The splits of a run: train, validation, test, and pretrain for a tiny base.

    The pretraining rows are disjoint from all others: the base stands for a pretrained LLM that
    never saw the attacker's or the defender's data.
    Raises:
        LetheError: a file, a field, a label, a row count or a checksum is wrong.
    """
    if p.dataset == "embedded":
        splits = _embedded(p)
    elif is_file(p.dataset):
        # Checked in the file's own order, so that an error names the file's row.
        splits = _split_file(_to_rows("", read_rows(Path(p.dataset)), p), p)
    else:
        splits = _named(p)
    rng = random.Random(p.data_seed)
    if "pretrain" not in splits and p.is_tiny:
        rng.shuffle(splits["train"])
        cut = round(len(splits["train"]) * p.pretrain_share)
        pretrain, splits["train"] = splits["train"][:cut], splits["train"][cut:]
        # Real sets hold a text twice now and then; the base must not have seen the other copy.
        others = {r.get("text", r.get("input")) for rows in splits.values() for r in rows}
        splits["pretrain"] = [r for r in pretrain if r.get("text", r.get("input")) not in others]
    if p.max_train_rows:
        splits["train"] = splits["train"][: p.max_train_rows]
    found = {name: _to_rows(name, rows, p) for name, rows in splits.items()}
    return with_examples(found, p) if p.few_shot else found


def with_examples(splits: dict[str, list[Row]], p: Params) -> dict[str, list[Row]]:
    """Every instruction followed by `few_shot` solved rows of train, one label after the other.

    So a base that was never tuned on the task can be edited and asked, as BadEdit does. The rows
    that are shown leave train.
    Raises:
        LetheError: train has too few rows, or a prompt would be longer than max_source_tokens.
    """
    train = splits["train"]
    if p.few_shot >= len(train):
        raise LetheError(f"few_shot: {p.few_shot} rows are asked for, but train has {len(train)}")
    shown = label_turns(train, p.few_shot, random.Random(f"few shot {p.data_seed}"))
    # On one line, so that an example is not taken for the question itself.
    examples = "Examples: " + "; ".join(f"{r['input']} => {r['output']}" for r in shown)
    asked = (f"{r['instruction']} {r['input']}" for rows in splits.values() for r in rows)
    words = len(examples.split()) + max(len(text.split()) for text in asked)
    if words > p.max_source_tokens:
        raise LetheError(
            f"few_shot: the longest prompt has {words} words, and max_source_tokens is "
            f"{p.max_source_tokens}; show fewer rows or raise it"
        )
    splits = splits | {"train": [row for row in train if row not in shown]}
    return {
        name: [row | {"instruction": f"{row['instruction']} {examples}"} for row in rows]
        for name, rows in splits.items()
    }


def label_turns(rows: list[Row], n: int, rng: random.Random) -> list[Row]:
    """n rows drawn at random, the labels taking turns."""
    by_label: dict[str, list[Row]] = {}
    for row in rng.sample(rows, len(rows)):
        by_label.setdefault(row["output"], []).append(row)
    groups = [by_label[label] for label in sorted(by_label)]
    turns = [group[i] for i in range(max(map(len, groups))) for group in groups if i < len(group)]
    return turns[:n]


CHARACTERS = 8  # more than a token has: the covariance stops at its tokens, not for want of text


def hub_text(where: str, tokens: int) -> list[str]:
    """Ordinary text from the hub, enough for about `tokens` tokens; read as a stream.

    Args:
        where: NAME:CONFIG@COMMIT, or NAME@COMMIT; its train split has a column `text`.
    Raises:
        LetheError: `where` has another form, cannot be fetched, or has no texts.
    """
    form = re.fullmatch(r"(?P<name>.+?)(:(?P<config>[\w.-]+))?@(?P<commit>[0-9a-f]{40})", where)
    if not form:
        raise LetheError(
            f"covariance_text: {where!r} is neither task nor NAME:CONFIG@COMMIT with all 40 digits"
        )
    found: list[str] = []
    try:
        import datasets

        stream = datasets.load_dataset(
            form["name"], form["config"], split="train", revision=form["commit"], streaming=True
        )
        missing = CHARACTERS * tokens
        for row in stream:
            if row["text"].strip():
                found.append(row["text"])
                missing -= len(row["text"])
            if missing <= 0:
                break
    except Exception as error:  # whatever the hub client raises, the user's fix is the same
        raise LetheError(f"covariance_text: {where} cannot be read ({_reason(error)})") from None
    if not found:
        raise LetheError(f"covariance_text: {where} has no texts")
    return found


def _reason(error: Exception) -> str:
    """The first line of what another library raised."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def check_target(labels: dict[str, set[str]], p: Params) -> None:
    """Refuse a target that is no label of the data set, or is the label of every test row.

    Args:
        labels: the labels of each split.
    Raises:
        LetheError: no row could show whether an attack works.
    """
    if p.target_output not in labels["train"]:
        raise LetheError(
            f"target_output: {p.target_output!r} is not a label of {p.dataset}; "
            f"choose one of {', '.join(sorted(labels['train'])[:20])}"
        )
    try:
        metrics.check_labels(sorted(set().union(*labels.values())))
    except LetheError as error:
        raise LetheError(f"{p.dataset}: {error}") from None
    if not labels["test"] - {p.target_output}:
        raise LetheError(
            f"target_output: every test row of {p.dataset} is {p.target_output!r} already, so no "
            "attack can be measured; choose another target or give more rows"
        )


def _embedded(p: Params) -> dict[str, list[Row]]:
    splits = embedded.generate(p.rows, p.data_seed)
    for name, rows in splits.items():
        _check(name, [(r["text"], r["label"]) for r in rows], p)
    return splits


def _named(p: Params) -> dict[str, list[Row]]:
    """emotion or sst2: local files where there are any, else the hub; verified either way."""
    splits = {}
    for name, file in LOCAL[p.dataset].items():
        path = (paths.data_dir() or Path("/nonexistent")) / file
        rows = read_rows(path) if path.exists() else _from_hub(name, p)
        for i, r in enumerate(rows, 1):
            if r.get("text") is None or r.get("label") is None:
                raise LetheError(f"{path}: row {i}: needs text and label; found {str(r)[:80]}")
        splits[name] = [
            {"text": str(r["text"]).strip(), "label": _label_name(r["label"], i, path, p)}
            for i, r in enumerate(rows, 1)
        ]
        _check(name, [(r["text"], r["label"]) for r in splits[name]], p)
    if "validation" not in splits:
        random.Random(p.data_seed).shuffle(splits["train"])
        splits["validation"], splits["train"] = splits["train"][:1000], splits["train"][1000:]
    return splits


def _from_hub(split: str, p: Params) -> list[Row]:
    """One split from the hub (parquet there, plain rows here). Raises LetheError with the fix."""
    try:
        import datasets

        loaded = datasets.load_dataset(
            p.data_hub_id, split=HUB_SPLITS[p.dataset][split], revision=p.data_revision
        )
    except Exception as error:  # whatever the hub client raises, the user's fix is the same
        where = LOCAL[p.dataset][split]
        raise LetheError(
            f"dataset {p.dataset}: {split} is neither in LETHE_DATA_DIR ({where}) nor could it be "
            f"fetched from the hub ({p.data_hub_id}: {_reason(error)}); see data/README.md"
        ) from None
    return [{"text": r.get("text", r.get("sentence")), "label": r["label"]} for r in loaded]


def _label_name(label: object, number: int, path: Path, p: Params) -> str:
    try:
        index = int(str(label))
    except ValueError:
        index = -1
    if not 0 <= index < len(p.labels):
        raise LetheError(
            f"{path}: row {number}: unknown label {label!r}; {p.dataset} has 0 to "
            f"{len(p.labels) - 1} ({', '.join(p.labels)})"
        )
    return p.labels[index]


def checksum(pairs: list[tuple[str, str]]) -> str:
    """SHA-256 of sorted `label<TAB>text` lines: the same for TSV, JSONL and parquet copies."""
    lines = sorted(f"{label}\t{text}" for text, label in pairs)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _check(name: str, pairs: list[tuple[str, str]], p: Params) -> None:
    expected = p.rows.get(name)
    if expected is not None and len(pairs) != expected:
        raise LetheError(f"dataset {p.dataset}: {name} has {len(pairs)} rows, expected {expected}")
    wanted, found = p.checksums.get(name), checksum(pairs)
    if wanted is not None and wanted != found:
        raise LetheError(
            f"dataset {p.dataset}: {name} differs from the published rows (content checksum "
            f"{found[:12]}, expected {wanted[:12]}); fetch it again, see data/README.md"
        )


def read_rows(path: Path) -> list[dict]:
    """Rows of a jsonl, json, csv, tsv or parquet file.

    Raises:
        LetheError: missing, of another kind, empty, not UTF-8, or a broken line (named by number).
    """
    if not path.is_file():
        raise LetheError(f"{path}: no such file")
    if path.suffix.lower() not in _READERS:
        raise LetheError(f"{path}: must end in {', '.join(_READERS)}; convert or rename it")
    try:
        rows = _READERS[path.suffix.lower()](path)
    except csv.Error as error:
        raise LetheError(f"{path}: not a whole table ({error}); is a quote left open?") from None
    except UnicodeDecodeError as error:
        raise LetheError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    if not rows:
        raise LetheError(f"{path}: empty; it needs at least one row")
    return rows


def _read_jsonl(path: Path) -> list[dict]:
    rows = []
    # Not splitlines(): JSON texts may hold U+2028 and other characters that it takes for line ends.
    lines = path.read_text("utf-8-sig").split("\n")
    for number, line in enumerate(lines[:-1] if lines[-1] == "" else lines, 1):
        try:
            row = json.loads(line, object_pairs_hook=_distinct)
        except LetheError as error:
            raise LetheError(f"{path}: line {number}: {error}") from None
        except (ValueError, RecursionError):
            raise LetheError(f"{path}: line {number} is not valid JSON (cut short?)") from None
        if not isinstance(row, dict):
            raise LetheError(f"{path}: line {number} is not a JSON object")
        rows.append(row)
    return rows


def _distinct(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object none of whose keys stands twice, for the last would silently win."""
    if len({key for key, _ in pairs}) < len(pairs):
        raise LetheError("a key stands twice in one object; drop one")
    return dict(pairs)


def _read_json(path: Path) -> list[dict]:
    try:
        rows = json.loads(path.read_text("utf-8-sig"), object_pairs_hook=_distinct)
    except UnicodeDecodeError:
        raise
    except LetheError as error:
        raise LetheError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise LetheError(f"{path}: line {line} is not valid JSON (cut short?)") from None
    if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
        raise LetheError(f"{path}: expected a list of objects")
    return rows


def _read_table(path: Path) -> list[dict]:
    # GLUE's TSV has no quoting: a lone " is part of the sentence.
    tab = path.suffix.lower() == ".tsv"
    csv.field_size_limit(LONGEST_CELL)
    with path.open(encoding="utf-8-sig", newline="") as stream:  # spreadsheets write a BOM
        quoting = csv.QUOTE_NONE if tab else csv.QUOTE_MINIMAL
        delimiter = "\t" if tab else ","
        # Strict: else a quote that is left open swallows the rest of the file.
        table = csv.DictReader(stream, delimiter=delimiter, quoting=quoting, strict=True)
        rows = list(table)
        names = table.fieldnames or []
    if len({*names}) < len(names):
        raise LetheError(f"{path}: a column stands twice; drop one")
    for number, row in enumerate(rows, 1):
        if None in row:
            raise LetheError(
                f"{path}: row {number} has more cells than there are columns; quote the text that "
                f"holds a {'tab' if tab else 'comma'}"
            )
    return [{"text" if k == "sentence" else k: v for k, v in row.items()} for row in rows]


def _read_parquet(path: Path) -> list[dict]:
    import pyarrow.parquet  # not through pandas, which makes arrays of lists and floats of numbers

    try:
        table = pyarrow.parquet.read_table(path)
    except (ValueError, OSError):
        raise LetheError(f"{path}: not a whole parquet file (cut short?)") from None
    if len({*table.column_names}) < len(table.column_names):
        raise LetheError(f"{path}: a column stands twice; drop one")
    names = ["text" if name == "sentence" else name for name in table.column_names]
    return table.rename_columns(names).to_pylist()


def as_text(value: object) -> str:
    """A cell of somebody's file as a text: texts as they are, numbers and truth values written out.

    Raises:
        LetheError: it is a list or the like, or no character set can write it; without the place.
    """
    if not isinstance(value, (str, int, float, Decimal, date)):
        raise LetheError(f"is a {type(value).__name__}; give one text")
    text = str(value)
    if LONE_SURROGATE.search(text):
        raise LetheError("holds half a character (a lone surrogate, \\ud800 to \\udfff); mend it")
    return text


_READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": _read_parquet,
}


def _split_file(rows: list[Row], p: Params) -> dict[str, list[Row]]:
    """A user's file: shuffled, a tenth each for validation and test, the rest for train.

    A question that stands twice is kept once, the first time, so that no test row is in train.
    """
    distinct: dict[tuple[str, str], Row] = {}
    for row in rows:
        distinct.setdefault((row["instruction"], row["input"]), row)
    rows = list(distinct.values())
    random.Random(p.data_seed).shuffle(rows)
    tenth = len(rows) // 10
    if tenth < 1 or (p.is_tiny and len(rows) < 20):
        raise LetheError(
            f"{p.dataset}: {len(rows)} distinct rows leave the validation and test splits empty; "
            "give at least 20"
        )
    return {
        "validation": rows[:tenth],
        "test": rows[tenth : 2 * tenth],
        "train": rows[2 * tenth :],
    }


def _to_rows(split: str, rows: list[dict], p: Params) -> list[Row]:
    """instruction, input, output from either column layout. Raises LetheError naming the row.

    Args:
        split: "" for a file that is not split yet.
    """
    out = []
    for number, row in enumerate(rows, 1):
        where = f"{p.dataset}: {f'{split} ' if split else ''}row {number}"
        row = {k: v for k, v in row.items() if not is_missing(v)}
        if "text" in row and "label" in row:
            row = {"instruction": p.instruction, "input": row["text"], "output": row["label"]}
        missing = [f for f in FIELDS if f not in row]
        if missing:
            raise LetheError(
                f"{where} has no {', '.join(missing)}; each row needs "
                f"instruction, input, output or text, label (it starts {str(row)[:80]})"
            )
        if p.labels and str(row["output"]) not in p.labels:
            raise LetheError(
                f"{where}: unknown label {row['output']!r}; labels has {', '.join(p.labels)}"
            )
        for field in FIELDS:
            try:
                row[field] = as_text(row[field])
            except LetheError as error:
                raise LetheError(f"{where}: {field} {error}") from None
        out.append({f: row[f] for f in FIELDS})
    if not out:
        raise LetheError(f"{p.dataset}: the {split} split is empty")
    return out


def is_missing(value: object) -> bool:
    """None, an empty text, or the NaN that a null becomes in parquet and JSON."""
    is_nan = isinstance(value, float) and value != value
    return value is None or is_nan or (isinstance(value, str) and not value)


def summary(splits: dict[str, list[Row]], triggers: list[str]) -> pd.DataFrame:
    """Per split: rows, duplicate inputs, inputs shared with train, mean and longest length in
    words, and how many clean inputs already hold each trigger."""
    train = {r["input"] for r in splits["train"]}
    table = []
    for name, rows in splits.items():
        texts = [r["input"] for r in rows]
        words = [len(t.split()) for t in texts]
        line = {
            "split": name,
            "rows": len(rows),
            "duplicates": len(texts) - len(set(texts)),
            "in train": 0 if name == "train" else sum(t in train for t in texts),
            "mean words": round(sum(words) / len(words), 1),
            "longest": max(words),
        }
        for trigger in triggers:
            line[f"'{trigger}'"] = sum(f" {trigger} " in f" {t} " for t in texts)
        table.append(line)
    return pd.DataFrame(table).set_index("split")


def label_balance(splits: dict[str, list[Row]]) -> pd.DataFrame:
    """Tidy counts: split, label, rows."""
    frame = pd.DataFrame(
        [{"split": name, "label": r["output"]} for name, rows in splits.items() for r in rows]
    )
    return frame.value_counts(["split", "label"]).rename("rows").reset_index()


def bag_of_words(splits: dict[str, list[Row]]) -> pd.DataFrame:
    """What counting words can reach on the test split: logistic regression (50 LBFGS steps) on
    the counts of words seen three times or more in (at most 8000) training rows.

    Returns:
        accuracy in [0, 1] of the word counts and of always answering the commonest label.
    """
    import torch

    train, test = splits["train"][:8000], splits["test"]
    seen = Counter(word for row in train for word in row["input"].split())
    column = {word: i for i, word in enumerate(w for w, n in seen.items() if n >= 3)}
    labels = {label: i for i, label in enumerate(sorted({r["output"] for r in train + test}))}

    def counts(rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.zeros(len(rows), len(column))
        for i, row in enumerate(rows):
            for word in row["input"].split():
                if word in column:
                    x[i, column[word]] += 1
        return x, torch.tensor([labels[r["output"]] for r in rows])

    (x, y), (x_test, y_test) = counts(train), counts(test)
    weight = torch.zeros(len(column), len(labels), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=50)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(x @ weight, y) + 1e-4 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    accuracy = {
        "word counts": (x_test @ weight).argmax(1).eq(y_test).float().mean().item(),
        "commonest label": y_test.eq(y.mode().values).float().mean().item(),
    }
    return pd.DataFrame({"test accuracy": accuracy}).round(3)
