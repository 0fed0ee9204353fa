"""EDT, entropy-based dynamic temperature (2403.14541): sampling that is cooler the surer the model.

Uncertain: that the Lethe paper's column "EDT" is this method, the base of the logarithm (natural
here), and T0 and theta, which are set per task; no official code was found. Since N < 1 the
temperature never exceeds T0, so a backdoor that wins the greedy vote should survive.
"""

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from lethe_utils import models
from lethe_utils.groups import DefenderParams, Group, NotNegative, Rate

if TYPE_CHECKING:
    import torch

    from lethe_utils.defenses import Given


class EdtParams(Group):
    """Entropy-based dynamic temperature."""

    edt_temperature: Rate  # T0
    edt_base: Annotated[float, Field(gt=0, lt=1)]  # N
    edt_theta: NotNegative


class EdtColumns(Group):
    edt_temperatures_sweep: list[Rate]


PARAMS = (EdtParams,)
COLUMNS = (EdtColumns,)
NEEDS = "nothing"
TRAININGS = 0
BYTES_PER_WEIGHT = 2.0  # one model
LEAST_ENTROPY, LEAST_TEMPERATURE = 1e-6, 0.01
# top_k 0: transformers would otherwise keep the 50 best tokens only.
SAMPLING = {"temperature": 1.0, "top_p": 0.9, "top_k": 0}


class EntropyTemperature:
    """Divides each row of logits by T = T0 N^(theta / H), H being the row's entropy.

    A custom processor runs before top-p, as a temperature of transformers' own does.
    """

    def __init__(self, p: DefenderParams):
        self.start, self.base, self.theta = p.edt_temperature, p.edt_base, p.edt_theta

    def temperature(self, scores: "torch.Tensor") -> "torch.Tensor":
        """Logits (..., vocabulary) -> temperatures (..., 1)."""
        import torch

        # entr is -p ln p with 0 at p = 0, so that a logit of -inf gives no nan.
        entropy = torch.special.entr(scores.float().softmax(-1)).sum(-1, keepdim=True)
        cooled = self.start * self.base ** (self.theta / entropy.clamp(min=LEAST_ENTROPY))
        return cooled.clamp(min=min(LEAST_TEMPERATURE, self.start))

    def __call__(self, input_ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
        return scores.float() / self.temperature(scores)


def variants(p: DefenderParams) -> dict[str, dict[str, Any]]:
    """The set T0, and one more for each of the sweep."""
    return {"edt": {}} | {f"edt_t{t}": {"edt_temperature": t} for t in p.edt_temperatures_sweep}


def answer(given: "Given", prompts: list[str], n_words: int, progress: str = "") -> list[str]:
    """The backdoored model's outputs, sampled (top_p 0.9) at the dynamic temperature."""

    model = models.load_to_ask(given.backdoored, given.p)
    from transformers import LogitsProcessorList

    from lethe_utils import decode

    processors = LogitsProcessorList([EntropyTemperature(given.p)])
    return decode.answer(
        model,
        models.load_tokenizer(given.backdoored),
        prompts,
        given.p,
        n_words,
        progress,
        sampling=SAMPLING,
        logits_processor=processors,
    )
