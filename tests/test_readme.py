"""The README shows what was measured: its tables are the released ones, word for word."""

import re

import pandas as pd
import pytest

from lethe_utils import params, paths, results, tables

README = (paths.root() / "README.md").read_text("utf8")


def indented(block):
    return "\n".join(f"    {line}".rstrip() for line in block.splitlines())


@pytest.fixture(scope="module")
def released():
    return results.read_released()[0]


def test_the_default_runs_controls_are_in_the_readme(released):
    default = released.query("model == 'tiny-gpt2' and dataset == 'embedded' and seed == 0")
    default = default[default["defense"].isin(tables.CONTROLS + tables.MERGES)]
    assert indented(tables.text(tables.controls_table(default))) in README


def test_the_headline_of_every_released_cba_run_is_in_the_readme(released):
    cba = released.query("attack == 'cba'")
    assert indented(tables.text(tables.headline_table(cba))) in README


def test_what_lethe_takes_from_the_other_attacks_is_in_the_readme(released):
    drops = tables.drop_table(released.query("attack != 'cba'"))
    ours = drops[[c for c in drops if not c.startswith("paper:")]]
    assert indented(tables.text(ours)) in README


def test_the_papers_numbers_stand_in_columns_of_their_own(released):
    table = tables.table2(released)
    beside = table[table["paper: LETHE"] != ""]
    columns = ["none", "slerp + evidence", "paper: Backdoored", "paper: LETHE"]
    assert len(beside)
    for _, row in beside.iterrows():
        cells = [*row[["model", "dataset", "attack", "metric", *columns, "paper: model"]]]
        assert f"| {' | '.join(cells)} |" in README


def test_every_defense_with_its_costs_and_the_papers_means_is_in_the_readme(released):
    setup = "model == 'tiny-gpt2' and dataset == 'embedded' and attack == 'cba'"
    costs = results.load_costs(params.load(), "released").query(setup)
    overview = tables.overview(released.query(setup), costs)
    assert set(overview["seconds"]) > {""} and len(overview) > 30
    for row in [list(overview), *overview.astype(str).to_numpy()]:
        assert f"| {' | '.join(row)} |" in README


def test_released_figures_and_tables_come_from_the_released_results(released):
    shown = pd.read_csv(paths.figures_dir() / "controls.csv", dtype=str, keep_default_na=False)
    assert shown.equals(tables.controls_table(released))


def test_every_file_the_readme_names_exists():
    linked = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert linked
    assert [f for f in linked if not (paths.root() / f).exists()] == []
