"""Merging: every method on every architecture, its ends, its middle, and what is refused."""

import json
import shutil
import socket
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from conftest import TEXTS
from lethe_utils import merge, models, paths
from lethe_utils.errors import LetheError
from lethe_utils.models import twins

ARCHITECTURES = ("gpt2", "gptj", "llama", "qwen2")
LAYERS = 5
EMBEDDINGS = ("wte", "wpe", "embed_tokens")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Whatever reaches for the network fails the test, even where its error is swallowed."""
    asked = []

    def refuse(*args, **_):
        asked.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert asked == []


def weights(folder):
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def layer_of(name):
    """The layer's number in a tensor name, or None: transformer.h.3.attn..., model.layers.3..."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def kind_of(name):
    """attn, mlp or rest: what the published SLERP curves distinguish."""
    if ".attn." in name or ".self_attn." in name:
        return "attn"
    return "mlp" if ".mlp." in name else "rest"


def merged(pico, architecture, method, strength, out):
    base, backdoored, clean = pico(architecture)
    folder = merge.merge(method, backdoored, clean, base, strength, out)
    return weights(folder), weights(backdoored), weights(clean)


@pytest.mark.parametrize("method", merge.METHODS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_merge_is_whole_and_loads(pico, tmp_path, architecture, method):
    out = tmp_path / "model"
    made, bad, good = merged(pico, architecture, method, 0.5, out)
    assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in bad.items()}
    assert all(torch.isfinite(v).all() and v.dtype == torch.float32 for v in made.values())
    for parent in (bad, good):
        assert any(not torch.equal(made[k], parent[k]) for k in made)
    model, tokenizer = models.load_model(out), models.load_tokenizer(out)
    assert tokenizer.get_vocab() == models.load_tokenizer(pico(architecture)[0]).get_vocab()
    for name, tensor in model.state_dict().items():
        assert name not in made or torch.equal(tensor, made[name]), name
    ids = torch.tensor([tokenizer("the dog is happy")["input_ids"]])
    assert torch.isfinite(model(ids).logits).all()


def test_a_merge_says_how_it_was_made(pico, tmp_path):
    out = tmp_path / "model"
    merged(pico, "gpt2", "slerp", 0.5, out)
    card = (out / "README.md").read_text("utf8")
    assert card.startswith("# Purified model: slerp, strength 0.5") and "poisoned" in card
    settings = yaml.safe_load((out / "mergekit_config.yml").read_text("utf8"))
    assert settings["merge_method"] == "slerp"
    # Half-open: the published example stops one short and drops the last block.
    assert settings["slices"][0]["sources"][1]["layer_range"] == [0, LAYERS]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_linear_in_the_middle_is_the_mean(pico, tmp_path, architecture):
    made, bad, good = merged(pico, architecture, "linear", 0.5, tmp_path / "m")
    for name in made:
        torch.testing.assert_close(made[name], (bad[name] + good[name]) / 2, atol=1e-6, rtol=0)


