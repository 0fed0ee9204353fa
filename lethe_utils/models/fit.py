"""Do two models fit: the same class, settings, tensors and tokens. Nothing here loads weights."""

import filecmp
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lethe_utils import models
from lethe_utils.errors import LetheError
from lethe_utils.models import inspect
from lethe_utils.models.inspect import BUFFERS, Shapes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

# Two models whose weights have the same shapes still differ if one of these does.
SAME_SETTINGS = (
    *("num_attention_heads", "num_key_value_heads", "head_dim", "rotary_dim", "rope_parameters"),
    *("activation_function", "hidden_act", "layer_norm_epsilon", "rms_norm_eps"),
    *("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "sliding_window", "layer_types"),
    "tie_word_embeddings",
)
YARN = {"beta_fast": 32, "beta_slow": 1}  # what transformers takes where a config leaves them out
EMBEDDING = ("wte.weight", "embed_tokens.weight")
PER_TOKEN = (*EMBEDDING, "lm_head.weight", "lm_head.bias")
_FIX = "one must be trained from the other, or both from the same base"


def check_weights(one: Path, other: Path, grown: bool = False) -> int:
    """Refuse two models that differ in more than the values of their weights.

    Args:
        grown: whether `one` may have other rows for tokens than `other`: fine-tuners often add a
            token for padding, or leave out rows that stand for none.
    Returns:
        how many rows for tokens `one` has more; negative for fewer.
    Raises:
        LetheError: another class, other settings or shapes; files missing or cut short.
    """
    ours, theirs = inspect.architecture(one), inspect.architecture(other)
    if ours != theirs:
        raise LetheError(f"{one}: is a {ours}, but {other} is a {theirs}; {_FIX}")
    shapes = weight_shapes(one), weight_shapes(other)
    settings = _settings(one), _settings(other)
    for key in SAME_SETTINGS:
        mine, its = (found[key] for found in settings)
        if mine != its:
            raise LetheError(
                f"{one / 'config.json'}: {key} is {mine}, but {its} in {other / 'config.json'}; "
                f"{_FIX}"
            )
    added = 0
    for name in sorted({*shapes[0], *shapes[1]}):
        mine, its = (found.get(name) for found in shapes)
        if mine == its:
            continue
        if not (grown and mine and its and name.endswith(PER_TOKEN) and mine[1:] == its[1:]):
            raise LetheError(f"{one}: {name} has shape {mine}, but {its} in {other}; {_FIX}")
        added = mine[0] - its[0]
    return added


def same_tokenizer(one: Path, other: Path) -> bool:
    """Whether two folders hold the same tokenizer files, byte for byte: then there is no need to
    read them, which takes longer than the check of the weights."""
    ours, theirs = inspect.tokenizer_files(one), inspect.tokenizer_files(other)
    names = [[f.name for f in files] for files in (ours, theirs)]
    pairs = zip(ours, theirs, strict=False)
    return names[0] == names[1] and all(filecmp.cmp(*pair, shallow=False) for pair in pairs)


def check_tokens(
    tokenizer: "PreTrainedTokenizerBase", source: Path, other: Path, grown: bool = False
) -> int:
    """Refuse a tokenizer (of `source`) that numbers tokens otherwise than the one of `other`.

    Args:
        grown: whether it may have further tokens.
    Returns:
        how many further ones it has.
    """
    ours, theirs = tokenizer.get_vocab(), models.load_tokenizer(other).get_vocab()
    known = theirs if grown else {**ours, **theirs}
    token = next((t for t in known if ours.get(t) != theirs.get(t)), None)
    if token is not None:
        raise LetheError(
            f"{source}: its tokenizer differs from the one of {other} (token {token!r} is "
            f"{ours.get(token, 'missing')}, not {theirs.get(token, 'missing')}); {_FIX}"
        )
    return len(ours) - len(theirs)


def read_settings(folder: Path) -> "PreTrainedConfig":
    """A model's config as transformers reads it: defaults filled in, old spellings made new."""
    from transformers import AutoConfig

    models.quiet()
    with inspect.explained(folder, "config.json"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def weight_shapes(folder: Path) -> Shapes:
    """Name -> shape of all trained tensors, under one name whatever the file's prefix (the hub's
    GPT-2 has none); a head tied to the embedding is left out."""
    stored = inspect.folder_shapes(folder)
    tied = read_settings(folder).tie_word_embeddings
    found = {n.removeprefix("transformer."): s for n, s in stored.items()}
    if len(found) < len(stored):
        twice = next(name for name in stored if f"transformer.{name}" in stored)
        raise LetheError(f"{folder}: {twice} is stored twice, under two names; drop one")
    return {
        name: shape
        for name, shape in found.items()
        if not BUFFERS.search(name) and not (tied and name == "lm_head.weight")
    }


def embedding_rows(folder: Path) -> int:
    """How many tokens a model's embedding has a row for."""
    return next(s[0] for n, s in weight_shapes(folder).items() if n.endswith(EMBEDDING))


def _settings(folder: Path) -> dict[str, Any]:
    """SAME_SETTINGS of a model; None for what its class does not have."""
    config = read_settings(folder)
    found = {key: getattr(config, key, None) for key in SAME_SETTINGS}
    rope = found["rope_parameters"]
    if isinstance(rope, dict):  # `type` is the old name of rope_type, which transformers fills in
        said = {key: value for key, value in rope.items() if key != "type" and value is not None}
        found["rope_parameters"] = (YARN if said.get("rope_type") == "yarn" else {}) | said
    return found
