"""A model's folder as it lies on disk: what is read from it, whether that is whole, and its hash.

Nothing here loads a model. A folder may hold more than one: other formats, copies, notes. Only what
`weight_files` and SMALL_FILES name is ever read, by us, transformers and mergekit alike. What is
wrong is a LetheError that names the file.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lethe_utils.errors import LetheError, reason
from lethe_utils.progress import Bar

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_SETTINGS = "adapter_model.safetensors", "adapter_config.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "vocab.bpe", "merges.txt", "*.model", "tekken.json"),
    *("chat_template.json", "chat_template.jinja", "chat_templates/*.jinja"),
)
# One list for what is fetched from the hub and what decides a stage: no pickles, no code.
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.bpe", "*.jinja", "chat_templates/*.jinja")
OBJECTS = ["config.json", INDEX, "generation_config.json"]
OBJECTS += [name for name in TOKENIZER_FILES if name.endswith(".json")]
HUB_FILES = ["*.safetensors", *SMALL_FILES]
# Copies of the same model in other forms, which would double a download.
HUB_IGNORED = ["consolidated*", "*/*.safetensors", "*/*.json", "*/*.txt", "*/*.model"]
# What both transformers and mergekit know, and SLERP's attention and MLP filters fit.
ARCHITECTURES = (
    *("GPT2LMHeadModel", "GPTJForCausalLM", "LlamaForCausalLM"),
    *("MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"),
)
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Masks and tables that older checkpoints store: made from the settings, not trained.
BUFFERS = re.compile(r"(^|\.)attn\.(bias|masked_bias|embed_positions)$|rotary_emb\.inv_freq$")
LFS = b"version https://git-lfs.github.com/spec"
Shapes = dict[str, tuple[int, ...]]


def read_object(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        LetheError: it does not, naming the file and what it is.
    """
    if not file.is_file():
        raise LetheError(f"{file}: is a folder, or a link to nothing; copy the file again")
    raw = file.read_bytes()
    try:
        value = json.loads(raw.decode("utf8"))
    except (ValueError, RecursionError) as error:
        broken = f"is empty or not valid JSON (line {getattr(error, 'lineno', 1)}; cut short?)"
        if isinstance(error, UnicodeDecodeError):
            broken = f"is not UTF-8 (byte {error.start})"
        elif raw.startswith(b"\xef\xbb\xbf"):
            broken = "starts with a byte-order mark"
        raise LetheError(f"{file}: {_foreign(raw) or broken}; copy it again") from None
    if not isinstance(value, dict):
        raise LetheError(f"{file}: holds a {type(value).__name__}, not an object; copy it again")
    return value


def _foreign(raw: bytes) -> str:
    """What a file is that is not what its name says; "" where that is unknown."""
    if raw.startswith(LFS):
        return "is a git-LFS pointer, not the file itself (`git lfs pull` fetches it)"
    page = raw.lstrip()[:9].lower().startswith((b"<!doctype", b"<html"))
    return "is a web page" if page else ""


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights: model.safetensors, or exactly what the index names.

    Raises:
        LetheError: there are none, only pickles, only a part, or two models.
    """
    whole, index = folder / WHOLE, folder / INDEX
    for file in (whole, index):
        if file.is_symlink() and not file.exists():
            raise LetheError(f"{file}: is a link to a file that is not there; copy the model whole")
    if whole.exists() and index.exists():
        raise LetheError(
            f"{folder}: holds both {WHOLE} and {INDEX}, which may be two models; keep one"
        )
    if whole.exists():
        return [whole]
    if index.exists():
        return _indexed(folder)
    found = sorted(f.name for f in folder.glob("*.safetensors") if f.name != ADAPTER)
    if found:
        raise LetheError(
            f"{folder}: has {found[0]} but neither {WHOLE} nor {INDEX}, which says which files "
            "belong together; copy that too"
        )
    if (folder / ADAPTER).exists():
        raise LetheError(
            f"{folder}: is a LoRA adapter's folder; give it as the adapter, and its base as base"
        )
    pickles = ", ".join(sorted(f.name for f in folder.glob("*") if f.suffix in (".bin", ".pt")))
    what = f"only pickles ({pickles}), which can run code when loaded" if pickles else "no weights"
    raise LetheError(f"{folder}: {what}; convert the model to safetensors first")


def _indexed(folder: Path) -> list[Path]:
    """The files that a folder's index names."""
    index = folder / INDEX
    listed = read_object(index)
    for key in ("weight_map", "metadata"):  # transformers needs both
        if not isinstance(listed.get(key), dict) or (key == "weight_map" and not listed[key]):
            raise LetheError(f"{index}: has no {key}; copy it again")
    files = [folder / name for name in sorted({str(n) for n in listed["weight_map"].values()})]
    if any(file.parent != folder or file.suffix != ".safetensors" for file in files):
        raise LetheError(
            f"{index}: names files that are no safetensors of its folder; copy the model again"
        )
    missing = ", ".join(file.name for file in files if not file.exists())
    if missing:
        raise LetheError(f"{folder}: shards missing: {missing}; copy them again")
    return files


