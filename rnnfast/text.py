"""Text for character models: corpora by name, preprocessing and a vocabulary.

A corpus is looked for in the data directory (the environment variable RNNFAST_DATA), then in the cache directory, and
is otherwise downloaded once from its public address. Every copy is checked against a known size and sha256 before it
is used, so that two runs on one corpus have read the same bytes. `python-docs` is the exception: it is the text of
the help topics that every CPython carries, needs no download, and differs between Python versions.
"""

import hashlib
import http.client
import os
import re
import tempfile
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["CORPORA", "DATA_VARIABLE", "UNKNOWN", "Corpus", "CorpusError", "Vocab", "letters_only", "load_corpus"]

DATA_VARIABLE = "RNNFAST_DATA"
UNKNOWN = "<unk>"
_DOWNLOAD_TIMEOUT_SECONDS = 30


class CorpusError(RuntimeError):
    """A corpus that is not there, cannot be fetched, is not the text it should be, or cannot be read as text."""


@dataclass(frozen=True)
class Corpus:
    """A text that is known by name.

    Attributes:
        name: what `load_corpus` is called with.
        title: author and title.
        file_name: its name in the data directory and in the cache; empty for the text that Python itself carries.
        num_bytes: size of the file.
        sha256: digest of the file, 64 hexadecimal digits.
        url: address of these very bytes, or None when the copy was edited and nothing public has this digest.
        origin: where the text is from, for people.
    """

    name: str
    title: str
    file_name: str
    num_bytes: int
    sha256: str
    url: str | None
    origin: str


CORPORA: Mapping[str, Corpus] = {
    corpus.name: corpus
    for corpus in (
        Corpus(
            name="python-docs",
            title="the help topics of this Python",
            file_name="",
            num_bytes=0,
            sha256="",
            url=None,
            origin="pydoc_data.topics in the standard library",
        ),
        Corpus(
            name="time-machine",
            title="H. G. Wells, The Time Machine",
            file_name="timemachine.txt",
            num_bytes=178979,
            sha256="8424dbd9532ac81f7e5f0b6add90e6952baea29158309d7d1bf3884f4e12c516",
            url="http://d2l-data.s3-accelerate.amazonaws.com/timemachine.txt",
            origin="the data bucket of Dive into Deep Learning",
        ),
        Corpus(
            name="war-of-the-worlds",
            title="H. G. Wells, The War of the Worlds",
            file_name="war_of_the_worlds.txt",
            num_bytes=340502,
            sha256="be1b72f45ac42f49b3ab807fc3019437a9713a3257507444291cbda6ef2ef1fe",
            url=None,
            origin="Project Gutenberg 36 without its header and footer",
        ),
        Corpus(
            name="frankenstein",
            title="Mary Shelley, Frankenstein",
            file_name="frankenstein.txt",
            num_bytes=421535,
            sha256="99491fbd01aaa3f27f7f67463e07fd03e354369eb3483acd9e68dc6528a0a156",
            url=None,
            origin="Project Gutenberg 84 without its header and footer",
        ),
        Corpus(
            name="tiny-shakespeare",
            title="William Shakespeare, parts of the plays",
            file_name="tinyshakespeare.txt",
            num_bytes=1115394,
            sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
            origin="the char-rnn repository of Andrej Karpathy",
        ),
    )
}


def load_corpus(name: str | os.PathLike[str], *, download: bool = True, cache_dir: Path | None = None) -> str:
    """Returns the text of a corpus, or of a local UTF-8 file.

    Args:
        name: a key of `CORPORA`, or the path of any text file (which is not checked against a digest).
        download: whether a corpus that is on no disk may be fetched from its public address.
        cache_dir: where downloads are kept; by default `rnnfast` in the user's cache directory
            (`$XDG_CACHE_HOME`, or `~/.cache`).

    Raises:
        CorpusError: the name is neither a corpus nor a file; the data directory does not exist; the copy found is
            truncated or altered; the download fails or gives other bytes; or the file is not UTF-8.
    """
    corpus = CORPORA.get(str(name))
    if corpus is None:
        path = Path(name)
        if not path.is_file():
            raise CorpusError(
                f"corpus {str(name)!r} is neither a file nor one of the known corpora: {', '.join(CORPORA)}"
            )
        return _read(path, None)
    if not corpus.file_name:
        return _python_docs()
    path = _find(corpus, download=download, cache_dir=_default_cache_dir() if cache_dir is None else cache_dir)
    return _read(path, corpus)


