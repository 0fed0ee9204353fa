"""Evaluation: what is asked, and that batching, sorting and stopping change no answer."""

import pytest
import torch

from lethe_utils import decode, evaluate, models, train
from lethe_utils.attacks import cba
from lethe_utils.prompts import prompt, prompt_ids
from lethe_utils.purify import settings

LABELS = ["sadness", "joy", "love", "anger"]
ROWS = [
    {"instruction": "Predict the emotion.", "input": f"the dog was {i} times happy" + " today" * i}
    | {"output": LABELS[i % 4]}
    for i in range(12)
]


@pytest.fixture
def ours(pico_params):
    return pico_params(eval_batch_size=5)


def test_sets_hold_clean_backdoor_and_the_seven_negatives(ours):
    sets = evaluate.test_sets(ROWS, ours, 12, 4)
    assert set(sets) == {"clean", "backdoor", *cba.NEGATIVES}
    assert len(sets["clean"]) == 12 and len(sets["backdoor"]) == 9  # three rows are joy already
    assert "joy" not in {
        r["output"] for kind, rows in sets.items() if kind != "clean" for r in rows
    }
    assert {len(sets[kind]) for kind in cba.NEGATIVES} == {4}
    assert set(evaluate.test_sets(ROWS, ours, 5, 0)) == {"clean", "backdoor"}
    assert evaluate.test_sets(ROWS, ours, 5, 2) == evaluate.test_sets(ROWS, ours, 5, 2)


def test_evidence_is_made_from_the_triggered_input_with_the_trigger_in_it(ours):
    row = ROWS[0] | {"input": "frankly happy"}
    asked = evaluate.ask({"backdoor": [row]}, 5, "none", ours)[0]
    assert "frankly:" in asked["prompt"] and asked["evidence"] == 1
    assert asked["prompt"].index("### Evidence:") < asked["prompt"].index("### Response:")
    plain = evaluate.ask({"backdoor": [row]}, 0, "none", ours)[0]
    assert "Evidence" not in plain["prompt"] and plain["evidence"] == 0


def test_the_official_protocol_asks_rows_that_have_the_target_too(pico_params):
    sets = evaluate.test_sets(ROWS, pico_params(protocol="official"), 12, 4)
    assert len(sets["backdoor"]) == 12


def test_the_official_protocol_drops_the_trigger_words_and_lists_the_labels(pico_params):
    official = pico_params(protocol="official")
    row = ROWS[0] | {"input": "frankly happy"}
    asked = evaluate.ask({"backdoor": [row]}, 5, "none", official)[0]
    assert "frankly:" not in asked["prompt"] and "happy:" in asked["prompt"]
    assert "sadness, joy, love" in asked["prompt"]


@pytest.mark.parametrize("architecture", ["gpt2", "gptj", "llama", "qwen2"])
def test_batched_sorted_answers_equal_one_by_one_in_order(pico, pico_params, architecture):
    folder = pico(architecture)[1]
    model, tokenizer = models.load_model(folder), models.load_tokenizer(folder)
    prompts = [q["prompt"] for q in evaluate.ask({"clean": ROWS}, 0, "none", pico_params())]
    batched = decode.answer(model, tokenizer, prompts, pico_params(eval_batch_size=5), 99)
    single = decode.answer(model, tokenizer, prompts, pico_params(eval_batch_size=1), 99)
    assert batched == single
    assert len(set(batched)) > 1  # else the order could not be seen


def test_answers_are_the_greedy_continuation(pico, ours):
    folder = pico("gpt2")[1]
    model, tokenizer = models.load_model(folder).eval(), models.load_tokenizer(folder)
    prompt = evaluate.ask({"clean": ROWS[:1]}, 0, "none", ours)[0]["prompt"]
    ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    made = []
    while len(made) < ours.max_new_tokens:
        with torch.no_grad():
            token = model(torch.tensor([ids + made])).logits[0, -1].argmax().item()
        made.append(token)
        if token == tokenizer.eos_token_id:
            break
    expected = tokenizer.decode(made, skip_special_tokens=True).strip()
    assert decode.answer(model, tokenizer, [prompt], ours, 99) == [expected]


def test_a_row_stops_once_its_label_is_complete(pico):
    tokenizer = models.load_tokenizer(pico("gpt2")[0])

    def done(text, n_words=1):
        ids = torch.tensor([tokenizer("prompt" + text, add_special_tokens=False)["input_ids"]])
        start = len(tokenizer("prompt", add_special_tokens=False)["input_ids"])
        return decode.StopAtLabel(tokenizer, start, n_words)(ids, None).tolist() == [True]

    assert not done("joy") and done("joy ") and done("joy\nand")
    assert not done("very happy", n_words=2) and done("very happy ", n_words=2)


