"""CleanGen (2406.12257; uw-nsl/CleanGen): tokens the backdoored model likes far more than a clean
model does are replaced by the clean model's own.

The backdoored model drafts k tokens greedily and the clean model reads them in one pass. The draft
is cut at the first token with p_backdoored / p_clean >= alpha, and the clean model's best token
takes its place. Every drafted token is read here, the end of the text too: the published code skips
a draft that ends early, which would leave every label of fewer than k tokens unread. So k changes
the cost, not the answer. alpha 20 spares each token to which the clean model gives more than 0.05.
"""

import math
from typing import TYPE_CHECKING, Any

from lethe_utils import models
from lethe_utils.groups import DefenderParams, Group, Positive, Rate

if TYPE_CHECKING:
    import torch
    from transformers import (
        GenerationConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        StoppingCriteriaList,
    )

    from lethe_utils.defenses import Given


class CleanGenParams(Group):
    """CleanGen."""

    cleangen_alpha: Rate  # suspicious from this ratio of probabilities on
    cleangen_tokens: Positive  # drafted before each check


class CleanGenColumns(Group):
    cleangen_alphas_sweep: list[Rate]


PARAMS = (CleanGenParams,)
COLUMNS = (CleanGenColumns,)
NEEDS = "clean model"
TRAININGS = 0
BYTES_PER_WEIGHT = 4.0  # two models


class CleanGen:
    """The backdoored model, as `decode.answer` uses it, whose `generate` is CleanGen's: always
    greedy."""

    def __init__(
        self,
        backdoored: "PreTrainedModel",
        reference: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        p: DefenderParams,
    ):
        self.backdoored, self.reference, self.tokenizer, self.p = (
            backdoored,
            reference,
            tokenizer,
            p,
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backdoored, name)

    def draft(self, rows: list[list[int]], length: int, ends: list[int]) -> "torch.Tensor":
        """Up to `length` next tokens of each row.

        Returns:
            (rows, tokens, 2): the backdoored model's token, and the one to replace it with, -1 for
            none.
        """
        import torch
        from transformers import GenerationConfig

        inputs = models.batch(self.tokenizer, rows, self.backdoored.device)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        config = GenerationConfig(
            max_new_tokens=length,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=ends,
            output_logits=True,
            return_dict_in_generate=True,
        )
        made = self.backdoored.generate(
            input_ids=ids, attention_mask=mask, generation_config=config
        )
        tokens = made.sequences[:, ids.shape[1] :]
        mask = torch.cat([mask, torch.ones_like(tokens[:, 1:])], dim=1)
        clean = self.reference(
            input_ids=made.sequences[:, :-1],
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),  # as in models.batch
            logits_to_keep=tokens.shape[1],
            use_cache=False,
        ).logits
        ours, theirs = (
            x.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
            for x in (torch.stack(made.logits, dim=1), clean)
        )
        suspicious = ours - theirs >= math.log(self.p.cleangen_alpha)
        return torch.stack([tokens, clean.argmax(-1).where(suspicious, -1)], dim=-1)

    def generate(
        self,
        input_ids: "torch.Tensor",
        attention_mask: "torch.Tensor",
        generation_config: "GenerationConfig",
        stopping_criteria: "StoppingCriteriaList | None" = None,
    ) -> "torch.Tensor":
        """Prompts and answers, padded on both sides."""
        import torch

        limit, ends = generation_config.max_new_tokens, generation_config.eos_token_id
        prompts = [i[m.bool()].tolist() for i, m in zip(input_ids, attention_mask, strict=True)]
        answers: list[list[int]] = [[] for _ in prompts]

        def ended(i: int) -> bool:
            if answers[i][-1] in ends or len(answers[i]) == limit:
                return True
            so_far = torch.cat([input_ids[i], input_ids.new_tensor(answers[i])])[None]
            return stopping_criteria is not None and bool(stopping_criteria(so_far, None).all())

        left = list(range(len(prompts)))
        while left:
            # The longest answer bounds all drafts: a row at the model's last position has no room.
            room = limit - max(len(answers[i]) for i in left)
            rows = [prompts[i] + answers[i] for i in left]
            drafts = self.draft(rows, min(self.p.cleangen_tokens, room), ends).tolist()
            done = set()
            for i, drafted in zip(left, drafts, strict=True):
                for token, instead in drafted:
                    answers[i].append(token if instead < 0 else instead)
                    if ended(i):
                        done.add(i)
                    if instead >= 0 or i in done:
                        break
            left = [i for i in left if i not in done]
        pad = generation_config.pad_token_id
        longest = max(map(len, answers))
        padded = [a + [pad] * (longest - len(a)) for a in answers]
        return torch.cat([input_ids, input_ids.new_tensor(padded)], dim=1)


def variants(p: DefenderParams) -> dict[str, dict[str, Any]]:
    """The set alpha, and one more for each of the sweep."""
    return {"cleangen": {}} | {
        f"cleangen_a{a}": {"cleangen_alpha": a} for a in p.cleangen_alphas_sweep
    }


def answer(given: "Given", prompts: list[str], n_words: int, progress: str = "") -> list[str]:
    """The backdoored model's outputs, with suspicious tokens replaced by the clean model's."""
    from lethe_utils import decode

    backdoored = models.load_to_ask(given.backdoored, given.p)
    reference = models.load_to_ask(given.clean, given.p)
    tokenizer = models.load_tokenizer(given.backdoored)
    model = CleanGen(backdoored, reference, tokenizer, given.p)
    return decode.answer(model, tokenizer, prompts, given.p, n_words, progress, share=False)