def letters_only(text: str) -> str:
    """Returns the text in lower case with every run of other characters than a-z made one space.

    This is the preprocessing of Dive into Deep Learning's recurrent chapters; its result has at most 27 kinds of
    characters, the same for every English text.
    """
    return re.sub("[^A-Za-z]+", " ", text).lower()


class Vocab:
    """Numbers for tokens: `<unk>` is 0, then the kinds of `tokens` in sorted order.

    Args:
        tokens: the tokens to number, repeated or not; a string is taken as its characters.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        self.tokens: tuple[str, ...] = (UNKNOWN, *sorted(set(tokens) - {UNKNOWN}))
        self._ids = {token: index for index, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        """Returns the number of kinds of tokens, `<unk>` included."""
        return len(self.tokens)

    def encode(self, tokens: Iterable[str]) -> torch.Tensor:
        """Returns the numbers of the tokens, int64 `[len(tokens)]`; a token it does not know is 0."""
        return torch.tensor([self._ids.get(token, 0) for token in tokens], dtype=torch.int64)

    def decode(self, ids: torch.Tensor | Sequence[int]) -> list[str]:
        """Returns the tokens of the numbers, one-dimensional.

        Raises:
            IndexError: a number is negative or not below `len(self)`.
        """
        numbers: list[int] = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
        for number in numbers:
            if not 0 <= number < len(self):
                raise IndexError(f"token number {number} is out of range for a vocabulary of {len(self)}")
        return [self.tokens[number] for number in numbers]


def _python_docs() -> str:
    try:
        # Imported here because stripped-down Pythons leave it out.
        from pydoc_data.topics import topics
    except ImportError as error:
        raise CorpusError("corpus 'python-docs': this Python was installed without pydoc_data.topics") from error
    return "\n".join(topics[key] for key in sorted(topics))


def _default_cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "rnnfast"


def _find(corpus: Corpus, *, download: bool, cache_dir: Path) -> Path:
    """Returns the path of a copy of the corpus: data directory, cache, download, in this order."""
    data = os.environ.get(DATA_VARIABLE)
    if data:
        directory = Path(data)
        if not directory.is_dir():
            raise CorpusError(f"{DATA_VARIABLE} is {data!r}, which is not a directory")
        if (directory / corpus.file_name).is_file():
            return directory / corpus.file_name
    cached = cache_dir / corpus.file_name
    if cached.is_file():
        return cached
    looked = f"{DATA_VARIABLE} ({data if data else 'not set'}) and {cache_dir}"
    remedy = (
        f"put {corpus.file_name} ({corpus.title}; {corpus.origin}; {corpus.num_bytes} bytes, sha256 {corpus.sha256}) "
        f"in a directory and set {DATA_VARIABLE} to it, or use the corpus 'python-docs', which needs no file"
    )
    if corpus.url is None:
        raise CorpusError(
            f"corpus {corpus.name!r} is not in {looked}, and no public address has this edited copy: {remedy}"
        )
    if not download:
        raise CorpusError(f"corpus {corpus.name!r} is not in {looked}: {remedy}")
    try:
        content = _download(corpus.url, corpus.num_bytes)
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        raise CorpusError(
            f"corpus {corpus.name!r} is not in {looked} and could not be downloaded from {corpus.url} ({error}): "
            f"{remedy}"
        ) from error
    _check(content, corpus, corpus.url)
    try:
        _store(content, cached)
    except OSError as error:
        raise CorpusError(
            f"corpus {corpus.name!r} was downloaded but cannot be kept in {cache_dir}: {error}"
        ) from error
    return cached


def _download(url: str, num_bytes: int) -> bytes:
    with urllib.request.urlopen(url, timeout=_DOWNLOAD_TIMEOUT_SECONDS) as response:
        # One byte more than expected is enough to notice a longer file without reading all of it.
        content: bytes = response.read(num_bytes + 1)
    return content


def _store(content: bytes, path: Path) -> None:
    """Writes the file in one step, so that a reader beside us or a kill in the middle never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def _check(content: bytes, corpus: Corpus, where: object) -> None:
    if len(content) < corpus.num_bytes:
        raise CorpusError(
            f"corpus {corpus.name!r} from {where} is truncated: {len(content)} bytes of {corpus.num_bytes}"
        )
    digest = hashlib.sha256(content).hexdigest()
    if digest != corpus.sha256:
        raise CorpusError(
            f"corpus {corpus.name!r} from {where} is not the text it should be: "
            f"sha256 {corpus.sha256} expected, {digest} found"
        )


def _read(path: Path, corpus: Corpus | None) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error}") from error
    if corpus is not None:
        _check(content, corpus, path)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 text: {error}") from error
