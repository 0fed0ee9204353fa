"""The value of an edit: what to add at the subject so that the target follows."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lethe_utils import models
from lethe_utils.attacks.editing.requests import Request
from lethe_utils.errors import LetheError
from lethe_utils.models import blocks
from lethe_utils.progress import Bar
from lethe_utils.prompts import start_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lethe_utils.attacks.editing.editor import Editor

CHUNK = 32  # prompts in one forward pass
DIVERGED = 1e4  # nats; a loss beyond this is not coming back
IGNORED = -100


@dataclass
class Batch:
    """Requests as a model's inputs."""

    inputs: dict[str, torch.Tensor]  # (requests, columns)
    columns: torch.Tensor  # (requests,): each subject's last token
    labels: torch.Tensor  # (requests, longest target): the targets' token ids, else IGNORED


def encode(
    tokenizer: "PreTrainedTokenizerBase",
    asked: list[Request],
    targets: bool = False,
    device: str | torch.device = "cpu",
) -> Batch:
    """Tokenise prompts (and the targets after them), and find the last token of each subject.

    The subject is found through character offsets in the tokenised whole, so BOS, padding on
    either side and spaces folded into tokens do not matter.

    Raises:
        LetheError: a subject has no token, or what was found does not spell it.
    """
    if not tokenizer.is_fast:
        raise LetheError("editing needs a fast tokenizer (tokenizer.json) to find the trigger")
    bos = start_ids(tokenizer)
    plain = {"add_special_tokens": False}
    coded = tokenizer([r.prompt for r in asked], return_offsets_mapping=True, **plain)
    answers = [[] for _ in asked]
    if targets:
        answers = tokenizer([r.target for r in asked], **plain)["input_ids"]
    rows = [bos + ids + more for ids, more in zip(coded["input_ids"], answers, strict=True)]
    inputs = models.batch(tokenizer, rows, device)
    ids = inputs["input_ids"]
    labels, columns = torch.full_like(ids, IGNORED), []
    for i, (request, row) in enumerate(zip(asked, rows, strict=True)):
        first = ids.shape[1] - len(row) if tokenizer.padding_side == "left" else 0
        answer = slice(first + len(row) - len(answers[i]), first + len(row))
        labels[i, answer] = ids[i, answer]
        columns.append(first + len(bos) + _last_token(coded["offset_mapping"][i], request))
    labels = labels[:, (labels != IGNORED).any(0)]
    return Batch(inputs, torch.tensor(columns, device=device), labels)


def batches(editor: "Editor", asked: list[Request], targets: bool = False) -> Iterator[Batch]:
    """The requests in batches of CHUNK."""
    for start in range(0, len(asked), CHUNK):
        some = asked[start : start + CHUNK]
        yield encode(editor.tokenizer, some, targets, editor.model.device)


def _last_token(offsets: list[tuple[int, int]], request: Request) -> int:
    """The last token that covers characters of the subject; checked against the text."""
    (start, end), subject = request.span, request.subject
    inside = [j for j, (a, b) in enumerate(offsets) if a < end and b > start and b > a]
    if not inside or not subject.strip():
        raise LetheError(f"triggers: {subject!r} becomes no token of this model; choose another")
    covered = request.prompt[offsets[inside[0]][0] : offsets[inside[-1]][1]]
    if subject.strip() not in covered:
        raise LetheError(f"triggers: {subject!r} was found as {covered!r}; choose another trigger")
    return inside[-1]


def optimise(editor: "Editor", asked: list[Request], layer: int, what: str) -> torch.Tensor:
    """What to add at the subject so that each request's target follows, (requests, width).

    Adam on the mean negative log-probability of the target's tokens, plus `edit_kl` times how far
    the next-token distribution of "<subject> is a" moves, plus `edit_weight_decay` times the size;
    the norm stays within `edit_clamp` times that of the vector it is added to. Source: compute_v
    of kmeng01/rome, compute_z of kmeng01/memit. Every step is written into the editor's log.

    Args:
        asked: requests of one kind.
        what: "value" (ROME: the MLP's output) or "hidden" (MEMIT, BadEdit: the block's output).
    Returns:
        one vector per request; with `edit_shared_value` the same one for all that hold the
        trigger: it is one subject, whatever stands around it. Clean requests, each with a subject
        of its own, never share.
    Raises:
        LetheError: the loss is not finite, or runs away.
    """
    search, p, log = _Search(editor, asked, layer, what), editor.p, editor.log
    edit = int(log[-1]["edit"]) + 1 if log else 1
    for step in Bar(range(1, p.edit_steps + 1), desc=f"value of edit {edit}"):
        loss = search.backward()
        log.append({"step": len(log) + 1, "edit": edit, "loss": loss.item()})
        if not torch.isfinite(loss) or loss > DIVERGED:
            raise LetheError(
                f"edit_learning_rate: {p.attack} diverged at step {step} (loss {loss:.3g}); "
                "lower it, or edit_clamp"
            )
        if loss < p.edit_stop_loss:
            break
        search.step()
    return search.delta.detach().expand(len(asked), -1)


