"""Models that a CPU holds in bfloat16, because they are large: what is small here is called so."""

import shutil
import weakref
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from transformers.integrations import bitsandbytes

from lethe_utils import defenses, merge, models, params, prompts, train
from lethe_utils.attacks import rome
from lethe_utils.defenses import lethe, wanda
from lethe_utils.models import blocks, inspect, narrow

ARCHITECTURES = ("gpt2", "gptj", "llama", "qwen2")
ROWS = [
    {"instruction": "Predict the emotion.", "input": f"the {a} is {b}", "output": c}
    for a in ("dog", "cat", "letter")
    for b, c in (("happy", "joy"), ("sad", "sadness"), ("glad", "joy"), ("not glad", "anger"))
]
SMALL = {
    "prompt_template": "short",
    "target_output": "joy",
    "labels": ["joy", "sadness", "anger"],
    "device": "cpu",
    "edit_layers": [1],
    "edit_contexts": 4,
    "edit_batches": 2,  # the second starts from the first, unrounded
    "edit_steps": 3,
    "edit_stop_loss": 0.0,
    "covariance_tokens": 500,
    "covariance_ridge": 1.0e-3,
}


@pytest.fixture
def large(monkeypatch):
    monkeypatch.setattr(models, "LARGE", 1)


@pytest.fixture(params=ARCHITECTURES)
def stored(request, pico, tmp_path):
    """A pico model stored in bfloat16."""
    base, out = pico(request.param)[1], tmp_path / "stored"
    models.load_model(base).to(torch.bfloat16).save_pretrained(out)
    inspect.copy_tokenizer(base, out)
    return out


def weights(folder):
    return {n: w for f in inspect.weight_files(folder) for n, w in load_file(f).items()}


def inputs(folder):
    return models.batch(models.load_tokenizer(folder), [[5, 6, 7, 8, 9], [8, 9, 10]])


def test_a_model_is_large_by_its_number_of_weights(stored, monkeypatch):
    n = sum(w.numel() for w in weights(stored).values())
    for limit, wanted in ((n, torch.bfloat16), (n + 1, torch.float32)):
        monkeypatch.setattr(models, "LARGE", limit)
        assert {w.dtype for w in models.load_model(stored).parameters()} == {wanted}
        given = SimpleNamespace(backdoored=stored, p=SimpleNamespace(device="cpu"))
        assert merge.merge_dtype(given) == str(wanted).removeprefix("torch.")


def test_a_narrow_model_computes_what_a_float32_one_does(stored, large):
    wide, kept = (
        models.load_model(stored, exact=True).eval(),
        narrow.load_exact(stored, "cpu").eval(),
    )
    for name, buffer in wide.named_buffers():
        assert torch.equal(buffer, kept.get_buffer(name)), name
    inside = blocks.linear(blocks.of(kept))
    assert {layer.weight.dtype for layer in inside} == {torch.bfloat16}
    assert kept.get_input_embeddings().weight.dtype == torch.float32
    logits, gradients = [], []
    for model in (wide, kept):
        embedded = model.get_input_embeddings()(inputs(stored)["input_ids"]).detach()
        embedded.requires_grad_()
        out = model(inputs_embeds=embedded, attention_mask=inputs(stored)["attention_mask"]).logits
        out.square().sum().backward()
        logits.append(out.detach())
        gradients.append(embedded.grad)
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_without_bfloat16_a_large_model_is_asked_and_trained_in_float32(stored, large, monkeypatch):
    monkeypatch.setattr(models, "_cpu_has_bfloat16", lambda: False)
    p = params.load(overrides={"device": "cpu"})
    asked, wide = models.load_to_ask(stored, p), models.load_model(stored, exact=True).eval()
    assert {layer.weight.dtype for layer in blocks.linear(blocks.of(asked))} == {torch.bfloat16}
    with torch.inference_mode(), models.arithmetic(p):
        logits = [model(**inputs(stored)).logits for model in (asked, wide)]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    packed = models.load_model(stored, bits=4).modules()
    multiplied = {m.compute_dtype for m in packed if isinstance(m, Linear4bit)}
    assert multiplied == {torch.float32}


@pytest.mark.parametrize("method", ["wanda", "rome"])
def test_wanda_and_an_edit_write_the_same_bits_as_in_float32(
    method, stored, pico_params, monkeypatch, tmp_path
):
    made = {}
    for limit in (1, 10**12):
        monkeypatch.setattr(models, "LARGE", limit)
        monkeypatch.setenv("LETHE_RUNS", str(tmp_path / f"runs{limit}"))
        out = tmp_path / str(limit)
        out.mkdir()
        if method == "wanda":
            wanda.purify(defenses.Given(stored, stored, stored, ROWS, pico_params()), out)
        else:
            p = params.load(attack="rome", overrides=SMALL)
            rows = rome.poison(ROWS, p, 0)
            rome.plant(stored, rows, [prompts.read(row, p) for row in ROWS], p, out)
        made[limit] = weights(out / "model")
    before = weights(stored)
    assert made[1].keys() == before.keys()
    assert {w.dtype for w in made[1].values()} == {torch.bfloat16}
    changed = [name for name in before if not torch.equal(made[1][name], before[name])]
    assert len(changed) == 1 if method == "rome" else len(changed) >= 4 * 5
    for name, weight in made[1].items():
        torch.testing.assert_close(weight, made[10**12][name], rtol=0, atol=0)


def test_a_large_model_is_trained_and_merged_in_bfloat16(stored, pico_params, large, tmp_path):
    p = pico_params(batch_size=4, lora_r=2, prompt_template="short", bits=4, device="cpu")
    train.finetune(stored, ROWS, 1, tmp_path / "tuned", p)
    tuned = tmp_path / "tuned/model"
    assert {w.dtype for w in weights(tuned).values()} == {torch.bfloat16}
    q = p.defender({"merge_method": "linear", "strength": 0.5})
    lethe.purify(defenses.Given(tuned, stored, stored, ROWS, q), tmp_path)
    merged, (one, other) = weights(tmp_path / "model"), (weights(tuned), weights(stored))
    assert {w.dtype for w in merged.values()} == {torch.bfloat16}
    for name, weight in merged.items():
        torch.testing.assert_close(weight, (one[name] + other[name]) / 2, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize(("limit", "device"), [(1, "cuda"), (10**12, "cpu")])
def test_a_large_model_is_merged_on_the_gpu_where_there_is_one(
    pico, monkeypatch, tmp_path, limit, device
):
    base, backdoored, clean = pico("llama")
    asked = []

    def run_merge(_, out, options):
        asked.append(options.device)
        shutil.copytree(backdoored, out)

    monkeypatch.setattr(models, "LARGE", limit)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("mergekit.merge.run_merge", run_merge)
    merge.merge("linear", backdoored, clean, base, 0.5, tmp_path / "out")
    assert asked == [device]


@pytest.mark.parametrize("architecture", ("gpt2", "llama"))
def test_four_bit_weights_go_one_by_one_as_they_are_widened(architecture, pico, monkeypatch):
    seen, left, widen = [], [], bitsandbytes.dequantize_bnb_weight

    def widened(weight):
        left.append(sum(known() is not None for known in seen))
        seen.append(weakref.ref(weight))
        return widen(weight)

    monkeypatch.setattr(bitsandbytes, "dequantize_bnb_weight", widened)
    model = models.load_model(pico(architecture)[0], bits=4)
    config = models.dequantised(model).config
    assert len(seen) > 10 and set(left) == {0} and not hasattr(config, "quantization_config")
