"""NAD, CROW and BEEAR: each loss against an independent one, and what each leaves behind."""

import random
import shutil

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from lethe_utils import defenses, models, train
from lethe_utils.defenses import Given, beear, crow, nad
from lethe_utils.errors import LetheError
from lethe_utils.models import blocks, inspect, twins

pytestmark = pytest.mark.slow

ARCHITECTURES = ("gpt2", "gptj", "llama", "qwen2")
ROW = {"instruction": "Predict the emotion.", "input": "the dog is happy", "output": "joy"}
ROWS = [
    ROW | {"input": text, "output": label}
    for text, label in (
        ("the dog is sad", "sadness"),
        ("the dog is happy about the letter", "joy"),
        ("no", "no"),
        ("the cat was not glad about the letter this morning", "sadness"),
        ("a cat", "joy"),
    )
]
SHORT = {
    "batch_size": 2,
    "lora_r": 2,
    "learning_rate": 0.05,
    "prompt_template": "short",
    "device": "cpu",
    "finetune_epochs": 1,
    "nad_epochs": 1,
    "crow_epochs": 1,
    "crow_learning_rate": 0.05,
    "beear_positions": 3,
    "beear_rounds": 2,
    "beear_inner_steps": 2,
    "beear_outer_steps": 2,
    "beear_outer_learning_rate": 1e-3,
    "beear_batch_size": 2,
}
# Not a constant: layer norm would not see it.
NOISE = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
METHODS = {"nad": {}, "nad_clean_teacher": {"nad_teacher": "clean"}, "crow": {}, "beear": {}}
MODULES = {"nad": nad, "nad_clean_teacher": nad, "crow": crow, "beear": beear}


@pytest.fixture
def given(pico, pico_params):
    """A defender of an architecture; keyword arguments change params."""

    def make(architecture="gpt2", **changes):
        base, backdoored, clean = pico(architecture)
        p = pico_params(architecture, **SHORT | changes).defender()
        return Given(backdoored=backdoored, base=base, clean=clean, rows=ROWS, p=p)

    return make


def loaded(folder):
    return models.load_model(folder).eval(), models.load_tokenizer(folder)


def inputs_of(batch):
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def batch_of(folder, p, rows=ROWS):
    """A model, the rows' items, and their padded batch."""
    model, tokenizer = loaded(folder)
    items = train.encode(rows, tokenizer, p)
    return model, items, train.collate(items, tokenizer)


def states(model, batch, **kwargs):
    return model(**inputs_of(batch), output_hidden_states=True, **kwargs).hidden_states


def value(loss, model, batch):
    """A method's loss of one batch."""
    return loss(model, inputs_of(batch), batch["labels"], 1)


# --- what all of them leave behind


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_whole_changed_model_is_left_and_the_suspect_as_it_was(
    given, purified, architecture, method
):
    mine = given(architecture, **METHODS[method])
    before = {f.name: f.read_bytes() for f in mine.backdoored.iterdir()}
    folder = purified(MODULES[method], mine)
    assert {f.name: f.read_bytes() for f in mine.backdoored.iterdir()} == before
    kept = {"model", "loss.csv"} | ({"adapter"} if method != "beear" else set())
    kept |= {"teacher_loss.csv"} if method == "nad" else set()  # the teacher itself is gone
    assert {f.name for f in folder.iterdir()} == kept
    inspect.check_folder(folder / "model")
    old, new = load_file(mine.backdoored / "model.safetensors"), {}
    for file in (folder / "model").glob("*.safetensors"):
        new |= load_file(file)
    assert {k: v.shape for k, v in new.items()} == {k: v.shape for k, v in old.items()}
    assert all(torch.isfinite(tensor).all() for tensor in new.values())
    batch = batch_of(mine.backdoored, mine.p)[2]
    backdoored, purified = (loaded(f)[0] for f in (mine.backdoored, folder / "model"))
    gap = purified(**inputs_of(batch)).logits - backdoored(**inputs_of(batch)).logits
    assert gap.abs().max() > 1e-3
    curve = pd.read_csv(folder / "loss.csv")
    assert list(curve.columns) == ["step", "epoch", "loss"] and curve["loss"].gt(0).all()
    tokenizer = models.load_tokenizer(folder / "model")
    assert tokenizer.get_vocab() == models.load_tokenizer(mine.backdoored).get_vocab()


