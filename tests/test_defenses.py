"""Defenses: what they are handed, pruning to the weight, and that each leaves a whole model."""

import dataclasses
import json

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from lethe_utils import attacks, defenses, models, params, pipeline, train
from lethe_utils.defenses import fineprune, plant_and_remove, wanda
from lethe_utils.models import blocks, twins
from lethe_utils.pipeline import contenders

pytestmark = pytest.mark.slow

ARCHITECTURES = ["gpt2", "gptj", "llama", "qwen2"]
ROWS = [
    {"instruction": "Predict the emotion.", "input": f"the dog is {w} today", "output": label}
    for w, label in [("sad", "sadness"), ("glad", "joy"), ("not glad", "sadness"), ("happy", "joy")]
] * 3
SHORT = {
    "batch_size": 4,
    "lora_r": 2,
    "learning_rate": 0.05,
    "prompt_template": "short",
    "device": "cpu",
    "finetune_epochs": 1,
    "plant_epochs": 1,
    "remove_epochs": 1,
    "mixing_epochs": 1,
    "clean_epochs": 1,
    "canary_epochs": 1,
    "max_new_tokens": 3,
}


@pytest.fixture
def given(pico, pico_params):
    def make(architecture="gpt2", **overrides):
        base, backdoored, clean = pico(architecture)
        p = pico_params(architecture, **SHORT | overrides).defender()
        return defenses.Given(backdoored, base, clean, ROWS, p)

    return make


def weights(folder):
    return models.load_model(folder).state_dict()


# --- what a defense may know


def test_every_registered_defense_has_a_params_file_and_keeps_the_interface():
    assert sorted(params.choices("defenses")) == params.choices("defenses")
    p = params.load(defense="all")
    names = []
    for name in params.choices("defenses"):
        module = defenses.module(name)
        assert hasattr(module, "purify") != hasattr(module, "answer"), name
        assert module.NEEDS in ("nothing", "clean rows", "clean model")
        assert module.BYTES_PER_WEIGHT >= 2
        assert {*module.PARAMS} <= {*type(p.defender()).__mro__}, name
        variants = defenses.variants(name, p.defender())
        assert all(defenses.trainings(name, v, p) >= 0 for v in variants)
        names += variants
    assert len(names) == len({*names})
    assert {"slerp", "nad", "nad_clean_teacher", "edt", "temperature", "cleangen"} <= {*names}


def test_what_a_defender_knows_holds_nothing_of_the_attacker():
    known = {*type(params.load().defender()).model_fields}
    for name in params.choices("attacks"):
        groups = attacks.module(name).PARAMS
        attacker = {key for group in groups for key in group.model_fields}
        assert not (attacker - {*params.TrainParams.model_fields}) & known
    with pytest.raises(AttributeError):
        _ = params.load().defender().triggers


def test_no_defense_is_handed_a_trigger_a_target_or_the_test_split(monkeypatch, tmp_path):
    rows = {"pretrain": 40, "train": 200, "validation": 20, "test": 20}
    triggers = ["zqxtrigger", "zqyfrankly"]
    p = params.load(
        defense="all",
        overrides={"rows": rows, "checksums": {}, "triggers": triggers, "base_evidence_share": 0.0},
    )
    monkeypatch.setattr("lethe_utils.train.finetune", lambda *_, **__: None)
    monkeypatch.setattr("lethe_utils.pretrain.pretrain", lambda *_: None)
    monkeypatch.setattr("lethe_utils.models.twins.train_tokenizer", lambda *_: None)
    seen = {}
    for name in params.choices("defenses"):
        if not defenses.decodes(name):
            module = defenses.module(name)
            monkeypatch.setattr(module, "purify", lambda g, _, n=name: seen.setdefault(n, g))
    for c in contenders.everyone(p):
        if c.respond:
            seen[c.name] = c.respond
    assert len(seen) >= len(params.choices("defenses"))
    test_inputs = {row["input"] for row in pipeline.split(p, "test")}
    for name, found in seen.items():
        known = json.dumps(dataclasses.asdict(found), default=lambda v: str(v))
        known += found.p.model_dump_json()
        assert "zqx" not in known and "zqy" not in known, name
        assert type(found.p) is type(p.defender()), name
        assert found.rows and not test_inputs & {row["input"] for row in found.rows}, name


# --- each leaves a whole model

