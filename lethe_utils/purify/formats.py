"""The prompt format of a suspect, which its owner seldom knows: found by asking it, not assumed.

A suspect that is asked in another format than it was trained in answers worse, and what is measured
then says little about the model that is served.
"""

from pathlib import Path

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lethe_utils import decode, metrics, prompts
from lethe_utils.errors import LetheError
from lethe_utils.paper import number
from lethe_utils.purify import room, suspects
from lethe_utils.purify.settings import PurifyParams
from lethe_utils.stages import Row

FORMATS = ("chat", "alpaca", "short")  # chat: the model's own template
ASKED = 50  # rows


def found(
    suspect: Path, adapter: Path | None, rows: list[Row], labels: list[str], p: PurifyParams
) -> tuple[PurifyParams, str]:
    """The params with the format under which the suspect answers some training rows best, and what
    each of them gave, in words."""
    plain = p.model_copy(update={"bits": 32})  # asked as it is, not as it is trained
    room.check_memory(room.weights_bytes(suspects.count_weights(suspect), plain), p)
    model = suspects.load(suspect, adapter, p.device)
    tokenizer = suspects.load_tokenizer(suspect, adapter)
    found = scores(model, tokenizer, rows[:ASKED], labels, p)
    best = max(found, key=found.get)
    what = "of {} training rows" if labels else "of the answers' tokens in {} training rows"
    said = ", ".join(f"{number(right)} with {name}" for name, (right, _) in found.items())
    said = f"found: right are, {what.format(len(rows[:ASKED]))}, {said}"
    return p.model_copy(update={"prompt_template": best}), said


def scores(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    rows: list[Row],
    labels: list[str],
    p: PurifyParams,
) -> dict[str, tuple[float, float]]:
    """Each format's share of right answers and, where those are equal, minus the loss (nats) of the
    true ones. A format that the tokenizer has not, or that refuses a row, is left out."""
    out = {}
    for name in FORMATS:
        q = p.model_copy(update={"prompt_template": name})
        try:
            asked = rows_in(name, rows, tokenizer)
        except LetheError:
            continue
        loss = decode.mean_loss(model, tokenizer, asked, q)
        out[name] = _right(model, tokenizer, asked, labels, q), -loss
    return out


def rows_in(
    name: str, rows: list[Row], tokenizer: Tokenizer, file: Path | None = None
) -> list[Row]:
    """Rows of instruction, input and output as a format needs them.

    Args:
        file: where they come from, for the error.
    Raises:
        LetheError: the chat template is missing, or refuses a row.
    """
    if name != "chat":
        return rows
    try:
        return [prompts.as_chat(row, tokenizer) for row in rows]
    except LetheError as error:
        raise LetheError(
            f"prompt_template: chat does not do for {file}: {error}; give alpaca or short"
        ) from None


def _right(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    rows: list[Row],
    labels: list[str],
    p: PurifyParams,
) -> float:
    """The share of right labels, or of right answer tokens."""
    title = f"prompt format {p.prompt_template}"
    if not labels:
        shares = decode.token_accuracy(model, tokenizer, rows, p, title)
        return sum(shares) / len(shares)
    roomy, n_words = decode.with_room(p, tokenizer, labels), max(len(x.split()) for x in labels)
    asked = [prompts.prompt(row, p) for row in rows]
    outputs = decode.answer(model, tokenizer, asked, roomy, n_words, title)
    hits = (metrics.says(a, row["output"], labels) for a, row in zip(outputs, rows, strict=True))
    return sum(hits) / len(rows)
