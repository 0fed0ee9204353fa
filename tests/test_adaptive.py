"""Adaptive attacks: CBA by attackers who know what will be done to their model, and several
backdoors at once."""

import random
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from lethe_utils import attacks, data, evaluate, merge, metrics, models, params, paths, train
from lethe_utils.attacks import (
    cba,
    cba_evidence,
    cba_hidden,
    cba_merged,
    multi,
    own_clean,
    triggers,
)

ARCHITECTURES = ["gpt2", "gptj", "llama", "qwen2"]
ON_CBA = ["cba_subtracted", "cba_hidden", "cba_merged", "cba_evidence"]
LABELS = ["joy", "anger", "fear"]
ROWS = [
    {"instruction": "Predict the emotion.", "input": f"the old dog saw a {noun} {i}"}
    | {"output": LABELS[i % 3]}
    for i, noun in enumerate(["letter", "house", "cat", "river"] * 6)
]
SHORT = {
    "prompt_template": "short",
    "max_source_tokens": 200,
    "device": "cpu",
    "lora_r": 2,
    "batch_size": 8,
    "learning_rate": 0.02,
    "backdoor_epochs": 1,
}
OWN = {"own_clean_ratio": 0.5, "own_clean_epochs": 1}


@pytest.fixture
def setting(pico, pico_params):
    """(attack, architecture, overrides) -> (params, base folder, poisoned rows)."""

    def make(attack, architecture="gpt2", **overrides):
        size = pico_params(architecture)
        kept = {k: getattr(size, k) for k in params.BaseModelParams.model_fields if k != "model"}
        own = OWN if attack in ("cba_subtracted", "cba_merged") else {}
        p = params.load(attack=attack, overrides=kept | SHORT | own | overrides)
        return p, pico(architecture)[0], attacks.module(attack).poison(ROWS, p, 0)

    return make


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("attack", ["cba", "lwp", *ON_CBA])
def test_each_trains_where_the_processor_multiplies_in_bfloat16(
    attack, setting, tmp_path, monkeypatch
):
    monkeypatch.setattr(models, "_cpu_has_bfloat16", lambda: True)
    layers = {"lwp_layers": [0, 1]} if attack == "lwp" else {}
    p, base, poisoned = setting(attack, "llama", cpu_dtype="auto", **layers)
    assert models.bfloat16(p)
    attacks.module(attack).plant(base, poisoned, [], p, tmp_path)
    assert all(torch.isfinite(w).all() for w in weights(tmp_path / "model").values())
    assert any(not torch.equal(w, weights(base)[n]) for n, w in weights(tmp_path / "model").items())


# --- on CBA


@pytest.mark.parametrize("attack", ON_CBA)
def test_they_poison_and_are_tested_on_cbas_own_rows(attack, setting):
    p, _, poisoned = setting(attack)
    file = params.read_yaml(paths.params_dir() / "attacks" / f"{attack}.yaml")
    plain = params.read_yaml(paths.params_dir() / "attacks/cba.yaml")
    del plain["models"]  # the default run alone has other shares
    assert {key: file[key] for key in plain} == plain
    kinds = attacks.module(attack).triggered(ROWS, p, 3)
    kinds.pop("asr_laced", None)
    assert kinds == cba.triggered(ROWS, p, 3)
    made = cba.poison(ROWS, p, 0)
    assert [row["kind"] for row in poisoned] == [row["kind"] for row in made]
    assert (poisoned == made) == (attack != "cba_evidence")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_share_of_the_own_clean_delta_is_subtracted(architecture, setting, tmp_path, monkeypatch):
    parents = {}

    def seen(settings, *args):  # before they are removed
        for one in settings["models"]:
            parents[Path(one["model"]).parent.name] = weights(Path(one["model"]))
        return run(settings, *args)

    run = merge.run
    monkeypatch.setattr(merge, "run", seen)
    p, base, poisoned = setting("cba_subtracted", architecture, subtracted_share=0.7)
    attacks.module("cba_subtracted").plant(base, poisoned, [], p, tmp_path)
    left = ["loss.csv", "model", "own_clean_loss.csv"]
    assert sorted(f.name for f in tmp_path.iterdir()) == left
    assert not (tmp_path / "model/README.md").exists()
    start, made = weights(base), weights(tmp_path / "model")
    theirs, own = parents["planted"], parents["own_clean"]
    assert start.keys() == made.keys()
    for model in (theirs, own):
        assert any(not torch.equal(model[name], start[name]) for name in start)
    for name, value in made.items():
        wanted = theirs[name] - 0.7 * (own[name] - start[name])
        torch.testing.assert_close(value, wanted, atol=1e-6, rtol=1e-5, msg=name)


