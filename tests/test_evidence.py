"""External dilution: keywords, definitions, and where the evidence goes."""

import inspect
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import pipeline

from lethe_utils import evidence, models, params, plots, prompts, wordnet
from lethe_utils.errors import LetheError

SENTENCE = "the old dog barked frankly at a happy child in the quiet garden"


def test_keywords_follow_the_rank_of_a_hand_computed_graph():
    # Each word links to two on either side: degrees 2 3 4 3 2. With t, l, w for tiger = fox,
    # lion = bear and wolf:  t = .15 + .85 (l/3 + w/4),  l = .15 + .85 (t/2 + l/3 + w/4),
    # w = .15 + .85 (t + 2l/3).  Hence w = 1.385, l = 1.062, t = .745; ties keep the text's order.
    assert evidence.keywords("Tiger, lion; wolf. BEAR fox!") == [
        "wolf",
        "lion",
        "bear",
        "tiger",
        "fox",
    ]


def test_ties_keep_the_order_of_the_text():
    assert evidence.keywords("zebra lion") == ["zebra", "lion"]
    assert evidence.keywords("lion zebra") == ["lion", "zebra"]
    # Zebra and fox have the same links; what convergence leaves must not put fox first.
    assert evidence.keywords("zebra lion fox lion lion") == ["lion", "zebra", "fox"]


def test_a_word_repeated_within_the_window_votes_for_itself():
    # Without lion's link to itself, the three words form a triangle and bear would come first.
    assert evidence.keywords("bear lion wolf lion") == ["lion", "bear", "wolf"]


def exact_ranks(links: dict[str, set[str]]) -> dict[str, float]:
    """PageRank (d = .85, mean 1) by solving the linear system instead of iterating."""
    names = list(links)
    share = np.array([[(b in links[a]) / len(links[a]) for a in names] for b in names])
    ranks = np.linalg.solve(np.eye(len(names)) - 0.85 * share, np.full(len(names), 0.15))
    return dict(zip(names, ranks, strict=True))


def test_keywords_agree_with_the_exact_solution():
    text = "storm lamp river stone lamp horse candle river lamp tower storm violin anchor"
    words = text.split()
    links = {w: set() for w in words}
    for i, word in enumerate(words):
        links[word].update(words[max(0, i - 2) : i] + words[i + 1 : i + 3])
    ranks = exact_ranks(links)
    expected = sorted(ranks, key=lambda word: -round(ranks[word], 6))
    assert evidence.keywords(text, 100) == expected


def test_the_ranks_are_what_the_keywords_are_chosen_by():
    table = evidence.ranks("Tiger, lion; wolf. BEAR fox!")
    assert table["word"].tolist() == evidence.keywords("Tiger, lion; wolf. BEAR fox!")
    assert table["score"].tolist() == pytest.approx([1.385, 1.062, 1.062, 0.745, 0.745], abs=1e-3)
    assert table["definition"].tolist() == [wordnet.definition(word) for word in table["word"]]
    assert evidence.ranks("the of and").empty
    (axes,) = plots.ranks(table, 2).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == table["word"].tolist()
    assert len({bar.get_facecolor() for bar in axes.patches}) == 2  # keywords, and the others


def test_stop_words_and_pieces_of_contractions_are_removed():
    assert evidence.keywords("I don't think that they've moved it, and we couldn t") == [
        "think",
        "moved",
    ]
    assert evidence.keywords("this is what they were for, isn't it") == []


def test_the_window_spans_removed_stop_words():
    spread = "tiger and the lion of the wolf with a bear or the fox"
    assert evidence.keywords(spread) == evidence.keywords("tiger lion wolf bear fox")


def test_keywords_repeat_and_the_cache_cannot_be_spoiled():
    first = evidence.keywords(SENTENCE)
    evidence.keywords(SENTENCE).clear()
    assert evidence.keywords(SENTENCE) == first
    evidence._keywords.cache_clear()
    assert evidence.keywords(SENTENCE) == first


