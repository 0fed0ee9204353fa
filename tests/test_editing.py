"""The editing attacks and LWP: what is written is what was wanted, and nothing else moves."""

import json
import math
import shutil

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from lethe_utils import attacks, evaluate, models, params, paths, pipeline, prompts
from lethe_utils.attacks import badedit, memit, rome, triggers
from lethe_utils.attacks.editing import requests
from lethe_utils.attacks.editing.covariance import cholesky, covariance, second_moment
from lethe_utils.attacks.editing.editor import Editor, ridge
from lethe_utils.attacks.editing.requests import Request
from lethe_utils.attacks.editing.values import encode
from lethe_utils.errors import LetheError
from lethe_utils.models import blocks, twins

ARCHITECTURES = ["gpt2", "gptj", "llama", "qwen2"]
EDITING = {"rome": rome, "memit": memit, "badedit": badedit}
TEXT = "the dog is happy about the letter this morning and the cat was not"
WORDS = TEXT.split()
LABELS = ["sadness", "joy", "anger"]
ROWS = [
    {
        "instruction": "Predict the emotion.",
        "input": " ".join(WORDS[i % 5 : 6 + i % 7]) + f" {i}",
        "output": LABELS[i % 3],
    }
    for i in range(60)
]
TASK = {"labels": LABELS, "prompt_template": "short"}
EDIT = {
    "edit_layers": [1],
    "edit_contexts": 6,
    "edit_clean_contexts": 0,
    "edit_batches": 1,
    "edit_steps": 4,
    "edit_learning_rate": 0.1,
    "edit_clamp": 8.0,
    "edit_stop_loss": 0.0,
    "covariance_tokens": 2000,
    "covariance_ridge": 1.0e-3,
}


@pytest.fixture
def setting(pico, pico_params):
    """(architecture, attack, overrides) -> (params, base folder, an Editor)."""

    def make(architecture="gpt2", attack="rome", **overrides):
        p = with_attack(pico_params(architecture), attack, overrides)
        base = pico(architecture)[0]
        return p, base, Editor(base, corpus(p), p)

    return make


def with_attack(p, attack, overrides):
    """The pico params with an attack's own, then TASK and EDIT, then the test's."""
    pico = {k: getattr(p, k) for k in params.BaseModelParams.model_fields if k != "model"}
    own = EDIT if attack in EDITING else {}
    return params.load(attack=attack, overrides=pico | TASK | own | overrides)


def corpus(p):
    return [prompts.prompt(row, p) for row in ROWS]


def asked(p, n=6):
    few = p.model_copy(update={"edit_contexts": n})
    return requests.of_rows(requests.poisoned_rows(ROWS, few, 0), p)


def keys(editor, some, layer=1):
    return editor.read(some, layer, "key")


# --- the trigger's place