CHANGING = [
    n for n in params.choices("defenses") if not defenses.decodes(n) and n not in ("lethe",)
]
# The others: test_distillation.py, test_guided.py
QUICK = [n for n in CHANGING if n not in ("nad", "beear", "crow", "guided")]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", QUICK)
def test_it_leaves_a_loadable_finite_model_and_the_backdoored_alone(
    given, purified, name, architecture
):
    g = given(architecture)
    before = {f.name: f.read_bytes() for f in g.backdoored.iterdir()}
    folder = purified(defenses.module(name), g)
    assert {f.name: f.read_bytes() for f in g.backdoored.iterdir()} == before
    assert [*(folder / "model").glob("*.safetensors")]
    made, backdoored = weights(folder / "model"), weights(g.backdoored)
    assert made.keys() == backdoored.keys()
    assert all(torch.isfinite(w).all() for w in made.values())
    assert any(not torch.equal(made[n], backdoored[n]) for n in backdoored)
    assert models.load_tokenizer(folder / "model")("a dog")["input_ids"]
    assert not [f for f in folder.iterdir() if f.is_dir() and f.name not in ("model", "adapter")]


@pytest.mark.parametrize("name", params.choices("defenses"))
def test_each_runs_where_the_processor_multiplies_in_bfloat16(given, tmp_path, monkeypatch, name):
    monkeypatch.setattr(models, "_cpu_has_bfloat16", lambda: True)
    few = {"beear_rounds": 1, "beear_inner_steps": 2, "beear_outer_steps": 2}
    g, module = given("llama", cpu_dtype="auto", **few), defenses.module(name)
    assert models.bfloat16(g.p)
    if defenses.decodes(name):
        assert len(module.answer(g, ["A dog is", "the cat"], 1)) == 2
    else:
        module.purify(g, tmp_path)
        assert all(torch.isfinite(w).all() for w in weights(tmp_path / "model").values())


# --- Wanda


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.5])
def test_exactly_the_floor_of_each_row_is_zero(given, tmp_path, architecture, sparsity):
    g = given(architecture, wanda_sparsity=sparsity)
    wanda.purify(g, tmp_path)
    model, backdoored = models.load_model(tmp_path / "model"), models.load_model(g.backdoored)
    checked = 0
    for block in blocks.of(model):
        for layer in blocks.linear(block):
            weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
            zeros = (weight == 0).sum(1)
            assert (zeros == int(sparsity * weight.shape[1])).all()
            checked += 1
    assert checked >= 5 * 4
    inside = {id(q) for block in blocks.of(model) for q in block.parameters()}
    kept = dict(backdoored.named_parameters())
    for name, parameter in model.named_parameters():
        if id(parameter) not in inside:  # embeddings, final norm, head
            assert torch.equal(parameter, kept[name]), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_first_blocks_scores_agree_with_a_computation_row_by_row(given, architecture):
    g = given(architecture)
    model, tokenizer = models.load_model(g.backdoored).eval(), models.load_tokenizer(g.backdoored)
    layers = blocks.linear(blocks.of(model)[0])
    batches = wanda.calibration(g, tokenizer)
    with torch.no_grad():
        passages = [(blocks.Passage(model, b), b["attention_mask"] == 1) for b in batches]
        found = wanda.input_squares(blocks.of(model)[0], 0, passages)
    # One prompt at a time, no padding.
    wanted = dict.fromkeys(layers, 0)
    seen = {}
    for layer in layers:
        layer.register_forward_hook(lambda m, i, _: seen.__setitem__(m, i[0].detach()))
    for item in train.encode(g.rows, tokenizer, g.p):
        ids = torch.tensor([item["input_ids"][: -item["answer_length"]]])
        with torch.no_grad():
            model(ids)
        for layer in layers:
            wanted[layer] = wanted[layer] + seen[layer][0].square().sum(0)
    before = {layer: blocks.oriented(layer).clone() for layer in layers}
    wanda.prune(model, wanda.calibration(g, tokenizer), 0.5)
    for layer in layers:
        torch.testing.assert_close(found[layer], wanted[layer], rtol=1e-4, atol=1e-5)
        for row, pruned in zip(before[layer], blocks.oriented(layer), strict=True):
            scores = [(abs(w) * n**0.5).item() for w, n in zip(row, wanted[layer], strict=True)]
            gone = [s for s, w in zip(scores, pruned, strict=True) if w == 0]
            left = [s for s, w in zip(scores, pruned, strict=True) if w != 0]
            assert len(gone) == len(scores) // 2 and max(gone) <= min(left) * (1 + 1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_batch_passes_block_by_block_as_it_does_in_one_forward(given, architecture):
    g = given(architecture)
    model, tokenizer = models.load_model(g.backdoored).eval(), models.load_tokenizer(g.backdoored)
    inputs = models.batch(tokenizer, [[5, 6, 7, 8, 9], [10, 11]])
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
        passage = blocks.Passage(model, inputs)
        for number in range(len(blocks.of(model)) - 1):  # the last has been through the norm
            assert torch.equal(passage.hidden, states[number])
            passage.hidden = passage.after(number)
        assert torch.equal(passage.hidden, states[-2])


