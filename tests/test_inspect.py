"""A model's folder: exactly what is read from it, what is refused, and what its hash covers."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lethe_utils import models
from lethe_utils.errors import LetheError
from lethe_utils.models import hub, inspect

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n"


@pytest.fixture
def folder(pico, tmp_path):
    """A copy of a pico GPT-2 that a test may break."""
    return shutil.copytree(pico("gpt2")[0], tmp_path / "model")


@pytest.fixture
def sharded(pico, tmp_path):
    out = tmp_path / "sharded"
    models.load_model(pico("gpt2")[0]).save_pretrained(out, max_shard_size="20KB")
    models.load_tokenizer(pico("gpt2")[0]).save_pretrained(out)
    return out


def error(function, *args):
    with pytest.raises(LetheError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- which files are the weights


def test_only_what_the_index_names_is_read(sharded):
    whole = inspect.folder_shapes(sharded)
    for stray in ("consolidated.safetensors", "._model-00001-of-00009.safetensors"):
        save_file({"stray": torch.ones(2)}, sharded / stray)
    assert inspect.folder_shapes(sharded) == whole
    names = {f.name for f in inspect.weight_files(sharded)}
    assert names == {*json.loads((sharded / inspect.INDEX).read_text())["weight_map"].values()}
    models.load_model(sharded)


def test_only_model_safetensors_is_read_where_it_stands(folder):
    save_file({"stray": torch.ones(2)}, folder / "consolidated.safetensors")
    assert "stray" not in inspect.folder_shapes(folder)


def test_shards_without_their_index_are_refused(sharded):
    (sharded / inspect.INDEX).unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in error(
        inspect.check_folder, sharded
    )


def test_two_models_in_one_folder_are_refused(sharded, folder):
    shutil.copy(folder / inspect.WHOLE, sharded)
    assert "holds both" in error(inspect.check_folder, sharded)


@pytest.mark.parametrize("files", [{"a": "../../elsewhere.safetensors"}, {"a": "w.bin"}, {}, None])
def test_an_index_that_points_elsewhere_or_nowhere_is_refused(sharded, files):
    (sharded / inspect.INDEX).write_text(json.dumps({"weight_map": files, "metadata": {}}))
    assert inspect.INDEX in error(inspect.weight_files, sharded)


@pytest.mark.parametrize("weights", [True, False])
def test_a_stray_adapter_is_refused_with_the_reason(folder, weights):
    # transformers would load the base that it names, wherever that is, in place of these weights.
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/nowhere"}')
    if weights:
        save_file({"x": torch.ones(1)}, folder / inspect.ADAPTER)
    assert "stands beside whole weights" in error(inspect.check_folder, folder)


def test_an_adapter_given_as_a_model_is_called_one(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"x": torch.ones(1)}, tmp_path / inspect.ADAPTER)
    assert "is a LoRA adapter's folder" in error(inspect.check_folder, tmp_path)


# --- broken and foreign files

BROKEN = {
    "": "empty or not valid JSON",
    '{"a": ': "not valid JSON (line 1; cut short?)",
    LFS_POINTER: "git-LFS pointer",
    "<!doctype html>": "is a web page",
    "\ufeff{}": "byte-order mark",
    "[1]": "holds a list, not an object",
    "null": "holds a NoneType, not an object",
}


@pytest.mark.parametrize("text", BROKEN)
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
def test_a_broken_file_is_named_and_said_what_it_is(folder, name, text):
    (folder / name).write_text(text)
    message = error(inspect.check_small_files, folder)
    assert name in message and BROKEN[text] in message
    loader = inspect.check_folder if name == "config.json" else models.load_tokenizer
    assert name in error(loader, folder)


def test_a_file_in_another_encoding_is_named(folder):
    (folder / "config.json").write_bytes(b'{"a": "caf\xe9"}')
    assert "is not UTF-8 (byte 10)" in error(inspect.check_folder, folder)


@pytest.mark.parametrize("name", ["tokenizer.model", "merges.txt", "chat_template.jinja"])
@pytest.mark.parametrize("text", ["", LFS_POINTER])
def test_a_tokenizer_file_that_was_not_fetched_is_refused(folder, name, text):
    (folder / name).write_text(text)
    assert name in error(inspect.check_small_files, folder)


def test_a_tokenizer_of_another_program_is_refused_in_one_line(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Magic"}}')
    assert "its tokenizer cannot be read" in error(models.load_tokenizer, folder)


def test_weights_that_are_a_pointer_are_called_that(folder):
    (folder / inspect.WHOLE).write_text(LFS_POINTER)
    assert "git-LFS pointer" in error(inspect.check_folder, folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none_is_refused_with_its_tensor(folder, value):
    file = folder / inspect.WHOLE
    weights = load_file(file)
    weights["transformer.h.1.mlp.c_fc.weight"][3, 5] = value
    save_file(weights, file, {"format": "pt"})
    message = error(inspect.check_finite, [file])
    assert "transformer.h.1.mlp.c_fc.weight holds 1 values" in message
    weights["transformer.h.1.mlp.c_fc.weight"][3, 5] = 0
    save_file(weights, file, {"format": "pt"})
    inspect.check_finite([file])  # the file changed, so it is read again


# --- dtype


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("said", ["float32", "float16", None])
def test_the_file_decides_the_dtype_whatever_the_config_says(folder, dtype, said):
    file = folder / inspect.WHOLE
    save_file({n: w.to(getattr(torch, dtype)) for n, w in load_file(file).items()}, file)
    config = inspect.read_config(folder) | {"dtype": said, "torch_dtype": said}
    (folder / "config.json").write_text(json.dumps(config))
    assert inspect.stored_dtype(folder) == dtype


def test_mixed_dtypes_are_kept_in_the_widest_and_quantised_ones_refused(folder):
    file = folder / inspect.WHOLE
    weights = load_file(file)
    name = next(iter(weights))
    save_file(weights | {name: weights[name].half()}, file)
    assert inspect.stored_dtype(folder) == "float32"
    save_file(weights | {name: weights[name].to(torch.float8_e4m3fn)}, file)
    assert f"{name} is stored as F8_E4M3" in error(inspect.stored_dtype, folder)


# --- the hash, the hub, the tokenizer's files


@pytest.mark.parametrize(
    "name",
    [
        *("chat_template.jinja", "tokenizer.model", "tokenizer_config.json", "merges.txt"),
        *("generation_config.json", "config.json", "chat_templates/tool.jinja", "vocab.bpe"),
    ],
)
def test_the_hash_covers_all_that_decides_a_result(folder, name):
    before = inspect.fingerprint(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    old = (folder / name).read_text() if (folder / name).exists() else ""
    (folder / name).write_text(old + " ")
    changed = inspect.fingerprint(folder)
    assert changed != before
    (folder / name).write_text(old + "  ")  # a second edit within one process
    assert inspect.fingerprint(folder) not in {before, changed}


def test_the_hash_leaves_out_what_is_never_read(folder):
    before = inspect.fingerprint(folder)
    (folder / "README.md").write_text("notes")
    (folder / "training_args.bin").write_bytes(b"pickle")
    assert inspect.fingerprint(folder) == before


def test_all_that_a_tokenizer_needs_is_fetched_and_no_pickle_no_code(monkeypatch, folder):
    from huggingface_hub.utils import filter_repo_objects

    asked = {}

    def download(_, **options):
        asked.update(options)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    hub.download("someone/model", "0" * 40)
    needed = ["config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja"]
    needed += [
        "chat_templates/tool_use.jinja",
        "vocab.json",
        "merges.txt",
        "generation_config.json",
    ]
    needed += ["model-00001-of-00002.safetensors", inspect.INDEX, "tokenizer_config.json"]
    unwanted = ["pytorch_model.bin", "modeling_x.py", "consolidated.safetensors", "onnx/model.onnx"]
    unwanted += ["original/params.json", "original/tokenizer.model", "training_args.bin"]
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    assert [*filter_repo_objects([*needed, *unwanted], **patterns)] == needed


def test_a_tokenizer_is_copied_byte_for_byte(folder, tmp_path):
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "tokenizer.py").write_text("print('code')")
    inspect.copy_tokenizer(folder, tmp_path / "out")
    names = {f.name for f in (tmp_path / "out").iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
