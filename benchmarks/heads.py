"""How fast are the heads: the loss over a large vocabulary, generation, and a whole training step of the book's models?

Three questions, each against the plain way in PyTorch, the two taking turns in one process:
  loss        output layer and cross entropy, forward and backward, of V=10,000, T=35, N=32, H=256: time and peak memory
  generation  1,000 characters after one prompt, H=256: the loop in C++ against Python loops over torch.nn's layer and
              over our own
  step        a training step of Dive into Deep Learning's models (N=1024, T=32, H=32, V=28): loss, backward, clipping,
              SGD and all, against torch.nn with one-hot rows and torch's own output layer and cross entropy

Units: milliseconds a call (generation: a character), `ratio` is the plain way's time over ours (above 1: ours is
faster; the median over the pairs, quartiles beside it), memory in megabytes above what was there before the call.
No time is given for a result that is not the plain one's.
"""

import argparse
import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import CELLS, DEFAULT_CELLS, Cell, find_cells
from measure import (
    OtherWork,
    Paired,
    add_run_options,
    describe_run,
    interleave,
    make_output_folder,
    peak_megabytes,
    positive_float,
    start_run,
)
from torch import Tensor, nn
from torch.nn import functional as F

import rnnfast
from rnnfast import RNNLM
from rnnfast.lm import linear_cross_entropy

QUESTIONS = ("loss", "generation", "step")
FIELDS = (
    "question", "case", "against", "rnnfast_ms", "plain_ms", "ratio", "ratio_low", "ratio_high", "pairs",
    "rnnfast_peak_mb", "plain_peak_mb", "status",
)  # fmt: skip


def row_of(
    question: str, case: str, against: str, paired: Paired | None, calls: int = 1, **more: Any
) -> dict[str, Any]:
    """Returns one row of `FIELDS`; times are divided by `calls`."""
    row: dict[str, Any] = dict.fromkeys(FIELDS, "") | {"question": question, "case": case, "against": against}
    row["status"] = "ok" if paired else "wrong"
    if paired:
        row |= {
            "rnnfast_ms": float(f"{paired.ours * 1e3 / calls:.4g}"),
            "plain_ms": float(f"{paired.theirs * 1e3 / calls:.4g}"),
            "ratio": round(paired.ratio, 3),
            "ratio_low": round(paired.low, 3),
            "ratio_high": round(paired.high, 3),
            "pairs": paired.pairs,
        }
    return row | more


