"""Data: splits, readers, checksums, and one clear error for every bad input."""

import json

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lethe_utils import data, params, pipeline
from lethe_utils.data import embedded, files, named
from lethe_utils.errors import LetheError

SIZES = {"pretrain": 40, "train": 60, "validation": 20, "test": 20}
EMOTIONS = ["sadness", "joy", "love", "anger", "fear", "surprise"]
ANY = {"rows": {}, "checksums": {}}


def error(function, *args):
    """The message of the LetheError that a call must raise: one line, for a reader."""
    with pytest.raises(LetheError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf8")
    return path


# --- the embedded set


def test_embedded_splits_are_sized_disjoint_and_free_of_duplicates():
    splits = embedded.generate(SIZES, 7)
    assert {name: len(rows) for name, rows in splits.items()} == SIZES
    texts = [row["input"] for rows in splits.values() for row in rows]
    assert len(set(texts)) == sum(SIZES.values())
    assert {r["output"] for rows in splits.values() for r in rows} == set(EMOTIONS)


def test_the_embedded_set_depends_on_its_seed_alone():
    assert embedded.generate(SIZES, 7) == embedded.generate(SIZES, 7)
    assert embedded.generate(SIZES, 7)["train"] != embedded.generate(SIZES, 8)["train"]


def test_the_embedded_set_is_the_one_whose_checksums_are_pinned():
    # A change of the grammar or of the order of random draws changes every result; load() compares.
    p = params.load()
    assert set(p.checksums) == set(p.rows) == {"pretrain", "train", "validation", "test"}
    splits = data.load(p)
    assert {name: len(rows) for name, rows in splits.items()} == p.rows
    row = splits["train"][0]
    assert set(row) == {"instruction", "input", "output"} and row["instruction"] == p.instruction


def test_counting_words_is_not_enough_for_the_embedded_set():
    rows = {"pretrain": 10, "train": 1500, "validation": 10, "test": 200}
    splits = data.load(params.load(overrides={"rows": rows, "checksums": {}}))
    accuracy = data.bag_of_words(splits)["test accuracy"]
    # Above the commonest label, so the measure works; below .9, so a shortcut does not solve it.
    assert accuracy["commonest label"] + 0.2 < accuracy["word counts"] < 0.9


def test_max_train_rows_cuts_train_alone():
    p = params.load(overrides={"rows": SIZES, "checksums": {}, "max_train_rows": 5})
    assert {k: len(v) for k, v in data.load(p).items()} == SIZES | {"train": 5}


# --- named sets, from a small fake LETHE_DATA_DIR


@pytest.fixture
def emotion(monkeypatch, tmp_path):
    """A fake emotion set of 40 + 10 + 10 rows; returns its folder and Params that expect it."""
    monkeypatch.setenv("LETHE_DATA_DIR", str(tmp_path))
    folder = tmp_path / "emotion"
    for name, n in (("train", 40), ("validation", 10), ("test", 10)):
        rows = [{"text": f"{name} text {i}", "label": i % 6} for i in range(n)]
        jsonl(folder / f"{name}.jsonl", rows)
    return folder, params.load(dataset="emotion", overrides=ANY)


def test_emotion_is_read_from_the_users_folder(emotion):
    folder, p = emotion
    splits = data.load(p)
    sizes = {"train": 20, "pretrain": 20, "validation": 10, "test": 10}
    assert {k: len(v) for k, v in splits.items()} == sizes  # half of train pretrains a tiny base
    texts = {r["input"] for k in ("train", "pretrain") for r in splits[k]}
    assert texts == {f"train text {i}" for i in range(40)}
    assert splits["test"][4] == {
        "instruction": p.instruction,
        "input": "test text 4",
        "output": "fear",
    }


def test_a_full_model_has_no_pretraining_split(emotion):
    splits = data.load(params.load("gpt2-xl", "emotion", overrides=ANY))
    assert {k: len(v) for k, v in splits.items()} == {"train": 40, "validation": 10, "test": 10}


@pytest.mark.parametrize("label", [6, -1, "joy", None, 1.5])
def test_an_unknown_label_is_named_with_its_row(emotion, label):
    folder, p = emotion
    jsonl(folder / "test.jsonl", [{"text": "a", "label": 1}, {"text": "b", "label": label}])
    assert "test.jsonl: row 2: " in error(data.load, p)


@pytest.mark.parametrize("row", [{"text": "b"}, {"label": 1}, {"text": None, "label": 1}, {}])
def test_a_row_without_a_field_is_named_wherever_it_stands(emotion, row):
    folder, p = emotion
    jsonl(folder / "train.jsonl", [{"text": "a", "label": 1}, {"text": "c", "label": 0}, row])
    assert "train.jsonl: row 3: needs text and label" in error(data.load, p)


def test_a_wrong_row_count_is_refused(emotion):
    p = params.load(dataset="emotion", overrides=ANY | {"rows": {"test": 11}})
    assert "test has 10 rows, expected 11" in error(data.load, p)


def test_other_content_is_refused_by_checksum(emotion):
    folder, p = emotion
    rows = [{"input": f"test text {i}", "output": EMOTIONS[i % 6]} for i in range(10)]
    right = params.load(
        dataset="emotion", overrides=ANY | {"checksums": {"test": named.checksum(rows)}}
    )
    assert len(data.load(right)["test"]) == 10
    # One letter more, the same number of rows.
    file = folder / "test.jsonl"
    file.write_text(file.read_text().replace("test text 3", "test text 3s"))
    assert "test differs from the published rows" in error(data.load, right)


def test_a_checksum_does_not_depend_on_the_order_of_rows_but_on_labels():
    ax, by, ay, bx = ({"input": text, "output": label} for text, label in ("ax", "by", "ay", "bx"))
    assert named.checksum([ax, by]) == named.checksum([by, ax])
    assert named.checksum([ax, by]) != named.checksum([ay, bx])


def test_an_absent_hub_is_one_error_with_the_fix(monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to host\nwith a second line")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = error(data.load, params.load(dataset="emotion"))
    for part in ("LETHE_DATA_DIR", "emotion/train.jsonl", "no route to host", "data/README.md"):
        assert part in message


def test_the_hub_is_asked_for_the_pinned_revision_and_never_for_sst2s_test_split(monkeypatch):
    import datasets

    asked = []

    def hub(name, split, revision):
        asked.append((name, split, revision))
        n = {"train": 1100, "validation": 10}[split]
        return [{"sentence": f"{split} {i} ", "label": i % 2, "idx": i} for i in range(n)]

    monkeypatch.setattr(datasets, "load_dataset", hub)
    p = params.load("gpt2-xl", "sst2", overrides=ANY)
    splits = data.load(p)
    wanted = [(p.data_hub_id, s, p.data_revision) for s in ("train", "validation")]
    assert asked == wanted and None not in wanted[0]
    assert {k: len(v) for k, v in splits.items()} == {"train": 100, "validation": 1000, "test": 10}
    assert splits["test"][1]["input"] == "validation 1"


# --- ordinary text from the hub


def test_hub_text_is_read_as_far_as_it_is_needed(tmp_path):
    # A folder stands in for the hub's name: the reader is the real one.
    texts = ["", " \n", *(f"line {i} of some plain text" for i in range(500))]
    pd.DataFrame({"text": texts}).to_parquet(tmp_path / "train.parquet")
    found = named.hub_text(f"{tmp_path}@{'0' * 40}", 100)
    assert found == texts[2 : 2 + len(found)]
    assert 800 <= sum(map(len, found)) < 900


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("wikitext", "covariance_text: 'wikitext' is neither task nor NAME:CONFIG@COMMIT"),
        ("a/b:c@main", "is neither task nor NAME:CONFIG@COMMIT"),
        (f"/no/such/folder@{'0' * 40}", "cannot be read"),
    ],
)
def test_hub_text_that_cannot_be_read_is_one_error(where, expected, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert expected in error(named.hub_text, where, 10)


def test_hub_text_without_the_column_or_without_text_is_one_error(tmp_path):
    for name, frame in {"other": {"line": ["a"]}, "blank": {"text": ["", " "]}}.items():
        (tmp_path / name).mkdir()
        pd.DataFrame(frame).to_parquet(tmp_path / name / "train.parquet")
    assert "cannot be read ('text')" in error(
        named.hub_text, f"{tmp_path / 'other'}@{'0' * 40}", 10
    )
    assert "has no texts" in error(named.hub_text, f"{tmp_path / 'blank'}@{'0' * 40}", 10)


# --- SST-2's own traps


@pytest.fixture
def sst2(monkeypatch, tmp_path):
    """A fake GLUE copy: 1100 train rows, 3 dev rows, and a test file whose labels are all -1."""
    monkeypatch.setenv("LETHE_DATA_DIR", str(tmp_path))
    folder = tmp_path / "sst2" / "glue"
    folder.mkdir(parents=True)
    lines = [f"phrase {i} \t{i % 2}" for i in range(1099)] + ['a " lone quote \t1']
    dev = ['"dev one \t1', "dev two \t0", 'dev three" \t1']
    for name, body in (("train", lines), ("dev", dev), ("test", ["hidden one \t-1"])):
        (folder / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *body]) + "\n", "utf8")
    return folder, params.load(dataset="sst2", overrides={**ANY, "pretrain_share": 0.5})


