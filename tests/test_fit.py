"""Do two models fit: what may differ, what may not, and which of the two the message names."""

import json
import shutil

import pytest

from lethe_utils import models
from lethe_utils.errors import LetheError
from lethe_utils.models import fit, inspect, twins


@pytest.fixture
def pair(pico, tmp_path):
    """Copies of two pico LLaMAs that a test may break."""
    return [shutil.copytree(folder, tmp_path / folder.name) for folder in pico("llama")[:2]]


def error(function, *args, **kwargs):
    with pytest.raises(LetheError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_models_of_one_base_fit(pair, pico):
    one, other = pair
    assert fit.check_weights(one, other) == 0
    assert fit.check_tokens(models.load_tokenizer(one), one, other) == 0
    assert fit.embedding_rows(one) == 300
    message = error(fit.check_weights, pico("gpt2")[0], other)
    assert f"is a GPT2LMHeadModel, but {other} is a LlamaForCausalLM" in message


@pytest.mark.parametrize("change", [{"rms_norm_eps": 0.1}, {"num_attention_heads": 4}])
def test_settings_that_no_shape_shows_are_compared(pair, change):
    one, other = pair
    config = inspect.read_config(one) | change | {"head_dim": 8}
    (one / "config.json").write_text(json.dumps(config))
    (key,) = change
    message = error(fit.check_weights, one, other)
    assert message.startswith(f"{one / 'config.json'}: {key} is {change[key]}, but")


def test_further_rows_for_tokens_are_accepted_only_where_said(pair):
    one, other = pair
    model = models.load_model(one)
    model.resize_token_embeddings(310, mean_resizing=False)
    model.save_pretrained(one)
    assert fit.check_weights(one, other, grown=True) == 10
    assert fit.check_weights(other, one, grown=True) == -10
    assert "has shape (310, 16), but (300, 16)" in error(fit.check_weights, one, other)


def test_a_tokenizer_may_add_tokens_only_where_said_and_never_renumber_them(pair, tmp_path):
    one, other = pair
    tokenizer = models.load_tokenizer(one)
    tokenizer.add_tokens(["<more>"])
    assert fit.check_tokens(tokenizer, one, other, grown=True) == 1
    assert "token '<more>' is 300, not missing" in error(fit.check_tokens, tokenizer, one, other)
    foreign = twins.train_tokenizer(["quite other words"] * 3, 300)
    message = error(fit.check_tokens, foreign, one, other, grown=True)
    assert message.startswith(f"{one}: its tokenizer differs from the one of {other}")


def test_copied_tokenizers_are_known_without_being_read(pico, tmp_path):
    one, other, _ = pico("gpt2")
    copy = shutil.copytree(other, tmp_path / "copy")
    assert fit.same_tokenizer(one, other) and fit.same_tokenizer(copy, one)
    with (copy / "tokenizer.json").open("a") as file:  # another byte, the same tokens
        file.write(" ")
    assert not fit.same_tokenizer(copy, one)
    (copy / "tokenizer.json").unlink()
    assert not fit.same_tokenizer(copy, one) and not fit.same_tokenizer(one, copy)
