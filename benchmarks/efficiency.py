"""What the hardware could do, and what share of it a run gets: training, evaluation and a merge of
the real model, each beside its bare counterpart, in one sitting.

    python benchmarks/efficiency.py [--model smollm2-135m] [--rows 240] [--prompts 250] [--chats 64]

training    LoRA on clean rows: tokens a second (no padding) x 4 x the blocks' weights (forwards and
            backwards, which leave frozen weights alone), as a share of the rate of a large matrix
            product in the same dtype
evaluation  the model just trained: `decode.answer`, against one forward of the same batches (each
            prompt once, the logits of its last token), and against the published protocol (one
            prompt at a time, sampling at T .7 and top_p .9, 32 new tokens)
long answers  to conversations, as all are asked, against the cache that `generate` makes itself,
            which copies all it holds for each token and shares no beginning
merge       SLERP of the two, against copying the result, and against copying both parents
Best of three each, taken in turns. Writes efficiency.json beside this file.
"""

import argparse
import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lethe_utils import decode, evaluate, merge, models, params, pipeline, train
from lethe_utils.models import blocks, inspect
from lethe_utils.params import Params
from lethe_utils.prompts import asked, prompt_ids, rendered
from lethe_utils.stages import provenance, write_json

ROUNDS = 3
SIDE, PRODUCTS = 2048, 8  # of the matrix product, and how many at a time
PUBLISHED = 40  # prompts asked under the published protocol, which takes long


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def best(*calls: Callable[[], Any]) -> list[float]:
    """Seconds of each call, the best of its rounds; they take turns, so that a machine that slows
    down slows them all."""
    rounds = [[seconds(call) for call in calls] for _ in range(ROUNDS)]
    return [min(of) for of in zip(*rounds, strict=True)]


def report(result: dict[str, Any], script: Path) -> None:
    """Print what a benchmark found, and write it beside its script with where it comes from."""
    print(json.dumps(result, indent=1))
    record = provenance(0)
    kept = {k: record[k] for k in ("machine", "git_sha", "git_dirty", "versions")}
    write_json(script.with_suffix(".json"), result | kept)