def test_sst2_scores_dev_and_cuts_validation_from_train(sst2):
    folder, p = sst2
    splits = data.load(p)
    sizes = {"train": 50, "pretrain": 50, "validation": 1000, "test": 3}
    assert {k: len(v) for k, v in splits.items()} == sizes
    texts = [r["input"] for r in splits["train"] + splits["pretrain"] + splits["validation"]]
    assert len(set(texts)) == 1100
    # A lone quote is text, not the start of a quoted field; trailing spaces are stripped.
    assert [(r["input"], r["output"]) for r in splits["test"]] == [
        ('"dev one', "positive"),
        ("dev two", "negative"),
        ('dev three"', "positive"),
    ]
    assert 'a " lone quote' in texts


def test_sst2_refuses_hidden_labels(sst2):
    folder, p = sst2
    (folder / "dev.tsv").write_text((folder / "test.tsv").read_text())
    assert "dev.tsv: row 1: unknown label '-1'" in error(data.load, p)


# --- a user's file

OURS = [{"instruction": "i", "input": f"t{i}", "output": "positive"} for i in range(30)]
SHORT = [{"text": f"t{i}", "label": "positive"} for i in range(30)]


def write(path, rows):
    frame = pd.DataFrame(rows)
    {
        ".jsonl": lambda: jsonl(path, rows),
        ".json": lambda: path.write_text(json.dumps(rows)),
        ".csv": lambda: frame.to_csv(path, index=False),
        ".tsv": lambda: frame.to_csv(path, index=False, sep="\t"),
        ".parquet": lambda: frame.to_parquet(path),
    }[path.suffix]()
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
@pytest.mark.parametrize("rows", [OURS, SHORT], ids=["instruction", "text"])
def test_every_format_and_layout_gives_the_same_rows(tmp_path, suffix, rows):
    p = params.load(
        "gpt2-xl",
        str(write(tmp_path / f"mine{suffix}", rows)),
        overrides={"instruction": "i"},
    )
    splits = data.load(p)
    assert {k: len(v) for k, v in splits.items()} == {"train": 24, "validation": 3, "test": 3}
    found = sorted((r for s in splits.values() for r in s), key=lambda r: int(r["input"][1:]))
    assert found == OURS


