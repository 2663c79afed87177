"""How do times grow with T, N, H and threads, ours and torch.nn's, and how near are they to the machine's limit?

From a shape in the middle (BASE) one size at a time goes through a row of values; I is H, one layer, one direction,
float32. Ours and torch.nn's with each number of threads take turns in one process: they share torch's threads, so that
none disturb the other's. Agreement is checked as in layers.py; a shape with wrong results gets no time, and the exit
status is 1.

The ceiling is the multiply-add rate of one large product, the best of torch.mm, oneDNN's linear layer and rnnfast's own
product (one step of many sequences). FIGURE is measured in turns with it: its share is the products' operations over
time and ceiling, gate arithmetic not counted as work. In the plot a dotted line is the time at the ceiling.

With one thread each shape has a floor, the longest of three times: `products`, at the ceiling; `reading`, of the
weights from the cache that holds them, W_ih once and W_hh at each step, in training both ways; `calls`, the time of the
smallest call there is. `near` is the floor over our time, `limit` which of the three it is.

Units: milliseconds per call (medians); `ratio` is torch.nn's time over ours, `speedup` our time with the first number
of threads over ours with this one (medians over the rounds); training is three times the operations of inference.
"""

import argparse
import csv
import functools
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from cases import CELLS, DEFAULT_CELLS, Case, Cell, find_cells, product_flops
from layers import MODES, WrongResultError, build_pair, check_agreement, make_call, timing_fields
from measure import (
    OtherWork,
    available_cores,
    describe_run,
    geometric_mean,
    make_output_folder,
    make_turn,
    pair,
    positive_float,
    positive_int,
    seconds_of,
    take_turns,
)

import rnnfast

Sizes = dict[str, int]
CPU = torch.device("cpu")
BASE: Sizes = {"T": 32, "N": 16, "H": 256}
AXES = {"T": (1, 4, 32, 256), "N": (1, 4, 16, 64, 256), "H": (16, 32, 64, 128, 256, 512, 1024)}
FIGURE = {"T": 100, "N": 64, "H": 512}
QUICK_BASE: Sizes = {"T": 4, "N": 2, "H": 16}
QUICK_AXES = {"T": (1, 4), "N": (1, 2), "H": (16, 32)}
QUICK_FIGURE = {"T": 4, "N": 8, "H": 32}
# Rows, sum and columns of the product that is the ceiling.
CEILING, QUICK_CEILING = (2048, 512, 2048), (64, 64, 64)
# Long enough that waking another number of threads, which each turn begins with, does not count.
TURN_SECONDS = 5e-3
FIELDS = (
    *("axis", "cell", "mode", *"TNH", "threads", "rnnfast_ms", "torch_ms", "ratio", "ratio_low", "ratio_high", "pairs"),
    *("gflops", "speedup", "ceiling", "ceiling_gflops", "share", "limit", "floor_ms", "near", "status"),
)


class Product(NamedTuple):
    """A way to the ceiling: one large product, and its floating-point operations, a multiply-add counted as two."""

    name: str
    call: Callable[[], object]
    flops: int


def make_products(sizes: tuple[int, int, int]) -> list[Product]:
    """The candidates for the ceiling."""
    rows, inner, columns = sizes
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    out = torch.empty(rows, columns)
    products = [Product("torch.mm", lambda: torch.mm(a, b, out=out), 2 * rows * inner * columns)]
    if torch.backends.mkldnn.is_available():
        # In oneDNN's own layout: the call does not rearrange.
        operands = a.to_mkldnn(), torch.randn(columns, inner).to_mkldnn()
        linear = torch.inference_mode()(lambda: torch.nn.functional.linear(*operands))
        products.append(Product("oneDNN linear", linear, 2 * rows * inner * columns))
    # Two products, of the input and of the state; relu is the cheapest gate there is.
    layer = rnnfast.RNN(inner, columns, nonlinearity="relu")
    step = a[None]
    products.append(
        Product(
            "rnnfast, one step", torch.inference_mode()(lambda: layer(step)), 2 * rows * columns * (inner + columns)
        )
    )
    return products


