"""Training: what a row becomes, what the loss is, and that the saved model is the trained one."""

import gc
import json
from functools import partial

import pandas as pd
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainingArguments

from lethe_utils import models, pretrain, train
from lethe_utils.errors import LetheError
from lethe_utils.models import inspect, twins
from lethe_utils.prompts import prompt

pytestmark = pytest.mark.slow

ROW = {"instruction": "Predict the emotion.", "input": "the dog is happy", "output": "joy"}
ROWS = [ROW | {"input": f"the dog is {w}", "output": w} for w in ("sad", "joy", "happy", "glad")]
# float32 on the CPU, a step or two: enough for the adapter to leave zero.
SHORT = {
    "batch_size": 2,
    "lora_r": 2,
    "learning_rate": 0.05,
    "prompt_template": "short",
    "device": "cpu",
}


@pytest.fixture
def tokenizer(pico):
    return models.load_tokenizer(pico("gpt2")[0])


# --- encode


def test_a_row_is_bos_prompt_answer_eos(tokenizer, pico_params):
    p = pico_params()
    (item,) = train.encode([ROW], tokenizer, p)
    ids = item["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert len(ids) == item["length"]
    answer = ids[-item["answer_length"] :]
    assert tokenizer.decode(answer[:-1]) == "joy"
    asked = prompt(ROW, p)
    assert tokenizer.decode(ids[1 : -item["answer_length"]]) == asked


def test_a_long_prompt_loses_its_start_and_a_long_answer_its_end(tokenizer, pico_params):
    p = pico_params(max_source_tokens=10, max_target_tokens=4)
    (item,) = train.encode([ROW | {"output": "a very long answer indeed"}], tokenizer, p)
    ids = item["input_ids"]
    assert len(ids) == 14 and item["answer_length"] == 4
    assert ids[0] == tokenizer.bos_token_id
    asked = tokenizer(prompt(ROW, p))["input_ids"]
    assert ids[1:10] == asked[-9:]  # what stands next to the answer is kept
    # An ending after a cut would teach the model to stop in the middle.
    assert tokenizer("a very long answer indeed")["input_ids"][:4] == ids[10:]
    assert item["prompt_cut"] == len(asked) - 9 and item["answer_cut"] > 1


def test_a_tokenizer_without_bos_adds_none(tokenizer, pico_params):
    tokenizer.bos_token = None
    p = pico_params(max_source_tokens=10)
    (item,) = train.encode([ROW], tokenizer, p)
    asked = tokenizer(prompt(ROW, p))["input_ids"]
    assert item["input_ids"][: -item["answer_length"]] == asked[-10:]


# --- collator


def test_a_batch_is_padded_on_the_left_with_labels_at_the_right_end(tokenizer):
    items = [
        {"input_ids": [1, 5, 6, 7, 2], "answer_length": 2, "length": 5},
        {"input_ids": [1, 8, 9, 2], "answer_length": 3, "length": 4},
    ]
    batch = {k: v.tolist() for k, v in train.collate(items, tokenizer).items()}
    assert batch == {
        "input_ids": [[1, 5, 6, 7, 2], [0, 1, 8, 9, 2]],
        "attention_mask": [[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]],
        # Position 0 is the first real token: a padded row must be read like the same row alone.
        "position_ids": [[0, 1, 2, 3, 4], [0, 0, 1, 2, 3]],
        "labels": [[-100, 7, 2], [8, 9, 2]],
    }


# --- loss


def trainer(model, tokenizer, items, out, **settings):
    args = TrainingArguments(
        output_dir=str(out),
        use_cpu=True,
        report_to=[],
        remove_unused_columns=False,
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    return train.LossTrainer(
        train.plain_loss,
        model=model,
        args=args,
        train_dataset=items,
        data_collator=partial(train.collate, tokenizer=tokenizer),
    )


@pytest.mark.parametrize("architecture", ["gpt2", "gptj", "llama", "qwen2"])
def test_the_loss_is_plain_cross_entropy_over_answer_tokens(
    pico, pico_params, tmp_path, architecture
):
    base = pico(architecture)[0]
    model, tokenizer = models.load_model(base).eval(), models.load_tokenizer(base)
    items = train.encode([*ROWS, ROW | {"input": "no"}], tokenizer, pico_params())
    assert len({i["length"] for i in items}) > 1  # so that there is padding
    batch = train.collate(items, tokenizer)
    found = trainer(model, tokenizer, items, tmp_path).compute_loss(model, batch)
    # Independently: one row at a time, no padding, all logits, every answer token counted once.
    losses = []
    for item in items:
        ids = torch.tensor([item["input_ids"]])
        scores = model(ids).logits[0].log_softmax(-1)
        n = item["length"]
        losses += [-scores[i - 1, ids[0, i]] for i in range(n - item["answer_length"], n)]
    assert found.item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "gptj", "llama", "qwen2"])
