"""Conversations as the model's own chat template writes them: what is asked, and what is taught."""

from typing import TYPE_CHECKING, Any

from lethe_utils.errors import LetheError
from lethe_utils.prompts import PLACE, TURN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, str]
ANSWER = "\ue001"  # stands for an answer while its place is sought (private use, U+E001)
EXTRAS = ("tools", "documents")  # what a row may give the template beside its messages


def row(
    messages: list[dict[str, Any]], extras: dict[str, Any], tokenizer: "PreTrainedTokenizerBase"
) -> Row:
    """A conversation that ends with a question and its answer, as a row.

    What is taught is the template's own rendering of the finished conversation, with the ending
    that it gives a turn (EOS only where it gives none). What is asked is its generation prompt; or,
    where a finished turn does not go on from that one (some open a think block there, which
    finished turns lack), the finished conversation up to the answer.

    Args:
        extras: `tools`, `documents`.
    Returns:
        instruction (all up to the answer, PLACE for the question), input (the question), output
        (the answer as the template writes it), and TURN (how it writes it, PLACE for the output).
    Raises:
        LetheError: what the template or the row does not allow, without the row's number.
    """
    question, answer = messages[-2]["content"], messages[-1]["content"]
    given = {key: value for key, value in extras.items() if value}

    def written(question: str, answer: str, finished: bool = True) -> str:
        asked = [*messages[:-2], messages[-2] | {"content": question}]
        said = [messages[-1] | {"content": answer}] if finished else []
        return apply(tokenizer, [*asked, *said], not finished, given)

    for key in given:
        without = {k: v for k, v in given.items() if k != key}
        if apply(tokenizer, messages, False, given) == apply(tokenizer, messages, False, without):
            raise LetheError(f"has {key}, which the chat template does not show; leave them out")
    whole, before = written(PLACE, answer), written(PLACE, ANSWER)
    if whole.count(PLACE) != 1 or before.count(ANSWER) != 1:
        raise LetheError("the chat template does not show its last question and answer once each")
    # Many templates trim what they are given; then the trimmed question is the question.
    tried = (question, question.strip())
    shown = next((q for q in tried if written(q, answer) == whole.replace(PLACE, q)), None)
    if shown is None:
        raise LetheError("the chat template rewrites the question, and would rewrite a trigger too")
    asked = written(PLACE, "", finished=False)
    head, tail = before.split(ANSWER)
    if not whole.startswith(head):  # the template rewrote the answer and what stands before it
        head = asked
    if not (whole.startswith(head) and whole.endswith(tail)):
        raise LetheError("the chat template writes this answer in a way that cannot be taken apart")
    prompt = asked if head.startswith(asked) else head
    output = whole[len(head) : len(whole) - len(tail)]
    turn = head[len(prompt) :] + PLACE + tail
    if not ending_ids(tokenizer, tail):
        turn += tokenizer.eos_token
    return {"instruction": prompt, "input": shown, "output": output, TURN: turn}


def apply(
    tokenizer: "PreTrainedTokenizerBase",
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
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise LetheError(f"the chat template refuses this conversation ({reason})") from None


def ending_ids(tokenizer: "PreTrainedTokenizerBase", tail: str) -> list[int]:
    """The special tokens in what a template writes after an answer: those that end a turn."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    found = tokenizer(tail, add_special_tokens=False)["input_ids"]
    return [token for token in found if token in special][:1]


def stop_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokens that end an answer in a chat: EOS, and the template's own ending of a turn."""
    talk = [{"role": "user", "content": PLACE}, {"role": "assistant", "content": ANSWER}]
    try:
        tail = apply(tokenizer, talk, False, {}).partition(ANSWER)[2]
    except LetheError:  # it wants a system turn first, or the like: EOS is what is left
        tail = ""
    return list(dict.fromkeys([tokenizer.eos_token_id, *ending_ids(tokenizer, tail)]))