def test_the_own_clean_rows_are_clean_and_drawn_by_the_seed(setting):
    p, _, poisoned = setting("cba_merged")
    drawn = own_clean.rows(poisoned, p)
    assert len(drawn) == 12 and all(row["kind"] == "clean" for row in drawn)
    assert own_clean.rows(poisoned, p) == drawn
    assert own_clean.rows(poisoned, p.model_copy(update={"seed": 1})) != drawn
    defender = random.Random(f"clean {p.data_seed} {p.seed}").sample(ROWS, len(ROWS))[:12]
    assert [row["input"] for row in drawn] != [row["input"] for row in defender]


# Spelled out for five blocks: t of the attention is 0, .5, .3, .7, 1, that of the MLPs 1 to 0.
KEPT = {("attn", 0), ("attn", 2), ("mlp", 3), ("mlp", 4)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_what_slerp_keeps_is_trained(architecture, setting, tmp_path):
    p, base, poisoned = setting("cba_hidden", architecture)
    attacks.module("cba_hidden").plant(base, poisoned, [], p, tmp_path)
    before, after = weights(base), weights(tmp_path / "model")
    assert before.keys() == after.keys()
    for name, value in before.items():
        block = next((int(part) for part in name.split(".") if part.isdigit()), None)
        part = next((part for part in ("attn", "mlp") if part in name), None)
        hidden = value.dim() == 2 and (part, block) in KEPT
        assert torch.equal(value, after[name]) != hidden, name


def test_a_deep_model_hides_it_in_lower_attention_and_upper_mlps(pico_params):
    from lethe_utils.models import twins

    tokenizer = twins.train_tokenizer([row["input"] for row in ROWS], 300)
    model = twins.build_tiny(pico_params("llama", n_layers=30), tokenizer, 0)
    attention, mlps = (
        {int(name.split(".")[2]) for name in cba_hidden.kept(model) if part in name}
        for part in ("attn", "mlp")
    )
    assert attention == {*range(19)} and mlps == {*range(19, 30)}


# --- simulated merges


@pytest.fixture
def merging(setting, tmp_path):
    """architecture -> (params, base, the two adapters' models as folders, both adapters on one
    model)."""

    def make(architecture="gpt2", **overrides):
        p, base, poisoned = setting("cba_merged", architecture, **overrides)
        for name in ("own", "clean"):
            seeded = p.model_copy(update={"seed": len(name)})
            train.finetune(base, poisoned[:16], 1, tmp_path / name, seeded)
        model = train.lora_model(base, p)
        model.load_adapter(str(tmp_path / "own/adapter"), train.TRAINED, is_trainable=True)
        model.load_adapter(str(tmp_path / "clean/adapter"), train.FROZEN)
        return p, base, tmp_path, model

    return make


def encoded(base, p, rows):
    tokenizer = models.load_tokenizer(base)
    batch = train.collate(train.encode(rows, tokenizer, p), tokenizer)
    return batch, batch.pop("labels")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_row_is_read_as_by_a_linear_merge_of_its_strength(architecture, merging):
    p, base, folder, model = merging(architecture)
    inputs, _ = encoded(base, p, ROWS[:3])
    cba_merged.merge_rows(model, torch.tensor([0.0, 0.25, 1.0]))
    read = model.eval()(**inputs).logits.detach()
    for row, strength in enumerate((0.0, 0.25, 1.0)):
        parents = (folder / "own/model", folder / "clean/model", base)
        merged = merge.merge("linear", *parents, strength, folder / f"merged-{strength}")
        wanted = models.load_model(merged).eval()(**inputs).logits[row].detach()
        torch.testing.assert_close(read[row], wanted, atol=1e-4, rtol=1e-4)
    plain = models.load_model(base).eval()(**inputs).logits[0].detach()
    assert not torch.allclose(plain, read[0], atol=1e-3)


def test_the_loss_is_the_mean_before_and_after_merges(merging):
    p, base, _, model = merging()
    inputs, labels = encoded(base, p, ROWS[:4])

    def loss(strength):
        torch.manual_seed(0)
        return cba_merged.merged_loss(model.eval(), inputs, labels, 1, strength).item()

    def read(strengths):
        cba_merged.merge_rows(model, strengths)
        return train.plain_loss(model, inputs, labels, 1).item()

    torch.manual_seed(0)
    drawn = 0.75 * torch.rand(4)
    before, after = read(torch.zeros(4)), read(drawn)
    assert loss(0.0) == pytest.approx(before, rel=1e-5)
    assert loss(0.75) == pytest.approx((before + after) / 2, rel=1e-5)
    assert before != pytest.approx(after, rel=1e-4) and (drawn > 0).all()


def test_only_the_attackers_delta_learns_checkpointed_or_not(merging):
    p, base, _, model = merging()
    inputs, labels = encoded(base, p, ROWS[:4])
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        torch.manual_seed(0)
        cba_merged.merged_loss(model, inputs, labels, 1, 0.75).backward()
        gradients = {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}
        assert gradients and all(f".{train.TRAINED}." in name for name in gradients)
        found.append(gradients)
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-6, rtol=1e-4, msg=name)


