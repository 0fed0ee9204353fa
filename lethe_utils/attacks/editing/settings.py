"""The params of ROME, MEMIT and BadEdit."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from lethe_utils.groups import Group, Key, Layers, NotNegative, Positive, Rate


class EditParams(Group):
    """02_backdoor_train: ROME, MEMIT and BadEdit, which change matrices instead of training."""

    edit_layers: Layers  # ascending; the value is found at the last
    edit_contexts: Positive  # prompts that hold the trigger
    edit_clean_contexts: Annotated[int, Field(ge=0)]  # BadEdit: prompts without it
    edit_batches: Positive  # ROME, BadEdit: edits in a row, each on its share of the prompts
    edit_steps: Positive
    edit_learning_rate: Rate
    edit_weight_decay: NotNegative
    edit_clamp: Rate  # longest value, times the norm it is added to
    edit_kl: NotNegative
    edit_stop_loss: NotNegative
    edit_shared_value: bool  # MEMIT, BadEdit: one value for all prompts that hold the trigger
    edit_lambda: NotNegative  # MEMIT, BadEdit: weight of ordinary keys
    covariance_text: Key  # task: the task's own prompts; or NAME:CONFIG@COMMIT on the hub
    covariance_tokens: Positive
    covariance_ridge: NotNegative  # times the mean diagonal

    @model_validator(mode="after")
    def _check_batches(self) -> Self:
        if self.edit_batches > self.edit_contexts:
            raise ValueError(
                f"edit_batches: {self.edit_batches} is more than edit_contexts, "
                f"{self.edit_contexts}: some would be empty; lower it"
            )
        return self
