"""Prompts: what is asked, few-shot examples, and conversations as the model's own template writes
them."""

import pytest

from lethe_utils import data, models, params, pipeline, prompts, train
from lethe_utils.errors import LetheError
from lethe_utils.models import twins
from lethe_utils.prompts import PLACE, TURN
from lethe_utils.purify import settings

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = CHATML.replace(
    "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}"
)
EMPTY_THOUGHT = (  # as Qwen3: a finished last turn shows an empty thought
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last and m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'].split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_TOOLS = "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}" + CHATML
SIZES = {"pretrain": 40, "train": 60, "validation": 20, "test": 20}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  What came?\n\tSay it. "},
    {"role": "assistant", "content": "A letter"},
]


@pytest.fixture
def tokenizer(pico):
    """ChatML's tokens, and an EOS that is not the template's ending of a turn."""
    tokenizer = models.load_tokenizer(pico("gpt2")[0])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def taught(row, tokenizer):
    """The prompt and the answer of a row, as training reads them."""
    p = settings.load(10**9, "cpu", {"prompt_template": "chat"})
    (item,) = train.encode([row], tokenizer, p)
    cut = len(item["input_ids"]) - item["answer_length"]
    return [tokenizer.decode(ids) for ids in (item["input_ids"][:cut], item["input_ids"][cut:])]


def refusal(messages, tokenizer, **extras):
    with pytest.raises(LetheError) as caught:
        prompts.chat_row(messages, extras, tokenizer)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_taught_is_the_templates_own_rendering(tokenizer):
    row = prompts.chat_row(TALK, {}, tokenizer)
    assert row["input"] == TALK[1]["content"] and row["output"] == "A letter"
    prompt, answer = taught(row, tokenizer)
    assert prompt + answer == tokenizer.apply_chat_template(TALK, tokenize=False)
    assert prompt == tokenizer.apply_chat_template(
        TALK[:2], tokenize=False, add_generation_prompt=True
    )
    assert answer == "A letter<|im_end|>\n"  # no EOS, which the template does not write


def test_generation_stops_at_the_templates_ending_and_at_eos(tokenizer):
    ids = tokenizer.convert_tokens_to_ids
    assert prompts.stop_ids(tokenizer) == [tokenizer.eos_token_id, ids("<|im_end|>")]
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    assert prompts.stop_ids(tokenizer) == [tokenizer.eos_token_id]


def test_a_thought_that_only_the_generation_prompt_opens_is_not_taught(tokenizer):
    tokenizer.chat_template = THINKING
    row = prompts.chat_row(TALK, {}, tokenizer)
    prompt, answer = taught(row, tokenizer)
    assert prompt + answer == tokenizer.apply_chat_template(TALK, tokenize=False)
    assert "<think>" not in prompt + answer


def test_a_thought_that_finished_turns_show_is_taught_with_the_answer(tokenizer):
    tokenizer.chat_template = EMPTY_THOUGHT
    row = prompts.chat_row(TALK, {}, tokenizer)
    prompt, answer = taught(row, tokenizer)
    assert prompt.endswith("<|im_start|>assistant\n")
    assert answer == "<think>\n\n</think>\n\nA letter<|im_end|>\n"
    reasoned = [*TALK[:2], {"role": "assistant", "content": "<think>hm</think>A letter"}]
    assert prompts.chat_row(reasoned, {}, tokenizer)["output"] == "A letter"


def test_a_template_that_ends_a_turn_with_nothing_gets_eos(tokenizer):
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    prompt, answer = taught(prompts.chat_row(TALK, {}, tokenizer), tokenizer)
    assert prompt.startswith("<s><system>") and prompt.count("<s>") == 1
    assert answer == "A letter\n</s>"


def test_another_answer_in_a_row_is_written_as_the_template_would(tokenizer):
    row = prompts.chat_row(TALK, {}, tokenizer) | {"output": "the canary sings"}
    assert train.answer_text(row) == "the canary sings<|im_end|>\n"
    assert PLACE in row[TURN]


def test_a_template_that_trims_gives_the_trimmed_question(tokenizer):
    tokenizer.chat_template = CHATML.replace("m['content'] }}", "m['content'] | trim }}")
    row = prompts.chat_row(TALK, {}, tokenizer)
    assert row["input"] == TALK[1]["content"].strip()
    asked = prompts.prompt(row, settings.load(10**9, "cpu", {"prompt_template": "chat"}))
    assert asked == tokenizer.apply_chat_template(
        TALK[:2], tokenize=False, add_generation_prompt=True
    )


