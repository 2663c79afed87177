"""Times rnnfast's layers against torch.nn's, over the shapes of cases.py, in inference and in training.

Both layers have the same weights and take turns in one process. Before a shape is timed, outputs, final states and
all gradients are compared with torch.nn in float64; a shape whose numbers are wrong gets no time, and the exit status
is 1.

Units: times are milliseconds per call (medians), `ratio` is torch.nn's time over rnnfast's (above 1: rnnfast is
faster; the median over pairs of turns, its quartiles beside it), GFLOP/s counts rnnfast's matrix products alone.
Inference is one forward call under torch.inference_mode; with --prepack it is the only mode, and rnnfast.prepack keeps
our rearranged weights between the calls. Training is everything one step costs in the layer: clearing
gradients, forward, and backward from a dense gradient of the output to every weight and to the input.

On a CUDA device the shapes are others (CUDA_CASES), times are those of the device's clock, and two columns more say
`step_us`, the microseconds of a step of rnnfast's call, and `floor_us`, what a step would take if all products of the
call were one large product each, over all steps at once and measured here: no recurrence can do that.
"""

import argparse
import csv
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

import torch
from cases import CASES, CELLS, CUDA_CASES, DEFAULT_CELLS, Case, Cell, find_case, find_cells, product_flops
from measure import (
    OtherWork,
    Paired,
    add_run_options,
    describe_run,
    geometric_mean,
    interleave,
    make_output_folder,
    positive_float,
    seconds_of,
    start_run,
)

import rnnfast

MODES = ("inference", "training")

# Added to twice torch's own error, relative to the largest value of the tensor compared: a few units of the dtype's
# precision. Where torch's result happens to be exact (or, in float64, is the yardstick itself) a correct result in
# another order of summation must still pass.
ERROR_FLOORS = {torch.float64: 1e-12} | {
    dtype: units * torch.finfo(dtype).eps
    for dtype, units in ((torch.float32, 16), (torch.bfloat16, 1), (torch.float16, 1))
}

# relu has a kink: where a sum is zero to rounding, both slopes are right, and so are gradients that differ by a unit's
# whole share. Large shapes meet one now and then; a wrong kernel is wrong for every input.
RELU_ATTEMPTS = 3

_TIMING_FIELDS = ("rnnfast_ms", "torch_ms", "ratio", "ratio_low", "ratio_high", "pairs", "gflops")
FIELDS = ("case", "cell", "mode", *"TNIHLD", *_TIMING_FIELDS, "status")
CUDA_FIELDS = (*FIELDS, "step_us", "floor_us")


class WrongResultError(Exception):
    """rnnfast's numbers are further from float64 than the rule allows."""


def build_pair(
    case: Case, cell: Cell, device: torch.device, dtype: torch.dtype, prepack: bool = False
) -> tuple[Any, Any]:
    """Returns rnnfast's and torch.nn's layer of a shape, with the same weights; ours prepacked if it is to be."""
    arguments = dict(
        input_size=case.I,
        hidden_size=case.H,
        num_layers=case.L,
        bidirectional=case.D == 2,
        device=device,
        dtype=dtype,
        **cell.options,
    )
    theirs = getattr(torch.nn, cell.class_name)(**arguments)
    ours = getattr(rnnfast, cell.class_name)(**arguments)
    ours.load_state_dict(theirs.state_dict())
    if prepack:
        rnnfast.prepack(ours)  # for as long as the layer lives
    return ours, theirs