def test_linear_weighs_the_clean_model_by_strength(pico, tmp_path):
    made, bad, good = merged(pico, "gpt2", "linear", 0.25, tmp_path / "m")
    for name in made:
        wanted = 0.75 * bad[name] + 0.25 * good[name]
        torch.testing.assert_close(made[name], wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", merge.METHODS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_strength_zero_is_the_backdoored_and_one_the_clean_model(
    pico, tmp_path, architecture, method
):
    for strength in (0, 1):
        made, *parents = merged(pico, architecture, method, strength, tmp_path / str(strength))
        for name, tensor in parents[strength].items():
            torch.testing.assert_close(made[name], tensor, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_slerp_follows_the_published_curves(pico, tmp_path, architecture):
    made, bad, good = merged(pico, architecture, "slerp", 0.5, tmp_path / "m")

    def same(name, parent):
        return torch.allclose(made[name], parent[name], atol=1e-5, rtol=0)

    seen = set()
    for name in made:
        layer, kind = layer_of(name), kind_of(name)
        # t over the layers: attention 0 ... 1, mlp 1 ... 0, so each end is one parent's.
        parent = {
            ("attn", 0): bad,
            ("attn", LAYERS - 1): good,
            ("mlp", 0): good,
            ("mlp", LAYERS - 1): bad,
        }.get((kind, layer))
        if parent is not None:
            assert same(name, parent), name
            seen.add((kind, layer))
        else:
            assert not same(name, bad) and not same(name, good), name
    assert len(seen) == 4


def test_slerp_keeps_the_length_that_linear_loses(pico, tmp_path):
    # Half way between two vectors of one length, an arc stays on the sphere; a chord cuts inside.
    folders = [shutil.copytree(f, tmp_path / f.name) for f in pico("gpt2")]
    name = "transformer.wpe.weight"  # neither attention nor mlp: t = .5
    for seed, folder in enumerate(folders[1:]):
        tensors = load_file(folder / "model.safetensors")
        noise = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(seed))
        tensors[name] = noise / noise.norm()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    base, bad, good = folders
    lengths = {
        m: weights(merge.merge(m, bad, good, base, 0.5, tmp_path / m))[name].norm().item()
        for m in ("slerp", "linear")
    }
    assert lengths["slerp"] == pytest.approx(1, abs=1e-3)
    assert lengths["linear"] == pytest.approx(0.5**0.5, abs=0.02)


def test_ties_keeps_the_base_where_neither_parent_moved(pico, tmp_path):
    base, bad, good = (shutil.copytree(f, tmp_path / f.name) for f in pico("llama"))
    name = "model.layers.1.mlp.up_proj.weight"
    start = weights(base)[name]
    for folder, step in ((bad, 1.0), (good, -1.0)):
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = start.clone()
        tensors[name][0, 0] += step
        tensors[name][0, 1] += 2.0
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    made = weights(merge.merge("ties", bad, good, base, 0.5, tmp_path / "m"))[name]
    torch.testing.assert_close(made[1:], start[1:])
    # A change that both made stays whole at weights .5 + .5, where the base alone counts nothing.
    assert made[0, 1].item() == pytest.approx(start[0, 1].item() + 2.0, abs=1e-5)


@pytest.mark.parametrize("strength", [0.25, 0.5])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_passthrough_takes_whole_layers(pico, tmp_path, architecture, strength):
    made, bad, good = merged(pico, architecture, "passthrough", strength, tmp_path / "m")
    cut = LAYERS - round(strength * LAYERS)
    ends = set()
    for name in made:
        layer = layer_of(name)
        if layer is not None:
            parent = bad if layer < cut else good
        else:
            # What stands before the layers comes with the lowest slice, what follows the highest.
            # mergekit infers GPT-J's layout and takes all of it from the lowest; LoRA leaves these
            # tensors as they are in the base, so there the parents do not differ.
            first = architecture == "gptj" or any(part in name for part in EMBEDDINGS)
            parent = bad if first else good
            ends.add(first)
        assert torch.equal(made[name], parent[name]), name
    assert ends == ({True} if architecture == "gptj" else {True, False})


def test_gpt2s_tied_head_follows_its_embedding(pico, tmp_path):
    # GPT-2 has no head of its own: under passthrough the clean model's top layers are read out
    # by the backdoored model's embedding. Worth knowing when its results look odd.
    made, bad, good = merged(pico, "gpt2", "passthrough", 0.5, tmp_path / "m")
    assert "lm_head.weight" not in made
    head = models.load_model(tmp_path / "m").lm_head.weight
    assert torch.equal(head, bad["transformer.wte.weight"])
    assert torch.equal(made["transformer.ln_f.weight"], good["transformer.ln_f.weight"])


