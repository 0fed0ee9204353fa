"""The README's tables are the released ones, word for word, and every link leads somewhere."""

import re

import pandas as pd
import pytest

from lethe_utils import merge, page, params, paths, results, tables

README = (paths.root() / "README.md").read_text("utf8")
DOCS = sorted(file.name for file in (paths.root() / "docs").glob("*.md"))


def test_the_door_is_short_and_its_table_is_the_released_one():
    assert len(README.splitlines()) <= 150
    table = results.read_released().table
    model, _, attack = page.REAL
    table = table[table["model"] == model]
    first = table[(table["attack"] == attack) & (table["dataset"] != "sst2")]
    shown = page.door_table(first)
    assert len(shown) == 6 and params.load(model).strength == merge.PAPER_STRENGTH
    others = page.other_attacks(table)
    adaptive = page.adaptive_attacks(table)
    assert len(others) >= 6 and len(adaptive) == 5 and not others.isna().any(axis=None)
    assert all(tables.markdown(part) in README for part in (shown, others, adaptive))


def test_released_figures_and_tables_come_from_the_released_results():
    shown = pd.read_csv(paths.figures_dir() / "controls.csv", dtype=str, keep_default_na=False)
    assert shown.equals(tables.controls_table(results.read_released().table))


@pytest.mark.parametrize("name", ["README.md", "ARTIFACT.md", *(f"docs/{name}" for name in DOCS)])
def test_every_file_that_is_linked_exists(name):
    file = paths.root() / name
    linked = re.findall(r"\]\((?!http)([^)#]+)\)", file.read_text("utf8"))
    assert linked or name != "README.md"
    assert [link for link in linked if not (file.parent / link).exists()] == []
