"""The experiments of Dive into Deep Learning's recurrent chapters, one command each.

`python benchmarks/d2l.py NAME` trains the models of an experiment at the book's sizes, prints a table and writes it
with a plot and the generated texts; `--quick` takes about a minute; `--impl torch` does the same with torch.nn, one-hot
rows, plain cross entropy and Python loops over the layer. A run that was killed goes on where it was when the command
is given again, to the same result.

Units: perplexity is exp of the mean cross entropy in nats per token, over held-out windows unless a column says
otherwise. Times are CPU seconds of the process, all its threads together (time.process_time), because a machine shared
with other work makes wall seconds worthless; on one thread, the default, they are what an idle machine would need.
cpu_seconds are those of a model's whole experiment: training epochs, validation, other books, texts, forecasts.
"""

import argparse
import contextlib
import csv
import dataclasses
import fnmatch
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import describe_run, make_output_folder, positive_int
from torch import Tensor, nn
from torch.nn import functional as F

import rnnfast
from rnnfast import RNNLM, RNNAutoRegression
from rnnfast.forecast import load_series, noisy_sine
from rnnfast.lm import detach_state
from rnnfast.text import (
    CORPORA,
    CorpusError,
    Partitions,
    Vocab,
    Windows,
    _store,
    letters_only,
    load_corpus,
    split_windows,
    tokenize,
    window_loader,
)
from rnnfast.train import NonFiniteLossError, fit

CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "gru": ("GRU", {}),
    "lstm": ("LSTM", {}),
}
LETTERS = " abcdefghijklmnopqrstuvwxyz"  # one vocabulary for every book, so that a model of one can read another
PROMPT = "time traveller"
OTHER_BOOKS = ("war-of-the-worlds", "frankenstein")


@dataclass(frozen=True)
class LanguageModel:
    """A model and how it is trained; the defaults are those of the book.

    `windows` are taken at random places of the text. `partition`, "random" or "consecutive", cuts it into windows side
    by side instead, shuffled or read in order with the state carried over, of the first `num_tokens` tokens.
    """

    name: str
    cell: str
    learning_rate: float
    epochs: int
    corpus: str = "time-machine"
    level: str = "char"
    num_steps: int = 32
    hidden_size: int = 32
    num_layers: int = 1
    bidirectional: bool = False
    embedding_dim: int | None = None
    reset_after: bool = True
    gates: str = "both"
    clip: float | None = 1.0
    batch_size: int = 1024
    num_train: int = 10_000
    num_validation: int = 5_000
    partition: str | None = None
    num_tokens: int | None = None
    books: tuple[str, ...] = ()
    alphas: tuple[float, ...] = ()
    costs: bool = False

    @property
    def is_variant(self) -> bool:
        """Whether the cell is one that torch.nn lacks."""
        return not self.reset_after or self.gates != "both"

    @property
    def work(self) -> float:
        """A rough measure of the time of an epoch, to tell how much is left."""
        gates = {"rnn": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}[self.cell]
        windows = self.num_train if self.num_tokens is None else self.num_tokens / self.num_steps
        vocab_size = 4_600 if self.level == "word" else 28
        layers = self.num_layers * (1 + self.bidirectional)
        token = layers * gates * self.hidden_size * (self.hidden_size + 60) + 50 * vocab_size + 2_600
        return windows * self.num_steps * token


@dataclass(frozen=True)
class Forecast:
    """A model of a series: from the last tau values, or the whole past. `share` of the series is trained on."""

    name: str
    cell: str
    series: str
    epochs: int
    tau: int | None = None
    hidden_size: int = 32
    learning_rate: float = 0.01
    share: float = 0.6
    steps: tuple[int, ...] = (1, 4, 16, 64)
    is_variant = False

    @property
    def work(self) -> float:
        """A rough measure of the time of an epoch, to tell how much is left."""
        return 2e7


Setting = LanguageModel | Forecast
Result = dict[str, Any]


# --- Language models --------------------------------------------------------------------------------------------------


def read_tokens(setting: LanguageModel, corpus: str | None = None) -> tuple[Vocab, Tensor, int]:
    """Returns the vocabulary, the tokens of a book, int64 [length], and the number of its characters."""
    text = letters_only(load_corpus(corpus or setting.corpus))
    tokens = tokenize(text, setting.level)
    vocab = Vocab(LETTERS if setting.level == "char" else tokens)
    return vocab, vocab.encode(tokens), len(text)


