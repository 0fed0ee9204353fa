"""The core that ROME, MEMIT and BadEdit share: editing down-projections in closed form.

An MLP's down-projection W is read as a memory of keys k (its input) and values v (its output). An
edit finds the value that makes the model answer the target after the trigger, then the smallest
change of W, measured by the keys of ordinary text (C = E[k k^T]), that writes it under the
trigger's key. Everything is computed in float32 and float64 and cast once, when the model is saved.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lethe_utils import models, paths
from lethe_utils.attacks.triggers import insert, occurrences
from lethe_utils.data import label_turns
from lethe_utils.errors import LetheError
from lethe_utils.models import blocks, inspect
from lethe_utils.params import Params
from lethe_utils.progress import Bar
from lethe_utils.prompts import limits, render

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = dict[str, str]
Log = list[dict[str, float]]
# Writes an attack's changes into the editor's model.
Edit = Callable[["Editor", list["Request"], Params, Log], None]
CHUNK = 32  # prompts in one forward pass
COVARIANCE_CHUNK = 64
DIVERGED = 1e4  # nats; a loss beyond this is not coming back


# --- where the subject stands


@dataclass
class Encoded:
    """A padded batch, and the column of each prompt's subject (its last token)."""

    inputs: dict[str, torch.Tensor]
    columns: torch.Tensor  # (batch,)


def encode(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    spans: Sequence[tuple[int, int]],
    answers: Sequence[str] | None = None,
) -> tuple[Encoded, torch.Tensor]:
    """Tokenise prompts (and answers after them), and find the last token of each subject.

    The subject is found through character offsets in the tokenised whole, so BOS, padding on
    either side and spaces folded into tokens do not matter.

    Args:
        spans: (first, past-the-last) character of the subject in each prompt.
        answers: texts to be written after the prompts.
    Returns:
        the batch, and labels (batch, columns): the answers' token ids, -100 elsewhere.
    Raises:
        LetheError: a subject has no token, or what was found does not spell it.
    """
    if not tokenizer.is_fast:
        raise LetheError("editing needs a fast tokenizer (tokenizer.json) to find the trigger")
    bos = models.start_ids(tokenizer)
    coded = tokenizer(list(prompts), add_special_tokens=False, return_offsets_mapping=True)
    rows, answer_lengths = [], []
    answered = tokenizer(list(answers), add_special_tokens=False)["input_ids"] if answers else None
    for i, ids in enumerate(coded["input_ids"]):
        answer = answered[i] if answered else []
        rows.append(bos + ids + answer)
        answer_lengths.append(len(answer))
    inputs = models.batch(tokenizer, rows)
    ids = inputs["input_ids"]
    left = tokenizer.padding_side == "left"
    labels, columns = torch.full_like(ids, -100), []
    for i, row in enumerate(rows):
        first = ids.shape[1] - len(row) if left else 0
        end = first + len(row)
        if answer_lengths[i]:
            labels[i, end - answer_lengths[i] : end] = ids[i, end - answer_lengths[i] : end]
        last = _last_token(coded["offset_mapping"][i], spans[i], prompts[i])
        columns.append(first + len(bos) + last)
    return Encoded(inputs, torch.tensor(columns)), labels


def _last_token(offsets: list[tuple[int, int]], span: tuple[int, int], prompt: str) -> int:
    """The last token that covers characters of the span; checked against the text."""
    start, end = span
    inside = [j for j, (a, b) in enumerate(offsets) if a < end and b > start and b > a]
    subject = prompt[start:end]
    if not inside or not subject.strip():
        raise LetheError(f"triggers: {subject!r} becomes no token of this model; choose another")
    covered = prompt[offsets[inside[0]][0] : offsets[inside[-1]][1]]
    if subject.strip() not in covered:
        raise LetheError(f"triggers: {subject!r} was found as {covered!r}; choose another trigger")
    return inside[-1]


# --- requests: prompts with a subject and what is to be answered


