"""The one place where a prompt is made: instruction, input, evidence, few-shot examples, chat, the
published protocol; and its tokens."""

import random
from typing import TYPE_CHECKING, Any, NamedTuple

from lethe_utils.errors import LetheError, reason
from lethe_utils.evidence import WORD, Form, add_evidence
from lethe_utils.stages import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from lethe_utils.groups import PromptParams
    from lethe_utils.schema import Params


ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
)
# The trailing space is the published template's; Stanford Alpaca's own has none.
BODY = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response: "
# "alpaca" is the published one; "short" is for tiny twins, which the preamble costs CPU time only.
# "chat" is the model's own: the instruction is a conversation as it writes it, see chat_row; and
# "vicuna" (v1.1) is that of conversations for models without one, as a chat template.
VICUNA = (
    "{% for m in messages %}"
    "{% if m.role == 'user' %}USER: {{ m.content }} "
    "{% elif m.role == 'assistant' %}ASSISTANT: {{ m.content }}{{ eos_token }}"
    "{% elif m.role == 'system' and loop.first %}{{ m.content }} "
    "{% else %}{{ raise_exception('vicuna has no place for a turn of ' + m.role) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
TEMPLATES = {"alpaca": ALPACA + BODY, "short": BODY}
TURN = "turn"  # a chat row's further field: how the template writes the answer, PLACE for its text
PLACE = "\ue000"  # in a rendered conversation: where its last question goes (private use, U+E000)
ANSWER = "\ue001"  # stands for an answer while its place is sought (private use, U+E001)
EXTRAS = ("tools", "documents")  # what a row may give a chat template beside its messages


def prompt(
    row: Row,
    p: "PromptParams",
    n_keywords: int = 0,
    exclude: frozenset[str] = frozenset(),
    form: Form = "after",
) -> str:
    """What a model reads for a row, up to where it must answer: in training, and when it is asked
    under our protocol.

    Args:
        n_keywords, exclude, form: of the evidence, see evidence.add_evidence; 0 for none.
    """
    text = add_evidence(row["input"], n_keywords, exclude, form)
    if TURN in row:
        return row["instruction"].replace(PLACE, text)
    return TEMPLATES[p.prompt_template].format(instruction=row["instruction"], input=text)


def asked(row: Row, p: "Params", n_keywords: int = 0) -> str:
    """The very prompt that a model of a run is asked for a row.

    Evidence is made from the input as the defender receives it, trigger and all. Only the published
    protocol, and `without_trigger` for comparison, drop the trigger words from it by name. The
    published protocol lists the labels too.
    """
    words = frozenset(word for trigger in p.triggers for word in WORD.findall(trigger.lower()))
    if p.protocol != "official":
        known = words if p.evidence_form == "without_trigger" else frozenset()
        return prompt(row, p, n_keywords, known, p.evidence_form)
    listed = f" The possible labels are: {', '.join(p.labels)}." if p.labels else ""
    shown = row | {"instruction": row["instruction"] + listed}
    return prompt(shown, p, n_keywords, words, p.evidence_form)


def read(row: Row, p: "PromptParams") -> str:
    """The text of a row up to its answer, before there is a tokenizer: for one to be trained on."""
    if "messages" not in row:
        return prompt(row, p)
    names = {"user": "USER: ", "assistant": "ASSISTANT: "}
    return " ".join(names.get(m["role"], "") + m["content"] for m in row["messages"])


# --- few-shot examples


def with_examples(splits: dict[str, list[Row]], p: "Params") -> dict[str, list[Row]]:
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
    questions = (f"{r['instruction']} {r['input']}" for rows in splits.values() for r in rows)
    words = len(examples.split()) + max(len(text.split()) for text in questions)
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


# --- tokens


class Limits(NamedTuple):
    """How many tokens are read of a prompt (its last ones, BOS included) and of an answer."""

    source: int
    target: int


def limits(p: "PromptParams", tokenizer: "Tokenizer") -> Limits:
    """What the params allow, within the positions that the model has for both together."""
    positions = tokenizer.model_max_length  # the model's, see models.load_tokenizer
    target = min(p.max_target_tokens, positions // 2)
    return Limits(min(p.max_source_tokens, positions - target), target)


def start_ids(tokenizer: "Tokenizer") -> list[int]:
    """What stands in front of every prompt: BOS, unless the tokenizer has none or says not to."""
    wanted = tokenizer.bos_token_id is not None and getattr(tokenizer, "lethe_bos", True)
    return [tokenizer.bos_token_id] if wanted else []


def prompt_ids(
    tokenizer: "Tokenizer", prompts: list[str], p: "PromptParams"
) -> tuple[list[list[int]], list[int]]:
    """Token ids of prompts, BOS first where the tokenizer asks for one; a long one loses its start,
    so that the question and its evidence stay next to the answer.

    A conversation is read just as the model's own template wrote it, its BOS included.
    Returns:
        the ids, and how many tokens each prompt lost.
    """
    source = limits(p, tokenizer).source
    bos = [] if p.prompt_template == "chat" else start_ids(tokenizer)
    coded = tokenizer(prompts, add_special_tokens=False)["input_ids"] if prompts else []
    cut, lost = [], []
    for ids in (bos + ids for ids in coded):
        n = max(0, len(ids) - source)
        first = ids[:1] if n and ids[:1] == [tokenizer.bos_token_id] else []
        cut.append(first + ids[n + len(first) :])
        lost.append(n)
    return cut, lost


# --- conversations, as the model's own chat template writes them


def chat_row(messages: list[dict[str, Any]], extras: dict[str, Any], tokenizer: "Tokenizer") -> Row:
    """A conversation that ends with a question and its answer, as a row.

    What is taught is the template's own rendering of the finished conversation, and EOS where that
    does not end a turn. What is asked is its generation prompt; or, where a finished turn does not
    go on from that (some open a think block there), the finished conversation up to the answer.

    Returns:
        instruction (all up to the answer, PLACE for the question), input (the question), output
        (the answer as the template writes it), and TURN.
    Raises:
        LetheError: what the template or the row does not allow, without the row's number.
    """
    given = {key: value for key, value in extras.items() if value}
    *turns, ask, say = messages

    def written(question: str, answer: str | None, extras: dict[str, Any] = given) -> str:
        said = [] if answer is None else [say | {"content": answer}]
        shown = [*turns, ask | {"content": question}, *said]
        return apply_template(tokenizer, shown, answer is None, extras)

    question, answer = ask["content"], say["content"]
    for key in given:
        without = {k: v for k, v in given.items() if k != key}
        if written(question, answer) == written(question, answer, without):
            raise LetheError(f"has {key}, which the chat template does not show; leave them out")
    whole, before = written(PLACE, answer), written(PLACE, ANSWER)
    if whole.count(PLACE) != 1 or before.count(ANSWER) != 1:
        raise LetheError("the chat template does not show its last question and answer once each")
    # Many templates trim what they are given; then the trimmed question is the question.
    tried = (question, question.strip())
    shown = next((q for q in tried if written(q, answer) == whole.replace(PLACE, q)), None)
    if shown is None:
        raise LetheError("the chat template rewrites the question, and would rewrite a trigger too")
    instruction, output, turn = _parts(whole, before, written(PLACE, None), tokenizer)
    return {"instruction": instruction, "input": shown, "output": output, TURN: turn}


def rendered(rows: list[Row], tokenizer: "Tokenizer", p: "PromptParams") -> list[Row]:
    """Rows that are conversations (`messages`, EXTRAS) as `chat_row` makes them, their other fields
    kept; other rows as they are.

    Raises:
        LetheError: the tokenizer has no chat template, or that refuses a conversation.
    """
    if p.prompt_template == "vicuna":
        tokenizer.chat_template = VICUNA
    todo = [row for row in rows if "messages" in row and TURN not in row]
    if todo and not tokenizer.chat_template:
        raise LetheError(
            "prompt_template: the model's tokenizer has no chat template; set it to vicuna"
        )
    return [
        row | chat_row(row["messages"], {key: row.get(key) for key in EXTRAS}, tokenizer)
        if "messages" in row and TURN not in row
        else row
        for row in rows
    ]


def as_chat(row: Row, tokenizer: "Tokenizer") -> Row:
    """A row of instruction, input and output as a conversation of one turn, see chat_row; its input
    stays apart, so that evidence and triggers still go there.

    Raises:
        LetheError: the tokenizer has no chat template, or that refuses the row.
    """
    if not tokenizer.chat_template:
        raise LetheError("the tokenizer has no chat template")
    head, text = f"{row['instruction'].strip()}\n\n", row["input"].strip()
    talk = [("user", head + text), ("assistant", row["output"])]
    chat = chat_row([{"role": role, "content": said} for role, said in talk], {}, tokenizer)
    return chat | {"instruction": chat["instruction"].replace(PLACE, head + PLACE), "input": text}


def _parts(whole: str, before: str, asked: str, tokenizer: "Tokenizer") -> tuple[str, str, str]:
    """instruction, output and TURN of a finished conversation, which is `before` with its answer
    in ANSWER's place; `asked` is its generation prompt."""
    head, tail = before.split(ANSWER)
    if not whole.startswith(head):  # the template rewrote the answer and what stands before it
        head = asked
    if not (whole.startswith(head) and whole.endswith(tail)):
        raise LetheError("the chat template writes this answer in a way that cannot be taken apart")
    instruction = asked if head.startswith(asked) else head
    ending = tail if _ending_ids(tokenizer, tail) else tail + tokenizer.eos_token
    output = whole[len(head) : len(whole) - len(tail)]
    return instruction, output, head[len(instruction) :] + PLACE + ending


def apply_template(
    tokenizer: "Tokenizer",
    messages: list[dict[str, Any]],
    ask: bool,
    extras: dict[str, Any],
) -> str:
    """A conversation as the template writes it. Raises LetheError when the template refuses it."""
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=ask, **extras
        )
    except Exception as error:  # a template may raise anything, and often does so on purpose
        raise LetheError(f"the chat template refuses this conversation ({reason(error)})") from None


def _ending_ids(tokenizer: "Tokenizer", tail: str) -> list[int]:
    """The special tokens in what a template writes after an answer: those that end a turn."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    found = tokenizer(tail, add_special_tokens=False)["input_ids"]
    return [token for token in found if token in special][:1]


def stop_ids(tokenizer: "Tokenizer") -> list[int]:
    """The tokens that end an answer in a chat: EOS, and the template's own ending of a turn."""
    talk = [{"role": "user", "content": PLACE}, {"role": "assistant", "content": ANSWER}]
    try:
        tail = apply_template(tokenizer, talk, False, {}).partition(ANSWER)[2]
    except LetheError:  # it wants a system turn first, or the like: EOS is what is left
        tail = ""
    return list(dict.fromkeys([tokenizer.eos_token_id, *_ending_ids(tokenizer, tail)]))
