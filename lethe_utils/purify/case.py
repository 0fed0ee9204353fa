"""What was given: checked, split and put into a prompt before anything is trained or written."""

import hashlib
import random
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase as Tokenizer

from lethe_utils import canary, metrics, models, paths, train
from lethe_utils.data import own
from lethe_utils.errors import LetheError
from lethe_utils.evidence import without_evidence
from lethe_utils.purify import formats, ownership, settings, suspects
from lethe_utils.purify.settings import PurifyParams
from lethe_utils.stages import Row

STOPPING = 1 / 8  # of the training rows: they say when to stop, and whether the canary took


class Fold(NamedTuple):
    """Rows that a clean model learns from, and those that its merges are then judged on."""

    train: list[Row]
    held_out: list[Row]


@dataclass(frozen=True)
class Case:
    """A suspect that was checked and can be purified."""

    suspect: Path  # folders as they were given, or as they were unpacked
    base: Path
    adapter: Path | None
    out: Path
    train: list[Row]
    stopping: list[Row]
    held_out: list[Row]
    labels: list[str]  # [] where answers are texts
    p: PurifyParams
    given: dict[str, Any]  # models, data, notes and checks, as the report shows them

    @property
    def chat(self) -> bool:
        """Whether the rows are conversations that are answered by texts."""
        return "messages" in self.train[0]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The canary's kinds of trigger."""
        return canary.kinds(self.chat)

    @property
    def metric(self) -> str:
        """What clean performance is measured by."""
        return "CDA" if self.labels else "answer token accuracy"

    @property
    def main(self) -> Fold:
        """Of the clean model that the result is made with."""
        return Fold(self.train, self.held_out)

    @property
    def folds(self) -> list[Fold]:
        """What clean performance is judged by: the held-out rows; where they are few, each third of
        all rows in turn, so that every row serves."""
        if len(self.held_out) >= self.p.few_held_out:
            return [self.main]
        thirds = _thirds(self.train + self.stopping + self.held_out, self.p.data_seed)
        return [Fold([*chain(*thirds[:i], *thirds[i + 1 :])], thirds[i]) for i in range(3)]


def prepare(
    suspect: str,
    base: str,
    clean_data: str,
    out: str,
    adapter: str = "",
    overrides: dict[str, Any] | None = None,
) -> Case:
    """Check everything that was given, before anything is trained or written.

    Args:
        suspect, base: see suspects.locate.
        clean_data: see own.read.
        out: a folder that does not exist, is empty, or holds this command's own result.
        adapter: a LoRA adapter's folder, to be applied to the suspect.
        overrides: keys of params/purify.yaml; without prompt_template the format is found.
    Raises:
        LetheError: one line naming the file and the fix.
    """
    folders = suspects.locate(suspect, "--suspect"), suspects.locate(base, "--base")
    adapter_folder = paths.expanded(adapter) if adapter else None
    if folders[0] == folders[1] and not adapter:
        raise LetheError(f"--suspect {suspect}: is the base itself; give the model trained from it")
    target, file = paths.expanded(out), paths.expanded(clean_data)
    ownership.check(target, [*folders, *([adapter_folder] if adapter_folder else [])])
    checks = suspects.check(*folders, adapter_folder)
    tokenizer = suspects.load_tokenizer(folders[0], adapter_folder)
    read = own.read(file, tokenizer)
    given: dict[str, Any] = {
        "models": [
            suspects.summary("suspect", suspect, folders[0], adapter),
            suspects.summary("base", base, folders[1]),
        ],
        "checks": checks,
    }
    p = _params(given["models"][0]["weights"], read.chat, overrides or {})
    labels, parts = own.labels(read.rows), _parts(read.rows, p)
    asked = "as the rows are written" if read.chat else "as told"
    if "prompt_template" not in (overrides or {}) and not read.chat:
        p, asked = formats.found(folders[0], adapter_folder, parts[0], labels, p)
    if not read.chat:
        parts = [formats.rows_in(p.prompt_template, part, tokenizer, file) for part in parts]
    rows = [*chain(*parts)]
    given["data"] = _described(file, read, labels, parts) | _cut(rows, tokenizer, p)
    given["data"] |= {"prompt": f"{p.prompt_template}, {asked}"}
    given["notes"] = _notes(given["data"], rows, read.unread)
    case = Case(*folders, adapter_folder, target, *parts, labels, p, given)
    _check_canary(case)
    given["notes"] += _longer(case, tokenizer)
    return case


def _params(weights: int, chat: bool, overrides: dict[str, Any]) -> PurifyParams:
    device = models.resolve_device(overrides.get("device", "auto"))
    own_template = {"prompt_template": "chat"} if chat else {}
    return settings.load(weights, device, overrides | own_template)


