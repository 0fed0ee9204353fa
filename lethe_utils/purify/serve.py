"""A result that others' servers read right: llama.cpp's converter, Ollama and vLLM.

transformers 5 writes two things that 4, which some of them run on, does not know.
"""

import shutil
from pathlib import Path

from lethe_utils.models import inspect
from lethe_utils.stages import read_json, write_json

TOKENIZER = "tokenizer_config.json"
CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}  # 5's name -> 4's, which 5 knows too


def ready(folder: Path) -> None:
    """Say in a finished model folder's files what transformers 4 needs, beside what 5 wrote, and
    let everybody read the weights who may read the rest: a server is often another user.

    4 refuses the tokenizer's class, and takes rope's base to be 10 000 where `rope_theta` is
    missing, in silence: the model then answers nonsense.
    """
    config = inspect.read_config(folder)
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        config["rope_theta"] = rope["rope_theta"]
        config["rope_scaling"] = None if scaling.get("rope_type") == "default" else scaling
        write_json(folder / "config.json", config)
    if (folder / TOKENIZER).exists():
        said = read_json(folder / TOKENIZER)
        if said.get("tokenizer_class") in CLASSES:
            said["tokenizer_class"] = CLASSES[said["tokenizer_class"]]
            write_json(folder / TOKENIZER, said)
    for file in inspect.weight_files(folder):
        shutil.copymode(folder / "config.json", file)
