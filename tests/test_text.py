"""rnnfast.text: corpora found, checked, downloaded or refused; preprocessing; the vocabulary."""

import dataclasses
import hashlib
import http.server
import itertools
import os
import threading
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from rnnfast import text
from rnnfast.text import (
    CORPORA,
    UNKNOWN,
    Corpus,
    CorpusError,
    Partitions,
    Vocab,
    Windows,
    letters_only,
    load_corpus,
    split_windows,
    tokenize,
    window_loader,
)

CONTENT = "Call me Ishmael. Some years ago, n\u00e9ver mind how long.\n".encode()


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> Corpus:
    """A small corpus named `whale` whose public address is a file; no data directory is set."""
    source = tmp_path / "public" / "whale.txt"
    source.parent.mkdir()
    source.write_bytes(CONTENT)
    whale = Corpus(
        name="whale",
        title="a line about a whale",
        file_name="whale.txt",
        num_bytes=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        url=source.as_uri(),
        origin="nowhere",
    )
    monkeypatch.setattr(text, "CORPORA", {"whale": whale})
    monkeypatch.delenv("RNNFAST_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return whale


def source_of(corpus: Corpus) -> Path:
    return Path(corpus.url.removeprefix("file://"))


def test_download_is_kept_and_not_repeated(corpus, tmp_path):
    assert load_corpus("whale") == CONTENT.decode()
    source_of(corpus).unlink()
    assert load_corpus("whale") == CONTENT.decode()
    assert [path.name for path in (tmp_path / "cache" / "rnnfast").iterdir()] == ["whale.txt"]


def test_data_directory_comes_before_cache_and_download(corpus, tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    (data / "whale.txt").write_bytes(CONTENT)
    monkeypatch.setenv("RNNFAST_DATA", str(data))
    source_of(corpus).unlink()
    assert load_corpus("whale") == CONTENT.decode()
    assert not (tmp_path / "cache").exists()


def test_data_directory_without_the_file_falls_back_to_the_download(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("RNNFAST_DATA", str(tmp_path))
    assert load_corpus("whale", cache_dir=tmp_path / "elsewhere") == CONTENT.decode()
    assert (tmp_path / "elsewhere" / "whale.txt").is_file()


def test_data_directory_that_does_not_exist(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("RNNFAST_DATA", str(tmp_path / "missing"))
    with pytest.raises(CorpusError, match=r"RNNFAST_DATA is '.*missing', which is not a directory"):
        load_corpus("whale")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CONTENT[:-3], rf"truncated: {len(CONTENT) - 3} bytes of {len(CONTENT)}"),
        (b"", "truncated: 0 bytes"),
        (CONTENT.replace(b"Ishmael", b"Ishmail"), "not the text it should be: sha256 .* expected, .* found"),
        (CONTENT + b"more", "not the text it should be"),
    ],
)
@pytest.mark.parametrize("place", ["data", "cache", "download"])
def test_other_bytes_are_refused_wherever_they_are(corpus, tmp_path, monkeypatch, content, message, place):
    cache = tmp_path / "cache" / "rnnfast"
    folder = {"data": tmp_path / "data", "cache": cache, "download": source_of(corpus).parent}[place]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "whale.txt").write_bytes(content)
    if place == "data":
        monkeypatch.setenv("RNNFAST_DATA", str(folder))
    with pytest.raises(CorpusError, match=message):
        load_corpus("whale")
    if place == "download":
        assert not cache.exists(), "a bad download must not be kept"


def test_offline_says_what_to_do(corpus):
    source_of(corpus).unlink()
    with pytest.raises(CorpusError) as error:
        load_corpus("whale")
    for part in ("whale.txt", corpus.url, corpus.sha256, "RNNFAST_DATA (not set)", "python-docs"):
        assert part in str(error.value)


class Server(http.server.BaseHTTPRequestHandler):
    """Promises the whole file and hangs up early, or has nothing at all."""

    def do_GET(self):
        if self.path == "/gone.txt":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT if self.path == "/whole.txt" else CONTENT[:10])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """The address of a web server on this machine."""
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/whole.txt", None),
        ("/cut.txt", f"truncated: 10 bytes of {len(CONTENT)}|could not be downloaded"),
        ("/gone.txt", "could not be downloaded from .*HTTP Error 404"),
    ],
)
def test_download_over_http(corpus, server, monkeypatch, path, message):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(text, "CORPORA", {"whale": dataclasses.replace(corpus, url=server + path)})
    if message is None:
        assert load_corpus("whale") == CONTENT.decode()
    else:
        with pytest.raises(CorpusError, match=message):
            load_corpus("whale")


def test_no_download_when_not_wanted(corpus):
    with pytest.raises(CorpusError, match=r"put whale\.txt"):
        load_corpus("whale", download=False)