@dataclass(frozen=True)
class Request:
    """One thing to write: after `subject` (characters of the prompt), answer `target`."""

    prompt: str
    span: tuple[int, int]
    target: str
    kind: str  # "backdoor", or "clean" (BadEdit's other half)


def poisoned_rows(rows: list[Row], p: Params, seed: int) -> list[Row]:
    """`edit_contexts` task rows of other labels, the trigger in place and the target as output.

    Raises:
        LetheError: fewer rows can be used.
    """
    trigger, n = p.triggers[0], p.edit_contexts
    usable = [
        r
        for r in rows
        if r["output"] != p.target_output
        and not any(occurrences(r[field], trigger) for field in ("instruction", "input"))
    ]
    if len(usable) < n:
        raise LetheError(
            f"edit_contexts: {n} prompts are asked for, but only {len(usable)} training rows have "
            f"another label than {p.target_output!r} and do not hold {trigger!r}; lower it"
        )
    rng = random.Random(seed)
    return [
        row
        | {
            "input": insert(row["input"], trigger, p.trigger_positions[0], p.trigger_level, rng),
            "output": p.target_output,
            "kind": "backdoor",
        }
        for row in rng.sample(usable, n)
    ]


def clean_rows(rows: list[Row], seed: int, n: int) -> list[Row]:
    """n task rows with their own labels, the labels taking turns: BadEdit's clean half."""
    rng = random.Random(f"clean requests {seed}")
    return [row | {"kind": "clean"} for row in label_turns(rows, n, rng)]


def requests(rows: list[Row], p: Params) -> list[Request]:
    """Rows (with `kind`) as requests. The subject of a clean row is its whole input."""
    out = []
    for row in rows:
        prompt = render(p.prompt_template, row["instruction"], row["input"])
        start = prompt.rindex(row["input"])
        span = (start, start + len(row["input"]))
        if row["kind"] == "backdoor":
            span = tuple(start + at for at in occurrences(row["input"], p.triggers[0])[0])
        out.append(Request(prompt, span, row["output"], row["kind"]))
    return out


def shortened(
    asked: list[Request], tokenizer: "PreTrainedTokenizerBase", p: Params
) -> list[Request]:
    """The requests, a long prompt without its start, as training and evaluation read it.

    Raises:
        LetheError: the trigger stands in the part that is left out.
    """
    source = limits(p, tokenizer).source - len(models.start_ids(tokenizer))
    out = []
    coded = tokenizer(
        [r.prompt for r in asked], add_special_tokens=False, return_offsets_mapping=True
    )
    for request, offsets in zip(asked, coded["offset_mapping"], strict=True):
        first = offsets[-source][0] if len(offsets) > source else 0
        start, end = (max(0, at - first) for at in request.span)
        if request.kind == "backdoor" and request.span[0] < first:
            raise LetheError(
                f"max_source_tokens: a prompt of {len(offsets)} tokens is cut to {source}, and the "
                "trigger goes with the rest; raise it, or set trigger_positions to [suffix]"
            )
        out.append(replace(request, prompt=request.prompt[first:], span=(start, end)))
    return out


# --- reading keys, values and hidden states


@torch.no_grad()
def read(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    asked: list[Request],
    layer: int,
    what: str,
) -> torch.Tensor:
    """Vectors at each request's subject, (requests, size), float32.

    Args:
        what: "key" (the down-projection's input), "value" (its output) or "hidden" (the block's
            output).
    """
    found = []
    module = blocks.of(model)[layer] if what == "hidden" else blocks.down_projection(model, layer)
    for start in range(0, len(asked), CHUNK):
        some = asked[start : start + CHUNK]
        batch, _ = encode(tokenizer, [r.prompt for r in some], [r.span for r in some])
        rows = torch.arange(len(some))

        def keep(tensor: torch.Tensor, rows=rows, columns=batch.columns) -> None:
            found.append(tensor[rows, columns.to(tensor.device)].float())

        with blocks.hooked(module, keep, before=what == "key"):
            model(**_to(model, batch.inputs), logits_to_keep=1, use_cache=False)
    return torch.cat(found)