def collect(layer: Any, input: torch.Tensor, loss_weights: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns outputs and every gradient of one call, by name; the loss mixes the output and all final states."""
    layer.zero_grad()
    leaf = input.detach().clone().requires_grad_()
    output, state = layer(leaf)
    results = {"output": output}
    if isinstance(state, tuple):
        results["h_n"], results["c_n"] = state
    else:
        results["h_n"] = state
    tensors = tuple(results.values())
    for (name, tensor), weight in zip(results.items(), loss_weights, strict=True):
        if tensor.shape != weight.shape:
            raise WrongResultError(f"{name}: {tuple(tensor.shape)} where torch.nn has {tuple(weight.shape)}")
    torch.autograd.backward(tensors, [w.to(t.dtype) for w, t in zip(loss_weights, tensors, strict=True)])
    results["gradient of input"] = leaf.grad
    for name, parameter in layer.named_parameters():
        results[f"gradient of {name}"] = parameter.grad
    with torch.inference_mode():
        results["output in inference"] = layer(input)[0]
    layer.zero_grad()
    return {name: tensor.detach() for name, tensor in results.items()}


def check_agreement(ours: Any, theirs: Any, input: torch.Tensor) -> None:
    """Compares both layers with torch.nn in float64 on the same weights and input.

    An error is the largest difference over the largest value of the float64 tensor. Ours may be at most twice torch's
    plus `ERROR_FLOORS`; being not finite where float64 is finite is always wrong.

    Raises:
        WrongResultError: names the tensor, both errors and the limit.
    """
    dtype = input.dtype
    exact_input = input.double()
    exact = type(theirs)(
        theirs.input_size,
        theirs.hidden_size,
        num_layers=theirs.num_layers,
        bidirectional=theirs.bidirectional,
        device=input.device,
        dtype=torch.float64,
        **({"nonlinearity": theirs.nonlinearity} if hasattr(theirs, "nonlinearity") else {}),
    )
    exact.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        output, state = exact(exact_input)
    states = state if isinstance(state, tuple) else (state,)
    loss_weights = [torch.randn_like(t).to(dtype) for t in (output, *states)]
    expected = collect(exact, exact_input, loss_weights)
    got_ours, got_theirs = collect(ours, input, loss_weights), collect(theirs, input, loss_weights)
    for name, truth in expected.items():
        a, b = got_ours[name], got_theirs[name]
        if a.dtype != b.dtype:
            raise WrongResultError(f"{name}: {a.dtype} where torch.nn has {b.dtype}")
        scale = max(truth.abs().max().item(), torch.finfo(torch.float64).tiny)
        error_ours = (a.double() - truth).abs().max().item() / scale
        error_theirs = (b.double() - truth).abs().max().item() / scale
        limit = 2 * error_theirs + ERROR_FLOORS[dtype]
        # Written so that NaN fails.
        if not error_ours <= limit:
            raise WrongResultError(
                f"{name}: error {error_ours:.2g} against float64, torch.nn's {error_theirs:.2g}, limit {limit:.2g}"
            )


def make_call(layer: Any, mode: str, input: torch.Tensor, grad_output: torch.Tensor) -> Callable[[], Any]:
    """Returns the call that is timed. It gives what the layer gives; in training the output and the input's leaf."""
    if mode == "inference":

        def infer() -> Any:
            with torch.inference_mode():
                return layer(input)

        return infer

    leaf = input.detach().clone().requires_grad_()

    def train() -> tuple[torch.Tensor, torch.Tensor]:
        layer.zero_grad(set_to_none=True)
        leaf.grad = None
        output, _ = layer(leaf)
        output.backward(grad_output)
        return output, leaf

    return train


def measure_case(
    case: Case,
    cell: Cell,
    modes: Iterable[str],
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    prepack: bool = False,
) -> list[dict[str, Any]]:
    """Checks and times one shape and cell; returns one row of `FIELDS` per mode, without times when it is wrong."""
    torch.manual_seed(0)
    ours, theirs = build_pair(case, cell, device, dtype, prepack)
    input = torch.randn(case.T, case.N, case.I, device=device, dtype=dtype)
    grad_output = torch.randn(case.T, case.N, case.H * case.D, device=device, dtype=dtype)
    status = "ok"
    for _ in range(RELU_ATTEMPTS if cell.options.get("nonlinearity") == "relu" else 1):
        try:
            check_agreement(ours, theirs, input)
        except WrongResultError as error:
            status = f"wrong: {error}"
            input = torch.randn_like(input)
        else:
            status = "ok"
            break
    rows = []
    for mode in modes:
        row: dict[str, Any] = dict.fromkeys(FIELDS, "")
        row |= {"case": case.name, "cell": cell.name, "mode": mode, "status": status}
        row |= {letter: getattr(case, letter) for letter in "TNIHLD"}
        if status == "ok":
            paired = interleave(
                make_call(ours, mode, input, grad_output), make_call(theirs, mode, input, grad_output), seconds, device
            )
            row |= timing_fields(paired, product_flops(case, cell, mode == "training"))
            if device.type == "cuda":
                row["step_us"] = float(f"{paired.ours / case.T * 1e6:.3g}")
                row["floor_us"] = float(f"{floor_seconds(case, cell, mode, device, dtype) / case.T * 1e6:.3g}")
        rows.append(row)
    return rows


def floor_seconds(case: Case, cell: Cell, mode: str, device: torch.device, dtype: torch.dtype) -> float:
    """Returns the seconds of the products of one call with every weight used once, for all rows; see above."""
    x = torch.randn(case.T * case.N, case.I + case.H, device=device, dtype=dtype)
    weights = torch.randn(case.I + case.H, cell.num_gates * case.H, device=device, dtype=dtype)
    one = product_flops(Case("", case.T, case.N, case.I, case.H, 1, 1, ""), cell, False)
    share = product_flops(case, cell, mode == "training") / one  # layers, directions, and the products of backward
    return share * seconds_of(lambda: x @ weights, device)


def timing_fields(paired: Paired, flops: int) -> dict[str, Any]:
    """Returns the fields of a row that are measured, as numbers rounded to what they are worth."""
    return {
        "rnnfast_ms": float(f"{paired.ours * 1e3:.4g}"),
        "torch_ms": float(f"{paired.theirs * 1e3:.4g}"),
        "ratio": round(paired.ratio, 3),
        "ratio_low": round(paired.low, 3),
        "ratio_high": round(paired.high, 3),
        "pairs": paired.pairs,
        "gflops": float(f"{flops / paired.ours / 1e9:.3g}"),
    }


HEADING = (
    f"{'case':<15} {'T N I H':<20} {'cell':<9} {'mode':<10} {'rnnfast ms':>10} {'torch ms':>10} {'ratio':>6} "
    f"{'quartiles':>12} {'GFLOP/s':>8}"
)


CUDA_HEADING = f"{HEADING} {'us/step':>8} {'floor':>8}"


def format_row(row: dict[str, Any]) -> str:
    """Returns one line of the printed table."""
    start = f"{row['case']:<15} {find_case(row['case']).shape:<20} {row['cell']:<9} {row['mode']:<10} "
    if row["status"] != "ok":
        return start + row["status"]
    quartiles = f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}"
    times = f"{row['rnnfast_ms']:>10.4g} {row['torch_ms']:>10.4g}"
    text = start + f"{times} {row['ratio']:>6.2f} {quartiles:>12} {row['gflops']:>8.3g}"
    return text + (f" {row['step_us']:>8.3g} {row['floor_us']:>8.3g}" if "step_us" in row else "")


