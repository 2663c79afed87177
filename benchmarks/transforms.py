"""How much torch.func's transforms save over loops in Python, and torch.compile over eager.

  per-sample   loop      gradients of each of 64 samples, T 32, H 128: vmap(grad) against a loop of autograd over them
  per-sample   torch.nn  the same against a loop over torch.nn's layer
  ensemble     loop      8 members, N 1, H 64: vmap over their stacked weights against a call of each member
  stacked      loop      the same members by rnnfast.ops with stacked weights, without vmap, against a call of each
  vmap         loop      8 linear layers of torch.nn's, one row of 64 numbers: what vmap itself costs
  compiled     eager     linear, LSTM, linear, small and large: torch.compile against the same model in eager mode

Units: milliseconds per call (medians); `ratio` is the other way's time over ours (above 1: ours is faster; the median
over pairs of turns, its quartiles beside it). A row whose two ways differ gets no time and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import OtherWork, add_run_options, describe_run, interleave, make_output_folder, positive_float, start_run
from torch.func import functional_call, grad, stack_module_state, vmap

import rnnfast

CELLS = ("RNN", "GRU", "LSTM")
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 0.1, torch.float16: 0.02}
FIELDS = (
    *("question", "against", "cell", "mode", *"TNIH", "rnnfast_ms", "other_ms", "ratio", "ratio_low", "ratio_high"),
    *("pairs", "status"),
)
Way = Callable[[], Any]


class Question(NamedTuple):
    """Two ways to the same tensors."""

    question: str
    against: str
    cell: str
    mode: str
    shape: tuple[int, int, int, int]  # T, N, I, H
    ours: Way
    other: Way


def per_sample_gradients(
    cell: str, device: torch.device, dtype: torch.dtype, stock: bool = False, samples: int = 64
) -> Question:
    """vmap(grad) against autograd for each sample, by us or torch.nn."""
    layer = getattr(rnnfast, cell)(128, 128, device=device, dtype=dtype)
    parameters = dict(layer.named_parameters())
    detached = {name: p.detach() for name, p in parameters.items()}
    xs = torch.randn(samples, 32, 128, device=device, dtype=dtype)

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return functional_call(layer, parameters, (x,))[0].square().mean()

    mapped = vmap(grad(loss), in_dims=(None, 0))
    looped = layer.to_torch() if stock else layer

    def ours() -> dict[str, torch.Tensor]:
        return mapped(detached, xs)

    def loop() -> dict[str, torch.Tensor]:
        every = [torch.autograd.grad(looped(x)[0].square().mean(), list(parameters.values())) for x in xs]
        return {name: torch.stack(parts) for name, parts in zip(parameters, zip(*every, strict=True), strict=True)}

    against = "torch.nn" if stock else "loop"
    return Question("per-sample", against, cell, "training", (32, samples, 128, 128), ours, loop)


def ensembles(cell: str, device: torch.device, dtype: torch.dtype, steps: int = 32) -> Iterator[Question]:
    """vmap over stacked weights, and ops that take them, against a call of each of 8 members: outputs and training."""
    members = [getattr(rnnfast, cell)(64, 64, device=device, dtype=dtype) for _ in range(8)]
    parameters, buffers = stack_module_state(members)
    x = torch.randn(steps, 1, 64, device=device, dtype=dtype)

    def one(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional_call(members[0], (parameters, buffers), (x,))[0]

    mapped = vmap(one)
    each = [list(member.parameters()) for member in members]

    @torch.no_grad()
    def ours() -> torch.Tensor:
        return mapped(parameters)

    @torch.no_grad()
    def loop() -> torch.Tensor:
        return torch.stack([member(x)[0] for member in members])

    def train() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(mapped(parameters).square().sum(), list(parameters.values()))

    def train_each() -> tuple[torch.Tensor, ...]:
        every = [
            torch.autograd.grad(member(x)[0].square().sum(), leaves)
            for member, leaves in zip(members, each, strict=True)
        ]
        return tuple(torch.stack(parts) for parts in zip(*every, strict=True))

    weights = list(parameters.values())
    op = getattr(torch.ops.rnnfast, "rnn_tanh" if cell == "RNN" else cell.lower()).default
    beside = x.expand(steps, 8, 64)  # sequence n is that of member n

    def stacked() -> torch.Tensor:
        return op(beside, None, None, *weights, None)[0].movedim(1, 0).unsqueeze(2)

    def train_stacked() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(stacked().square().sum(), weights)

    shape = (steps, 1, 64, 64)
    yield Question("ensemble", "loop", cell, "inference", shape, ours, loop)
    yield Question("ensemble", "loop", cell, "training", shape, train, train_each)
    yield Question("stacked", "loop", cell, "inference", shape, torch.no_grad()(stacked), loop)
    yield Question("stacked", "loop", cell, "training", shape, train_stacked, train_each)


def vmap_itself(device: torch.device, dtype: torch.dtype) -> Iterator[Question]:
    """vmap over stacked linear layers of torch.nn against a call of each: nothing of ours."""
    members = [torch.nn.Linear(64, 64, device=device, dtype=dtype) for _ in range(8)]
    parameters, buffers = stack_module_state(members)
    x = torch.randn(1, 64, device=device, dtype=dtype)
    mapped = vmap(lambda parameters: functional_call(members[0], (parameters, buffers), (x,)))

    @torch.no_grad()
    def ours() -> torch.Tensor:
        return mapped(parameters)

    @torch.no_grad()
    def loop() -> torch.Tensor:
        return torch.stack([member(x) for member in members])

    yield Question("vmap", "loop", "Linear", "inference", (1, 1, 64, 64), ours, loop)


class _Model(torch.nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.before = torch.nn.Linear(64, hidden_size)
        self.layer = rnnfast.LSTM(hidden_size, hidden_size)
        self.after = torch.nn.Linear(hidden_size, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.layer(self.before(x))[0])


def compiled(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Question]:
    """The compiled model against the same in eager mode. One graph, or torch.compile raises."""
    torch._dynamo.config.allow_rnn = True  # README says why
    for T, N, H in ((32, 16, 128), (64, 64, 256))[: 1 if quick else 2]:
        model = _Model(H).to(device=device, dtype=dtype)
        fast = torch.compile(model, fullgraph=True)
        x = torch.randn(T, N, 64, device=device, dtype=dtype)
        parameters = list(model.parameters())

        def infer(model: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor = x) -> Way:
            return torch.no_grad()(lambda: model(x))

        def train(
            model: Callable[[torch.Tensor], torch.Tensor],
            x: torch.Tensor = x,
            parameters: list[torch.nn.Parameter] = parameters,
        ) -> Way:
            return lambda: torch.autograd.grad(model(x).square().mean(), parameters)

        for mode, way in (("inference", infer), ("training", train)):
            yield Question("compiled", "eager", "LSTM", mode, (T, N, H, H), way(fast), way(model))


def questions(device: torch.device, dtype: torch.dtype, quick: bool, with_compile: bool) -> Iterator[Question]:
    """All of them; with ``quick`` of fewer samples and steps."""
    for cell in CELLS:
        for stock in (False, True):
            yield per_sample_gradients(cell, device, dtype, stock, **({"samples": 4} if quick else {}))
        yield from ensembles(cell, device, dtype, **({"steps": 4} if quick else {}))
    yield from vmap_itself(device, dtype)
    if with_compile:
        yield from compiled(device, dtype, quick)


def measure(question: Question, device: torch.device, dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """Checks and times one question: one row of `FIELDS`."""
    row: dict[str, Any] = dict.fromkeys(FIELDS, "")
    row |= dict(zip(FIELDS, question[:4], strict=False)) | dict(zip("TNIH", question.shape, strict=True))
    try:
        tolerance = TOLERANCES[dtype]
        torch.testing.assert_close(question.ours(), question.other(), rtol=tolerance, atol=tolerance)
    except AssertionError as error:
        return row | {"status": "wrong: " + " ".join(str(error).split())}
    paired = interleave(question.ours, question.other, seconds, device)
    return row | {
        "rnnfast_ms": float(f"{paired.ours * 1e3:.4g}"),
        "other_ms": float(f"{paired.theirs * 1e3:.4g}"),
        "ratio": round(paired.ratio, 3),
        "ratio_low": round(paired.low, 3),
        "ratio_high": round(paired.high, 3),
        "pairs": paired.pairs,
        "status": "ok",
    }


HEADING = (
    f"{'question':<10} {'against':<8} {'cell':<4} {'mode':<9} {'T N I H':<14} {'rnnfast ms':>10} {'other ms':>10} "
    f"{'ratio':>7} {'quartiles':>13}"
)


def format_row(row: dict[str, Any]) -> str:
    """Returns one line of the printed table."""
    shape = " ".join(str(row[letter]) for letter in "TNIH")
    start = f"{row['question']:<10} {row['against']:<8} {row['cell']:<4} {row['mode']:<9} {shape:<14} "
    if row["status"] != "ok":
        return start + row["status"]
    quartiles = f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}"
    return start + f"{row['rnnfast_ms']:>10.4g} {row['other_ms']:>10.4g} {row['ratio']:>7.2f} {quartiles:>13}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_run_options(parser)
    parser.add_argument("--quick", action="store_true", help="smaller shapes, short turns: a few seconds")
    parser.add_argument(
        "--seconds", type=positive_float, default=None, help="per row at most; default: 5, with --quick 0.2"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which needs g++")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("benchmark-results"),
        metavar="FOLDER",
        help="where the table (.csv) and the run's description (.json) go; default: %(default)s",
    )
    options = parser.parse_args(arguments)
    device, dtype, threads = start_run(parser, options)
    folder = make_output_folder(parser, options.output)
    run = describe_run(device, dtype, threads)
    name = f"transforms{'-quick' if options.quick else ''}-{run['device']}-{run['dtype']}-{threads}t"
    print(f"rnnfast {run['rnnfast']} ({run['instruction_set']}): {run['dtype']}, {threads} thread(s), {run['machine']}")
    print(HEADING)
    torch.manual_seed(0)
    other_work = OtherWork()
    wrong = rows = 0
    with open(folder / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for question in questions(device, dtype, options.quick, not options.no_compile):
            row = measure(question, device, dtype, options.seconds or (0.2 if options.quick else 5.0))
            rows += 1
            wrong += row["status"] != "ok"
            writer.writerow(row)
            file.flush()
            print(format_row(row), flush=True)
    other_work.finish(run)
    (folder / f"{name}.json").write_text(json.dumps(run, indent=2) + "\n")
    print(f"\nwritten: {folder / name}.csv, .json")
    if wrong:
        print(f"{wrong} of {rows} rows have wrong results and no time", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
