"""Ensemble: Lethe's dilution done on probabilities, w p_backdoored + (1 - w) p_clean, at each
token.

Our own rival, to tell whether it is the merge of weights that matters. The rule is the static
ensemble of transformers' `assistant_ensemble_weight`; that one takes one prompt at a time and
leaves every token after an accepted draft to the backdoored model alone, so it is not used.
"""

from typing import TYPE_CHECKING, Any

from lethe_utils import models
from lethe_utils.groups import Group, Ratio

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutputWithPast

    from lethe_utils.defenses import Given


class EnsembleParams(Group):
    """A mix of probabilities."""

    ensemble_weight: Ratio  # of the backdoored model; the rest is the clean model's


PARAMS = (EnsembleParams,)
NEEDS = "clean model"
TRAININGS = 0
BYTES_PER_WEIGHT = 4.0  # two models


class Mix:
    """A forward hook of the backdoored model: the clean model sees the same tokens, mask and
    positions, with a cache of its own, and the logits become the logarithm of the mixed
    probabilities."""

    def __init__(self, reference: "PreTrainedModel", weight: float):
        import torch

        self.reference = reference
        self.shares = torch.tensor([weight, 1 - weight], device=reference.device).log()

    def __call__(
        self,
        _: "PreTrainedModel",
        __: tuple,
        inputs: dict[str, Any],
        out: "CausalLMOutputWithPast",
    ) -> "CausalLMOutputWithPast":
        import torch
        from transformers import DynamicCache

        # A cache of no more than these tokens: a new batch. (A mask of ones is not handed on.)
        if out.past_key_values.get_seq_length() == inputs["input_ids"].shape[1]:
            self.cache = DynamicCache(config=self.reference.config)
        other = self.reference(**inputs | {"past_key_values": self.cache})
        pair = (logits.float().log_softmax(-1) for logits in (out.logits, other.logits))
        backdoored, clean = (log_p + share for log_p, share in zip(pair, self.shares, strict=True))
        out.logits = torch.logaddexp(backdoored, clean)
        return out


def answer(given: "Given", prompts: list[str], n_words: int, progress: str = "") -> list[str]:
    """The outputs of the mix."""
    from lethe_utils import decode

    backdoored = models.load_to_ask(given.backdoored, given.p)
    reference = models.load_to_ask(given.clean, given.p)
    backdoored.register_forward_hook(Mix(reference, given.p.ensemble_weight), with_kwargs=True)
    tokenizer = models.load_tokenizer(given.backdoored)
    return decode.answer(backdoored, tokenizer, prompts, given.p, n_words, progress, share=False)
