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
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from d2l_models import CELLS, Forecast, LanguageModel, Result, Setting, read_series, run_one
from measure import describe_run, make_output_folder, positive_int

from rnnfast.text import CORPORA, CorpusError, letters_only, load_corpus, tokenize

OTHER_BOOKS = ("war-of-the-worlds", "frankenstein")
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
        lambda: [
            of_book(f"gru{name}", "gru", hidden_size=size, alphas=(1.0, 2.0, 5.0, 30.0))
            for name, size in (("", 32), (" of 256 units", 256))
        ],
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
            *(Forecast(f"sine {cell} tau=4", cell, "sine", 100, tau=4) for cell in BOOK),
            *(
                Forecast(f"{series} {cell}", cell, series, 100)
                for series in ("sine", "sunspots", "el-nino", "co2")
                for cell in BOOK
            ),
        ],
        ("cpu_seconds", "forecast_cpu_seconds", "error_1", "error_4", "error_16", "error_64"),
        3,
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


def format_markdown(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    """Returns a table in Markdown, numbers to the right."""
    lines = [head, ("---", *("---:" for _ in head[1:])), *(tuple(cell_text(value) for value in row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


COMPARISON = ("model", "torch.nn's CPU time / rnnfast's", "measure", "rnnfast", "torch.nn")


def compare(ours: list[Result], theirs: list[Result]) -> list[tuple[Any, ...]]:
    """Returns the lines of COMPARISON, one for each model that both implementations trained to the end."""
    by_name = {row["name"]: row for row in theirs if "stopped" not in row}
    lines = []
    for row in ours:
        other = by_name.get(row["name"])
        if other is None or "stopped" in row:
            continue
        if any(row["setting"][key] != other["setting"][key] for key in row["setting"] if key != "impl"):
            continue
        ratio = other["cpu_seconds"] / row["cpu_seconds"]
        measure = next(m for m in ("perplexity", "train_perplexity", "error_1") if m in row)
        lines.append((row["name"], ratio, measure, row[measure], other[measure]))
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


def read_results(folder: Path, stem: str) -> dict[str, Result]:
    """Returns what write_results wrote, of each implementation that has been run."""
    paths = {impl: folder / f"{stem}-{impl}.json" for impl in ("rnnfast", "torch")}
    return {impl: json.loads(path.read_text()) for impl, path in paths.items() if path.is_file()}


def write_markdown(folder: Path, stem: str, name: str) -> list[tuple[Any, ...]]:
    """Writes the tables of both implementations and how they compare (.md); returns the comparison."""
    experiment = EXPERIMENTS[name]
    both = read_results(folder, stem)
    parts = [f"# {experiment.title}"]
    for impl, summary in both.items():
        columns = ("model", *experiment.columns)
        rows = ((row["name"], *(row.get(column) for column in experiment.columns)) for row in summary["results"])
        parts += [f"{impl}, {'; '.join(map(described, summary['runs']))}", format_markdown(columns, rows)]
    if experiment.note:
        parts.append(experiment.note[0].upper() + experiment.note[1:] + ".")
    figures = [
        (f"{row['name']}, {kind}", *said.values())
        for row in next(iter(both.values()))["results"]
        for kind, said in row.get("text_figures", {}).items()
    ]
    if figures:
        parts.append(format_markdown(("text", "words that the book has", "different words"), figures))
    pairs = compare(*(both[impl]["results"] if impl in both else [] for impl in ("rnnfast", "torch")))
    if pairs:
        parts.append(format_markdown(COMPARISON, pairs))
    (folder / f"{stem}.md").write_text("\n\n".join(parts) + "\n")
    return pairs


def described(run: Result) -> str:
    """Returns threads, machine, versions and commit of a call, in a line."""
    threads = "1 thread" if run["threads"] == 1 else f"{run['threads']} threads"
    return (
        f"{threads}, {run['machine']} ({run['instruction_set']}), torch {run['torch']}, commit {run['git_sha'][:12]}, "
        f"{run['date'][:10]}"
    )


def draw(path: Path, name: str, rows: list[Result], twins: list[Result], title: str) -> None:
    """Draws the experiment's picture: heat maps, bars, forecasts or learning curves, dashed those of `twins`."""
    from matplotlib.figure import Figure  # files only: works without a display
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    rows, twins = ([row for row in several if "stopped" not in row] for several in (rows, twins))
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
    elif name == "books":
        figure = Figure(figsize=(8, 4), layout="constrained")
        reached = {
            row["name"]: {"its own book": row["perplexity"]}
            | {book: row[f"perplexity_{book}"] for book in row["setting"]["books"]}
            for row in rows
        }
        draw_bars(figure.subplots(), reached, "perplexity")
    elif name == "sampling":
        figure = Figure(figsize=(1 + 6 * len(rows), 4), layout="constrained")
        names = {"known_words": "words that the book has", "distinct_words": "different words"}
        for panel, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
            shares = {kind: {names[k]: v for k, v in said.items()} for kind, said in row["text_figures"].items()}
            draw_bars(panel, shares, "share of the words written")
            panel.set_title(row["name"], fontsize="small")
    else:
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        panel = figure.subplots()
        colors = {}
        blind = 4_600 if any(row["setting"]["level"] == "word" for row in rows) else 28  # the vocabulary: a blind guess
        for row in rows:
            epochs, curve = learning_curve(row)
            label = row["name"] if min(curve) < blind else f"{row['name']} (above {blind})"
            style = "-" if row["setting"]["clip"] else "--"
            colors[row["name"]] = panel.plot(epochs, curve, style, label=label)[0].get_color()
        for row in twins:
            if row["name"] in colors:
                style = {"linestyle": (0, (2, 3)), "linewidth": 3, "alpha": 0.6, "color": colors[row["name"]]}
                other = "rnnfast" if row["setting"]["impl"] == "rnnfast" else "torch.nn"
                panel.plot(*learning_curve(row), label=f"{row['name']}, {other}", **style)
        held_out = rows[0]["log"][-1][1] is not None
        panel.set(xlabel="epoch", ylabel=f"{'validation' if held_out else 'training'} perplexity", yscale="log")
        low, high = panel.get_ylim()
        if high > blind:  # a model that went astray does not press the others flat
            low = 0.95 * min(min(learning_curve(row)[1]) for row in rows)
            high = blind
            panel.set_ylim(low, high)
        panel.yaxis.set_major_locator(
            LogLocator(subs=range(1, 10) if high < 10 * low else (1, 2, 5) if high < 300 * low else (1,))
        )
        panel.yaxis.set_minor_locator(LogLocator(subs=()))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    figure.suptitle(title, fontsize="small")
    figure.savefig(path, dpi=110)


def learning_curve(row: Result) -> tuple[list[int], list[float]]:
    """Returns the epochs and the perplexity of each, of the validation where there was one."""
    curve = [math.exp(min(loss, 700.0)) if validation is None else validation for loss, validation in row["log"]]
    return list(range(1, len(curve) + 1)), curve


def draw_bars(panel: Any, groups: dict[str, dict[str, float]], ylabel: str) -> None:
    """Draws groups of bars, the same ones in each, with their values above them."""
    labels = list(next(iter(groups.values())))
    for i, label in enumerate(labels):
        places = [place + 0.8 * (i + 0.5) / len(labels) - 0.4 for place in range(len(groups))]
        bars = panel.bar(places, [group[label] for group in groups.values()], 0.8 / len(labels), label=label)
        panel.bar_label(bars, fmt="%.3g", fontsize="x-small")
    panel.set_xticks(range(len(groups)), list(groups))
    panel.set(ylabel=ylabel)
    panel.margins(y=0.25)  # room for the legend
    panel.legend(fontsize="small", ncols=len(labels), loc="upper center")


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
    """Draws the start of what was forecast of a series, each value so many steps ahead of what was known."""
    curves = row["curves"]
    split = curves["split"]
    begin, end = max(split - 60, 0), split + 340
    panel.plot(
        range(begin, min(end, len(curves["series"]))), curves["series"][begin:end], color="0.7", label="measured"
    )
    for step, values in curves["steps"].items():
        first = split + int(step) - 1
        shown = values[: end - first]
        panel.plot(range(first, first + len(shown)), shown, linewidth=1.0, label=f"{step} ahead")
    panel.axvline(split, color="0.5", linestyle=":")
    panel.set_title(row["name"], fontsize="small")
    panel.legend(fontsize="x-small", ncols=5)


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


def seed(text: str) -> int:
    """Reads the seed of a run, for argparse; seeds of epochs are made from it and must stay below 2^63."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2^32 - 1")
    return value


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
    parser.add_argument("--seed", type=seed, default=0, help="of weights, batches and texts; default: %(default)s")
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
        help="tables (.md, .csv), everything (.json), plot (.png) and texts (.txt); default: the --work folder",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs one experiment; returns the exit status."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    name, impl = options.experiment, options.impl
    settings = check(parser, settings_of(name, options), options)
    work = make_output_folder(parser, options.work, "--work")
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
    pairs = write_markdown(output, stem, name)
    both = read_results(output, stem)
    twins = both.get("torch" if impl == "rnnfast" else "rnnfast", {"results": []})["results"]
    title = f"{experiment.title}\n{impl}, {'; '.join(map(described, both[impl]['runs']))}"
    draw(output / f"{stem}-{impl}.png", name, rows, twins, title)
    print(f"{experiment.title}\n\n{format_table(rows, experiment.columns)}")
    if experiment.note:
        print(f"\n{experiment.note}")
    for row in rows:
        for kind, text in row.get("texts", {}).items():
            figures = row.get("text_figures", {}).get(kind)
            print(f"\n{row['name']}, {kind}{f' {figures}' if figures else ''}:\n  {text[:200]!r}")
    for model, ratio, measure, ours, theirs in pairs:
        reached = f"{measure} {cell_text(ours)} against {cell_text(theirs)}"
        print(f"\n{model}: torch.nn's CPU time over rnnfast's {ratio:.2f}, {reached}", end="")
    print(f"\n\nwritten: {output / stem}.md, -{impl}.csv, .json, .png")
    if len(rows) < len(settings):
        print(f"stopped after {len(rows)} of {len(settings)} models; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
