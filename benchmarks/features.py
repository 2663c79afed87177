"""Times what the layers have and torch.nn's do not: resets, lengths, cell states of all steps, other cells.

Each row sets our call against another way (`against`) to the same numbers; both take turns, and a row whose outputs or
gradients differ gets no time and makes the exit status 1:

  resets   plain     our own layer without resets: what they cost
  resets   loop      torch.nn's layer called once per step, the state multiplied by what a reset leaves of it
  lengths  packing   pack_padded_sequence, torch.nn's layer, pad_packed_sequence; lengths uniform in 1..T
  lengths  plain     our own layer without lengths, on the padding too: what leaving it out saves
  cells    plain     our own LSTM without return_cells: what they cost
  cells    loop      torch.nn's LSTM called once per step, which is how one gets them there
  (option) plain     our own layer without the option, for each of OPTIONS: what another cell costs

Units: milliseconds per call (medians); `ratio` is the other way's time over ours (above 1: ours is faster; the median
over pairs of turns, its quartiles beside it). Inference is in evaluation mode, where zoneout is a mean and dropout is
nothing; training is forward and backward from a dense gradient of the output, with masks drawn from torch's generator.
`goal` is the ratio that we want at least (GOALS; empty where we have set none); what falls short of it is named last.
"""

import argparse
import csv
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cases import CELLS, Cell, find_cells
from measure import (
    OtherWork,
    add_run_options,
    describe_run,
    interleave,
    make_output_folder,
    positive_float,
    start_run,
)
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnfast

MODES = ("inference", "training")
SHAPES = ((128, 16, 256, 256), (128, 128, 256, 256))  # T, N, I, H
QUICK_SHAPES = ((16, 4, 32, 32),)
# Options of the layers by the name of a row, for each class.
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "RNN": {"zoneout": {"zoneout": 0.1}, "dropout": {"recurrent_dropout": 0.25}},
    "GRU": {
        "before": {"reset_after": False},
        "reset": {"gates": "reset"},
        "update": {"gates": "update"},
        "norm": {"layer_norm": True},
        "zoneout": {"zoneout": 0.1},
        "dropout": {"recurrent_dropout": 0.25},
    },
    "LSTM": {
        "peephole": {"peephole": True},
        "coupled": {"coupled": True},
        "norm": {"layer_norm": True},
        "zoneout": {"zoneout": 0.1},
        "dropout": {"recurrent_dropout": 0.25},
    },
}
# The least ratio of a row: resets cost at most a tenth, another cell at most 1.3 times its plain sibling.
GOALS = {("resets", "plain"): 1 / 1.1, ("resets", "loop"): 5.0, ("lengths", "packing"): 1.5}
GOALS |= {(name, "plain"): 1 / 1.3 for options in OPTIONS.values() for name in options}
RESET_RATE = 0.02  # an episode of some 50 steps
# Largest difference allowed, as a share of the largest value; a wrong boundary differs by a share near 1.
TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-9, torch.bfloat16: 0.1, torch.float16: 0.02}
FIELDS = (
    *("feature", "against", "cell", "mode", *"TNIH", "rnnfast_ms", "other_ms", "ratio", "ratio_low", "ratio_high"),
    *("goal", "pairs", "status"),
)
Way = Callable[[torch.Tensor], torch.Tensor]


class Contest(NamedTuple):
    """Two ways; `same` says whether they compute the same numbers."""

    feature: str
    against: str
    ours: Way
    theirs: Way
    modules: tuple[Any, Any]
    same: bool

    @property
    def parameters(self) -> tuple[list[Any], list[Any]]:
        """Of both."""
        return list(self.modules[0].parameters()), list(self.modules[1].parameters())


def loop_over_steps(layer: Any, x: torch.Tensor, keep: torch.Tensor | None, cells: bool) -> torch.Tensor:
    """Calls torch.nn's layer step by step; `keep` [T, 1, N, 1] is 0 where the state is reset."""
    batch, is_lstm = x.shape[1], isinstance(layer, torch.nn.LSTM)
    zeros = x.new_zeros(1, batch, layer.hidden_size)
    state: Any = (zeros, zeros) if is_lstm else zeros
    outputs = []
    for t, step in enumerate(x.split(1)):
        if keep is not None:
            state = tuple(s * keep[t] for s in state) if is_lstm else state * keep[t]
        output, state = layer(step, state)
        outputs.append(state[1] if cells else output)
    return torch.cat(outputs)


