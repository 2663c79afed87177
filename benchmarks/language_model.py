"""Trains a character model on a real text with rnnfast's layers and, with --compare, with torch.nn's beside it.

The model is the plainest there is, rnnfast.RNNLM: one-hot characters (or an embedding) into the recurrent layers, a
linear layer to the next character's scores, cross entropy, gradient clipping, Adam or SGD, random windows of the text.
With --compare a twin built on torch.nn, with one-hot rows and torch's own linear layer and cross entropy, starts from
the same seed and trains on the same windows, the two taking turns step by step; the script prints by how much the two
loss curves differ and how much time they took, and fails when the curves disagree. At the end the rnnfast model writes
a line of text.

Units: loss is natural-log cross entropy per character, perplexity its exponential; times are milliseconds per
training step, everything in the step included; `ratio` is torch.nn's time over rnnfast's (above 1: rnnfast is faster;
the median over the steps, quartiles beside it).
"""

import argparse
import csv
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from cases import DEFAULT_CELLS, Cell, find_cells
from measure import (
    OtherWork,
    add_run_options,
    describe_run,
    make_output_folder,
    positive_float,
    positive_int,
    quartiles,
    start_run,
    synchronize,
)
from torch import nn

import rnnfast
from rnnfast import RNNLM
from rnnfast.text import CORPORA, DATA_VARIABLE, CorpusError, Vocab, letters_only, load_corpus

# The first steps pay for allocations and thread start-up; they are trained on but not timed.
_WARM_UP_STEPS = 3
_VALIDATION_SHARE = 0.1
_VALIDATION_WINDOWS = 128


class Training:
    """One model, its optimizer, and what was seen on the way: a loss and the seconds of every step."""

    def __init__(
        self, layers: Any, cell: Cell, vocab_size: int, options: argparse.Namespace, device: torch.device
    ) -> None:
        torch.manual_seed(options.seed)
        rnn = getattr(layers, cell.class_name)(
            options.embedding_dim or vocab_size, options.hidden_size, num_layers=options.num_layers, **cell.options
        )
        self.model = RNNLM(rnn, vocab_size, options.embedding_dim).to(device, getattr(torch, options.dtype))
        self.is_plain = layers is nn
        optimizer = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[options.optimizer]
        self.optimizer = optimizer(self.model.parameters(), lr=options.learning_rate)
        self.clip = options.clip
        self.device = device
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def loss(self, windows: torch.Tensor) -> torch.Tensor:
        """Returns the mean cross entropy of windows of characters `[T + 1, N]`, each but the first to be predicted."""
        if not self.is_plain:
            return self.model.loss(windows[:-1], windows[1:])[0]
        scores, _ = self.model(windows[:-1])
        return nn.functional.cross_entropy(scores.flatten(0, 1).float(), windows[1:].flatten())

    def step(self, windows: torch.Tensor) -> None:
        """Trains on one batch. Raises FloatingPointError when the loss is not finite."""
        synchronize(self.device)
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(windows)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        value = loss.item()
        synchronize(self.device)
        self.seconds.append(time.perf_counter() - start)
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss is {value} at step {len(self.losses) + 1}; a smaller --learning-rate or --clip may help"
            )
        self.losses.append(value)

    def perplexity(self, windows: torch.Tensor) -> float:
        """Returns the perplexity of windows `[T + 1, N]`."""
        with torch.no_grad():
            return math.exp(self.loss(windows).item())


