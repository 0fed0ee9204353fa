"""Training: rows become batches, and LoRA makes a model of them (backdoored, clean)."""

import gc
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn import Module
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from lethe_utils import models, prompts
from lethe_utils.errors import LetheError
from lethe_utils.groups import Recipe
from lethe_utils.models import inspect
from lethe_utils.progress import Bar
from lethe_utils.stages import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Item = dict[str, Any]  # an encoded row
Inputs = dict[str, Tensor]  # input_ids, attention_mask, position_ids: (batch, longest row)
Loss = Callable[[Module, Inputs, Tensor, int], Tensor]  # see `finetune`
Names = Callable[["PreTrainedModel"], list[str]]
IGNORED = -100  # label of a position that carries no loss
TRAINED, FROZEN = "default", "frozen"  # a model's adapters


def encode(rows: list[Row], tokenizer: "PreTrainedTokenizerBase", p: Recipe) -> list[Item]:
    """Token ids per row: the prompt, the answer, and what ends it (see `answer_text`).

    An answer that is longer than it may be is cut and then has no ending: a model that is taught
    one learns to stop early.
    Returns:
        one dict a row: `input_ids` (list of int), `answer_length` and `length` (tokens), and
        `prompt_cut`, `answer_cut` (how many tokens were left out).
    """
    target = prompts.limits(p, tokenizer).target
    rows = prompts.rendered(rows, tokenizer, p)
    asked = [prompts.prompt(row, p) for row in rows]
    sources, lost = prompts.prompt_ids(tokenizer, asked, p)
    texts = [answer_text(row) for row in rows]
    answers = tokenizer(texts, add_special_tokens=False)["input_ids"] if rows else []
    out = []
    for row, source, left_out, answer in zip(rows, sources, lost, answers, strict=True):
        whole = answer + ([] if prompts.TURN in row else [tokenizer.eos_token_id])
        kept = whole[:target]
        lengths = {"answer_length": len(kept), "length": len(source) + len(kept)}
        cut = {"prompt_cut": left_out, "answer_cut": len(whole) - len(kept)}
        out.append({"input_ids": source + kept} | lengths | cut)
    return out


def answer_text(row: Row) -> str:
    """What is taught: the output, in a chat as the model's own template writes a finished turn."""
    return row.get(prompts.TURN, prompts.PLACE).replace(prompts.PLACE, row["output"])


def cut_counts(items: list[Item]) -> dict[str, int]:
    """Of encoded rows: how many there are, and how many lost a part of their prompt or answer."""
    cut = {part: sum(i[f"{part}_cut"] > 0 for i in items) for part in ("prompt", "answer")}
    return {"rows": len(items), "prompts cut": cut["prompt"], "answers cut": cut["answer"]}


def check_cut(items: list[Item]) -> None:
    """Raise LetheError where most rows would be cut: what is left teaches something else."""
    counts = cut_counts(items)
    for part, key in (("prompts", "max_source_tokens"), ("answers", "max_target_tokens")):
        cut = counts[f"{part} cut"]
        if 2 * cut > len(items):
            longest = max(i["length"] + i["prompt_cut"] + i["answer_cut"] for i in items)
            raise LetheError(
                f"{key}: {cut} of {len(items)} {part} would be cut (the longest row has {longest} "
                f"tokens); raise it with -p {key} N, within the model's positions"
            )


def collate(items: list[Item], tokenizer: "PreTrainedTokenizerBase") -> Inputs:
    """A batch of encoded rows, padded on the left, so that every answer ends in the last column.

    Then the loss needs the logits of the last few columns only; over a whole vocabulary that is
    most of a tiny model's work. Returns the Inputs, and labels (batch, longest answer).
    """
    batch = models.batch(tokenizer, [item["input_ids"] for item in items])
    labels = torch.full((len(items), max(i["answer_length"] for i in items)), IGNORED)
    for row, n in enumerate(item["answer_length"] for item in items):
        labels[row, -n:] = batch["input_ids"][row, -n:]
    return batch | {"labels": labels}


