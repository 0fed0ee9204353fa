"""A result's folder is replaced only when every file in it is ours; nothing else is deleted."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lethe_utils import paths, stages
from lethe_utils.errors import LetheError
from lethe_utils.purify import ownership

NAMES = st.text(st.characters(exclude_characters="/\0", codec="utf8"), min_size=1, max_size=40)


def result(folder, text="ours"):
    """Fills a folder as a purification does."""
    folder.mkdir()
    (folder / "model.safetensors").write_text(text)
    ownership.sign(folder, {"chosen": 0.5, "command": "x"})


def refusal(out):
    with pytest.raises(LetheError) as caught:
        ownership.check(out)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def files(folder):
    return {str(f): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_an_earlier_result_of_ours_is_replaced_whole(tmp_path):
    out = tmp_path / "out"
    for text in ("first", "second"):
        ownership.check(out)
        ownership.write(out, lambda folder, text=text: result(folder, text))
    assert (out / "model.safetensors").read_text() == "second"
    assert [f.name for f in tmp_path.iterdir()] == ["out"]  # no scratch beside it


@pytest.mark.parametrize("report", ['{"made": "by another program"}', "[]", "", "\xff", "{}"])
def test_a_report_of_another_program_makes_nothing_ours(tmp_path, report):
    (tmp_path / "report.json").write_bytes(report.encode("latin1"))
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "was not written by this command" in refusal(tmp_path)


def test_a_mark_copied_into_another_report_does_not_count(tmp_path):
    out = tmp_path / "out"
    ownership.write(out, result)
    record = json.loads((out / "report.json").read_text())
    (out / "report.json").write_text(json.dumps(record | {"mine": 1}))
    assert "was not written by this command" in refusal(out)


@pytest.mark.parametrize("kind", ["file", "folder", "link", "hidden", "changed", "link to ours"])
def test_what_a_user_put_beside_a_result_is_never_lost(tmp_path, kind):
    out = tmp_path / "out"
    ownership.write(out, result)
    if kind == "file":
        (out / "purified.gguf").write_text("converted")
    elif kind == "folder":
        (out / "empty").mkdir()
    elif kind == "link":
        (out / "link").symlink_to(tmp_path)
    elif kind == "hidden":
        (out / ".notes").write_text("x")
    elif kind == "changed":
        (out / "model.safetensors").write_text("trained on")
    else:
        (out / "model.safetensors").rename(tmp_path / "moved")
        (out / "model.safetensors").symlink_to(tmp_path / "moved")
    before = files(tmp_path)
    assert "give a new folder" in refusal(out)
    with pytest.raises(LetheError, match="give a new folder"):
        ownership.write(out, result)
    assert files(tmp_path) == before


def test_what_came_while_the_command_ran_is_kept(tmp_path):
    out = tmp_path / "out"
    ownership.write(out, result)

    def fill(folder):
        result(folder, "new")
        (out / "thesis.tex").write_text("x")

    with pytest.raises(LetheError, match=r"thesis.tex came there while"):
        ownership.write(out, fill)
    assert (out / "thesis.tex").exists() and (out / "model.safetensors").read_text() == "ours"


def test_a_folder_called_partial_is_somebodys(tmp_path):
    theirs = tmp_path / "out.partial"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("x")
    ownership.write(tmp_path / "out", result)
    assert [f.name for f in theirs.iterdir()] == ["thesis.tex"]


def test_ctrl_c_at_the_very_end_leaves_the_earlier_result(tmp_path, monkeypatch):
    out = tmp_path / "out"
    ownership.write(out, result)

    def stopped(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ownership, "not_ours", stopped)
    with pytest.raises(KeyboardInterrupt):
        ownership.write(out, result)
    assert (out / "model.safetensors").exists()
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_nothing(tmp_path):
    def fill(folder):
        result(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ownership.write(tmp_path / "a" / "out", fill)
    assert files(tmp_path) == {} and not (tmp_path / "a" / "out").exists()


def test_a_mount_point_and_a_file_are_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    assert "is a file" in refusal(tmp_path / "file")
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path / "volume"))
    (tmp_path / "volume").mkdir()
    assert "mount point" in refusal(tmp_path / "volume")


def test_only_what_lies_among_the_stages_is_emptied(tmp_path):
    ours = paths.stages_dir() / "purified" / "x.partial" / "model"
    ours.mkdir(parents=True)
    (ours / "half").write_text("x")
    stages.fresh(ours)
    assert not ours.exists()
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(LetheError, match="is not empty"):
        stages.fresh(tmp_path)
    with pytest.raises(LetheError, match="is not empty"):
        stages.fresh(paths.stages_dir() / "..")
    assert (tmp_path / "thesis.tex").exists()


@settings(max_examples=200)
@given(name=NAMES, other=NAMES)
def test_any_name_gives_a_plain_file_name_and_two_stay_two(name, other):
    made = paths.file_name(name)
    assert (
        made
        and len(made) < 110
        and set(made) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
    )
    assert paths.file_name(made) == made
    assert (made == paths.file_name(other)) == (name == other)
