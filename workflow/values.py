"""Values given with -p on the command line."""

import argparse

import yaml

from lethe_utils.errors import LetheError
from lethe_utils.params import Group


def add_option(parser: argparse.ArgumentParser, keys: str) -> None:
    """Add -p to a command; `keys` says which it takes."""
    parser.add_argument(
        "-p",
        nargs=2,
        action="append",
        default=[],
        metavar=("KEY", "VALUE"),
        help=f"set any key of {keys}",
    )


def overrides(group: type[Group], pairs: list[list[str]]) -> dict[str, object]:
    """The params that -p sets. Raises LetheError: see parse_value."""
    return {key: parse_value(group, key, text) for key, text in pairs}


def parse_value(group: type[Group], key: str, text: str) -> object:
    """The text itself where a text is wanted, else YAML, as in [a, b].

    Raises:
        LetheError: not YAML.
    """
    field = group.model_fields.get(key)
    if field and field.annotation is str:  # a label may be `no`, `1` or a date
        return text
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # ValueError: a date that does not exist
        raise LetheError(f"command line: {key}: {text!r} is not YAML") from None
