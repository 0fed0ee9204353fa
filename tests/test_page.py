"""The pages in docs/ are what `./run_all.sh tables` makes of the released results, never typed."""

import pytest

from lethe_utils import page, paths
from lethe_utils.errors import LetheError

DOCS = paths.root() / "docs"


def test_the_committed_pages_are_those_that_are_made(tmp_path):
    made = page.write(tmp_path)
    assert [file.name for file in made] == ["results.md", "twins.md"]
    for file in made:
        assert file.read_text("utf8") == (DOCS / file.name).read_text("utf8")
    assert {*tmp_path.iterdir()} == {*made}


def test_every_number_of_its_prose_comes_from_a_look_up():
    template = (DOCS / "twins.md.j2").read_text("utf8")
    prose = template[template.index("**Where Lethe does not win here.**") :]
    assert "{{ value(" in prose and "{{ swept(" in prose and "{{ cell(" in prose


def test_a_number_that_was_not_released_is_named(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "results.md.j2").write_text("{{ value(('gpt2-xl', 'sst2', 'cba'), 'x') }}")
    for name in ("results", "params", "data"):
        (tmp_path / name).symlink_to(paths.root() / name)
    monkeypatch.setenv("LETHE_ROOT", str(tmp_path))
    with pytest.raises(LetheError, match="nothing released of gpt2-xl, sst2, cba, x"):
        page.write(tmp_path)
    assert not (tmp_path / "results.md").exists()
