"""Progress bars: in a log where one is named, else on stderr, and gone when the work is done."""

from lethe_utils.progress import Bar


def test_a_named_log_gets_the_bars_and_stderr_nothing(tmp_path, monkeypatch, capsys):
    log = tmp_path / "02.log"
    log.write_text("papermill's own line\n")
    monkeypatch.setenv("LETHE_PROGRESS", str(log))
    for _ in range(2):
        assert [*Bar(range(3), desc="training", mininterval=0)] == [0, 1, 2]
    text = log.read_text()
    assert text.startswith("papermill's own line\n") and "training: 100%" in text
    assert capsys.readouterr().err == ""


def test_without_a_log_the_line_on_stderr_disappears(monkeypatch, capsys):
    monkeypatch.delenv("LETHE_PROGRESS", raising=False)
    with Bar(total=2, desc="hashing", mininterval=0) as bar:
        bar.update(2)
    text = capsys.readouterr().err
    assert "hashing: 100%" in text and text.split("\r")[-1].strip() == ""