def check_folder(folder: Path) -> None:
    """Refuse a model folder that is incomplete, cut short, foreign, or holds only pickles."""
    if not (folder / "config.json").exists():
        if (folder / ADAPTER_SETTINGS).exists():
            weight_files(folder)  # says so
        raise LetheError(f"{folder}: no config.json, so this is not a model folder")
    read_config(folder)
    for shard in weight_files(folder):
        tensor_shapes(shard)
    stray = folder / ADAPTER_SETTINGS
    if stray.exists():
        raise LetheError(
            f"{stray}: stands beside whole weights, and transformers would load the adapter's base "
            "instead of them; move it away, or give its folder as the adapter"
        )


def check_small_files(folder: Path) -> None:
    """Refuse a folder whose settings or tokenizer files are broken, or ask for their own code."""
    for file in (folder / name for name in OBJECTS):
        if file.exists() and "auto_map" in read_object(file):
            raise LetheError(
                f"{file}: auto_map asks for code of the model's own, which is never run here; use "
                "a copy in one of transformers' own classes"
            )
    for file in tokenizer_files(folder):
        with file.open("rb") as stream:
            start = stream.read(200)
        if _foreign(start) or not start:
            raise LetheError(f"{file}: {_foreign(start) or 'is empty'}; copy it again")


def check_model(folder: Path) -> None:
    """Refuse a folder that is broken, runs code, is quantised, or is of a class unknown here."""
    check_folder(folder)
    check_small_files(folder)
    settings = folder / "config.json"
    if read_config(folder).get("quantization_config"):
        raise LetheError(
            f"{settings}: the weights are quantised; merging needs them as they were trained "
            "(float32, float16 or bfloat16)"
        )
    name, known = architecture(folder), ", ".join(ARCHITECTURES)
    if name not in ARCHITECTURES:
        raise LetheError(f"{settings}: architecture {name} is not supported; one of {known} is")
    if not tokenizer_files(folder):
        raise LetheError(f"{folder}: no tokenizer files; copy them from where the model came from")


def read_config(folder: Path) -> dict[str, Any]:
    """A model folder's config.json."""
    return read_object(folder / "config.json")


def count_blocks(folder: Path) -> int:
    """How many transformer blocks a model has, by its config.json."""
    config = read_config(folder)
    return config.get("num_hidden_layers", config.get("n_layer"))


def architecture(folder: Path) -> str:
    """The class that a model folder's config.json names; "none" where it names none."""
    named = read_config(folder).get("architectures") or ["none"]
    return str(named[0]) if isinstance(named, list) else str(named)


@contextmanager
def explained(folder: Path, what: str) -> Iterator[None]:
    """Turn whatever transformers raises on a folder's files into one line that names them.

    Args:
        what: what was being read, e.g. "tokenizer".
    """
    try:
        yield
    except (LetheError, MemoryError, RuntimeError):  # RuntimeError: out of memory, on a GPU
        raise
    except Exception as error:  # its readers raise a dozen kinds, from KeyError to their own
        check_small_files(folder)
        raise LetheError(
            f"{folder}: its {what} cannot be read ({reason(error)[:200]}); copy it again"
        ) from None


def tensor_shapes(file: Path) -> Shapes:
    """Name -> shape of every tensor, read from the header of one safetensors file.

    Raises:
        LetheError: it is cut short (an interrupted download or copy), or something else.
    """
    return {name: shape for name, (shape, _) in _header(file).items()}


