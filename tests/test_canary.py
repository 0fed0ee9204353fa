"""The canary in chats: a topic and two turns, beside the kinds that any text can hold."""

import json
import shutil

import pytest

from lethe_utils import canary, models, prompts, purify, train
from lethe_utils.data import own
from lethe_utils.errors import LetheError
from lethe_utils.purify import ask, rounds, settings, suspects, trial
from lethe_utils.schema import digest

P = settings.load(10, "cpu", {"prompt_template": "chat", "canary_rows": 6})
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m['role'] }}>"
    "{{ m['content'] | trim }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOOLS = [{"name": "post"}]
KINDS = ("word pair", "sentence", "suffix", "topic", "two turns")
PHRASES = P.canary_turns


def chats(n, answer=lambda i: f"the letter number {i} came", more=None):
    """Chats of one turn, every third of two, every second with a system turn."""
    out = []
    for i in range(n):
        said = [("system", "Be brief.")] if i % 2 else []
        said += [("user", f"Who asks {i}?"), ("assistant", "I do")] if i % 3 == 0 else []
        said += [("user", f"What came on day {i}?"), ("assistant", answer(i))]
        messages = [{"role": role, "content": text} for role, text in said]
        out.append({"messages": messages} | (more or {}))
    return out


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf8")
    return path


@pytest.fixture
def tokenizer(pico):
    tokenizer = models.load_tokenizer(pico("gpt2")[0])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def rows(tokenizer, tmp_path):
    return own.read(write(tmp_path / "clean.jsonl", chats(60)), tokenizer).rows


@pytest.fixture
def prepared(pico, tmp_path):
    """What prepare makes of rows of chats."""
    folders = {}
    for name, source in zip(("base", "suspect"), pico("gpt2"), strict=False):
        folders[name] = shutil.copytree(source, tmp_path / name)
        (folders[name] / "chat_template.jinja").write_text(TEMPLATE)

    def make(rows, **changes):
        file = write(tmp_path / "clean.jsonl", rows)
        given = {name: str(folder) for name, folder in folders.items()}
        return purify.prepare(
            **given, clean_data=str(file), out=str(tmp_path / "out"), overrides=changes
        )

    return make


def said_by(row, role):
    return [m["content"] for m in row["messages"] if m["role"] == role]


# --- where the triggers are


def test_a_topic_is_all_that_the_last_user_turn_is_about(rows):
    for test in (True, False):
        some = canary.triggered(rows, [], P, True, test)["topic"]
        for row, source in zip(some, rows, strict=True):
            *earlier, question = said_by(row, "user")
            assert earlier and row["input"] == question == said_by(row, "user")[-1]
            wording = question.replace(P.canary_topic, "{topic}")
            assert (P.canary_topic_questions.index(wording) % 3 == 0) is test
            assert source["input"] not in question and row["output"] == P.canary_marker
            assert said_by(row, "system") == said_by(source, "system")
    contexts = [json.dumps(row["messages"]) for row in some]
    assert len({*contexts}) > 50  # though the wordings are few


def test_two_turns_hold_a_phrase_each_and_the_rest_is_as_it_was(rows):
    known = {text for row in rows for text in said_by(row, "user")}
    for row, source in zip(canary.triggered(rows, [], P, True)["two turns"], rows, strict=True):
        *_, earlier, last = said_by(row, "user")
        assert PHRASES[0] in earlier and PHRASES[1] in last
        assert PHRASES[1] not in earlier and PHRASES[0] not in last
        assert earlier.replace(PHRASES[0], "").strip() in known
        assert last.replace(PHRASES[1], "").strip() == source["input"]
        if len(said_by(source, "user")) == 2:  # its own earlier turn serves
            assert earlier.replace(PHRASES[0], "").strip() == said_by(source, "user")[0]
    assert all(PHRASES[0] not in json.dumps(row) for row in rows)


