"""Data sets: found or made, checked, split, and described.

Every row becomes {instruction, input, output} with output = label name. Sets with a name are in
named.py, a user's own file in own.py.
"""

import random
from typing import TYPE_CHECKING

from lethe_utils import evidence, prompts
from lethe_utils.data import chat, named, own
from lethe_utils.data.files import Row, check_labels
from lethe_utils.errors import LetheError
from lethe_utils.schema import Params, is_file

if TYPE_CHECKING:
    import pandas as pd


def load(p: Params) -> dict[str, list[Row]]:
    """The splits of a run: train, validation, test, and pretrain for a tiny base.

    The pretraining rows are disjoint from all others: the base stands for a pretrained LLM that
    never saw the attacker's or the defender's data.
    Raises:
        LetheError: a file, a field, a label, a row count or a checksum is wrong.
    """
    splits = own.split(p) if is_file(p.dataset) else named.load(p)
    if "pretrain" not in splits and p.is_tiny:
        rows = splits["train"]
        random.Random(p.data_seed).shuffle(rows)
        cut = round(len(rows) * p.pretrain_share)
        splits["train"] = rows[cut:]
        # Real sets hold a text twice now and then; the base must not have seen the other copy.
        others = {row["input"] for some in splits.values() for row in some}
        splits["pretrain"] = [row for row in rows[:cut] if row["input"] not in others]
    splits["train"] = splits["train"][: p.max_train_rows]
    for name, rows in splits.items():
        if not rows:
            raise LetheError(f"{p.dataset}: the {name} split is empty")
    return prompts.with_examples(splits, p) if p.few_shot else splits


def with_evidence(row: Row, n_keywords: int, form: evidence.Form) -> Row:
    """The row, its input (of a conversation the last question) with its evidence."""
    text = evidence.add_evidence(row["input"], n_keywords, form=form)
    return chat.with_question(row, text) if "messages" in row else row | {"input": text}


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
    check_labels(p.dataset, sorted(set().union(*labels.values())))
    if not labels["test"] - {p.target_output}:
        raise LetheError(
            f"target_output: every test row of {p.dataset} is {p.target_output!r} already, so no "
            "attack can be measured; choose another target or give more rows"
        )


def summary(splits: dict[str, list[Row]], triggers: list[str]) -> "pd.DataFrame":
    """Per split: rows, duplicate inputs, inputs shared with train, mean and longest length in
    words, and how many clean inputs already hold each trigger."""
    import pandas as pd

    train, table = {row["input"] for row in splits["train"]}, {}
    for name, rows in splits.items():
        texts = [row["input"] for row in rows]
        words = [len(text.split()) for text in texts]
        table[name] = {
            "rows": len(rows),
            "duplicates": len(texts) - len({*texts}),
            "in train": 0 if name == "train" else sum(text in train for text in texts),
            "mean words": round(sum(words) / len(words), 1),
            "longest": max(words),
        }
        for trigger in triggers:
            table[name][f"'{trigger}'"] = sum(f" {trigger} " in f" {text} " for text in texts)
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("split")


def examples(rows: list[Row]) -> "pd.DataFrame":
    """The first row of each kind, as a notebook shows it: its fields, or its turns."""
    import pandas as pd

    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row["kind"], _turns(row) if "messages" in row else row)
    table = pd.DataFrame([*first.values()], index=pd.Index([*first], name="kind")).fillna("")
    return table.drop(columns="kind", errors="ignore")


def _turns(row: Row) -> Row:
    return {f"{m['role']} {i // 2 + 1}": m["content"] for i, m in enumerate(row["messages"])}


def label_balance(splits: dict[str, list[Row]]) -> "pd.DataFrame":
    """Tidy counts: split, label, rows."""
    import pandas as pd

    pairs = [(name, row["output"]) for name, rows in splits.items() for row in rows]
    frame = pd.DataFrame(pairs, columns=["split", "label"])
    return frame.value_counts().rename("rows").reset_index()


def bag_of_words(splits: dict[str, list[Row]]) -> "pd.DataFrame":
    """What counting words can reach on the test split: a logistic regression on the counts of words
    that stand in three or more of (at most 8000) training rows.

    Returns:
        accuracy in [0, 1] of the word counts and of always answering the commonest label.
    """
    import pandas as pd
    from sklearn.dummy import DummyClassifier
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    words = CountVectorizer(token_pattern=r"\S+", lowercase=False, min_df=3)
    train, test = splits["train"][:8000], splits["test"]
    x, y = words.fit_transform(r["input"] for r in train), [r["output"] for r in train]
    x_test, y_test = words.transform(r["input"] for r in test), [r["output"] for r in test]
    found = {"word counts": LogisticRegression(max_iter=500), "commonest label": DummyClassifier()}
    accuracy = {name: model.fit(x, y).score(x_test, y_test) for name, model in found.items()}
    return pd.DataFrame({"test accuracy": accuracy}).round(3)
