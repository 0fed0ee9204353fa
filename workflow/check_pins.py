"""Does this environment hold the pins of pyproject.toml? Standard library only.

python check_pins.py          exit code 0 when it does, 1 and the differences when not
python check_pins.py torch    print the requirement of one package
python check_pins.py cpu      print requirements.lock without what only a GPU needs, torch included
"""

import json
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlparse

ROOT = Path(__file__).resolve().parent.parent
GPU_BUILD = ("torch==", "triton==", "cuda-", "nvidia-")


def requirements() -> dict[str, str]:
    """Package -> specifier, e.g. {"torch": "==2.13.0"}, for a local installation."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["local"]]
    return dict(re.match(r"([\w-]+)(.*)", line).groups() for line in lines)


def locked() -> list[str]:
    """The requirements of requirements.lock, each with its hashes, as pip reads them."""
    lock = (ROOT / "requirements.lock").read_text("utf8")
    return [b for b in re.split(r"\n(?=\S)", lock) if not b.startswith("#")]


def lethe_source() -> Path | None:
    """The checkout that `pip install -e` took lethe from; another one's code must not run here."""
    # Building leaves an egg-info in the checkout that looks like another installation.
    records = (d.read_text("direct_url.json") for d in metadata.distributions(name="lethe"))
    urls = [json.loads(record)["url"] for record in records if record]
    return Path(unquote(urlparse(urls[0]).path)).resolve() if urls else None


def differences() -> list[str]:
    """What this environment lacks: lethe installed from this checkout, and every pin."""
    out = [] if lethe_source() == ROOT else [f"lethe: not installed from {ROOT}"]
    for name, wanted in requirements().items():
        try:
            found = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            out.append(f"{name}{wanted}: not installed")
            continue
        if wanted.startswith("==") and found != wanted[2:]:
            out.append(f"{name}{wanted}: found {found}")
    return out


if __name__ == "__main__":
    if sys.argv[1:] == ["cpu"]:
        print("\n".join(r for r in locked() if not r.startswith(GPU_BUILD)))
        sys.exit(0)
    if len(sys.argv) > 1:
        print(sys.argv[1] + requirements()[sys.argv[1]])
        sys.exit(0)
    wrong = differences()
    print("\n".join(wrong) or "all pins match")
    sys.exit(bool(wrong))