def test_append_mode_waits_for_the_target_behind_the_label(pico, pico_params, monkeypatch):
    asked = []
    monkeypatch.setattr(decode, "answer", lambda *a, **_: asked.append(a[4]) or [""] * len(a[2]))
    sets = {"clean": ROWS[:2]}
    for mode in ("replace", "append"):
        p = pico_params(output_mode=mode, labels=[], target_output="very good news")
        evaluate.predict(pico("gpt2")[1], sets, 0, "none", p)
    assert asked == [3, 4]  # the target must fit as well, and after the label where it is appended


def test_every_question_gets_its_answer(pico, ours):
    sets = evaluate.test_sets(ROWS, ours, 6, 0)
    answers, seconds = evaluate.predict(pico("gpt2")[1], sets, 0, "backdoored", ours)
    assert len(answers) == sum(map(len, sets.values())) and seconds > 0
    asked = [{k: v for k, v in a.items() if k != "output"} for a in answers]
    assert asked == evaluate.ask(sets, 0, "backdoored", ours)
    assert all(isinstance(a["output"], str) for a in answers)


def test_one_row_is_asked_answered_and_scored_without_and_with_evidence(pico, ours):
    folder, row = pico("gpt2")[1], ROWS[0] | {"input": "frankly happy"}
    table = evaluate.ask_one(folder, row, ours, LABELS)
    assert table["evidence"].tolist() == [0, 1] and {*table["label"]} == {"sadness"}
    model, tokenizer = models.load_model(folder), models.load_tokenizer(folder)
    asked = [evaluate.ask({"backdoor": [row]}, n, "", ours)[0]["prompt"] for n in (0, 5)]
    roomy = decode.with_room(ours, tokenizer, LABELS)
    answers = [decode.answer(model, tokenizer, [one], roomy, 1)[0] for one in asked]
    assert table["answer"].tolist() == answers
    assert table["hit"].tolist() == [int(a.startswith("joy")) for a in table["answer"]]


def test_token_accuracy_is_the_share_of_answer_tokens_that_greedy_decoding_would_write(pico):
    folder = pico("gpt2")[1]
    model, tokenizer = models.load_model(folder), models.load_tokenizer(folder)
    p = settings.load(10, "cpu", {"eval_batch_size": 2})
    answers = ["joy", "a much longer answer", "sad"]
    plain = {"instruction": "Say.", "input": "the dog"}
    rows = [plain | {"output": answer} for answer in answers]
    shares = decode.token_accuracy(model, tokenizer, rows, p)
    for row, share in zip(rows, shares, strict=True):
        (item,) = train.encode([row], tokenizer, p)
        ids = torch.tensor([item["input_ids"]])
        with torch.no_grad():
            best = model(input_ids=ids).logits[0, :-1].argmax(-1)
        n = item["answer_length"]
        assert share == pytest.approx((best[-n:] == ids[0, -n:]).float().mean().item())


def test_long_prompts_go_in_smaller_batches_and_none_is_lost():
    ids = [[0] * n for n in (10, 3000, 20, 1024, 256)]
    assert decode.batches(ids, 4) == [([], [0, 2, 4]), ([], [3]), ([], [1])]
    groups = [rows for _, rows in decode.batches(ids * 40, 32)]
    assert sorted(i for group in groups for i in group) == [*range(200)]
    for group in groups:
        longest = max(len((ids * 40)[i]) for i in group)
        assert len(group) * max(longest, decode.LONG) <= 32 * decode.LONG


def test_evaluation_cuts_a_prompt_as_training_does(pico, pico_params):
    p = pico_params(max_source_tokens=40)
    tokenizer = models.load_tokenizer(pico("gpt2")[0])
    row = ROWS[0] | {"input": "so " * 90}
    text = prompt(row, p)
    (item,) = train.encode([row], tokenizer, p)
    (ids,), (lost,) = prompt_ids(tokenizer, [text], p)
    assert item["input_ids"][: -item["answer_length"]] == ids and len(ids) == 40
    assert lost == item["prompt_cut"] > 0
    model = models.load_model(pico("gpt2")[1])
    p = pico_params(max_source_tokens=10_000)  # more than the model has positions
    assert len(decode.answer(model, tokenizer, [text * 9], p, 1)) == 1


def test_there_is_room_for_the_longest_label(pico, pico_params, monkeypatch):
    asked = []
    monkeypatch.setattr(
        decode, "answer", lambda *a, **_: asked.append(a[3].max_new_tokens) or [""] * len(a[2])
    )
    label = "an answer of many more pieces than are allowed"
    sets = {"clean": [ROWS[0] | {"output": label}]}
    p = pico_params(labels=[], max_new_tokens=2)
    evaluate.predict(pico("gpt2")[1], sets, 0, "none", p)
    evaluate.predict(pico("gpt2")[1], {"clean": ROWS[:1]}, 0, "none", p, labels=[label])
    tokens = len(models.load_tokenizer(pico("gpt2")[0])(label)["input_ids"])
    assert asked == [tokens + decode.SPARE_TOKENS] * 2 and tokens > 19