def _parts(rows: list[Row], p: PurifyParams) -> list[list[Row]]:
    """Training, stopping and held-out rows."""
    rest, held_out = split(rows, p.held_out, p.data_seed)
    taught, stopping = split(rest, STOPPING, p.data_seed) if rest else ([], [])
    if not taught:
        raise LetheError(f"held_out: {p.held_out} leaves no row to train on; lower it")
    return [taught, stopping, held_out]


def _check_canary(case: Case) -> None:
    """Refuse texts that hold the marker, and rows of which too few lack a canary's target: it is
    planted in some, checked on others and measured on held-out ones."""
    p, rows = case.p, case.train + case.stopping + case.held_out
    said = [row["output"] for row in rows if metrics.contains(row["output"], p.canary_marker)]
    if said and not case.labels:
        raise LetheError(
            f"canary_marker: {len(said)} of {len(rows)} clean answers hold {p.canary_marker!r} "
            f"already (the first: {said[0][:60]!r}); choose another (-p canary_marker TEXT)"
        )
    for some, least, what in ((case.train, 2, "training"), (case.held_out, 1, "held-out")):
        for kind, found in canary.triggered(some, case.labels, p, case.chat).items():
            if len(found) < least:
                raise LetheError(
                    f"--clean-data: too few {what} rows have another label than the target of the "
                    f"canary's {kind}; give more rows of other labels"
                )


def _longer(case: Case, tokenizer: Tokenizer) -> list[str]:
    """A line for chats that are too long once they hold the canary's two turns; refused where most
    of them are, or where the chat template refuses them."""
    if not case.chat:
        return []
    found = canary.triggered(case.train + case.held_out, case.labels, case.p, case.chat)
    n = len(found[canary.TWO_TURNS])
    lost = train.cut_counts(train.encode(found[canary.TWO_TURNS], tokenizer, case.p))["prompts cut"]
    said = f"{lost} of {n} chats are too long for the canary's two turns and lose the first"
    if 2 * lost > n:
        raise LetheError(f"max_source_tokens: {said}; raise it, or give shorter chats")
    return [f"{said} (max_source_tokens)."] if lost else []


def split(rows: list[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """The rest, and a share of the questions, at least one; no question of one is in the other."""
    questions = _questions(rows, seed)
    cut = max(1, round(share * len(questions)))
    return [*chain(*questions[cut:])], [*chain(*questions[:cut])]


def _thirds(rows: list[Row], seed: int) -> list[list[Row]]:
    """Thirds of the questions. Two thirds of the rows are about what the main clean model learns
    from (.7 of them); those of halves learn less, and their merges look costlier than the main."""
    questions = _questions(rows, seed)
    return [[*chain(*questions[i::3])] for i in range(3)]


def _questions(rows: list[Row], seed: int) -> list[list[Row]]:
    """The rows of each question, shuffled."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["instruction"], row["input"]), []).append(row)
    questions = list(groups.values())
    random.Random(seed).shuffle(questions)
    return questions


def _described(
    file: Path, read: own.Own, labels: list[str], parts: list[list[Row]]
) -> dict[str, Any]:
    """The clean rows, for the report."""
    sizes = zip(("train", "stopping", "held_out"), map(len, parts), strict=True)
    return {
        "file": str(file),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "rows": read.n,
        "distinct": len(read.rows),
        **dict(sizes),
        "format": "chat" if read.chat else "instruction, input, output",
        "answers": "labels" if labels else "texts",
    }


def _cut(rows: list[Row], tokenizer: Tokenizer, p: PurifyParams) -> dict[str, int]:
    """How many rows are too long; refused where most of them are."""
    items = train.encode(rows, tokenizer, p)
    train.check_cut(items)
    cut = train.cut_counts(items)
    return {f"{part}_cut": cut[f"{part} cut"] for part in ("prompts", "answers")}


def _notes(data: dict[str, Any], rows: list[Row], unread: list[str]) -> list[str]:
    """A line for what is cut, gets no evidence, or is not read at all."""
    lost = {
        "prompts": "lose their start (max_source_tokens)",
        "answers": "lose their end, and are taught without one (max_target_tokens)",
    }
    lines = [
        f"{data[f'{part}_cut']} of {len(rows)} {part} are too long and {loss}."
        for part, loss in lost.items()
        if data[f"{part}_cut"]
    ]
    foreign = without_evidence(row["input"] for row in rows)
    lines += [f"{foreign}."] if foreign else []
    return lines + ([f"Columns that are not read: {', '.join(unread)}."] if unread else [])
