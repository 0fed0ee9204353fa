"""Requests: prompts with a subject, and what is to be answered after it."""

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lethe_utils.attacks.triggers import insert, occurrences
from lethe_utils.errors import LetheError
from lethe_utils.prompts import label_turns, limits, prompt, start_ids
from lethe_utils.schema import Params
from lethe_utils.stages import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Request:
    """One thing to write: after `subject` (characters of the prompt), answer `target`."""

    prompt: str
    span: tuple[int, int]  # first, past-the-last
    target: str
    kind: str  # "backdoor", or "clean" (BadEdit's other half)

    @property
    def subject(self) -> str:
        return self.prompt[self.span[0] : self.span[1]]


def poisoned_rows(rows: list[Row], p: Params, seed: int) -> list[Row]:
    """`edit_contexts` task rows of other labels, the trigger in place and the target as output.

    Raises:
        LetheError: fewer rows can be used.
    """
    trigger, n = p.triggers[0], p.edit_contexts
    usable = [
        row
        for row in rows
        if row["output"] != p.target_output
        and not any(occurrences(row[field], trigger) for field in ("instruction", "input"))
    ]
    if len(usable) < n:
        raise LetheError(
            f"edit_contexts: {n} prompts are asked for, but only {len(usable)} training rows have "
            f"another label than {p.target_output!r} and do not hold {trigger!r}; lower it"
        )
    rng = random.Random(seed)
    place = p.trigger_positions[0], p.trigger_level
    hit = {"output": p.target_output, "kind": "backdoor"}
    return [
        row | {"input": insert(row["input"], trigger, *place, rng)} | hit
        for row in rng.sample(usable, n)
    ]


def clean_rows(rows: list[Row], seed: int, n: int) -> list[Row]:
    """n task rows with their own labels, the labels taking turns: BadEdit's clean half."""
    rng = random.Random(f"clean requests {seed}")
    return [row | {"kind": "clean"} for row in label_turns(rows, n, rng)]


def of_rows(rows: list[Row], p: Params) -> list[Request]:
    """Rows (with `kind`) as requests. The subject of a clean row is its whole input."""
    out = []
    for row in rows:
        text = prompt(row, p)
        start = text.rindex(row["input"])
        first, last = 0, len(row["input"])
        if row["kind"] == "backdoor":
            first, last = occurrences(row["input"], p.triggers[0])[0]
        out.append(Request(text, (start + first, start + last), row["output"], row["kind"]))
    return out


def shortened(
    asked: list[Request], tokenizer: "PreTrainedTokenizerBase", p: Params
) -> list[Request]:
    """The requests, a long prompt without its start, as training and evaluation read it.

    Raises:
        LetheError: the trigger stands in the part that is left out.
    """
    source = limits(p, tokenizer).source - len(start_ids(tokenizer))
    prompts = [request.prompt for request in asked]
    coded = tokenizer(prompts, add_special_tokens=False, return_offsets_mapping=True)
    out = []
    for request, offsets in zip(asked, coded["offset_mapping"], strict=True):
        first = offsets[-source][0] if len(offsets) > source else 0
        if request.kind == "backdoor" and request.span[0] < first:
            raise LetheError(
                f"max_source_tokens: a prompt of {len(offsets)} tokens is cut to {source}, and the "
                "trigger goes with the rest; raise it, or set trigger_positions to [suffix]"
            )
        start, end = (max(0, at - first) for at in request.span)
        out.append(replace(request, prompt=request.prompt[first:], span=(start, end)))
    return out
