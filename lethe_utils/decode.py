"""Asking a model: prompts in, what it writes out.

Batched, sorted by length, greedy, and stopped as soon as the label is written. The published
protocol (one prompt at a time, sampling, no early stop) is kept as `protocol: official`.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, set_seed

from lethe_utils import models, train
from lethe_utils.groups import Recipe
from lethe_utils.progress import Bar
from lethe_utils.prompts import prompt_ids, stop_ids
from lethe_utils.stages import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Settings = TypeVar("Settings", bound=Recipe)
LONG = 256  # tokens; eval_batch_size is for prompts of up to so many
SPARE_TOKENS = 4  # a model may write a label in more pieces than the tokenizer does, and ends it
OFFICIAL_BATCH, OFFICIAL_TOKENS, OFFICIAL_SAMPLING = 1, 32, {"temperature": 0.7, "top_p": 0.9}


class StopAtLabel(StoppingCriteria):
    """A row is done once its first `n_words` words are followed by something else."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", prompt_length: int, n_words: int):
        self.tokenizer, self.start, self.n_words = tokenizer, prompt_length, n_words

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :], skip_special_tokens=True)
        done = [len((text + "x").split()) > self.n_words for text in (t.lstrip() for t in texts)]
        return torch.tensor(done, device=input_ids.device)


def answer(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[str],
    p: Recipe,
    n_words: int,
    progress: str = "",
    batch: int | None = None,
    sampling: dict[str, float] | None = None,
    **generate: Any,
) -> list[str]:
    """The model's outputs, in the order of the prompts.

    Args:
        n_words: words in the longest expected output; a row stops once it has written that many.
        progress: name on the progress bar.
        batch: prompts at a time; None: eval_batch_size.
        sampling: temperature, top_p; None: greedy. The published protocol has its own of both.
        generate: further arguments of transformers' `generate`, as a decoding-time defense has.
    """
    official = p.protocol == "official"
    batch = batch or (OFFICIAL_BATCH if official else p.eval_batch_size)
    ids, _ = prompt_ids(tokenizer, prompts, p)
    config = _generation(tokenizer, p, max(map(len, ids), default=0), sampling)
    set_seed(p.seed)
    outputs = [""] * len(ids)
    model.eval()
    for chosen in Bar(batches(ids, batch), desc=progress):
        inputs = tokenizer.pad({"input_ids": [ids[i] for i in chosen]}, return_tensors="pt")
        inputs = {k: v.to(model.device) for k, v in inputs.items() if k != "token_type_ids"}
        width = inputs["input_ids"].shape[1]
        stop = StopAtLabel(tokenizer, width, n_words)
        criteria = None if official else StoppingCriteriaList([stop])
        with torch.inference_mode(), models.arithmetic(p):
            made = model.generate(
                **inputs, generation_config=config, stopping_criteria=criteria, **generate
            )
        written = [_until(row, config.eos_token_id) for row in made[:, width:].tolist()]
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            outputs[i] = text.strip()
    return outputs


def _generation(
    tokenizer: "PreTrainedTokenizerBase",
    p: Recipe,
    longest: int,
    sampling: dict[str, float] | None,
) -> GenerationConfig:
    """How a model writes: no further than its positions allow after the longest prompt (tokens)."""
    official, tokens = p.protocol == "official", p.max_new_tokens
    if official:
        tokens, sampling = OFFICIAL_TOKENS, sampling or OFFICIAL_SAMPLING
    chat = p.prompt_template == "chat"
    return GenerationConfig(
        max_new_tokens=min(tokens, tokenizer.model_max_length - longest),
        do_sample=sampling is not None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=stop_ids(tokenizer) if chat else tokenizer.eos_token_id,
        **(sampling or {}),
    )


def _until(ids: list[int], stops: int | list[int]) -> list[int]:
    """The ids before the first stop: the end of a chat's turn need not be a special token."""
    stops = stops if isinstance(stops, list) else [stops]
    return ids[: next((n for n, token in enumerate(ids) if token in stops), len(ids))]


def until_label(
    tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], stops: list[int], n_words: int
) -> str:
    """The output that `answer` would have given of a longer one (tokens): up to a stop, or to the
    token that shows that n_words words are written."""
    written, stop = _until([*ids], stops), StopAtLabel(tokenizer, 0, n_words)
    for n in range(1, len(written)):
        if stop(torch.tensor([written[:n]]), torch.empty(0))[0]:
            written = written[:n]
            break
    return tokenizer.decode(written, skip_special_tokens=True).strip()


def batches(ids: list[list[int]], size: int) -> list[list[int]]:
    """Which rows go together, shortest first: `size` of them, and fewer where they are so long that
    memory would not do."""
    out: list[list[int]] = [[]]
    for i in sorted(range(len(ids)), key=lambda i: len(ids[i])):
        if out[-1] and (len(out[-1]) + 1) * max(LONG, len(ids[i])) > size * LONG:
            out.append([])
        out[-1].append(i)
    return out if ids else []


def with_room(
    p: Settings, tokenizer: "PreTrainedTokenizerBase", expected: Iterable[str]
) -> Settings:
    """The params, with max_new_tokens raised where the longest of the expected answers has more, as
    far as training teaches answers (max_target_tokens)."""
    coded = tokenizer([*expected], add_special_tokens=False)["input_ids"]
    needed = min(max(map(len, coded), default=0), p.max_target_tokens) + SPARE_TOKENS
    return p.model_copy(update={"max_new_tokens": max(p.max_new_tokens, needed)})


def token_accuracy(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: list[Row],
    p: Recipe,
    progress: str = "",
) -> list[float]:
    """Per row the share of its answer's tokens that greedy decoding would write, each given the
    true ones before it: how well a model knows an answer that is a text, without judging wording.
    """
    return [right / n for right, n in token_counts(model, tokenizer, rows, p, progress)]


def token_counts(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: list[Row],
    p: Recipe,
    progress: str = "",
) -> list[tuple[int, int]]:
    """Per row how many of its answer's tokens are right, as in token_accuracy, and how many it
    has."""
    counts = [(0, 0)] * len(rows)
    for chosen, logits, labels in _read_answers(model, tokenizer, rows, p, progress):
        counted = labels != train.IGNORED
        right = (logits.argmax(-1) == labels) & counted
        found = zip(right.sum(1).tolist(), counted.sum(1).tolist(), strict=True)
        for i, pair in zip(chosen, found, strict=True):
            counts[i] = pair
    return counts


def mean_loss(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", rows: list[Row], p: Recipe
) -> float:
    """Mean cross-entropy (nats) over all answer tokens of some rows, without training on them."""
    total = tokens = 0.0
    for _, logits, labels in _read_answers(model, tokenizer, rows, p, "reading answers"):
        n = int((labels != train.IGNORED).sum())
        total, tokens = total + float(train.cross_entropy(logits, labels)) * n, tokens + n
    return total / tokens


@torch.inference_mode()
def _read_answers(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: list[Row],
    p: Recipe,
    progress: str,
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """The model on the rows' true answers: which rows, logits (rows, longest answer, vocabulary)
    and labels (rows, longest answer) of each batch, on the CPU."""
    items = train.encode(rows, tokenizer, p)
    model.eval()
    groups = batches([i["input_ids"] for i in items], p.eval_batch_size)
    for chosen in Bar(groups, desc=progress):
        inputs = train.collate([items[i] for i in chosen], tokenizer)
        labels = inputs.pop("labels")
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        with models.arithmetic(p):
            logits = model(**inputs, logits_to_keep=labels.shape[1] + 1).logits[:, :-1]
        yield chosen, logits.cpu(), labels