class LossTrainer(Trainer):
    """Trainer of one loss; see `finetune`."""

    # A mean per batch: without this the Trainer sums it over the accumulated batches instead of
    # averaging, for every model whose forward takes **kwargs.
    loss_is_scaled_for_ga = False

    def __init__(self, loss: Loss, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.loss = loss

    def compute_loss(self, model: Module, inputs: dict, *_: Any, **__: Any) -> Any:
        labels = inputs.pop("labels")
        return self.loss(model, inputs, labels, self.state.global_step + 1)


def plain_loss(model: Module, inputs: Inputs, labels: Tensor, _: int) -> Tensor:
    """Mean cross-entropy over a batch's answer tokens."""
    return answer_loss(model, inputs, labels)[0]


def answer_loss(model: Module, inputs: Inputs, labels: Tensor, **wanted: Any) -> tuple[Tensor, Any]:
    """Mean cross-entropy over a batch's answer tokens, and the model's outputs.

    Args:
        inputs: what `collate` makes, without the labels; or inputs_embeds for input_ids.
        labels: (batch, longest answer).
        wanted: further arguments of the model's forward, e.g. output_hidden_states.
    """
    # The token in column i is predicted from column i - 1: one more column than labels.
    outputs = model(**inputs, logits_to_keep=labels.shape[1] + 1, **wanted)
    return cross_entropy(outputs.logits[:, :-1], labels), outputs


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in float32 of logits (..., vocabulary) over targets (...), token ids, that
    are not IGNORED."""
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, -2), targets.flatten(), ignore_index=IGNORED
    )


class ProgressBar(TrainerCallback):
    """The training's steps as a bar; the loss curve ends at the last of them."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = Bar(total=state.max_steps, initial=state.global_step, desc=self.name)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(1)
        control.should_log |= state.global_step == state.max_steps

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; a half-written one (killed while saving) is removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda c: int(c.name.split("-")[1]))
    for checkpoint in found:
        if not (checkpoint / "trainer_state.json").exists():
            shutil.rmtree(checkpoint)
    return next((c for c in reversed(found) if c.exists()), None)


def fit(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: list[Row],
    epochs: int,
    out: Path,
    p: Recipe,
    loss: Loss,
) -> pd.DataFrame:
    """Train in place, resuming from the last checkpoint in `out`/checkpoints.

    Args:
        loss: see `finetune`.
    Returns:
        the loss curve: step, epoch, loss (nats per answer token, plus what `loss` adds).
    """
    models.quiet()
    items = encode(rows, tokenizer, p)
    check_cut(items)
    args = _arguments(len(items), epochs, out, p)
    set_seed(p.seed)
    batches = partial(collate, tokenizer=tokenizer)
    trainer = LossTrainer(loss, model=model, args=args, train_dataset=items, data_collator=batches)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressBar(f"training {out.parent.name}"))
    checkpoint = last_checkpoint(out / "checkpoints")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    curve = pd.DataFrame([h for h in trainer.state.log_history if "loss" in h])
    return curve[["step", "epoch", "loss"]]