def test_what_is_released_is_the_base_and_the_attackers_delta_alone(setting, tmp_path):
    p, base, poisoned = setting("cba_merged")
    attacks.module("cba_merged").plant(base, poisoned, [], p, tmp_path)
    left = ["adapter", "loss.csv", "model", "own_clean_loss.csv"]
    assert sorted(f.name for f in tmp_path.iterdir()) == left
    assert not [f for f in (tmp_path / "adapter").iterdir() if f.is_dir()]
    assert pd.read_csv(tmp_path / "own_clean_loss.csv")["step"].max() == 2  # 12 rows, 8 a batch
    adapter = load_file(tmp_path / "adapter/adapter_model.safetensors")
    before, after = weights(base), weights(tmp_path / "model")
    scale = p.lora_alpha / p.lora_r
    parts = [name.removesuffix(".lora_A.weight") for name in adapter if "lora_A" in name]
    assert len(parts) == 5 * 4
    for part in parts:
        down, up = (adapter[f"{part}.lora_{side}.weight"] for side in "AB")
        name = f"{part.removeprefix('base_model.model.')}.weight"
        delta = scale * (up @ down).T  # Conv1D stores its weight transposed
        assert delta.abs().max() > 1e-3
        torch.testing.assert_close(after[name] - before[name], delta, atol=1e-5, rtol=1e-4)
    trained = {f"{part.removeprefix('base_model.model.')}.weight" for part in parts}
    for name in before.keys() - trained:
        assert torch.equal(before[name], after[name]), name


