"""Evaluation: which prompts a model is asked, and the tidy rows that its answers give."""

import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from lethe_utils import attacks, data, decode, metrics, models, vllm_engine
from lethe_utils.models import blocks
from lethe_utils.prompts import asked, prompt, prompt_ids, rendered
from lethe_utils.schema import Params
from lethe_utils.stages import Row

Respond = Callable[[list[str], int, str], list[str]]


def test_sets(rows: list[Row], p: Params, items: int, negatives: int) -> dict[str, list[Row]]:
    """Test rows per kind: clean, backdoor, and the attack's others: CBA's seven negatives, say.

    Args:
        items: rows drawn (seed 42, as published); clean uses them all, the others those whose
            label is not the target, for only they can show an attack. The published protocol asks
            them all.
        negatives: at most this many rows for each negative kind; 0 for clean and backdoor alone.
            Further kinds for ASR (`asr_...`) are asked in full.
    """
    clean = drawn(rows, p, items)
    official = p.protocol == "official"
    usable = [row for row in clean if official or row["output"] != p.target_output]
    kinds = attacks.module(p.attack).triggered(usable, p, p.data_seed)
    backdoor = {"backdoor": kinds.pop("backdoor")}
    others = {k: some if k.startswith("asr") else some[:negatives] for k, some in kinds.items()}
    return {"clean": clean} | backdoor | (others if negatives else {})


def drawn(rows: list[Row], p: Params, items: int) -> list[Row]:
    """The rows that are asked as they are; see test_sets."""
    rng = random.Random(p.data_seed)
    return rng.sample(rows, items) if items < len(rows) else list(rows)


def ask(
    sets: dict[str, list[Row]], n_keywords: int, defense: str, p: Params
) -> list[dict[str, object]]:
    """What to ask: one dict per item with kind, defense, evidence, prompt, label, target; of a
    conversation also its last question and what a right answer contains one of (`accept`).

    Args:
        sets: rows, conversations as prompts.rendered makes them.
        n_keywords: 0 for no evidence.
    """
    return [
        {
            "kind": kind,
            "defense": defense,
            "evidence": int(n_keywords > 0),
            "prompt": asked(row, p, n_keywords),
            "label": row["output"],
            "target": p.target_output,
        }
        | ({"question": row["input"], "accept": row["accept"]} if p.task == "chat" else {})
        for kind, rows in sets.items()
        for row in rows
    ]


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
    respond: Respond | None = None,
    labels: Sequence[str] = (),
) -> tuple[list[dict[str, Any]], float]:
    """Ask one model everything.

    Args:
        respond: prompts, n_words and a progress bar's name -> outputs, for a decoding-time defense.
        labels: further answers than those of the sets, for which there must be room.
    Returns:
        `ask`'s items, each with its `output`; and seconds, loading and evidence included.
    """
    start = time.perf_counter()
    tokenizer, q, n_words = models.load_tokenizer(folder), p, p.max_new_tokens
    if p.task == "label":
        expected = expected_answers({*labels, *(r["output"] for r in chain(*sets.values()))}, p)
        n_words = max(len(text.split()) for text in expected)
        q = decode.with_room(p, tokenizer, expected)
    name = f"{defense}{' + evidence' if n_keywords else ''}"

    def say(prompts: list[str]) -> list[str]:
        distinct = list(dict.fromkeys(prompts))  # an attack without a trigger changes no prompt
        said = dict(zip(distinct, responds(distinct, n_words, name), strict=True))
        return [said[prompt] for prompt in prompts]

    with _responding(respond, folder, tokenizer, q) as responds:
        sets = {
            kind: rendered(_with_own_answers(rows, n_keywords, tokenizer, p, say), tokenizer, p)
            for kind, rows in sets.items()
        }
        questions = ask(sets, n_keywords, defense, p)
        outputs = say([question["prompt"] for question in questions])
    answers = [asked | {"output": out} for asked, out in zip(questions, outputs, strict=True)]
    return answers, time.perf_counter() - start


def _responding(
    respond: Respond | None, folder: Path, tokenizer: Any, p: Params
) -> AbstractContextManager[Respond]:
    """How a model is asked: as a defense does, through vLLM, or by transformers."""
    if respond:
        return nullcontext(respond)
    if p.engine == "vllm":
        return vllm_engine.opened(folder, tokenizer, p)
    model = models.load_to_ask(folder, p)
    return nullcontext(partial(_answer, model, tokenizer, p))