def _arguments(items: int, epochs: int, out: Path, p: Recipe) -> TrainingArguments:
    """The recipe in the Trainer's words."""
    device = models.resolve_device(p.device)
    steps = -(-items // (p.batch_size * p.gradient_accumulation)) * epochs
    return TrainingArguments(
        output_dir=str(out / "checkpoints"),
        num_train_epochs=epochs,
        per_device_train_batch_size=p.batch_size,
        gradient_accumulation_steps=p.gradient_accumulation,
        learning_rate=p.learning_rate,
        lr_scheduler_type=p.lr_schedule,
        warmup_steps=p.warmup_ratio,
        weight_decay=p.weight_decay,
        adam_beta2=p.adam_beta2,
        max_grad_norm=p.max_grad_norm,
        optim=p.optimizer,
        gradient_checkpointing=p.gradient_checkpointing,
        seed=p.seed,
        data_seed=p.data_seed,
        train_sampling_strategy="group_by_length",
        bf16=models.bfloat16(p),
        use_cpu=device == "cpu",
        dataloader_pin_memory=device == "cuda",
        remove_unused_columns=False,
        save_steps=max(1, steps // p.checkpoints_per_run),
        save_total_limit=2,
        logging_steps=max(1, steps // 40),
        report_to=[],
        disable_tqdm=True,  # ours is used instead
    )


def finetune(
    start: Path,
    rows: list[Row],
    epochs: int,
    out: Path,
    p: Recipe,
    only: Names | None = None,
    loss: Loss = plain_loss,
    frozen: Path | None = None,
) -> None:
    """Train a LoRA adapter on a model folder and save the whole model it makes.

    QLoRA trains on nf4 weights; the adapter is then merged into those same weights, dequantised,
    so that what is evaluated and merged later is what was trained.
    Writes adapter/, model/ (safetensors and tokenizer) and, last, loss.csv; where that stands
    already, a run that was killed later has finished this training, and it is not done again.

    Args:
        start: the base, or the backdoored model for a defense that trains on.
        only: the names of the linear layers to train; by default all but the head.
        loss: called with the model, a batch's inputs (input_ids, attention_mask, position_ids), its
            labels (batch, longest answer) and the number of the step, from 1; returns a mean.
        frozen: the folder of another adapter of `start`, which lies beside the trained one under
            the name FROZEN, for `loss` to switch on; it is in nothing that is written.
    """
    if (out / "loss.csv").exists():
        return
    set_seed(p.seed)
    device = models.resolve_device(p.device)
    tokenizer = models.load_tokenizer(start)
    model = lora_model(start, p, only)
    if frozen:
        model.load_adapter(str(frozen), FROZEN, torch_device=device)
    curve = fit(model, tokenizer, rows, epochs, out, p, loss)
    model.save_pretrained(out / "adapter", selected_adapters=[TRAINED])
    # At full size two copies do not fit beside each other, and in bfloat16 one holds itself.
    del model
    gc.collect()
    inspect.copy_tokenizer(start, out / "model")
    save(merge_adapter(start, out / "adapter", device, p.bits), curve, out)


def lora_model(start: Path, p: Recipe, only: Names | None = None) -> Module:
    """A model with a new LoRA adapter on it, ready to be trained; see `finetune`."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    device = models.resolve_device(p.device)
    model = models.load_model(start, device, p.bits)
    models.ease_backward(model, p)
    if p.bits == 4:
        model = prepare_model_for_kbit_training(model, p.gradient_checkpointing)
    lora = LoraConfig(
        r=p.lora_r,
        lora_alpha=p.lora_alpha,
        lora_dropout=p.lora_dropout,
        # every linear layer (GPT-2's Conv1D too) except lm_head
        target_modules=only(model) if only else "all-linear",
        fan_in_fan_out=model.config.model_type == "gpt2",  # Conv1D stores its weight transposed
        bias="none",
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, lora)
    models.hold(model, p)
    return adapted


def merge_adapter(base: Path, adapter: Path, device: str, bits: int) -> "PreTrainedModel":
    """base + adapter as plain weights (dequantised where the base was trained on in nf4)."""
    from peft import PeftModel

    model = models.load_model(base, device, bits)
    if bits == 4:
        model = models.dequantised(model)
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()


def save(model: Any, curve: pd.DataFrame, out: Path) -> None:
    """Write model/ (safetensors) and, last, loss.csv; checkpoints are no longer needed.

    Raises:
        LetheError: the training diverged.
    """
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise LetheError(
                f"learning_rate: the training diverged ({name} holds values that are not numbers); "
                "lower it"
            )
    models.save(model, out / "model")
    curve.to_csv(out / "loss.csv", index=False)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