def draw_windows(tokens: torch.Tensor, length: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """Returns `count` windows from random places of `tokens`, `[length, count]`."""
    starts = torch.randint(len(tokens) - length + 1, (count,), generator=generator)
    return tokens[starts + torch.arange(length)[:, None]]


def generate(
    model: RNNLM, vocab: Vocab, prompt: str, length: int, temperature: float, generator: torch.Generator
) -> str:
    """Returns the prompt and `length` characters after it; temperature 0 always takes the likeliest character."""
    ids = vocab.encode(prompt).to(model.output.weight.device)
    choice = {"sample": True, "temperature": temperature, "generator": generator} if temperature else {}
    with torch.no_grad():
        unknown = model.output.bias[0].clone()
        model.output.bias[0] = -math.inf  # <unk> never occurs in the text and is not to be chosen
        try:
            written = model.generate(ids, length, **choice).tokens
        finally:
            model.output.bias[0] = unknown
    return prompt + "".join(vocab.decode(written))


def largest_difference(ours: list[float], theirs: list[float]) -> float:
    """Returns the largest relative difference of two loss curves."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def train(
    cell: Cell, vocab: Vocab, tokens: torch.Tensor, options: argparse.Namespace, device: torch.device
) -> tuple[Training, Training | None, dict[str, Any]]:
    """Trains one cell, and its torch.nn twin with --compare; returns both and the figures of the run."""
    from tqdm import tqdm

    length = options.num_steps + 1
    split = len(tokens) - max(int(len(tokens) * _VALIDATION_SHARE), length)
    generator = torch.Generator().manual_seed(options.seed)
    held_out = draw_windows(tokens[split:], length, _VALIDATION_WINDOWS, generator).to(device)

    ours = Training(rnnfast, cell, len(vocab), options, device)
    theirs = Training(nn, cell, len(vocab), options, device) if options.compare else None
    if theirs is not None:
        for (name, a), b in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
            if not torch.equal(a, b):
                raise RuntimeError(
                    f"rnnfast and torch.nn gave {name} different initial values from seed {options.seed}"
                )

    with tqdm(range(options.steps), unit="step", desc=cell.name, file=sys.stderr, leave=False) as progress:
        for index in progress:
            windows = draw_windows(tokens[:split], length, options.batch_size, generator).to(device)
            # Who goes first alternates, as in measure.interleave.
            twins = [ours] if theirs is None else [ours, theirs]
            for training in twins if index % 2 == 0 else reversed(twins):
                training.step(windows)
            progress.set_postfix(loss=f"{ours.losses[-1]:.3f}", refresh=False)

    skip = min(_WARM_UP_STEPS, options.steps - 1)
    figures: dict[str, Any] = {
        "cell": cell.name,
        "loss": round(ours.losses[-1], 4),
        "perplexity": round(ours.perplexity(held_out), 3),
        "rnnfast_ms": round(statistics.median(ours.seconds[skip:]) * 1e3, 3),
    }
    if theirs is not None:
        low, ratio, high = quartiles([b / a for a, b in zip(ours.seconds[skip:], theirs.seconds[skip:], strict=True)])
        figures |= {
            "torch_loss": round(theirs.losses[-1], 4),
            "torch_perplexity": round(theirs.perplexity(held_out), 3),
            "torch_ms": round(statistics.median(theirs.seconds[skip:]) * 1e3, 3),
            "ratio": round(ratio, 3),
            "ratio_low": round(low, 3),
            "ratio_high": round(high, 3),
            "difference": largest_difference(ours.losses, theirs.losses),
        }
    return ours, theirs, figures


def format_figures(figures: dict[str, Any]) -> str:
    """Returns what is printed of one cell."""
    text = (
        f"{figures['cell']:<9} loss {figures['loss']:.3f}, validation perplexity {figures['perplexity']:.2f}, "
        f"{figures['rnnfast_ms']:.2f} ms a step"
    )
    if "ratio" in figures:
        text += (
            f"\n{'torch.nn':<9} loss {figures['torch_loss']:.3f}, validation perplexity "
            f"{figures['torch_perplexity']:.2f}, {figures['torch_ms']:.2f} ms a step"
            f"\n{'':<9} time ratio {figures['ratio']:.2f} (quartiles {figures['ratio_low']:.2f}-"
            f"{figures['ratio_high']:.2f}), largest relative difference of the loss curves {figures['difference']:.1e}"
        )
    return text


def write_results(
    folder: Path, run: dict[str, Any], results: list[tuple[Training, Training | None, dict[str, Any]]]
) -> None:
    """Writes the loss curves (.csv), the figures with the run's description (.json) and a plot (.png)."""
    import matplotlib

    matplotlib.use("Agg")  # files only: works without a display
    from matplotlib import pyplot

    with open(folder / "language_model.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["cell", "step", "rnnfast_loss", "rnnfast_ms", "torch_loss", "torch_ms"])
        for ours, theirs, figures in results:
            for index in range(len(ours.losses)):
                row: list[Any] = [figures["cell"], index + 1]
                for training in (ours, theirs):
                    if training is None:
                        row += ["", ""]
                    else:
                        row += [f"{training.losses[index]:.6f}", f"{training.seconds[index] * 1e3:.4f}"]
                writer.writerow(row)
    summary = run | {"results": [figures for _, _, figures in results]}
    (folder / "language_model.json").write_text(json.dumps(summary, indent=2) + "\n")

    figure, panels = pyplot.subplots(1, len(results), figsize=(1 + 3.6 * len(results), 3.4), sharey=True, squeeze=False)
    for panel, (ours, theirs, figures) in zip(panels[0], results, strict=True):
        steps = range(1, len(ours.losses) + 1)
        panel.plot(steps, ours.losses, label=f"rnnfast, {figures['rnnfast_ms']:.1f} ms a step")
        if theirs is not None:
            panel.plot(steps, theirs.losses, "--", label=f"torch.nn, {figures['torch_ms']:.1f} ms a step")
        panel.set_title(figures["cell"])
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    panels[0][0].set_ylabel("loss (nats per character)")
    figure.suptitle(f"{run['corpus']}, {run['threads']} thread(s), {run['machine']}", fontsize="small")
    figure.tight_layout()
    figure.savefig(folder / "language_model.png", dpi=120)
    pyplot.close(figure)


def make_parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_run_options(parser)
    parser.add_argument(
        "--corpus",
        default="python-docs",
        metavar="NAME",
        help=f"{', '.join(CORPORA)}, or the path of a text file; looked for in the directory that {DATA_VARIABLE} "
        "names, then in the cache, then downloaded where there is a public address; python-docs is part of Python; "
        "default: %(default)s",
    )
    parser.add_argument(
        "--cell",
        nargs="+",
        default=DEFAULT_CELLS,
        metavar="CELL",
        help=f"rnn (short for rnn_tanh), rnn_relu, gru, lstm; default: {' '.join(DEFAULT_CELLS)}",
    )
    parser.add_argument("--compare", action="store_true", help="train the same with torch.nn, in turns")
    parser.add_argument("--quick", action="store_true", help="a small model and few steps: a few seconds")
    size = parser.add_argument_group("model and training (defaults; with --quick the second value)")
    size.add_argument("--steps", type=positive_int, default=None, help="training steps; 500, 40")
    size.add_argument("--hidden-size", type=positive_int, default=None, help="H; 256, 64")
    size.add_argument("--num-layers", type=positive_int, default=1, help="L; 1")
    size.add_argument("--num-steps", type=positive_int, default=32, help="characters in a window, T; 32")
    size.add_argument("--batch-size", type=positive_int, default=32, help="windows in a batch, N; 32")
    size.add_argument(
        "--embedding-dim", type=positive_int, default=None, help="size of a learned embedding; default: one-hot input"
    )
    size.add_argument("--optimizer", choices=("adam", "sgd"), default="adam", help="adam")
    size.add_argument("--learning-rate", type=positive_float, default=None, help="0.005 for adam, 1 for sgd")
    size.add_argument("--clip", type=positive_float, default=1.0, help="largest norm of all gradients together; 1")
    size.add_argument("--seed", type=int, default=0, help="of weights, windows and generated text; 0")
    size.add_argument(
        "--tolerance",
        type=positive_float,
        default=None,
        help="largest relative difference of the two loss curves that counts as agreement; 0.001, for the 16-bit "
        "dtypes 0.1 (training amplifies rounding errors, and rounds differently from one thread count to the next)",
    )
    text = parser.add_argument_group("generated text")
    text.add_argument("--prompt", default="the ", help="its first characters; default: %(default)r")
    text.add_argument("--length", type=positive_int, default=80, help="characters to write; default: %(default)s")
    text.add_argument(
        "--temperature", type=float, default=0.5, help="0 takes the likeliest character; default: %(default)s"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=None,
        metavar="FOLDER",
        help="write loss curves (language_model.csv), figures and machine (.json) and a plot (.png) there",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    options.steps = options.steps or (40 if options.quick else 500)
    options.hidden_size = options.hidden_size or (64 if options.quick else 256)
    options.learning_rate = options.learning_rate or {"adam": 0.005, "sgd": 1.0}[options.optimizer]
    options.tolerance = options.tolerance or (0.1 if options.dtype in ("bfloat16", "float16") else 1e-3)
    if not (math.isfinite(options.temperature) and options.temperature >= 0):
        parser.error(f"--temperature {options.temperature}: must be a finite number of at least 0")
    if not letters_only(options.prompt):
        parser.error("--prompt: must not be empty")
    try:
        cells = find_cells(options.cell)
        text = letters_only(load_corpus(options.corpus))
    except KeyError as error:
        parser.error(error.args[0])
    except CorpusError as error:
        parser.error(str(error))
    if len(text) < 4 * (options.num_steps + 1):
        parser.error(
            f"corpus {options.corpus!r} has {len(text)} characters, too few for --num-steps {options.num_steps}"
        )
    device, dtype, threads = start_run(parser, options)
    folder = None if options.output is None else make_output_folder(parser, options.output)

    # Numbers every English text the same way, so that a model may later be scored on another one.
    vocab = Vocab(" abcdefghijklmnopqrstuvwxyz")
    tokens = vocab.encode(text)
    run = describe_run(device, dtype, threads) | {"corpus": options.corpus, "characters": len(text)}
    print(
        f"{options.corpus}: {len(text)} characters, {len(vocab)} kinds; {options.steps} steps of T={options.num_steps} "
        f"N={options.batch_size} H={options.hidden_size} L={options.num_layers}; {run['dtype']}, {threads} thread(s), "
        f"{run['instruction_set']}"
    )
    results = []
    disagreements = []
    other_work = OtherWork()
    for cell in cells:
        try:
            ours, theirs, figures = train(cell, vocab, tokens, options, device)
        except FloatingPointError as error:
            print(f"{cell.name}: {error}", file=sys.stderr)
            return 1
        results.append((ours, theirs, figures))
        print(f"\n{format_figures(figures)}")
        generator = torch.Generator().manual_seed(options.seed)
        prompt = letters_only(options.prompt)
        print(f"{'text':<9} {generate(ours.model, vocab, prompt, options.length, options.temperature, generator)!r}")
        if figures.get("difference", 0.0) > options.tolerance:
            disagreements.append(cell.name)
    other_work.finish(run)
    if folder is not None:
        write_results(folder, run, results)
        print(f"\nwritten: {folder / 'language_model'}.csv, .json, .png")
    if disagreements:
        print(
            f"the loss curves of {', '.join(disagreements)} differ by more than --tolerance {options.tolerance}",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