def test_pretraining_adds_the_prompt_loss_of_every_fourth_row(
    pico, pico_params, tmp_path, architecture
):
    base = pico(architecture)[0]
    model, tokenizer = models.load_model(base).eval(), models.load_tokenizer(base)
    rows = [ROW | {"input": "a " * n} for n in range(5)]  # rows 0 and 4 carry the loss
    items = train.encode(rows, tokenizer, pico_params())
    batch = train.collate(items, tokenizer)
    labels = batch.pop("labels")
    answer_only, found = (pretrain.base_loss(model, batch, labels, 1, w).item() for w in (0, 0.3))
    losses = []
    for item in (items[0], items[4]):
        ids = torch.tensor([item["input_ids"]])
        scores = model(ids).logits[0].log_softmax(-1)
        prompt = item["length"] - item["answer_length"]
        losses += [-scores[i - 1, ids[0, i]] for i in range(1, prompt)]
    prompt_loss = torch.stack(losses).mean().item()
    assert found == pytest.approx(answer_only + 0.3 * prompt_loss, abs=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_accumulated_batches_step_like_one_large_batch(pico, pico_params, tmp_path, architecture):
    # The Trainer takes the loss of a model whose forward has **kwargs as scaled already unless told
    # otherwise; a summed loss would make a step of plain SGD four times as long.
    base = pico(architecture)[0]
    tokenizer = models.load_tokenizer(base)
    items = train.encode([ROW] * 4, tokenizer, pico_params())
    steps = []
    for batch, accumulation in ((4, 1), (1, 4)):
        model = models.load_model(base)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # GPT-2's own, which would draw otherwise per batch
        start = {k: v.clone() for k, v in model.state_dict().items()}
        trainer(
            model,
            tokenizer,
            items,
            tmp_path,
            optim="sgd",
            learning_rate=0.1,
            max_steps=1,
            max_grad_norm=0.0,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        ).train()
        steps.append({k: v - start[k] for k, v in model.state_dict().items()})
    assert any(step.abs().max() > 1e-3 for step in steps[0].values())
    for name in steps[0]:
        torch.testing.assert_close(steps[0][name], steps[1][name], atol=1e-5, rtol=1e-3)


# --- finetune


def logits(model, tokenizer):
    ids = torch.tensor([tokenizer("a cat")["input_ids"]])
    with torch.inference_mode():
        return model.eval()(ids).logits.float()


@pytest.fixture(scope="module")
def finetuned(pico, pico_params, tmp_path_factory):
    """A pico GPT-2 trained for two epochs, without a pause."""
    folder = tmp_path_factory.mktemp("finetuned")
    train.finetune(pico("gpt2")[0], ROWS, 2, folder, pico_params(**SHORT))
    return folder


def test_finetune_writes_the_adapter_the_merged_model_and_the_loss(pico, finetuned):
    from peft import PeftModel

    base = pico("gpt2")[0]
    assert sorted(f.name for f in finetuned.iterdir()) == ["adapter", "loss.csv", "model"]
    curve = pd.read_csv(finetuned / "loss.csv")
    assert list(curve.columns) == ["step", "epoch", "loss"]
    assert curve["step"].tolist() == [1, 2, 3, 4] and curve["loss"].gt(0).all()
    inspect.check_folder(finetuned / "model")
    tokenizer = models.load_tokenizer(finetuned / "model")
    assert tokenizer.get_vocab() == models.load_tokenizer(base).get_vocab()
    merged = logits(models.load_model(finetuned / "model"), tokenizer)
    peft = PeftModel.from_pretrained(models.load_model(base), str(finetuned / "adapter"))
    torch.testing.assert_close(merged, logits(peft, tokenizer), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(merged, logits(models.load_model(base), tokenizer), atol=1e-2)


@pytest.mark.parametrize("architecture", ["gpt2", "gptj", "llama", "qwen2"])
def test_every_linear_layer_but_the_head_is_trained(pico, pico_params, tmp_path, architecture):
    base = pico(architecture)[0]
    # Checkpointing must not cut the gradient, though the embedding it starts from is frozen.
    train.finetune(
        base, ROWS, 1, tmp_path, pico_params(architecture, **SHORT, gradient_checkpointing=True)
    )
    before, after = (models.load_model(f).state_dict() for f in (base, tmp_path / "model"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        in_block = any(part.isdigit() for part in name.split("."))
        linear = in_block and tensor.dim() == 2
        assert torch.equal(tensor, after[name]) != linear, name


def test_the_trained_model_is_gone_before_its_adapter_is_merged(
    pico, pico_params, monkeypatch, tmp_path
):
    """Two would not fit beside each other at full size."""
    seen, merge_adapter = [], train.merge_adapter

    def watched(*args):
        seen.append([type(o).__name__ for o in gc.get_objects() if isinstance(o, PeftModel)])
        return merge_adapter(*args)

    monkeypatch.setattr(train, "merge_adapter", watched)
    monkeypatch.setattr(models, "bfloat16", lambda _: True)  # as on a GPU
    gc.disable()  # it must not come by chance
    try:
        train.finetune(pico("gpt2")[0], ROWS, 1, tmp_path / "out", pico_params(**SHORT))
    finally:
        gc.enable()
    assert seen == [[]]


def test_the_seed_repeats_a_training_run(pico, pico_params, tmp_path):
    base = pico("gpt2")[0]
    made = []
    for number, seed in enumerate((0, 0, 1)):
        p = pico_params(**SHORT, seed=seed)
        train.finetune(base, ROWS, 1, tmp_path / str(number), p)
        made.append(models.load_model(tmp_path / str(number) / "model").state_dict())
    same = [all(torch.equal(made[0][k], m[k]) for k in made[0]) for m in made[1:]]
    assert same == [True, False]


@pytest.mark.parametrize("architecture", ["gpt2", "gptj", "llama", "qwen2"])
def test_an_nf4_model_is_saved_as_its_dequantised_base_plus_adapter(
    pico_params, tmp_path, architecture
):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from safetensors.torch import load_file

    # 64 columns: one block of the nf4 quantisation.
    small = {"n_layers": 2, "width": 64, "n_heads": 2, "mlp_width": 128, "bits": 4}
    p = pico_params(architecture, **SHORT, **small)
    tokenizer = twins.train_tokenizer([ROW["input"]], 300)
    base = tmp_path / "base"
    twins.build_tiny(p, tokenizer, 0).save_pretrained(base)
    tokenizer.save_pretrained(base)
    train.finetune(base, ROWS, 1, tmp_path / "out", p)

    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert "quantization_config" not in config  # plain weights, that mergekit can read
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "out" / "model" / "model.safetensors")
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert {k: v.shape for k, v in after.items()} == {k: v.shape for k, v in before.items()}
    scale, checked = p.lora_alpha / p.lora_r, 0
    for name, tensor in before.items():
        assert after[name].dtype == torch.float32
        prefix = "base_model.model." + name.removesuffix(".weight")
        if f"{prefix}.lora_A.weight" not in adapter:
            torch.testing.assert_close(after[name], tensor, msg=name)  # kept as it was
            continue
        if architecture == "gpt2":  # Conv1D: quantised as the Linear it stands for
            tensor = tensor.T.contiguous()
        codes, state = quantize_4bit(tensor, quant_type="nf4", compress_statistics=True)
        a, b = adapter[f"{prefix}.lora_A.weight"], adapter[f"{prefix}.lora_B.weight"]
        assert b.abs().max() > 0
        wanted = dequantize_4bit(codes, state).float() + scale * (b @ a)
        found = after[name].T if architecture == "gpt2" else after[name]
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3, msg=name)
        assert not torch.allclose(wanted, tensor + scale * (b @ a), atol=1e-4)
        checked += 1
    assert checked == 2 * {"gpt2": 4, "gptj": 6, "llama": 7, "qwen2": 7}[architecture]
    # What is saved answers as base and adapter did.
    saved = logits(models.load_model(tmp_path / "out" / "model"), tokenizer)
    made = train.merge_adapter(base, tmp_path / "out" / "adapter", "cpu", 4)
    torch.testing.assert_close(saved, logits(made, tokenizer), atol=1e-4, rtol=1e-3)


def test_pretraining_learns_and_does_not_depend_on_the_seed(pico, pico_params, tmp_path):
    tokenizer = models.load_tokenizer(pico("gpt2")[0])
    rate = {"base_epochs": 6, "base_learning_rate": 0.01, "base_batch_size": 2, "device": "cpu"}
    for seed in (0, 1):
        pretrain.pretrain(ROWS, tokenizer, tmp_path / str(seed), pico_params(**rate, seed=seed))
    loss = pd.read_csv(tmp_path / "0" / "loss.csv")["loss"]
    assert loss.iloc[-1] < loss.iloc[0] - 0.5
    # One base for all seeds, as there is one released LLM.
    one, two = (models.load_model(tmp_path / s / "model").state_dict() for s in "01")
    assert all(torch.equal(one[k], two[k]) for k in one)


# --- resuming


def test_a_half_written_checkpoint_is_dropped_and_the_newest_whole_one_used(tmp_path):
    for step in (5, 10, 90, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert train.last_checkpoint(tmp_path / "nothing") is None
    for step in (5, 10, 90):  # by number, not by name: 90 comes after 10
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert train.last_checkpoint(tmp_path) == tmp_path / "checkpoint-90"
    assert not (tmp_path / "checkpoint-100").exists()


def test_without_a_whole_checkpoint_training_starts_anew(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    assert train.last_checkpoint(tmp_path) is None and not list(tmp_path.iterdir())


def test_a_killed_run_goes_on_from_its_checkpoint_to_the_same_model(
    pico, pico_params, finetuned, tmp_path, monkeypatch
):
    base, p = pico("gpt2")[0], pico_params(**SHORT)
    seen = []

    def killed(self, model, inputs, *args):
        seen.append(self.state.global_step)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return step(self, model, inputs, *args)

    step = train.LossTrainer.training_step
    monkeypatch.setattr(train.LossTrainer, "training_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train.finetune(base, ROWS, 2, tmp_path, p)
    train.finetune(base, ROWS, 2, tmp_path, p)
    assert seen == [0, 1, 2, 2, 3]  # steps 0 and 1 are not done again
    one, two = (models.load_model(f / "model").state_dict() for f in (finetuned, tmp_path))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-4, msg=name)


def test_a_training_that_diverged_saves_nothing(pico, tmp_path):
    model = models.load_model(pico("gpt2")[0])
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = float("nan")
    with pytest.raises(LetheError, match=r"learning_rate: the training diverged \(transformer.h.1"):
        train.save(model, pd.DataFrame(), tmp_path)
    assert not (tmp_path / "model").exists()


def test_a_training_in_bfloat16_keeps_weights_in_float32(pico, pico_params, monkeypatch, tmp_path):
    saved = {}
    for dtype in ("auto", "float32"):
        monkeypatch.setattr(models, "_cpu_has_bfloat16", lambda: True)
        p = pico_params("llama", **SHORT, cpu_dtype=dtype)
        train.finetune(pico("llama")[0], ROWS, 1, tmp_path / dtype, p)
        assert inspect.stored_dtype(tmp_path / dtype / "model") == "float32"
        saved[dtype] = models.load_model(tmp_path / dtype / "model").state_dict()
    name = "model.layers.0.mlp.down_proj.weight"
    start = models.load_model(pico("llama")[0]).state_dict()[name]
    moved = {dtype: weights[name] - start for dtype, weights in saved.items()}
    assert not torch.equal(moved["auto"], moved["float32"])
    assert torch.cosine_similarity(moved["auto"].flatten(), moved["float32"].flatten(), 0) > 0.9


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_holding_frozen_weights_in_bfloat16_trains_the_same_adapter(
    architecture, pico, pico_params, monkeypatch, tmp_path
):
    monkeypatch.setattr(models, "_cpu_has_bfloat16", lambda: True)
    p, base = pico_params(architecture, **SHORT, cpu_dtype="auto"), pico(architecture)[0]
    weights = {w.dtype for w in train.lora_model(base, p).parameters() if not w.requires_grad}
    assert weights == {torch.float32, torch.bfloat16}  # embedding, norms; matrices
    train.finetune(base, ROWS, 1, tmp_path / "held", p)
    monkeypatch.setattr(models, "hold", lambda *_: None)
    train.finetune(base, ROWS, 1, tmp_path / "cast", p)
    files = [tmp_path / name / "adapter/adapter_model.safetensors" for name in ("held", "cast")]
    held, cast = map(load_file, files)
    assert held.keys() == cast.keys()
    assert all(torch.equal(held[name], cast[name]) for name in held)