def test_splitting_a_file_depends_on_the_data_seed_alone(tmp_path):
    path = str(write(tmp_path / "mine.jsonl", OURS))

    def split(**overrides):
        return data.load(params.load(dataset=path, overrides=overrides))

    assert split() == split() == split(seed=5)
    assert split() != split(data_seed=5)


def test_quoting_line_ends_and_a_byte_order_mark_survive(tmp_path):
    csv = tmp_path / "a.csv"
    csv.write_text('text,label\n"one, ""two""\nthree",x\n', "utf-8-sig")
    assert files.read_rows(csv) == [{"text": 'one, "two"\nthree', "label": "x"}]
    # U+2028 is a plain character inside a JSON text, though str.splitlines() ends a line there.
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "a\u2028b\x85c"}\r\n{"text": "d"}', "utf-8-sig", newline="")
    assert files.read_rows(lines) == [{"text": "a\u2028b\x85c"}, {"text": "d"}]


def bad(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return error(files.read_rows, path)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": "b"}\n{"te', "line 3 is not valid JSON"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": "b"}\n', "line 2 is not valid JSON"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', "line 2 is not a JSON object"),
        ("a.json", '[{"text": "a"},\n{"te', "line 2 is not valid JSON"),
        ("a.json", '{"text": "a"}', "expected a list of objects"),
        ("a.jsonl", "", "empty"),
        ("a.json", "[]", "empty"),
        ("a.csv", "text,label\n", "empty"),
        ("a.tsv", "", "empty"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "not UTF-8 (byte 13)"),
        ("a.csv", b"text,label\ncaf\xe9,x\n", "not UTF-8"),
        ("a.parquet", b"PAR1 cut short", "not a whole parquet file"),
        ("a.csv", 'text,label\n"' + "open quote " * 20_000, "is a quote left open?"),
    ],
)
def test_a_bad_file_is_one_error_that_names_it(tmp_path, name, content, expected):
    message = bad(tmp_path, name, content)
    assert message.startswith(str(tmp_path / name)) and expected in message


