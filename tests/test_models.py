"""Models: broken or untrusted folders are refused, and the tiny twins are what they claim."""

import json
import shutil
import struct
from types import SimpleNamespace

import pytest
import torch

from conftest import PICO, TEXTS
from lethe_utils import models, params, pipeline
from lethe_utils.errors import LetheError
from lethe_utils.models import hub, inspect, twins

ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "gptj": "GPTJForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
WEIGHTS = "model.safetensors"
TEXT = "### Input:\n  the dog's café 🙂 is happy\n\n### Response: joy"


@pytest.fixture
def folder(pico, tmp_path):
    """A copy of a pico GPT-2 that a test may break."""
    return shutil.copytree(pico("gpt2")[0], tmp_path / "model")


def error(function, *args):
    with pytest.raises(LetheError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_whole_folder_is_accepted_and_its_shapes_are_read_from_the_header(folder):
    inspect.check_folder(folder)
    wanted = {n: tuple(t.shape) for n, t in models.load_model(folder).state_dict().items()}
    found = inspect.folder_shapes(folder)
    assert found["transformer.wte.weight"] == (300, 16)
    assert found.items() <= wanted.items()
    assert set(wanted) - set(found) == {"lm_head.weight"}  # tied, so not in the file


def test_a_folder_without_config_is_refused(folder):
    (folder / "config.json").unlink()
    assert "no config.json" in error(inspect.check_folder, folder)


def test_a_folder_without_weights_is_refused(folder):
    (folder / WEIGHTS).unlink()
    assert "no weights" in error(models.load_model, folder)


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused_unread(folder, pickle):
    (folder / WEIGHTS).unlink()
    (folder / pickle).write_bytes(b"not even a pickle")
    message = error(models.load_model, folder)
    assert "only pickles" in message and pickle in message


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1, -1000])
def test_a_truncated_file_is_refused_by_name(folder, keep):
    # 0 and 4: not even the length; 8 and 100: the header is cut; -1 and -1000: the body is.
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:keep])
    message = error(models.load_model, folder)
    assert WEIGHTS in message and "truncated" in message


@pytest.mark.parametrize("start", [b"\0" * 64, struct.pack("<Q", 8) + b"not json" + b"\0" * 64])
def test_a_file_that_was_never_filled_is_refused(folder, start):
    # Some download tools reserve the space first: the size is right, the bytes are not.
    (folder / WEIGHTS).write_bytes(start)
    assert "truncated" in error(inspect.check_folder, folder)


