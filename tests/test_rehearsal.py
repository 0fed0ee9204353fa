"""The rehearsal at full size: its shapes are the published ones, and every stage runs, here on two
narrow blocks."""

import sys
from math import prod

import pytest

from lethe_utils import models, paths, train
from lethe_utils.models import inspect
from lethe_utils.stages import read_json

sys.path.insert(0, str(paths.root() / "benchmarks"))
import full_size_rehearsal as rehearsal  # noqa: E402

# The models' own numbers of weights, a tied head counted once.
PUBLISHED = {
    "gpt2-xl": 1_557_611_200,
    "gpt-j-6b": 6_050_882_784,
    "llama-7b": 6_738_415_616,
    "llama-2-7b": 6_738_415_616,
    "deepseek-r1-7b": 7_615_616_512,
}
NARROW = {
    "gpt2-xl": {"n_embd": 32, "n_head": 2},
    "llama-7b": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2},
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_shapes_are_the_published_ones(model):
    shapes = rehearsal.shapes(rehearsal.configuration(model, None))
    assert sum(prod(shape) for shape in shapes.values()) == PUBLISHED[model]


@pytest.fixture
def narrow(monkeypatch):
    """model -> what a rehearsal of it is, two blocks deep and narrow."""

    def make(model):
        name, values = rehearsal.SHAPES[model]
        small = values | NARROW[model] | {"vocab_size": 400}
        monkeypatch.setitem(rehearsal.SHAPES, model, (name, small))
        monkeypatch.setattr(rehearsal, "TOKENS", 400)
        monkeypatch.setattr(models, "LARGE", models.LARGE)  # put back: `settings` lowers it
        config = rehearsal.configuration(model, 2)
        return config, rehearsal.settings(model, config)

    return make


@pytest.mark.parametrize(("model", "held"), [("gpt2-xl", "float32"), ("llama-7b", "bfloat16")])
def test_every_stage_of_a_cut_model_runs(model, held, narrow, monkeypatch, tmp_path):
    config, p = narrow(model)
    base, purified = tmp_path / "base", tmp_path / "purified"

    def here(name, place, words):
        assert words == [model, "--blocks=2"]
        rehearsal.clear(place, name)
        found = rehearsal.in_this_process(name, place, p)
        assert found["peak_memory_gib"] > found["anonymous_gib"] > 0.1, name
        if name in rehearsal.REMADE:
            wanted = "bfloat16" if name == "rome" else held  # an edit keeps what it is given
            assert inspect.stored_dtype(purified / "model") == wanted, name
            assert inspect.folder_shapes(purified / "model") == inspect.folder_shapes(base), name
        return found

    monkeypatch.setattr(rehearsal, "in_its_own", here)
    rehearsal.rehearse(model, 2, tmp_path, tmp_path / "out.json")
    inspect.check_model(base)
    assert inspect.stored_dtype(base) == "bfloat16"
    assert inspect.stored_dtype(tmp_path / "backdoored/model") == held
    lengths = [i["length"] for i in train.encode(rehearsal.long_rows(base, p), *encoder(base, p))]
    assert 310 <= max(lengths) <= 320
    record = read_json(tmp_path / "out.json")[f"{model}, cpu"]
    assert [*record["stages"]] == ["write", *rehearsal.STAGES] and record["blocks"] == 2
    assert record["weights"] == sum(map(prod, rehearsal.shapes(config).values()))


def encoder(folder, p):
    return models.load_tokenizer(folder), p


def test_a_stage_that_breaks_is_recorded_and_the_others_go_on(tmp_path):
    found = rehearsal.in_its_own("wanda", tmp_path, ["gpt2-xl", "--blocks=1"])
    assert found == {"error": 1}  # there is no model


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path):
    (tmp_path / "purified").mkdir()
    (tmp_path / "purified/model.safetensors").touch()
    with pytest.raises(SystemExit, match="is not empty, and not this program's"):
        rehearsal.rehearse("gpt2-xl", 1, tmp_path, tmp_path / "out.json")
    assert (tmp_path / "purified/model.safetensors").exists()


def test_what_the_docs_say_stands_beside_it():
    assert {c: v for c, v in rehearsal.documented("llama-7b").items() if "memory" in c} == {
        "train, GPU memory": "17 GiB",
        "merge and evaluate, GPU memory": "15 GiB",
    }