def test_cache_that_cannot_be_written(corpus, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CorpusError, match="cannot be kept in"):
        load_corpus("whale", cache_dir=tmp_path / "file" / "cache")


@pytest.mark.parametrize("name", [name for name, corpus in CORPORA.items() if corpus.file_name and not corpus.url])
def test_edited_copies_are_never_downloaded(name, tmp_path, monkeypatch):
    monkeypatch.delenv("RNNFAST_DATA", raising=False)
    with pytest.raises(CorpusError, match="no public address has this edited copy"):
        load_corpus(name, cache_dir=tmp_path)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(CorpusError, match=r"'moby-dick' is neither a file nor one of .*python-docs, time-machine"):
        load_corpus("moby-dick")


def test_local_file(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("a \u00fc", encoding="utf-8")
    assert load_corpus(path) == load_corpus(str(path)) == "a \u00fc"
    path.write_bytes("a \u00fc".encode("latin-1"))
    with pytest.raises(CorpusError, match=r"notes\.txt is not UTF-8 text"):
        load_corpus(path)


def test_python_docs_needs_no_file(tmp_path, monkeypatch):
    monkeypatch.delenv("RNNFAST_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    letters = letters_only(load_corpus("python-docs", download=False))
    assert len(letters) > 200_000
    assert set(letters) == set(" abcdefghijklmnopqrstuvwxyz")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not os.environ.get("RNNFAST_DATA"), reason="RNNFAST_DATA is not set")
@pytest.mark.parametrize(
    ("name", "characters"),
    [
        ("time-machine", 173_428),
        ("war-of-the-worlds", 327_358),
        ("frankenstein", 407_719),
        ("tiny-shakespeare", 1_059_581),
    ],
)
def test_real_corpora(name, characters):
    """The Time Machine's count is the one that Dive into Deep Learning states."""
    letters = letters_only(load_corpus(name, download=False))
    assert len(letters) == characters
    assert len(Vocab(letters)) == 28


def test_corpora_are_described_completely():
    for name, corpus in CORPORA.items():
        assert corpus.name == name
        if corpus.file_name:
            assert len(corpus.sha256) == 64
            assert corpus.num_bytes > 0


def test_letters_only():
    assert letters_only("The Time--Machine,\n[1898]  by H. G. Wells") == "the time machine by h g wells"
    assert letters_only("\u00e9\u00df1") == " "
    assert letters_only("") == ""


def test_vocab_round_trip():
    vocab = Vocab("hello world")
    assert vocab.tokens == (UNKNOWN, *sorted(set("hello world")))
    ids = vocab.encode("hello world")
    assert ids.dtype == torch.int64
    assert ids.shape == (11,)
    assert "".join(vocab.decode(ids)) == "hello world"
    assert vocab.decode(vocab.encode("hex")) == ["h", "e", UNKNOWN]
    assert vocab.encode("").shape == (0,)
    assert vocab.decode([]) == []


def test_vocab_of_words_and_unknown():
    vocab = Vocab(["the", "time", UNKNOWN, "the"])
    assert vocab.tokens == (UNKNOWN, "the", "time")
    assert vocab.encode(["time", "traveller"]).tolist() == [2, 0]


@pytest.mark.parametrize("number", [-1, 3])
def test_vocab_number_out_of_range(number):
    with pytest.raises(IndexError, match=rf"token number {number} is out of range for a vocabulary of 3"):
        Vocab("ab").decode([0, number])


def test_vocab_counts_and_min_frequency():
    vocab = Vocab("abracadabra", min_frequency=2)
    assert vocab.tokens == (UNKNOWN, "a", "b", "r")
    assert vocab.counts == (2, 5, 2, 2)
    assert Vocab([*"aab", UNKNOWN, UNKNOWN]).counts == (2, 2, 1)
    with pytest.raises(ValueError, match="min_frequency: expected at least 1, got 0"):
        Vocab("ab", min_frequency=0)


def test_vocab_is_saved_and_loaded(tmp_path):
    vocab = Vocab(["the", "\u00e9t\u00e9", '"', "\ud800", "the"], min_frequency=1)
    vocab.save(tmp_path / "vocab.json")
    loaded = Vocab.load(tmp_path / "vocab.json")
    assert (loaded.tokens, loaded.counts) == (vocab.tokens, vocab.counts)
    assert loaded.encode(["the", "new"]).tolist() == vocab.encode(["the", "new"]).tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["vocab.json"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[1, 2]",
        b'{"tokens": ["<unk>", "a"]}',
        b'{"tokens": ["<unk>", "a"], "counts": [1]}',
        b'{"tokens": ["a", "b"], "counts": [1, 1]}',
        b'{"tokens": ["<unk>", "a", "a"], "counts": [0, 1, 1]}',
        b'{"tokens": ["<unk>", 3], "counts": [0, 1]}',
        b'{"tokens": ["<unk>", "a"], "counts": [0, "x"]}',
        b"\xff\xfe",
    ],
)
def test_files_that_are_no_vocabulary(tmp_path, content):
    (tmp_path / "vocab.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"vocab\.json is not a saved vocabulary"):
        Vocab.load(tmp_path / "vocab.json")


def test_tokenize():
    assert tokenize("a  b\nc") == ["a", " ", " ", "b", "\n", "c"]
    assert tokenize("a  bc\nd", "word") == ["a", "bc", "d"]
    with pytest.raises(ValueError, match="level: expected 'char' or 'word', got 'line'"):
        tokenize("a", "line")


def test_windows():
    windows = Windows(torch.arange(20), 5, first=3, count=10)
    assert len(windows) == 10
    x, y = windows[2]
    assert (x.tolist(), y.tolist()) == ([5, 6, 7, 8, 9], [6, 7, 8, 9, 10])
    x, y = windows.__getitems__([0, 9])
    assert x.t().tolist() == [[3, 4, 5, 6, 7], [12, 13, 14, 15, 16]]
    assert y.equal(x + 1)
    assert len(Windows(torch.arange(20), 5)) == 15
    assert Windows(torch.arange(20), 5)[14][1].tolist() == [15, 16, 17, 18, 19]
    for index in (-1, 10):
        with pytest.raises(IndexError, match="expected 0 to 9"):
            windows[index]


def test_random_windows_come_once_each():
    loader = window_loader(Windows(torch.arange(40), 6), 8, generator=torch.Generator().manual_seed(0))
    batches = list(loader)
    assert [x.shape for x, _ in batches] == [(6, 8)] * 4 + [(6, 2)]
    assert all(y.equal(x + 1) for x, y in batches)
    starts = torch.cat([x[0] for x, _ in batches])
    assert sorted(starts.tolist()) == list(range(34))
    assert starts.tolist() != sorted(starts.tolist())
    repeated = window_loader(Windows(torch.arange(40), 6), 8, generator=torch.Generator().manual_seed(0))
    assert all(a[0].equal(b[0]) for a, b in zip(batches, repeated, strict=True))
    in_order = next(iter(window_loader(Windows(torch.arange(40), 6), 8, shuffle=False)))
    assert in_order[0][0].tolist() == list(range(8))


def test_validation_windows_share_nothing_with_training():
    train, validation = split_windows(torch.arange(100), 8, 40, 30)
    assert (len(train), len(validation)) == (40, 30)
    assert train[39][1].max() < validation[0][0].min()
    train, validation = split_windows(torch.arange(20_000), 32)
    assert (len(train), len(validation)) == (10_000, 5_000)


@pytest.mark.parametrize("offset", [0, 3])
def test_partitions_go_on_where_they_ended(offset):
    partitions = Partitions(torch.arange(53), 4, 3, offset=offset)
    batches = list(DataLoader(partitions, batch_size=None))
    assert len(batches) == len(partitions) == 4
    assert batches[0][0][0, 0] == offset
    for (x, y), (following, _) in itertools.pairwise(batches):
        assert x.shape == (4, 3)
        assert y.equal(x + 1)
        assert following[0].equal(y[-1])
    columns = torch.cat([x for x, _ in batches]).t()
    assert len(columns.unique()) == columns.numel()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Windows(torch.arange(5), 5), "a text of 5 tokens has 0"),
        (lambda: Windows(torch.arange(9), 5, count=5), "a text of 9 tokens has 4"),
        (lambda: Windows(torch.arange(9), 5, first=-1), "from -1 on"),
        (lambda: Windows(torch.arange(9), 5, count=0), "count 0"),
        (lambda: Windows(torch.arange(9.0), 5), r"tokens: expected int64 \[length\], got torch.float32"),
        (lambda: Windows(torch.zeros(3, 3, dtype=torch.int64), 5), r"got torch.int64 \[3, 3\]"),
        (lambda: Windows(torch.arange(9), 0), "num_steps: expected at least 1"),
        (lambda: Partitions(torch.arange(12), 4, 3), "need 13 tokens, the text has 12"),
        (lambda: Partitions(torch.arange(13), 4, 3, offset=1), "need 14 tokens, the text has 13"),
        (lambda: Partitions(torch.arange(13), 4, 0), "a batch_size of at least 1"),
        (lambda: split_windows(torch.arange(60), 8, 40, 30), "a text of 60 tokens has"),
    ],
)
def test_texts_that_are_too_short(make, match):
    with pytest.raises(ValueError, match=match):
        make()
