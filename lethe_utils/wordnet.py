"""WordNet, found or installed once per machine: the definitions that external dilution adds.

`python -m lethe_utils.wordnet` prints the data folder, or one line that says how to get one.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from lethe_utils import paths
from lethe_utils.errors import LetheError

NO_DEFINITION = "No definition found."
POS = {"noun": 1, "verb": 2, "adj": 3, "adv": 4}
FILES = (*(f"{kind}.{p}" for kind in ("data", "index") for p in POS), *(f"{p}.exc" for p in POS))
DEBIAN_FOLDER = Path("/usr/share/wordnet")
APT_OPTIONS = ("-q", "-o", "Acquire::Retries=0", "-o", "Acquire::http::Timeout=5")

# The lexicographer files in the order of lexnames(5WN). Debian's package leaves this file out and
# nltk cannot open WordNet without it.
LEXNAMES = (
    "adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute "
    "noun.body noun.cognition noun.communication noun.event noun.feeling noun.food noun.group "
    "noun.location noun.motive noun.object noun.person noun.phenomenon noun.plant "
    "noun.possession noun.process noun.quantity noun.relation noun.shape noun.state "
    "noun.substance noun.time verb.body verb.change verb.cognition verb.communication "
    "verb.competition verb.consumption verb.contact verb.creation verb.emotion verb.motion "
    "verb.perception verb.possession verb.social verb.stative verb.weather adj.ppl"
)

# Its own process: nltk prints to stderr, and waits two minutes for a silent server unless told.
NLTK_DOWNLOAD = """
import socket, sys
import nltk.downloader
socket.setdefaulttimeout(3)
nltk.downloader.NETWORK_TIMEOUT = 3
sys.exit(not nltk.downloader.download("wordnet", download_dir=sys.argv[1], quiet=True))
"""

MISSING = (
    "WordNet was not found and could not be downloaded. Any one of these fixes it: "
    "(1) with network access, run `python -m nltk.downloader wordnet`; "
    "(2) on Debian or Ubuntu, run `apt-get install wordnet-base`; "
    "(3) copy a folder that holds corpora/wordnet.zip from another machine and set NLTK_DATA to it."
)


def find_wordnet() -> Path:
    """The nltk data folder that holds corpora/wordnet, installed into the cache when missing.

    In order: an unpacked copy in NLTK_DATA, nltk's own folders or our cache; a zipped copy there;
    Debian's installed files; nltk's downloader; Debian's package, unpacked without root.

    Raises:
        LetheError: no source has WordNet, or the cache cannot be written.
    """
    for root in _data_roots():
        if _complete(root / "corpora" / "wordnet", "lexnames"):
            return root
    try:
        return _install_first(_zipped, _debian_folder, _nltk_download, _debian_package)
    except OSError as error:
        message = f"WordNet cannot be installed in {_cache_root()} ({error}): "
        raise LetheError(message + "set LETHE_CACHE to a folder you can write.") from error


@cache
def definition(word: str) -> str:
    """The definition of the word's first WordNet synset, or NO_DEFINITION.

    Nouns come before verbs, adjectives and adverbs, and inflected forms are reduced ("dogs" is
    looked up as "dog"), both as nltk does it. The paper takes the first synset too, right sense
    or not.

    Raises:
        LetheError: WordNet is missing (see `find_wordnet`).
    """
    synsets = _reader().synsets(word)
    return synsets[0].definition() if synsets else NO_DEFINITION


@cache
def fingerprint() -> str:
    """SHA-256 over the definitions in use: evidence made from other ones is other evidence."""
    digest = hashlib.sha256()
    for name in FILES:
        digest.update((find_wordnet() / "corpora" / "wordnet" / name).read_bytes())
    return digest.hexdigest()


@cache
def _reader():
    root = find_wordnet()
    import nltk.data
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    class EnglishReader(WordNetCorpusReader):
        """Leaves out what maps other languages, with the index.sense file that it needs."""

        def map_wn(self, version="wordnet"):
            return None

    if str(root) not in nltk.data.path:  # nltk refuses to open files outside its data path
        nltk.data.path.append(str(root))
    with warnings.catch_warnings():  # it warns that no other language was loaded
        warnings.simplefilter("ignore")
        return EnglishReader(str(root / "corpora" / "wordnet"), None)


def _cache_root() -> Path:
    return paths.cache_dir() / "nltk_data"


def _data_roots() -> list[Path]:
    import nltk.data  # here, because importing nltk takes a second

    set_now = os.environ.get("NLTK_DATA", "").split(os.pathsep)  # nltk read it only at import
    folders = [p for p in (*set_now, *nltk.data.path, _cache_root()) if p]
    return [Path(p).expanduser().absolute() for p in folders]


def _complete(folder: Path, *more: str) -> bool:
    # os.path, because Path.is_file raises in a folder that may not be read.
    return all(os.path.isfile(folder / name) for name in (*FILES, *more))


def _install_first(*sources) -> Path:
    """Copy the first source that has WordNet into the cache, all of it or nothing."""
    corpora = _cache_root() / "corpora"
    corpora.mkdir(parents=True, exist_ok=True)
    for source in sources:
        # Inside the cache, because a rename is atomic only within one file system.
        with tempfile.TemporaryDirectory(dir=corpora) as scratch:
            folder = source(Path(scratch))
            if folder and _complete(folder):
                _install(folder, Path(scratch) / "whole", corpora / "wordnet")
                return _cache_root()
    raise LetheError(MISSING)


def _install(folder: Path, whole: Path, target: Path) -> None:
    whole.mkdir()
    for name in FILES:
        shutil.copyfile(folder / name, whole / name)
    rows = (
        f"{i:02d}\t{name}\t{POS[name.split('.')[0]]}\n" for i, name in enumerate(LEXNAMES.split())
    )
    (whole / "lexnames").write_text("".join(rows), "ascii")
    try:
        os.replace(whole, target)
    except OSError:  # something is there: another process was faster, or a damaged copy
        if not _complete(target, "lexnames"):
            # Moved aside, not deleted: LETHE_CACHE may be a folder that is not ours alone.
            os.replace(target, tempfile.mkdtemp(prefix="wordnet.damaged-", dir=target.parent))
            os.replace(whole, target)


def _zipped(scratch: Path) -> Path | None:
    return next((f for root in _data_roots() if (f := _unzip(root, scratch))), None)


def _unzip(root: Path, scratch: Path) -> Path | None:
    """nltk's downloader leaves WordNet zipped; lookups need it unpacked to be fast."""
    packed = root / "corpora" / "wordnet.zip"
    if not os.access(packed, os.R_OK):
        return None
    try:
        with ZipFile(packed) as archive:
            archive.extractall(scratch / "unzipped")
    except BadZipFile:
        return None
    return scratch / "unzipped" / "wordnet"


