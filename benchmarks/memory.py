"""How much memory does a training step take at most, ours and torch.nn's, over the shapes of cases.py?

Each number is the rise of the resident memory from just before one forward and backward to its highest point, as the
kernel counts it, in a fresh process that has run only a tiny layer before: code, threads and weights are there, memory
kept from earlier calls is not. Every block above 64 KiB is mapped by itself and huge pages are off, so that this is the
memory in use, to the page, and not what an allocator keeps of what was freed. Some 0.5 MB are code run the first time.

`results_mb` is what no implementation can do without: output, final states, gradients of the input and of the weights.
Units: megabytes of 2^20 bytes; `ratio` is ours over torch.nn's (below 1: ours takes less). Where the layers have the
option `recompute`, the same with it, and `recompute_time`, its time over that without (medians, taking turns).
"""

import argparse
import csv
import ctypes
import json
import multiprocessing
import os
import sys
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TextIO

import torch
from cases import CASES, CELLS, DEFAULT_CELLS, Case, Cell, find_case, find_cells
from layers import make_call
from measure import (
    describe_run,
    geometric_mean,
    interleave,
    make_output_folder,
    peak_megabytes,
    positive_float,
    positive_int,
)

import rnnfast

CPU = torch.device("cpu")
TINY = Case("tiny", 2, 2, 8, 8, 1, 1, "made up")
# Below that the code that runs for the first time is a good part of what is measured.
LARGE_MB = 8.0
FIELDS = (
    *("case", "cell", *"TNIHLD", "results_mb", "torch_mb", "rnnfast_mb", "ratio"),
    *("recompute_mb", "recompute_ratio", "recompute_time"),
)
# From Linux's sys/prctl.h and glibc's malloc.h.
_PR_SET_THP_DISABLE, _M_MMAP_THRESHOLD = 41, -3


def build(package: Any, case: Case, cell: Cell, **options: Any) -> torch.nn.RNNBase:
    """Returns a package's layer of a shape."""
    layer_class = getattr(package, cell.class_name)
    return layer_class(case.I, case.H, num_layers=case.L, bidirectional=case.D == 2, **cell.options, **options)


def make_step(layer: torch.nn.RNNBase, case: Case) -> Any:
    """Returns a training step of a layer, as layers.py times it."""
    input = torch.randn(case.T, case.N, case.I)
    return make_call(layer, "training", input, torch.randn(case.T, case.N, case.H * case.D))


def accepts_recompute(cell: Cell) -> bool:
    """Whether our layer has the option `recompute`."""
    try:
        build(rnnfast, TINY, cell, recompute=True)
    except TypeError:
        return False
    return True


def _measure_here(connection: Connection, name: str, case: Case, cell: Cell, threads: int) -> None:
    """What the fresh process does: sends the peak of the layer called `name`."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    libc.mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    torch.set_num_threads(threads)
    package, options = {
        "torch": (torch.nn, {}),
        "rnnfast": (rnnfast, {}),
        "recompute": (rnnfast, {"recompute": True}),
    }[name]
    make_step(build(package, TINY, cell, **options), TINY)()
    connection.send(peak_megabytes(make_step(build(package, case, cell, **options), case)))


def peak_in_fresh_process(context: Any, name: str, case: Case, cell: Cell, threads: int) -> float:
    """Returns the megabytes of one training step of `torch`, `rnnfast` or `recompute`."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_here, args=(sender, name, case, cell, threads))
    process.start()
    sender.close()  # so that a process that dies is an end of file here, not a wait for ever
    try:
        peak = receiver.recv()
    finally:
        process.join()
    if peak is None:
        raise OSError("the system does not tell the highest resident size (/proc/self/clear_refs, VmHWM)")
    return peak


def result_megabytes(case: Case, cell: Cell) -> float:
    """Returns the size of the output, the final states and all gradients, in float32."""
    states = case.L * case.D * case.N * case.H * (2 if cell.class_name == "LSTM" else 1)
    weights = sum(parameter.numel() for parameter in build(torch.nn, case, cell).parameters())
    return (case.T * case.N * (case.H * case.D + case.I) + states + weights) * 4 / 2**20


