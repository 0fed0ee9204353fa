"""Fine-mixing, weight averaging and guided module substitution: what each makes of the weights."""

import ast
import shutil

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from lethe_utils import decode, defenses, guided, models, train
from lethe_utils.defenses import averaging, fine_mixing, gms
from lethe_utils.errors import LetheError
from lethe_utils.models import inspect

ARCHITECTURES = ["gpt2", "gptj", "llama", "qwen2"]
WORDS = [("sad", "sadness"), ("glad", "joy"), ("low", "sadness"), ("happy", "joy")]
ROWS = [
    {"instruction": "Predict the emotion.", "input": f"the {who} is {word}", "output": label}
    for who in ("dog", "cat", "hen", "fox", "cow")
    for word, label in WORDS
]
SHORT = {
    "prompt_template": "short",
    "device": "cpu",
    "bits": 32,
    "batch_size": 4,
    "gradient_accumulation": 1,
    "lora_r": 2,
    "optimizer": "adamw_torch",
    "gradient_checkpointing": False,
    "clean_epochs": 1,
    "canary_epochs": 1,
    "canary_rows": 4,
    "mixing_epochs": 1,
}


@pytest.fixture
def given(pico, pico_params):
    def make(architecture="llama", **overrides):
        base, backdoored, clean = pico(architecture)
        p = pico_params(architecture, **SHORT | overrides).defender()
        return defenses.Given(backdoored, base, clean, ROWS, p)

    return make


def weights(folder):
    return models.load_model(folder).state_dict()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- fine-mixing


def mixed(g, out):
    fine_mixing.mix(g, out)
    return weights(out / "model")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_weight_of_a_mix_is_one_of_the_two(given, tmp_path, architecture):
    g = given(architecture, mixing_ratio=0.3)
    made, base, backdoored = mixed(g, tmp_path), weights(g.base), weights(g.backdoored)
    assert made.keys() == backdoored.keys()
    kept = {n: made[n] == backdoored[n] for n in made}
    assert all(((made[n] == base[n]) | kept[n]).all() for n in made)
    differ = {n: base[n] != backdoored[n] for n in made}
    share = sum(kept[n][differ[n]].sum() for n in made) / sum(d.sum() for d in differ.values())
    assert share.item() == pytest.approx(0.3, abs=0.02)
    rows = next(kept[n] for n in made if n.endswith(("wte.weight", "embed_tokens.weight"))).sum(1)
    assert len({*rows.tolist()}) > 3  # weights are drawn, not rows


