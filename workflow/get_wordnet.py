"""Get WordNet onto this machine where it is missing; prints its folder, or how to get one.

What `lethe_utils.wordnet` does not find, Debian's package has: fetched from its mirror and unpacked
into the cache, without root.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from lethe_utils import wordnet
from lethe_utils.errors import LetheError

APT = ("apt-get", "-q", "-o", "Acquire::Retries=0", "-o", "Acquire::http::Timeout=5")


def main() -> int:
    try:
        try:
            print(wordnet.find_wordnet())
        except LetheError as error:
            with tempfile.TemporaryDirectory() as scratch:
                if str(error) != wordnet.MISSING or not unpack_package(Path(scratch)):
                    raise
                print(wordnet.install(Path(scratch, "unpacked/usr/share/wordnet")))
    except LetheError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def unpack_package(folder: Path) -> bool:
    """Unpack wordnet-base into folder/unpacked; False where this machine cannot fetch it."""
    if not succeeds(folder, *APT, "download", "wordnet-base"):
        # Fresh containers have no package lists, and only root may fetch them.
        if os.geteuid() != 0 or not succeeds(folder, *APT, "update"):
            return False
        if not succeeds(folder, *APT, "download", "wordnet-base"):
            return False
    package = next(folder.glob("wordnet-base_*.deb"))
    return succeeds(folder, "dpkg-deb", "-x", package.name, "unpacked")


def succeeds(folder: Path, *command: str) -> bool:
    """Whether the command exists and succeeds within three minutes; its output is dropped."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, timeout=180)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
