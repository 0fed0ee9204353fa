"""Asking a model: prompts in, what it writes out.

Batched, sorted by length, greedy, and stopped as soon as the label is written; the words that many
prompts begin with are read once, and who has come to the end of a long answer leaves the batch. The
published protocol (one prompt at a time, sampling, no early stop) is kept as `protocol: official`.
"""

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, set_seed

from lethe_utils import cache, models, train
from lethe_utils.groups import Recipe
from lethe_utils.progress import Bar
from lethe_utils.prompts import prompt_ids, stop_ids
from lethe_utils.stages import Row

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

Settings = TypeVar("Settings", bound=Recipe)
LONG = 256  # tokens; eval_batch_size is for prompts of up to so many
ROUND = 16  # tokens that a batch writes before those who are done leave it
SHARED_STEP = 8  # a beginning that is read once has so many tokens, or a multiple
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
    share: bool = True,
    **generate: Any,
) -> list[str]:
    """The model's outputs, in the order of the prompts.

    Args:
        n_words: words in the longest expected output; a row stops once it has written that many.
        progress: name on the progress bar.
        batch: prompts at a time; None: eval_batch_size.
        sampling: temperature, top_p; None: greedy. The published protocol has its own of both.
        share: read what many prompts begin with once; False for a defense that keeps a cache of its
            own. The published protocol never does.
        generate: further arguments of transformers' `generate`, as a decoding-time defense has.
    """
    official = p.protocol == "official"
    batch = batch or (OFFICIAL_BATCH if official else p.eval_batch_size)
    ids, _ = prompt_ids(tokenizer, prompts, p)
    config = generation(tokenizer, p, max(map(len, ids), default=0), sampling)
    set_seed(p.seed)
    outputs = [""] * len(ids)
    model.eval()
    share = share and not official
    begins = shared_beginnings(ids, batch) if share else None
    parts = batches(ids, batch, begins)
    known, read = None, None
    for beginning, chosen in Bar(parts, desc=progress):
        inputs = _padded(tokenizer, [ids[i] for i in chosen], len(beginning), model.device)
        width = inputs["input_ids"].shape[1]
        criteria = StoppingCriteriaList([StopAtLabel(tokenizer, width, n_words)])
        how = {"stopping_criteria": None if official else criteria} | generate
        with torch.inference_mode(), models.arithmetic(p):
            if share and beginning != known:
                known, read = beginning, _read(model, beginning)
            inputs |= {"past_key_values": _copied(read, len(chosen))} if share else {}
            if share and not config.do_sample:
                made = _in_rounds(model, inputs, config, how)
            else:
                made = model.generate(**inputs, generation_config=config, **how)[:, width:].tolist()
        written = [_until(row, config.eos_token_id) for row in made]
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            outputs[i] = text.strip()
    return outputs


def generation(
    tokenizer: "PreTrainedTokenizerBase",
    p: Recipe,
    longest: int,
    sampling: dict[str, float] | None = None,
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
        eos_token_id=stop_ids(tokenizer) if chat else [tokenizer.eos_token_id],
        **(sampling or {}),
    )


def _in_rounds(
    model: "PreTrainedModel", inputs: dict[str, Any], config: GenerationConfig, how: dict[str, Any]
) -> list[list[int]]:
    """What is written after each prompt, ROUND tokens at a time: who is done leaves the batch."""
    width, held = inputs["input_ids"].shape[1], inputs["past_key_values"]
    rows = torch.arange(len(inputs["input_ids"]))
    stops = torch.tensor(config.eos_token_id, device=model.device)
    made: dict[int, list[int]] = {}
    for start in range(0, config.max_new_tokens, ROUND):
        part = copy.copy(config)
        part.max_new_tokens = min(ROUND, config.max_new_tokens - start)
        ids = model.generate(**inputs, generation_config=part, **how)
        made |= zip(rows.tolist(), ids[:, width:].tolist(), strict=True)
        done = torch.isin(ids[:, width:], stops).any(1) | how["stopping_criteria"](ids, None)
        left = (~done).nonzero().flatten()
        if not len(left):
            break
        rows = rows[left.cpu()]
        held.batch_select_indices(left)
        mask = inputs["attention_mask"]
        seen = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])], 1)
        inputs |= {"input_ids": ids[left], "attention_mask": seen[left]}
    return [made[i] for i in range(len(made))]


def _until(ids: list[int], stops: list[int]) -> list[int]:
    """The ids before the first stop: the end of a chat's turn need not be a special token."""
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


