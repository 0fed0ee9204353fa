"""Put pip into this environment, where Debian's Python came without it (its package python3-venv).

Standard library only.
"""

import hashlib
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

URL = (
    "https://files.pythonhosted.org/packages/07/25/ee8c38ae72d66b844ce8eb9711ba905dba21ca1a8a0c960057c41cd23337/"
    "pip-26.3-py3-none-any.whl"
)
SHA256 = "f3b60b20ffaadd4415ed7957212a38ac63fa4c5fa375bd0f4a797777940fad13"
FIX = "run `apt-get install python3-venv`, delete .venv and run this again"


def main() -> None:
    try:
        content = urllib.request.urlopen(URL, timeout=60).read()
    except OSError as error:
        sys.exit(f"error: Python has no pip, and it could not be fetched ({error}); {FIX}")
    if hashlib.sha256(content).hexdigest() != SHA256:
        sys.exit(f"error: Python has no pip, and {URL} is not the pinned file; {FIX}")
    with tempfile.TemporaryDirectory() as folder:
        wheel = Path(folder) / URL.rsplit("/", 1)[1]
        wheel.write_bytes(content)
        install = [sys.executable, f"{wheel}/pip", "install", "-q", "--no-index", str(wheel)]
        sys.exit(subprocess.run(install).returncode)


if __name__ == "__main__":
    main()