def contests(cell: Cell, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Iterator[Contest]:
    """All rows of one cell and shape."""
    T, N, I, H = shape  # noqa: E741
    options = {"device": device, "dtype": dtype, **cell.options}
    theirs = getattr(torch.nn, cell.class_name)(I, H, **options)
    ours = getattr(rnnfast, cell.class_name)(I, H, **options)
    ours.load_state_dict(theirs.state_dict())
    both, own = (ours, theirs), (ours, ours)
    resets = torch.rand(T, N, device=device) < RESET_RATE
    keep = (~resets).to(dtype)[:, None, :, None]
    lengths = torch.randint(1, T + 1, (N,))

    def with_resets(x: torch.Tensor) -> torch.Tensor:
        return ours(x, resets=resets)[0]

    def with_lengths(x: torch.Tensor) -> torch.Tensor:
        return ours(x, lengths=lengths)[0]

    def packing(x: torch.Tensor) -> torch.Tensor:
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        return pad_packed_sequence(theirs(packed)[0], total_length=T)[0]

    def plain(x: torch.Tensor) -> torch.Tensor:
        return ours(x)[0]

    yield Contest("resets", "plain", with_resets, plain, own, same=False)
    yield Contest("resets", "loop", with_resets, lambda x: loop_over_steps(theirs, x, keep, False), both, same=True)
    yield Contest("lengths", "packing", with_lengths, packing, both, same=True)
    yield Contest("lengths", "plain", with_lengths, plain, own, same=False)
    if isinstance(ours, rnnfast.LSTM):
        yield Contest("cells", "plain", lambda x: ours(x, return_cells=True)[0], plain, own, same=True)
        yield Contest(
            "cells",
            "loop",
            lambda x: ours(x, return_cells=True)[2],
            lambda x: loop_over_steps(theirs, x, None, True),
            both,
            same=True,
        )
    for name, option in OPTIONS[cell.class_name].items():
        other = getattr(rnnfast, cell.class_name)(I, H, **options, **option)
        yield Contest(name, "plain", lambda x, other=other: other(x)[0], plain, (other, ours), same=False)


def difference(contest: Contest, x: torch.Tensor, grad_output: torch.Tensor) -> float:
    """Returns the largest difference of outputs and gradients, each as a share of the largest value."""
    results = []
    for way, parameters in zip((contest.ours, contest.theirs), contest.parameters, strict=True):
        leaf = x.clone().requires_grad_()
        output = way(leaf)
        results.append([output.detach(), *torch.autograd.grad(output, [leaf, *parameters], grad_output)])
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*results, strict=True))


def make_call(way: Way, mode: str, x: torch.Tensor, grad_output: torch.Tensor, parameters: Any) -> Callable[[], None]:
    """Returns the call that is timed."""

    def infer() -> None:
        with torch.inference_mode():
            way(x)

    leaf = x.clone().requires_grad_()

    def train() -> None:
        torch.autograd.grad(way(leaf), [leaf, *parameters], grad_output)

    return infer if mode == "inference" else train


