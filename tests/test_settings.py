"""The params of `purify`: their layers, and what is refused."""

import pytest

from lethe_utils.errors import LetheError
from lethe_utils.purify import settings


def test_the_recipe_fits_the_models_size():
    twin, real, large = (settings.load(n, "cpu") for n in (10**6, 135 * 10**6, 7 * 10**9))
    assert [p.learning_rate for p in (twin, real, large)] == [3.0e-3, 5.0e-4, 2.0e-4]
    assert [p.lora_r for p in (twin, real, large)] == [32, 16, 64]
    assert (real.lr_schedule, real.batch_size, real.gradient_accumulation) == ("linear", 16, 1)
    assert (real.lora_alpha, real.lora_dropout, real.max_grad_norm) == (32, 0.0, 1.0)
    assert (real.clean_epochs, real.optimizer) == (6, "adamw_torch_fused")
    limits = [*settings.SIZES]
    assert settings.load(limits[0] - 1, "cpu") == twin != settings.load(limits[0], "cpu") == real
    assert settings.load(limits[1] - 1, "cpu") == real != settings.load(limits[1], "cpu") == large


def test_purify_has_its_own_layers():
    cpu, gpu = (settings.load(10**10, device) for device in ("cpu", "cuda"))
    assert (cpu.bits, gpu.bits) == (32, 4) and gpu.optimizer == "paged_adamw_32bit"
    assert cpu.merge_methods == ["slerp", "linear"] and cpu.strengths == [0.5, 0.6, 0.7]
    assert settings.load(10, "cpu", {"strengths": [0.1]}).strengths == [0.1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strengths": [0.5, 1.0]}, "command line: strengths"),
        ({"max_cda_loss": 2.0}, "command line: max_cda_loss"),
        ({"max_rounds": 0}, "command line: max_rounds"),
        ({"merge_methods": ["dare"]}, "command line: merge_methods"),
        ({"device": "tpu"}, "command line: device"),
        ({"triggers": ["cf"]}, "command line: triggers: unknown key"),
        ({"canary_word_pair": ["one"]}, "command line: canary_word_pair"),
    ],
)
def test_purify_refuses_what_makes_no_sense(changes, message):
    with pytest.raises(LetheError) as caught:
        settings.load(10, "cpu", changes)
    assert message in str(caught.value)