def batches(
    ids: list[list[int]], size: int, begins: list[list[int]] | None = None
) -> list[tuple[list[int], list[int]]]:
    """Which rows go together, shortest first: `size` of them, and fewer where they are so long that
    memory would not do.

    Args:
        begins: of each row what is read once for all that begin so; None: nothing.
    Returns:
        what all rows of a batch begin with, and the rows.
    """
    begins = begins or [[] for _ in ids]
    out: list[tuple[list[int], list[int]]] = []
    for i in sorted(range(len(ids)), key=lambda i: (begins[i], len(ids[i]))):
        full = out and (len(out[-1][1]) + 1) * max(LONG, len(ids[i])) > size * LONG
        if not out or full or out[-1][0] != begins[i]:
            out.append((begins[i], []))
        out[-1][1].append(i)
    return out


def shared_beginnings(ids: list[list[int]], least: int) -> list[list[int]]:
    """Of each row the longest beginning, short of the whole, that `least` rows or more have in
    common: fewer than a batch would cost more in small batches than it saves."""
    ends = [range(SHARED_STEP, min(len(row), LONG), SHARED_STEP) for row in ids]
    found = Counter(tuple(row[:n]) for row, some in zip(ids, ends, strict=True) for n in some)
    out = []
    for row, some in zip(ids, ends, strict=True):
        shared = [n for n in some if found[tuple(row[:n])] >= least]
        out.append(row[: max(shared, default=0)])
    return out


def _padded(
    tokenizer: "PreTrainedTokenizerBase", rows: list[list[int]], shared: int, device: Any
) -> dict[str, Any]:
    """Rows as inputs of one width, padded on the left of what comes after the `shared` tokens that
    they all begin with."""
    padded = tokenizer.pad({"input_ids": [row[shared:] for row in rows]}, return_tensors="pt")
    begins = torch.tensor([row[:shared] for row in rows], dtype=torch.long)
    ids = torch.cat([begins, padded["input_ids"]], 1)
    mask = torch.cat([torch.ones_like(begins), padded["attention_mask"]], 1)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _read(model: "PreTrainedModel", begins: list[int]) -> "Cache":
    """The model's cache after these tokens, if any, for one row."""
    held = cache.with_room(model.config)
    if begins:
        ids = torch.tensor([begins], device=model.device)
        model(input_ids=ids, past_key_values=held, logits_to_keep=1)
    return held


def _copied(read: "Cache", rows: int) -> "Cache":
    """A cache from which so many rows go on after what was read once."""
    held = copy.deepcopy(read)
    held.batch_repeat_interleave(rows)
    return held


def with_room(
    p: Settings, tokenizer: "PreTrainedTokenizerBase", expected: Iterable[str]
) -> Settings:
    """The params, with max_new_tokens raised where the longest of the expected answers has more, as
    far as training teaches answers (max_target_tokens)."""
    coded = tokenizer([*expected], add_special_tokens=False)["input_ids"]
    needed = min(max(map(len, coded), default=0), p.max_target_tokens) + SPARE_TOKENS
    return p.model_copy(update={"max_new_tokens": max(p.max_new_tokens, needed)})


class Known(NamedTuple):
    """How well a model knows one true answer: each token given the true ones before it."""

    right: int  # tokens that greedy decoding would write
    tokens: int  # that the answer has
    nats: float  # negative log-likelihood of them all


def known_answers(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: list[Row],
    p: Recipe,
    progress: str = "",
) -> list[Known]:
    """How well a model knows each row's answer, where that is a text: without judging wording."""
    out = [Known(0, 0, 0.0)] * len(rows)
    for chosen, logits, labels in _read_answers(model, tokenizer, rows, p, progress):
        counted = labels != train.IGNORED
        right = (logits.argmax(-1) == labels) & counted
        nats = torch.nn.functional.cross_entropy(
            logits.float().transpose(1, 2), labels, ignore_index=train.IGNORED, reduction="none"
        )
        sums = (of.sum(1).tolist() for of in (right, counted, nats))
        for i, found in zip(chosen, zip(*sums, strict=True), strict=True):
            out[i] = Known(*found)
    return out


def token_accuracy(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: list[Row],
    p: Recipe,
    progress: str = "",
) -> list[float]:
    """Per row the share of its answer's tokens that greedy decoding would write; see Known."""
    known = known_answers(model, tokenizer, rows, p, progress)
    return [one.right / one.tokens for one in known]


def mean_loss(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", rows: list[Row], p: Recipe
) -> float:
    """Mean cross-entropy (nats) over all answer tokens of some rows, without training on them."""
    known = known_answers(model, tokenizer, rows, p, "reading answers")
    return sum(one.nats for one in known) / sum(one.tokens for one in known)


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
    for _, chosen in Bar(groups, desc=progress):
        inputs = train.collate([items[i] for i in chosen], tokenizer)
        labels = inputs.pop("labels")
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        with models.arithmetic(p):
            logits = model(**inputs, logits_to_keep=labels.shape[1] + 1).logits[:, :-1]
        yield chosen, logits.cpu(), labels