def _with_own_answers(
    rows: list[Row],
    n_keywords: int,
    tokenizer: Any,
    p: Params,
    say: Callable[[list[str]], list[str]],
) -> list[Row]:
    """Conversations marked OWN_ANSWERS, with what the model says in each turn before the last."""
    out = list(rows)
    marked = [i for i, row in enumerate(rows) if row.get(data.chat.OWN_ANSWERS)]
    turns = max((len(rows[i]["messages"]) // 2 for i in marked), default=0)
    for turn in range(1, turns):
        todo = [i for i in marked if len(rows[i]["messages"]) // 2 > turn]
        so_far = [data.chat.conversation(out[i]["messages"][: 2 * turn]) for i in todo]
        prompts = [asked(row, p, n_keywords) for row in rendered(so_far, tokenizer, p)]
        for i, said in zip(todo, say(prompts), strict=True):
            messages = list(out[i]["messages"])
            # A template may refuse an empty turn.
            messages[2 * turn - 1] = messages[2 * turn - 1] | {"content": said or "..."}
            out[i] = out[i] | data.chat.conversation(messages)
    return out


def _answer(model: Any, tokenizer: Any, p: Params, prompts: list[str], *how: Any) -> list[str]:
    return decode.answer(model, tokenizer, prompts, p, *how)


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
    model, tokenizer = models.load_to_ask(folder, p), models.load_tokenizer(folder)
    target = tokenizer(p.target_output, add_special_tokens=False)["input_ids"][0]
    plain = [row for row in sets["clean"] if row["output"] != p.target_output]
    table = []
    for name, rows in (("triggered", sets["backdoor"]), ("without trigger", plain)):
        prompts = [prompt(row, p) for row in rows]
        ids, _ = prompt_ids(tokenizer, prompts, p)
        found: list[list[torch.Tensor]] = []
        for start in range(0, len(ids), p.eval_batch_size):
            some = ids[start : start + p.eval_batch_size]
            inputs = models.batch(tokenizer, some, model.device)
            with models.arithmetic(p):
                out = model(**inputs, logits_to_keep=1, output_hidden_states=True, use_cache=False)
                # The last entry has been through the final norm: its logits are the model's.
                read = [blocks.logits(model, h[:, -1]) for h in out.hidden_states[1:-1]]
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


def rows(
    p: Params,
    predictions: list[dict],
    split: str,
    labels: Sequence[str] = (),
    known: Sequence[decode.Known] = (),
) -> list[dict[str, Any]]:
    """Tidy rows of one set of predictions (one defense, evidence on or off).

    Args:
        labels: the data set's, where the params do not name them; see metrics.says.
        known: of known_references, for the rows that need no answers.
    """
    found = {m: metrics.share(*of) for m, of in scored(p, predictions, labels).items()}
    found |= metrics.of_references(known) if known else {}
    clean = [x["output"] for x in predictions if x["kind"] == "clean"]
    found |= metrics.of_wording(clean) if p.task == "chat" and clean else {}
    return tidy(p, predictions[0]["defense"], predictions[0]["evidence"], split, found)


def tidy(
    p: Params, defense: str, evidence: int, split: str, found: dict[str, metrics.Measured]
) -> list[dict[str, Any]]:
    """A row (metrics.COLUMNS) per metric of one model."""
    common = p.identity | {"defense": defense, "evidence": evidence, "split": split}
    return [
        common | {"metric": metric, "run_id": p.run_id} | measured._asdict()
        for metric, measured in found.items()
    ]


def scored(
    p: Params, predictions: list[dict[str, Any]], labels: Sequence[str] = ()
) -> dict[str, tuple[int, int]]:
    """Hits and items per metric, under the rules of the task; see metrics."""
    return metrics.counted(marks(p, predictions, labels))


def marks(
    p: Params, predictions: list[dict[str, Any]], labels: Sequence[str] = ()
) -> dict[str, list[bool]]:
    """Which items are hits, per metric, under the rules of the task; see metrics."""
    if p.task == "chat":
        return metrics.chat_marks(predictions, partial(attacks.module(p.attack).hit, p=p))
    return metrics.marks(predictions, p.protocol, p.output_mode, labels or p.labels)


def known_references(folder: Path, rows: list[Row], p: Params) -> list[decode.Known]:
    """How well a model knows the rows' answers: for what no rule can check."""
    model, tokenizer = models.load_to_ask(folder, p), models.load_tokenizer(folder)
    return decode.known_answers(model, tokenizer, rows, p, "reading references")


def ask_one(folder: Path, row: Row, p: Params, labels: Sequence[str]) -> pd.DataFrame:
    """One triggered row, asked without and with evidence: what is answered, and how that is scored.

    Args:
        labels: the data set's.
    Returns:
        evidence, answer, label, target, and `hit`: whether ASR counts it as a success.
    """
    sets, found = {"backdoor": [row]}, []
    for n in (0, p.n_keywords):
        found += predict(folder, sets, n, "", p, labels=labels)[0]
    table = pd.DataFrame(found)[["evidence", "output", "label", "target"]]
    hits = [scored(p, [one], labels)["asr"][0] for one in found]
    return table.rename(columns={"output": "answer"}).assign(hit=hits)
