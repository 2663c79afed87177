"""The models of the book's experiments: their settings, their training, and what is measured of one.

`run_one` trains a model with rnnfast, or with torch.nn, one-hot rows, plain cross entropy and Python loops over the
layer. It keeps a checkpoint of each epoch, so that a run that was killed goes on to the same result.

Times are CPU seconds of the process, all its threads together (time.process_time), because a machine shared with other
work makes wall seconds worthless; on one thread they are what an idle machine would need.
"""

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rnnfast
from rnnfast import RNNLM, RNNAutoRegression
from rnnfast.forecast import load_series, noisy_sine
from rnnfast.lm import detach_state
from rnnfast.text import (
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
    """A model of a series: from the last tau values, or the whole past. `share` of the series is trained on.

    An epoch is several passes, each one step of Adam: a checkpoint takes longer than a pass.
    """

    name: str
    cell: str
    series: str
    epochs: int
    passes: int = 10
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

    passes = [series[:split]] * setting.passes
    result = train_with(model, lambda epoch: passes, lambda part: model.loss(part)[0], setting, folder, tell)
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
