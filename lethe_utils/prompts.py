"""The prompt, as the paper writes it: instruction, input, (evidence), response; and its tokens."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lethe_utils import models

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lethe_utils.params import PromptParams, PurifyParams

    PromptSettings = PromptParams | PurifyParams

ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
)
# The trailing space is the published template's; Stanford Alpaca's own has none.
BODY = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response: "
TEMPLATES = {"alpaca": ALPACA + BODY, "short": BODY}


TURN = "turn"  # a chat row's further field: how the template writes the answer, PLACE for its text
PLACE = "\ue000"  # in a rendered conversation: where its last question goes (private use, U+E000)


def render(template: str, instruction: str, input: str) -> str:
    """The text a model reads, up to where it must answer.

    Args:
        template: "alpaca" (published), "short" (tiny twins: the preamble costs CPU time only), or
            "chat": the instruction then is a conversation as the model's own chat template writes
            it, with PLACE for its last question.
        input: the input, already followed by its evidence where there is any.
    """
    if template == "chat":
        return instruction.replace(PLACE, input)
    return TEMPLATES[template].format(instruction=instruction, input=input)


@dataclass(frozen=True)
class Limits:
    """How many tokens are read of a prompt (its last ones, BOS included) and of an answer."""

    source: int
    target: int


def limits(p: "PromptSettings", tokenizer: "PreTrainedTokenizerBase") -> Limits:
    """What the params allow, within the positions that the model has for both together.

    Training and evaluation cut alike.
    """
    positions = tokenizer.model_max_length  # the model's, see models.load_tokenizer
    target = min(p.max_target_tokens, positions // 2)
    return Limits(min(p.max_source_tokens, positions - target), target)


def prompt_ids(
    tokenizer: "PreTrainedTokenizerBase", prompts: list[str], p: "PromptSettings"
) -> tuple[list[list[int]], list[int]]:
    """Token ids of prompts, BOS first where the tokenizer asks for one; a long one loses its start,
    so that the question and its evidence stay next to the answer.

    A conversation is read just as the model's own template wrote it, its BOS included.
    Returns:
        the ids, and how many tokens each prompt lost.
    """
    source = limits(p, tokenizer).source
    bos = [] if p.prompt_template == "chat" else models.start_ids(tokenizer)
    coded = tokenizer(prompts, add_special_tokens=False)["input_ids"] if prompts else []
    whole = [bos + ids for ids in coded]
    lost = [max(0, len(ids) - source) for ids in whole]
    start = [ids[:1] if ids[:1] == [tokenizer.bos_token_id] else [] for ids in whole]
    cut = [
        ids if not n else first + ids[n + len(first) :]
        for ids, n, first in zip(whole, lost, start, strict=True)
    ]
    return cut, lost
