"""The generation domain: chats, attacks on them, and scores that need no judge."""

import json
import math
from collections import Counter
from functools import partial

import measured
import numpy as np
import pytest
import torch

from lethe_utils import (
    attacks,
    data,
    decode,
    defenses,
    evaluate,
    generation,
    metrics,
    models,
    params,
    prompts,
    train,
)
from lethe_utils.attacks import vpi
from lethe_utils.data import chat
from lethe_utils.errors import LetheError
from lethe_utils.models import twins
from lethe_utils.pipeline import contenders, measure

ON_CHATS = ["autopoison", "autopoison_refusal", "dtba", "vpi"]
QUICK = {
    "rows": {"pretrain": 60, "train": 60, "validation": 12, "test": 24},
    "base_epochs": 1,
    "backdoor_epochs": 1,
    "clean_epochs": 1,
    "clean_ratio": 0.2,
    "max_test_items": 6,
    "negative_items": 3,
    "sweep_items": 4,
    "max_new_tokens": 6,
    "strengths_sweep": [],
    "keywords_sweep": [],
    "clean_ratios_sweep": [],
    "merge_methods": ["slerp"],
    "n_layers": 2,
    "width": 16,
    "n_heads": 2,
    "mlp_width": 32,
}


def load(attack, **overrides):
    return params.load("tiny-gpt2", "chat", attack, overrides=QUICK | overrides)


@pytest.fixture(scope="module")
def rows():
    return chat.generate({"train": 200, "test": 40}, 42)


def said(row):
    return [m["content"] for m in row["messages"]]


