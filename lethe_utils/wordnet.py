"""WordNet, found wherever it lies on this machine: the definitions that external dilution adds."""

import hashlib
import io
import os
import random
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from lethe_utils import paths
from lethe_utils.errors import LetheError

NO_DEFINITION = "No definition found."
POS = ("noun", "verb", "adj", "adv")
FILES = (*(f"{kind}.{p}" for kind in ("data", "index") for p in POS), *(f"{p}.exc" for p in POS))
SENSES = 5  # of a common word
OTHERS = 60  # draws for a definition of a certain length
DEBIAN_FOLDER = Path("/usr/share/wordnet")

# Its own process: nltk prints to stderr, and waits two minutes for a silent server unless told.
NLTK_DOWNLOAD = """
import socket, sys
import nltk.downloader
socket.setdefaulttimeout(3)
nltk.downloader.NETWORK_TIMEOUT = 3
nltk.downloader.download("wordnet", download_dir=sys.argv[1], quiet=True)
"""

MISSING = (
    "WordNet was not found and could not be downloaded. Any one of these fixes it: "
    "(1) with network access, run `python -m nltk.downloader wordnet`; "
    "(2) on Debian or Ubuntu, run `apt-get install wordnet-base`; "
    "(3) copy a folder that holds corpora/wordnet.zip from another machine and set NLTK_DATA to it."
)


def find_wordnet() -> Path:
    """The folder that holds WordNet's files.

    In order: unpacked in NLTK_DATA, in nltk's own folders or in our cache; Debian's installed
    files; else, unpacked into the cache: a zipped copy there, or what nltk's downloader gets.

    Raises:
        LetheError: no source has WordNet, or the cache cannot be written.
    """
    roots = _data_roots()
    for folder in (*(root / "corpora" / "wordnet" for root in roots), DEBIAN_FOLDER):
        if _complete(folder):
            return folder
    with tempfile.TemporaryDirectory() as scratch:
        for folder in _unpacked(roots, Path(scratch)):
            if _complete(folder):
                return install(folder)
    raise LetheError(MISSING)


def install(folder: Path) -> Path:
    """Copy WordNet's files from a folder into the cache, all or nothing; returns their new folder.

    Raises:
        LetheError: the cache cannot be written, or a file is missing.
    """
    try:
        return _copy(folder, _cache_root() / "corpora")
    except OSError as error:
        message = f"WordNet cannot be installed in {_cache_root()} ({error}): "
        raise LetheError(message + "set LETHE_CACHE to a folder you can write.") from error


def _copy(folder: Path, corpora: Path) -> Path:
    corpora.mkdir(parents=True, exist_ok=True)
    # Inside the cache, because a rename is atomic only within one file system.
    with tempfile.TemporaryDirectory(dir=corpora) as scratch:
        whole, target = Path(scratch, "whole"), corpora / "wordnet"
        whole.mkdir()
        for name in FILES:
            shutil.copyfile(folder / name, whole / name)
        try:
            os.replace(whole, target)
        except OSError:  # something is there: another process was faster, or a damaged copy
            if not _complete(target):
                # Moved aside, not deleted: LETHE_CACHE may be a folder that is not ours alone.
                os.replace(target, tempfile.mkdtemp(prefix="wordnet.damaged-", dir=corpora))
                os.replace(whole, target)
    return target


@cache
def definition(word: str) -> str:
    """The definition of the word's first WordNet synset, or NO_DEFINITION.

    Nouns come before verbs, adjectives and adverbs, and "dogs" is looked up as "dog", both as nltk
    does it. The paper takes the first synset too, right sense or not. Raises as `find_wordnet`.
    """
    synsets = _reader().synsets(word)
    return synsets[0].definition() if synsets else NO_DEFINITION


@cache
def other_definition(word: str) -> str:
    """The definition of another word, drawn by the word's name: as many words as its own has, or
    as near as OTHERS draws come. As long and as unfamiliar, without its meaning."""
    rng, wanted = random.Random(word), len(definition(word).split())
    drawn = (definition(rng.choice(_words())) for _ in range(OTHERS))
    return min(drawn, key=lambda text: abs(len(text.split()) - wanted))


def fitting_definition(word: str, context: frozenset[str]) -> str:
    """The definition of the sense whose definition and examples share most words with a context,
    the first of equals (simplified Lesk); NO_DEFINITION for a word that WordNet lacks."""
    best, most = definition(word), -1
    for synset in _reader().synsets(word):
        said = {*" ".join([synset.definition(), *synset.examples()]).lower().split()} - {word}
        if len(said & context) > most:
            best, most = synset.definition(), len(said & context)
    return best