def summarize(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns, per cell and mode, the number of shapes, the geometric mean of the ratios and the worst shape."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["status"] == "ok":
            groups.setdefault((row["cell"], row["mode"]), []).append(row)
    summary = []
    for (cell, mode), members in groups.items():
        worst = min(members, key=lambda row: float(row["ratio"]))
        summary.append(
            {
                "cell": cell,
                "mode": mode,
                "shapes": len(members),
                "mean": geometric_mean(float(row["ratio"]) for row in members),
                "worst": float(worst["ratio"]),
                "worst_case": worst["case"],
            }
        )
    return summary


def format_summary(rows: Iterable[dict[str, Any]]) -> str:
    """Returns the printed summary."""
    lines = [f"{'cell':<9} {'mode':<10} {'shapes':>6} {'geometric mean':>15} {'worst':>6}"]
    for group in summarize(rows):
        lines.append(
            f"{group['cell']:<9} {group['mode']:<10} {group['shapes']:>6} {group['mean']:>14.2f}x "
            f"{group['worst']:>5.2f}x  {group['worst_case']}"
        )
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], run: dict[str, Any], path: Path) -> None:
    """Draws the ratios with their quartiles, one panel per mode, one row per shape, one colour per cell."""
    import matplotlib

    matplotlib.use("Agg")  # files only: works without a display
    from matplotlib import pyplot, ticker

    timed = [row for row in rows if row["status"] == "ok"]
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in timed)]
    names = [case.name for case in (*CASES, *CUDA_CASES) if any(row["case"] == case.name for row in timed)]
    cells = [cell for cell in CELLS if any(row["cell"] == cell for row in timed)]
    figure, panels = pyplot.subplots(
        1, len(modes), figsize=(4 + 3.5 * len(modes), 1.8 + 0.3 * len(names)), sharey=True, squeeze=False
    )
    for panel, mode in zip(panels[0], modes, strict=True):
        for index, cell in enumerate(cells):
            points = [row for row in timed if row["mode"] == mode and row["cell"] == cell]
            ratios = [row["ratio"] for row in points]
            spread = [
                [max(row["ratio"] - row["ratio_low"], 0) for row in points],
                [max(row["ratio_high"] - row["ratio"], 0) for row in points],
            ]
            heights = [names.index(row["case"]) + 0.18 * (index - (len(cells) - 1) / 2) for row in points]
            panel.errorbar(ratios, heights, xerr=spread, fmt="o", markersize=4, capsize=2, label=cell)
        panel.axvline(1.0, color="black", linewidth=0.8)
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(ticker.LogLocator(base=10, subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        panel.xaxis.set_minor_formatter(ticker.NullFormatter())
        panel.grid(axis="x", which="major", alpha=0.3)
        panel.set_title(mode)
        panel.set_xlabel("torch.nn's time / rnnfast's time")
    panels[0][0].set_yticks(range(len(names)), [f"{name}  ({find_case(name).shape})" for name in names])
    panels[0][0].invert_yaxis()
    panels[0][-1].legend(loc="best", fontsize="small")
    figure.suptitle(
        f"{run['dtype']}, {run['threads']} thread(s), {run['machine']}, torch {run['torch']}", fontsize="small"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def make_parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_run_options(parser)
    parser.add_argument(
        "--cells",
        nargs="+",
        default=DEFAULT_CELLS,
        metavar="CELL",
        help=f"rnn (short for rnn_tanh), {', '.join(CELLS)}; default: {' '.join(DEFAULT_CELLS)}",
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="default: both")
    parser.add_argument("--prepack", action="store_true", help="inference with our rearranged weights kept")
    parser.add_argument(
        "--cases", nargs="+", default=None, metavar="CASE", help="names of shapes in cases.py; default: all"
    )
    parser.add_argument("--quick", action="store_true", help="a few small shapes, short turns: about half a minute")
    parser.add_argument(
        "--seconds",
        type=positive_float,
        default=None,
        help="time to spend on one shape, cell and mode at most, in seconds (at least five pairs of turns are always "
        "taken); default: 4, with --quick 0.4",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("benchmark-results"),
        metavar="FOLDER",
        help="where the table (.csv), the run's description (.json) and the plot (.png) go; default: %(default)s",
    )
    return parser


def run_cases(
    chosen: list[tuple[Case, Cell]],
    options: argparse.Namespace,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    file: TextIO,
) -> list[dict[str, Any]]:
    """Measures all chosen shapes; prints and writes every row as soon as it is there."""
    from tqdm import tqdm

    writer = csv.DictWriter(file, CUDA_FIELDS if device.type == "cuda" else FIELDS)
    writer.writeheader()
    rows: list[dict[str, Any]] = []
    with tqdm(chosen, unit="shape", file=sys.stderr) as progress:
        for case, cell in progress:
            progress.set_description(f"{case.name} {cell.name}")
            for row in measure_case(case, cell, options.modes, device, dtype, seconds, options.prepack):
                rows.append(row)
                writer.writerow(row)
                file.flush()
                tqdm.write(format_row(row), file=sys.stdout)
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
        grid = CUDA_CASES if options.device == "cuda" else CASES
        cases = [case for case in grid if case.quick or not options.quick]
    device, dtype, threads = start_run(parser, options)
    if options.prepack:
        if device.type != "cpu":
            parser.error("--prepack: weights are kept on the CPU only")
        if tuple(options.modes) == ("training",):
            parser.error("--prepack: gains are in inference only")
        options.modes = ("inference",)
    folder = make_output_folder(parser, options.output)
    seconds = options.seconds or (0.4 if options.quick else 4.0)

    run = describe_run(device, dtype, threads) | ({"prepack": True} if options.prepack else {})
    where = "cuda" if device.type == "cuda" else f"cpu-{run['instruction_set']}"
    kind = f"{'-quick' if options.quick else ''}-{where}{'-prepack' if options.prepack else ''}"
    name = f"layers{kind}-{run['dtype']}-{threads}t"
    print(
        f"rnnfast {run['rnnfast']} ({'cuda' if device.type == 'cuda' else run['instruction_set']}) against torch "
        f"{run['torch']}: {run['dtype']}, {threads} thread(s), {run['machine']}"
    )
    print(CUDA_HEADING if device.type == "cuda" else HEADING)
    with open(folder / f"{name}.csv", "w", newline="") as file:
        (folder / f"{name}.json").write_text(json.dumps(run, indent=2) + "\n")
        other_work = OtherWork()
        rows = run_cases([(case, cell) for case in cases for cell in cells], options, device, dtype, seconds, file)

    other_work.finish(run)
    (folder / f"{name}.json").write_text(json.dumps(run, indent=2) + "\n")
    wrong = [row for row in rows if row["status"] != "ok"]
    print()
    print(format_summary(rows))
    if len(wrong) < len(rows):
        draw(rows, run, folder / f"{name}.png")
    print(f"\nwritten: {folder / name}.csv, .json, .png")
    if wrong:
        print(f"{len(wrong)} of {len(rows)} rows have wrong results and no time", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