def with_threads(call: Callable[[], object], threads: int) -> Callable[[], float]:
    """Returns a turn of a call with a number of threads."""
    return make_turn(call, CPU, TURN_SECONDS, lambda: torch.set_num_threads(threads))


def make_case(sizes: Sizes) -> Case:
    """Returns a shape of one layer and direction whose input is as wide as its state."""
    return Case("scaling", sizes["T"], sizes["N"], sizes["H"], sizes["H"], 1, 1, "made up")


def measure(
    axis: str, case: Case, cell: Cell, products: list[Product], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Checks and times one shape and cell; returns a row of `FIELDS` per mode and number of threads.

    With `products` these take their turns too, threads by threads, and a row has its ceiling and share; without them
    the numbers of threads take turns, and a row has its speedup.
    """
    torch.manual_seed(0)
    torch.set_num_threads(options.threads[-1])
    start: dict[str, Any] = dict.fromkeys(FIELDS, "") | {"axis": axis, "cell": cell.name, "status": "ok"}
    start |= {letter: getattr(case, letter) for letter in "TNH"}
    layers = build_pair(case, cell, CPU, torch.float32)
    input, grad_output = torch.randn(case.T, case.N, case.I), torch.randn(case.T, case.N, case.H)
    try:
        check_agreement(*layers, input)
    except WrongResultError as error:
        return [start | {"mode": mode, "status": f"wrong: {error}"} for mode in options.modes]
    rows = []
    for mode in options.modes:
        flops = product_flops(case, cell, mode == "training")
        calls = [make_call(layer, mode, input, grad_output) for layer in layers]
        if products:
            for threads in options.threads:
                contestants = [*calls, *(product.call for product in products)]
                times = take_turns([with_threads(call, threads) for call in contestants], 2 * options.seconds)
                rates = [product.flops / pair(times, 2 + i).theirs for i, product in enumerate(products)]
                best = max(range(len(products)), key=lambda i: rates[i])
                # Our rate over the product's: the operations of each over its time.
                share = pair(times, 2 + best).ratio * flops / products[best].flops
                ceiling = {"ceiling": products[best].name, "ceiling_gflops": float(f"{rates[best] / 1e9:.4g}")}
                row = start | timing_fields(pair(times, 1), flops) | ceiling | {"share": round(share, 3)}
                rows.append(row | {"mode": mode, "threads": threads})
        else:
            times = take_turns([with_threads(call, n) for n in options.threads for call in calls], options.seconds)
            for i, threads in enumerate(options.threads):
                paired = pair([(turns[2 * i], turns[2 * i + 1]) for turns in times], 1)
                speedup = pair([(turns[2 * i], turns[0]) for turns in times], 1).ratio
                row = start | timing_fields(paired, flops) | {"speedup": round(speedup, 3)}
                rows.append(row | {"mode": mode, "threads": threads})
    return rows


@functools.cache
def reading_rate(size: int) -> float:
    """Returns the bytes that one thread reads in a second from an array of `size` bytes that it has read before."""
    values = torch.ones(size // 4)
    # Many readings in a call: summing a small array once takes less time than the call.
    readings = values.expand(max((1 << 22) // size, 1), -1)
    return readings.numel() * 4 / seconds_of(lambda: readings.sum(1), CPU)


def add_floors(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Fills `limit`, `floor_ms` and `near` of the rows with one thread, once the ceiling is known."""
    ceilings = find_ceilings(rows)
    if 1 not in ceilings:
        return
    torch.set_num_threads(1)
    smallest = make_case({"T": 1, "N": 1, "H": 1})
    calls = {}
    for cell in find_cells(dict.fromkeys(row["cell"] for row in rows)):
        layer, _ = build_pair(smallest, cell, CPU, torch.float32)
        for mode in options.modes:
            calls[cell.name, mode] = seconds_of(make_call(layer, mode, *torch.zeros(2, 1, 1, 1)), CPU)
    for row in rows:
        if row["status"] != "ok" or row["threads"] != 1:
            continue
        case, cell, training = make_case(row), CELLS[row["cell"]], row["mode"] == "training"
        weight = 4 * cell.num_gates * case.H * case.H  # bytes of W_hh, and of W_ih, as I = H
        seconds = {
            "products": product_flops(case, cell, training) / (ceilings[1][0] * 1e9),
            "reading": weight * (1 + case.T) * (2 if training else 1) / reading_rate(weight),
            "calls": calls[cell.name, row["mode"]],
        }
        limit = max(seconds, key=lambda name: seconds[name])
        floor = seconds[limit] * 1e3
        row |= {"limit": limit, "floor_ms": float(f"{floor:.4g}"), "near": round(floor / row["rnnfast_ms"], 3)}


HEADING = (
    f"{'axis':<5} {'cell':<9} {'mode':<10} {'T N H':<13} {'threads':>7} {'rnnfast ms':>10} {'torch ms':>10} "
    f"{'ratio':>6} {'GFLOP/s':>8} {'speedup':>8} {'share':>6}"
)


def format_row(row: dict[str, Any]) -> str:
    """Returns one line of the printed table."""
    shape = " ".join(str(row[letter]) for letter in "TNH")
    line = f"{row['axis']:<5} {row['cell']:<9} {row['mode']:<10} {shape:<13} "
    if row["status"] != "ok":
        return line + row["status"]
    return (
        f"{line}{row['threads']:>7} {row['rnnfast_ms']:>10.4g} {row['torch_ms']:>10.4g} {row['ratio']:>6.2f} "
        f"{row['gflops']:>8.3g} {row['speedup']:>8} {row['share']:>6}"
    ).rstrip()


def find_ceilings(rows: Iterable[dict[str, Any]]) -> dict[int, tuple[float, str]]:
    """Returns the highest ceiling measured with each number of threads, in GFLOP/s, and the product that reached it."""
    ceilings: dict[int, tuple[float, str]] = {}
    for row in rows:
        if row["share"] != "":
            found = (row["ceiling_gflops"], row["ceiling"])
            ceilings[row["threads"]] = max(ceilings.get(row["threads"], found), found)
    return ceilings


def unique(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns each measurement once: the shape in the middle stands on every axis."""
    return list({tuple(row[name] for name in ("threads", "cell", "mode", *"TNH")): row for row in rows}.values())


def format_shape(row: dict[str, Any]) -> str:
    """Returns the sizes of a row with their letters."""
    return " ".join(f"{letter}={row[letter]}" for letter in "TNH")


def format_summary(rows: list[dict[str, Any]]) -> str:
    """Returns shares of the ceiling, how near times come to floors, and what more threads gave where N, H are large."""
    lines = [
        f"ceiling with {threads} thread(s): {rate:.4g} GFLOP/s ({product})"
        for threads, (rate, product) in find_ceilings(rows).items()
    ]
    for row in rows:
        if row["share"] != "":
            start = f"{row['cell']} {row['mode']}, {format_shape(row)}, {row['threads']} thread(s)"
            lines.append(f"{start}: {row['share']:.0%} of the ceiling")
    for mode in MODES:
        for limit in ("products", "reading", "calls"):
            found = unique(row for row in rows if (row["mode"], row["limit"]) == (mode, limit))
            if found:
                far = min(found, key=lambda row: row["near"])
                mean = geometric_mean(row["near"] for row in found)
                lines.append(
                    f"{mode}, where {limit} are the limit, 1 thread: {len(found)} shapes and cells, geometric mean "
                    f"{mean:.0%} of the floor's speed, worst {far['near']:.0%} ({far['cell']} {format_shape(far)})"
                )
    first = min((row["threads"] for row in rows if row["status"] == "ok"), default=1)
    large = unique(row for row in rows if row["speedup"] != "" and row["N"] >= 16 and row["H"] >= 128)
    for threads in sorted({row["threads"] for row in large} - {first}):
        found = [row for row in large if row["threads"] == threads]
        worst = min(found, key=lambda row: row["speedup"])
        mean = geometric_mean(row["speedup"] for row in found)
        lines.append(
            f"{threads} threads over {first}, N >= 16 and H >= 128: geometric mean {mean:.2f}x, worst "
            f"{worst['speedup']:.2f}x ({worst['cell']} {worst['mode']}, {format_shape(worst)})"
        )
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], run: dict[str, Any], path: Path) -> None:
    """Draws times, a panel for each cell, mode and axis: ours solid, torch.nn's dashed, the ceiling dotted."""
    import matplotlib

    matplotlib.use("Agg")  # files only: works without a display
    from matplotlib import pyplot, ticker

    timed = [row for row in rows if row["status"] == "ok" and row["axis"] in BASE]
    cells = [cell for cell in CELLS if any(row["cell"] == cell for row in timed)]
    columns = [
        (mode, axis)
        for mode in MODES
        for axis in BASE
        if any((row["mode"], row["axis"]) == (mode, axis) for row in timed)
    ]
    ceilings = find_ceilings(rows)
    size = (1 + 2.4 * len(columns), 1.2 + 2.2 * len(cells))
    figure, panels = pyplot.subplots(len(cells), len(columns), figsize=size, squeeze=False)
    for line, cell in zip(panels, cells, strict=True):
        for panel, (mode, axis) in zip(line, columns, strict=True):
            members = [row for row in timed if (row["cell"], row["mode"], row["axis"]) == (cell, mode, axis)]
            for index, threads in enumerate(sorted({row["threads"] for row in members})):
                points = sorted((row for row in members if row["threads"] == threads), key=lambda row: row[axis])
                values, color = [row[axis] for row in points], f"C{index}"
                for name, style in (("rnnfast", "o-"), ("torch", "x--")):
                    times = [row[f"{name}_ms"] for row in points]
                    panel.plot(values, times, style, color=color, markersize=3, label=f"{name}, {threads} thread(s)")
                if threads in ceilings:
                    floors = [
                        product_flops(make_case(row), CELLS[cell], mode == "training") / ceilings[threads][0] / 1e6
                        for row in points
                    ]
                    panel.plot(values, floors, ":", color=color, label=f"at the ceiling, {threads} thread(s)")
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            for scale in (panel.xaxis, panel.yaxis):
                scale.set_major_formatter(ticker.FormatStrFormatter("%g"))
            panel.tick_params(labelsize="small")
            panel.grid(which="major", alpha=0.3)
            fixed = [f", {other} = {row[other]}" for row in members[:1] for other in BASE if other != axis]
            panel.set_title(f"{cell} {mode}{''.join(fixed)}", fontsize="x-small")
            panel.set_xlabel(axis, fontsize="small", labelpad=0)
        line[0].set_ylabel("ms per call", fontsize="small")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="lower center", ncols=6, fontsize="small")
    figure.suptitle(f"{run['dtype']}, I = H, {run['machine']}, torch {run['torch']}", fontsize="small")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def make_parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--threads",
        nargs="+",
        type=positive_int,
        default=[count for count in (1, 2) if count <= available_cores()],
        metavar="COUNT",
        help="numbers of threads to compare; default: %(default)s",
    )
    parser.add_argument(
        "--cells",
        nargs="+",
        default=DEFAULT_CELLS,
        metavar="CELL",
        help=f"rnn (short for rnn_tanh), {', '.join(CELLS)}; default: {' '.join(DEFAULT_CELLS)}",
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="default: both")
    parser.add_argument("--quick", action="store_true", help="a few tiny shapes, to see the output: some seconds")
    parser.add_argument(
        "--seconds",
        type=positive_float,
        default=None,
        help="for each shape, cell and mode at most (but at least five rounds), twice that for a share; default: 1, "
        "with --quick 0.05",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("benchmark-results"),
        metavar="FOLDER",
        help="where the table (.csv), the run's description (.json) and the plot (.png) go; default: %(default)s",
    )
    return parser


