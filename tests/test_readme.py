"""The README's tables are the released ones, word for word, and every link leads somewhere."""

import re

import pandas as pd
import pytest

from lethe_utils import merge, page, params, paths, results, tables
from lethe_utils.errors import LetheError

README = (paths.root() / "README.md").read_text("utf8")
DOCS = sorted(file.name for file in (paths.root() / "docs").glob("*.md"))


def test_the_door_is_short_and_its_tables_are_the_released_ones(tmp_path):
    assert len(README.splitlines()) <= 150
    assert params.load(page.REAL[0]).strength == merge.PAPER_STRENGTH
    copy = tmp_path / "README.md"
    for text in (README, re.sub(r"\| \.\d{3}", "| .999", README)):
        copy.write_text(text, "utf8")
        page.write_door(copy)
        assert copy.read_text("utf8") == README
    copy.write_text("# no table", "utf8")
    with pytest.raises(LetheError, match="no table of model, ASR, embedded"):
        page.write_door(copy)


def test_released_figures_and_tables_come_from_the_released_results():
    shown = pd.read_csv(paths.figures_dir() / "controls.csv", dtype=str, keep_default_na=False)
    assert shown.equals(tables.controls_table(results.read_released().table))


@pytest.mark.parametrize("name", ["README.md", "ARTIFACT.md", *(f"docs/{name}" for name in DOCS)])
def test_every_file_that_is_linked_exists(name):
    file = paths.root() / name
    linked = re.findall(r"\]\((?!http)([^)#]+)\)", file.read_text("utf8"))
    assert linked or name != "README.md"
    assert [link for link in linked if not (file.parent / link).exists()] == []