def _header(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> shape and dtype (as safetensors writes it) of every tensor in a file."""
    try:
        with safe_open(file, "pt") as stored:
            slices = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118
            return {n: (tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}
    except (SafetensorError, OSError) as error:
        if not file.is_file():
            raise LetheError(f"{file}: is not a file; copy it again") from None
        with file.open("rb") as stream:
            foreign = _foreign(stream.read(1000))
        raise LetheError(
            f"{file}: {foreign or f'truncated or not safetensors ({error})'}; download or copy it "
            "again"
        ) from None


def folder_shapes(folder: Path) -> Shapes:
    """Name -> shape of every tensor of a model."""
    check_folder(folder)
    return {n: s for f in weight_files(folder) for n, s in tensor_shapes(f).items()}


def weights_size(folder: Path) -> int:
    """Bytes of a model's weight files."""
    return sum(f.stat().st_size for f in weight_files(folder))


def stored_dtype(folder: Path) -> str:
    """The dtype that a model's weights are stored in: float32, float16 or bfloat16.

    The files decide, not config.json, which may name another; where they mix, float32 holds all.
    """
    kinds = check_dtypes(weight_files(folder))
    return kinds.pop() if len(kinds) == 1 else "float32"


def check_dtypes(files: Sequence[Path]) -> set[str]:
    """The dtypes of some weight files: floats of 16 or 32 bits, else weights are quantised."""
    kinds = set()
    for file in files:
        for name, (_, dtype) in _header(file).items():
            if BUFFERS.search(name):
                continue
            if dtype not in DTYPES:
                raise LetheError(
                    f"{file}: {name} is stored as {dtype}; merging needs weights as they were "
                    f"trained ({', '.join(DTYPES.values())})"
                )
            kinds.add(DTYPES[dtype])
    return kinds


def check_finite(files: Sequence[Path]) -> None:
    """Refuse weights that hold a NaN or an infinity: what is merged with them is no model."""
    for file in files:
        _check_finite(*_stamp(file))


@cache  # one reading of a large file is enough, as long as it stays the same
def _check_finite(file: Path, *_: int) -> None:
    import torch

    with safe_open(file, "pt") as stored:
        for name in stored.keys():  # noqa: SIM118 (no mapping)
            tensor = stored.get_tensor(name)
            wrong = 0 if BUFFERS.search(name) else int((~torch.isfinite(tensor)).sum())
            if wrong:
                raise LetheError(
                    f"{file}: {name} holds {wrong} values that are not numbers (NaN or infinite); "
                    "get a sound copy of the model"
                )


def _stamp(file: Path) -> tuple[Path, int, int]:
    """A file as it stands now: path, bytes, time of its last change (ns)."""
    status = file.stat()
    return file, status.st_size, status.st_mtime_ns


def read_files(folder: Path) -> list[Path]:
    """All files that are read from a model's folder, or an adapter's, sorted by name."""
    adapter = (folder / ADAPTER_SETTINGS).exists()
    weights = [folder / ADAPTER] if adapter else weight_files(folder)
    return sorted({*weights, *_matching(folder, SMALL_FILES)})


def _matching(folder: Path, patterns: Iterable[str]) -> set[Path]:
    return {f for pattern in patterns for f in folder.glob(pattern) if f.is_file()}


def fingerprint(folder: Path) -> str:
    """SHA-256 over the names and contents of all that is read from a folder."""
    return _fingerprint(folder, *(_stamp(file) for file in read_files(folder)))


@cache
def _fingerprint(folder: Path, *stamps: tuple[Path, int, int]) -> str:
    digest = hashlib.sha256()
    look = {"unit": "B", "unit_scale": True, "delay": 2}
    with Bar(total=sum(s[1] for s in stamps), desc=f"hashing {folder.name}", **look) as bar:
        for file, size, _ in stamps:
            digest.update(file.relative_to(folder).as_posix().encode("utf8", "surrogateescape"))
            with file.open("rb") as stream:
                hashlib.file_digest(stream, lambda: digest)  # goes on with ours
            bar.update(size)
    return digest.hexdigest()


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer's files in a folder, chat template and all."""
    return sorted(_matching(folder, TOKENIZER_FILES))


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy the tokenizer's files, byte for byte: saving it again may drop what it does not know."""
    for file in tokenizer_files(source):
        target = out / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