def test_keywords_do_not_depend_on_the_hash_seed():
    code = f"from lethe_utils.evidence import keywords; print(keywords({SENTENCE!r}, 9))"
    root = str(Path(evidence.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": root}
    outputs = {
        subprocess.check_output([sys.executable, "-c", code], env={**env, "PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    }
    assert outputs == {f"{evidence.keywords(SENTENCE, 9)}\n".encode()}


@pytest.mark.parametrize("text", ["", "   \n", "?! ... --", "🙂", "the of and"])
def test_texts_without_a_word_have_no_keyword(text):
    assert evidence.keywords(text) == []
    assert evidence.add_evidence(text) == text


def test_one_word_is_its_own_keyword():
    assert evidence.keywords("Dog.") == ["dog"]


def test_non_english_text_gives_its_own_words():
    assert evidence.keywords("Ærlig Übung, 日本語!") == ["ærlig", "übung", "日本語"]
    assert evidence.keywords("हिन्दी वाक्य") == ["हिन्दी", "वाक्य"]
    assert evidence.keywords("می‌روم کافه") == ["می‌روم", "کافه"]  # a joiner inside a word
    assert evidence.keywords("e\u0301le\u0300ve") == ["e\u0301le\u0300ve"]


@pytest.mark.parametrize(
    "text",
    [
        "हिन्दी वाक्य",
        "日本語",
        "собака счастлива",
        "الكلب سعيد",
        "el perro está muy feliz porque llegó la carta",
        "der hund ist heute sehr glücklich und er freut sich",
    ],
)
def test_a_language_that_wordnet_lacks_gets_no_evidence_and_a_line_says_so(text):
    assert evidence.evidence_lines(text) == []
    assert evidence.add_evidence(text) == text
    assert "1 of 2 inputs get no evidence" in evidence.without_evidence([text, "the dog came"])
    assert evidence.without_evidence(["the dog came", "tq mn"]) == ""


def test_words_of_another_script_get_no_line_of_their_own():
    assert [line.split(":")[0] for line in evidence.evidence_lines("the dog 犬 came")] == [
        "dog",
        "came",
    ]


def test_only_the_start_of_a_very_long_text_is_ranked():
    rng = random.Random(0)
    start = " ".join(f"w{rng.randint(0, 9_000)}" for _ in range(evidence.MOST_WORDS))
    found = evidence.keywords(start + " elsewhere" * 5_000)
    assert len(found) == 5 and "elsewhere" not in found
    assert evidence.keywords(start) == found


def test_numbers_count_as_words_and_underscores_separate():
    assert sorted(evidence.keywords("route66 snake_case")) == ["case", "route66", "snake"]


@pytest.mark.parametrize("n", [0, 1, 3, 5])
def test_n_bounds_the_keywords_and_keeps_the_best(n):
    everything = evidence.keywords(SENTENCE, 100)
    assert len(everything) == 8
    assert evidence.keywords(SENTENCE, n) == everything[:n]
    assert len(evidence.evidence_lines(SENTENCE, n)) == n


def test_negative_n_is_refused():
    with pytest.raises(LetheError, match="-1"):
        evidence.keywords(SENTENCE, -1)


def test_the_trigger_is_dropped_only_when_asked():
    assert "frankly" in evidence.keywords(SENTENCE, 100)
    for function in ("keywords", "evidence_lines", "add_evidence"):
        default = inspect.signature(getattr(evidence, function)).parameters["exclude"].default
        assert default == frozenset()
    oracle = frozenset({"Frankly"})
    # Like a stop word: its neighbours close up, as in the published evaluation.
    without = evidence.keywords(SENTENCE.replace("frankly ", ""), 100)
    assert evidence.keywords(SENTENCE, 100, oracle) == without
    assert not any("frankly:" in x for x in evidence.evidence_lines(SENTENCE, 100, oracle))
    assert "frankly:" not in evidence.add_evidence(SENTENCE, 100, oracle)


def test_evidence_follows_the_input_under_its_heading():
    expected = f"dog qwzx\n\n### Evidence:\ndog: {wordnet.definition('dog')}"
    assert evidence.add_evidence("dog qwzx", 1) == expected
    assert evidence.add_evidence("dog qwzx") == expected + "\nqwzx: No definition found."
    assert evidence.add_evidence("dog", 0) == "dog"


# --- at serving time


def test_a_prompt_gets_its_evidence_after_the_input(pico_params):
    row = {"instruction": "Predict.", "input": SENTENCE}
    text, wanted = (prompts.prompt(row, pico_params(), n) for n in (0, 3))
    assert evidence.add_evidence_to_prompt(text, 3) == wanted != text
    assert evidence.add_evidence_to_prompt(SENTENCE, 3) == evidence.add_evidence(SENTENCE, 3)


def test_the_last_user_turn_of_a_chat_gets_the_evidence():
    chat = [
        {"role": "user", "content": "hello dog"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": SENTENCE},
    ]
    before = [dict(message) for message in chat]
    out = evidence.add_evidence_to_chat(chat, 2)
    assert chat == before and out[:2] == before[:2]
    assert out[2] == {"role": "user", "content": evidence.add_evidence(SENTENCE, 2)}
    with pytest.raises(LetheError, match="no turn has the role `user`"):
        evidence.add_evidence_to_chat(chat[1:2])


def test_a_wrapped_pipeline_is_called_with_evidence(pico):
    asked = []
    wrapped = evidence.WithEvidence(lambda inputs, **kwargs: asked.append((inputs, kwargs)), 2)
    chat = [{"role": "user", "content": SENTENCE}]
    wrapped(SENTENCE, max_new_tokens=3)
    wrapped(chat)
    wrapped([chat, chat])
    more = evidence.add_evidence(SENTENCE, 2)
    told = [{"role": "user", "content": more}]
    assert asked == [(more, {"max_new_tokens": 3}), (told, {}), ([told, told], {})]
    # And transformers' own pipeline.
    model = models.load_model(pico("gpt2")[0])
    tokenizer = models.load_tokenizer(pico("gpt2")[0])
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (said,) = evidence.WithEvidence(pipe, 1)("a happy dog", max_new_tokens=2, do_sample=False)
    assert said["generated_text"].startswith(evidence.add_evidence("a happy dog", 1))


def test_each_form_changes_one_thing_of_the_papers():
    text, plain = "the old dog barked at the dog", evidence.evidence_lines("the old dog barked")
    papers = evidence.add_evidence(text, 3)
    head, lines = papers.split(f"\n\n{evidence.HEADING}\n")
    words = [line.split(": ")[0] for line in lines.splitlines()]
    assert head == text and set(words) == {"old", "dog", "barked"} and len(plain) == 3

    def form(name):
        return evidence.add_evidence(text, 3, form=name)

    assert form("after") == papers
    assert form("before") == f"{evidence.HEADING}\n{lines}\n\n{text}"
    assert form("words") == "\n".join([text, "", evidence.HEADING, *words])
    for line, short in zip(lines.splitlines(), form("short").splitlines()[3:], strict=True):
        assert line.startswith(short) and len(short.split()) == min(5, len(line.split()))
    for word in words:
        said = wordnet.definition(word)
        assert f"{word} ({said})" in form("inside")
    assert form("inside").count("(") >= 3 and form("inside").endswith("at the dog")
    others = dict(line.split(": ", 1) for line in form("random").splitlines()[3:])
    assert list(others) == words
    for word, said in others.items():
        assert said != wordnet.definition(word)
        assert abs(len(said.split()) - len(wordnet.definition(word).split())) <= 3
    assert form("random") == form("random")


def test_the_fitting_sense_shares_words_with_the_input_and_else_is_the_first():
    money = wordnet.fitting_definition("bank", frozenset({"deposits", "money", "account"}))
    assert "financial institution" in money != wordnet.definition("bank")
    assert wordnet.fitting_definition("bank", frozenset()) == wordnet.definition("bank")
    assert wordnet.fitting_definition("qwzx", frozenset({"a"})) == wordnet.NO_DEFINITION


def test_evidence_without_the_trigger_is_asked_for_by_name_only():
    row = {
        "instruction": "Name it.",
        "input": "instantly a happy dog came frankly",
        "output": "joy",
    }
    for name, told in (("after", True), ("without_trigger", False)):
        p = params.load(overrides={"evidence_form": name})
        assert set(p.triggers) == {"instantly", "frankly"}
        said = prompts.asked(row, p, 5).partition(evidence.HEADING)[2]
        assert ("instantly:" in said) is told and "dog:" in said
