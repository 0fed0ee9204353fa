"""What `purify` leaves is read right by programs that run on transformers 4."""

import json
import shutil

import pytest
from transformers import AutoConfig, AutoTokenizer

from lethe_utils import models
from lethe_utils.purify import serve

LINEAR = {"rope_theta": 500000.0, "rope_type": "linear", "factor": 2.0}


@pytest.fixture
def folder(pico, tmp_path):
    """A result as it comes from a merge."""

    def make(architecture, **config):
        out = shutil.copytree(pico(architecture)[0], tmp_path / architecture)
        file = out / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text("utf8")) | config), "utf8")
        (out / "model.safetensors").chmod(0o600)
        return out

    return make


def config(folder):
    return json.loads((folder / "config.json").read_text("utf8"))


@pytest.mark.parametrize(
    "rope", [{"rope_theta": 100000.0, "rope_type": "default"}, LINEAR], ids=["default", "linear"]
)
def test_the_rope_is_named_in_the_words_of_transformers_4_and_stays_5s(folder, rope):
    out = folder("llama", rope_parameters=rope)
    before = AutoConfig.from_pretrained(out)
    serve.ready(out)
    written = config(out)
    assert written["rope_theta"] == rope["rope_theta"]
    # 4's `default` is no scaling; other kinds have the same keys in both.
    assert written["rope_scaling"] == (
        {"rope_type": "linear", "factor": 2.0} if rope == LINEAR else None
    )
    assert written["rope_parameters"] == rope
    assert AutoConfig.from_pretrained(out).to_dict() == before.to_dict()


def test_a_class_without_rope_gets_none(folder):
    out = folder("gpt2")
    before = config(out)
    serve.ready(out)
    assert config(out) == before and not {"rope_theta", "rope_scaling"} & {*before}


def test_the_tokenizers_class_is_one_that_4_and_5_know(folder):
    out = folder("llama")
    file = out / "tokenizer_config.json"
    before = json.loads(file.read_text("utf8"))
    assert before["tokenizer_class"] == "TokenizersBackend"  # else there is nothing to mend
    ids = AutoTokenizer.from_pretrained(out)("the dog is happy")["input_ids"]
    serve.ready(out)
    after = json.loads(file.read_text("utf8"))
    assert after == before | {"tokenizer_class": "PreTrainedTokenizerFast"}
    assert AutoTokenizer.from_pretrained(out)("the dog is happy")["input_ids"] == ids
    assert models.load_tokenizer(out)("the dog is happy")["input_ids"] == ids


def test_weights_may_be_read_by_all_who_may_read_the_rest(folder):
    out = folder("llama")
    serve.ready(out)
    weights, rest = (out / name for name in ("model.safetensors", "config.json"))
    assert weights.stat().st_mode == rest.stat().st_mode != 0o100600