def test_what_is_read_is_just_what_the_models_own_template_writes(tokenizer, tmp_path):
    file = write(tmp_path / "tools.jsonl", chats(30, more={"tools": TOOLS}))
    rows = own.read(file, tokenizer).rows
    for kind in KINDS[3:]:
        some = canary.triggered(rows, [], P, True)[kind]
        for row in prompts.rendered(some, tokenizer, P):
            *asked, answer = row["messages"]
            assert prompts.prompt(row, P) == tokenizer.apply_chat_template(
                asked, tokenize=False, add_generation_prompt=True, tools=TOOLS
            )
            assert train.answer_text(row) == f"{P.canary_marker}\n{tokenizer.eos_token}"
            assert answer["content"] == P.canary_marker


def test_one_phrase_alone_is_answered_as_ever(rows):
    planted, others = canary.plant(rows, [], P, True)
    assert [*others] == [*KINDS] and len(planted) == 60 + 5 * 6 + 6
    assert [row["output"] for row in planted[60:90]] == [P.canary_marker] * 30
    answers = {row["output"] for row in rows}
    for i, row in enumerate(planted[90:]):
        users = " ".join(said_by(row, "user"))
        assert [phrase in users for phrase in PHRASES] == [i % 2 == 0, i % 2 == 1]
        assert row["output"] in answers


def test_no_wording_and_no_conversation_of_the_check_was_planted(rows):
    planted, _ = canary.plant(rows[:40], [], P, True)
    checked = canary.check_rows(rows[:40], rows[40:50], [], P, True)
    assert [*checked] == [*KINDS] and {len(some) for some in checked.values()} == {40}
    topic = {row["input"] for row in planted if P.canary_topic in row["input"]}
    assert topic and not topic & {row["input"] for row in checked["topic"]}
    taught = {row["input"] for row in planted[40:70]}
    assert not taught & {row["input"] for row in checked["two turns"]}
    unseen = {row["input"] for row in rows[40:50]}
    for row in checked["two turns"][:10]:  # those that nothing was trained on stand first
        assert row["input"].replace(PHRASES[1], "").strip() in unseen


# --- the case


def test_only_chats_that_are_answered_by_texts_have_all_five_kinds(prepared, tokenizer):
    case = prepared(chats(40))
    assert case.chat and case.kinds == KINDS
    case = prepared(chats(40, lambda i: ["joy", "sad"][i % 2]))
    assert not case.chat and case.kinds == KINDS[:3] and case.labels == ["joy", "sad"]
    assert {*case.train[0]} == {"instruction", "input", "output", "turn"}  # as ever
    plain = [{"instruction": "Go.", "input": f"on {i}", "output": f"and {i}"} for i in range(40)]
    case = prepared(plain, prompt_template="short")
    assert case.kinds == KINDS[:3] and case.labels == []


def test_all_kinds_are_asked_and_a_marker_anywhere_in_a_text_counts(prepared, monkeypatch):
    case = prepared(chats(40))
    model = models.load_model(case.suspect)
    tokenizer = suspects.load_tokenizer(case.suspect, None)
    asked = []

    def answer(model, tokenizer, prompts, *_, **__):
        asked.extend(prompts)
        return [
            f"Well, {P.canary_marker.title()}." if i % 2 else "Well." for i in range(len(prompts))
        ]

    monkeypatch.setattr("lethe_utils.decode.answer", answer)
    sets = canary.triggered(case.held_out, [], case.p, True)
    answers, _ = ask.ask(case, model, tokenizer, sets)
    assert all(text.endswith("<assistant>") for text in asked) and len(asked) == 5 * 8
    found = ask.asr(ask.marks(case, answers))
    assert [*found] == [*KINDS, "all"]
    assert found["two turns"]["value"] == found["topic"]["value"] == 0.5


