"""Which files are ours: a result's own report names each file of its folder, with its hash.

So a folder is only ever replaced when every file in it is one that this program wrote, unchanged.
A name proves nothing: any program may write a report.json.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lethe_utils.errors import LetheError
from lethe_utils.schema import digest
from lethe_utils.stages import write_json

REPORT, MARK, PROGRAM = "report.json", "written_by", "lethe purify"


def sign(folder: Path, record: dict[str, Any]) -> None:
    """Write a finished folder's report: the record, and a mark that names all other files."""
    files = {f.name: _sha256(f) for f in sorted(folder.iterdir()) if f.name != REPORT}
    mark = {"program": PROGRAM, "files": files, "record": digest(record)}
    write_json(folder / REPORT, record | {MARK: mark})


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def not_ours(folder: Path) -> str:
    """What lies in a folder that this program did not write as it is, by name; "" for nothing."""
    found = sorted(folder.iterdir())
    files = _signed(folder)
    for file in found:  # names first: they cost nothing
        if file.is_symlink() or not file.is_file() or file.name not in files:
            return file.name
    changed = (f.name for f in found if f.name != REPORT and _sha256(f) != files[f.name])
    return next(changed, "")


def _signed(folder: Path) -> dict[str, str]:
    """The files (name -> hash) that a folder's own report says we wrote, that report among them."""
    try:
        record = json.loads((folder / REPORT).read_text("utf8"))
        mark = record.pop(MARK)
        ours = mark["program"] == PROGRAM and mark["record"] == digest(record)
        return {**mark["files"], REPORT: ""} if ours else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def check(out: Path, read_only: Iterable[Path] = ()) -> None:
    """Refuse a folder that a result cannot be written to, that holds what is not ours, or that lies
    in one that is only read."""
    for folder in read_only:
        if folder in (out, *out.parents):
            raise LetheError(f"--out {out}: lies inside {folder}, which is never written to")
    if out.exists() and not out.is_dir():
        raise LetheError(f"--out {out}: is a file; give a folder")
    other = not_ours(out) if out.exists() else ""
    if other:
        raise LetheError(
            f"--out {out}: is not empty, and {other} was not written by this command (or was "
            "changed since); give a new folder"
        )
    if os.path.ismount(out):
        raise LetheError(f"--out {out}: is a mount point, which cannot be replaced; add a folder")
    parent = next(p for p in out.parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise LetheError(f"--out {out}: {parent} is not writable; give another folder")


def write(out: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder whole or not at all, in the place of an earlier result of ours or of nothing.

    Args:
        fill: makes, fills and signs the folder it is called with.
    Raises:
        LetheError: somebody put something there meanwhile.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    # Names that nobody else has; inside them nothing but what is written here.
    with tempfile.TemporaryDirectory(prefix=f".{out.name[:50]}-", dir=out.parent) as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        fill(new)
        if out.exists():
            os.replace(out, old)  # first out of everybody's way, then looked at
        try:
            if old.exists() and (other := not_ours(old)):
                raise LetheError(
                    f"--out {out}: {other} came there while this command ran; give a new folder "
                    "(what was computed is kept)"
                )
            os.replace(new, out)
        except BaseException:  # Ctrl-C too: the scratch folder goes, with all that is in it
            if old.exists() and not out.exists():
                os.replace(old, out)
            raise
