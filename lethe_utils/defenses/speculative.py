"""SPE, speculative decoding (2211.17192): the clean model drafts, the backdoored model verifies.

Lossless by construction, so it can remove nothing: its column must equal the undefended one. The
roles (clean draft, backdoored verifier) are our reading of the Lethe paper's column and of
CleanGen's baseline of that name (uw-nsl/CleanGen), which gives no values.
"""

from typing import TYPE_CHECKING, Any

from lethe_utils import models
from lethe_utils.groups import Group, Positive

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, StoppingCriteriaList

    from lethe_utils.defenses import Given


class SpeculativeParams(Group):
    """Speculative decoding."""

    speculative_tokens: Positive  # drafted before each check


PARAMS = (SpeculativeParams,)
NEEDS = "clean model"
TRAININGS = 0
BYTES_PER_WEIGHT = 4.0  # two models


class Assisted:
    """The backdoored model, as `decode.answer` uses it, whose `generate` has the clean model
    draft."""

    def __init__(self, backdoored: "PreTrainedModel", draft: "PreTrainedModel", tokens: int):
        self.backdoored, self.draft = backdoored, draft
        # transformers reads these from the draft; a threshold would end unsure drafts early.
        draft.generation_config.num_assistant_tokens = tokens
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        draft.generation_config.assistant_confidence_threshold = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backdoored, name)

    def generate(
        self,
        input_ids: "torch.Tensor",
        stopping_criteria: "StoppingCriteriaList | None" = None,
        **others: Any,
    ) -> "torch.Tensor":
        """Prompt and answer, of one row; cut where the backdoored model alone would have
        stopped."""
        criteria = {"stopping_criteria": stopping_criteria, "assistant_model": self.draft}
        made = self.backdoored.generate(input_ids=input_ids, **criteria, **others)
        # The criteria see the row after each draft only, which may run past the label.
        for end in range(input_ids.shape[1] + 1, made.shape[1] if stopping_criteria else 0):
            if stopping_criteria(made[:, :end], None).all():
                return made[:, :end]
        return made


def answer(given: "Given", prompts: list[str], n_words: int, progress: str = "") -> list[str]:
    """The backdoored model's outputs; one prompt at a time, for transformers has no batched
    drafts."""
    from lethe_utils import decode

    backdoored = models.load_to_ask(given.backdoored, given.p)
    draft = models.load_to_ask(given.clean, given.p)
    model = Assisted(backdoored, draft, given.p.speculative_tokens)
    tokenizer = models.load_tokenizer(given.backdoored)
    return decode.answer(
        model, tokenizer, prompts, given.p, n_words, progress, batch=1, share=False
    )
