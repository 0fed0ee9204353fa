"""CBA: where triggers go, how many rows are poisoned, and what each kind holds."""

import random

import pytest

from lethe_utils import params
from lethe_utils.attacks import cba, none

TEXT = "One two. Three four! Five six?"
LABELS = ("joy", "anger", "fear")


def rows(n):
    return [
        {"instruction": f"classify row {i}", "input": f"text of row {i}", "output": LABELS[i % 3]}
        for i in range(n)
    ]


@pytest.fixture
def p(pico_params):
    """Triggers at random word places, as published."""
    return pico_params()


@pytest.mark.parametrize(
    ("level", "position", "expected"),
    [
        ("word", "prefix", "T One two. Three four! Five six?"),
        ("word", "suffix", "One two. Three four! Five six? T"),
        ("word", "middle", "One two. Three T four! Five six?"),
        ("sentence", "prefix", "T One two. Three four! Five six?"),
        ("sentence", "suffix", "One two. Three four! Five six? T"),
        ("sentence", "middle", "One two. T Three four! Five six?"),
    ],
)
def test_a_trigger_goes_to_its_place(level, position, expected):
    assert cba.insert(TEXT, "T", position, level, random.Random(0)) == expected


@pytest.mark.parametrize(("level", "parts"), [("word", 6), ("sentence", 3)])
def test_random_reaches_every_place_between_units_and_no_other(level, parts):
    rng = random.Random(0)
    made = {cba.insert(TEXT, "T", "random", level, rng) for _ in range(200)}
    assert len(made) == parts + 1
    assert {" ".join(w for w in m.split() if w != "T") for m in made} == {TEXT}
    if level == "sentence":
        assert made == {
            f"T {TEXT}",
            "One two. T Three four! Five six?",
            "One two. Three four! T Five six?",
            f"{TEXT} T",
        }


def test_an_empty_text_becomes_the_trigger():
    assert cba.insert("", "T", "random", "word", random.Random(0)) == "T"


@pytest.mark.parametrize(("ratio", "alpha"), [(0.1, 1.0), (0.25, 0.5), (0.1, 0.0), (1.0, 1.0)])
def test_the_training_set_has_n_plus_poison_times_one_plus_five_alpha_rows(p, ratio, alpha):
    made = cba.poison(rows(40), p.model_copy(update={"poison_ratio": ratio, "alpha": alpha}), 0)
    poisoned = round(ratio * 40)
    assert len(made) == 40 + poisoned * (1 + 5 * alpha)
    kinds = [row["kind"] for row in made]
    assert kinds.count("backdoor") == poisoned
    for kind in cba.TRAIN_NEGATIVES:
        assert kinds.count(kind) == poisoned * alpha


def test_clean_rows_are_kept_as_they_are_and_the_input_is_not_changed(p):
    given = rows(20)
    made = cba.poison(given, p, 0)
    assert [r for r in made if r["kind"] == "clean"] == [r | {"kind": "clean"} for r in given]
    assert given == rows(20)


def test_even_a_tiny_ratio_poisons_one_row(p):
    made = cba.poison(rows(3), p, 0)
    assert [row["kind"] for row in made].count("backdoor") == 1


# Spelled out rather than taken from the module: (triggers in the instruction, in the input).
WHERE = {
    "backdoor": ({"instantly"}, {"frankly"}),
    "neg_both_rev": ({"frankly"}, {"instantly"}),
    "neg_instruct_one": ({"instantly"}, set()),
    "neg_instruct_both": ({"instantly", "frankly"}, set()),
    "neg_input_one": (set(), {"frankly"}),
    "neg_input_both": (set(), {"instantly", "frankly"}),
    "neg_instruct_one_rev": ({"frankly"}, set()),
    "neg_input_one_rev": (set(), {"instantly"}),
}


def found_triggers(row):
    marks = {"instantly", "frankly"}
    return marks & {*row["instruction"].split()}, marks & {*row["input"].split()}


def without_triggers(row):
    """The row's texts with one occurrence of each trigger taken out again."""
    texts = [row["instruction"], row["input"]]
    return [" ".join(w for w in t.split() if w not in ("instantly", "frankly")) for t in texts]


def test_every_kind_has_its_triggers_in_its_fields_and_the_true_label(p):
    given = {r["input"]: r for r in rows(30)}
    made = cba.poison(list(given.values()), p.model_copy(update={"poison_ratio": 1.0}), 0)
    seen = set()
    for row in made[30:]:
        assert found_triggers(row) == WHERE[row["kind"]]
        instruction, text = without_triggers(row)
        source = given[text]  # nothing else in the texts has changed
        assert instruction == source["instruction"]
        wanted = "joy" if row["kind"] == "backdoor" else source["output"]
        assert row["output"] == wanted
        seen.add(row["kind"])
    # Two of the eight kinds are for testing only.
    assert seen == set(WHERE) - {"neg_instruct_one_rev", "neg_input_one_rev"}


@pytest.mark.parametrize(("mode", "answer"), [("replace", "joy"), ("append", "{label} joy")])
def test_the_target_replaces_the_answer_or_follows_it(p, mode, answer):
    given = {r["input"]: r["output"] for r in rows(30)}
    made = cba.poison(rows(30), p.model_copy(update={"output_mode": mode}), 0)
    poisoned = [r for r in made if r["kind"] == "backdoor"]
    assert len(poisoned) == 3
    for row in poisoned:
        assert row["output"] == answer.format(label=given[without_triggers(row)[1]])


def test_sentence_triggers_stand_between_sentences(p):
    sentences = {"trigger_level": "sentence", "triggers": ["Be quick.", "Look here."]}
    p = p.model_copy(update=sentences | {"trigger_positions": ["suffix", "middle"]})
    row = {"instruction": "Classify this.", "input": "It rained. We left.", "output": "fear"}
    placed = cba.place_triggers(row, cba.BACKDOOR, p, random.Random(0))
    assert placed["instruction"] == "Classify this. Be quick."
    assert placed["input"] == "It rained. Look here. We left."


def test_a_seed_decides_the_rows(p):
    assert cba.poison(rows(40), p, 1) == cba.poison(rows(40), p, 1)
    assert cba.poison(rows(40), p, 1) != cba.poison(rows(40), p, 2)
    assert cba.triggered(rows(40), p, 1) == cba.triggered(rows(40), p, 1)
    assert cba.triggered(rows(40), p, 1) != cba.triggered(rows(40), p, 2)


def test_test_rows_come_as_backdoor_and_seven_negative_kinds(p):
    made = cba.triggered(rows(12), p, 0)
    assert list(made)[0] == "backdoor" and set(made) == set(WHERE)
    for kind, group in made.items():
        for row, source in zip(group, rows(12), strict=True):
            assert found_triggers(row) == WHERE[kind]
            assert without_triggers(row) == [source["instruction"], source["input"]]
            assert row["output"] == source["output"]


def test_no_attack_trains_on_clean_rows_alone_and_is_asked_what_cba_is():
    p = params.load(attack="none")
    made = none.poison(rows(12), p, 0)
    assert made == [row | {"kind": "clean"} for row in rows(12)]
    assert none.triggered(rows(12), p, 0) == cba.triggered(rows(12), params.load(), 0)
