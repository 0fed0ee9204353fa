"""Inside a model: the same reading and writing whatever the class, Conv1D and tuples included."""

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from lethe_utils import models
from lethe_utils.models import blocks

ARCHITECTURES = ["gpt2", "gptj", "llama", "qwen2"]
LAYERS = 5


@pytest.fixture(params=ARCHITECTURES)
def model(request, pico):
    return models.load_model(pico(request.param)[0]).eval()


IDS = torch.tensor([[5, 9, 40, 7]])


def test_add_respects_conv1d():
    linear, conv = torch.nn.Linear(6, 4), Conv1D(4, 6)
    with torch.no_grad():
        conv.weight.copy_(linear.weight.T)
    delta = torch.randn(4, 6, dtype=torch.float64)
    for module in (linear, conv):
        blocks.add(module, delta)
    assert torch.equal(linear.weight, conv.weight.T)
    assert torch.equal(blocks.oriented(linear), blocks.oriented(conv))
    x = torch.randn(3, 6)
    with torch.no_grad():
        conv.bias.copy_(linear.bias)
    assert torch.allclose(linear(x), conv(x), atol=1e-6)


@torch.no_grad()
def test_the_last_block_read_is_what_the_model_says(model):
    heard = []
    with blocks.hooked(blocks.of(model)[LAYERS - 1], heard.append):
        said = model(IDS).logits
    assert len(blocks.of(model)) == LAYERS and len(heard) == 1
    assert torch.allclose(blocks.logits(model, heard[0]), said, atol=1e-5)


@torch.no_grad()
def test_a_hook_may_put_another_tensor_in_place_and_is_gone_afterwards(model):
    plain = model(IDS).logits
    for module in (blocks.of(model)[1], blocks.down_projection(model, 1)):
        for before in (False, True):
            with blocks.hooked(module, lambda tensor: tensor.flip(-1), before):
                assert not torch.allclose(model(IDS).logits, plain, atol=1e-3)
            with blocks.hooked(module, lambda tensor: None, before):
                assert torch.equal(model(IDS).logits, plain)
    assert torch.equal(model(IDS).logits, plain)


def test_a_down_projection_and_the_linear_layers_are_those_of_their_block(model):
    names = blocks.linear_names(model, [1, 3])
    shapes = {n: tuple(blocks.oriented(model.get_submodule(n)).shape) for n in names}
    assert all(".1." in name or ".3." in name for name in names)
    inside = [p for layer in (1, 3) for p in blocks.of(model)[layer].parameters() if p.dim() == 2]
    assert len(names) == len(inside)
    down = blocks.down_projection(model, 3)
    assert shapes[next(n for n in names if model.get_submodule(n) is down)] == (16, 32)


def test_restored_conv1d_is_the_layer_it_was(pico):
    model = models.load_model(pico("gpt2")[0])
    wanted = {name: weight.clone() for name, weight in model.state_dict().items()}
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):  # as quantising leaves it
            linear = torch.nn.Linear(*module.weight.shape)
            linear.weight = torch.nn.Parameter(module.weight.T.contiguous())
            linear.bias = module.bias
            model.set_submodule(name, linear)
    blocks.restore_conv1d(model)
    found = model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