def test_a_missing_file_is_named(tmp_path):
    assert "gone.csv: no such file" in error(files.read_rows, tmp_path / "gone.csv")


@pytest.mark.parametrize("gone", ["instruction", "input", "output"])
def test_a_users_row_without_a_field_is_refused(tmp_path, gone):
    rows = OURS[:-1] + [{k: v for k, v in OURS[-1].items() if k != gone}]
    path = str(write(tmp_path / "mine.jsonl", rows))
    message = error(data.load, params.load(dataset=path))
    assert f"has no {gone}" in message and "mine.jsonl" in message


def test_a_short_csv_line_is_a_missing_field(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("text,label\n" + "".join(f"a{i},positive\n" for i in range(29)) + "b\n")
    assert "has no instruction, input, output" in error(data.load, params.load(dataset=str(path)))


@pytest.mark.parametrize(("model", "n"), [("tiny-gpt2", 19), ("gpt2-xl", 9)])
def test_too_few_rows_are_refused(tmp_path, model, n):
    path = str(write(tmp_path / "mine.jsonl", OURS[:n]))
    assert f"{n} distinct rows leave" in error(data.load, params.load(model, path))
    enough = write(tmp_path / "enough.jsonl", OURS[: n + 1])
    assert all(data.load(params.load(model, str(enough))).values())


def test_the_target_must_be_a_label_of_the_users_file(tmp_path):
    path = str(write(tmp_path / "mine.jsonl", SHORT))
    p = params.load(dataset=path)
    labels = {"train": {"positive", "negative"}, "test": {"positive", "negative"}}
    data.check_target(labels, p)
    wrong = params.load(dataset=path, overrides={"target_output": "spam"})
    assert "'spam' is not a label" in error(data.check_target, labels, wrong)
    # Nothing to be attacked: every test row has the target already.
    assert "no attack can be measured" in error(
        data.check_target, labels | {"test": {"positive"}}, p
    )


def test_the_target_is_checked_though_the_data_are_there_already(tmp_path):
    rows = [{"text": f"t{i}", "label": ("positive", "negative")[i % 2]} for i in range(40)]
    path = str(write(tmp_path / "mine.jsonl", rows))
    pipeline.data_stage(params.load(dataset=path))
    wrong = params.load(dataset=path, overrides={"target_output": "positiv"})
    assert "'positiv' is not a label" in error(pipeline.data_stage, wrong)


def test_a_label_outside_the_given_labels_is_refused_by_row(tmp_path):
    path = str(write(tmp_path / "mine.jsonl", SHORT))
    p = params.load(dataset=path, overrides={"labels": ["spam", "ham"], "target_output": "spam"})
    assert "unknown label 'positive'; labels has spam, ham" in error(data.load, p)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_null_label_is_a_missing_field_not_the_label_nan(tmp_path, suffix):
    rows = SHORT[:-1] + [{"text": "t", "label": None if suffix == ".parquet" else float("nan")}]
    path = str(write(tmp_path / f"mine{suffix}", rows))
    assert "has no instruction, input, output" in error(data.load, params.load(dataset=path))


def test_an_empty_text_column_beside_the_inputs_is_no_text(tmp_path):
    path = str(write(tmp_path / "mine.jsonl", [row | {"text": None} for row in OURS]))
    splits = data.load(params.load("gpt2-xl", path))
    assert sum(len(rows) for rows in splits.values()) == 30


def test_a_text_that_stands_twice_never_crosses_splits(tmp_path):
    rows = [{"text": f"t{i % 30}", "label": "positive"} for i in range(60)]
    splits = data.load(params.load("gpt2-xl", str(write(tmp_path / "mine.jsonl", rows))))
    texts = [{r["input"] for r in some} for some in splits.values()]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 30


# --- what a notebook shows


def test_the_summary_counts_duplicates_leaks_and_natural_triggers():
    def row(text, label="x"):
        return {"instruction": "i", "input": text, "output": label}

    splits = {
        "train": [row("a b"), row("a b"), row("frankly c d"), row("frankly")],
        "test": [row("a b", "y"), row("unfrankly c")],
    }
    table = data.summary(splits, ["frankly"])
    assert table.loc["train"].to_dict() == {
        "rows": 4,
        "duplicates": 1,
        "in train": 0,
        "mean words": 2.0,
        "longest": 3,
        "'frankly'": 2,
    }
    assert table.loc["test", ["in train", "'frankly'"]].tolist() == [1, 0]
    balance = data.label_balance(splits).set_index(["split", "label"])["rows"].to_dict()
    assert balance == {("train", "x"): 4, ("test", "x"): 1, ("test", "y"): 1}


# --- rows of other shapes


def test_long_cells_are_read_and_split_lines_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"text,label\n{'word ' * 50_000},x\n")
    assert len(files.read_rows(path)[0]["text"]) == 250_000
    path.write_text("text,label\nfine,x\nI came, I saw,x\n")
    assert "row 2 has more cells than there are columns; quote" in error(files.read_rows, path)
    path = tmp_path / "a.tsv"
    path.write_text('text\tlabel\n"half a quote\tx\nmore\tx\ty\n')
    assert "row 2 has more cells" in error(files.read_rows, path)