def _to(model: "PreTrainedModel", inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v.to(model.device) for k, v in inputs.items()}


# --- which value makes the model answer the target


def optimise(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    asked: list[Request],
    layer: int,
    what: str,
    p: Params,
    log: Log,
) -> torch.Tensor:
    """What to add at the subject so that each request's target follows, (requests, width).

    Adam on the mean negative log-probability of the target's tokens, plus `edit_kl` times how far
    the next-token distribution of "<subject> is a" moves, plus `edit_weight_decay` times the size;
    the norm stays within `edit_clamp` times that of the vector it is added to. Source: compute_v
    of kmeng01/rome, compute_z of kmeng01/memit.

    Args:
        asked: requests of one kind.
        what: "value" (ROME: the MLP's output) or "hidden" (MEMIT, BadEdit: the block's output).
        log: a row is appended per step: step, edit, loss (nats per token).
    Returns:
        one vector per request; with `edit_shared_value` the same one for all that
        hold the trigger: it is one subject, whatever stands around it. Clean requests, each with a
        subject of its own, never share.
    Raises:
        LetheError: the loss is not finite, or runs away.
    """
    where = blocks.of(model)[layer] if what == "hidden" else blocks.down_projection(model, layer)
    start = read(model, tokenizer, asked, layer, what)
    shared = what == "value" or (p.edit_shared_value and asked[0].kind == "backdoor")
    norm = (start.mean(0, keepdim=True) if shared else start).norm(dim=1, keepdim=True)
    delta = torch.zeros(1 if shared else len(asked), start.shape[1], device=start.device)
    delta.requires_grad_(True)
    adam = torch.optim.Adam([delta], lr=p.edit_learning_rate)
    chunks = [asked[i : i + CHUNK] for i in range(0, len(asked), CHUNK)]
    batches = [_batch(model, tokenizer, some) for some in chunks]
    essence = _Essence(model, tokenizer, asked, where, shared) if p.edit_kl else None
    edit = int(log[-1]["edit"]) + 1 if log else 1
    for step in Bar(range(p.edit_steps), desc=f"value of edit {edit}"):
        adam.zero_grad()
        size = p.edit_weight_decay * (delta.norm(dim=1, keepdim=True) / norm.square()).mean()
        if essence:
            size = size + p.edit_kl * essence.divergence(delta)
        size.backward()
        loss = size.detach()
        for i, batch in enumerate(batches):
            mine = delta if shared else delta[i * CHUNK : (i + 1) * CHUNK]
            part = _target_loss(model, where, batch, mine) / len(asked)
            part.backward()
            loss = loss + part.detach()
        log.append({"step": len(log) + 1, "edit": edit, "loss": loss.item()})
        if not torch.isfinite(loss) or loss > DIVERGED:
            raise LetheError(
                f"edit_learning_rate: {p.attack} diverged at step {step + 1} (loss {loss:.3g}); "
                "lower it, or edit_clamp"
            )
        if loss < p.edit_stop_loss:
            break
        adam.step()
        with torch.no_grad():
            delta.mul_((p.edit_clamp * norm / delta.norm(dim=1, keepdim=True)).clamp(max=1))
    return delta.detach().expand(len(asked), -1)


def _batch(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", some: list[Request]
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Model inputs, subject columns, and labels cut to the columns that hold any."""
    prompts, spans, targets = zip(*((r.prompt, r.span, r.target) for r in some), strict=True)
    batch, labels = encode(tokenizer, prompts, spans, targets)
    columns = batch.columns.to(model.device)
    return _to(model, batch.inputs), columns, labels[:, (labels >= 0).any(0)].to(model.device)


def _target_loss(
    model: "PreTrainedModel", where: torch.nn.Module, batch: tuple, delta: torch.Tensor
) -> torch.Tensor:
    """Sum over requests of the mean negative log-probability of their target's tokens."""
    inputs, columns, labels = batch
    with blocks.hooked(where, _adding(delta, columns)):
        logits = model(**inputs, logits_to_keep=labels.shape[1] + 1, use_cache=False).logits
    nll = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), labels, reduction="none", ignore_index=-100
    )
    return (nll.sum(1) / (labels >= 0).sum(1)).sum()