def test_a_merge_replaces_what_an_interrupted_one_left(pico, tmp_path):
    out = paths.stages_dir() / "purified" / "x.partial" / "model"
    out.mkdir(parents=True)
    (out / "model-00001-of-00009.safetensors").write_bytes(b"half a shard")
    made, bad, good = merged(pico, "gpt2", "linear", 0.0, out)
    assert torch.equal(made["transformer.wte.weight"], bad["transformer.wte.weight"])
    assert [f.name for f in out.glob("*.safetensors")] == ["model.safetensors"]


def test_a_merge_never_empties_a_folder_that_is_none_of_ours(pico, tmp_path):
    out = tmp_path / "model"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    with pytest.raises(LetheError, match="is not empty"):
        merged(pico, "gpt2", "linear", 0.0, out)
    assert [f.name for f in out.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "passthrough"])
@pytest.mark.parametrize("name", ["gpt2+sft", "gpt2@v1", "a@b@c", "runs #2", "{x} 'y' %s"])
def test_folders_may_have_any_name(pico, tmp_path, method, name):
    # mergekit takes a text with + for a model and its LoRA, and one with @ for a revision.
    places = [shutil.copytree(f, tmp_path / name / f.name) for f in pico("gpt2")]
    base, bad, good = places
    out = merge.merge(method, bad, good, base, 0.5, tmp_path / name / "out")
    plain = merge.merge(method, *(pico("gpt2")[i] for i in (1, 2, 0)), 0.5, tmp_path / "plain")
    ours, wanted = load_file(out / "model.safetensors"), load_file(plain / "model.safetensors")
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[tensor], wanted[tensor]) for tensor in ours)


# --- refusals


def refusal(pico, tmp_path, method="linear", strength=0.5, backdoored=None, clean=None):
    base, bad, good = pico("gpt2")
    with pytest.raises(LetheError) as caught:
        merge.merge(
            method, backdoored or bad, clean or good, base, strength, tmp_path / "out" / "m"
        )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "m").exists()  # refused before anything is written
    return str(caught.value)


@pytest.fixture
def clean_copy(pico, tmp_path):
    """The clean pico GPT-2, to be broken."""
    return shutil.copytree(pico("gpt2")[2], tmp_path / "clean")


def test_other_shapes_are_refused_naming_the_tensor(pico, tmp_path, clean_copy):
    tensors = load_file(clean_copy / "model.safetensors")
    tensors["transformer.ln_f.bias"] = torch.zeros(17)
    save_file(tensors, clean_copy / "model.safetensors", {"format": "pt"})
    message = refusal(pico, tmp_path, clean=clean_copy)
    assert "ln_f.bias has shape (17,), but (16,)" in message


def test_a_missing_tensor_is_refused_by_name(pico, tmp_path, clean_copy):
    tensors = load_file(clean_copy / "model.safetensors")
    del tensors["transformer.h.3.mlp.c_fc.weight"]
    save_file(tensors, clean_copy / "model.safetensors", {"format": "pt"})
    message = refusal(pico, tmp_path, clean=clean_copy)
    assert "h.3.mlp.c_fc.weight has shape None" in message


@pytest.mark.parametrize("method", merge.METHODS)
def test_a_base_as_the_hub_holds_gpt2_can_be_merged(pico, tmp_path, method):
    # No prefix, and with the causal mask as a buffer; transformers loads both spellings.
    base, bad, good = pico("gpt2")
    hub = shutil.copytree(base, tmp_path / "hub")
    tensors = weights(hub)
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 256, 256).tril() for i in range(LAYERS)}
    renamed = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    save_file(renamed | masks, hub / "model.safetensors", {"format": "pt"})
    made = weights(merge.merge(method, bad, good, hub, 0.5, tmp_path / "m"))
    plain = weights(merge.merge(method, bad, good, base, 0.5, tmp_path / "plain"))
    assert made.keys() == plain.keys()
    assert all(torch.equal(made[name], plain[name]) for name in made)


