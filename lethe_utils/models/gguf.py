"""GGUF files: one file of (mostly quantised) weights, settings and tokenizer, unpacked to a folder.

transformers reads them; what it would pass over in silence is checked here against what the file
itself declares.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lethe_utils.errors import LetheError, reason
from lethe_utils.models import inspect, quiet, save
from lethe_utils.progress import Bar
from lethe_utils.stages import write_json

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

ARCHITECTURES = ("gpt2", "llama", "qwen2", "qwen3")  # of inspect's, those that transformers unpacks
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
DIGITS = "smollm"  # splits each digit off before it splits as GPT-2 does


def unpack(file: Path, out: Path) -> None:
    """Write a GGUF file's model to a folder: float32 safetensors, config and tokenizer.

    A quantised weight becomes the number its few bits stand for; what quantising lost stays lost.
    Args:
        out: the folder to fill.
    Raises:
        LetheError: the file is cut short, no GGUF or of an unknown class or tokenizer, or holds
            something that would be lost.
    """
    quiet()
    stray = file.parent / inspect.ADAPTER_SETTINGS
    if stray.exists():
        raise LetheError(
            f"{stray}: stands beside {file.name}, and transformers would follow it to another "
            "model; move one of them"
        )
    with _explained(file):
        from gguf import GGUFReader

        reader = GGUFReader(file)
        _check_class(file, reader)
        tokenizer = _tokenizer(file, reader)
        save(_dense(file, reader), out)
        tokenizer.save_pretrained(out)
    if (bos := _value(reader, "tokenizer.ggml.add_bos_token")) is not None:
        settings = out / "tokenizer_config.json"
        write_json(settings, inspect.read_object(settings) | {"add_bos_token": bos})


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    """Turn whatever the two readers raise into one line that names the file."""
    try:
        yield
    except (LetheError, MemoryError):
        raise
    except Exception as error:  # from struct, numpy, gguf, transformers and jinja
        if isinstance(error, OSError) or "No space left" in str(error):
            raise
        raise LetheError(
            f"{file}: is no GGUF file, cut short, or of a kind that cannot be unpacked "
            f"({reason(error)[:200]}); get it again, or the model as safetensors"
        ) from None


def _value(reader: "GGUFReader", key: str) -> Any:
    """What a GGUF file declares under a key; None where it does not."""
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _check_class(file: Path, reader: "GGUFReader") -> None:
    """Refuse a class that cannot be used here, and settings that transformers does not read."""
    name = _value(reader, "general.architecture")
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise LetheError(f"{file}: architecture {name} is not supported; one of {known} is")
    scaled = [key for key in reader.fields if key.startswith(f"{name}.rope.scaling.")]
    if any(_value(reader, key) != "none" for key in scaled if key.endswith(".type")):
        raise LetheError(
            f"{file}: {scaled[0]}: scaled positions are not read from GGUF; use the model as "
            "safetensors"
        )


def _tokenizer(file: Path, reader: "GGUFReader") -> "Tokenizer":
    """The tokenizer, which says and numbers just what the file declares."""
    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    _check_splitting(file, reader)
    read = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    # Its class brings a token of its own (<|endoftext|>), with a number that no row stands for.
    backend = json.loads(read.backend_tokenizer.to_str())
    rows = len(_value(reader, "tokenizer.ggml.tokens"))
    backend["added_tokens"] = [t for t in backend["added_tokens"] if t["id"] < rows]
    backend = Tokenizer.from_str(json.dumps(backend))
    if _value(reader, "tokenizer.ggml.pre") == DIGITS:  # which transformers passes over
        digits = pre_tokenizers.Digits(individual_digits=True)
        rest = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
    named = {f"{name}_token": getattr(read, f"{name}_token") for name in SPECIAL}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=read.chat_template, **named
    )
    check_tokenizer(file, reader, tokenizer)
    return tokenizer


def _check_splitting(file: Path, reader: "GGUFReader") -> None:
    """Refuse a byte-level tokenizer that splits texts in a way transformers does not know: it would
    take GPT-2's instead."""
    from transformers.integrations.gguf import gguf_tokenizer_mapping

    if _value(reader, "tokenizer.ggml.model") != "gpt2":
        return
    splits = _value(reader, "tokenizer.ggml.pre")
    known = {*gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS, DIGITS, "gpt-2"}
    if splits not in known:
        raise LetheError(
            f"{file}: tokenizer.ggml.pre is {splits}, a way to split texts that is not known; use "
            "the model as safetensors"
        )


def check_tokenizer(file: Path, reader: "GGUFReader", tokenizer: "Tokenizer") -> None:
    """Refuse a tokenizer that differs from what its file declares.

    Raises:
        LetheError: in a special token's id, the chat template, or any token's number.
    """
    for ours, theirs in SPECIAL.items():
        key = f"tokenizer.ggml.{theirs}_token_id"
        _check_same(file, key, _value(reader, key), getattr(tokenizer, f"{ours}_token_id"))
    template = _value(reader, "tokenizer.chat_template")
    _check_same(file, "tokenizer.chat_template", template, tokenizer.chat_template)
    tokens = _value(reader, "tokenizer.ggml.tokens")
    found = tokenizer.convert_ids_to_tokens(list(range(len(tokens))))
    for i, (said, ours) in enumerate(zip(tokens, found, strict=True)):
        if said != ours and said != tokenizer.decode([i]):  # some are written as plain text
            _check_same(file, f"tokenizer.ggml.tokens[{i}]", said, ours)
    _check_same(file, "tokens", len(tokens), len(tokenizer))


def _check_same(file: Path, key: str, said: Any, ours: Any) -> None:
    if said != ours:
        raise LetheError(
            f"{file}: {key} is {str(said)[:60]!r}, but its tokenizer was read as "
            f"{str(ours)[:60]!r}; use the model as safetensors"
        )


def _dense(file: Path, reader: "GGUFReader") -> "PreTrainedModel":
    """The weights as float32 in a model of the file's class that knows nothing of GGUF.

    Raises:
        LetheError: the file holds other tensors than its class has.
    """
    import torch
    from transformers import AutoModelForCausalLM, modeling_gguf_pytorch_utils

    modeling_gguf_pytorch_utils.tqdm = Bar  # its own would stand in notebooks
    read, said = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.float32,
        trust_remote_code=False,
        output_loading_info=True,
    )
    # transformers skips a tensor it has no place for, and draws one that is missing.
    stored, wanted = len(reader.tensors), len(list(read.parameters()))  # a tied head counts once
    missing = sorted({*said["missing_keys"], *said["mismatched_keys"]})
    if missing or stored != wanted:
        raise LetheError(
            f"{file}: holds {stored} tensors where {type(read).__name__} has {wanted}"
            f"{f' ({missing[0]} is missing)' if missing else ''}; use the model as safetensors"
        )
    config = read.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path", "_name_or_path"):
        config.pop(key, None)
    with torch.device("meta"):  # no second copy of the weights
        plain = type(read)(type(read.config).from_dict(config))
    plain.load_state_dict(read.state_dict(), assign=True)
    plain.tie_weights()
    return plain