def test_a_mixs_ends_are_its_parents_and_its_seed_decides(given, tmp_path):
    g = given()
    for ratio, parent in ((0.0, g.base), (1.0, g.backdoored)):
        end = given(mixing_ratio=ratio)
        assert same(mixed(end, tmp_path / str(ratio)), weights(parent))
    first, again, other = (
        mixed(given(seed=seed), tmp_path / name)
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert same(first, again) and not same(first, other)


def test_a_base_that_names_its_tensors_as_the_hub_does_is_mixed_alike(given, tmp_path):
    g = given("gpt2")
    hub = tmp_path / "hub"
    shutil.copytree(g.base, hub)
    stored = load_file(hub / inspect.WHOLE)
    short = {name.removeprefix("transformer."): weight for name, weight in stored.items()}
    assert {*short} != {*stored}
    save_file(short, hub / inspect.WHOLE, {"format": "pt"})
    from_hub = defenses.Given(g.backdoored, hub, g.clean, ROWS, g.p)
    assert same(mixed(from_hub, tmp_path / "a"), mixed(g, tmp_path / "b"))


def test_a_base_of_another_shape_is_refused(given, tmp_path):
    g = given()
    other = defenses.Given(g.backdoored, given("gpt2").base, g.clean, ROWS, g.p)
    with pytest.raises(LetheError, match="is a LlamaForCausalLM, but"):
        fine_mixing.purify(other, tmp_path)


def test_what_is_fine_tuned_is_the_mix_also_after_a_kill(given, tmp_path, monkeypatch):
    g, started = given(mixing_epochs=3), []
    wanted = mixed(g, tmp_path / "alone")

    def killed(start, rows, epochs, out, p):
        started.append((weights(start), rows, epochs))
        raise KeyboardInterrupt

    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(train, "finetune", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            fine_mixing.purify(g, out)
        monkeypatch.setattr(fine_mixing, "mix", None)  # not mixed again
    assert all(same(one, wanted) and more == [ROWS, 3] for one, *more in started)
    monkeypatch.setattr(train, "finetune", lambda *_: None)
    fine_mixing.purify(g, out)
    assert not [*out.iterdir()]  # the mix is gone


# --- averaging


def test_the_mean_of_two_is_the_linear_merge_of_the_paper(given, tmp_path):
    g = given(averaged_models=1)
    averaging.purify(g, tmp_path)
    made, backdoored, clean = weights(tmp_path / "model"), weights(g.backdoored), weights(g.clean)
    for name, weight in made.items():
        torch.testing.assert_close(weight, (backdoored[name] + clean[name]) / 2)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_averaging_weighs_all_models_alike(given, tmp_path, monkeypatch, architecture):
    g, trained, real = given(architecture), [], train.finetune

    def noted(start, rows, epochs, out, p):
        real(start, rows, epochs, out, p)
        trained.append((start, rows, epochs, p.seed, weights(out / "model")))

    monkeypatch.setattr(train, "finetune", noted)
    averaging.purify(g, tmp_path)
    assert [more[:4] for more in trained] == [(g.base, ROWS, 1, seed) for seed in (3000, 6000)]
    others = [last for *_, last in trained]
    assert not same(*others)
    parents = [weights(g.backdoored), weights(g.clean), *others]
    for name, weight in weights(tmp_path / "model").items():
        mean = sum(parent[name] for parent in parents) / 4
        torch.testing.assert_close(weight, mean, rtol=1e-4, atol=1e-6)
    curves = {"clean-1_loss.csv", "clean-2_loss.csv"}
    assert {f.name for f in tmp_path.iterdir()} == {"model"} | curves


def test_averaging_says_how_many_it_trains(given):
    for n in (1, 3, 5):
        assert defenses.trainings("averaging", "averaging", given(averaged_models=n).p) == n - 1


# --- guided module substitution

KINDS, BLOCKS = ["k", "q", "v"], [0, 1, 2, 3]


def judged_by(worth):
    """A judge that finds a thing returned worth so much."""
    return lambda returned: {
        "score": sum(worth.get(one, -0.1) for part in returned for one in part)
    }


def best(trials):
    return trials.loc[trials["score"].idxmax()]


def test_the_substitution_search_gives_back_what_pays():
    trials = gms.search(judged_by({"q": 0.3, 2: 0.2}), KINDS, BLOCKS)
    assert (best(trials)["kinds"], best(trials)["blocks"]) == (("q",), (2,))
    first = trials[trials["round"] == 1]
    assert [*first["kinds"]] == [("k",), ("q",), ("v",), *[()] * 4]
    assert [*first["blocks"]] == [()] * 3 + [(0,), (1,), (2,), (3,)]


def test_the_substitution_search_goes_on_through_worse_rounds_for_as_long_as_its_patience():
    worth = dict.fromkeys(KINDS, -0.2)
    late = gms.search(judged_by(worth), KINDS, [*range(10)])
    assert late["round"].max() == 1 + gms.PATIENCE  # the first is the best, for all lose
    assert (best(late)["kinds"], best(late)["blocks"]) == ((), (0,))  # the first of equals
    # The last of either stays the proxy's.
    everything = gms.search(judged_by(dict.fromkeys([*KINDS, *BLOCKS], 0.1)), KINDS, BLOCKS)
    assert everything["round"].max() == len(KINDS) - 1 + len(BLOCKS) - 1
    assert len(best(everything)["kinds"]) == 2 and len(best(everything)["blocks"]) == 3


def test_a_substitution_search_never_begins_a_round_that_it_cannot_finish(monkeypatch):
    judge = judged_by(dict.fromkeys([*KINDS, *BLOCKS], 0.1))
    monkeypatch.setattr(gms, "MOST", 7 + 6 + 3)
    assert len(gms.search(judge, KINDS, BLOCKS)) == 7 + 6


@pytest.mark.parametrize(("kinds", "blocks"), [(7, 30), (4, 48), (7, 32)])
def test_the_published_patience_fits_into_the_search(kinds, blocks):
    trials = gms.search(lambda _: {"score": 0.0}, [*map(str, range(kinds))], [*range(blocks)])
    assert trials["round"].max() == 1 + gms.PATIENCE and len(trials) <= gms.MOST


MATRICES = {
    "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    "gptj": [*(f"attn.{n}_proj" for n in ("k", "out", "q", "v")), "mlp.fc_in", "mlp.fc_out"],
    "llama": [
        *(f"mlp.{n}_proj" for n in ("down", "gate", "up")),
        *(f"self_attn.{n}_proj" for n in ("k", "o", "q", "v")),
    ],
}
MATRICES["qwen2"] = MATRICES["llama"]


def by_hand(suspect, proxy, kinds, blocks):
    """The same substitution from the names of tensors, biases included."""
    out, theirs = {}, weights(suspect)
    for name, weight in weights(proxy).items():
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        back = False
        if number is not None:
            place = ".".join(parts[number + 1 : -1])
            matrix = any(place in known for known in MATRICES.values())
            back = matrix and (place in kinds or int(parts[number]) in blocks)
        out[name] = theirs[name] if back else weight
    return out


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_given_back_is_the_suspects_and_all_else_the_proxys(given, architecture):
    g = given(architecture)
    mix = gms.Substitution(g.backdoored, g.clean, "cpu")
    kinds = sorted({kind for kind, _ in mix.pairs[0]})
    assert kinds == MATRICES[architecture]
    assert {block for _, block in mix.pairs[0]} == {*range(5)}
    assert same(mix.model.state_dict(), weights(g.clean))
    for returned in (((kinds[0],), (1, 3)), (tuple(kinds[1:3]), ()), ((), (4,)), ((), ())):
        mix.give_back(returned)
        wanted = by_hand(g.backdoored, g.clean, *returned)
        assert same(mix.model.state_dict(), wanted)
    assert same(mix.other.state_dict(), weights(g.backdoored))


@pytest.fixture
def guide(given, tmp_path):
    """A guide for a search, of pico models that nothing was planted in."""
    g = given()
    folders = [tmp_path / name for name in ("suspect", "proxy")]
    for folder, model in zip(folders, (g.backdoored, g.clean), strict=True):
        folder.mkdir()
        (folder / "model").symlink_to(model)
    labels = ["joy", "sadness"]
    return guided.Guide(*folders, g.base, guided.rows(ROWS[:8], labels, g.p))


def test_the_search_scores_the_substitution_that_it_says(given, guide, monkeypatch):
    g = given(gms_alpha=0.4)
    read = []

    def accuracy(model, tokenizer, rows, p):
        """A share that depends on all weights of the model, as pico models answer nothing right."""
        known = decode.known_answers(model, tokenizer, rows, p)
        read.append(sum(one.nats for one in known) / 1000)
        return read[-1]

    monkeypatch.setattr(guided, "accuracy", accuracy)
    monkeypatch.setattr(gms, "PATIENCE", 1)
    monkeypatch.setattr(gms, "MOST", 12 + 11)
    trials = gms.searched(guide, g)
    assert len(trials) == 23 and {*trials["round"]} == {1, 2}
    tokenizer = models.load_tokenizer(g.clean)

    def measured(state):
        model = models.load_model(g.clean)
        model.load_state_dict(state, strict=True)
        kinds = {kind: some for kind, some in guide.rows.items() if kind != "clean"}
        asr = guided.success(model, tokenizer, kinds, ["joy", "sadness"], g.p)
        assert {*asr} == {"word pair", "sentence"}
        return accuracy(model, tokenizer, guide.rows["clean"], g.p), sum(asr.values()) / 2

    before = measured(weights(g.backdoored))
    for number in (0, 7, 20):
        trial = trials.iloc[number]
        found = measured(by_hand(g.backdoored, g.clean, trial["kinds"], trial["blocks"]))
        assert (trial["accuracy"], trial["asr"]) == pytest.approx(found, abs=1e-5)
        score = 0.6 * (before[1] - found[1]) + 0.4 * (1 - (before[0] - found[0]))
        assert trial["score"] == pytest.approx(score, abs=1e-5)


def test_the_asr_of_a_canary_is_the_share_that_answers_its_target(given, guide, monkeypatch):
    g, asked = given(), {}

    def accuracy(model, tokenizer, rows, p):
        asked[rows[0]["output"]] = rows
        return 0.5

    monkeypatch.setattr(guided, "accuracy", accuracy)
    kinds = {kind: some for kind, some in guide.rows.items() if kind != "clean"}
    rates = guided.success(None, None, kinds, ["joy", "sadness"], g.p)
    assert rates == {"word pair": 0.5, "sentence": 0.5}
    for target, kind in (("joy", "word pair"), ("sadness", "sentence")):
        assert [r["input"] for r in asked[target]] == [r["input"] for r in kinds[kind]]
        assert {r["output"] for r in asked[target]} == {target}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_gms_leaves_the_best_substitution_of_lethes_clean_model(given, tmp_path, architecture):
    g = given(architecture)
    before = inspect.fingerprint(g.backdoored)
    gms.purify(g, tmp_path)
    assert inspect.fingerprint(g.backdoored) == before
    names = {f.name for f in tmp_path.iterdir()}
    assert names >= {"model", "search.csv", "clean_loss.csv", "canary-0_loss.csv"}
    assert not [f for f in tmp_path.iterdir() if f.is_dir() and f.name != "model"]
    read = dict.fromkeys(("kinds", "blocks"), ast.literal_eval)
    chosen = best(pd.read_csv(tmp_path / "search.csv", converters=read))
    wanted = by_hand(g.backdoored, g.clean, chosen["kinds"], chosen["blocks"])
    assert same(weights(tmp_path / "model"), wanted)
    assert inspect.stored_dtype(tmp_path / "model") == "float32"
    assert models.load_tokenizer(tmp_path / "model")("a dog")["input_ids"]