def test_a_missing_shard_is_named(pico_params, tmp_path):
    tokenizer = twins.train_tokenizer(["a b"], 300)
    model = twins.build_tiny(pico_params(), tokenizer, 0)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    inspect.check_folder(tmp_path)
    shards[0].unlink()
    assert f"shards missing: {shards[0].name}" in error(models.load_model, tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_asked_for_and_absent_is_refused_with_the_fix():
    assert "-p device cpu" in error(models.resolve_device, "cuda")
    assert models.resolve_device("auto") == models.resolve_device("cpu") == "cpu"


def test_cuda_is_used_where_there_is_one_unless_the_cpu_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [models.resolve_device(d) for d in ("auto", "cuda", "cpu")] == ["cuda", "cuda", "cpu"]


def test_no_model_is_loaded_with_a_kernel_that_gives_wrong_gradients(folder):
    """cuDNN's attention: NaN for masked batches of some lengths, on Hopper (pytorch#196678)."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    models.load_model(folder)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("has", [True, False])
def test_a_cpu_multiplies_in_bfloat16_where_it_can_and_may(monkeypatch, pico_params, has):
    monkeypatch.setattr(models, "_cpu_has_bfloat16", lambda: has)
    one, dtypes = torch.ones(2, 2), []
    for dtype in ("auto", "float32"):
        p = pico_params(device="cpu", cpu_dtype=dtype)
        assert models.bfloat16(p) is (has and dtype == "auto")
        assert pipeline.device(p) == {"device": "cpu", "bfloat16": models.bfloat16(p)}
        with models.arithmetic(p):
            dtypes.append((one @ one).dtype)
    assert dtypes == [torch.bfloat16 if has else torch.float32, torch.float32]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_held_as_they_are_multiplied_give_the_same_numbers(
    architecture, pico, pico_params, monkeypatch
):
    monkeypatch.setattr(models, "_cpu_has_bfloat16", lambda: True)
    folder = pico(architecture)[0]
    inputs = models.batch(models.load_tokenizer(folder), [[5, 6, 7, 8], [9, 10]])
    for said, dtype in (("auto", torch.bfloat16), ("float32", torch.float32)):
        p = pico_params(architecture, device="cpu", cpu_dtype=said)
        plain, held = models.load_model(folder).eval(), models.load_to_ask(folder, p)
        assert {layer.weight.dtype for layer in models.blocks.linear(held)} == {dtype}
        assert held.get_input_embeddings().weight.dtype == torch.float32
        with torch.no_grad(), models.arithmetic(p):
            assert torch.equal(plain(**inputs).logits, held(**inputs).logits)


def test_a_twin_is_float32_on_every_processor(monkeypatch):
    monkeypatch.setattr(models, "_cpu_has_bfloat16", lambda: True)
    names = [name for name in params.choices("models") if name.startswith("tiny-")]
    assert names and not any(models.bfloat16(params.load(name)) for name in names)


def test_a_processor_that_pytorch_cannot_be_asked_about_counts_as_without(monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert models._cpu_has_bfloat16.__wrapped__() is False


def hub_errors():
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    response = SimpleNamespace(headers={}, request=None)
    return [
        (RepositoryNotFoundError("404\nlong text", response=response), "no such model"),
        (GatedRepoError("403\nlong text", response=response), "accept its licence"),
        (LocalEntryNotFoundError("offline\nand more"), "check the network"),
        (HFValidationError("bad name"), "bad name"),
        (TimeoutError(), "TimeoutError"),  # an error without a message
        (Exception("something new\nand more"), "something new"),
    ]


@pytest.mark.parametrize(("raised", "expected"), hub_errors(), ids=lambda v: type(v).__name__)
def test_whatever_the_hub_raises_is_one_clear_error(monkeypatch, raised, expected):
    def fail(*_, **__):
        raise raised

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    message = error(hub.download, "someone/nothing", "main")
    assert expected in message and "someone/nothing" in message


def test_a_download_asks_for_the_revision_without_pickles_or_code(monkeypatch, folder):
    from fnmatch import fnmatch

    asked = {}
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda hub_id, **k: asked.update(k) or str(folder)
    )
    assert hub.download("someone/model", "a" * 40) == folder
    assert asked["revision"] == "a" * 40
    for name in ("pytorch_model.bin", "model.pt", "modeling_evil.py", "weights.pkl"):
        assert not any(fnmatch(name, pattern) for pattern in asked["allow_patterns"])
    for name in ("model-00001-of-00002.safetensors", "config.json", "merges.txt"):
        assert any(fnmatch(name, pattern) for pattern in asked["allow_patterns"])
    (folder / WEIGHTS).unlink()  # a download is checked like any folder
    assert "no weights" in error(hub.download, "someone/model", None)


@pytest.mark.parametrize("model_type", ["gpt2", "evil"])
def test_code_in_a_model_folder_is_never_run(folder, tmp_path, model_type):
    marker = tmp_path / "executed"
    (folder / "evil.py").write_text(
        "from pathlib import Path\n"
        f"Path({str(marker)!r}).touch()\n"
        "from transformers import GPT2Config as C, GPT2LMHeadModel as M\n"
        "from transformers import PreTrainedTokenizerFast as T\n"
    )
    names = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    for file, auto_map in (
        ("config.json", names),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.T", "evil.T"]}),
    ):
        config = json.loads((folder / file).read_text())
        config["auto_map"] = auto_map
        if file == "config.json":
            config["model_type"] = model_type
        (folder / file).write_text(json.dumps(config))
    if model_type == "evil":  # only its own code could load it
        assert "auto_map asks for code" in error(models.load_model, folder)
    else:
        assert type(models.load_model(folder)).__module__.startswith("transformers.")
        models.load_tokenizer(folder)
    assert not marker.exists()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_tiny_twin_is_of_its_class_and_saves_and_loads_the_same(architecture, pico, pico_params):
    base = pico(architecture)[0]
    model, tokenizer = models.load_model(base), models.load_tokenizer(base)
    assert model.config.architectures == [ARCHITECTURES[architecture]]
    assert type(model).__name__ == ARCHITECTURES[architecture]
    assert model.dtype == torch.float32
    assert model.config.num_hidden_layers == 5 and model.config.vocab_size == len(tokenizer)
    built = twins.build_tiny(pico_params(architecture), tokenizer, seed=0)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, built.state_dict()[name]), name
    other = twins.build_tiny(pico_params(architecture), tokenizer, seed=1)
    pairs = zip(built.parameters(), other.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


def test_the_twins_have_the_traits_that_make_their_class_special(pico):
    shapes = {a: inspect.folder_shapes(pico(a)[0]) for a in ARCHITECTURES}
    # GPT-2: Conv1D stores (in, out); GPT-J: one norm a block; Qwen2: grouped keys and q, k, v bias.
    assert shapes["gpt2"]["transformer.h.0.attn.c_attn.weight"] == (16, 48)
    assert not any("ln_2" in name for name in shapes["gptj"])
    assert shapes["qwen2"]["model.layers.0.self_attn.k_proj.weight"] == (8, 16)
    assert "model.layers.0.self_attn.k_proj.bias" in shapes["qwen2"]
    assert "model.layers.0.self_attn.k_proj.bias" not in shapes["llama"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_tokenizer_gives_the_same_ids(architecture, pico):
    # Beside a LLaMA config, transformers must not read the file as a LLaMA tokenizer.
    made = twins.train_tokenizer(TEXTS, PICO["vocab_size"])
    loaded = models.load_tokenizer(pico(architecture)[0])
    ids = made(TEXT, add_special_tokens=False)["input_ids"]
    assert loaded(TEXT, add_special_tokens=False)["input_ids"] == ids
    assert loaded.decode(ids) == TEXT  # byte-level: nothing is unknown, nothing is lost
    assert loaded.get_vocab() == made.get_vocab() and len(loaded) == PICO["vocab_size"]
    for token in ("pad_token_id", "bos_token_id", "eos_token_id", "padding_side"):
        assert getattr(loaded, token) == getattr(made, token)
    assert loaded.padding_side == "left"


def test_a_tokenizer_that_names_no_special_token_takes_them_from_the_config(folder):
    # gpt2-xl on the hub: its tokenizer_config.json holds a length and nothing else.
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    tokenizer = models.load_tokenizer(folder)
    wanted = ("<s>", "</s>", "</s>")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == wanted
    config = json.loads((folder / "config.json").read_text())
    del config["eos_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "no eos_token" in error(models.load_tokenizer, folder)


def test_a_tokenizer_without_padding_pads_with_eos_and_does_not_grow(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = models.load_tokenizer(folder)
    assert tokenizer.pad_token == tokenizer.eos_token and len(tokenizer) == 300


def test_an_attention_window_hides_far_tokens_from_all_blocks_but_the_last(pico, pico_params):
    tokenizer = models.load_tokenizer(pico("qwen2")[0])
    p = pico_params("qwen2", attention_window=2, n_layers=3)
    model = twins.build_tiny(p, tokenizer, seed=0).eval()
    one = torch.arange(10, 20)[None]
    other = one.clone()
    other[0, 0] = 50
    with torch.no_grad():
        first, second = (model(x, output_hidden_states=True).hidden_states for x in (one, other))
    # Two blocks with a window of two tokens carry a change two positions on, the last one anywhere.
    same = [torch.isclose(a, b).all(-1)[0].tolist() for a, b in zip(first, second, strict=True)]
    assert same[2] == [False] * 3 + [True] * 7
    assert same[3] == [False] * 10
    with pytest.raises(LetheError, match="attention_window: gpt2 has none"):
        twins.build_tiny(pico_params("gpt2", attention_window=2), tokenizer, seed=0)