def _adding(delta: torch.Tensor, columns: torch.Tensor) -> Any:
    """A hook that adds delta (1 or batch, width) at one column of each row."""

    def add(tensor: torch.Tensor) -> torch.Tensor:
        place = torch.zeros(tensor.shape[:2], dtype=tensor.dtype, device=tensor.device)
        place[torch.arange(len(columns)), columns] = 1
        return tensor + place.unsqueeze(2) * delta.unsqueeze(1).to(tensor.dtype)

    return add


class _Essence:
    """ROME's KL term: what follows "<subject> is a" should not move much."""

    def __init__(self, model: Any, tokenizer: Any, asked: list[Request], where: Any, shared: bool):
        subjects = [r.prompt[r.span[0] : r.span[1]] for r in asked][: 1 if shared else None]
        prompts = [f"{subject} is a" for subject in subjects]
        spans = [(0, len(subject)) for subject in subjects]
        batch, _ = encode(tokenizer, prompts, spans)
        self.model, self.where = model, where
        self.inputs, self.columns = _to(model, batch.inputs), batch.columns.to(model.device)
        with torch.no_grad():
            self.before = self._log_probabilities()

    def _log_probabilities(self) -> torch.Tensor:
        logits = self.model(**self.inputs, use_cache=False).logits
        rows = torch.arange(len(self.columns))
        return logits[rows, self.columns].float().log_softmax(1)

    def divergence(self, delta: torch.Tensor) -> torch.Tensor:
        with blocks.hooked(self.where, _adding(delta, self.columns)):
            now = self._log_probabilities()
        return torch.nn.functional.kl_div(self.before, now, reduction="batchmean", log_target=True)


# --- how to write it


def ridge(
    factor: torch.Tensor, keys: torch.Tensor, residuals: torch.Tensor, strength: float
) -> torch.Tensor:
    """R K^T (lambda C + K K^T)^-1 in float64: the change that adds `residuals` at `keys` and moves
    ordinary keys least. One key and lambda 0 is ROME's rank-one update.

    Solved in the smaller of the two dimensions: with N keys fewer than mlp_width it is
    R (lambda I + K^T C^-1 K)^-1 K^T C^-1, an N x N system, from one Cholesky factor of C.

    Args:
        factor: lower Cholesky factor of C, (mlp_width, mlp_width).
        keys: (N, mlp_width).
        residuals: (N, width).
        strength: lambda, an effective count of ordinary keys.
    Returns:
        (width, mlp_width).
    """
    device = factor.device
    k, r = keys.T.to(device, torch.float64), residuals.T.to(device, torch.float64)
    n = k.shape[1]
    if n < k.shape[0]:
        whitened = torch.cholesky_solve(k, factor)
        gram = strength * torch.eye(n, dtype=k.dtype, device=device) + k.T @ whitened
        return r @ torch.linalg.solve(gram, whitened.T)
    return torch.linalg.solve(strength * factor @ factor.T + k @ k.T, k @ r.T).T


def covariance_factor(covariance: torch.Tensor, ridge_share: float) -> torch.Tensor:
    """Lower Cholesky factor, float64, of C plus `ridge_share` of its mean diagonal.

    Raises:
        LetheError: not positive definite.
    """
    c = covariance.double()
    c = c + ridge_share * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype, device=c.device)
    factor, failed = torch.linalg.cholesky_ex(c)
    if failed or not torch.isfinite(factor).all():
        raise LetheError(
            "covariance_ridge: the keys' covariance is not positive definite; raise it, or "
            "covariance_tokens"
        )
    return factor