def choose_points(base: Sizes, axes: dict[str, tuple[int, ...]]) -> list[tuple[tuple[str, ...], Sizes]]:
    """Returns every shape once, with the axes that it stands on."""
    points: dict[tuple[int, ...], tuple[list[str], Sizes]] = {}
    for axis, values in axes.items():
        for value in values:
            sizes = base | {axis: value}
            points.setdefault(tuple(sizes.values()), ([], sizes))[0].append(axis)
    return [(tuple(names), sizes) for names, sizes in points.values()]


def write_rows(rows: list[dict[str, Any]], file: TextIO) -> None:
    """Writes the whole table in the place of what is there: floors come last."""
    file.seek(0)
    writer = csv.DictWriter(file, FIELDS)
    writer.writeheader()
    writer.writerows(rows)
    file.truncate()
    file.flush()


def run_points(
    points: list[tuple[tuple[str, ...], Sizes, Cell]],
    products: list[Product],
    options: argparse.Namespace,
    file: TextIO,
) -> list[dict[str, Any]]:
    """Measures all points; prints and writes rows as soon as they are there."""
    from tqdm import tqdm

    rows: list[dict[str, Any]] = []
    with tqdm(points, unit="shape", file=sys.stderr) as progress:
        for names, sizes, cell in progress:
            case = make_case(sizes)
            progress.set_description(f"{cell.name} {case.shape}")
            for row in measure(names[0], case, cell, products if names == ("share",) else [], options):
                tqdm.write(format_row(row), file=sys.stdout)
                rows += [row | {"axis": name} for name in names]
            write_rows(rows, file)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    try:
        cells = find_cells(options.cells)
    except KeyError as error:
        parser.error(error.args[0])
    options.threads = sorted(set(options.threads))
    if options.threads[-1] > available_cores():
        parser.error(f"--threads: {options.threads[-1]} is more than the {available_cores()} cores of this process")
    folder = make_output_folder(parser, options.output)
    options.seconds = options.seconds or (0.05 if options.quick else 1.0)

    run = describe_run(CPU, torch.float32, options.threads[-1])
    stem = f"scaling{'-quick' if options.quick else ''}-cpu-float32"
    print(f"float32, {run['machine']}, torch {run['torch']}, rnnfast {run['rnnfast']} ({run['instruction_set']})")
    print(HEADING)
    products = make_products(QUICK_CEILING if options.quick else CEILING)
    points = choose_points(QUICK_BASE if options.quick else BASE, QUICK_AXES if options.quick else AXES)
    points.append((("share",), QUICK_FIGURE if options.quick else FIGURE))
    other_work = OtherWork()
    with open(folder / f"{stem}.csv", "w", newline="") as file:
        rows = run_points([(*point, cell) for point in points for cell in cells], products, options, file)
        add_floors(rows, options)
        write_rows(rows, file)
    other_work.finish(run)
    run["ceilings"] = {
        threads: {"gflops": rate, "product": product} for threads, (rate, product) in find_ceilings(rows).items()
    }
    (folder / f"{stem}.json").write_text(json.dumps(run, indent=2) + "\n")
    print()
    print(format_summary(rows))
    wrong = [row for row in rows if row["status"] != "ok"]
    if len(wrong) < len(rows):
        draw(rows, run, folder / f"{stem}.png")
    print(f"\nwritten: {folder / stem}.csv, .json, .png")
    if wrong:
        print(f"{len(wrong)} of {len(rows)} rows have wrong results and no time", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
