"""How much memory a merge takes: three random LLaMAs of a gigabyte each, SLERP and TIES.

    python benchmarks/merge_memory.py [--layers 20]

Each merge runs in a process of its own, whose peak (resident memory, the mapped files included) is
compared with the larger model's file. Writes merge_memory.json beside this file.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from lethe_utils import models
from lethe_utils.models import twins
from lethe_utils.stages import provenance, write_json

WIDTH, MLP, HEADS, VOCABULARY = 1024, 2816, 16, 8192
MERGE = """
import sys
from pathlib import Path
from lethe_utils import merge
from lethe_utils.stages import provenance
method, suspect, clean, base, out = sys.argv[1:]
merge.merge(method, Path(suspect), Path(clean), Path(base), 0.5, Path(out))
print(provenance(0)["peak_memory_gib"])
"""


def build(folder: Path, seed: int, layers: int) -> float:
    """One random model. Returns the size of its weights (GiB)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = twins.train_tokenizer(["a few words"], 300)
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        num_hidden_layers=layers,
        vocab_size=VOCABULARY,
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=models.SHARD)
    tokenizer.save_pretrained(folder)
    return sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=20, help="20: a gigabyte in float32")
    args = parser.parse_args()
    models.quiet()
    peaks = {}
    with tempfile.TemporaryDirectory() as place:
        parts = [Path(place) / name for name in ("suspect", "clean", "base")]
        size = max(build(folder, seed, args.layers) for seed, folder in enumerate(parts))
        for method in ("slerp", "ties"):
            command = [sys.executable, "-c", MERGE, method, *parts, Path(place) / method]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            peaks[method] = float(done.stdout.split()[-1])
    record = {
        "model": f"LLaMA, {args.layers} layers, width {WIDTH}, float32",
        "file_gib": round(size, 2),
        "peak_memory_gib": peaks,
        "peak_to_file_ratio": {m: round(peak / size, 2) for m, peak in peaks.items()},
        "peak_less_1_gib_to_file_ratio": {
            m: round((peak - 1) / size, 2) for m, peak in peaks.items()
        },
        "machine": provenance(0)["machine"],
    }
    write_json(Path(__file__).with_suffix(".json"), record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
