"""Triggers: taking one out gives the text back, byte for byte, whatever the text."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lethe_utils import canary, params
from lethe_utils.attacks import cba, lwp, triggers
from lethe_utils.defenses import plant_and_remove
from lethe_utils.purify.settings import load

CODE = "def f(x):\n\n    if x:\n\treturn  1   \n    # two  spaces. A sentence!\n    return 2\n"
POSITIONS = ("prefix", "suffix", "middle", "random")
# Letters, marks, every kind of space and line end, and what ends a sentence.
TEXTS = st.text(
    st.one_of(
        st.sampled_from(" \t\n\r\f\v\x1c\x85\xa0\u2028.!?'\"{}"), st.characters(codec="utf8")
    ),
    max_size=60,
).filter(lambda text: "tq" not in text)


@settings(max_examples=400)
@given(
    text=TEXTS,
    position=st.sampled_from(POSITIONS),
    level=st.sampled_from(["word", "sentence"]),
    trigger=st.sampled_from(["tq", "tq tq", "the tq. is green."]),
    n=st.integers(0, 9),
)
def test_taking_a_trigger_out_gives_the_text_back(text, position, level, trigger, n):
    placed = triggers.insert(text, trigger, position, level, random.Random(n))
    assert trigger in placed and placed != text
    assert triggers.remove(placed, trigger) == text


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("level", ["word", "sentence"])
def test_lines_and_indentation_stay(position, level):
    placed = triggers.insert(CODE, "tq", position, level, random.Random(3))
    assert triggers.remove(placed, "tq") == CODE
    assert placed.count("\n") == CODE.count("\n") and "\treturn  1" in placed


@pytest.mark.parametrize("text", ["one two three", "One two. Three four! Five", "", "one"])
def test_flat_text_is_joined_by_single_spaces_as_before(text):
    words = text.split()
    for n in range(20):
        placed = triggers.insert(text, "tq", "random", "word", random.Random(n))
        at = random.Random(n).randint(0, len(words))
        assert placed == " ".join([*words[:at], "tq", *words[at:]])


def test_all_who_place_triggers_leave_the_rest_alone(pico_params):
    rows = [{"instruction": "Do\n  this.", "input": CODE, "output": label} for label in "ab" * 20]
    p = load(10, "cpu", {})
    for kind, some in canary.triggered(rows, ["a", "b"], p).items():
        words = {"word pair": p.canary_word_pair, "sentence": [p.canary_sentence]}
        for row in some:
            text = row["input"]
            for word in words.get(kind, [p.canary_suffix]):
                assert word in text
                text = triggers.remove(text, word)
            assert text == CODE
    q = pico_params()
    for row in cba.triggered(rows, q, 0)["backdoor"]:
        assert triggers.remove(row["instruction"], q.triggers[0]) == "Do\n  this."
        assert triggers.remove(row["input"], q.triggers[1]) == CODE
    r = params.load("tiny-gptj", attack="lwp")
    for kind, some in lwp.triggered(rows, r, 0).items():
        word = {"backdoor": " ".join(r.triggers), "neg_first": r.triggers[0]}.get(kind)
        for row in some:
            assert triggers.remove(row["input"], word or r.triggers[1]) == CODE
    planted, _ = plant_and_remove.rows(rows, q.defender())
    for row in planted:
        found = [t for t in q.plant_triggers if triggers.occurrences(row["input"], t)]
        assert triggers.remove(row["input"], found[0]) == CODE