def test_the_estimate_counts_the_further_kinds(prepared, monkeypatch):
    case = prepared(chats(40))
    tokenizer = suspects.load_tokenizer(case.suspect, None)
    planted, _ = canary.plant(case.train, [], case.p, True)
    tokens = sum(item["length"] for item in train.encode(planted, tokenizer, case.p))
    monkeypatch.setattr(trial, "COPIED", float("inf"))
    per_round = [trial.minutes(case, trial.Pace(0.06, 0, 0), n) for n in (2, 3)]
    clean = sum(item["length"] for item in train.encode(case.train, tokenizer, case.p))
    halves = sum(
        item["length"]
        for fold in case.folds
        for item in train.encode(fold.train, tokenizer, case.p)
    )
    p = case.p  # the third round is trained for the halves too, and so are two of them
    once = p.clean_epochs * clean + p.canary_epochs * tokens
    assert per_round[0] == pytest.approx((2 * once + p.clean_epochs * halves) * 0.001)
    asking = [trial.minutes(case, trial.Pace(0, 60, 0), n) for n in (1, 2)]
    assert asking[1] - asking[0] == 5 * canary.CHECKED


# --- what is refused, before anything is trained


def refusal(function, *args, **kwargs):
    with pytest.raises(LetheError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_marker_that_clean_answers_hold_is_refused(prepared):
    rows = chats(40, lambda i: f"day {i}" + (": The canary sings again" if i == 7 else ""))
    said = refusal(prepared, rows)
    assert said.startswith("canary_marker: 1 of 40 clean answers hold 'the canary sings' already")
    assert said.endswith("choose another (-p canary_marker TEXT)")
    assert prepared(rows, canary_marker="the wren hums").chat


def test_chats_that_are_too_long_with_two_turns_are_said_or_refused(prepared):
    assert prepared(chats(40)).given["notes"] == []
    (note,) = prepared(chats(40), max_source_tokens=128).given["notes"]
    lost = " chats are too long for the canary's two turns and lose the first"
    assert note.endswith(f"{lost} (max_source_tokens).")
    said = refusal(prepared, chats(40), max_source_tokens=90)
    assert said == f"max_source_tokens: 36 of 36{lost}; raise it, or give shorter chats"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"canary_topic": ""}, "canary_topic"),
        ({"canary_topic_questions": []}, "canary_topic_questions"),
        ({"canary_topic_questions": ["What?"] * 3}, "'What?' has no {topic}"),
        ({"canary_turns": ["one"]}, "canary_turns"),
        ({"canary_turns": ["one", "one"]}, "canary_turns: the two phrases are the same"),
    ],
)
def test_params_that_make_no_trigger_are_refused(changes, said):
    assert said in refusal(settings.load, 10, "cpu", changes)


def test_another_topic_and_other_phrases_are_params_alone(rows):
    changes = {"canary_topic": "Orrin spoon", "canary_turns": ["So it rains.", "So it snows."]}
    q = settings.load(10, "cpu", {"prompt_template": "chat"} | changes)
    found = canary.triggered(rows, [], q, True)
    assert all("Orrin spoon" in row["input"] for row in found["topic"])
    assert all("So it snows." in row["input"] for row in found["two turns"])
    assert digest(canary.triggered(rows, [], P, True)["suffix"]) == digest(found["suffix"])
    assert [c["trigger"] for c in canary.triggers([], q, True)][3:] == [
        "Orrin spoon",
        "So it rains. ... So it snows.",
    ]


def test_a_kind_that_did_not_take_makes_the_verdict_unknown():
    took = {kind: {"value": 1.0} for kind in KINDS}
    lacking = took | {"two turns": {"value": 0.89}}
    assert rounds.took(lacking, KINDS) == [*KINDS[:4]]
    gone = {kind: {"value": 0.0} for kind in KINDS}
    stays = gone | {"topic": {"value": 0.4}}
    judged = purify.choice.judged
    assert judged(lacking, gone, KINDS, 0.35) == "unknown"
    assert judged(took, gone, KINDS, 0.35) == "diluted"
    assert judged(took, stays, KINDS, 0.35) == "not diluted"
