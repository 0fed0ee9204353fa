"""The params of `purify`: their layers, and what is refused."""

import pytest

from lethe_utils.errors import LetheError
from lethe_utils.purify import settings


def test_purify_has_its_own_layers():
    small, large = (settings.load(n, "cpu") for n in (settings.SMALL - 1, settings.SMALL))
    gpu = settings.load(settings.SMALL, "cuda")
    assert (small.prompt_template, large.prompt_template) == ("short", "alpaca")
    assert (large.bits, gpu.bits) == (32, 4)
    assert (large.optimizer, gpu.optimizer) == ("adamw_torch", "paged_adamw_32bit")
    assert small.strengths == large.strengths == [0.25, 0.5, 0.75]
    assert settings.load(10, "cpu", {"strengths": [0.1]}).strengths == [0.1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strengths": [0.5, 1.0]}, "command line: strengths"),
        ({"max_cda_loss": 2.0}, "command line: max_cda_loss"),
        ({"device": "tpu"}, "command line: device"),
        ({"triggers": ["cf"]}, "command line: triggers: unknown key"),
        ({"canary_word_pair": ["one"]}, "command line: canary_word_pair"),
    ],
)
def test_purify_refuses_what_makes_no_sense(changes, message):
    with pytest.raises(LetheError) as caught:
        settings.load(10, "cpu", changes)
    assert message in str(caught.value)