def measure_case(context: Any, case: Case, cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """Returns one row of `FIELDS`."""
    row: dict[str, Any] = dict.fromkeys(FIELDS, "") | {"case": case.name, "cell": cell.name}
    row |= {letter: getattr(case, letter) for letter in "TNIHLD"}
    recompute = accepts_recompute(cell)
    names = ("torch", "rnnfast", *(("recompute",) if recompute else ()))
    peaks = {name: peak_in_fresh_process(context, name, case, cell, options.threads) for name in names}
    row |= {"results_mb": round(result_megabytes(case, cell), 1)} | {f"{name}_mb": peaks[name] for name in names}
    if peaks["torch"] > 0:
        row["ratio"] = round(peaks["rnnfast"] / peaks["torch"], 3)
    if recompute:
        if peaks["torch"] > 0:
            row["recompute_ratio"] = round(peaks["recompute"] / peaks["torch"], 3)
        steps = [make_step(build(rnnfast, case, cell, recompute=value), case) for value in (False, True)]
        row["recompute_time"] = round(interleave(*steps, options.seconds, CPU).ratio, 3)
    return row


HEADING = (
    f"{'case':<15} {'T N I H':<20} {'cell':<9} {'results MB':>10} {'torch MB':>9} {'rnnfast MB':>10} {'ratio':>6} "
    f"{'recompute MB':>12} {'ratio':>6} {'time':>6}"
)


def format_row(row: dict[str, Any]) -> str:
    """Returns one line of the printed table."""
    return (
        f"{row['case']:<15} {find_case(row['case']).shape:<20} {row['cell']:<9} {row['results_mb']:>10} "
        f"{row['torch_mb']:>9} {row['rnnfast_mb']:>10} {row['ratio']:>6} "
        f"{row['recompute_mb']:>12} {row['recompute_ratio']:>6} {row['recompute_time']:>6}"
    ).rstrip()


def format_summary(rows: Iterable[dict[str, Any]]) -> str:
    """Returns mean and worst ratio of each cell over the shapes where torch.nn takes at least `LARGE_MB`."""
    large = [row for row in rows if row["torch_mb"] >= LARGE_MB]
    lines = [f"over the shapes where torch.nn takes {LARGE_MB:g} MB or more:"]
    for cell in dict.fromkeys(row["cell"] for row in large):
        for name, label in (("ratio", "rnnfast"), ("recompute_ratio", "with recompute")):
            members = [row for row in large if row["cell"] == cell and row[name] != ""]
            if members:
                worst = max(members, key=lambda row: row[name])
                mean = geometric_mean(row[name] for row in members)
                lines.append(
                    f"  {cell:<9} {label:<15} {len(members):>2} shapes, geometric mean {mean:.2f} of torch.nn's, "
                    f"worst {worst[name]:.2f} ({worst['case']})"
                )
    return "\n".join(lines) if len(lines) > 1 else "no shape is large enough for a mean"


def make_parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--threads", type=positive_int, default=1, metavar="COUNT", help="of the step; default: %(default)s"
    )
    parser.add_argument(
        "--cells",
        nargs="+",
        default=DEFAULT_CELLS,
        metavar="CELL",
        help=f"rnn (short for rnn_tanh), {', '.join(CELLS)}; default: {' '.join(DEFAULT_CELLS)}",
    )
    parser.add_argument(
        "--cases", nargs="+", default=None, metavar="CASE", help="names of shapes in cases.py; default: all"
    )
    parser.add_argument("--quick", action="store_true", help="a few small shapes: some seconds")
    parser.add_argument(
        "--seconds",
        type=positive_float,
        default=None,
        help="for the time of recompute, for each shape and cell at most; default: 1, with --quick 0.1",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("benchmark-results"),
        metavar="FOLDER",
        help="where the table (.csv) and the run's description (.json) go; default: %(default)s",
    )
    return parser


def run_cases(
    chosen: list[tuple[Case, Cell]], context: Any, options: argparse.Namespace, file: TextIO
) -> list[dict[str, Any]]:
    """Measures all chosen shapes; prints and writes every row as soon as it is there."""
    from tqdm import tqdm

    writer = csv.DictWriter(file, FIELDS)
    writer.writeheader()
    rows = []
    with tqdm(chosen, unit="shape", file=sys.stderr) as progress:
        for case, cell in progress:
            progress.set_description(f"{case.name} {cell.name}")
            rows.append(measure_case(context, case, cell, options))
            writer.writerow(rows[-1])
            file.flush()
            tqdm.write(format_row(rows[-1]), file=sys.stdout)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    try:
        cells = find_cells(options.cells)
        cases = [find_case(name) for name in options.cases] if options.cases else None
    except KeyError as error:
        parser.error(error.args[0])
    if cases is None:
        cases = [case for case in CASES if case.quick or not options.quick]
    output = make_output_folder(parser, options.output)
    options.seconds = options.seconds or (0.1 if options.quick else 1.0)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    run = describe_run(CPU, torch.float32, options.threads)
    stem = f"memory{'-quick' if options.quick else ''}-cpu-float32-{options.threads}t"
    print(f"float32, {options.threads} thread(s), {run['machine']}, torch {run['torch']}, rnnfast {run['rnnfast']}")
    for cell in cells:
        if not accepts_recompute(cell):
            print(f"recompute is left out: rnnfast.{cell.class_name} ({cell.name}) has no such option")
    print(HEADING)
    # A server that has imported everything and run nothing forks the fresh processes. It finds this module by
    # PYTHONPATH alone; the other is what torch imports at the first backward from a given gradient, in two seconds.
    folders = [str(Path(__file__).resolve().parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(folders)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["memory", "torch.fx.experimental.symbolic_shapes"])
    with open(output / f"{stem}.csv", "w", newline="") as file:
        try:
            rows = run_cases([(case, cell) for case in cases for cell in cells], context, options, file)
        except OSError as error:
            print(f"memory.py: {error}", file=sys.stderr)
            return 1
    (output / f"{stem}.json").write_text(json.dumps(run, indent=2) + "\n")
    print()
    print(format_summary(rows))
    print(f"\nwritten: {output / stem}.csv, .json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