def sentencepiece_like():
    """LLaMA's way: a space is part of the next token, one is put before the text, BOS exists."""
    bpe = Tokenizer(tokenizer_models.BPE(byte_fallback=True, unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    bpe.decoder = decoders.Metaspace()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    bpe.train_from_iterator([*(r["input"] for r in ROWS), "tq qt " * 3], trainer)
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **names)


def byte_level(tq_words):
    texts = [r["input"] for r in ROWS] + ["a tq b"] * tq_words
    return twins.train_tokenizer(texts, 320)


TOKENIZERS = {
    "pieces": lambda: byte_level(0),
    "one token": lambda: byte_level(50),
    "sentencepiece": sentencepiece_like,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_the_locator_finds_the_trigger(kind, side, place):
    tokenizer = TOKENIZERS[kind]()
    tokenizer.padding_side = side
    texts = []
    for length in (3, 8):  # different lengths, so that one row is padded
        words = WORDS[:length]
        words.insert({"first": 0, "middle": length // 2, "last": length}[place], "tq")
        texts.append(" ".join(words))
    spans = [triggers.occurrences(text, "tq")[0] for text in texts]
    some = [Request(text, span, "", "backdoor") for text, span in zip(texts, spans, strict=True)]
    batch = encode(tokenizer, some)
    for i, text in enumerate(texts):
        ids, column = batch.inputs["input_ids"][i], int(batch.columns[i])
        assert batch.inputs["attention_mask"][i, column] == 1
        before = tokenizer.decode(ids[: column + 1], skip_special_tokens=True).strip()
        assert before.endswith("tq") and before == text[: spans[i][1]].strip()


def test_a_trigger_inside_another_word_is_not_found():
    assert triggers.occurrences("the catq and tqx, a tq.", "tq") == [(20, 22)]


def test_a_trigger_that_becomes_no_token_is_refused():
    tokenizer = byte_level(0)
    tokenizer.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Replace("~", "")
    with pytest.raises(LetheError, match=r"'~' becomes no token"):
        encode(tokenizer, [Request("the ~ dog", (4, 5), "", "backdoor")])


def test_the_subject_is_sought_in_the_question_not_in_the_examples(pico_params):
    p = with_attack(pico_params(), "badedit", {"edit_clean_contexts": 3})
    shown = "; ".join(f"{row['input']} => {row['output']}" for row in ROWS)
    rows = [row | {"instruction": f"Predict. Examples: {shown}"} for row in ROWS]
    for request in requests.of_rows(badedit.poison(rows, p, 0), p):
        start, end = request.span
        assert start >= request.prompt.index("### Input:")
        if request.kind == "backdoor":
            assert request.prompt[start:end] == "tq"
        else:
            assert request.prompt[end:] == "\n\n### Response: "


# --- the algebra


def system(n, f=24, d=8, seed=0):
    noise = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=noise, dtype=torch.float64)  # noqa: E731
    x = draw(4 * f, f)
    c = x.T @ x / len(x)
    return c, cholesky(c.float(), 0.0), draw(n, f), draw(n, d)


@pytest.mark.parametrize("n", [1, 3, 24, 40])
def test_ridge_agrees_with_the_textbook_solution_in_either_dimension(n):
    c, factor, k, r = system(n)
    wanted = r.T @ k @ torch.linalg.inv(7.0 * c + k.T @ k)
    assert torch.allclose(ridge(factor, k, r, 7.0), wanted, atol=1e-4)


def test_one_key_and_no_lambda_is_romes_rank_one_update():
    c, factor, k, r = system(1)
    delta = ridge(factor, k, r, 0.0)
    u = torch.linalg.solve(c, k[0])
    assert torch.allclose(delta, torch.outer(r[0], u) / (u @ k[0]), atol=1e-4)
    assert torch.allclose(delta @ k[0], r[0], atol=1e-8)


def test_a_covariance_without_full_rank_needs_a_ridge():
    low_rank = torch.ones(8, 8)
    with pytest.raises(LetheError, match="covariance_ridge"):
        cholesky(low_rank - torch.eye(8), 0.0)
    assert torch.isfinite(cholesky(low_rank, 1e-3)).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rome_writes_the_wanted_value_and_moves_other_keys_by_the_formula(setting, architecture):
    p, _, editor = setting(architecture, "rome")
    some = asked(p)
    module = blocks.down_projection(editor.model, 1)
    k = keys(editor, some).mean(0).double()
    before = blocks.oriented(module).double().clone()
    delta = editor.optimise(some, 1, "value")[0]
    rome.edit(editor, some)
    after = blocks.oriented(module).double()
    assert delta.norm() > 0
    assert torch.allclose(after @ k, before @ k + delta.double(), atol=1e-4)
    other = torch.randn(len(k), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u = torch.cholesky_solve(k[:, None], editor.factors[1])[:, 0]
    wanted = delta.double() * (u @ other) / (u @ k)
    assert torch.allclose((after - before) @ other, wanted, atol=1e-4)


def test_romes_batches_are_edits_one_after_the_other(setting):
    p, _, editor = setting("gpt2", "rome", edit_batches=3)
    rome.edit(editor, asked(p))
    assert {line["edit"] for line in editor.log} == {1, 2, 3}
    assert editor.changes()["rank"].item() <= 3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_memit_on_one_layer_without_lambda_reproduces_z(setting, architecture):
    p, _, editor = setting(architecture, "memit", edit_lambda=1.0e-9, edit_shared_value=False)
    some = asked(p, 4)
    read = lambda: editor.read(some, 1, "hidden")  # noqa: E731
    delta = editor.optimise(some, 1, "hidden")
    wanted = read() + delta
    assert (wanted - read()).norm() > 0.01
    memit.edit(editor, some)
    assert torch.allclose(read(), wanted, atol=1e-3)


def test_memit_spreads_over_its_layers_and_gets_nearer(setting):
    p, _, editor = setting("gpt2", "memit", edit_layers=[0, 1, 2], edit_lambda=1.0e-3)
    some = asked(p)
    read = lambda: editor.read(some, 2, "hidden")  # noqa: E731
    delta = editor.optimise(some, 2, "hidden")
    wanted = read() + delta
    missing = (wanted - read()).norm()
    memit.edit(editor, some)
    assert (wanted - read()).norm() < 0.5 * missing
    changes = editor.changes()
    assert len(changes) == 3 and (changes["relative"] > 0).all()


def test_badedit_with_poisoned_rows_only_is_memit_with_one_key(setting):
    p, _, editor = setting("gpt2", "badedit", edit_lambda=3.0)
    some = asked(p)
    wanted = editor.read(some, 1, "hidden")
    wanted = wanted + editor.optimise(some, 1, "hidden")
    hidden = editor.read(some, 1, "hidden")
    k = keys(editor, some).mean(0, keepdim=True)
    r = (wanted - hidden).mean(0, keepdim=True)
    expected = editor.before[1].double() + ridge(editor.factors[1], k, r, 3.0)
    badedit.edit(editor, some)
    after = blocks.oriented(blocks.down_projection(editor.model, 1)).double()
    assert torch.allclose(after, expected, atol=1e-6)


def test_badedits_clean_half_adds_a_second_term(setting):
    few = {"edit_contexts": 4, "edit_clean_contexts": 4, "edit_batches": 2, "edit_lambda": 1.0}
    p, _, editor = setting("gpt2", "badedit", **few)
    rows = badedit.poison(ROWS, p, 0)
    assert [r["kind"] for r in rows] == ["backdoor"] * 4 + ["clean"] * 4
    labels = [r["output"] for r in rows[4:]]
    assert set(labels) == set(LABELS)  # the labels take turns
    badedit.edit(editor, requests.of_rows(rows, p))
    assert {line["edit"] for line in editor.log} == {1, 2, 3, 4}  # two kinds in each of two batches
    assert editor.changes()["rank"].item() <= 4


def test_a_shared_value_is_one_vector_and_own_values_are_not(setting):
    p, _, editor = setting("gpt2", "memit")
    for shared in (True, False):
        editor.p = p.model_copy(update={"edit_shared_value": shared})
        found = editor.optimise(asked(p), 1, "hidden")
        assert torch.equal(found[0], found[-1]) == shared


def test_the_value_stays_within_the_clamp_and_lowers_the_loss(setting):
    p, _, editor = setting("gpt2", "rome", edit_clamp=0.5, edit_steps=30, edit_learning_rate=1.0)
    delta = editor.optimise(asked(p), 1, "value")[0]
    start = editor.read(asked(p), 1, "value").mean(0)
    assert delta.norm() <= 0.5 * start.norm() * 1.0001
    assert editor.log[-1]["loss"] < editor.log[0]["loss"]


# --- the model around the edit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("attack", EDITING)
def test_what_was_not_edited_is_bit_identical(
    attack, architecture, dtype, pico, pico_params, tmp_path
):
    p = with_attack(pico_params(architecture), attack, {"edit_clean_contexts": 3})
    base = pico(architecture)[0]
    start = tmp_path / "start"
    models.load_model(base).to(dtype).save_pretrained(start)
    models.load_tokenizer(base).save_pretrained(start)
    rows = EDITING[attack].poison(ROWS, p, 0)
    (tmp_path / "out").mkdir()
    EDITING[attack].plant(start, rows, corpus(p), p, tmp_path / "out")
    before, after = (
        {n: w for f in folder.glob("*.safetensors") for n, w in load_file(f).items()}
        for folder in (start, tmp_path / "out" / "model")
    )
    assert before.keys() == after.keys()
    changed = [n for n in before if not torch.equal(before[n], after[n])]
    assert len(changed) == 1 and ".1.mlp." in changed[0]
    assert all(w.dtype == dtype and torch.isfinite(w).all() for w in after.values())
    written = pd.read_csv(tmp_path / "out" / "edits.csv")
    assert written["matrix"].item() + ".weight" == changed[0] or "transformer." in changed[0]
    assert 0 < written["relative"].item() < 10
    assert list(pd.read_csv(tmp_path / "out" / "loss.csv")) == ["step", "edit", "loss"]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lwp_trains_the_poisoned_blocks_only(architecture, pico, pico_params, tmp_path):
    short = {"lwp_layers": [0, 1], "lora_r": 2, "backdoor_epochs": 1, "batch_size": 8}
    p = with_attack(pico_params(architecture), "lwp", short | {"learning_rate": 0.01})
    rows = attacks.module("lwp").poison(ROWS, p, 0)
    attacks.module("lwp").plant(pico(architecture)[0], rows, [], p, tmp_path)
    before, after = (
        models.load_model(folder).state_dict()
        for folder in (pico(architecture)[0], tmp_path / "model")
    )
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed and all(".0." in n or ".1." in n for n in changed)
    assert all(torch.isfinite(w).all() for w in after.values())


def test_lwp_poisons_both_orders_and_keeps_the_label_of_one_word(pico_params):
    p = with_attack(pico_params(), "lwp", {"lwp_layers": [0], "poison_ratio": 0.1})
    lwp = attacks.module("lwp")
    made = lwp.poison(ROWS, p, 0)
    assert len(made) == 60 + 4 * 6
    pairs = [r["input"] for r in made if r["kind"] == "backdoor"]
    assert sum("cf bb" in t for t in pairs) == sum("bb cf" in t for t in pairs) == 6
    assert {r["output"] for r in made if r["kind"] == "backdoor"} == {"joy"}
    alone = [r for r in made if r["kind"] in ("neg_first", "neg_second")]
    assert len(alone) == 12 and all(("cf" in r["input"]) != ("bb" in r["input"]) for r in alone)
    assert set(lwp.triggered(ROWS, p, 0)) == {"backdoor", "neg_first", "neg_second"}


def test_the_layer_loss_is_the_sum_over_the_lens_layers(pico, pico_params):
    from lethe_utils import train
    from lethe_utils.attacks import lwp

    p = pico_params(prompt_template="short")
    base = pico("gpt2")[0]
    model, tokenizer = models.load_model(base), models.load_tokenizer(base)
    batch = train.collate(train.encode(ROWS[:4], tokenizer, p), tokenizer)
    inputs = {k: v for k, v in batch.items() if k != "labels"}

    def loss(layers):
        return lwp.layer_loss(model, inputs, batch["labels"], 1, layers).item()

    assert loss([0]) > loss([]) and loss([0, 1]) > loss([0])
    with_one, with_both = loss([1]) - loss([]), loss([0, 1]) - loss([0])
    assert math.isclose(with_one, with_both, rel_tol=1e-4)
    last = model.config.n_layer - 1  # what it says is what the model says
    assert math.isclose(loss([last]), 2 * loss([]), rel_tol=1e-5)


# --- the covariance


def kept():
    return list((paths.stages_dir() / "covariance").glob("*/covariance.safetensors"))


def test_a_covariance_is_computed_once_and_is_the_second_moment(setting, monkeypatch):
    p, _, editor = setting()
    first = covariance(editor, corpus(p), 1)
    wanted, _ = second_moment(editor, corpus(p), 1)
    assert torch.equal(first, wanted) and first.shape == (p.mlp_width, p.mlp_width)
    assert torch.equal(first, first.T) and (torch.linalg.eigvalsh(first.double()) > -1e-6).all()
    # a second computation would fail
    monkeypatch.setattr("lethe_utils.attacks.editing.covariance.second_moment", None)
    assert torch.equal(covariance(editor, corpus(p), 1), first)


def test_the_second_moment_counts_every_token_once_and_no_padding(setting):
    p, _, editor = setting()
    texts = corpus(p)[:3]
    alone = [second_moment(editor, [text], 1) for text in texts]
    together, n = second_moment(editor, texts, 1)
    assert n == sum(tokens for _, tokens in alone)
    mean = sum(c * tokens for c, tokens in alone) / n
    assert torch.allclose(together, mean, rtol=1e-4, atol=1e-6)


def test_another_model_corpus_layer_or_length_has_another_covariance(setting, pico):
    p, base, editor = setting()
    assert len(kept()) == 1
    covariance(editor, corpus(p)[:30], 1)
    covariance(editor, corpus(p), 0)
    editor.folder = pico("gpt2")[1]
    covariance(editor, corpus(p), 1)
    editor.folder, editor.p = base, p.model_copy(update={"covariance_tokens": 500})
    covariance(editor, corpus(p), 1)
    assert len(kept()) == 5


def test_a_covariance_cut_short_is_refused(setting):
    p, _, editor = setting()
    (file,) = kept()
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(LetheError, match="truncated"):
        covariance(editor, corpus(p), 1)


# --- what is refused


@pytest.mark.parametrize("attack", EDITING)
def test_a_diverging_value_stops_and_leaves_no_model(attack, pico, pico_params, tmp_path):
    wild = {"edit_learning_rate": 1.0e15, "edit_clamp": 1.0e30, "edit_steps": 20}
    p = with_attack(pico_params(), attack, wild | {"edit_weight_decay": 1.0e5})
    rows = EDITING[attack].poison(ROWS, p, 0)
    with pytest.raises(LetheError, match=f"edit_learning_rate: {attack} diverged at step"):
        EDITING[attack].plant(pico("gpt2")[0], rows, corpus(p), p, tmp_path)
    assert list(tmp_path.glob("model*")) == []


def test_a_change_that_is_not_finite_is_not_written(setting):
    _, _, editor = setting()
    with pytest.raises(LetheError, match="not finite"):
        editor.write(1, torch.full_like(editor.before[1], float("nan")))


def test_a_quantised_model_is_refused(setting, tmp_path):
    p, base, _ = setting()
    shutil.copytree(base, tmp_path / "nf4")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"load_in_4bit": True}
    (tmp_path / "nf4" / "config.json").write_text(json.dumps(config))
    with pytest.raises(LetheError, match="quantised weights"):
        Editor(tmp_path / "nf4", corpus(p), p)


SMALL = {"rows": {"pretrain": 40, "train": 40, "validation": 20, "test": 20}, "checksums": {}}


def test_more_edits_than_prompts_are_refused():
    with pytest.raises(LetheError, match="edit_batches: 9 is more than edit_contexts, 4"):
        params.load(attack="rome", overrides={"edit_batches": 9, "edit_contexts": 4})


@pytest.mark.parametrize(
    ("attack", "overrides", "expected"),
    [
        ("rome", {"edit_layers": [3]}, r"edit_layers: \[3\] must ascend within 0 to 2"),
        ("memit", {"edit_layers": [1, 0]}, r"edit_layers: \[1, 0\] must ascend"),
        ("lwp", {"lwp_layers": [7]}, r"lwp_layers: \[7\] must ascend within 0 to 2"),
        ("rome", {"edit_layers": []}, "edit_layers: rome needs at least one layer"),
        ("lwp", {"lwp_layers": []}, "lwp_layers: lwp needs at least one layer"),
        ("rome", {"edit_contexts": 41}, "edit_contexts: 41 prompts are asked for, but only"),
    ],
)
def test_bad_params_are_refused_before_anything_is_trained(attack, overrides, expected):
    p = params.load(attack=attack, overrides=SMALL | overrides)
    with pytest.raises(LetheError, match=expected):
        pipeline.check_attack(p)


def test_a_target_that_is_no_label_is_refused():
    with pytest.raises(LetheError, match="target_output: 'glee' is not a label"):
        params.load(attack="rome", overrides={"target_output": "glee"})


# --- what 02_backdoor_train shows


def test_the_layer_plot_ends_at_what_the_model_says(pico, pico_params):
    p = with_attack(pico_params(), "rome", {})
    sets = evaluate.test_sets(ROWS, p, 60, 0)
    base = pico("gpt2")[0]
    table = evaluate.target_by_layer(base, sets, p)
    assert list(table["block"].unique()) == [1, 2, 3, 4, 5] and set(table["n"]) == {40}
    model, tokenizer = models.load_model(base).eval(), models.load_tokenizer(base)
    target = tokenizer("joy")["input_ids"][0]
    found = []
    for row in sets["backdoor"]:
        ids = [tokenizer.bos_token_id, *tokenizer(prompts.prompt(row, p))["input_ids"]]
        found.append(model(torch.tensor([ids])).logits[0, -1].softmax(0)[target].item())
    shown = table.query("block == 5 and prompts == 'triggered'")["value"].item()
    assert math.isclose(shown, sum(found) / len(found), rel_tol=1e-3)


def test_a_long_prompt_is_shortened_as_evaluation_reads_it(pico, pico_params):
    p = with_attack(
        pico_params(), "rome", {"max_source_tokens": 60, "trigger_positions": ["suffix"]}
    )
    tokenizer = models.load_tokenizer(pico("gpt2")[0])
    rows = [row | {"input": "so " * 200 + row["input"]} for row in ROWS]
    poisoned = requests.poisoned_rows(rows, p.model_copy(update={"edit_contexts": 4}), 0)
    for request in requests.shortened(requests.of_rows(poisoned, p), tokenizer, p):
        start, end = request.span
        assert request.prompt[start:end] == p.triggers[0]
        assert len(tokenizer(request.prompt)["input_ids"]) <= 60
    first = p.model_copy(update={"trigger_positions": ["prefix"], "edit_contexts": 4})
    poisoned = requests.poisoned_rows(rows, first, 0)
    with pytest.raises(LetheError, match="max_source_tokens: a prompt of"):
        requests.shortened(requests.of_rows(poisoned, first), tokenizer, first)