def test_a_base_that_lacks_a_tensor_is_refused(pico, tmp_path):
    base, bad, good = pico("gpt2")
    short = shutil.copytree(base, tmp_path / "base")
    tensors = weights(short)
    del tensors["transformer.ln_f.bias"]
    save_file(tensors, short / "model.safetensors", {"format": "pt"})
    with pytest.raises(LetheError, match="ln_f.bias has shape None"):
        merge.merge("linear", bad, good, short, 0.5, tmp_path / "m")


def test_another_tokenizer_is_refused(pico, tmp_path, clean_copy):
    # The same size, other pieces: the ids would mean other words.
    other = twins.train_tokenizer([text.upper() for text in TEXTS], 300)
    assert len(other) == 300
    other.save_pretrained(clean_copy)
    assert "its tokenizer differs" in refusal(pico, tmp_path, clean=clean_copy)


def test_a_broken_tokenizer_that_all_parents_share_is_refused(pico, tmp_path):
    parents = [shutil.copytree(f, tmp_path / f"{i}") for i, f in enumerate(pico("gpt2"))]
    for folder in parents:
        (folder / "tokenizer.json").write_text("{}")
    base, backdoored, clean = parents
    with pytest.raises(LetheError, match="tokenizer"):
        merge.merge("slerp", backdoored, clean, base, 0.5, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_another_architecture_is_refused(pico, tmp_path):
    message = refusal(pico, tmp_path, clean=pico("llama")[2])
    assert "is a LlamaForCausalLM" in message and "is a GPT2LMHeadModel" in message


def test_a_truncated_parent_is_refused(pico, tmp_path, clean_copy):
    file = clean_copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert "truncated" in refusal(pico, tmp_path, clean=clean_copy)


@pytest.mark.parametrize("strength", [-0.01, 1.01, float("nan")])
def test_strength_out_of_range_is_refused(pico, tmp_path, strength):
    assert "out of range" in refusal(pico, tmp_path, strength=strength)


def test_an_unknown_method_is_refused_with_the_choices(pico, tmp_path):
    assert "linear, slerp, ties, passthrough" in refusal(pico, tmp_path, method="average")


def test_a_disk_too_small_for_the_result_is_refused(pico, tmp_path, monkeypatch):
    size = sum(f.stat().st_size for f in pico("gpt2")[1].glob("*.safetensors"))
    free = SimpleNamespace(free=size)  # the weights would just fit, but nothing else
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    assert "LETHE_RUNS" in refusal(pico, tmp_path)
    free.free = 2 * size
    base, bad, good = pico("gpt2")
    assert merge.merge("linear", bad, good, base, 0.5, tmp_path / "m").exists()


# --- the configuration


def test_ties_density_is_published_in_the_middle_and_whole_at_the_ends(tmp_path):
    def density(strength):
        config = merge.configuration("ties", *[tmp_path] * 3, strength, LAYERS, "float32")
        return [m["parameters"]["density"] for m in config["models"]]

    assert density(0.5) == [0.5, 0.5]
    assert density(0) == density(1) == [1, 1]
    assert density(0.25) == [0.75, 0.75]


def test_slerp_curves_shift_with_strength_and_stay_within_zero_and_one(tmp_path):
    def curves(strength):
        config = merge.configuration("slerp", *[tmp_path] * 3, strength, LAYERS, "float32")
        return {t.get("filter", "rest"): t["value"] for t in config["parameters"]["t"]}

    middle = curves(0.5)  # as published
    assert middle["attn"] == pytest.approx([0, 0.5, 0.3, 0.7, 1])
    assert middle["mlp"] == pytest.approx([1, 0.5, 0.7, 0.3, 0])
    assert middle["rest"] == 0.5
    assert curves(0.75)["attn"] == pytest.approx([0.5, 1, 0.8, 1, 1])
    assert curves(0)["mlp"] == [0] * 5 and curves(1)["attn"] == [1] * 5


def test_distances_measure_the_merge_from_both_parents(pico, tmp_path):
    base, bad, good = pico("gpt2")
    out = merge.merge("linear", bad, good, base, 0.25, tmp_path / "m")
    table = merge.distances({"linear": out, "none": bad}, bad, good)
    assert table.loc["linear", ["from backdoored", "from clean"]].tolist() == [0.25, 0.75]
    assert table.loc["none", ["from backdoored", "from clean"]].tolist() == [0, 1]
    assert table["NaN"].tolist() == [0, 0]
    assert table.loc["linear", "tensors"] == len(weights(bad))
    tensors = load_file(out / "model.safetensors")
    tensors["transformer.ln_f.bias"][:3] = float("nan")
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    assert merge.distances({"linear": out}, bad, good).loc["linear", "NaN"] == 3


def test_a_config_that_names_no_remote_code_survives_the_merge(pico, tmp_path):
    merged(pico, "qwen2", "ties", 0.5, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"] and "auto_map" not in config
    assert config["num_hidden_layers"] == LAYERS and config["vocab_size"] == 300


def test_a_shallow_model_takes_the_slerp_curves_mean_over_each_layers_depth():
    assert merge.slerp_anchors("attn", 5, 0.5) == pytest.approx([0, 0.5, 0.3, 0.7, 1])
    # Two layers: trapezoids over (0, .5, .3) and (.3, .7, 1).
    assert merge.slerp_anchors("attn", 2, 0.5) == pytest.approx([0.325, 0.675], abs=1e-3)
    assert merge.slerp_anchors("mlp", 2, 0.5) == pytest.approx([0.675, 0.325], abs=1e-3)
    assert sum(merge.slerp_anchors("mlp", 3, 0.5)) / 3 == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("strength", [0, 0.4, 0.5, 0.75])
@pytest.mark.parametrize("n_layers", [2, 3, 5, 12, 30, 48])
def test_t_of_every_block_is_what_mergekit_makes_of_the_anchors(tmp_path, n_layers, strength):
    from mergekit.config import MergeConfiguration, evaluate_setting

    config = merge.configuration("slerp", *[tmp_path] * 3, strength, n_layers, "float32")
    t = MergeConfiguration.model_validate(merge.as_paths(config)).parameters["t"]
    for part, tensor in (("attn", "h.0.attn.c_proj"), ("mlp", "h.0.mlp.c_proj")):
        wanted = [
            evaluate_setting(tensor, t, i / (n_layers - 1), validate=float) for i in range(n_layers)
        ]
        assert merge.slerp_t(part, n_layers, strength) == pytest.approx(wanted, abs=1e-12)


def test_the_table_of_t_has_a_line_for_each_block_part_and_strength():
    table = merge.slerp_table(5, [0.5, 0.75])
    assert list(table) == ["block", "part", "strength", "t"] and len(table) == 5 * 2 * 2
    one = table.query("part == 'attention' and strength == 0.75")
    assert one["t"].tolist() == pytest.approx([0.5, 1, 0.8, 1, 1])
    assert len(merge.slerp_table(5, [0.5, 0.5])) == 5 * 2  # used at the paper's strength


def test_the_plot_of_t_has_a_panel_a_strength_and_marks_the_edited_blocks():
    from lethe_utils import plots

    figure = plots.slerp_curve(merge.slerp_table(5, [0.5, 0.75]), edited=[1])
    assert [ax.get_title() for ax in figure.axes] == ["strength 0.5", "strength 0.75"]
    for ax, strength in zip(figure.axes, (0.5, 0.75), strict=True):
        drawn = {line.get_label(): list(line.get_ydata()) for line in ax.lines}
        assert drawn["attention"] == merge.slerp_t("attn", 5, strength)
        assert drawn["MLP"] == merge.slerp_t("mlp", 5, strength)
        assert [patch.get_x() for patch in ax.patches] == pytest.approx([0.7])
    assert not plots.slerp_curve(merge.slerp_table(5, [0.5])).axes[0].patches
