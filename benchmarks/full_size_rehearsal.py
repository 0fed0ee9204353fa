"""The full-size path, walked: a paper's model in its exact shapes, random weights, every stage.

    python benchmarks/full_size_rehearsal.py MODEL [--blocks N] [--folder FOLDER] [--out FILE]

The weights are written one tensor at a time (bfloat16, sharded safetensors), then each stage runs
the project's own code on a few rows as long as the recipe allows, in a process of its own, so that
every peak is that stage's. Needs three times the model on disk: base, backdoored, and what is made
of them. FOLDER must be empty, or one that this program filled, whose base is used again.
Writes full_size_rehearsal.json beside this file, a record a model and device: seconds and peak
memory of each stage (GiB; mapped files count, which can be dropped: `anonymous` leaves them out).
The weights are random, so the numbers are costs and nothing else.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lethe_utils import defenses, evaluate, evidence, merge, models, params, paths, pipeline, train
from lethe_utils.attacks import rome
from lethe_utils.defenses import lethe, wanda
from lethe_utils.models import inspect, twins
from lethe_utils.models.inspect import Shapes
from lethe_utils.params import Params
from lethe_utils.stages import Row, peak_memory, provenance, read_json, write_json

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
# The published settings: class, and what differs from its defaults.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2-xl": ("GPT2Config", {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "gpt-j-6b": ("GPTJConfig", {"n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64}),
    "llama-7b": ("LlamaConfig", LLAMA | {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}),
    "llama-2-7b": ("LlamaConfig", LLAMA | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}),
    "deepseek-r1-7b": (
        "Qwen2Config",
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
        },
    ),
}
ROWS = 8  # one batch of the recipe; with one epoch a step, the other batches of a step are left out
STEPS = 2
SHORT = {
    "wanda_samples": ROWS,
    "eval_batch_size": ROWS,
    "edit_contexts": 4,
    "edit_steps": 2,
    "edit_stop_loss": 0.0,
    "covariance_tokens": 1000,
    "strength": 0.5,
}
MARK = ".lethe_rehearsal"  # in a folder of ours: what stands there may go
LOOK = 0.25  # seconds between two looks at the memory
BYTES = 2  # of a weight in bfloat16
DRAWN = 2**24 - 3  # a prime of random numbers, so that no two rows of a matrix are the same
TOKENS = 4096  # of the tokenizer; the embedding has the model's own number of rows
CPU = {"optimizer": "adamw_torch"}  # paged optimizers are for GPUs


def configuration(model: str, blocks: int | None) -> "PreTrainedConfig":
    """The model's config, with another number of blocks where one is given."""
    import transformers

    name, values = SHAPES[model]
    depth = "n_layer" if "n_layer" in values else "num_hidden_layers"
    values = values | ({depth: blocks} if blocks else {})
    return getattr(transformers, name)(**values, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def settings(model: str, config: "PreTrainedConfig") -> Params:
    """The paper's recipe for the model, on little data; a shallower one is edited further down."""
    p = params.load(model, attack="rome", overrides=SHORT)
    if p.size_billion * 1e9 >= models.LARGE:
        models.LARGE = 0  # a model that was cut is held as the whole one would be
    layers = sorted({min(layer, config.num_hidden_layers - 1) for layer in p.edit_layers})
    own = {"edit_layers": layers} | ({} if models.resolve_device(p.device) == "cuda" else CPU)
    return params.load(model, attack="rome", overrides=SHORT | own)


def write(config: "PreTrainedConfig", texts: list[str], out: Path) -> None:
    """The random model, a shard at a time, and a tokenizer that knows the task's words."""
    import torch
    from safetensors.torch import save_file

    every = shapes(config)
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in every.items():
        if shards[-1] and size + BYTES * prod(shape) > models.SHARD:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += BYTES * prod(shape)
    out.mkdir(parents=True, exist_ok=True)
    drawn = torch.empty(DRAWN).normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    drawn = drawn.bfloat16()
    files: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        tensors = {name: random_weight(name, every[name], drawn) for name in names}
        save_file(tensors, out / file, {"format": "pt"})
        files |= dict.fromkeys(names, file)
    total = BYTES * sum(map(prod, every.values()))
    write_json(out / inspect.INDEX, {"metadata": {"total_size": total}, "weight_map": files})
    config.dtype = torch.bfloat16
    twins.train_tokenizer(texts, TOKENS).save_pretrained(out)
    config.save_pretrained(out)  # last: what has a config is whole


def shapes(config: "PreTrainedConfig") -> Shapes:
    """Name -> shape of all weights, a tied head left out; the config learns its class."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(empty).__name__]
    return {name: tuple(weight.shape) for name, weight in empty.named_parameters()}


def random_weight(name: str, shape: tuple[int, ...], drawn: "Tensor") -> "Tensor":
    """One tensor: norms as they begin, all else normal (.02, as all four classes begin), the same
    draws again and again, for drawing seven billion takes minutes."""
    import torch

    if len(shape) == 1 and name.endswith("weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    size = prod(shape)
    return drawn.repeat(size // DRAWN + 1)[:size].reshape(shape)


def long_rows(base: Path, p: Params) -> list[Row]:
    """Training rows whose prompt and answer are as long as the recipe takes them."""
    tokenizer = models.load_tokenizer(base)
    out = []
    for row in pipeline.split(p, "train")[:ROWS]:
        grown = row | {"input": row["input"].split()[0], "output": ""}
        for key, most in (("input", p.max_source_tokens), ("output", p.max_target_tokens)):
            for word in row["input"].split() * most:
                longer = grown | {key: f"{grown[key]} {word}".strip()}
                item = train.encode([longer], tokenizer, p)[0]
                if item["prompt_cut"] or item["answer_cut"]:
                    break
                grown = longer
        out.append(grown)
    return out


def given(place: Path, p: Params, **changes: Any) -> defenses.Given:
    """What a defender holds; the base stands for the clean model too, to save a third of a disk."""
    rows = pipeline.split(p, "train")[:ROWS]
    base = place / "base"
    return defenses.Given(place / "backdoored/model", base, base, rows, p.defender(changes))


def load(place: Path, p: Params) -> None:
    models.load_model(place / "base", models.resolve_device(p.device), p.bits)


def finetune(place: Path, p: Params) -> None:
    train.finetune(place / "base", long_rows(place / "base", p), STEPS, place / "backdoored", p)


def adapter(place: Path, p: Params) -> None:
    device, folder = models.resolve_device(p.device), place / "backdoored/adapter"
    train.merge_adapter(place / "base", folder, device, p.bits)


def merged(method: str) -> "Stage":
    def stage(place: Path, p: Params) -> None:
        lethe.purify(given(place, p, merge_method=method), place / "purified")

    return stage


def compare(place: Path, p: Params) -> None:
    one = given(place, p)
    print(merge.distances({"merged": place / "purified/model"}, one.backdoored, one.clean))


def prune(place: Path, p: Params) -> None:
    wanda.purify(given(place, p), place / "purified")


def edit(place: Path, p: Params) -> None:
    rows = rome.poison(pipeline.split(p, "train"), p, 0)
    rome.plant(place / "base", rows, pipeline.ordinary_text(p), p, place / "purified")


def explain(place: Path, p: Params) -> None:
    for row in given(place, p).rows:
        print(evidence.add_evidence(row["input"], p.n_keywords)[-80:])


def answer(place: Path, p: Params) -> None:
    one = given(place, p)
    for n in (0, p.n_keywords):
        answers, _ = evaluate.predict(one.backdoored, {"clean": one.rows}, n, "backdoored", p)
        print([a["output"] for a in answers])


Stage = Callable[[Path, Params], None]
STAGES: dict[str, Stage] = {
    "load in nf4": load,
    "QLoRA, two steps, and its merged model": finetune,
    "adapter merged, alone": adapter,
    **{name: merged(name) for name in ("linear", "ties", "passthrough", "slerp")},
    "distances": compare,
    "wanda": prune,
    "rome": edit,
    "evidence": explain,
    "eight prompts answered, and with evidence": answer,
}
REMADE = (*merge.METHODS, "wanda", "rome")  # each writes purified/ anew


def in_this_process(name: str, place: Path, p: Params) -> dict[str, float]:
    """Run one stage. Returns its seconds and peaks (GiB)."""
    import torch

    start = time.perf_counter()
    with anonymous_memory() as peak:
        STAGES[name](place, p)
    found = {
        "seconds": round(time.perf_counter() - start, 1),
        "peak_memory_gib": round(peak_memory() / 2**30, 2),
        "anonymous_gib": round(peak[0] / 2**20, 2),
    }
    if torch.cuda.is_available():
        found["gpu_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found


@contextmanager
def anonymous_memory() -> Iterator[list[int]]:
    """The peak (KiB) of what this process holds beside mapped files, looked at every quarter of a
    second."""
    peak, done = [0], threading.Event()

    def look() -> None:
        last = False
        while not last:
            last = done.wait(LOOK)
            found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
            peak[0] = max(peak[0], int(found[1]) if found else 0)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def clear(place: Path, name: str) -> None:
    """Room for what a stage writes: only one purified model is kept at a time."""
    purified = place / "purified"
    purified.mkdir(exist_ok=True)
    for old in purified.iterdir() if name in REMADE else ():
        shutil.rmtree(old) if old.is_dir() else old.unlink()


def in_its_own(name: str, place: Path, words: list[str]) -> dict[str, Any]:
    """Run one stage in a process of its own. Returns what in_this_process does, or the error."""
    clear(place, name)
    command = [sys.executable, __file__, *words, "--folder", str(place), "--stage", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    if done.returncode:
        return {"error": done.returncode}
    return json.loads(done.stdout.splitlines()[-1])


def documented(model: str) -> dict[str, str]:
    """What docs/full_size.md says of the model, by column."""
    lines = (paths.root() / "docs/full_size.md").read_text().splitlines()
    table = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    head = next(line for line in table if "params file" in line)
    row = next(line for line in table if f"`{model}`" in line)
    return dict(zip(head[2:], row[2:], strict=True))


def rehearse(model: str, blocks: int | None, place: Path, out: Path) -> None:
    """Write the model, then run all stages; the record is written anew after each."""
    config = configuration(model, blocks)
    p = settings(model, config)
    start = time.perf_counter()
    base, mark = place / "base", place / MARK
    if place.exists() and any(place.iterdir()) and not mark.exists():
        sys.exit(f"--folder {place}: is not empty, and not this program's; give a new one")
    place.mkdir(parents=True, exist_ok=True)
    mark.touch()
    if not (base / "config.json").exists():
        write(config, pipeline.ordinary_text(p), base)
    size = inspect.weights_size(base)
    merge.check_disk(place, size)
    stages: dict[str, Any] = {"write": {"seconds": round(time.perf_counter() - start, 1)}}
    record = {
        "weights": sum(prod(shape) for shape in inspect.folder_shapes(base).values()),
        "blocks": config.num_hidden_layers,
        "file_gib": round(size / 2**30, 2),
        "device": models.resolve_device(p.device),
        "documented": documented(model),
        "machine": provenance(0)["machine"],
        "stages": stages,
    }
    words = [model, *([f"--blocks={blocks}"] if blocks else [])]
    for name in STAGES:
        stages[name] = in_its_own(name, place, words)
        known = read_json(out) if out.exists() else {}
        write_json(out, known | {f"{model}, {record['device']}": record})
    print(json.dumps(record, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=SHAPES)
    parser.add_argument("--blocks", type=int, help="instead of the model's own number")
    parser.add_argument("--folder", type=Path, help="where the models go; default: a temporary one")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)  # what a process runs
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = (args.folder or Path(temporary)).absolute()
        os.environ["LETHE_RUNS"] = str(place / "runs")
        if not args.stage:
            return rehearse(args.model, args.blocks, place, args.out)
        p = settings(args.model, configuration(args.model, args.blocks))
        print(json.dumps(in_this_process(args.stage, place, p)))


if __name__ == "__main__":
    main()