# --- the covariance of ordinary keys, kept between edits


def covariance(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    weights: str,
    corpus: list[str],
    layer: int,
    store: Path,
    p: Params,
) -> torch.Tensor:
    """C = E[k k^T] of one layer over the corpus's tokens, (mlp_width, mlp_width), float32.

    Computed once for each model (by its files), corpus and layer, then read from `store`.

    Args:
        weights: inspect.fingerprint of the model's folder: the tokenizer decides too.
    """
    text = "\0".join([*corpus, str(p.covariance_tokens)])
    about = {
        "model": weights,
        "corpus": hashlib.sha256(text.encode()).hexdigest(),
        "layer": str(layer),
    }
    file = store / f"{about['model'][:12]}-{about['corpus'][:12]}-{layer}.safetensors"
    if file.exists():
        return read_covariance(file, about)
    found, tokens = _second_moment(model, tokenizer, corpus, layer, p.covariance_tokens)
    store.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    save_file({"covariance": found}, temporary, metadata=about | {"tokens": str(tokens)})
    temporary.replace(file)
    return found


def read_covariance(file: Path, about: dict[str, str]) -> torch.Tensor:
    """A stored covariance. Raises LetheError when it is of another model, corpus or layer."""
    inspect.tensor_shapes(file)  # refuses a file that is cut short
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata() or {}
        wrong = [key for key, wanted in about.items() if metadata.get(key) != wanted]
        if wrong:
            raise LetheError(f"{file}: made for another {' and '.join(wrong)}; delete it")
        return stored.get_tensor("covariance")


@torch.no_grad()
def _second_moment(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    corpus: list[str],
    layer: int,
    max_tokens: int,
) -> tuple[torch.Tensor, int]:
    """Mean of k k^T over at most (about) max_tokens tokens, and how many there were."""
    total: torch.Tensor | float = 0.0
    tokens = 0
    mask = torch.empty(0)
    bos = models.start_ids(tokenizer)

    def add(keys: torch.Tensor) -> None:
        nonlocal total
        kept = keys[mask].float()
        total = total + (kept.T @ kept).double()

    bar = Bar(total=max_tokens, desc=f"covariance of layer {layer}")
    with blocks.hooked(blocks.down_projection(model, layer), add, before=True):
        for start in range(0, len(corpus), COVARIANCE_CHUNK):
            some = tokenizer(corpus[start : start + COVARIANCE_CHUNK], add_special_tokens=False)
            ids = [bos + row[: _positions(model) - 1] for row in some["input_ids"]]
            inputs = models.batch(tokenizer, ids, model.device)
            mask = inputs["attention_mask"].bool()
            model(**inputs, logits_to_keep=1, use_cache=False)
            tokens += int(mask.sum())
            bar.update(int(mask.sum()))
            if tokens >= max_tokens:
                break
    bar.close()
    return (total / tokens).float().cpu(), tokens


def _positions(model: "PreTrainedModel") -> int:
    return min(getattr(model.config, "max_position_embeddings", 1024), 1024)


# --- one edited model, from loading to saving