def measure(
    contest: Contest, cell: str, shape: tuple[int, ...], modes: list[str], device: Any, dtype: Any, seconds: float
) -> Iterator[dict[str, Any]]:
    """Checks and times one contest: one row of `FIELDS` per mode."""
    T, N, I, H = shape  # noqa: E741
    x = torch.randn(T, N, I, device=device, dtype=dtype)
    grad_output = torch.randn(T, N, H, device=device, dtype=dtype)
    status = "ok"
    if contest.same:
        error = difference(contest, x, grad_output)
        if not error <= TOLERANCES[dtype]:  # so that NaN fails
            status = f"wrong: differs by {error:.2g}"
    for mode in modes:
        row: dict[str, Any] = dict.fromkeys(FIELDS, "")
        row |= {"feature": contest.feature, "against": contest.against, "cell": cell, "mode": mode, "status": status}
        row |= dict(zip("TNIH", shape, strict=True))
        if (contest.feature, contest.against) in GOALS:
            row["goal"] = round(GOALS[contest.feature, contest.against], 2)
        for module in contest.modules:
            module.train(mode == "training")
        if status == "ok":
            calls = [
                make_call(way, mode, x, grad_output, parameters)
                for way, parameters in zip((contest.ours, contest.theirs), contest.parameters, strict=True)
            ]
            paired = interleave(*calls, seconds, device)
            row |= {
                "rnnfast_ms": float(f"{paired.ours * 1e3:.4g}"),
                "other_ms": float(f"{paired.theirs * 1e3:.4g}"),
                "ratio": round(paired.ratio, 3),
                "ratio_low": round(paired.low, 3),
                "ratio_high": round(paired.high, 3),
                "pairs": paired.pairs,
            }
        yield row


HEADING = (
    f"{'feature':<8} {'against':<8} {'cell':<9} {'mode':<10} {'T N I H':<16} {'rnnfast ms':>10} {'other ms':>10} "
    f"{'ratio':>7} {'quartiles':>13} {'goal':>5}"
)


def format_row(row: dict[str, Any]) -> str:
    """Returns one line of the printed table."""
    shape = " ".join(str(row[letter]) for letter in "TNIH")
    start = f"{row['feature']:<8} {row['against']:<8} {row['cell']:<9} {row['mode']:<10} {shape:<16} "
    if row["status"] != "ok":
        return start + row["status"]
    quartiles = f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}"
    return (
        start
        + f"{row['rnnfast_ms']:>10.4g} {row['other_ms']:>10.4g} {row['ratio']:>7.2f} {quartiles:>13} {row['goal']:>5}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_run_options(parser)
    parser.add_argument("--cells", nargs="+", default=["gru", "lstm"], metavar="CELL", help=f"{', '.join(CELLS)}")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="default: both")
    parser.add_argument("--quick", action="store_true", help="one small shape, short turns: a few seconds")
    parser.add_argument(
        "--seconds", type=positive_float, default=None, help="per row at most; default: 4, with --quick 0.2"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("benchmark-results"),
        metavar="FOLDER",
        help="where the table (.csv) and the run's description (.json) go; default: %(default)s",
    )
    options = parser.parse_args(arguments)
    try:
        cells = find_cells(options.cells)
    except KeyError as error:
        parser.error(error.args[0])
    device, dtype, threads = start_run(parser, options)
    folder = make_output_folder(parser, options.output)
    run = describe_run(device, dtype, threads)
    name = f"features{'-quick' if options.quick else ''}-{run['device']}-{run['dtype']}-{threads}t"
    print(f"rnnfast {run['rnnfast']} ({run['instruction_set']}): {run['dtype']}, {threads} thread(s), {run['machine']}")
    print(HEADING)
    torch.manual_seed(0)
    other_work = OtherWork()
    wrong = rows = 0
    short = []
    with open(folder / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for shape in QUICK_SHAPES if options.quick else SHAPES:
            for cell in cells:
                for contest in contests(cell, shape, device, dtype):
                    seconds = options.seconds or (0.2 if options.quick else 4.0)
                    for row in measure(contest, cell.name, shape, options.modes, device, dtype, seconds):
                        rows += 1
                        wrong += row["status"] != "ok"
                        if row["status"] == "ok" and row["goal"] and row["ratio"] < row["goal"]:
                            short.append(row)
                        writer.writerow(row)
                        file.flush()
                        print(format_row(row), flush=True)
    other_work.finish(run)
    (folder / f"{name}.json").write_text(json.dumps(run, indent=2) + "\n")
    print(f"\nwritten: {folder / name}.csv, .json")
    for row in short:
        print("short of its goal:", " ".join(format_row(row).split()))
    if wrong:
        print(f"{wrong} of {rows} rows have wrong results and no time", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