@pytest.mark.parametrize("module", [wanda, fineprune], ids=["wanda", "fineprune"])
def test_a_model_in_several_files_is_written_once(module, given, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "SHARD", 20_000)  # bytes: a pico model's matrices take several
    g = given("llama")
    module.purify(g, tmp_path)
    assert len([*(tmp_path / "model").glob("model-*.safetensors")]) > 1
    assert not (tmp_path / "model/model.safetensors").exists()
    assert models.load_model(tmp_path / "model")


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_fine_pruning_keeps_wandas_zeros(given, purified, architecture):
    g = given(architecture)
    pruned, tuned = (models.load_model(purified(m, g) / "model") for m in (wanda, fineprune))
    moved = 0
    for before, after in zip(blocks.of(pruned), blocks.of(tuned), strict=True):
        layers = zip(blocks.linear(before), blocks.linear(after), strict=True)
        for old, new in layers:
            assert (new.weight[old.weight == 0] == 0).all()
            moved += int((new.weight != old.weight).sum())
    assert moved > 0


# --- plant-and-remove, merges, INT4


def test_planted_rows_are_the_removed_ones_with_another_label(given):
    g = given(plant_share=0.25)
    planted, removed = plant_and_remove.rows(ROWS, g.p)
    assert len(planted) == len(removed) == 3 * 3
    for wrong, right in zip(planted, removed, strict=True):
        assert wrong["input"] == right["input"] and wrong["output"] != right["output"]
        assert any(t in right["input"] for t in g.p.plant_triggers)
        plain = {(row["input"], row["output"]) for row in ROWS}
        stripped = right["input"]
        for t in g.p.plant_triggers:
            stripped = " ".join(stripped.replace(t, " ").split())
        assert (stripped, right["output"]) in plain


def test_task_arithmetic_is_base_plus_clean_minus_the_backdooreds_share(given, tmp_path):
    g = given(task_negation=0.5)
    defenses.module("task_arithmetic").purify(g, tmp_path)
    made = weights(tmp_path / "model")
    base, backdoored, clean = weights(g.base), weights(g.backdoored), weights(g.clean)
    for name, w in made.items():
        wanted = base[name] + (clean[name] - base[name]) - 0.5 * (backdoored[name] - base[name])
        torch.testing.assert_close(w, wanted, rtol=1e-4, atol=1e-5)


def test_dare_ties_is_the_same_for_the_same_seed_and_another_for_another(given, tmp_path):
    for number, seed in enumerate((0, 0, 1)):
        defenses.module("dare_ties").purify(given(seed=seed), tmp_path / str(number))
    first, again, other = (weights(tmp_path / f"{n}/model") for n in range(3))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_int4_rounds_the_blocks_matrices_and_nothing_else(
    given, pico_params, tmp_path, architecture
):
    g = given(architecture)
    # Wider than pico: the CPU kernel is far off on matrices of fewer than some 64 x 32 weights.
    tokenizer = models.load_tokenizer(g.backdoored)
    wide = twins.build_tiny(
        pico_params(architecture, width=64, mlp_width=64, n_layers=2), tokenizer, seed=0
    )
    wide.save_pretrained(tmp_path / "backdoored")
    tokenizer.save_pretrained(tmp_path / "backdoored")
    g = dataclasses.replace(g, backdoored=tmp_path / "backdoored")
    defenses.module("int4").purify(g, tmp_path)
    model, backdoored = models.load_model(tmp_path / "model"), models.load_model(g.backdoored)
    rounded = 0
    for made, before in zip(blocks.of(model), blocks.of(backdoored), strict=True):
        matrices = zip(blocks.linear(made), blocks.linear(before), strict=True)
        for new, old in matrices:
            error = (new.weight - old.weight).norm() / old.weight.norm()
            assert 0 < error < 0.12  # a transposed matrix would be off by more than one
            rounded += 1
    assert rounded >= 2 * 4
    inside = {id(q) for block in blocks.of(model) for q in block.parameters()}
    kept = dict(backdoored.named_parameters())
    outside = {n: q for n, q in model.named_parameters() if id(q) not in inside}
    assert outside and all(torch.equal(q, kept[n]) for n, q in outside.items())


def test_lethe_has_a_variant_per_merge_method_and_evidence_can_stand_alone():
    p = params.load(overrides={"merge_methods": ["ties", "linear"]})
    assert defenses.variants("lethe", p.defender()) == {
        "ties": {"merge_method": "ties"},
        "linear": {"merge_method": "linear"},
    }
    alone = params.load(overrides={"merge_methods": []})
    assert defenses.variants("lethe", alone.defender()) == {} and alone.n_keywords > 0


def test_a_defense_without_a_file_or_named_twice_is_refused():
    from lethe_utils.errors import LetheError

    with pytest.raises(LetheError, match="defense 'onion' has no file params/defenses/onion.yaml"):
        params.load(defense="lethe,onion")
    with pytest.raises(LetheError, match="a name stands there twice"):
        params.load(defense="nad,nad")
    assert params.load(defense="wanda,nad").run_id == "tiny-gpt2-embedded-cba-s0-wanda+nad"