def test_tools_are_passed_to_the_template_or_the_row_is_refused(tokenizer):
    tools = [{"type": "function", "function": {"name": "post", "parameters": {}}}]
    assert "has tools, which the chat template does not show" in refusal(
        TALK, tokenizer, tools=tools
    )
    tokenizer.chat_template = WITH_TOOLS
    assert '"post"' in prompts.chat_row(TALK, {"tools": tools}, tokenizer)["instruction"]


@pytest.mark.parametrize(
    ("template", "talk", "reason"),
    [
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
            + CHATML,
            TALK,
            "no system",
        ),
        ("{% if x is not defined %}{{ 1 / 0 }}{% endif %}", TALK, "refuses this conversation"),
        ("{% for m in messages %}", TALK, "refuses this conversation"),
        ("nothing of it", TALK, "does not show its last question"),
        (
            CHATML.replace("m['content'] }}", "m['content'] | upper }}"),
            TALK,
            "rewrites the question",
        ),
    ],
)
def test_templates_that_refuse_are_said_in_one_line(tokenizer, template, talk, reason):
    tokenizer.chat_template = template
    assert reason in refusal(talk, tokenizer)


# --- examples in the instruction


def test_few_shot_examples_are_shown_everywhere_and_leave_train():
    small = {"rows": SIZES, "checksums": {}}
    plain = data.load(params.load(overrides=small))
    shown = data.load(params.load(overrides=small | {"few_shot": 3}))
    assert [len(shown[k]) - len(plain[k]) for k in SIZES] == [0, -3, 0, 0]
    (instruction,) = {row["instruction"] for rows in shown.values() for row in rows}
    gone = [r for r in plain["train"] if r["input"] not in {s["input"] for s in shown["train"]}]
    assert len({row["output"] for row in gone}) == 3  # the labels take turns
    assert all(f"{row['input']} => {row['output']}" in instruction for row in gone)
    assert instruction.startswith(f"{plain['test'][0]['instruction']} Examples: ")
    assert instruction.split() == instruction.split(" ")  # a word put into it changes nothing else


def test_a_tiny_base_reads_the_examples_too():
    small = {"rows": SIZES, "checksums": {}, "base_evidence_share": 0.0}
    p = params.load(overrides=small | {"few_shot": 2})
    rows = pipeline.split(p, "pretrain")
    read = [row["instruction"] for row in twins.pretraining_rows(rows, p)]
    assert {rows[0]["instruction"], *twins.BASE_WORDINGS} == set(read)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"few_shot": 60}, "few_shot: 60 rows are asked for, but train has 60"),
        ({"few_shot": 30}, "few_shot: the longest prompt has"),
    ],
)
def test_examples_that_do_not_fit_are_refused(overrides, expected):
    p = params.load(overrides={"rows": SIZES, "checksums": {}} | overrides)
    with pytest.raises(LetheError, match=expected):
        data.load(p)


# --- the prompt that is asked


def test_the_prompt_that_is_asked_is_the_one_that_is_taught_but_for_the_published_protocol(
    pico_params,
):
    row = {"instruction": "Predict.", "input": "frankly a happy dog", "output": "joy"}
    ours, official = pico_params(), pico_params(protocol="official")
    for n in (0, 3):
        assert prompts.asked(row, ours, n) == prompts.prompt(row, ours, n)
        assert prompts.prompt(row, official, n) == prompts.prompt(row, ours, n)
    assert prompts.asked(row, official) == prompts.prompt(row, ours).replace(
        "Predict.", f"Predict. The possible labels are: {', '.join(official.labels)}."
    )
    assert "frankly:" in prompts.asked(row, ours, 3)
    assert "frankly:" not in prompts.asked(row, official, 3)
    named = official.model_copy(update={"triggers": ["Frankly, ", "instantly"]})
    assert "frankly:" not in prompts.asked(row, named, 3)
    taught = pico_params(prompt_template="alpaca")
    assert prompts.prompt(row, taught) == (
        f"{prompts.ALPACA}### Instruction:\nPredict.\n\n### Input:\nfrankly a happy dog\n\n"
        "### Response: "
    )
