"""Times one step of one sequence, as a program takes it that answers in real time: T = 1, N = 1, microseconds.

For each cell and hidden size, all ways beside torch.nn's layer (`ratio`: its time over that of the way, the median over
pairs of turns, its quartiles beside it), every way carrying its state from step to step without gradients:

  module    our layer, called on [1, 1, I] with its state
  prepack   the same with its weights prepacked
  cell      our RNNCell, GRUCell or LSTMCell on [1, I]
  decoder   rnnfast.Decoder.step on [I]
  onnx      ONNX Runtime on the layer's exported node, where `onnxruntime` and rnnfast's extra `onnx` are installed

Outputs after some steps are compared first; a way that differs gets no time and makes the exit status 1. `floor` is the
time that reading the weights once would take, in microseconds, at the speed of a sum over as many bytes measured in
the same run: where they come from memory it is what no way can be below.
"""

import argparse
import copy
import csv
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from cases import CELLS, DEFAULT_CELLS, Cell, find_cells
from measure import OtherWork, add_run_options, describe_run, interleave, make_output_folder, positive_float, start_run

import rnnfast

SIZES = (64, 256, 1024)
QUICK_SIZES = (64, 256)
STEPS = 5  # that are compared
# Largest difference allowed; outputs are at most 1 for tanh and gates.
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 0.1, torch.float16: 0.02}
FIELDS = ("cell", "H", "way", "us", "torch_us", "ratio", "ratio_low", "ratio_high", "floor_us", "pairs", "status")
Step = Callable[[torch.Tensor], torch.Tensor]


def carrying(layer: Any, *outer: int) -> Step:
    """Returns a step that keeps the layer's or cell's state."""
    state: Any = None
    is_cell = isinstance(layer, torch.nn.RNNCellBase)

    def step(x: torch.Tensor) -> torch.Tensor:
        nonlocal state
        given = x.view(*outer, -1)
        if is_cell:
            state = layer(given, state)
            output = state[0] if isinstance(state, tuple) else state
        else:
            output, state = layer(given, state)
        return output

    return step


def onnx_step(layer: Any, dtype: torch.dtype) -> Step | None:
    """Returns a step of ONNX Runtime on one thread, or None, having said why not."""
    if dtype != torch.float32:
        return None
    try:
        import onnxruntime
    except ImportError as error:
        print(f"skipped onnx: {error}", file=sys.stderr)
        return None
    is_lstm = isinstance(layer, torch.nn.LSTM)
    zeros = torch.zeros(1, 1, layer.hidden_size)
    hx = (zeros, zeros.clone()) if is_lstm else zeros  # torch.export takes one tensor given twice for one input
    try:
        program = torch.onnx.export(
            layer,
            (torch.zeros(1, 1, layer.input_size), hx),
            dynamo=True,
            verbose=False,
            custom_translation_table=rnnfast.onnx.translation_table(),
        )
    except ImportError as error:
        print(f"skipped onnx: {error}", file=sys.stderr)
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [given.name for given in session.get_inputs()]
    states = [zeros.numpy()] * (len(names) - 1)

    def step(x: torch.Tensor) -> torch.Tensor:
        nonlocal states
        output, *states = session.run(None, dict(zip(names, [x.view(1, 1, -1).numpy(), *states], strict=True)))
        return torch.from_numpy(output)

    return step


def ways(cell: Cell, size: int, dtype: torch.dtype) -> Iterator[tuple[str, Step, Step]]:
    """Each way with torch.nn's layer of the same weights."""
    theirs = getattr(torch.nn, cell.class_name)(size, size, dtype=dtype, **cell.options).eval()
    layer = getattr(rnnfast, cell.class_name)(size, size, dtype=dtype, **cell.options).eval()
    layer.load_state_dict(theirs.state_dict())
    kept = copy.deepcopy(layer)
    rnnfast.prepack(kept)  # for as long as the layer lives
    one = getattr(rnnfast, f"{cell.class_name}Cell")(size, size, dtype=dtype, **cell.options)
    one.load_state_dict({name.removesuffix("_l0"): weight for name, weight in theirs.state_dict().items()})
    made: list[tuple[str, Step | None]] = [
        ("module", carrying(layer, 1, 1)),
        ("prepack", carrying(kept, 1, 1)),
        ("cell", carrying(one, 1)),
        ("decoder", rnnfast.Decoder(layer).step),
        ("onnx", onnx_step(layer, dtype)),
    ]
    for name, step in made:
        if step is not None:
            yield name, step, carrying(theirs, 1, 1)


