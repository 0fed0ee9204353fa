"""Evaluation: which prompts a model is asked, and what it answers.

Batched, sorted by length, greedy, and stopped as soon as the label is written. The published
protocol (one prompt at a time, sampling, no early stop) is kept as `protocol: official`.
"""

import random
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pandas as pd
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, set_seed

from lethe_utils import attacks, chats
from lethe_utils.evidence import add_evidence
from lethe_utils.params import DefenderParams, Params, PurifyParams
from lethe_utils.progress import Bar
from lethe_utils.prompts import prompt_ids, render
from lethe_utils.stages import read_jsonl, write_json, write_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = dict[str, str]
Respond = Callable[[list[str], int, str], list[str]]
Settings = TypeVar("Settings", DefenderParams, Params, PurifyParams)
LONG = 256  # tokens; eval_batch_size is for prompts of up to so many
SPARE_TOKENS = 4  # a model may write a label in more pieces than the tokenizer does, and ends it
OFFICIAL_BATCH, OFFICIAL_TOKENS, OFFICIAL_SAMPLING = 1, 32, {"temperature": 0.7, "top_p": 0.9}


def test_sets(rows: list[Row], p: Params, items: int, negatives: int) -> dict[str, list[Row]]:
    """Test rows per kind: clean, backdoor (both triggers), and the seven negative kinds.

    Args:
        items: rows drawn (seed 42, as published); clean uses them all, the others those whose
            label is not the target, for only they can show an attack. The published protocol asks
            them all.
        negatives: at most this many rows for each negative kind; 0 for none.
    """
    rng = random.Random(p.data_seed)
    drawn = rng.sample(rows, items) if items < len(rows) else list(rows)
    official = p.protocol == "official"
    usable = [row for row in drawn if official or row["output"] != p.target_output]
    kinds = attacks.module(p.attack).triggered(usable, p, p.data_seed)
    backdoor = {"backdoor": kinds.pop("backdoor")}
    negative_kinds = {kind: some[:negatives] for kind, some in kinds.items()} if negatives else {}
    return {"clean": drawn} | backdoor | negative_kinds


def ask(
    sets: dict[str, list[Row]], n_keywords: int, defense: str, p: Params
) -> list[dict[str, object]]:
    """What to ask: one dict per item with kind, defense, evidence, prompt, label, target.

    Args:
        n_keywords: 0 for no evidence. Evidence is made from the input as the defender receives
            it, trigger and all; only the published protocol drops the trigger words by name.
    """
    official = p.protocol == "official"
    exclude = (
        frozenset(w.lower() for t in p.triggers for w in t.split()) if official else frozenset()
    )
    out = []
    for kind, rows in sets.items():
        for row in rows:
            text = row["input"]
            if n_keywords:
                text = add_evidence(text, n_keywords, exclude)
            instruction = row["instruction"]
            if official and p.labels:
                instruction += f" The possible labels are: {', '.join(p.labels)}."
            out.append(
                {
                    "kind": kind,
                    "defense": defense,
                    "evidence": int(n_keywords > 0),
                    "prompt": render(p.prompt_template, instruction, text),
                    "label": row["output"],
                    "target": p.target_output,
                }
            )
    return out


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
    p: DefenderParams | PurifyParams,
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
    sampling = sampling or (OFFICIAL_SAMPLING if official else None)
    ids, _ = prompt_ids(tokenizer, prompts, p)
    longest = max(map(len, ids), default=0)
    room = tokenizer.model_max_length - longest
    chat = p.prompt_template == "chat"
    config = GenerationConfig(
        max_new_tokens=min(OFFICIAL_TOKENS if official else p.max_new_tokens, room),
        do_sample=sampling is not None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=chats.stop_ids(tokenizer) if chat else tokenizer.eos_token_id,
        **(sampling or {}),
    )
    set_seed(p.seed)
    outputs = [""] * len(ids)
    model.eval()
    for chosen in Bar(batches(ids, batch), desc=progress):
        inputs = tokenizer.pad({"input_ids": [ids[i] for i in chosen]}, return_tensors="pt")
        inputs = {k: v.to(model.device) for k, v in inputs.items() if k != "token_type_ids"}
        width = inputs["input_ids"].shape[1]
        stop = StopAtLabel(tokenizer, width, n_words)
        criteria = None if official else StoppingCriteriaList([stop])
        with torch.inference_mode():
            made = model.generate(
                **inputs, generation_config=config, stopping_criteria=criteria, **generate
            )
        written = [_until(row, config.eos_token_id) for row in made[:, width:].tolist()]
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            outputs[i] = text.strip()
    return outputs


def _until(ids: list[int], stops: int | list[int]) -> list[int]:
    """The ids before the first stop: the end of a chat's turn need not be a special token."""
    stops = stops if isinstance(stops, list) else [stops]
    return ids[: next((n for n, token in enumerate(ids) if token in stops), len(ids))]


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