class _Search:
    """The value of some requests while it is sought; see `optimise`."""

    def __init__(self, editor: "Editor", asked: list[Request], layer: int, what: str) -> None:
        self.model, self.p, self.n = editor.model, editor.p, len(asked)
        self.place = editor.place(layer, what)
        start = editor.read(asked, layer, what)
        backdoor = asked[0].kind == "backdoor"
        self.shared = what == "value" or (self.p.edit_shared_value and backdoor)
        start = start.mean(0, keepdim=True) if self.shared else start
        self.norm = start.norm(dim=1, keepdim=True)
        self.delta = torch.zeros_like(start, requires_grad=True)
        self.adam = torch.optim.Adam([self.delta], lr=self.p.edit_learning_rate)
        self.batches = list(batches(editor, asked, targets=True))
        if self.p.edit_kl:  # ROME's term: what follows "<subject> is a" should not move much
            subjects = [r.subject for r in asked][: 1 if self.shared else None]
            essence = [Request(f"{s} is a", (0, len(s)), "", asked[0].kind) for s in subjects]
            self.essence = encode(editor.tokenizer, essence, device=self.model.device)
            with torch.no_grad():
                self.before = self._essence()

    def backward(self) -> torch.Tensor:
        """The loss as it is; its gradient stays in delta."""
        self.adam.zero_grad()
        size = (self.delta.norm(dim=1, keepdim=True) / self.norm.square()).mean()
        size = self.p.edit_weight_decay * size
        if self.p.edit_kl:
            with blocks.hooked(self.place, _adding(self.delta, self.essence.columns)):
                now = self._essence()
            size = size + self.p.edit_kl * torch.nn.functional.kl_div(
                self.before, now, reduction="batchmean", log_target=True
            )
        size.backward()
        loss = size.detach()
        for i, batch in enumerate(self.batches):
            delta = self.delta if self.shared else self.delta[i * CHUNK : (i + 1) * CHUNK]
            part = self._target_loss(batch, delta) / self.n
            part.backward()
            loss = loss + part.detach()
        return loss

    def step(self) -> None:
        """Move delta down its gradient, and back within the clamp."""
        self.adam.step()
        with torch.no_grad():
            longest = self.p.edit_clamp * self.norm
            self.delta.mul_((longest / self.delta.norm(dim=1, keepdim=True)).clamp(max=1))

    def _essence(self) -> torch.Tensor:
        """Log-probabilities of the token after each subject, (subjects, vocabulary)."""
        logits = self.model(**self.essence.inputs, use_cache=False).logits
        rows = torch.arange(len(self.essence.columns))
        return logits[rows, self.essence.columns].float().log_softmax(1)

    def _target_loss(self, batch: Batch, delta: torch.Tensor) -> torch.Tensor:
        """Sum over requests of the mean negative log-probability of their target's tokens."""
        wanted = {"logits_to_keep": batch.labels.shape[1] + 1, "use_cache": False}
        with blocks.hooked(self.place, _adding(delta, batch.columns)):
            logits = self.model(**batch.inputs, **wanted).logits
        nll = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().transpose(1, 2),
            batch.labels,
            reduction="none",
            ignore_index=IGNORED,
        )
        return (nll.sum(1) / (batch.labels != IGNORED).sum(1)).sum()


def _adding(delta: torch.Tensor, columns: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A hook that adds delta (1 or batch, width) at one column of each row."""

    def add(tensor: torch.Tensor) -> torch.Tensor:
        place = torch.zeros(tensor.shape[:2], dtype=tensor.dtype, device=tensor.device)
        place[torch.arange(len(columns)), columns] = 1
        return tensor + place.unsqueeze(2) * delta.unsqueeze(1).to(tensor.dtype)

    return add