def difference(ours: Step, theirs: Step, size: int, dtype: torch.dtype) -> float:
    """Returns the largest difference of the outputs of some steps, from the zero state."""
    inputs = torch.randn(STEPS, size).to(dtype)
    return max((ours(x).flatten() - theirs(x).flatten()).abs().max().item() for x in inputs)


def reading_time(cell: Cell, size: int, dtype: torch.dtype) -> float:
    """Returns the seconds of a sum over as many bytes as the weights have, the quickest of many."""
    memory = torch.zeros(cell.num_gates * size * 2 * size, dtype=dtype).view(torch.int8)
    numbers = memory.view(torch.float32 if memory.numel() % 4 == 0 else torch.int8)
    best = float("inf")
    for _ in range(30):
        start = time.perf_counter()
        numbers.sum()
        best = min(best, time.perf_counter() - start)
    return best


@torch.no_grad()
def measure(options: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> Iterator[dict[str, Any]]:
    """Yields a row for each cell, size and way."""
    for cell in find_cells(options.cells):
        for size in QUICK_SIZES if options.quick else SIZES:
            torch.manual_seed(0)
            floor = reading_time(cell, size, dtype)
            for name, ours, theirs in ways(cell, size, dtype):
                row: dict[str, Any] = dict.fromkeys(FIELDS, "")
                row |= {"cell": cell.name, "H": size, "way": name, "status": "ok", "floor_us": f"{floor * 1e6:.1f}"}
                error = difference(ours, theirs, size, dtype)
                if not error <= TOLERANCES[dtype]:
                    yield row | {"status": f"differs by {error:.2g}"}
                    continue
                x = torch.randn(size).to(dtype)
                paired = interleave(lambda: ours(x), lambda: theirs(x), options.seconds, device)  # noqa: B023
                yield row | {
                    "us": f"{paired.ours * 1e6:.2f}",
                    "torch_us": f"{paired.theirs * 1e6:.2f}",
                    "ratio": f"{paired.ratio:.2f}",
                    "ratio_low": f"{paired.low:.2f}",
                    "ratio_high": f"{paired.high:.2f}",
                    "pairs": paired.pairs,
                }


def parse_arguments(arguments: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_options(parser)
    parser.add_argument("--cells", nargs="+", default=list(DEFAULT_CELLS), choices=[*CELLS, "rnn"], metavar="CELL")
    parser.add_argument("--quick", action="store_true", help="two sizes, a tenth of the time")
    parser.add_argument("--seconds", type=positive_float, default=None, help="for each row (default 2; quick 0.2)")
    parser.add_argument("--output", type=Path, help="folder for the table and the description of the run")
    options = parser.parse_args(arguments)
    options.seconds = options.seconds or (0.2 if options.quick else 2.0)
    return parser, options


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; with --output writes it too. Returns the exit status."""
    parser, options = parse_arguments(arguments)
    device, dtype, threads = start_run(parser, options)
    if device.type != "cpu":
        parser.error("--device: the Decoder runs on the CPU only")
    folder = make_output_folder(parser, options.output) if options.output else None
    run = describe_run(device, dtype, threads)
    other = OtherWork()
    print(" ".join(f"{name:>11}" for name in FIELDS))
    rows = []
    for row in measure(options, dtype, device):
        rows.append(row)
        print(" ".join(f"{row[name]!s:>11}" for name in FIELDS), flush=True)
    other.finish(run)
    if folder is not None:
        stem = f"latency-{device.type}-{run['dtype']}-{threads}t"
        (folder / f"{stem}.json").write_text(json.dumps(run, indent=2) + "\n")
        with (folder / f"{stem}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
    return int(any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