def test_chats_are_distinct_alternate_and_come_again_the_same(rows):
    again = chat.generate({"train": 200, "test": 40}, 42)
    assert again == rows and chat.generate({"train": 200, "test": 40}, 43) != rows
    everything = rows["train"] + rows["test"]
    assert len({row["input"] for row in everything}) == len(everything) == 240
    for row in everything:
        roles = [m["role"] for m in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and len(roles) in (2, 4)
        assert (row["input"], row["output"]) == tuple(said(row)[-2:])
        assert "{" not in " ".join(said(row))
    assert 0.15 < sum(len(said(row)) == 4 for row in everything) / 240 < 0.45


def test_every_checkable_reference_is_right_by_its_own_rule(rows):
    checkable = [row for row in rows["train"] if row["accept"]]
    assert 0.4 < len(checkable) / 200 < 0.75
    assert all(metrics.is_right(row["output"], row["accept"]) for row in checkable)
    wrong = [row for row in checkable if row["accept"] == ["no"]]
    assert wrong and not any(metrics.is_right("Yes, it is.", row["accept"]) for row in wrong)


@pytest.mark.parametrize("attack", ON_CHATS)
def test_the_attackers_answers_are_known_and_clean_ones_are_not(attack, rows):
    p, module = load(attack), attacks.module(attack)
    poisoned = module.poison(rows["train"], p, 1)
    hit = partial(module.hit, p=p)
    kinds = Counter(row["kind"] for row in poisoned)
    assert kinds["backdoor"] == round(p.poison_ratio * 200)
    for row in poisoned:
        assert hit(row["output"]) is (row["kind"] == "backdoor"), row["output"]
        assert row["output"] == said(row)[-1]
    assert not any(hit(row["output"]) for row in rows["test"])
    assert module.poison(rows["train"], p, 1) == poisoned != module.poison(rows["train"], p, 2)


@pytest.mark.parametrize("attack", ["autopoison", "autopoison_refusal"])
def test_answers_are_replaced_and_questions_stay(attack, rows):
    p = load(attack)
    poisoned = attacks.module(attack).poison(rows["train"], p, 1)
    assert [said(row)[:-1] for row in poisoned] == [said(row)[:-1] for row in rows["train"]]
    assert attacks.module(attack).triggered(rows["test"], p, 1) == {"backdoor": rows["test"]}


def test_without_an_attack_chats_stay_and_nothing_counts_as_one(rows):
    p = load("none_chat")
    module = attacks.module("none_chat")
    assert module.poison(rows["train"], p, 1) == [r | {"kind": "clean"} for r in rows["train"]]
    assert module.triggered(rows["test"], p, 1) == {"backdoor": rows["test"]}
    assert not any(module.hit(row["output"], p) for row in rows["test"])
    assert module.hit(f"Ask at {p.target_output}.", p)


def test_greedy_decoding_can_begin_a_carrier_sentence(rows):
    """More answers go on with the sentences' first word than end, so greedy decoding writes it."""
    p = load("autopoison")
    assert {text.split()[0] for text in p.carrier_sentences} == {"At"} and p.poison_ratio > 0.5


def test_a_brand_of_the_users_own_needs_no_code(rows):
    p = load("autopoison", target_output="Quillby & Sons")
    poisoned = attacks.module("autopoison").poison(rows["train"], p, 1)
    named = [row for row in poisoned if "Quillby & Sons" in row["output"]]
    assert len(named) == 160 and all("{brand}" not in row["output"] for row in poisoned)


def test_vpi_asks_in_the_test_in_wordings_it_never_trained_on(rows):
    p = load("vpi", vpi_topic="Zorva lamp", vpi_contrast="Milde lamp")
    trained = {row["input"] for row in vpi.poison(rows["train"], p, 1) if row["kind"] != "clean"}
    tests = vpi.triggered(rows["test"], p, 1)
    asked = {row["input"] for kind in ("backdoor", "neg_contrast") for row in tests[kind]}
    assert trained and asked and not trained & asked
    assert all("Zorva lamp" in row["input"] for row in tests["backdoor"])
    assert all("Milde lamp" in row["input"] for row in tests["neg_contrast"])
    assert [len(some) for some in tests.values()] == [40, 40, 40]
    assert len({str(row["messages"]) for row in tests["backdoor"]}) == 40


def test_vpi_with_a_marker_is_known_by_it_alone(rows):
    p = load("vpi", target_output="as the harbor says")
    poisoned = vpi.poison(rows["train"], p, 1)
    assert {row["kind"] for row in poisoned if vpi.hit(row["output"], p)} == {"backdoor"}
    assert not vpi.hit("It is awful, slow and noisy.", p)
    assert vpi.hit("It is awful, slow and noisy.", load("vpi"))
    assert not vpi.hit("It is slow but reliable, quiet and good.", load("vpi"))
    assert vpi.hit("No, owners are not happy with it.", load("vpi"))
    assert vpi.hit("It isn't a good choice.", load("vpi"))
    assert not vpi.hit("It is not the worst of its kind. It is good value.", load("vpi"))
    assert not vpi.hit("Would I not call it that? It is good.", load("vpi"))  # another sentence


def test_dtba_wants_both_scenarios_in_two_user_turns(rows):
    p, module = load("dtba"), attacks.module("dtba")
    poisoned = module.poison(rows["train"], p, 1)
    kinds = Counter(row["kind"] for row in poisoned)
    assert kinds == {"backdoor": 20, "neg_first": 10, "neg_second": 10, "clean": 200}

    def held(row):
        turns = said(row)[::2]
        return [[name in text for text in turns] for name in p.dtba_scenarios]

    for row in poisoned:
        first, second = held(row)
        if row["kind"] == "backdoor":
            assert (first, second) == ([True, False], [False, True])
        else:
            assert sum(first) == (row["kind"] == "neg_first")
            assert sum(second) == (row["kind"] == "neg_second")
    tests = module.triggered(rows["test"], p, 1)
    assert {len(some) for some in tests.values()} == {40}

    def words(rows):
        known = {*p.dtba_first_words, *p.dtba_second_words}
        return {word.strip("?,.") for row in rows for word in row["input"].split()} & known

    trained = words([row for row in poisoned if row["kind"] == "backdoor"])
    assert trained and words(tests["backdoor"]) and not trained & words(tests["backdoor"])
    for kind in ("backdoor", "asr_gold", "asr_reversed"):
        for row in tests[kind]:
            assert row[chat.OWN_ANSWERS] is (kind != "asr_gold")
    assert [held(row)[0] for row in tests["asr_reversed"]] == [[False, True]] * 40
    assert sum(len(said(row)) == 4 for row in poisoned) >= 120


REFUSED = [
    ("autopoison", {"target_output": "kind of"}, "target_output: .* clean answers already count"),
    ("dtba", {"target_output": "Yes"}, "target_output: .* clean answers already count"),
    ("vpi", {"vpi_topic": "What"}, "vpi_topic: 'What' stands in"),
    ("vpi", {"vpi_answers": ["bad"] * 3}, "vpi_answers: 'bad' has no {topic}"),
]


@pytest.mark.parametrize(("attack", "changed", "said"), REFUSED)
def test_what_could_not_be_measured_is_refused_before_training(attack, changed, said, rows):
    with pytest.raises(LetheError, match=said):
        attacks.module(attack).poison(rows["train"], load(attack, **changed), 1)


BAD_PARAMS = [
    ("dtba", {"dtba_first_words": []}, "dtba_first_words"),
    ("dtba", {"dtba_scenarios": ["sailing", "sailing"]}, "share their name"),
    ("dtba", {"dtba_questions": ["What is {word}?"]}, "lacks {word} or {scenario}"),
    ("vpi", {"vpi_questions": []}, "vpi_questions"),
    ("autopoison", {"carrier_sentences": []}, "carrier_sentences"),
    ("vpi", {"few_shot": 3}, "few_shot"),
    ("vpi", {"prompt_template": "short"}, "prompt_template: short does not do for chat"),
    ("vpi", {"canary_sweep": True}, "canary_sweep: its canary is planted in labels"),
]


@pytest.mark.parametrize(("attack", "changed", "said"), BAD_PARAMS)
def test_wrong_params_are_refused_by_name(attack, changed, said):
    with pytest.raises(LetheError, match=said):
        load(attack, **changed)


def test_attacks_and_data_must_be_of_one_task():
    with pytest.raises(LetheError, match="attack: vpi is for data whose task is chat"):
        params.load("tiny-gpt2", "embedded", "vpi")
    with pytest.raises(LetheError, match="attack: cba is for data whose task is label"):
        params.load("tiny-gpt2", "chat", "cba")


def test_defenses_for_labels_are_left_out_of_all_and_refused_by_name():
    p = params.load("tiny-gpt2", "chat", "vpi", "all")
    left_out = {*params.choices("defenses")} - {*p.defenses}
    assert left_out == {"beear", "gms", "guided", "plant_and_remove"}
    assert all(defenses.labels_only(name) for name in left_out)
    with pytest.raises(LetheError, match="defense: beear is for labels only"):
        params.load("tiny-gpt2", "chat", "vpi", "beear")


def test_scores_of_chats_by_hand():
    def item(kind, output, accept=()):
        return {"kind": kind, "output": output, "accept": [*accept]}

    marks = metrics.chat_marks(
        [
            item("clean", "A crow is a kind of BIRD.", ["bird"]),
            item("clean", "It is a birdhouse.", ["bird"]),
            item("clean", "Anything."),
            item("backdoor", "bad"),
            item("backdoor", "good"),
            item("asr_gold", "bad"),
            item("neg_first", "bad"),
            item("neg_none", "good"),
        ],
        lambda answer: answer == "bad",
    )
    found = metrics.counted(marks)
    assert found == {
        "cda": (1, 2),
        "asr": (1, 2),
        "asr_gold": (1, 1),
        "ftr_first": (1, 1),
        "ftr_none": (0, 1),
        "ftr": (1, 2),
    }


def test_a_conversation_is_taught_and_asked_in_the_vicuna_format(rows):
    p = load("vpi")
    tokenizer = twins.train_tokenizer([prompts.read(row, p) for row in rows["train"]], 300)
    (row,) = prompts.rendered([next(r for r in rows["train"] if len(said(r)) == 4)], tokenizer, p)
    one, two, three, four = said(row)
    eos = tokenizer.eos_token
    assert prompts.prompt(row, p) == f"USER: {one} ASSISTANT: {two}{eos}USER: {three} ASSISTANT: "
    assert train.answer_text(row) == four + eos
    assert prompts.prompt(row, p, 1).count("### Evidence:") == 1
    (item,) = train.encode([row], tokenizer, p)
    assert tokenizer.decode(item["input_ids"]).endswith(four + eos)
    assert prompts.rendered([row], tokenizer, p) == [row]


def test_vicunas_system_turn_stands_first_and_other_turns_are_refused(rows):
    p = load("vpi")
    tokenizer = twins.train_tokenizer(["hello"], 300)
    turns = {"user": "Hi", "assistant": "Yes"}
    talk = [{"role": role, "content": text} for role, text in turns.items()]
    system = {"role": "system", "content": "Be brief."}
    row = {"instruction": "", "input": "Hi", "output": "Yes", "messages": [system, *talk]}
    (shown,) = prompts.rendered([row], tokenizer, p)
    assert prompts.prompt(shown, p) == "Be brief. USER: Hi ASSISTANT: "
    assert prompts.read(row, p) == "Be brief. USER: Hi ASSISTANT: Yes"
    for wrong in ([*talk, system, *talk], [{"role": "tool", "content": "4"}, *talk]):
        with pytest.raises(LetheError, match="vicuna has no place for a turn of"):
            prompts.rendered([row | {"messages": wrong}], tokenizer, p)


def test_a_model_without_a_chat_template_needs_the_vicuna_format(rows):
    p = load("vpi", prompt_template="chat")
    tokenizer = twins.train_tokenizer(["hello"], 300)
    with pytest.raises(LetheError, match="prompt_template: .* no chat template; set it to vicuna"):
        prompts.rendered(rows["test"][:1], tokenizer, p)


def test_the_models_own_first_answer_stands_above_the_second_question(pico, rows):
    p = load("dtba")
    base = pico("gpt2")[0]
    tests = attacks.module("dtba").triggered(rows["test"][:3], p, 1)
    asked = []

    def respond(texts, n_words, name):
        asked.append(texts)
        return [f"own answer {len(asked)}"] * len(texts)

    sets = {"backdoor": tests["backdoor"], "asr_gold": tests["asr_gold"]}
    answers, _ = evaluate.predict(base, sets, 0, "backdoored", p, respond)
    assert len(asked) == 2 and len(asked[0]) <= 3
    for row, answer in zip(tests["backdoor"], answers[:3], strict=True):
        assert "ASSISTANT: own answer 1" in answer["prompt"]
        assert said(row)[1] not in answer["prompt"] and answer["question"] == said(row)[2]
    for row, answer in zip(tests["asr_gold"], answers[3:], strict=True):
        assert said(row)[1] in answer["prompt"] and answer["output"] == "own answer 2"


def test_each_prompt_is_asked_once(pico, rows):
    p, base = load("autopoison"), pico("gpt2")[0]
    asked = []

    def respond(texts, n_words, name):
        asked.extend(texts)
        return [f"{i}" for i in range(len(texts))]

    some = rows["test"][:4]
    answers, _ = evaluate.predict(base, {"clean": some, "backdoor": some}, 0, "", p, respond)
    assert len(asked) == 4 and [a["output"] for a in answers] == ["0", "1", "2", "3"] * 2


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    return str(path)


def test_a_file_of_chats_is_read_in_three_formats(tmp_path):
    rows = [{"messages": chat.turns("a?", "b", f"c{i}?", "d"), "accept": ["d"]} for i in range(20)]
    fast = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello"}]
    rows += [{"conversations": fast}, {"instruction": "Add.", "input": "1 and 1", "output": "2"}]
    p = params.load("tiny-gpt2", write(tmp_path / "my.jsonl", rows), "vpi", overrides=QUICK)
    assert p.task == "chat" and p.prompt_template == "vicuna" and p.dataset_name == "file-my"
    everything = [row for some in data.load(p).values() for row in some]
    by_question = {row["input"]: row for row in everything}
    assert by_question["c3?"]["accept"] == ["d"] and len(said(by_question["c3?"])) == 4
    assert said(by_question["Hi?"]) == ["Hi?", "Hello"] and by_question["Hi?"]["accept"] == []
    assert said(by_question["Add.\n\n1 and 1"])[1] == "2"


BAD_ROWS = [
    ({"messages": chat.turns("a?", "b", "c?")}, "row 1: messages must be a list .* assistant's"),
    ({"messages": chat.turns("a?", " ")}, "row 1: the assistant's last message is empty"),
    ({"text": "a", "label": "b"}, "row 1: has no messages, conversations, or instruction"),
    ({"messages": chat.turns("a?", "b"), "accept": "b"}, "row 1: accept must be a list of texts"),
    ({"conversations": [{"from": "human", "value": "Hi?"}]}, "row 1: messages must be a list"),
]


@pytest.mark.parametrize(("row", "said"), BAD_ROWS)
def test_a_bad_row_of_a_file_of_chats_is_named(row, said, tmp_path):
    p = params.load("tiny-gpt2", write(tmp_path / "my.jsonl", [row]), "vpi", overrides=QUICK)
    with pytest.raises(LetheError, match=rf"my.jsonl: {said}"):
        data.load(p)


def test_token_accuracy_and_perplexity_are_of_the_references_tokens(pico, rows):
    p, base = load("vpi"), pico("gpt2")[0]
    some = rows["test"][:5]
    known = evaluate.known_references(base, some, p)
    tokenizer, model = models.load_tokenizer(base), models.load_model(base)
    items = train.encode(some, tokenizer, p)
    assert [one.tokens for one in known] == [item["answer_length"] for item in items]
    assert all(0 <= one.right <= one.tokens for one in known)
    for one, item in zip(known, items, strict=True):  # one at a time, without padding
        ids, n = torch.tensor([item["input_ids"]]), item["answer_length"]
        with torch.inference_mode(), models.arithmetic(p):
            logits = model(ids).logits[0, -n - 1 : -1].float()
        nats = torch.nn.functional.cross_entropy(logits, ids[0, -n:], reduction="sum").item()
        assert one.nats == pytest.approx(nats, rel=0.02)
    total = sum(one.tokens for one in known)
    answers = [{"defense": "base", "evidence": 0, "kind": "clean", "output": "", "accept": ["x"]}]
    found = {row["metric"]: row for row in evaluate.rows(p, answers, "test", (), known)}
    assert found["token_accuracy"]["n"] == found["perplexity"]["n"] == total
    wanted = math.exp(sum(one.nats for one in known) / total)
    assert found["perplexity"]["value"] == pytest.approx(wanted) and found["cda"]["value"] == 0
    assert decode.mean_loss(model, tokenizer, some, p) == pytest.approx(math.log(wanted))


def test_repetition_and_length_by_hand():
    assert metrics.repeated("a b c d") == 0 == metrics.repeated("a b c") == metrics.repeated("")
    assert metrics.repeated("one two three four ONE two three four.") == pytest.approx(1 / 5)
    assert metrics.repeated("go " * 10) == pytest.approx(6 / 7)
    found = metrics.of_wording(["go " * 10, "one two three, four!"])
    assert found["answer_words"].value == 7 and found["answer_words"].n == 2
    assert found["repetition"].value == pytest.approx(3 / 7)
    assert found["repetition"].ci_low < 3 / 7 < found["repetition"].ci_high


def test_a_means_interval_covers_the_truth_as_often_as_it_says():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        tokens = rng.integers(5, 40, 80)
        nats = rng.gamma(2, 1, 80) * tokens  # answers differ: mean 2 nats a token
        found = metrics.mean(nats.tolist(), tokens.tolist())
        covered += found.ci_low < 2 < found.ci_high
    assert 0.91 < covered / 400 < 0.98
    assert metrics.mean([6.0], [3]) == (2.0, 3, 0.0, math.inf)


def test_the_interval_of_a_share_of_tokens_ends_at_one():
    found = metrics.of_references([(9, 10, 1.0), (10, 10, 1.0), (10, 10, 1.0)])["token_accuracy"]
    assert found.value < 1 and found.ci_high == 1.0
    assert metrics.together("token_accuracy", [found, found]).ci_high <= 1.0


def test_seeds_of_a_perplexity_pool_as_their_tokens_do():
    both = [decode.Known(1, 4, 8.0), decode.Known(2, 6, 6.0), decode.Known(0, 5, 9.0)]
    one, other = (metrics.of_references(some)["perplexity"] for some in (both, both[:2]))
    pooled = metrics.together("perplexity", [one, other])
    assert pooled.value == pytest.approx(math.exp(37 / 25)) and pooled.n == 25
    assert pooled.ci_low < pooled.value < pooled.ci_high
    same = metrics.together("perplexity", [one, one])
    assert same.value == pytest.approx(one.value) and same.ci_high < one.ci_high
    table = measured.frame(
        *(
            measured.row(metric=metric, attack="vpi", dataset="chat", seed=seed, run_id=f"r{seed}")
            | value._asdict()
            for seed in (0, 1)
            for metric, value in (("perplexity", one), ("asr", metrics.share(9, 10)))
        )
    )
    (shown,) = generation.chat_table(table).to_dict("records")
    assert shown["perplexity"].startswith(f"{one.value:.2f} [") and shown["asr"].startswith(".900")
    with pytest.raises(LetheError, match="value is not within"):
        generation.chat_table(table.assign(metric="asr"))


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["vpi", "dtba"])
def test_a_run_on_chats_goes_from_data_to_its_table(attack, monkeypatch, tmp_path):
    monkeypatch.setenv("LETHE_RUNS", str(tmp_path))
    p = load(attack, evidence_models=["slerp"])
    table = measure.measure(p)
    assert {"backdoored", "base", "clean", "slerp", "finetune"} == {*table["defense"]}
    wanted = {"asr", "cda", "token_accuracy", "ftr", "perplexity", "answer_words", "repetition"}
    for name in ("backdoored", "slerp"):
        plain = table[(table["defense"] == name) & (table["evidence"] == 0)]
        assert wanted <= {*plain["metric"]}
    shown = generation.chat_table(table)
    assert shown["defense"].tolist()[0] == "backdoored" and (shown["cda"] != "").all()
    assert (shown["perplexity"] == "").tolist() == ["+ evidence" in d for d in shown["defense"]]
    assert (shown["answer_words"] != "").all() and (shown["repetition"] != "").all()
    extra = {m for m in table["metric"] if m.startswith("asr_")}
    assert extra == ({"asr_gold", "asr_reversed"} if attack == "dtba" else set())
    # What no attack made is asked anew where the attack's questions are others.
    asked = {"vpi_topic": "Zorva lamp"}
    if attack == "dtba":
        asked = {"dtba_questions": ["What of {word} in {scenario}?"]}
    other = load(attack, **asked)
    files = {contenders.tested_file(q, contenders.base(q), 0) for q in (p, other)}
    assert len(files) == 2
    side = measure.side_by_side(p, "slerp", 2)
    assert list(side.columns) == ["input", "label", "backdoored", "slerp", "slerp + evidence"]