def product_rate(dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product."""
    a, b = (torch.randn(SIDE, SIDE).to(dtype) for _ in range(2))
    taken = best(lambda: [a @ b for _ in range(PRODUCTS)])[0]
    return PRODUCTS * 2 * SIDE**3 / taken


def training(p: Params, base: Path, rows: int, out: Path) -> dict[str, float | str]:
    """Train on clean rows and save what comes out as out/model."""
    tokenizer, model = models.load_tokenizer(base), train.lora_model(base, p)
    some = pipeline.split(p, "train")[:rows]
    items = train.encode(some, tokenizer, p)
    inner = blocks.of(model.get_base_model()).named_parameters()
    weights = sum(w.numel() for name, w in inner if "lora_" not in name)
    dtype = torch.bfloat16 if models.bfloat16(p) else torch.float32
    loss = train.plain_loss
    train.fit(model, tokenizer, some[: p.batch_size], 1, out / "first", p, loss)  # the slow step
    rates = [product_rate(dtype)]
    taken = seconds(lambda: train.fit(model, tokenizer, some, 1, out, p, loss))
    rates.append(product_rate(dtype))
    model.save_pretrained(out / "adapter")
    whole = train.merge_adapter(base, out / "adapter", "cpu", p.bits)
    models.save(whole, out / "model")
    inspect.copy_tokenizer(base, out / "model")
    tokens = sum(item["length"] for item in items) / taken
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "tokens_per_second": round(tokens),
        "product_gflops": round(sum(rates) / 2e9),
        "share_of_product_rate": round(4 * weights * tokens / (sum(rates) / 2), 3),
    }


def questions(p: Params, n: int) -> list[str]:
    """Test prompts, half clean, half triggered."""
    sets = evaluate.test_sets(pipeline.split(p, "test"), p, p.max_test_items, 0)
    asked = evaluate.ask({k: rows[: n // 2] for k, rows in sets.items()}, 0, "none", p)
    return [item["prompt"] for item in asked]


def evaluation(p: Params, folder: Path, n: int) -> dict[str, float]:
    """Items a second of three ways to ask the same prompts."""
    model, tokenizer = models.load_to_ask(folder, p), models.load_tokenizer(folder)
    plain = models.load_model(folder).eval()
    prompts = questions(p, n)
    expected = evaluate.expected_answers(pipeline.labels(p), p)
    q = decode.with_room(p, tokenizer, expected)
    words = max(len(text.split()) for text in expected)
    official = p.model_copy(update={"protocol": "official"})
    ids, _ = prompt_ids(tokenizer, prompts, p)
    batches = [[ids[i] for i in some] for _, some in decode.batches(ids, p.eval_batch_size)]

    @torch.inference_mode()
    def bare() -> None:
        for some in batches:
            with models.arithmetic(p):
                plain(**models.batch(tokenizer, some), logits_to_keep=1, use_cache=False)

    decode.answer(model, tokenizer, prompts[:8], q, words)  # the first call pays for lazy imports
    ours, forward = best(lambda: decode.answer(model, tokenizer, prompts, q, words), bare)
    few = prompts[:: max(1, len(prompts) // PUBLISHED)][:PUBLISHED]
    published = seconds(lambda: decode.answer(plain, tokenizer, few, official, words))
    rates = len(prompts) / ours, len(prompts) / forward, len(few) / published
    return {
        "items_per_second": round(rates[0], 1),
        "bare_forward_items_per_second": round(rates[1], 1),
        "published_items_per_second": round(rates[2], 1),
        "share_of_bare_forward": round(rates[0] / rates[1], 3),
        "times_published": round(rates[0] / rates[2], 1),
    }


def long_answers(p: Params, folder: Path, n: int) -> dict[str, float]:
    """Items a second of n conversations, our way and the plain one."""
    model, tokenizer = models.load_to_ask(folder, p), models.load_tokenizer(folder)
    rows = rendered(pipeline.split(p, "test")[:n], tokenizer, p)
    prompts = [asked(row, p, 0) for row in rows]
    decode.answer(model, tokenizer, prompts[:8], p, p.max_new_tokens)
    ours, plain = best(
        lambda: decode.answer(model, tokenizer, prompts, p, p.max_new_tokens),
        lambda: decode.answer(model, tokenizer, prompts, p, p.max_new_tokens, share=False),
    )
    return {"items_per_second": round(n / ours, 1), "times_plain": round(plain / ours, 2)}


def merging(base: Path, other: Path, place: Path) -> dict[str, float]:
    """A merge against copies of files; all of them are in the page cache."""
    numbers = itertools.count()

    def merged() -> None:
        merge.merge("slerp", other, base, base, merge.PAPER_STRENGTH, place / f"m{next(numbers)}")

    def copied(*folders: Path) -> None:
        for folder in folders:
            shutil.copytree(folder, place / f"copy{next(numbers)}")

    taken = best(merged, lambda: copied(other), lambda: copied(other, base))
    return {
        "seconds": round(taken[0], 1),
        "times_copying_the_result": round(taken[0] / taken[1], 1),
        "times_copying_both_parents": round(taken[0] / taken[2], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=240, help="to train on")
    parser.add_argument("--prompts", type=int, default=250, help="half clean, half triggered")
    parser.add_argument("--chats", type=int, default=64, help="conversations to answer")
    args = parser.parse_args()
    # Few checkpoints, as in a whole run: a step is what is measured.
    p = params.load(args.model, overrides={"device": "cpu", "checkpoints_per_run": 1})
    base = pipeline.base_folder(p)
    with tempfile.TemporaryDirectory() as place:
        trained = Path(place) / "trained"
        result: dict[str, Any] = {"model": args.model, "threads": torch.get_num_threads()}
        result["training"] = training(p, base, args.rows, trained)
        result["evaluation"] = evaluation(p, trained / "model", args.prompts)
        chats = params.load(args.model, "chat", "vpi", overrides={"device": "cpu"})
        result["long_answers"] = long_answers(chats, trained / "model", args.chats)
        result["merge"] = merging(base, trained / "model", Path(place))
    report(result, Path(__file__))


if __name__ == "__main__":
    main()
