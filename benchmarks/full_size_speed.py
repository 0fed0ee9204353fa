"""Training and answering in the shapes of a paper's model on a GPU, each beside its plain
counterpart, in one sitting.

    python benchmarks/full_size_speed.py MODEL [--blocks 8]

Random weights (full_size_rehearsal.py writes them); a model that is cut to some of its blocks has
their speed. Needs CUDA and its own GPU.

training  QLoRA with the paper's recipe on rows as long as it takes them: tokens a second x 4 x the
          blocks' weights (forwards and backwards, which leave frozen weights alone; what gradient
          checkpointing computes anew does not count), as a share of the rate of a large matrix
          product in bfloat16; against transformers' Trainer with its own loss and collator
answers   `decode.answer` in the recipe's batches, against transformers' generate, a prompt at a
          time; both greedy and of max_new_tokens tokens, for random weights end no answer
Writes full_size_speed.json beside this file.
"""

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import full_size_rehearsal as rehearsal
import torch
from efficiency import questions, report, seconds
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from lethe_utils import decode, evaluate, models, pipeline, train
from lethe_utils.models import blocks
from lethe_utils.params import Params
from lethe_utils.prompts import prompt_ids
from lethe_utils.stages import Row

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedTokenizerBase

SIDE, PRODUCTS = 8192, 20  # of the matrix product
FEW, MANY = 2, 6  # optimizer steps; the difference is timed, without a training's beginning and end
ACCUMULATION = 4  # batches a step
PROMPTS, ONE_BY_ONE = 128, 16


def product_rate() -> float:
    """Floating-point operations a second of a large matrix product."""
    a, b = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def products() -> None:
        for _ in range(PRODUCTS):
            a @ b
        torch.cuda.synchronize()

    products()
    return PRODUCTS * 2 * SIDE**3 / seconds(products)


def plain_fit(
    model: "Module", tokenizer: "PreTrainedTokenizerBase", rows: list[Row], out: Path, p: Params
) -> None:
    """The same training as most scripts write it."""
    items = [
        {
            "input_ids": one["input_ids"],
            "labels": [train.IGNORED] * (one["length"] - one["answer_length"])
            + one["input_ids"][-one["answer_length"] :],
        }
        for one in train.encode(rows, tokenizer, p)
    ]
    args = TrainingArguments(
        output_dir=str(out),
        num_train_epochs=1,
        per_device_train_batch_size=p.batch_size,
        gradient_accumulation_steps=p.gradient_accumulation,
        learning_rate=p.learning_rate,
        optim=p.optimizer,
        gradient_checkpointing=p.gradient_checkpointing,
        bf16=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    collator = DataCollatorForSeq2Seq(tokenizer)
    Trainer(model=model, args=args, train_dataset=items, data_collator=collator).train()


def training(p: Params, base: Path, out: Path) -> dict[str, float]:
    """Train a new adapter, in our way and in the plain one."""
    tokenizer, model = models.load_tokenizer(base), train.lora_model(base, p)
    # A matrix in nf4 says how many bytes it takes; its layer knows its shape.
    inner = blocks.linear(blocks.of(model.get_base_model()))
    frozen = [layer for layer in inner if not layer.weight.requires_grad]
    weights = sum(layer.in_features * layer.out_features for layer in frozen)
    long = rehearsal.long_rows(base, p)
    tokens = sum(item["length"] for item in train.encode(long, tokenizer, p)) / len(long)
    per_step = p.batch_size * p.gradient_accumulation

    numbers = itertools.count()  # in one folder the second training would go on from the first

    def ours(steps: int) -> None:
        rows, place = (long * per_step)[: steps * per_step], out / f"training-{next(numbers)}"
        train.fit(model, tokenizer, rows, 1, place, p, train.plain_loss)

    def plain(steps: int) -> None:
        plain_fit(model, tokenizer, (long * per_step)[: steps * per_step], out / "plain", p)

    rates = []
    for fit in (ours, plain):
        taken = [seconds(lambda n=n, fit=fit: fit(n)) for n in (FEW, FEW, MANY)][1:]
        rates.append(tokens * per_step * (MANY - FEW) / (taken[1] - taken[0]))
    product = product_rate()
    return {
        "tokens_a_row": round(tokens),
        "tokens_per_second": round(rates[0]),
        "plain_tokens_per_second": round(rates[1]),
        "times_plain": round(rates[0] / rates[1], 2),
        "product_tflops": round(product / 1e12),
        "share_of_product_rate": round(4 * weights * rates[0] / product, 3),
        "gpu_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
    }


def answering(p: Params, folder: Path) -> dict[str, float]:
    """Items a second of the test's prompts."""
    model, tokenizer = models.load_to_ask(folder, p), models.load_tokenizer(folder)
    prompts = questions(p, PROMPTS)
    expected = evaluate.expected_answers(pipeline.labels(p), p)
    q = decode.with_room(p, tokenizer, expected)
    ids, _ = prompt_ids(tokenizer, prompts[:ONE_BY_ONE], p)

    @torch.inference_mode()
    def one_by_one() -> None:
        for row in ids:
            inputs = models.batch(tokenizer, [row], "cuda")
            model.generate(**inputs, do_sample=False, max_new_tokens=q.max_new_tokens)

    def batched() -> None:
        decode.answer(model, tokenizer, prompts, q, q.max_new_tokens)  # no answer is cut short

    taken = [min(seconds(call) for _ in range(3)) for call in (batched, one_by_one)]
    rates = len(prompts) / taken[0], len(ids) / taken[1]
    return {
        "new_tokens": q.max_new_tokens,
        "items_per_second": round(rates[0], 1),
        "one_by_one_items_per_second": round(rates[1], 1),
        "times_one_by_one": round(rates[0] / rates[1], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=rehearsal.SHAPES)
    parser.add_argument("--blocks", type=int, default=8, help="instead of the model's own number")
    args = parser.parse_args()
    config = rehearsal.configuration(args.model, args.blocks)
    p = rehearsal.settings(args.model, config)
    own = {"gradient_accumulation": ACCUMULATION, "eval_batch_size": 32, "checkpoints_per_run": 1}
    p = p.model_copy(update=own)
    result: dict[str, Any] = {"model": args.model, "blocks": args.blocks}
    with tempfile.TemporaryDirectory() as place:
        base = Path(place) / "base"
        rehearsal.write(config, pipeline.ordinary_text(p), base)
        result["training"] = training(p, base, Path(place))
        torch.cuda.empty_cache()
        result["answers"] = answering(p, base)
    report(result, Path(__file__))


if __name__ == "__main__":
    main()