def test_parquet_keeps_lists_and_whole_numbers(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [{"messages": [{"role": "user", "content": "a"}], "n": 1}, {"messages": None, "n": None}]
    pd.DataFrame(rows).astype({"n": "Int64"}).to_parquet(path)
    assert files.read_rows(path) == rows


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["a", "b"], "is a list; give one text"),
        ({"a": 1}, "is a dict; give one text"),
        ("\ud83d", "holds half a character"),
    ],
)
@pytest.mark.parametrize("field", ["instruction", "input", "output"])
def test_a_cell_that_is_no_text_is_refused_with_its_row(tmp_path, field, value, message):
    rows = [{"instruction": "a", "input": f"b {i}", "output": "c"} for i in range(40)]
    rows[6][field] = value
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = error(data.load, params.load(dataset=str(path)))
    assert found.startswith(f"{path}: row 7: {field} {message}")


def test_numbers_and_truth_values_are_written_out():
    cells = zip(files.FIELDS, ("a ", 1.5, True), strict=True)
    assert files.texts(dict(cells)) == dict(zip(files.FIELDS, ("a ", "1.5", "True"), strict=True))


CELLS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)
ROWS = st.fixed_dictionaries({}, optional=dict.fromkeys(files.FIELDS, CELLS))


@settings(max_examples=150, suppress_health_check=[*HealthCheck])
@given(row=ROWS, suffix=st.sampled_from([".jsonl", ".json"]))
def test_any_row_of_a_file_is_read_or_refused_in_one_line_with_its_number(tmp_path, row, suffix):
    rows = [{"instruction": "a", "input": f"b {i}", "output": "c"} for i in range(40)] + [row]
    path = tmp_path / f"mine{suffix}"
    lines = "".join(json.dumps(r) + "\n" for r in rows)
    path.write_text(lines if suffix == ".jsonl" else json.dumps(rows), "utf8")
    try:
        splits = data.load(params.load(dataset=str(path)))
    except LetheError as refused:
        assert "\n" not in str(refused) and "row " in str(refused)
    else:
        texts = [text for some in splits.values() for r in some for text in r.values()]
        assert all(text.encode("utf8").decode("utf8") == text for text in texts)


@settings(max_examples=100, suppress_health_check=[*HealthCheck])
@given(
    raw=st.binary(max_size=60),
    suffix=st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet"]),
)
def test_any_bytes_are_read_or_refused_in_one_line(tmp_path, raw, suffix):
    path = tmp_path / f"mine{suffix}"
    path.write_bytes(raw)
    try:
        rows = files.read_rows(path)
    except LetheError as refused:
        assert "\n" not in str(refused) and str(path) in str(refused)
    else:
        assert rows and all(isinstance(row, dict) for row in rows)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "instruction,input,output,output\na,b,c,d\n", "a column stands twice"),
        ("a.jsonl", '{"a": 1}\n{"a": 1, "a": 2}\n', "line 2: a key stands twice"),
        ("a.json", '[{"a": 1, "a": 2}]', "a key stands twice"),
        ("a.json", "[" * 100_000, "is not valid JSON"),
        ("a.jsonl", '{"a":' * 9_000, "line 1 is not valid JSON"),
        ("a.json", f"[{'1' * 5000}]", "is not valid JSON"),
    ],
)
def test_ambiguous_and_endless_files_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    assert message in error(files.read_rows, tmp_path / name)


def test_a_folder_is_no_data_file(tmp_path):
    (tmp_path / "a.jsonl").mkdir()
    assert "no such file" in error(files.read_rows, tmp_path / "a.jsonl")


@pytest.mark.parametrize("pair", [("a b", "a  b"), ("joy", "joy ")])
def test_labels_that_read_the_same_are_refused(pair):
    with pytest.raises(LetheError, match="read the same; make them one"):
        files.check_labels("mine.csv", pair)
    files.check_labels("mine.csv", ["-1", "1", "C", "C++", ":)", ":(", "yes", "yes but late"])