def _debian_folder(scratch: Path) -> Path:
    return DEBIAN_FOLDER


def _nltk_download(scratch: Path) -> Path | None:
    command = [sys.executable, "-c", NLTK_DOWNLOAD, str(scratch)]
    # nltk writes only inside its data path, which NLTK_DATA extends.
    if not _run(command, scratch, {**os.environ, "NLTK_DATA": str(scratch)}):
        return None
    folder = scratch / "corpora" / "wordnet"
    return folder if folder.is_dir() else _unzip(scratch, scratch)


def _debian_package(scratch: Path) -> Path | None:
    fetch = ["apt-get", *APT_OPTIONS, "download", "wordnet-base"]
    if not _run(fetch, scratch):
        # Fresh containers have no package lists, and only root may fetch them.
        is_root = hasattr(os, "geteuid") and os.geteuid() == 0
        if not (is_root and _run(["apt-get", *APT_OPTIONS, "update"], scratch)):
            return None
        if not _run(fetch, scratch):
            return None
    package = next(scratch.glob("wordnet-base_*.deb"))
    unpacked = _run(["dpkg-deb", "-x", package.name, "unpacked"], scratch)
    return scratch / "unpacked/usr/share/wordnet" if unpacked else None


def _run(command: list[str], folder: Path, env: dict[str, str] | None = None) -> bool:
    """Whether the command exists and succeeds within three minutes; its output is dropped."""
    try:
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, timeout=180)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def main() -> int:
    try:
        print(find_wordnet())
    except LetheError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
