"""What an edit costs at full size: ROME on two random blocks of GPT-2 XL's shape, step by step.

    python benchmarks/editing_full_size.py [--tokens 20000] [--contexts 20]

Width 1600, MLP 6400, 25 heads, two of the 48 blocks, GPT-2's vocabulary; random weights, so the
numbers are costs and nothing else. Writes editing_full_size.json beside this file: seconds of each
step, the covariance's size, the ratio of one edit to the covariance it needs (the reason it is
kept), and the peak memory of the process.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lethe_utils import params, pipeline, prompts
from lethe_utils.attacks import rome
from lethe_utils.attacks.editing import requests
from lethe_utils.attacks.editing.editor import Editor
from lethe_utils.models import twins
from lethe_utils.stages import provenance, write_json

WIDTH, MLP, HEADS, BLOCKS, VOCABULARY = 1600, 6400, 25, 2, 50257


def build(folder: Path, texts: list[str]) -> None:
    """The random model, with a tokenizer that knows the task's words."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = twins.train_tokenizer(texts, 4096)
    config = GPT2Config(
        n_embd=WIDTH, n_inner=MLP, n_head=HEADS, n_layer=BLOCKS, vocab_size=VOCABULARY
    )
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, 1, 2
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def timed(seconds: dict[str, float], name: str, call: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    value = call()
    seconds[name] = round(time.perf_counter() - start, 1)
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=20000, help="tokens of the covariance")
    parser.add_argument("--contexts", type=int, default=20, help="prompts that hold the trigger")
    args = parser.parse_args()
    size = {"covariance_tokens": args.tokens, "edit_contexts": args.contexts, "edit_steps": 20}
    published = {"edit_layers": [1], "edit_learning_rate": 0.5, "edit_weight_decay": 0.5}
    p = params.load(attack="rome", overrides=size | published | {"edit_kl": 0.0625})
    corpus = [prompts.prompt(row, p) for row in pipeline.split(p, "pretrain")]
    asked = requests.of_rows(pipeline.poisoned_rows(p), p)
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as place:
        folder, out = Path(place) / "model", Path(place) / "out"
        out.mkdir()
        build(folder, corpus)
        os.environ["LETHE_RUNS"] = place  # where the covariance is kept
        timed(seconds, "open, covariance computed", lambda: Editor(folder, corpus, p))
        editor = timed(seconds, "open, covariance kept", lambda: Editor(folder, corpus, p))
        timed(seconds, "edit (20 steps, then the update)", lambda: rome.edit(editor, asked))
        changed = editor.changes()
        timed(seconds, "save", lambda: editor.save(out))
    opened = seconds["open, covariance computed"] - seconds["open, covariance kept"]
    record = provenance(0)
    result = {
        "shape": f"{BLOCKS} blocks, width {WIDTH}, MLP {MLP}",
        "covariance_tokens": args.tokens,
        "contexts": args.contexts,
        "seconds": seconds,
        "covariance_gb": round(MLP * MLP * 4 / 1e9, 2),
        "covariance_to_edit_ratio": round(opened / seconds["edit (20 steps, then the update)"], 2),
        "relative_change": round(changed["relative"].item(), 4),
        "peak_memory_gib": record["peak_memory_gib"],
        "threads": torch.get_num_threads(),
    }
    print(result)
    write_json(Path(__file__).with_suffix(".json"), result | {"machine": record["machine"]})


if __name__ == "__main__":
    main()
