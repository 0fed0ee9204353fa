"""README and docs show what was measured: their tables are the released ones, word for word."""

import re

import pandas as pd
import pytest

from lethe_utils import params, paths, results, tables

README = (paths.root() / "README.md").read_text("utf8")
DOCS = {file.name: file.read_text("utf8") for file in (paths.root() / "docs").glob("*.md")}
SETUP = "model == 'tiny-gpt2' and dataset == 'embedded' and attack == 'cba'"


def indented(block):
    return "\n".join(f"    {line}".rstrip() for line in block.splitlines())


@pytest.fixture(scope="module")
def released():
    return results.read_released()[0]


def test_the_door_is_short_and_its_table_is_the_released_one(released):
    assert len(README.splitlines()) <= 150
    sweeps = results.read_released()[1].query(SETUP)
    shown = tables.door_table(released.query(SETUP), sweeps, params.load().strength)
    assert len(shown) == 5
    for row in [list(shown), *shown.to_numpy()]:
        assert f"| {' | '.join(row)} |" in README


def test_the_default_runs_controls_are_shown(released):
    default = released.query("model == 'tiny-gpt2' and dataset == 'embedded' and seed == 0")
    default = default[default["defense"].isin(tables.CONTROLS + tables.MERGES)]
    assert indented(tables.text(tables.controls_table(default))) in DOCS["results.md"]


def test_the_headline_of_every_released_cba_run_is_shown(released):
    cba = released.query("attack == 'cba'")
    assert indented(tables.text(tables.headline_table(cba))) in DOCS["results.md"]


def test_what_lethe_takes_from_the_other_attacks_is_shown(released):
    drops = tables.drop_table(released.query("attack != 'cba'"))
    ours = drops[[c for c in drops if not c.startswith("paper:")]]
    assert indented(tables.text(ours)) in DOCS["attacks.md"]


def test_the_papers_numbers_stand_in_columns_of_their_own(released):
    table = tables.table2(released)
    beside = table[table["paper: LETHE"] != ""]
    columns = ["none", "slerp + evidence", "paper: Backdoored", "paper: LETHE"]
    assert len(beside)
    for _, row in beside.iterrows():
        cells = [*row[["model", "dataset", "attack", "metric", *columns, "paper: model"]]]
        assert f"| {' | '.join(cells)} |" in DOCS["results.md"]


def test_every_defense_with_its_costs_and_the_papers_means_is_shown(released):
    costs = results.load_costs(params.load(), "released").query(SETUP)
    overview = tables.overview(released.query(SETUP), costs)
    assert set(overview["seconds"]) > {""} and len(overview) > 30
    for row in [list(overview), *overview.astype(str).to_numpy()]:
        assert f"| {' | '.join(row)} |" in DOCS["defenses.md"]


def test_released_figures_and_tables_come_from_the_released_results(released):
    shown = pd.read_csv(paths.figures_dir() / "controls.csv", dtype=str, keep_default_na=False)
    assert shown.equals(tables.controls_table(released))


@pytest.mark.parametrize(
    "name", ["README.md", "ARTIFACT.md", *(f"docs/{name}" for name in sorted(DOCS))]
)
def test_every_file_that_is_linked_exists(name):
    file = paths.root() / name
    linked = re.findall(r"\]\((?!http)([^)#]+)\)", file.read_text("utf8"))
    assert linked or name != "README.md"
    assert [link for link in linked if not (file.parent / link).exists()] == []