@cache
def words_below(synset: str, shortest: int, longest: int) -> list[str]:
    """The words (of so many letters) whose first sense is a kind of a synset, e.g. "bird.n.01"."""
    reader, found = _reader(), set()
    for kind in reader.synset(synset).closure(lambda s: s.hyponyms()):
        word = kind.lemmas()[0].name()
        plain = word.isalpha() and word.islower() and shortest <= len(word) <= longest
        if plain and reader.synsets(word)[0] == kind:
            found.add(word)
    return sorted(found)


def common_words(kind: str, many: int, rng: random.Random) -> dict[str, str]:
    """So many nouns, verbs or adjectives (`kind`) drawn of those with at least SENSES senses, each
    with the definition of its first: the more common a word, the more senses it has."""
    reader, pos, found = _reader(), kind[0], {}
    words = sorted(w for w in reader.all_lemma_names(pos) if w.isalpha() and len(w) > 2)
    for word in rng.sample(words, len(words)):
        senses = reader.synsets(word, pos)
        # "sessions" is the name of a man before it is more than one session.
        if len(senses) >= SENSES and word in senses[0].lemma_names():
            found[word] = senses[0].definition()
        if len(found) == many:
            break
    return found


@cache
def antonyms() -> dict[str, list[str]]:
    """Adjective -> its opposites, of those whose first sense has any."""
    reader, found = _reader(), {}
    for word in sorted(reader.all_lemma_names("a")):
        first = reader.synsets(word, "a")[0] if word.isalpha() else None
        own = [x for x in first.lemmas() if x.name() == word] if first else []
        others = [a.name() for x in own for a in x.antonyms() if a.name().isalpha()]
        if others:
            found[word] = others
    return found


@cache
def _words() -> list[str]:
    return sorted(_reader().all_lemma_names("n"))


@cache
def fingerprint() -> str:
    """SHA-256 over the definitions in use: evidence made from other ones is other evidence."""
    digest = hashlib.sha256()
    for name in FILES:
        digest.update((find_wordnet() / name).read_bytes())
    return digest.hexdigest()


@cache
def _reader():
    folder = find_wordnet()
    import nltk.data
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    class EnglishReader(WordNetCorpusReader):
        """Leaves out what definitions do not need and Debian's package lacks."""

        def map_wn(self, version="wordnet"):  # other languages, with the file index.sense
            return None

        def open(self, filename):  # the 45 names of the lexicographers' files
            if filename == "lexnames":
                return io.StringIO("\n".join(f"{i} unnamed{i} 0" for i in range(45)))
            return super().open(filename)

    if str(folder) not in nltk.data.path:  # nltk refuses to open files outside its data path
        nltk.data.path.append(str(folder))
    with warnings.catch_warnings():  # it warns that no other language was loaded
        warnings.simplefilter("ignore")
        return EnglishReader(str(folder), None)


def _cache_root() -> Path:
    return paths.cache_dir() / "nltk_data"


def _data_roots() -> list[Path]:
    import nltk.data  # here, because importing nltk takes a second

    set_now = os.environ.get("NLTK_DATA", "").split(os.pathsep)  # nltk read it only at import
    folders = [p for p in (*set_now, *nltk.data.path, _cache_root()) if p]
    return [Path(p).expanduser().absolute() for p in folders]


def _complete(folder: Path) -> bool:
    # os.path, because Path.is_file raises in a folder that may not be read.
    return all(os.path.isfile(folder / name) for name in FILES)


def _unpacked(roots: list[Path], scratch: Path) -> Iterator[Path]:
    """Folders that may hold WordNet's files, those without a download first."""
    for i, root in enumerate(roots):
        yield _unzip(root, scratch / str(i))
    _download(scratch)
    yield scratch / "corpora" / "wordnet"
    yield _unzip(scratch, scratch / "downloaded")


def _unzip(root: Path, out: Path) -> Path:
    """nltk's downloader leaves WordNet zipped; lookups need it unpacked to be fast."""
    packed = root / "corpora" / "wordnet.zip"
    if os.access(packed, os.R_OK):
        with suppress(BadZipFile), ZipFile(packed) as archive:
            archive.extractall(out)
    return out / "wordnet"


def _download(folder: Path) -> None:
    # nltk writes only inside its data path, which NLTK_DATA extends.
    env = {**os.environ, "NLTK_DATA": str(folder)}
    command = [sys.executable, "-c", NLTK_DOWNLOAD, str(folder)]
    with suppress(subprocess.TimeoutExpired):
        subprocess.run(command, env=env, capture_output=True, timeout=180)