class Trained:
    """A model in the hands of one implementation: its loss and its way to write, of torch.nn or of rnnfast."""

    def __init__(self, setting: LanguageModel, vocab: Vocab, impl: str, seed: int) -> None:
        torch.manual_seed(seed)
        class_name, options = CELLS[setting.cell]
        if setting.is_variant:
            options = {"reset_after": setting.reset_after, "gates": setting.gates}
        rnn = getattr(nn if impl == "torch" else rnnfast, class_name)(
            setting.embedding_dim or len(vocab),
            setting.hidden_size,
            num_layers=setting.num_layers,
            bidirectional=setting.bidirectional,
            **options,
        )
        self.model = RNNLM(rnn, len(vocab), setting.embedding_dim)
        self.is_plain, self.vocab, self.level = impl == "torch", vocab, setting.level

    def loss(self, tokens: Tensor, targets: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Returns the mean cross entropy of tokens [T, N] and the new state."""
        if not self.is_plain:
            return self.model.loss(tokens, targets, state)
        scores, state = self.model(tokens, state)
        return F.cross_entropy(scores.flatten(0, 1), targets.flatten()), state

    def perplexity(self, windows: Windows, indices: Iterable[int] | None = None) -> float:
        """Returns that of windows, all or those of the indices."""
        chosen = list(range(len(windows)) if indices is None else indices)
        total = 0.0
        with torch.no_grad():
            for first in range(0, len(chosen), 1024):
                part = chosen[first : first + 1024]
                total += self.loss(*windows.__getitems__(part))[0].item() * len(part)
        return math.exp(total / len(chosen))

    def write(self, prompt: str, num_tokens: int, alpha: float | None, seed: int) -> str:
        """Returns the prompt and what follows it: the likeliest tokens, or drawn from p^alpha."""
        ids = self.vocab.encode(tokenize(prompt, self.level))[:, None]
        generator = torch.Generator().manual_seed(seed)
        if self.is_plain:
            written = self._plain_loop(ids, num_tokens, alpha, generator)
        else:
            choice = {} if alpha is None else {"sample": True, "alpha": alpha, "generator": generator}
            written = self.model.generate(ids, num_tokens, **choice).tokens[:, 0]
        gap = "" if self.level == "char" else " "
        return prompt + gap + gap.join(self.vocab.decode(written))

    def _plain_loop(self, tokens: Tensor, num_tokens: int, alpha: float | None, generator: torch.Generator) -> Tensor:
        written = []
        with torch.no_grad():
            scores, state = self.model(tokens)
            for _ in range(num_tokens):
                last = scores[-1]
                if alpha is None:
                    token = last.argmax(-1, keepdim=True)
                else:
                    token = torch.multinomial(torch.softmax(alpha * last, -1), 1, generator=generator)
                written.append(token[0])
                scores, state = self.model(token, state)
        return torch.cat(written)


def saved_bytes(trained: Trained, batch: tuple[Tensor, Tensor]) -> int:
    """Returns the memory that one training step keeps between its forward and its backward pass."""
    seen: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in trained.model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss, _ = trained.loss(*batch)
    loss.backward()
    trained.model.zero_grad()
    return sum(seen.values())


def text_figures(text: str, book: str) -> Result:
    """Returns the share of a text's words that the book has, and the share of different ones among them."""
    words, known = text.split()[1:-1], set(book.split())
    return {
        "known_words": round(sum(word in known for word in words) / max(len(words), 1), 3),
        "distinct_words": round(len(set(words)) / max(len(words), 1), 3),
    }


def train_language_model(
    setting: LanguageModel, impl: str, seed: int, folder: Path, tell: Callable[[int, str], None]
) -> Result:
    vocab, tokens, num_characters = read_tokens(setting)
    trained = Trained(setting, vocab, impl, seed)
    validation = None
    state: Any = None
    if setting.partition is None:
        train, validation = split_windows(tokens, setting.num_steps, setting.num_train, setting.num_validation)
    else:
        tokens = tokens[: setting.num_tokens]
        train = Windows(tokens, setting.num_steps)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal state
        generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
        if setting.partition is None:
            yield from window_loader(train, setting.batch_size, generator=generator)
            return
        offset = int(torch.randint(setting.num_steps, (), generator=generator))
        if setting.partition == "consecutive":
            state = None
            yield from Partitions(tokens, setting.num_steps, setting.batch_size, offset=offset)
            return
        starts = torch.arange(offset, len(train), setting.num_steps)
        starts = starts[torch.randperm(len(starts), generator=generator)]
        for part in starts[: len(starts) // setting.batch_size * setting.batch_size].split(setting.batch_size):
            yield train.__getitems__(part.tolist())

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal state
        value, new = trained.loss(*batch, state)
        if setting.partition == "consecutive":
            state = detach_state(new)
        return value

    result = train_with(trained.model, batches, loss, setting, folder, tell, validation, trained, vocab)
    if "stopped" in result:
        return result
    result["parameters"] = sum(parameter.numel() for parameter in trained.model.parameters())
    if validation is not None and setting.level == "word":
        per_word = num_characters / len(tokens)
        result["nats_per_character"] = round(math.log(result["perplexity"]) / per_word, 4)
    elif validation is not None:
        result["nats_per_character"] = round(math.log(result["perplexity"]), 4)
    start = time.process_time()
    for book in setting.books:
        _, others, _ = read_tokens(setting, book)
        windows = Windows(others, setting.num_steps)
        indices = range(0, len(windows), setting.num_steps)
        result[f"perplexity_{book}"] = round(trained.perplexity(windows, indices), 4)
    if not setting.bidirectional:
        book_text = letters_only(load_corpus(setting.corpus))
        length = 20 if setting.level == "word" else 100
        result["texts"] = {"greedy": trained.write(PROMPT, length, None, seed)}
        for alpha in setting.alphas:
            result["texts"][f"alpha {alpha:g}"] = trained.write(PROMPT, 1000, alpha, seed)
        if setting.alphas:
            result["texts"]["greedy"] = trained.write(PROMPT, 1000, None, seed)
            result["text_figures"] = {name: text_figures(text, book_text) for name, text in result["texts"].items()}
    result["cpu_seconds"] = round(result["cpu_seconds"] + time.process_time() - start, 3)
    if setting.costs:
        batch = train.__getitems__(range(min(setting.batch_size, len(train))))
        result["saved_megabytes"] = round(saved_bytes(trained, batch) / 1e6, 2)
        with torch.no_grad():
            result["inference_cpu_ms"] = round(1e3 * quickest(lambda: trained.model(batch[0])), 3)
        if not setting.bidirectional:
            result["characters_per_cpu_second"] = round(500 / quickest(lambda: trained.write(PROMPT, 500, None, seed)))
    return result


def quickest(call: Callable[[], object]) -> float:
    """Returns the median CPU seconds of a few calls after one that is not timed."""
    call()
    times = []
    for _ in range(5):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return statistics.median(times)


# --- Training, of either kind -----------------------------------------------------------------------------------------


def short(value: float) -> float | None:
    """Returns six digits of a number, None for NaN, which JSON lacks."""
    return None if math.isnan(value) else float(f"{value:.6g}")


def train_with(
    model: nn.Module,
    batches: Callable[[int], Iterable[Any]],
    loss: Callable[[Any], Tensor],
    setting: Setting,
    folder: Path,
    tell: Callable[[int, str], None],
    validation: Windows | None = None,
    trained: Trained | None = None,
    vocab: Vocab | None = None,
) -> Result:
    """Trains with a folder of checkpoints; returns the log, the CPU seconds and the perplexities, or why it stopped."""
    is_language = isinstance(setting, LanguageModel)
    optimizer: torch.optim.Optimizer
    if is_language:
        optimizer = torch.optim.SGD(model.parameters(), lr=setting.learning_rate)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=setting.learning_rate)
    clock = folder / "seconds.json"
    # The CPU seconds of epochs of an earlier call; a kill between a checkpoint and this file loses one, not the others.
    seconds = {int(k): v for k, v in json.loads(clock.read_text()).items()} if clock.is_file() else {}
    start = time.process_time()

    def after(entry: Any) -> None:
        nonlocal start
        seconds[entry.epoch] = time.process_time() - start
        _store(json.dumps(seconds).encode(), clock)
        measure = entry.loss if math.isnan(entry.validation) else entry.validation
        tell(entry.epoch, f"{measure:.3g}")
        start = time.process_time()

    options: dict[str, Any] = {"epochs": setting.epochs, "folder": folder, "after_epoch": after, "vocab": vocab}
    if is_language:
        options["clip"] = setting.clip
    if validation is not None and trained is not None:
        options["validate"] = lambda: trained.perplexity(validation)
    try:
        log = fit(model, batches, loss, optimizer, **options)
    except NonFiniteLossError as error:
        return {"stopped": str(error).split(";")[0]}
    except OverflowError:  # exp of a validation loss beyond what a perplexity can be
        return {"stopped": "the perplexity of the validation windows is too large for a number"}
    tell(setting.epochs, "done")
    result: Result = {
        "cpu_seconds": round(statistics.mean(seconds.values()) * len(log), 3),
        "log": [[short(entry.loss), short(entry.validation)] for entry in log],
    }
    if is_language:
        result["train_perplexity"] = round(math.exp(min(log[-1].loss, 700.0)), 4)
    if validation is not None:
        result["perplexity"] = round(log[-1].validation, 4)
    return result


# --- Forecasts --------------------------------------------------------------------------------------------------------


def read_series(name: str, seed: int) -> Tensor:
    """Returns the values, float32 [T]."""
    return noisy_sine(generator=torch.Generator().manual_seed(seed)) if name == "sine" else load_series(name)


def train_forecast(setting: Forecast, impl: str, seed: int, folder: Path, tell: Callable[[int, str], None]) -> Result:
    series = read_series(setting.series, seed)
    split = int(setting.share * len(series))
    torch.manual_seed(seed)
    class_name, options = CELLS[setting.cell]
    rnn = getattr(nn if impl == "torch" else rnnfast, class_name)(1, setting.hidden_size, **options)
    model = RNNAutoRegression(rnn, setting.tau)
    model.fit_scaling(series[:split])

    result = train_with(model, lambda epoch: [series[:split]], lambda part: model.loss(part)[0], setting, folder, tell)
    if "stopped" in result:
        return result
    most = max(setting.steps)
    start = time.process_time()
    predicted = forecasts(model, series, split, most, impl == "torch")
    result["forecast_cpu_seconds"] = round(time.process_time() - start, 4)
    result["cpu_seconds"] = round(result["cpu_seconds"] + result["forecast_cpu_seconds"], 3)
    wanted = series.unfold(0, most, 1)[split:]  # [origins, most]
    spread = float(series[:split].std())
    for step in setting.steps:
        error = (predicted[step - 1] - wanted[: predicted.shape[1], step - 1]).square().mean().sqrt().item()
        result[f"error_{step}"] = round(error / spread, 4)
    result["curves"] = {
        "series": [round(v, 4) for v in series.tolist()],
        "split": split,
        "steps": {str(step): [round(v, 4) for v in predicted[step - 1].tolist()] for step in setting.steps},
    }
    return result


def forecasts(model: RNNAutoRegression, series: Tensor, split: int, most: int, plain: bool) -> Tensor:
    """Returns the values 1 to `most` steps after each origin, the first of which stands at `split`: [most, origins].

    An origin is predicted from the values before it: the last tau of them, or as many as half the training part has.
    """
    length = model.tau or split // 2
    origins = len(series) - split - most + 1
    pasts = series.unfold(0, length, 1)[split - length : split - length + origins].t().contiguous()  # [length, origins]
    with torch.no_grad():
        if not plain:
            return model.forecast(pasts, most).mean
        scaled = ((pasts - model.shift) / model.spread)[..., None]
        values, state = [], None
        for step in range(most):
            if model.tau is not None:
                hidden, _ = model.rnn(scaled[-model.tau :])
            else:
                hidden, state = model.rnn(scaled if step == 0 else scaled[-1:], state)
            value = model.output(hidden[-1])
            values.append(value[:, 0])
            scaled = torch.cat([scaled, value[None]])
        return torch.stack(values) * model.spread + model.shift


# --- The experiments --------------------------------------------------------------------------------------------------

BOOK = {"rnn": (1.0, 100), "gru": (4.0, 50), "lstm": (4.0, 50)}  # learning rate and epochs of the book's models


def of_book(name: str, cell: str, **changes: Any) -> LanguageModel:
    """Returns the book's model of a cell, or one that differs from it in what is said."""
    rate, epochs = BOOK["rnn" if cell == "rnn_relu" else cell]
    return LanguageModel(**{"name": name, "cell": cell, "learning_rate": rate, "epochs": epochs} | changes)


def grid() -> list[Setting]:
    return [
        LanguageModel(f"{cell} T={steps} H={hidden} lr={rate:g}", cell, rate, 30, num_steps=steps, hidden_size=hidden)
        for cell in BOOK
        for steps in (8, 16, 32, 64, 128)
        for hidden in (8, 16, 32, 64, 128)
        for rate in (0.01, 0.1, 1.0, 10.0)
    ]


def partitions() -> list[Setting]:
    """Returns the models of the book's earlier edition."""
    size = {"num_steps": 35, "batch_size": 32, "hidden_size": 256, "num_tokens": 10_000, "epochs": 500}
    return [
        of_book(f"{cell} {kind}", cell, learning_rate=1.0, partition=kind, **size)
        for cell in BOOK
        for kind in ("random", "consecutive")
    ]


@dataclass(frozen=True)
class Experiment:
    """One question: the models that answer it, what the table shows, and the settings of `--quick`."""

    title: str
    settings: Callable[[], list[Setting]]
    columns: tuple[str, ...]
    quick_epochs: int
    note: str = ""


COMMON = ("cpu_seconds", "perplexity", "train_perplexity")
EXPERIMENTS: dict[str, Experiment] = {
    "grid": Experiment(
        "Steps, hidden units and learning rate of RNN, GRU and LSTM", grid, COMMON, 6, "lowest perplexity of the rates"
    ),
    "cells": Experiment(
        "What RNN, GRU and LSTM of one hidden size cost and reach",
        lambda: [of_book(cell, cell, costs=True) for cell in BOOK],
        (*COMMON, "parameters", "saved_megabytes", "inference_cpu_ms", "characters_per_cpu_second"),
        40,
    ),
    "tokens": Experiment(
        "One-hot rows against a learned embedding, characters against words",
        lambda: [
            of_book("one-hot characters", "gru"),
            of_book("embedded characters", "gru", embedding_dim=32),
            of_book("one-hot words", "gru", level="word", batch_size=256),
            of_book("embedded words", "gru", level="word", batch_size=256, embedding_dim=32),
        ],
        (*COMMON, "nats_per_character", "parameters"),
        3,
    ),
    "books": Experiment(
        "A model of one book reading others",
        lambda: [
            of_book("embedded rnn", "rnn", embedding_dim=32, books=OTHER_BOOKS),
            of_book("gru", "gru", books=OTHER_BOOKS),
            of_book("lstm", "lstm", books=OTHER_BOOKS),
        ],
        (*COMMON, *(f"perplexity_{book}" for book in OTHER_BOOKS)),
        30,
    ),
    "sampling": Experiment(
        "Greedy against sampled text",
        lambda: [of_book("gru", "gru", hidden_size=256, epochs=50, alphas=(1.0, 2.0, 5.0, 30.0))],
        (*COMMON,),
        4,
    ),
    "clipping": Experiment(
        "With and without gradient clipping, tanh against ReLU, at the book's learning rate and a larger one",
        lambda: [
            of_book(f"{cell} lr={rate:g} {'clipped' if clip else 'not clipped'}", cell, clip=clip, learning_rate=rate)
            for cell in ("rnn", "rnn_relu")
            for rate in (1.0, 3.0)
            for clip in (1.0, None)
        ],
        (*COMMON, "stopped"),
        20,
    ),
    "gates": Experiment(
        "GRU with only a reset gate, only an update gate, both; the reset gate before or after the product",
        lambda: [
            of_book("both gates", "gru"),
            of_book("both, reset before the product", "gru", reset_after=False),
            of_book("reset gate only", "gru", gates="reset"),
            of_book("reset gate only, before the product", "gru", gates="reset", reset_after=False),
            of_book("update gate only", "gru", gates="update"),
        ],
        (*COMMON, "parameters", "stopped"),
        25,
    ),
    "depth": Experiment(
        "One and two layers, one and two directions",
        lambda: [
            of_book("one layer", "gru", learning_rate=2.0, epochs=100),
            of_book("two layers", "gru", learning_rate=2.0, epochs=100, num_layers=2),
            of_book("two directions", "gru", learning_rate=2.0, epochs=100, bidirectional=True),
        ],
        (*COMMON, "parameters"),
        20,
        "a model of two directions has seen the token it is to predict: its perplexity is not comparable",
    ),
    "partitions": Experiment(
        "Random against consecutive windows, the state carried over (sizes of the book's earlier edition)",
        partitions,
        ("cpu_seconds", "train_perplexity"),
        15,
    ),
    "forecasts": Experiment(
        "A noisy sine and three measured series, 1, 4, 16 and 64 steps ahead",
        lambda: [
            *(Forecast(f"sine {cell} tau=4", cell, "sine", 1000, tau=4) for cell in BOOK),
            *(
                Forecast(f"{series} {cell}", cell, series, 1000)
                for series in ("sine", "sunspots", "el-nino", "co2")
                for cell in BOOK
            ),
        ],
        ("cpu_seconds", "forecast_cpu_seconds", "error_1", "error_4", "error_16", "error_64"),
        25,
        "errors are root mean squares over the standard deviation of the training part",
    ),
}


def settings_of(name: str, options: argparse.Namespace) -> list[Setting]:
    """Returns the models of an experiment, smaller with --quick."""
    experiment = EXPERIMENTS[name]
    settings = experiment.settings()
    if options.quick:
        settings = [dataclasses.replace(setting, epochs=experiment.quick_epochs) for setting in settings]
        if name == "grid":
            settings = [s for s in settings if s.num_steps in (8, 32) and s.hidden_size in (8, 32)]
            settings = [s for s in settings if s.learning_rate in (1.0, 10.0)]
    if options.epochs is not None:
        settings = [dataclasses.replace(setting, epochs=options.epochs) for setting in settings]
    if options.cell is not None:
        settings = [setting for setting in settings if setting.cell in options.cell]
    if options.models is not None:
        settings = [s for s in settings if any(fnmatch.fnmatchcase(s.name, pattern) for pattern in options.models)]
    if options.corpus is not None:
        settings = [
            dataclasses.replace(setting, corpus=options.corpus) if isinstance(setting, LanguageModel) else setting
            for setting in settings
        ]
    return settings


# --- Tables, plots, texts ---------------------------------------------------------------------------------------------


def cell_text(value: Any) -> str:
    """Returns a value as the table shows it."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def format_table(rows: list[Result], columns: tuple[str, ...]) -> str:
    """Returns the printed table."""
    lines = [["model", *columns], *([row["name"], *(cell_text(row.get(c)) for c in columns)] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns) + 1)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(line[i].rjust(widths[i]) for i in range(1, len(line)))])
        for line in lines
    )


def compare(rows: list[Result], others: list[Result], impl: str) -> list[str]:
    """Returns, for each model that the other implementation trained too, the ratio of the times and both results."""
    by_name = {row["name"]: row for row in others}
    lines = []
    for row in rows:
        other = by_name.get(row["name"])
        if other is None or not row.get("cpu_seconds") or not other.get("cpu_seconds"):
            continue
        ours, theirs = (row, other) if impl == "rnnfast" else (other, row)
        measure = next((m for m in ("perplexity", "train_perplexity", "error_1") if m in ours), None)
        reached = f", {measure} {cell_text(ours[measure])} against {cell_text(theirs[measure])}" if measure else ""
        ratio = theirs["cpu_seconds"] / ours["cpu_seconds"]
        lines.append(f"{row['name']}: torch.nn's CPU time over rnnfast's {ratio:.2f}{reached}")
    return lines


def write_results(folder: Path, stem: str, name: str, impl: str, rows: list[Result]) -> None:
    """Writes the table (.csv), nearly everything (.json), and the texts (.txt).

    The .json describes every call that trained a model, and says of each model which of them it was. The forecast
    series stay with the checkpoints.
    """
    columns = EXPERIMENTS[name].columns
    with open(folder / f"{stem}.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", *columns])
        writer.writerows([row["name"], *(row.get(column, "") for column in columns)] for row in rows)
    runs: list[Result] = []
    results = []
    for row in rows:
        if row["run"] not in runs:
            runs.append(row["run"])
        results.append({k: v for k, v in row.items() if k != "curves"} | {"run": runs.index(row["run"])})
    summary = {"experiment": name, "impl": impl, "runs": runs, "results": results}
    (folder / f"{stem}.json").write_text(json.dumps(summary) + "\n")
    texts = "".join(
        f"{row['name']}, {kind}:\n{text}\n\n" for row in rows for kind, text in row.get("texts", {}).items()
    )
    if texts:
        (folder / f"{stem}.txt").write_text(texts)


def measured_on(rows: list[Result]) -> str:
    """Returns threads, machine and commit of the calls that trained the models."""
    said = (f"{row['run']['threads']} thread(s), {row['run']['machine']}, {row['run']['git_sha'][:12]}" for row in rows)
    return "; ".join(dict.fromkeys(said))


def draw(path: Path, name: str, rows: list[Result], title: str) -> None:
    """Draws the experiment's picture: heat maps of the grid, curves of the others."""
    from matplotlib.figure import Figure  # files only: works without a display

    rows = [row for row in rows if "stopped" not in row]
    if not rows:
        return
    if name == "grid":
        cells = list(dict.fromkeys(row["setting"]["cell"] for row in rows))
        figure = Figure(figsize=(1 + 4 * len(cells), 4), layout="constrained")
        for panel, cell in zip(figure.subplots(1, len(cells), squeeze=False)[0], cells, strict=True):
            draw_heat_map(panel, [row for row in rows if row["setting"]["cell"] == cell])
            panel.set_title(cell)
    elif name == "forecasts":
        series = list(dict.fromkeys(row["setting"]["series"] for row in rows))
        figure = Figure(figsize=(11, 2.8 * len(series)), layout="constrained")
        for panel, one in zip(figure.subplots(len(series), 1, squeeze=False)[:, 0], series, strict=True):
            draw_forecast(panel, min((r for r in rows if r["setting"]["series"] == one), key=lambda r: r["error_1"]))
    else:
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        panel = figure.subplots()
        for row in rows:
            curve = [loss if validation is None else math.log(validation) for loss, validation in row["log"]]
            panel.plot(range(1, len(curve) + 1), [math.exp(min(value, 700)) for value in curve], label=row["name"])
        held_out = rows[0]["log"][-1][1] is not None
        panel.set(xlabel="epoch", ylabel=f"{'validation' if held_out else 'training'} perplexity", yscale="log")
        panel.grid(alpha=0.3, which="both")
        panel.legend(fontsize="small")
    figure.suptitle(title, fontsize="small")
    figure.savefig(path, dpi=110)


def draw_heat_map(panel: Any, rows: list[Result]) -> None:
    """Draws the lowest perplexity of all learning rates, steps against hidden units, with the rate that reached it."""
    steps = sorted({row["setting"]["num_steps"] for row in rows})
    units = sorted({row["setting"]["hidden_size"] for row in rows})
    best: dict[tuple[int, int], Result] = {}
    for row in rows:
        key = row["setting"]["num_steps"], row["setting"]["hidden_size"]
        if key not in best or row["perplexity"] < best[key]["perplexity"]:
            best[key] = row
    values = [[best[t, h]["perplexity"] if (t, h) in best else math.nan for h in units] for t in steps]
    box = {"facecolor": "white", "alpha": 0.6, "linewidth": 0, "pad": 1.5}  # readable on every colour
    panel.imshow(values, cmap="viridis_r", aspect="auto", origin="lower")
    for i, t in enumerate(steps):
        for j, h in enumerate(units):
            if (t, h) in best:
                row = best[t, h]
                label = f"{row['perplexity']:.2f}\nlr {row['setting']['learning_rate']:g}"
                panel.text(j, i, label, ha="center", va="center", fontsize="x-small", bbox=box)
    panel.set_xticks(range(len(units)), [str(h) for h in units])
    panel.set_yticks(range(len(steps)), [str(t) for t in steps])
    panel.set(xlabel="hidden units", ylabel="steps")


def draw_forecast(panel: Any, row: Result) -> None:
    """Draws a series and what was forecast of it, each value so many steps ahead of what was known."""
    curves = row["curves"]
    split = curves["split"]
    panel.plot(curves["series"], color="0.8", label="measured")
    for step, values in curves["steps"].items():
        first = split + int(step) - 1
        panel.plot(range(first, first + len(values)), values, linewidth=0.9, label=f"{step} ahead")
    panel.axvline(split, color="0.5", linestyle=":")
    panel.set_title(row["name"], fontsize="small")
    panel.legend(fontsize="x-small", ncols=5)


# --- The command ------------------------------------------------------------------------------------------------------


def run_one(
    setting: Setting, impl: str, seed: int, folder: Path, tell: Callable[[int, str], None], run: Result
) -> Result:
    """Returns the result of one model: the one on disk when it is finished, else after training what is missing.

    A result carries the description of the call that finished it: machine, commit, date.
    """
    known = dataclasses.asdict(setting) | {"impl": impl, "seed": seed}
    known = json.loads(json.dumps(known))
    done, settings = folder / "result.json", folder / "setting.json"
    if settings.is_file() and json.loads(settings.read_text()) != known:
        raise CorpusError(f"{folder} is of a run with other settings: delete it, or name another --work folder")
    _store(json.dumps(known).encode(), settings)
    if done.is_file():
        result: Result = json.loads(done.read_text())
    else:
        train = train_language_model if isinstance(setting, LanguageModel) else train_forecast
        result = train(setting, impl, seed, folder, tell)  # type: ignore[arg-type]
        result = {"name": setting.name, "setting": known, "run": run} | result
        _store(json.dumps(result).encode(), done)
    tell(setting.epochs, "done")
    return result


def check(parser: argparse.ArgumentParser, settings: list[Setting], options: argparse.Namespace) -> list[Setting]:
    """Refuses what would fail later: a missing corpus or series, a text that is too short."""
    if not settings:
        asked = [*(f"--cell {cell}" for cell in options.cell or ()), *(f"--models {m!r}" for m in options.models or ())]
        parser.error(f"{' '.join(asked)}: this experiment has no such model")
    variants = [setting for setting in settings if setting.is_variant]
    if variants and options.impl == "torch":
        names = ", ".join(setting.name for setting in variants)
        print(f"torch.nn has no such GRU, left out: {names}", file=sys.stderr)
        settings = [setting for setting in settings if not setting.is_variant]
    try:
        for corpus in sorted({s.corpus for s in settings if isinstance(s, LanguageModel)}):
            some = next(s for s in settings if isinstance(s, LanguageModel) and s.corpus == corpus)
            for book in some.books:
                load_corpus(book)
            for one in (s for s in settings if isinstance(s, LanguageModel) and s.corpus == corpus):
                needed = one.num_tokens or one.num_train + one.num_validation + 2 * one.num_steps + 1
                length = len(tokenize(letters_only(load_corpus(corpus)), one.level))
                if length < needed:
                    parser.error(f"corpus {corpus!r} has {length} tokens, {one.name!r} needs {needed}")
        for series in sorted({s.series for s in settings if isinstance(s, Forecast)}):
            read_series(series, 0)
    except CorpusError as error:
        parser.error(str(error))
    return settings


def make_parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    names = "\n".join(f"  {name:<11} {experiment.title}" for name, experiment in EXPERIMENTS.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nExperiments:\n{names}\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("experiment", choices=tuple(EXPERIMENTS), metavar="NAME", help=", ".join(EXPERIMENTS))
    parser.add_argument("--quick", action="store_true", help="few epochs, the grid's corner: about a minute")
    parser.add_argument("--impl", choices=("rnnfast", "torch"), default="rnnfast", help="default: %(default)s")
    parser.add_argument("--cell", nargs="+", choices=tuple(CELLS), default=None, help="only the models of these cells")
    parser.add_argument(
        "--models", nargs="+", default=None, metavar="PATTERN", help="only those of these names, such as 'gru T=32 *'"
    )
    parser.add_argument("--epochs", type=positive_int, default=None, help="default: the book's, or those of --quick")
    parser.add_argument(
        "--corpus",
        default=None,
        metavar="NAME",
        help=f"the book to train on: {', '.join(CORPORA)}, or the path of a text file; default: time-machine",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and texts; default: %(default)s")
    parser.add_argument("--threads", type=positive_int, default=1, metavar="COUNT", help="default: %(default)s")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("benchmark-results/d2l"),
        metavar="FOLDER",
        help="checkpoints and finished models, for a run to go on from; default: %(default)s",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=None,
        metavar="FOLDER",
        help="table (.csv), everything (.json), plot (.png) and texts (.txt); default: the --work folder",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs one experiment; returns the exit status."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    name, impl = options.experiment, options.impl
    settings = check(parser, settings_of(name, options), options)
    work = make_output_folder(parser, options.work)
    output = work if options.output is None else make_output_folder(parser, options.output)
    torch.set_num_threads(options.threads)

    experiment = EXPERIMENTS[name]
    stem = f"d2l-{name}{'-quick' if options.quick else ''}"
    run = describe_run(torch.device("cpu"), torch.float32, options.threads)
    rows: list[Result] = []
    from tqdm import tqdm

    total = sum(setting.work * setting.epochs for setting in settings)
    every = 0.5 if sys.stderr.isatty() else 30.0  # a log file wants a line now and then
    form = "{percentage:3.0f}%|{bar:20}| {elapsed} gone, {remaining} left {desc}{postfix}"
    bar = tqdm(total=total, bar_format=form, mininterval=every, file=sys.stderr)
    with bar, contextlib.suppress(KeyboardInterrupt):
        for number, setting in enumerate(settings, 1):
            before = bar.n

            def tell(epoch: int, measure: str, before: float = before, setting: Setting = setting) -> None:
                bar.set_postfix_str(f"epoch {epoch}/{setting.epochs}: {measure}", refresh=False)
                bar.update(before + setting.work * epoch - bar.n)

            bar.set_description_str(f"[{number}/{len(settings)}] {setting.name}", refresh=False)
            folder = work / f"{stem}-{impl}" / setting.name.replace(" ", "_").replace(",", "")
            try:
                rows.append(run_one(setting, impl, options.seed, folder, tell, run))
            except CorpusError as error:
                bar.close()
                parser.error(str(error))
            write_results(output, f"{stem}-{impl}", name, impl, rows)
    if not rows:
        print("stopped before a model was finished; the same command goes on", file=sys.stderr)
        return 130
    write_results(output, f"{stem}-{impl}", name, impl, rows)
    draw(output / f"{stem}-{impl}.png", name, rows, f"{experiment.title}\n{impl}, {measured_on(rows)}")
    print(f"{experiment.title}\n\n{format_table(rows, experiment.columns)}")
    if experiment.note:
        print(f"\n{experiment.note}")
    for row in rows:
        for kind, text in row.get("texts", {}).items():
            figures = row.get("text_figures", {}).get(kind)
            print(f"\n{row['name']}, {kind}{f' {figures}' if figures else ''}:\n  {text[:200]!r}")
    twin = output / f"{stem}-{'torch' if impl == 'rnnfast' else 'rnnfast'}.json"
    if twin.is_file():
        print("\n" + "\n".join(compare(rows, json.loads(twin.read_text())["results"], impl)))
    print(f"\nwritten: {output / stem}-{impl}.csv, .json, .png")
    if len(rows) < len(settings):
        print(f"stopped after {len(rows)} of {len(settings)} models; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
