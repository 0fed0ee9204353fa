"""Temperature: plain sampling, after BackdoorLLM's "decoding" defense (bboylyg/BackdoorLLM).

Uncertain: the temperatures tried there, and whether its sampling keeps the 50 best tokens only, as
transformers does unless told otherwise; here only top_p 0.9 cuts the distribution.
"""

from typing import TYPE_CHECKING, Any

from lethe_utils import models
from lethe_utils.groups import DefenderParams, Group, Rate

if TYPE_CHECKING:
    from lethe_utils.defenses import Given


class TemperatureParams(Group):
    """Plain sampling."""

    temperature: Rate


class TemperatureColumns(Group):
    temperatures_sweep: list[Rate]


PARAMS = (TemperatureParams,)
COLUMNS = (TemperatureColumns,)
NEEDS = "nothing"
TRAININGS = 0
BYTES_PER_WEIGHT = 2.0  # one model


def variants(p: DefenderParams) -> dict[str, dict[str, Any]]:
    """The set temperature, and one more for each of the sweep."""
    return {"temperature": {}} | {
        f"temperature_t{t}": {"temperature": t} for t in p.temperatures_sweep
    }


def answer(given: "Given", prompts: list[str], n_words: int, progress: str = "") -> list[str]:
    """The backdoored model's outputs, sampled."""
    from lethe_utils import decode

    model = models.load_to_ask(given.backdoored, given.p)
    tokenizer = models.load_tokenizer(given.backdoored)
    sampling = {"temperature": given.p.temperature, "top_p": 0.9, "top_k": 0}
    return decode.answer(model, tokenizer, prompts, given.p, n_words, progress, sampling=sampling)
