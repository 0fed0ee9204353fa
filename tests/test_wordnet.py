"""Definitions, and finding WordNet on any machine."""

import shutil
import sys
from pathlib import Path
from zipfile import ZipFile

import nltk.data
import pytest

from lethe_utils import paths, wordnet
from lethe_utils.errors import LetheError

sys.path.insert(0, str(paths.root() / "workflow"))
import get_wordnet  # noqa: E402


@pytest.mark.parametrize(
    ("word", "part"),
    [("dog", "genus Canis"), ("dogs", "genus Canis"), ("Happy", "joy"), ("children", "young")],
)
def test_definition_is_that_of_the_first_synset(word, part):
    assert part in wordnet.definition(word)


def test_definition_prefers_the_first_of_many_synsets():
    # "frankly" has one reading, "bank" ten: the slope beside a river comes first.
    assert wordnet.definition("bank").startswith("sloping land")


@pytest.mark.parametrize("word", ["qwzx", "日本語", "42424242", ""])
def test_unknown_words_say_so(word):
    assert wordnet.definition(word) == "No definition found."


@pytest.fixture
def bare_machine(monkeypatch, tmp_path):
    """No WordNet, no network, no package manager; returns where the cache would have it."""
    monkeypatch.setenv("LETHE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("NLTK_DATA", raising=False)
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(wordnet, "DEBIAN_FOLDER", tmp_path / "none")
    monkeypatch.setattr(wordnet, "_download", lambda folder: None)
    monkeypatch.setattr(get_wordnet, "succeeds", lambda *_: False)
    wordnet._reader.cache_clear()
    wordnet.definition.cache_clear()
    yield tmp_path / "cache" / "nltk_data" / "corpora" / "wordnet"
    wordnet._reader.cache_clear()
    wordnet.definition.cache_clear()


@pytest.fixture
def zipped(bare_machine, monkeypatch, tmp_path):
    """NLTK_DATA holds WordNet as nltk's downloader leaves it: zipped."""
    (tmp_path / "given" / "corpora").mkdir(parents=True)
    with ZipFile(tmp_path / "given" / "corpora" / "wordnet.zip", "w") as archive:
        for file in fake_wordnet(tmp_path / "source").iterdir():
            archive.write(file, f"wordnet/{file.name}")
    monkeypatch.setenv("NLTK_DATA", str(tmp_path / "given"))


def fake_wordnet(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in wordnet.FILES:
        (folder / name).write_text(name)
    return folder


def assert_whole(folder: Path) -> None:
    assert list(folder.parent.iterdir()) == [folder]  # no scratch left
    assert {p.name: p.read_text() for p in folder.iterdir()} == {n: n for n in wordnet.FILES}


def test_missing_wordnet_is_one_clear_error(bare_machine, capsys):
    with pytest.raises(LetheError) as caught:
        wordnet.definition("dog")
    message = str(caught.value)
    assert "\n" not in message
    for fix in ("nltk.downloader wordnet", "apt-get install wordnet-base", "NLTK_DATA"):
        assert fix in message
    assert get_wordnet.main() == 1
    assert capsys.readouterr() == ("", message + "\n")
    assert not bare_machine.parent.exists()


def test_an_unwritable_cache_names_the_setting(zipped, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file where the cache should be")
    with pytest.raises(LetheError, match="set LETHE_CACHE"):
        wordnet.find_wordnet()
    assert get_wordnet.main() == 1
    assert "set LETHE_CACHE" in capsys.readouterr().err


def test_a_given_folder_and_debians_are_used_where_they_are(bare_machine, monkeypatch, tmp_path):
    monkeypatch.setattr(wordnet, "DEBIAN_FOLDER", fake_wordnet(tmp_path / "usr"))
    assert wordnet.find_wordnet() == tmp_path / "usr"
    given = fake_wordnet(tmp_path / "given" / "corpora" / "wordnet")
    monkeypatch.setenv("NLTK_DATA", str(tmp_path / "given"))
    assert wordnet.find_wordnet() == given
    assert not bare_machine.exists()


def test_a_zip_in_nltk_data_is_unpacked_into_the_cache(zipped, bare_machine):
    assert wordnet.find_wordnet() == bare_machine
    assert_whole(bare_machine)


def test_what_nltk_downloads_is_unpacked_into_the_cache(
    bare_machine, zipped, monkeypatch, tmp_path
):
    monkeypatch.delenv("NLTK_DATA")
    given = tmp_path / "given"
    monkeypatch.setattr(
        wordnet, "_download", lambda to: shutil.copytree(given, to, dirs_exist_ok=True)
    )
    assert wordnet.find_wordnet() == bare_machine
    assert_whole(bare_machine)


def test_debians_package_is_unpacked_into_the_cache(bare_machine, monkeypatch, capsys):
    commands = []

    def succeeds(folder, *command):
        commands.append(command[-1])
        if command[-1] == "wordnet-base":
            if "update" not in commands:  # a fresh container has no package lists
                return False
            (folder / "wordnet-base_3.0_all.deb").touch()
        if command[-1] == "unpacked":
            fake_wordnet(folder / "unpacked/usr/share/wordnet")
        return True

    monkeypatch.setattr(get_wordnet, "succeeds", succeeds)
    monkeypatch.setattr(get_wordnet.os, "geteuid", lambda: 0)
    assert get_wordnet.main() == 0
    assert capsys.readouterr().out == f"{bare_machine}\n"
    assert commands == ["wordnet-base", "update", "wordnet-base", "unpacked"]
    assert_whole(bare_machine)


def test_a_damaged_copy_is_replaced(bare_machine, zipped):
    (fake_wordnet(bare_machine) / "data.noun").unlink()
    (bare_machine / "notes.txt").write_text("mine")
    wordnet.find_wordnet()
    # Nobody's file is deleted: what stood there lies beside it.
    (aside,) = bare_machine.parent.glob("wordnet.damaged-*")
    assert (aside / "notes.txt").read_text() == "mine"
    shutil.rmtree(aside)
    assert_whole(bare_machine)


def test_an_interrupted_copy_leaves_nothing_behind(bare_machine, zipped, monkeypatch):
    copyfile = shutil.copyfile

    def full_disk(source, target):
        if source.name == wordnet.FILES[5]:
            raise OSError("No space left on device")
        copyfile(source, target)

    monkeypatch.setattr(wordnet.shutil, "copyfile", full_disk)
    with pytest.raises(LetheError, match="No space left"):
        wordnet.find_wordnet()
    assert list(bare_machine.parent.iterdir()) == []


def test_another_process_may_install_first(bare_machine, zipped, monkeypatch):
    replace = wordnet.os.replace

    def too_late(source, target):
        (fake_wordnet(bare_machine) / "data.noun").write_text("theirs")
        replace(source, target)

    monkeypatch.setattr(wordnet.os, "replace", too_late)
    assert wordnet.find_wordnet() == bare_machine
    assert (bare_machine / "data.noun").read_text() == "theirs"