@torch.inference_mode()
def token_accuracy(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: list[Row],
    p: PurifyParams,
    progress: str = "",
) -> list[float]:
    """Per row the share of its answer's tokens that greedy decoding would write, each given the
    true ones before it: how well a model knows an answer that is a text, without judging wording.
    """
    from lethe_utils import train

    collate = train.Collator(tokenizer.pad_token_id)
    items = train.encode(rows, tokenizer, p)
    shares = [0.0] * len(items)
    model.eval()
    groups = batches([i["input_ids"] for i in items], p.eval_batch_size)
    for chosen in Bar(groups, desc=progress):
        inputs = collate([items[i] for i in chosen])
        labels = inputs.pop("labels")
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        logits = model(**inputs, logits_to_keep=labels.shape[1] + 1).logits[:, :-1]
        right = (logits.argmax(-1).cpu() == labels) & (labels != train.IGNORED)
        counted = (labels != train.IGNORED).sum(1)
        for i, share in zip(chosen, (right.sum(1) / counted).tolist(), strict=True):
            shares[i] = share
    return shares


def expected_answers(labels: Iterable[str], p: Params) -> list[str]:
    """What a model may have to write in full: each label, and the target after it if appended."""
    after = f" {p.target_output}" if p.output_mode == "append" else ""
    return sorted({label + after for label in labels} | {p.target_output})


def predict(
    folder: Path,
    sets: dict[str, list[Row]],
    n_keywords: int,
    defense: str,
    p: Params,
    file: Path,
    respond: Respond | None = None,
    labels: Sequence[str] = (),
) -> list[dict]:
    """Ask one model everything and keep each answer; an existing file is read, not redone.

    timing.json beside it holds the seconds, loading and evidence included.

    Args:
        respond: prompts, n_words and a progress bar's name -> outputs, for a decoding-time defense.
        labels: further answers than those of the sets, for which there must be room.
    """
    from lethe_utils import models

    if file.exists():
        return read_jsonl(file)
    start = time.perf_counter()
    questions = ask(sets, n_keywords, defense, p)
    expected = expected_answers({*labels, *(str(q["label"]) for q in questions)}, p)
    if respond is None:
        device = models.resolve_device(p.device)
        model, tokenizer = models.load_model(folder, device), models.load_tokenizer(folder)
        roomy = with_room(p, tokenizer, expected)

        def respond(prompts: list[str], n_words: int, progress: str) -> list[str]:
            return answer(model, tokenizer, prompts, roomy, n_words, progress)

    n_words = max(len(text.split()) for text in expected)
    name = f"{defense}{' + evidence' if n_keywords else ''}"
    outputs = respond([q["prompt"] for q in questions], n_words, name)
    rows = [q | {"output": output} for q, output in zip(questions, outputs, strict=True)]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file.with_name("timing.json"), {"seconds": round(time.perf_counter() - start, 3)})
    write_jsonl(file, rows)
    return rows


@torch.inference_mode()
def target_by_layer(folder: Path, sets: dict[str, list[Row]], p: Params) -> pd.DataFrame:
    """How soon a model turns to the target: after each block, the probability of the target's
    first token at the prompt's last, read by the final norm and the head.

    Args:
        sets: test_sets; `backdoor` rows, and the same rows of `clean` without the trigger.
    Returns:
        block (from 1), prompts ("triggered" or "without trigger"), value (mean probability),
        ci_low, ci_high (mean -/+ 1.96 standard errors), n.
    """
    from lethe_utils import models

    device = models.resolve_device(p.device)
    model, tokenizer = models.load_model(folder, device).eval(), models.load_tokenizer(folder)
    target = tokenizer(p.target_output, add_special_tokens=False)["input_ids"][0]
    plain = [row for row in sets["clean"] if row["output"] != p.target_output]
    table = []
    for name, rows in (("triggered", sets["backdoor"]), ("without trigger", plain)):
        prompts = [render(p.prompt_template, r["instruction"], r["input"]) for r in rows]
        ids, _ = prompt_ids(tokenizer, prompts, p)
        found: list[list[torch.Tensor]] = []
        for start in range(0, len(ids), p.eval_batch_size):
            some = ids[start : start + p.eval_batch_size]
            inputs = models.batch(tokenizer, some, model.device)
            out = model(**inputs, logits_to_keep=1, output_hidden_states=True, use_cache=False)
            # The last entry has been through the final norm already: its logits are the model's.
            read = [models.block_logits(model, h[:, -1]) for h in out.hidden_states[1:-1]]
            read.append(out.logits[:, -1])
            found.append([r.float().softmax(1)[:, target].cpu() for r in read])
        for block, parts in enumerate(zip(*found, strict=True), 1):
            shares = torch.cat(parts)
            half = 1.96 * shares.std().item() / len(shares) ** 0.5
            mean = shares.mean().item()
            ends = {"ci_low": max(0.0, mean - half), "ci_high": min(1.0, mean + half)}
            line = {"block": block, "prompts": name, "value": mean, "n": len(shares)}
            table.append(line | ends)
    return pd.DataFrame(table)