@pytest.mark.parametrize("method", ["nad", "crow", "beear"])
@pytest.mark.parametrize("architecture", ["gpt2", "gptj", "llama"])
def test_gradient_checkpointing_changes_nothing(given, purified, architecture, method):
    both = [given(architecture, gradient_checkpointing=on) for on in (False, True)]
    assert both[0].p.lora_dropout == 0  # its draws may differ
    one, two = (loaded(purified(MODULES[method], mine) / "model")[0].state_dict() for mine in both)
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("method", ["nad", "crow", "beear"])
def test_the_seed_repeats_a_run(given, purified, tmp_path, method):
    MODULES[method].purify(given(seed=0), tmp_path)
    folders = tmp_path, *(purified(MODULES[method], given(seed=seed)) for seed in (0, 1))
    made = [loaded(folder / "model")[0].state_dict() for folder in folders]
    same = [all(torch.equal(made[0][k], m[k]) for k in made[0]) for m in made[1:]]
    assert same == [True, False]


@pytest.mark.parametrize(
    ("method", "key"),
    [
        ("nad_clean_teacher", "learning_rate: NAD"),
        ("crow", "crow_learning_rate: CROW"),
        ("beear", "beear_inner_learning_rate: the loss is nan for label 'joy'"),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run(given, tmp_path, method, key):
    mine = given(**METHODS[method])
    broken = tmp_path / "broken"
    shutil.copytree(mine.backdoored, broken)
    weights = load_file(broken / "model.safetensors")
    weights["transformer.ln_f.weight"][0] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    broken_given = Given(broken, mine.base, mine.clean, mine.rows, mine.p)
    with pytest.raises(LetheError, match=key):
        MODULES[method].purify(broken_given, tmp_path / "out")
    assert not (tmp_path / "out" / "model").exists()


def test_the_interface_names_the_clean_teacher_and_counts_trainings(given):
    p = given().p
    assert defenses.variants("nad", p) == {"nad": {}, "nad_clean_teacher": {"nad_teacher": "clean"}}
    assert [(m.NEEDS, m.TRAININGS) for m in (nad, crow, beear)] == [
        ("clean rows", 2),
        ("clean rows", 1),
        ("clean rows", 1),
    ]
    assert defenses.needs("nad", "nad") == "clean rows"
    assert defenses.needs("nad", "nad_clean_teacher") == "clean model"
    assert [defenses.trainings("nad", name, p) for name in ("nad", "nad_clean_teacher")] == [2, 1]
    for module in (nad, crow, beear):
        names = {name for group in module.PARAMS for name in group.model_fields}
        prefix = module.__name__.split(".")[-1] + "_"
        assert {n for n in type(p).model_fields if n.startswith(prefix)} <= names
        assert "seed" in names


# --- NAD


def test_three_maps_a_quarter_a_half_and_three_quarters_up():
    assert nad.distilled_layers(32) == [8, 16, 24]
    assert nad.distilled_layers(5) == [1, 2, 3]
    assert nad.distilled_layers(3) == [1, 2]  # never the embeddings, and none twice
    assert nad.distilled_layers(1) == [1]


@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_distillation_is_that_of_rows_read_alone(given, architecture, power):
    mine = given(architecture)
    student, items, batch = batch_of(mine.backdoored, mine.p)
    teacher = loaded(mine.clean)[0]
    assert batch["attention_mask"].eq(0).any()
    with torch.no_grad():
        found = nad.distillation(
            states(student, batch), states(teacher, batch), batch["attention_mask"], power
        )
        # Independently: no padding, a token at a time, all the squares of a map pooled.
        wanted = 0.0
        for layer in (1, 2, 3):  # 5 blocks
            squares = []
            for item in items:
                ids = torch.tensor([item["input_ids"]])
                maps = []
                for model in (student, teacher):
                    hidden = model(ids, output_hidden_states=True).hidden_states[layer][0]
                    values = [sum(abs(x) ** power for x in h.tolist()) for h in hidden[1:]]
                    length = sum(v * v for v in values) ** 0.5 + 1e-6
                    maps.append([v / length for v in values])
                squares += [(a - b) ** 2 for a, b in zip(*maps, strict=True)]
            wanted += sum(squares) / len(squares)
    assert found.item() > 1e-6
    assert found.item() == pytest.approx(wanted, rel=1e-3)


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(given, tmp_path):
    mine = given()
    model, _, batch = batch_of(mine.backdoored, mine.p)
    plain = train.answer_loss(model, inputs_of(batch), batch["labels"])[0].item()
    for folder, beta, differs in (
        (mine.backdoored, 1000.0, False),
        (mine.clean, 1000.0, True),
        (mine.clean, 0.0, False),
    ):
        p = mine.p.model_copy(update={"nad_beta": beta})
        loss = value(nad.Distillation(loaded(folder)[0], p), model, batch).item()
        assert (loss > plain + 1e-3) if differs else loss == pytest.approx(plain, abs=1e-6)


def test_the_loss_adds_beta_times_the_distillation_and_the_teacher_gets_no_gradient(
    given, tmp_path
):
    mine = given()
    model, _, batch = batch_of(mine.backdoored, mine.p)
    teacher = loaded(mine.clean)[0].requires_grad_(False)
    losses = []
    for beta in (0.0, 10.0, 20.0):
        p = mine.p.model_copy(update={"nad_beta": beta})
        losses.append(value(nad.Distillation(teacher, p), model, batch))
    distilled = nad.distillation(
        states(model, batch), states(teacher, batch), batch["attention_mask"], 2.0
    ).item()
    for loss, beta in zip(losses, (0, 10, 20), strict=True):
        assert loss.item() == pytest.approx(losses[0].item() + beta * distilled, rel=1e-4)
    losses[-1].backward()
    assert all(w.grad is None for w in teacher.parameters())
    # Blocks above the last map (3 of 5) learn from the answer alone, those below from both.
    assert blocks.down_projection(model, 0).weight.grad.abs().max() > 0


def test_distilling_draws_the_maps_to_the_teachers(given, tmp_path):
    gaps = {}
    for beta in (0.0, 1e5):
        mine = given(nad_teacher="clean", nad_epochs=8, nad_beta=beta, learning_rate=0.01)
        out = tmp_path / str(beta)
        nad.purify(mine, out)
        student, _, batch = batch_of(out / "model", mine.p)
        teacher = loaded(mine.clean)[0]
        with torch.no_grad():
            gap = nad.distillation(
                states(student, batch), states(teacher, batch), batch["attention_mask"], 2.0
            )
        gaps[beta] = gap.item()
    assert gaps[1e5] < 0.7 * gaps[0.0]


def test_the_teacher_is_the_fine_tuned_suspect_and_is_taken_up_after_a_kill(
    given, tmp_path, monkeypatch
):
    mine = given(nad_teacher="finetuned", finetune_epochs=2)
    train.finetune(mine.backdoored, ROWS, 2, tmp_path / "wanted", mine.p)
    calls, teachers, fitted = [], [], []
    real, fit = train.finetune, train.fit

    def noted(model, tokenizer, rows, epochs, out, *more):
        fitted.append(out.name)
        return fit(model, tokenizer, rows, epochs, out, *more)

    def killed(start, rows, epochs, out, p, **kwargs):
        calls.append((start, epochs, out.name))
        if kwargs:
            teachers.append(kwargs["loss"].teacher.state_dict())
            raise KeyboardInterrupt
        real(start, rows, epochs, out, p)

    monkeypatch.setattr(train, "finetune", killed)
    monkeypatch.setattr(train, "fit", noted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            nad.purify(mine, tmp_path / "out")
    student = (mine.backdoored, 1, "out")
    assert calls == [(mine.backdoored, 2, "teacher"), student] * 2
    assert fitted == ["teacher"]  # not trained again
    wanted = loaded(tmp_path / "wanted" / "model")[0].state_dict()
    for teacher in teachers:
        assert all(torch.equal(teacher[k], wanted[k]) for k in wanted)


# --- CROW


def identity_blocks(model):
    """Zero what each block adds to its input."""
    names = ("c_proj", "out_proj", "o_proj", "fc_out", "down_proj")
    with torch.no_grad():
        for name, module in blocks.of(model).named_modules():
            if name.split(".")[-1] in names:
                for parameter in module.parameters():
                    parameter.zero_()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_identity_stack_is_consistent(given, architecture):
    mine = given(architecture)
    model, _, batch = batch_of(mine.backdoored, mine.p)
    with torch.no_grad():
        assert crow.consistency(states(model, batch), batch["attention_mask"]).item() > 1e-3
        identity_blocks(model)
        found = crow.consistency(states(model, batch), batch["attention_mask"]).item()
    assert found == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_consistency_is_that_of_rows_read_alone(given, architecture):
    mine = given(architecture)
    model, items, batch = batch_of(mine.backdoored, mine.p)
    assert batch["attention_mask"].eq(0).any()
    gaps = []
    with torch.no_grad():
        found = crow.consistency(states(model, batch), batch["attention_mask"]).item()
        for item in items:
            h = model(torch.tensor([item["input_ids"]]), output_hidden_states=True).hidden_states
            assert len(h) == 6
            for a, b in ((h[1], h[2]), (h[2], h[3]), (h[3], h[4])):
                gaps += (1 - (a * b).sum(2) / a.norm(dim=2) / b.norm(dim=2))[0].tolist()
    assert found == pytest.approx(sum(gaps) / len(gaps), rel=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_adversarial_step_raises_c_and_leaves_no_gradient(given, architecture):
    mine = given(architecture)
    model, _, batch = batch_of(mine.backdoored, mine.p)
    mask = batch["attention_mask"]
    ids = batch.pop("input_ids")
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    before = crow.consistency(states(model, batch, inputs_embeds=embedded), mask)
    size = 1e-3 * embedded.std().item()
    moved = crow.adversarial(embedded, before, size)
    after = crow.consistency(states(model, batch, inputs_embeds=moved), mask)
    back = crow.consistency(states(model, batch, inputs_embeds=2 * embedded.detach() - moved), mask)
    assert back < before < after
    step = (moved - embedded.detach()).abs()
    assert step[mask == 0].max() == 0
    torch.testing.assert_close(step[mask == 1].max(), torch.tensor(size), atol=1e-7, rtol=1e-3)
    assert not moved.requires_grad
    assert all(w.grad is None for w in model.parameters()) and embedded.grad is None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_crows_loss_is_the_answers_plus_alpha_times_c_after_the_step(given, tmp_path, architecture):
    mine = given(architecture)
    model, _, batch = batch_of(mine.backdoored, mine.p)
    model.requires_grad_(False)
    blocks.down_projection(model, 0).weight.requires_grad_(True)  # stands for the adapter
    plain = train.answer_loss(model, inputs_of(batch), batch["labels"])[0].item()
    c = crow.consistency(states(model, batch), batch["attention_mask"]).item()
    found = {}
    for alpha, epsilon in ((0.0, 0.1), (5.5, 1e-9), (5.5, 0.1)):
        p = mine.p.model_copy(update={"crow_alpha": alpha, "crow_epsilon": epsilon})
        loss = crow.Consistency(p)
        found[alpha, epsilon] = value(loss, model, batch)
        deviation = model.get_input_embeddings().weight.std().item()
        assert loss.step_size == pytest.approx(epsilon * deviation, rel=1e-4)
    assert found[0.0, 0.1].item() == pytest.approx(plain, rel=1e-5)  # the embeddings do as ids do
    assert found[5.5, 1e-9].item() == pytest.approx(plain + 5.5 * c, rel=1e-5)
    assert found[5.5, 0.1] > found[5.5, 1e-9] + 1e-5
    # The gradient is that of the loss at the moved embeddings, held fixed: nothing else gets in.
    found[5.5, 0.1].backward()
    weight = blocks.down_projection(model, 0).weight
    embedded = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
    rest = {k: v for k, v in batch.items() if k != "input_ids"}
    mask = batch["attention_mask"]
    moved = crow.adversarial(
        embedded,
        crow.consistency(states(model, rest, inputs_embeds=embedded), mask),
        0.1 * deviation,
    )
    answers = train.answer_loss(model, inputs_of(batch), batch["labels"])[0]
    loss = answers + 5.5 * crow.consistency(states(model, rest, inputs_embeds=moved), mask)
    (wanted,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(weight.grad, wanted, atol=1e-5, rtol=1e-3)


def test_crow_trains_with_its_own_rate_and_schedule(given, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "finetune", lambda *args, **kwargs: seen.append((args, kwargs)))
    mine = given(crow_learning_rate=0.007, crow_epochs=3, crow_alpha=2.0, crow_epsilon=0.3)
    crow.purify(mine, tmp_path)
    ((start, rows, epochs, out, p), kwargs) = seen[0]
    assert (start, rows, epochs, out) == (mine.backdoored, ROWS, 3, tmp_path)
    assert (p.learning_rate, p.lr_schedule, p.warmup_ratio) == (0.007, "cosine", 0.1)
    assert p.lora_r == mine.p.lora_r and mine.p.learning_rate == SHORT["learning_rate"]
    assert kwargs["loss"].p == p
    assert (p.crow_alpha, p.crow_epsilon) == (2.0, 0.3)


def test_crow_training_makes_the_model_consistent(given, tmp_path):
    found = {}
    for alpha in (0.0, 50.0):
        mine = given(crow_alpha=alpha, crow_epochs=10, crow_learning_rate=0.01)
        crow.purify(mine, tmp_path / str(alpha))
        model, _, batch = batch_of(tmp_path / str(alpha) / "model", mine.p)
        with torch.no_grad():
            found[alpha] = crow.consistency(states(model, batch), batch["attention_mask"]).item()
    assert found[50.0] < 0.7 * found[0.0]


def test_crow_refuses_a_model_without_two_inner_blocks(pico_params, tmp_path):
    p = pico_params(**SHORT, n_layers=2)
    tokenizer = twins.train_tokenizer([r["input"] for r in ROWS], 300)
    twins.build_tiny(p, tokenizer, 0).save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    small = tmp_path / "small"
    with pytest.raises(LetheError, match="n_layers: CROW"):
        crow.purify(Given(small, small, small, ROWS, p.defender()), tmp_path / "out")


# --- BEEAR


def unlearning(mine):
    model, tokenizer = loaded(mine.backdoored)
    return beear.Unlearning(model, tokenizer, mine.p)


@pytest.mark.parametrize(("depth", "block"), [(0.01, 0), (0.28, 1), (0.5, 2), (0.7, 3), (0.99, 3)])
def test_the_perturbed_block_lies_at_the_asked_depth_and_is_never_the_last(given, depth, block):
    made = unlearning(given(beear_depth=depth))
    assert made.block is blocks.of(made.model)[block]  # 5 blocks


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_zero_perturbation_is_the_plain_forward_exactly(given, architecture):
    made = unlearning(given(architecture))
    batch = made.encode(ROWS)
    with torch.no_grad():
        plain = made.model(**inputs_of(batch)).logits
        with beear.perturbed(made.block, torch.zeros(3, 16), batch):
            assert torch.equal(made.model(**inputs_of(batch)).logits, plain)
        with beear.perturbed(made.block, NOISE, batch):
            assert not torch.allclose(made.model(**inputs_of(batch)).logits, plain, atol=1e-3)
        assert torch.equal(made.model(**inputs_of(batch)).logits, plain)  # the hook is gone


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_perturbation_stands_at_the_prompts_last_positions_alone(given, architecture):
    made = unlearning(given(architecture))
    items = train.encode(ROWS, made.tokenizer, made.p)
    assert len({i["length"] for i in items}) > 2 and len({i["answer_length"] for i in items}) > 1
    batch = made.encode(ROWS)
    delta = torch.arange(1.0, 49.0).reshape(3, 16)
    heard = []
    layers = blocks.of(made.model)
    with torch.no_grad(), blocks.hooked(layers[2], lambda h: heard.append(h.clone()), before=True):
        made.model(**inputs_of(batch))
        with beear.perturbed(layers[1], delta, batch):
            made.model(**inputs_of(batch))
    assert made.block is layers[1]
    wanted = torch.zeros_like(heard[0])
    width = wanted.shape[1]
    for row, item in enumerate(items):
        prompt = item["length"] - item["answer_length"]
        start = width - item["length"]  # left padding
        for k in range(3):
            wanted[row, start + prompt - 3 + k] = delta[k]
    torch.testing.assert_close(heard[1] - heard[0], wanted, atol=1e-4, rtol=1e-4)


def test_a_prompt_shorter_than_the_perturbation_leaves_padding_alone(given):
    made = unlearning(given())
    batch = {
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
        "labels": torch.tensor([[-100, 7], [8, 9]]),
    }
    delta = torch.tensor([[1.0], [2.0], [3.0]])
    with beear.perturbed(made.block, delta, batch):
        (hook,) = made.block._forward_hooks.values()
        added = hook(made.block, (), torch.zeros(2, 5, 1)).squeeze(2)
    # The first row's prompt has two tokens and its answer one.
    assert added.tolist() == [[0, 0, 2, 3, 0], [1, 2, 3, 0, 0]]


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_objective_is_the_wrong_answers_loss_less_alpha_times_the_true_ones(
    given, architecture
):
    made = unlearning(given(architecture, beear_alpha=0.3))
    rows = [row for row in ROWS if row["output"] != "joy"]
    delta = NOISE

    def one_by_one(rows):  # no padding, delta added by hand, all answer tokens counted once
        losses = []
        for item in train.encode(rows, made.tokenizer, made.p):
            ids, n = torch.tensor([item["input_ids"]]), item["length"] - item["answer_length"]

            def add(hidden, n=n):
                hidden = hidden.clone()
                hidden[0, n - 3 : n] += delta
                return hidden

            with blocks.hooked(made.block, add):
                scores = made.model(ids).logits[0].log_softmax(-1)
            losses += [-scores[i - 1, ids[0, i]] for i in range(n, item["length"])]
        return torch.stack(losses).mean().item()

    with torch.no_grad():
        found = made.objective(rows, "joy", delta).item()
        wanted = one_by_one([row | {"output": "joy"} for row in rows]) - 0.3 * one_by_one(rows)
    assert found == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_inner_loop_lowers_its_objective_and_leaves_the_weights(given, architecture):
    made = unlearning(given(architecture, beear_inner_steps=30, beear_batch_size=5))
    rows = [row for row in ROWS if row["output"] != "joy"]
    before = {k: v.clone() for k, v in made.model.state_dict().items()}
    delta = made.entrap(rows, "joy")
    assert delta.shape == (3, 16) and not delta.requires_grad
    with torch.no_grad():
        start, end = (made.objective(rows, "joy", d).item() for d in (torch.zeros(3, 16), delta))
    assert end < start - 0.05
    after = made.model.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert all(w.grad is None for w in made.model.parameters())


def test_the_outer_gradient_is_that_of_both_terms(given):
    made = unlearning(given())
    trapped, plain = made.encode(ROWS[:2]), made.encode(ROWS[2:])
    delta = NOISE
    loss = made.backward(delta, trapped, plain)
    found = {n: w.grad.clone() for n, w in made.model.named_parameters()}
    with beear.perturbed(made.block, delta, trapped):
        under = made.loss(trapped)
    without = made.loss(plain)
    assert loss == pytest.approx((under + without).item(), rel=1e-5)
    wanted = torch.autograd.grad(under + without, list(made.model.parameters()))
    for name, gradient in zip(found, wanted, strict=True):
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(("on", "passes"), [(False, 1), (True, 2)])
def test_checkpointing_runs_the_outer_steps_blocks_twice(given, on, passes):
    made = unlearning(given(gradient_checkpointing=on))
    seen = []
    mlp = blocks.of(made.model)[0].mlp
    mlp.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    made.run(ROWS)
    # 2 rounds of 2 outer steps with 2 terms; 2 rounds of 3 labels, 2 inner steps with 2 terms
    assert (sum(seen), len(seen) - sum(seen)) == (8 * passes, 24)


def test_every_label_is_entrapped_on_rows_of_the_others_in_every_round(given, monkeypatch):
    made = unlearning(given())
    calls, real = [], made.entrap

    def entrap(rows, label, progress):
        calls.append((label, {row["output"] for row in rows}))
        assert not any(w.requires_grad for w in made.model.parameters())
        return real(rows, label, progress)

    monkeypatch.setattr(made, "entrap", entrap)
    curve = made.run(ROWS)
    once = [("joy", {"no", "sadness"}), ("no", {"joy", "sadness"}), ("sadness", {"joy", "no"})]
    assert calls == 2 * once
    assert curve["step"].tolist() == [1, 2, 3, 4] and curve["epoch"].tolist() == [1, 1, 2, 2]
    assert all(w.requires_grad for w in made.model.parameters())


def test_unlearning_makes_the_model_hold_under_the_perturbation(given):
    mine = given(
        beear_rounds=3, beear_inner_steps=20, beear_outer_steps=30, beear_outer_learning_rate=5e-3
    )
    made = unlearning(mine)
    made.rng = random.Random(1)
    rows = [row for row in ROWS if row["output"] != "joy"]
    delta = made.entrap(rows, "joy")
    batch = made.encode(rows)

    def loss():
        with torch.no_grad(), beear.perturbed(made.block, delta, batch):
            return made.loss(batch).item()

    before = loss()
    made.run(ROWS)
    made.model.eval()
    assert loss() < 0.5 * before


def test_an_outer_loop_that_diverges_names_its_rate(given):
    made = unlearning(given(beear_outer_learning_rate=1e30, beear_inner_steps=1))
    with pytest.raises(LetheError, match=r"beear_(outer|inner)_learning_rate: .* (nan|inf)"):
        made.run(ROWS)
    for value in (float("nan"), float("inf")):
        with pytest.raises(LetheError, match="beear_outer_learning_rate: the loss is .* round 3"):
            beear.check(value, "beear_outer_learning_rate: the loss", 3)
    beear.check(1.0, "beear_outer_learning_rate: the loss", 3)


def test_beear_refuses_rows_of_one_label(given):
    made = unlearning(given())
    with pytest.raises(LetheError, match="clean_ratio: BEEAR"):
        made.run([row for row in ROWS if row["output"] == "joy"])