def measure_loss(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    kinds, rows, size = (1_000, 256, 64) if options.quick else (10_000, 35 * 32, 256)
    leaves = [torch.randn(shape, device=device, dtype=dtype) for shape in ((rows, size), (kinds, size), (kinds,))]
    hidden, weight, bias = (leaf.mul_(0.1).requires_grad_() for leaf in leaves)
    targets = torch.randint(kinds, (rows,), device=device)

    def forget() -> None:
        hidden.grad = weight.grad = bias.grad = None

    def ours() -> Tensor:
        forget()
        loss = linear_cross_entropy(hidden, weight, bias, targets)
        loss.backward()
        return loss.detach()

    def plain() -> Tensor:
        forget()
        loss = F.cross_entropy(F.linear(hidden, weight, bias), targets)
        loss.backward()
        return loss.detach()

    results = [[call(), *(leaf.grad.clone() for leaf in (hidden, weight, bias))] for call in (ours, plain)]
    tolerance = 1e-3 if dtype in (torch.float32, torch.float64) else 0.05
    same = all((a - b).abs().max() <= tolerance * b.abs().max() for a, b in zip(*results, strict=True))
    paired = interleave(ours, plain, options.seconds, device) if same else None
    memory = {}
    for name, call in (("rnnfast_peak_mb", ours), ("plain_peak_mb", plain)):
        forget()
        memory[name] = peak_megabytes(call)
    return [row_of("loss", f"V={kinds} rows={rows} H={size}", "torch", paired, **memory)]


def python_loop(rnn: nn.Module, output: nn.Linear, prompt: Tensor, length: int) -> Tensor:
    """Returns the likeliest tokens after a prompt [T, 1], a step of Python each: as lean as such a loop can be."""
    rows = torch.eye(output.out_features, dtype=output.weight.dtype)
    with torch.inference_mode():
        hidden, state = rnn(rows[prompt])
        written = []
        hidden = hidden[-1:]
        for _ in range(length):
            token = output(hidden).argmax(-1)
            written.append(token)
            hidden, state = rnn(rows[token], state)
    return torch.cat(written)


def measure_generation(
    cell: Cell, options: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    kinds, size, length = 28, 256, 100 if options.quick else 1000
    ours = getattr(rnnfast, cell.class_name)(kinds, size, **cell.options).to(dtype)
    theirs = getattr(nn, cell.class_name)(kinds, size, **cell.options).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    model = RNNLM(ours, kinds)
    prompt = torch.randint(kinds, (10, 1))
    same = model.generate(prompt, length).tokens.equal(python_loop(ours, model.output, prompt, length))
    rows = []
    for name, layer in (("torch.nn, Python loop", theirs), ("rnnfast, Python loop", ours)):
        paired = None
        if same:
            paired = interleave(
                lambda: model.generate(prompt, length),
                lambda layer=layer: python_loop(layer, model.output, prompt, length),
                options.seconds,
                device,
            )
        rows.append(row_of("generation", f"{cell.name} H={size}", name, paired, length))
    return rows


def measure_step(
    cell: Cell, options: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> list[dict[str, Any]]:
    kinds, size, steps, batch = 28, 32, 32, 128 if options.quick else 1024
    windows = torch.randint(kinds, (steps + 1, batch), generator=torch.Generator().manual_seed(1))

    def make(layers: Any) -> Callable[[], float]:
        torch.manual_seed(0)
        model = RNNLM(getattr(layers, cell.class_name)(kinds, size, **cell.options), kinds).to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step() -> float:
            optimizer.zero_grad(set_to_none=True)
            if layers is rnnfast:
                loss, _ = model.loss(windows[:-1], windows[1:])
            else:
                scores, _ = model(windows[:-1])
                loss = F.cross_entropy(scores.flatten(0, 1), windows[1:].flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            return loss.item()

        return step

    ours, theirs = make(rnnfast), make(nn)
    tolerance = 1e-4 if dtype in (torch.float32, torch.float64) else 0.05
    same = all(abs(ours() - theirs()) < tolerance for _ in range(5))
    paired = interleave(ours, theirs, options.seconds, device) if same else None
    return [row_of("step", f"{cell.name} N={batch} T={steps} H={size} V={kinds}", "torch.nn", paired)]


def format_row(row: dict[str, Any]) -> str:
    """Returns one line of the printed table."""
    start = f"{row['question']:<11} {row['case']:<30} {row['against']:<22}"
    if row["status"] != "ok":
        return f"{start} {row['status']}: not what the plain way gives"
    text = (
        f"{start} {row['rnnfast_ms']:>9.4g} {row['plain_ms']:>9.4g} {row['ratio']:>6.2f} "
        f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}"
    )
    ours, plain = row["rnnfast_peak_mb"], row["plain_peak_mb"]
    if isinstance(ours, float) and isinstance(plain, float) and plain > 0:
        text += f"   peak memory {ours:.1f} of {plain:.1f} MB ({ours / plain:.2f})"
    return text


def make_parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_run_options(parser)
    parser.add_argument("--questions", nargs="+", choices=QUESTIONS, default=QUESTIONS, help="default: all")
    parser.add_argument(
        "--cells", nargs="+", default=DEFAULT_CELLS, metavar="CELL", help=f"{', '.join(CELLS)}; default: three of them"
    )
    parser.add_argument("--seconds", type=positive_float, default=None, help="for each row; default: 10, quick 1")
    parser.add_argument("--quick", action="store_true", help="small sizes: a few seconds, for a look at the output")
    parser.add_argument(
        "--output",
        type=Path,
        default=None,
        metavar="FOLDER",
        help="write the table (.csv) and the machine (.json) there",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    options.seconds = options.seconds or (1.0 if options.quick else 10.0)
    try:
        cells = find_cells(options.cells)
    except KeyError as error:
        parser.error(error.args[0])
    device, dtype, threads = start_run(parser, options)
    if device.type != "cpu":
        parser.error("--device: the heads' own code runs on the CPU")
    folder = None if options.output is None else make_output_folder(parser, options.output)
    run = describe_run(device, dtype, threads)
    other_work = OtherWork()
    print(f"{'question':<11} {'case':<30} {'against':<22} {'rnnfast':>9} {'plain':>9} {'ratio':>6} quartiles   (ms)")
    rows: list[dict[str, Any]] = []
    for question in options.questions:
        if question == "loss":
            parts = [measure_loss(options, device, dtype)]
        else:
            measure = measure_generation if question == "generation" else measure_step
            parts = (measure(cell, options, device, dtype) for cell in cells)
        for part in parts:
            rows += part
            print("\n".join(format_row(row) for row in part), flush=True)
    other_work.finish(run)
    if folder is not None:
        stem = f"heads{'-quick' if options.quick else ''}-{device.type}-{run['dtype']}-{threads}t"
        with open(folder / f"{stem}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
        (folder / f"{stem}.json").write_text(json.dumps(run, indent=2) + "\n")
        print(f"written: {folder / stem}.csv, .json")
    return 1 if any(row["status"] != "ok" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
