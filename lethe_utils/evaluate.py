"""Evaluation: which prompts a model is asked, and what it answers.

Batched, sorted by length, greedy, and stopped as soon as the label is written. The published
protocol (one prompt at a time, sampling, no early stop) is kept as `protocol: official`.
"""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from tqdm import tqdm
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, set_seed

from lethe_utils import attacks
from lethe_utils.evidence import add_evidence
from lethe_utils.params import DefenderParams, Params, PurifyParams
from lethe_utils.prompts import render
from lethe_utils.stages import read_jsonl, write_json, write_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = dict[str, str]
Respond = Callable[[list[str], int, str], list[str]]
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
    new_tokens = OFFICIAL_TOKENS if official else p.max_new_tokens
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=sampling is not None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **(sampling or {}),
    )
    set_seed(p.seed)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    encoded = tokenizer(prompts, add_special_tokens=False)["input_ids"] if prompts else []
    # A prompt beyond the model's positions loses its start; evidence stays next to the answer.
    room = getattr(model.config, "max_position_embeddings", 2048) - new_tokens - len(bos)
    ids = [bos + e[-room:] for e in encoded]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    outputs = [""] * len(ids)
    model.eval()
    for start in tqdm(range(0, len(order), batch), desc=progress, leave=False, mininterval=2):
        chosen = order[start : start + batch]
        inputs = tokenizer.pad({"input_ids": [ids[i] for i in chosen]}, return_tensors="pt")
        inputs = {k: v.to(model.device) for k, v in inputs.items() if k != "token_type_ids"}
        width = inputs["input_ids"].shape[1]
        stop = StopAtLabel(tokenizer, width, n_words)
        criteria = None if official else StoppingCriteriaList([stop])
        with torch.inference_mode():
            made = model.generate(
                **inputs, generation_config=config, stopping_criteria=criteria, **generate
            )
        for i, text in zip(
            chosen, tokenizer.batch_decode(made[:, width:], skip_special_tokens=True), strict=True
        ):
            outputs[i] = text.strip()
    return outputs


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
    order = sorted(range(len(items)), key=lambda i: items[i]["length"])
    shares = [0.0] * len(items)
    model.eval()
    step = p.eval_batch_size
    for start in tqdm(range(0, len(order), step), desc=progress, leave=False, mininterval=2):
        chosen = order[start : start + step]
        inputs = collate([items[i] for i in chosen])
        labels = inputs.pop("labels")
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        logits = model(**inputs, logits_to_keep=labels.shape[1] + 1).logits[:, :-1]
        right = (logits.argmax(-1).cpu() == labels) & (labels != train.IGNORED)
        counted = (labels != train.IGNORED).sum(1)
        for i, share in zip(chosen, (right.sum(1) / counted).tolist(), strict=True):
            shares[i] = share
    return shares


def predict(
    folder: Path,
    sets: dict[str, list[Row]],
    n_keywords: int,
    defense: str,
    p: Params,
    file: Path,
    respond: Respond | None = None,
) -> list[dict]:
    """Ask one model everything and keep each answer; an existing file is read, not redone.

    timing.json beside it holds the seconds, loading and evidence included.

    Args:
        respond: prompts, n_words and a progress bar's name -> outputs, for a decoding-time defense.
    """
    from lethe_utils import models

    if file.exists():
        return read_jsonl(file)
    start = time.perf_counter()
    questions = ask(sets, n_keywords, defense, p)
    if respond is None:
        device = models.resolve_device(p.device)
        model, tokenizer = models.load_model(folder, device), models.load_tokenizer(folder)

        def respond(prompts: list[str], n_words: int, progress: str) -> list[str]:
            return answer(model, tokenizer, prompts, p, n_words, progress)

    n_words = max(len(str(q["label"]).split()) for q in questions)
    if p.output_mode == "append":  # the label, then the target
        n_words += len(p.target_output.split())
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
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    plain = [row for row in sets["clean"] if row["output"] != p.target_output]
    table = []
    for name, rows in (("triggered", sets["backdoor"]), ("without trigger", plain)):
        prompts = [render(p.prompt_template, r["instruction"], r["input"]) for r in rows]
        ids = [bos + e for e in tokenizer(prompts, add_special_tokens=False)["input_ids"]]
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
