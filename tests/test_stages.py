"""Stages: built once, never read half-written, and named by what made them."""

import errno

import pytest

from lethe_utils import paths, stages
from lethe_utils.errors import LetheError


def build_counter():
    """A build function that counts its calls in `.calls` and writes one file."""

    def build(out):
        build.calls += 1
        (out / "result.txt").write_text("whole")

    build.calls = 0
    return build


def test_a_stage_is_built_once_and_then_reused():
    build = build_counter()
    first = stages.stage("data", "label", {"seed": 1}, {}, build)
    assert stages.stage("data", "label", {"seed": 1}, {}, build) == first
    assert build.calls == 1
    assert (first / "result.txt").read_text() == "whole"
    assert first.parent == paths.stages_dir() / "data" and first.name.startswith("label-")
    assert not list(first.parent.glob("*.partial"))


def test_another_spec_or_input_is_another_folder(tmp_path):
    build = build_counter()
    one = stages.stage("x", "label", {"a": 1, "b": 2}, {"in": tmp_path / "i1"}, build)
    assert stages.stage("x", "label", {"b": 2, "a": 1}, {"in": tmp_path / "i1"}, build) == one
    others = {
        stages.stage("x", "label", {"a": 1, "b": 3}, {"in": tmp_path / "i1"}, build),
        stages.stage("x", "label", {"a": 1, "b": 2}, {"in": tmp_path / "i2"}, build),
        stages.stage("y", "label", {"a": 1, "b": 2}, {"in": tmp_path / "i1"}, build),
    }
    assert len(others | {one}) == 4 and build.calls == 4


def test_an_input_counts_by_its_name_not_by_where_it_lies(tmp_path):
    # So that finished stages can be moved to another disk.
    build = build_counter()
    one = stages.stage("x", "label", {}, {"in": tmp_path / "here" / "data-123"}, build)
    assert stages.stage("x", "label", {}, {"in": tmp_path / "there" / "data-123"}, build) == one


def test_a_failed_stage_keeps_its_partial_work_and_is_not_read_as_finished():
    seen = []

    def build(out):
        seen.append(sorted(p.name for p in out.iterdir()))
        (out / "checkpoint").write_text("work so far")
        if len(seen) == 1:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        stages.stage("train", "label", {}, {}, build)
    (partial,) = (paths.stages_dir() / "train").glob("*.partial")
    assert [p.name for p in partial.iterdir()] == ["checkpoint"]
    assert not partial.with_suffix("").exists()
    # The next run goes on from there, and leaves a finished stage.
    final = stages.stage("train", "label", {}, {}, build)
    assert seen == [[], ["checkpoint"]]
    assert (final / stages.RECORD).exists() and not partial.exists()


def test_a_kill_between_work_and_rename_is_not_read_as_finished(monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    build = build_counter()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stages.os, "replace", killed)
        stages.stage("x", "label", {}, {}, build)
    stages.stage("x", "label", {}, {}, build)
    assert build.calls == 2


@pytest.mark.parametrize(
    "full",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        # What safetensors raises is no OSError.
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_clear_error(full):
    def build(out):
        raise full

    with pytest.raises(LetheError, match="no space left on this disk.*LETHE_RUNS") as caught:
        stages.stage("x", "label", {}, {}, build)
    assert "\n" not in str(caught.value)
    assert list((paths.stages_dir() / "x").glob("*.partial"))


@pytest.mark.parametrize("other", [OSError(errno.EACCES, "denied"), LetheError("No space left")])
def test_other_errors_pass_through(other):
    def build(out):
        raise other

    with pytest.raises(type(other)) as caught:
        stages.stage("x", "label", {}, {}, build)
    assert caught.value is other


def test_the_record_says_what_made_the_stage(tmp_path):
    spec, inputs = {"seed": 1}, {"data": tmp_path / "data-123"}
    record = stages.read_record(stages.stage("x", "label", spec, inputs, build_counter()))
    assert record["stage"] == "x" and record["params"] == spec
    assert record["inputs"] == {"data": "data-123"}
    assert set(record["versions"]) == set(stages.PACKAGES)
    assert record["seconds"] >= 0 and record["peak_memory_gib"] > 0
    assert isinstance(record["git_dirty"], bool)


def test_a_write_that_fails_leaves_the_old_file_whole(monkeypatch, tmp_path):
    path = tmp_path / "a.json"
    stages.write_json(path, {"old": 1})
    before = path.read_text()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="killed"):

        def killed(*_):
            raise OSError("killed")

        patch.setattr(stages.os, "replace", killed)
        stages.write_json(path, {"new": "much longer than before"})
    assert path.read_text() == before
    with pytest.raises(TypeError):
        stages.write_jsonl(path, [{"a": 1}, {"b": object()}])
    assert path.read_text() == before
    stages.write_json(path, {"new": 2})
    assert path.read_text() == '{\n "new": 2\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]  # no scratch file stays


def test_jsonl_reads_back_what_was_written(tmp_path):
    # U+2028 and U+0085 are line ends to str.splitlines() but plain characters here.
    rows = [{"text": "a\u2028b\x85c\nd"}, {"text": "ärger 🙂"}]
    stages.write_jsonl(tmp_path / "a.jsonl", rows)
    assert stages.read_jsonl(tmp_path / "a.jsonl") == rows
    stages.write_jsonl(tmp_path / "none.jsonl", [])
    assert stages.read_jsonl(tmp_path / "none.jsonl") == []