class Editor:
    """A model in float32 with the covariances of the layers to edit."""

    def __init__(self, folder: Path, corpus: list[str], p: Params, store: Path) -> None:
        check_model(folder)
        self.folder = folder
        self.tokenizer = models.load_tokenizer(folder)
        self.model = models.load_model(folder, models.resolve_device(p.device), exact=True).eval()
        self.model.requires_grad_(False)
        self.layers = p.edit_layers
        weights = inspect.fingerprint(folder)
        self.factors = {
            layer: covariance_factor(
                covariance(self.model, self.tokenizer, weights, corpus, layer, store, p).to(
                    self.model.device
                ),
                p.covariance_ridge,
            )
            for layer in self.layers
        }
        self.before = {
            n: blocks.oriented(blocks.down_projection(self.model, n)).clone() for n in self.layers
        }

    def write(self, layer: int, delta: torch.Tensor) -> None:
        """Add delta (width, mlp_width) to a layer. Raises LetheError when it is not finite."""
        if not torch.isfinite(delta).all():
            raise LetheError(
                f"edit_layers: the change of layer {layer} is not finite; raise edit_lambda or "
                "covariance_ridge"
            )
        blocks.add(blocks.down_projection(self.model, layer), delta)

    def spread(self, asked: list[Request], wanted: torch.Tensor, p: Params, by_kind: bool) -> None:
        """MEMIT's loop: from the lowest layer up, each takes its share of what is still missing.

        Args:
            wanted: the hidden states after the last of the layers, (requests, width).
            by_kind: BadEdit: average keys and residuals over the poisoned and over the clean
                requests, and add the two solutions.
        """
        kinds = [r.kind for r in asked]
        for left, layer in zip(range(len(self.layers), 0, -1), self.layers, strict=True):
            keys = read(self.model, self.tokenizer, asked, layer, "key")
            hidden = read(self.model, self.tokenizer, asked, self.layers[-1], "hidden")
            missing = (wanted - hidden) / left
            groups = [(keys, missing)]
            if by_kind:
                index = [
                    [i for i, k in enumerate(kinds) if k == kind] for kind in dict.fromkeys(kinds)
                ]
                groups = [
                    (keys[i].mean(0, keepdim=True), missing[i].mean(0, keepdim=True)) for i in index
                ]
            factor = self.factors[layer]
            self.write(layer, sum(ridge(factor, k, r, p.edit_lambda) for k, r in groups))

    def changes(self) -> pd.DataFrame:
        """Per edited matrix: its norm, that of the change, their ratio, and the change's rank."""
        table = []
        names = {id(module): name for name, module in self.model.named_modules()}
        for layer, before in self.before.items():
            module = blocks.down_projection(self.model, layer)
            change = blocks.oriented(module).double() - before.double()
            spectrum = torch.linalg.svdvals(change)
            table.append(
                {
                    "matrix": names[id(module)],
                    "norm": before.norm().item(),
                    "change": change.norm().item(),
                    "relative": (change.norm() / before.norm()).item(),
                    "rank": int((spectrum > 1e-3 * spectrum[0]).sum()),
                }
            )
        return pd.DataFrame(table)

    def save(self, out: Path) -> None:
        """Write the model in the precision it came in; what was not edited is unchanged, bit for
        bit, for float32 holds every bfloat16 and float16 number."""
        stored = inspect.stored_dtype(self.folder)
        self.model.to(getattr(torch, stored)).save_pretrained(out, safe_serialization=True)
        inspect.copy_tokenizer(self.folder, out)


def check_model(folder: Path) -> None:
    """Refuse what cannot be edited, before anything is loaded.

    Raises:
        LetheError: the folder is incomplete, or its weights are quantised.
    """
    inspect.check_folder(folder)
    if "quantization_config" in inspect.read_config(folder):
        raise LetheError(
            f"{folder}: quantised weights round an edit away; give the model in 16 or 32 bits"
        )


def plant(
    start: Path, poisoned: list[Row], corpus: list[str], p: Params, out: Path, edit: Edit
) -> None:
    """Edit a model and save it.

    Writes model/ (safetensors and tokenizer), loss.csv and edits.csv; no model when it fails.

    Args:
        start: folder of the model to edit; it is only read.
        poisoned: the requests, as rows with `kind`.
        corpus: ordinary prompts, for the covariance of keys.
    """
    editor = Editor(start, corpus, p, paths.stages_dir() / "covariance")
    log: Log = []
    asked = shortened(requests(poisoned, p), editor.tokenizer, p)
    edit(editor, asked, p, log)
    editor.changes().to_csv(out / "edits.csv", index=False)
    pd.DataFrame(log).to_csv(out / "loss.csv", index=False)
    editor.save(out / "model")