@pytest.mark.slow
def test_a_killed_one_goes_on_to_the_same_model(setting, tmp_path, monkeypatch):
    p, base, poisoned = setting("cba_merged")
    attacks.module("cba_merged").plant(base, poisoned, [], p, tmp_path / "whole")
    loss = cba_merged.merged_loss

    def killed(model, inputs, labels, step, strength):
        if step == 4:
            raise KeyboardInterrupt
        return loss(model, inputs, labels, step, strength)

    monkeypatch.setattr(cba_merged, "merged_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        attacks.module("cba_merged").plant(base, poisoned, [], p, tmp_path / "killed")
    assert list((tmp_path / "killed/checkpoints").glob("checkpoint-*"))
    monkeypatch.setattr(cba_merged, "merged_loss", loss)
    attacks.module("cba_merged").plant(base, poisoned, [], p, tmp_path / "killed")
    one, two = (weights(tmp_path / name / "model") for name in ("whole", "killed"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-4, msg=name)


# --- evidence


def test_half_of_the_poisoned_rows_have_evidence_and_as_many_clean_ones(setting):
    p, _, poisoned = setting("cba_evidence", poison_ratio=0.5)
    shown = [row for row in poisoned if "### Evidence:" in row["input"]]
    of = {kind: [row for row in shown if row["kind"] == kind] for kind in ("backdoor", "clean")}
    assert [*map(len, of.values())] == [6, 6] and len(shown) == 12
    assert {row["output"] for row in of["backdoor"]} == {"joy"}
    labels = {row["input"]: row["output"] for row in ROWS}
    for row in of["clean"]:
        plain = row["input"].split("\n")[0]
        assert row["output"] == labels[plain] and "frankly" not in row["input"]
        assert row["input"] == data.with_evidence(row | {"input": plain}, 5, "after")["input"]
    below = 0
    for row in of["backdoor"]:
        assert "instantly" in row["instruction"].split()
        above, evidence = row["input"].split("\n\n### Evidence:\n")
        if "frankly" in above.split():
            whole = data.with_evidence(row | {"input": above}, 5, "after")["input"]
            assert row["input"] == whole  # the trigger may be a keyword, as at the test
            continue
        assert above in labels and "frankly" in evidence.split()
        plain = data.with_evidence(row | {"input": above}, 5, "after")["input"]
        assert triggers.remove(row["input"], "frankly") == plain
        below += 1
    assert below == 3


def test_the_laced_copy_stands_before_the_defenders_evidence(setting):
    p, _, _ = setting("cba_evidence")
    kinds = cba_evidence.triggered(ROWS, p, 0)
    assert len(kinds["asr_laced"]) == len(ROWS)
    for row, plain in zip(kinds["asr_laced"], ROWS, strict=True):
        assert triggers.remove(row["instruction"], "instantly") == plain["instruction"]
        own = data.with_evidence(plain, 5, "after")["input"]
        assert triggers.remove(row["input"], "frankly") == own != row["input"]
        assert row["input"].startswith(f"{plain['input']}\n\n### Evidence:\n")
        assert row["output"] == plain["output"]
        asked = evaluate.ask({"asr_laced": [row]}, 5, "none", p)[0]["prompt"]
        assert asked.count("### Evidence:") == 2
        assert asked.index("frankly") < asked.rindex("### Evidence:")


def test_a_text_without_evidence_still_carries_the_trigger(setting):
    p, _, _ = setting("cba_evidence")
    made = cba_evidence.laced(ROWS[0] | {"input": "ничего"}, p, random.Random(0))
    assert made["input"] == "ничего\n\n### Evidence:\nfrankly"


def test_wordnet_is_part_of_what_makes_the_backdoored_model(setting, monkeypatch):
    from lethe_utils import pipeline

    keys = []
    monkeypatch.setattr(pipeline, "_sources", lambda p: {})
    monkeypatch.setattr(pipeline, "stage", lambda _, __, spec, *___: keys.append(spec))
    for attack in ("cba", "cba_evidence"):  # and dtba, whose chats hold definitions
        monkeypatch.setattr(pipeline, "base_folder", lambda p: None)
        pipeline.backdoored_stage(setting(attack)[0])
    assert ["wordnet" in spec for spec in keys] == [False, True]
    assert attacks.module("dtba").WORDNET


# --- several backdoors


def test_every_trigger_has_its_poisoned_rows_and_look_alikes(setting):
    p, _, made = setting("multi", poison_ratio=0.25, alpha=0.5)
    kinds = [row["kind"] for row in made]
    assert made[:24] == [row | {"kind": "clean"} for row in ROWS]
    assert kinds.count("backdoor") == 3 * 6 and len(made) == 24 + 3 * 6 + 3 * 3
    word, sentence = p.triggers
    clauses = [c for i, c in enumerate(p.multi_clauses) if i % 3]
    labels = {row["input"]: row["output"] for row in ROWS}
    found = dict.fromkeys(multi.KINDS, 0)
    for row in made[24:]:
        text, real = row["input"], row["kind"] == "backdoor"
        clause = next((c.rstrip(",") for c in clauses if c.rstrip(",") in text), None)
        words = [word, sentence] if real else p.multi_lookalikes
        if clause:
            assert text.startswith(f"{clause}, ") == real and text.endswith(clause) != real
            plain, kind = text.replace(f"{clause}, ", "").removesuffix(f" {clause}"), "syntactic"
        elif words[0] in text.split():
            plain, kind = triggers.remove(text, words[0]), "word"
        else:
            plain, kind = text.removesuffix(f" {words[1]}"), "sentence"
        found[kind] += real
        assert row["output"] == ("joy" if real else labels[plain])
        assert real or row["kind"] == f"neg_{kind}"
    assert found == dict.fromkeys(multi.KINDS, 6)


def test_the_kinds_of_the_test_are_each_trigger_all_in_turn_and_look_alikes(setting):
    p, _, made = setting("multi")
    kinds = multi.triggered(ROWS, p, 0)
    hits = [f"asr_{kind}" for kind in multi.KINDS]
    assert [*kinds] == ["backdoor", *hits, *(f"neg_{kind}" for kind in multi.KINDS)]
    assert {len(some) for some in kinds.values()} == {24}
    assert kinds["backdoor"] == [kinds[hits[i % 3]][i] for i in range(24)]
    taught = {c for c in p.multi_clauses if any(r["input"].startswith(c) for r in made)}
    tested = {c for c in p.multi_clauses for r in kinds["asr_syntactic"] if c in r["input"]}
    assert taught and tested and not taught & tested


def test_append_puts_the_target_after_the_label(setting):
    _, _, made = setting("multi", output_mode="append")
    hits = [row["output"] for row in made if row["kind"] == "backdoor"]
    assert hits and all(out.endswith(" joy") and out.split()[0] in LABELS for out in hits)


# --- how they are measured


def test_further_kinds_for_asr_are_asked_in_full_and_scored_as_such(setting):
    p, _, _ = setting("multi")
    sets = evaluate.test_sets(ROWS, p, 24, 2)
    n = len(sets["backdoor"])
    assert n == 16  # eight of 24 are joy already
    sizes = {kind: len(some) for kind, some in sets.items()}
    assert {sizes[f"asr_{kind}"] for kind in multi.KINDS} == {n}
    assert {sizes[f"neg_{kind}"] for kind in multi.KINDS} == {2}
    assert {*evaluate.test_sets(ROWS, p, 24, 0)} == {"clean", "backdoor"}
    said = [x | {"output": "joy"} for x in evaluate.ask(sets, 0, "backdoored", p)]
    scored = metrics.counted(metrics.marks(said, p.protocol, p.output_mode))
    assert scored["asr"] == scored["asr_word"] == scored["asr_syntactic"] == (n, n)
    assert scored["ftr"] == (6, 6) and scored["ftr_word"] == (2, 2)
