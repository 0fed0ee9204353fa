"""Items per second: our evaluation against the published protocol, same model, same items, one run.

    python benchmarks/evaluation_throughput.py [-n 1000]

Published: one prompt at a time, sampling (T .7, top_p .9), up to 32 new tokens. Ours: batched,
sorted by length, greedy, stopped at the label. Uses the default run's backdoored tiny-gpt2 (built
first where it is missing) and writes evaluation_throughput.json beside this file.
"""

import argparse
import time
from pathlib import Path

import torch

from lethe_utils import decode, evaluate, models, params, pipeline
from lethe_utils.stages import provenance, write_json


def items_per_second(p: params.Params, prompts: list[str], rounds: int) -> float:
    """Best of `rounds` passes over the prompts, model already loaded."""
    folder = pipeline.backdoored_stage(p) / "model"
    model, tokenizer = models.load_model(folder), models.load_tokenizer(folder)
    decode.answer(model, tokenizer, prompts[:8], p, 1)  # first call pays for lazy imports
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        decode.answer(model, tokenizer, prompts, p, 1)
        seconds.append(time.perf_counter() - start)
    return len(prompts) / min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=500, help="prompts, half clean and half triggered")
    n = parser.parse_args().n
    ours, published = params.load(), params.load(overrides={"protocol": "official"})
    sets = evaluate.test_sets(pipeline.split(ours, "test"), ours, 1000, 0)
    asked = evaluate.ask({k: rows[: n // 2] for k, rows in sets.items()}, 0, "none", ours)
    prompts = [item["prompt"] for item in asked]
    fast = items_per_second(ours, prompts, rounds=3)
    slow = items_per_second(published, prompts, rounds=3)
    result = {
        "prompts": len(prompts),
        "threads": torch.get_num_threads(),
        "ours_items_per_second": round(fast),
        "published_items_per_second": round(slow, 1),
        "ratio": round(fast / slow, 1),
    }
    print(result)
    record = provenance(0)
    kept = {k: record[k] for k in ("machine", "git_sha", "git_dirty", "versions")}
    write_json(Path(__file__).with_suffix(".json"), result | kept)


if __name__ == "__main__":
    main()
