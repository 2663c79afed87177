"""Text for language models: corpora by name, preprocessing, tokens, a vocabulary, and batches.

A corpus is looked for in the data directory (the environment variable RNNFAST_DATA), then in the cache directory, and
is otherwise downloaded once from its public address. Every copy is checked against a known size and sha256 before it
is used, so that two runs on one corpus have read the same bytes. `python-docs` is the exception: it is the text of
the help topics that every CPython carries, needs no download, and differs between Python versions.
"""

import hashlib
import http.client
import json
import os
import re
import tempfile
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

__all__ = [
    "CORPORA",
    "DATA_VARIABLE",
    "UNKNOWN",
    "Corpus",
    "CorpusError",
    "Partitions",
    "Vocab",
    "Windows",
    "letters_only",
    "load_corpus",
    "split_windows",
    "tokenize",
    "window_loader",
]

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


def tokenize(text: str, level: str = "char") -> list[str]:
    """Returns the characters of a text, or its words: what stands between white space.

    Raises:
        ValueError: the level is neither "char" nor "word".
    """
    if level == "char":
        return list(text)
    if level == "word":
        return text.split()
    raise ValueError(f"level: expected 'char' or 'word', got {level!r}")


class Vocab:
    """Numbers for tokens: `<unk>` is 0, then the kinds of `tokens` in sorted order.

    Args:
        tokens: the tokens to number, repeated or not; a string is taken as its characters.
        min_frequency: a kind that comes less often has no number of its own; it is `<unk>`.

    Attributes:
        tokens: the kinds, by number.
        counts: how often each came, by number; for `<unk>`, all that has no number of its own.

    Raises:
        ValueError: `min_frequency` is below 1.
    """

    def __init__(self, tokens: Iterable[str], min_frequency: int = 1) -> None:
        if min_frequency < 1:
            raise ValueError(f"min_frequency: expected at least 1, got {min_frequency}")
        counter = Counter(tokens)
        unknown = counter.pop(UNKNOWN, 0)
        kept = sorted(token for token, count in counter.items() if count >= min_frequency)
        unknown += sum(count for count in counter.values() if count < min_frequency)
        self._number((UNKNOWN, *kept), (unknown, *(counter[token] for token in kept)))

    def _number(self, tokens: tuple[str, ...], counts: tuple[int, ...]) -> None:
        self.tokens, self.counts = tokens, counts
        self._ids = {token: index for index, token in enumerate(tokens)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes tokens and counts as JSON, in one step: a reader never sees half a file.

        Raises:
            OSError: the file cannot be written.
        """
        content = json.dumps({"tokens": self.tokens, "counts": self.counts}, ensure_ascii=False, indent=1) + "\n"
        _store(content.encode("utf-8", "surrogatepass"), Path(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Vocab":
        """Returns the vocabulary that `save` wrote: the same numbers for the same tokens.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not what `save` writes.
        """
        try:
            content = json.loads(Path(path).read_bytes().decode("utf-8", "surrogatepass"))
            tokens, counts = tuple(content["tokens"]), tuple(content["counts"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a saved vocabulary: {type(error).__name__}: {error}") from error
        sound = len(tokens) == len(set(tokens)) == len(counts) and tokens[:1] == (UNKNOWN,)
        if not (sound and all(isinstance(t, str) for t in tokens) and all(isinstance(c, int) for c in counts)):
            raise ValueError(
                f"{path} is not a saved vocabulary: expected different tokens, {UNKNOWN} first, and a count for each"
            )
        vocab = cls.__new__(cls)
        vocab._number(tokens, counts)
        return vocab

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


Batch = tuple[torch.Tensor, torch.Tensor]


class Windows(Dataset[Batch]):
    """All windows of `num_steps` tokens of a text, each with the tokens that follow its own.

    Item `i` is the pair of `tokens[i : i + num_steps]` and `tokens[i + 1 : i + num_steps + 1]`, each int64
    `[num_steps]`. Several at once (as a DataLoader asks for) come stacked, `[num_steps, len(items)]`.

    Args:
        tokens: int64 `[length]`.
        num_steps: T.
        first: where the first window begins.
        count: how many windows, one for each place from `first` on; by default all there are.

    Raises:
        ValueError: tokens of another shape or type; sizes below 1; more windows than the text has.
        IndexError: an item that is not there.
    """

    def __init__(self, tokens: torch.Tensor, num_steps: int, *, first: int = 0, count: int | None = None) -> None:
        _check_text(tokens, num_steps)
        available = len(tokens) - num_steps - first
        if first < 0 or available < 1 or (count is not None and not 1 <= count <= available):
            raise ValueError(
                f"windows of {num_steps} steps from {first} on, count {count}: a text of {len(tokens)} tokens has "
                f"{max(available, 0)} (one token more than the steps is needed, to be predicted)"
            )
        self.tokens, self.num_steps, self.first = tokens, num_steps, first
        self.count = available if count is None else count

    def __len__(self) -> int:
        """Returns the number of windows."""
        return self.count

    def __getitem__(self, index: int) -> Batch:
        """Returns window `index` and the tokens to be predicted."""
        windows, targets = self.__getitems__([index])
        return windows[:, 0], targets[:, 0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Returns several windows and targets, `[num_steps, len(indices)]`: what a DataLoader calls for a batch."""
        starts = torch.as_tensor(indices, dtype=torch.int64)
        if len(starts) and (int(starts.min()) < 0 or int(starts.max()) >= len(self)):
            raise IndexError(f"windows {int(starts.min())} to {int(starts.max())}: expected 0 to {len(self) - 1}")
        windows = self.tokens[self.first + starts + torch.arange(self.num_steps + 1)[:, None]]
        return windows[:-1], windows[1:]


def split_windows(
    tokens: torch.Tensor, num_steps: int, num_train: int = 10_000, num_validation: int = 5_000
) -> tuple[Windows, Windows]:
    """Returns the windows to train on and, after them in the text, those to validate on.

    The sizes by default are those of Dive into Deep Learning, 9.5 and later. Its last training and first validation
    windows share tokens; here the validation windows begin after the last token that training predicts.

    Raises:
        ValueError: the text is too short.
    """
    train = Windows(tokens, num_steps, count=num_train)
    return train, Windows(tokens, num_steps, first=num_train + num_steps, count=num_validation)


def window_loader(
    windows: Windows, batch_size: int, *, shuffle: bool = True, generator: torch.Generator | None = None
) -> DataLoader[Batch]:
    """Returns a DataLoader over random windows: each batch a pair of int64 `[num_steps, batch_size]`.

    Every window comes once in an epoch; the last batch may be smaller.
    """
    return DataLoader(windows, batch_size, shuffle=shuffle, generator=generator, collate_fn=_as_is)


class Partitions(IterableDataset[Batch]):
    """A text cut into `batch_size` long pieces, read side by side: the state is carried from batch to batch.

    Each batch is a pair of int64 `[num_steps, batch_size]`, windows and the tokens that follow; column n of a batch
    goes on where column n of the one before ended. What does not fill a batch is left out. Use it as it is, or with
    `DataLoader(partitions, batch_size=None)`. Detach the state between batches (`rnnfast.lm.detach_state`).

    Args:
        tokens: int64 `[length]`.
        num_steps: T.
        batch_size: N.
        offset: tokens to leave out at the start; another in each epoch gives other windows.

    Raises:
        ValueError: tokens of another shape or type; sizes below 1; a text too short for one batch.
    """

    def __init__(self, tokens: torch.Tensor, num_steps: int, batch_size: int, *, offset: int = 0) -> None:
        _check_text(tokens, num_steps)
        if batch_size < 1 or offset < 0:
            raise ValueError(
                f"expected a batch_size of at least 1 and an offset of at least 0, got {batch_size}, {offset}"
            )
        length = (len(tokens) - offset - 1) // batch_size
        if length < num_steps:
            raise ValueError(
                f"{batch_size} partitions of at least {num_steps} steps need {batch_size * num_steps + 1 + offset} "
                f"tokens, the text has {len(tokens)}"
            )
        self.num_steps, self.batches = num_steps, length // num_steps
        size = batch_size * length
        self.windows = tokens[offset : offset + size].view(batch_size, length).t()
        self.targets = tokens[offset + 1 : offset + 1 + size].view(batch_size, length).t()

    def __len__(self) -> int:
        """Returns the number of batches."""
        return self.batches

    def __iter__(self) -> Iterator[Batch]:
        """Yields the batches from the first on."""
        for first in range(0, self.batches * self.num_steps, self.num_steps):
            part = slice(first, first + self.num_steps)
            yield self.windows[part], self.targets[part]


def _as_is(batch: Any) -> Any:
    """What `__getitems__` stacked needs no collation. A function by name, so that worker processes can have it."""
    return batch


def _check_text(tokens: torch.Tensor, num_steps: int) -> None:
    if tokens.dim() != 1 or tokens.dtype != torch.int64:
        raise ValueError(f"tokens: expected int64 [length], got {tokens.dtype} {list(tokens.shape)}")
    if num_steps < 1:
        raise ValueError(f"num_steps: expected at least 1, got {num_steps}")


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
