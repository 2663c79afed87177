"""Times rnnfast's layers against other libraries on the same weights: torch.nn, ONNX Runtime, OpenVINO and JAX.

Inference against all of them, training (forward, and backward from a dense gradient of the output to the input and to
every weight) against torch.nn and JAX. One layer, one direction, float32, CPU. Each library is called in the quickest
way it offers: compiled for the one shape, input and output in its own arrays, weights as it likes them best (rnnfast's
are prepacked; `rnnfast-plain` is the same layer without that, which rearranges them in every call).

Before a call is timed its results are compared with torch.nn's in float64; wrong results get no time, and the exit
status is 1. With one thread all libraries take turns in one process. With more, each has a process of its own, as
their threads, waiting for work, would take the cores from one another; the processes take turns and rest before each.

Units: `ms` is milliseconds per call (median), `ratio` the library's time over rnnfast's (above 1: rnnfast is faster;
the median over the rounds, its quartiles beside it), `cores` the processor time of a call over its duration.
The libraries are the extra rnnfast[peers]; those that are not installed are left out, with a line that says so.
"""

import argparse
import csv
import functools
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from cases import CELLS, DEFAULT_CELLS, Case, find_case, find_cells
from layers import MODES, make_call
from measure import (
    OtherWork,
    describe_run,
    geometric_mean,
    make_output_folder,
    make_turn,
    pair,
    positive_float,
    positive_int,
    take_turns,
)
from torch import Tensor

import rnnfast

OURS, PLAIN = "rnnfast", "rnnfast-plain"
CPU = torch.device("cpu")
CASES = (
    *("step-h256", "seq100-h128", "seq1000-h64", "seq50-h512"),
    *("d2l", "lm-h256-l1", "char-t25-h512", "large-h1024"),
)
QUICK_CASES = ("step-h256", "seq100-h128")
WEIGHTS = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
# ONNX's order of gates in torch's numbers; https://onnx.ai/onnx/operators/, RNN, GRU, LSTM.
ONNX_GATES = {"RNN": (0,), "GRU": (1, 0, 2), "LSTM": (0, 3, 1, 2)}
# Largest difference from float64, as a share of the largest value. Some libraries approximate sigmoid and tanh; a wrong
# gate order or a forgotten bias differs by a share near 1. rnnfast's own, tighter rule is checked by layers.py.
TOLERANCE = 1e-3
# In a process of its own a library rests until the threads of all have stopped waiting for work awake; those of ONNX
# Runtime do so for about 40 ms, of the others for less (measured).
REST_SECONDS = 0.1
TURN_SECONDS = 0.05
FIELDS = (
    *("case", "cell", "mode", *"TNIH", "library", "ms", "ratio", "ratio_low", "ratio_high", "rounds", "cores"),
    "status",
)


class Way(NamedTuple):
    """A library's way to one result: the call that is timed, and what it gives as torch tensors, by name."""

    call: Callable[[], Any]
    results: Callable[[], dict[str, Tensor]]


class Problem(NamedTuple):
    """One case, cell and mode: the layer whose weights all use, input and gradient of the output, and the truth."""

    case: Case
    cell: str
    mode: str
    layer: torch.nn.RNNBase
    input: Tensor  # [T, N, I]
    grad_output: Tensor  # [T, N, H]
    expected: dict[str, Tensor]  # in float64


@functools.lru_cache(maxsize=1)
def make_problem(case: Case, cell: str, mode: str) -> Problem:
    """The same numbers in every process."""
    torch.manual_seed(0)
    layer_class = getattr(torch.nn, CELLS[cell].class_name)
    layer = layer_class(case.I, case.H, **CELLS[cell].options)
    input = torch.randn(case.T, case.N, case.I)
    grad_output = torch.randn(case.T, case.N, case.H)
    exact = layer_class(case.I, case.H, **CELLS[cell].options, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    way = _layer_way(exact, mode, input.double(), grad_output.double())
    return Problem(case, cell, mode, layer, input, grad_output, way.results())


def _outputs(output: Any, *states: Any) -> dict[str, Tensor]:
    """Names the results of an inference call."""
    names = ("output", "h_n", "c_n")
    return {name: torch.as_tensor(value) for name, value in zip(names, (output, *states), strict=False)}


def _layer_way(layer: Any, mode: str, input: Tensor, grad_output: Tensor) -> Way:
    call = make_call(layer, mode, input, grad_output)

    def results() -> dict[str, Tensor]:
        if mode == "inference":
            output, state = call()
            return _outputs(output, *(state if isinstance(state, tuple) else (state,)))
        output, leaf = call()
        gradients = {f"gradient of {name}": parameter.grad for name, parameter in layer.named_parameters()}
        return {"output": output.detach(), "gradient of input": leaf.grad, **gradients}

    return Way(call, results)


def rnnfast_way(problem: Problem, threads: int, prepack: bool = True) -> Way:
    ours = getattr(rnnfast, CELLS[problem.cell].class_name)(
        problem.case.I, problem.case.H, **CELLS[problem.cell].options
    )
    ours.load_state_dict(problem.layer.state_dict())
    if prepack and problem.mode == "inference":
        rnnfast.prepack(ours)  # for as long as the layer lives
    return _layer_way(ours, problem.mode, problem.input, problem.grad_output)


def torch_way(problem: Problem, threads: int) -> Way:
    return _layer_way(problem.layer, problem.mode, problem.input, problem.grad_output)


def onnx_model(problem: Problem) -> bytes:
    """Returns a model of one standard node with the weights in it."""
    from onnx import TensorProto, helper, numpy_helper

    case, cell = problem.case, CELLS[problem.cell]
    order = ONNX_GATES[cell.class_name]

    def reordered(name: str) -> Tensor:
        blocks = getattr(problem.layer, name).detach().chunk(len(order))
        return torch.cat([blocks[gate] for gate in order])[None]

    w_ih, w_hh, b_ih, b_hh = (reordered(name) for name in WEIGHTS)
    weights = {"W": w_ih, "R": w_hh, "B": torch.cat([b_ih, b_hh], 1)}
    attributes: dict[str, Any] = {"hidden_size": case.H}
    if cell.class_name == "GRU":
        attributes["linear_before_reset"] = 1  # torch's variant
    if cell.options.get("nonlinearity") == "relu":
        attributes["activations"] = ["Relu"]
    outputs = {"Y": [case.T, 1, case.N, case.H], "Y_h": [1, case.N, case.H]}
    if cell.class_name == "LSTM":
        outputs["Y_c"] = outputs["Y_h"]
    graph = helper.make_graph(
        [helper.make_node(cell.class_name, ["X", *weights], [*outputs], **attributes)],
        problem.cell,
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, [case.T, case.N, case.I])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value.numpy(), name) for name, value in weights.items()],
    )
    # The oldest format that has these nodes in their present form: every runtime reads it.
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=7).SerializeToString()


def _onnx_outputs(output: Any, *states: Any) -> dict[str, Tensor]:
    return _outputs(torch.as_tensor(output).squeeze(1), *states)  # [T, D, N, H], D = 1


def onnxruntime_way(problem: Problem, threads: int) -> Way:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(onnx_model(problem), options, providers=["CPUExecutionProvider"])
    # Bound input and outputs: session.run costs some ten microseconds more.
    binding = session.io_binding()
    binding.bind_cpu_input("X", problem.input.numpy())
    for output in session.get_outputs():
        binding.bind_output(output.name, "cpu")

    def results() -> dict[str, Tensor]:
        session.run_with_iobinding(binding)
        return _onnx_outputs(*binding.copy_outputs_to_cpu())

    return Way(lambda: session.run_with_iobinding(binding), results)


def openvino_way(problem: Problem, threads: int) -> Way:
    import openvino

    core = openvino.Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # where the processor has bfloat16 products, that is the default
    }
    request = core.compile_model(core.read_model(onnx_model(problem)), "CPU", settings).create_infer_request()
    request.set_input_tensor(openvino.Tensor(problem.input.numpy(), shared_memory=True))

    def call() -> Any:
        return request.infer(share_outputs=True)

    def results() -> dict[str, Tensor]:
        call()
        return _onnx_outputs(*(tensor.data.copy() for tensor in request.output_tensors))

    return Way(call, results)


def jax_way(problem: Problem, threads: int) -> Way:
    import jax
    from jax import numpy as jnp

    # Else a thread of its own runs the computation, and a small one waits for it longer than it takes.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    H, class_name = problem.case.H, CELLS[problem.cell].class_name
    activation = jax.nn.relu if CELLS[problem.cell].options.get("nonlinearity") == "relu" else jnp.tanh

    # Gates in torch's order; `product` [N, G*H] is of the input, `bias` that of the recurrent product.
    def rnn(state: Any, product: Any, w_hh: Any, bias: Any) -> Any:
        return (activation(product + state[0] @ w_hh),)

    def gru(state: Any, product: Any, w_hh: Any, bias: Any) -> Any:
        recurrent = state[0] @ w_hh
        r, z = jnp.split(jax.nn.sigmoid(product[:, : 2 * H] + recurrent[:, : 2 * H]), 2, -1)
        n = jnp.tanh(product[:, 2 * H :] + r * (recurrent[:, 2 * H :] + bias[2 * H :]))
        return (n + z * (state[0] - n),)

    def lstm(state: Any, product: Any, w_hh: Any, bias: Any) -> Any:
        i, f, g, o = jnp.split(product + state[0] @ w_hh, 4, -1)
        c = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(c), c

    step = {"RNN": rnn, "GRU": gru, "LSTM": lstm}[class_name]
    # The bias of the recurrent product is added outside of the loop too, where the cell allows it.
    hoisted = 2 * H if class_name == "GRU" else None

    def forward(x: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any) -> Any:
        product = x @ w_ih + b_ih.at[:hoisted].add(b_hh[:hoisted])

        def body(state: Any, product: Any) -> Any:
            state = step(state, product, w_hh, b_hh)
            return state, state[0]

        zeros = jnp.zeros((x.shape[1], H), x.dtype)
        states, output = jax.lax.scan(body, (zeros,) * (2 if class_name == "LSTM" else 1), product)
        return output, states

    def train(grad_output: Any, *arguments: Any) -> Any:
        output, vjp = jax.vjp(lambda *a: forward(*a)[0], *arguments)
        return output, vjp(grad_output)

    # Weights [I, G*H] and [H, G*H], as a program in JAX would hold them: no transposition in the call.
    values = (problem.input, *(getattr(problem.layer, name).detach().t() for name in WEIGHTS))
    arguments = [jnp.array(value.contiguous().numpy()) for value in values]
    if problem.mode == "training":
        arguments.insert(0, jnp.array(problem.grad_output.numpy()))
    compiled = jax.jit(train if problem.mode == "training" else forward)

    def call() -> Any:
        return jax.block_until_ready(compiled(*arguments))

    def tensor(value: Any) -> Tensor:
        return torch.from_numpy(jax.device_get(value).copy())

    def results() -> dict[str, Tensor]:
        output, rest = call()
        if problem.mode == "inference":
            return _outputs(tensor(output), *(tensor(state)[None] for state in rest))
        grad_input, *gradients = (tensor(value) for value in rest)
        named = {f"gradient of {name}": value.t() for name, value in zip(WEIGHTS, gradients, strict=True)}
        return {"output": tensor(output), "gradient of input": grad_input, **named}

    return Way(call, results)


@dataclass(frozen=True)
class Library:
    """How a library is called, in which modes, and the packages it needs, its own first."""

    make: Callable[[Problem, int], Way]
    packages: tuple[str, ...]
    modes: tuple[str, ...] = MODES

    def missing(self) -> list[str]:
        return [package for package in self.packages if importlib.util.find_spec(package) is None]


LIBRARIES: dict[str, Library] = {
    OURS: Library(rnnfast_way, ("rnnfast",)),
    "torch.nn": Library(torch_way, ("torch",)),
    "onnxruntime": Library(onnxruntime_way, ("onnxruntime", "onnx"), ("inference",)),
    # between others: whoever takes a turn after itself finds its caches warm
    PLAIN: Library(functools.partial(rnnfast_way, prepack=False), ("rnnfast",), ("inference",)),
    "openvino": Library(openvino_way, ("openvino", "onnx"), ("inference",)),
    "jax": Library(jax_way, ("jax",)),
}


def disagreement(problem: Problem, results: dict[str, Tensor]) -> str | None:
    """Returns what is wrong with the results, or None."""
    for name, truth in problem.expected.items():
        value = results[name]
        if value.shape != truth.shape:
            return f"{name}: {tuple(value.shape)} where {tuple(truth.shape)} was expected"
        # At T = 1 the gradient of weight_hh is zero, and so must every library's be.
        scale = max(truth.abs().max().item(), torch.finfo(torch.float64).tiny)
        error = (value.double() - truth).abs().max().item() / scale
        if not error <= TOLERANCE:  # so that NaN fails
            return f"{name}: differs by {error:.2g}"
    return None


def used_cores(call: Callable[[], object]) -> float:
    """Returns the processor time of some calls over their duration."""
    start, busy = time.perf_counter(), time.process_time()
    while time.perf_counter() < start + 0.02:
        call()
    return (time.process_time() - busy) / (time.perf_counter() - start)


def limit_threads(threads: int) -> None:
    """Tells torch and JAX how many threads they may use, JAX before its import; the others are told when called."""
    torch.set_num_threads(threads)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["NPROC"] = str(threads)  # the size of XLA's thread pool
    if threads == 1:
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"


class Contestant:
    """A library in this process. `prepare` sets the problem, `turn` takes one turn at it."""

    def __init__(self, library: str, threads: int, alone: bool) -> None:
        self._library, self._threads, self._alone = LIBRARIES[library], threads, alone

    def prepare(self, case: Case, cell: str, mode: str) -> dict[str, Any]:
        """Returns the fields `status` and `cores` of a row; only with the status "ok" may turns be taken."""
        problem = make_problem(case, cell, mode)
        way = self._library.make(problem, self._threads)
        wrong = disagreement(problem, way.results())
        if wrong is not None:
            return {"status": f"wrong: {wrong}"}
        rest = functools.partial(time.sleep, REST_SECONDS)
        self._turn = make_turn(way.call, CPU, TURN_SECONDS, rest) if self._alone else make_turn(way.call, CPU)
        return {"status": "ok", "cores": round(used_cores(way.call), 2)}

    def turn(self) -> float:
        return self._turn()

    def close(self) -> None:
        pass


def _serve(connection: Connection, library: str, threads: int) -> None:
    """What the process of one library does: the calls of a Contestant that it is sent, until there are no more."""
    limit_threads(threads)
    contestant = Contestant(library, threads, alone=True)
    while (message := connection.recv()) is not None:
        name, arguments = message
        connection.send(getattr(contestant, name)(*arguments))


class RemoteContestant:
    """A library in a process of its own, with the methods of Contestant."""

    def __init__(self, library: str, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, library, threads), daemon=True)
        self._process.start()
        other.close()  # so that a process that dies is an end of file here, not a wait for ever

    def _call(self, name: str, *arguments: Any) -> Any:
        self._connection.send((name, arguments))
        return self._connection.recv()

    def prepare(self, case: Case, cell: str, mode: str) -> dict[str, Any]:
        return self._call("prepare", case, cell, mode)

    def turn(self) -> float:
        return self._call("turn")

    def close(self) -> None:
        self._connection.send(None)
        self._process.join()


def measure(
    contestants: dict[str, Contestant | RemoteContestant], case: Case, cell: str, mode: str, seconds: float
) -> list[dict[str, Any]]:
    """Checks and times one case, cell and mode; returns one row of `FIELDS` per library, ours first."""
    rows: dict[str, dict[str, Any]] = {}
    for library, contestant in contestants.items():
        row: dict[str, Any] = dict.fromkeys(FIELDS, "")
        row |= {"case": case.name, "cell": cell, "mode": mode, "library": library}
        row |= {letter: getattr(case, letter) for letter in "TNIH"}
        rows[library] = row | contestant.prepare(case, cell, mode)
    right = [library for library, row in rows.items() if row["status"] == "ok"]
    if OURS not in right:
        for library in right:
            rows[library] |= {"status": f"not timed: {OURS} is wrong", "cores": ""}
        return list(rows.values())
    times = take_turns([contestants[library].turn for library in right], seconds)
    for number, library in enumerate(right):
        paired = pair(times, number)
        rows[library] |= {
            "ms": float(f"{paired.theirs * 1e3:.4g}"),
            "ratio": round(paired.ratio, 3),
            "ratio_low": round(paired.low, 3),
            "ratio_high": round(paired.high, 3),
            "rounds": paired.pairs,
        }
    return list(rows.values())


def best_peer(rows: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """Returns the row of the quickest library but ours, of one case, cell and mode; None where no other has a time."""
    timed = [row for row in rows if row["status"] == "ok" and row["library"] not in (OURS, PLAIN)]
    return min(timed, key=lambda row: row["ms"], default=None)


def group(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """Returns the rows of each case, cell and mode."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["cell"], row["mode"]), []).append(row)
    return groups


def format_heading(libraries: Iterable[str]) -> str:
    """Returns the heading of the printed table."""
    names = "".join(f" {name:>13}" for name in libraries)
    return (
        f"{'case':<13} {'T N I H':<16} {'cell':<8} {'mode':<9}{names}  {'best peer':<11} {'ratio':>6} {'quartiles':>12}"
    )


def format_group(rows: list[dict[str, Any]], libraries: Iterable[str]) -> str:
    """Returns one line of the printed table: milliseconds of every library, and ours against the best of the others."""
    first, by_library = rows[0], {row["library"]: row for row in rows}
    line = f"{first['case']:<13} {find_case(first['case']).shape:<16} {first['cell']:<8} {first['mode']:<9}"
    for library in libraries:
        row = by_library.get(library)
        line += f" {'' if row is None else row['ms'] if row['status'] == 'ok' else 'wrong':>13}"
    best = best_peer(rows)
    if best is not None:
        quartiles = f"{best['ratio_low']:.2f}-{best['ratio_high']:.2f}"
        line += f"  {best['library']:<11} {best['ratio']:>6.2f} {quartiles:>12}"
    wrong = [f"\n  {row['library']}: {row['status']}" for row in rows if row["status"] != "ok"]
    return line.rstrip() + "".join(wrong)


def summarize(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns mean and worst ratio to the best peer and to torch.nn, for each mode and cell, and for all cells."""
    ratios: dict[tuple[str, str, str], list[tuple[float, str]]] = {}
    for (case, cell, mode), members in group(rows).items():
        torch_row = next((row for row in members if row["library"] == "torch.nn" and row["status"] == "ok"), None)
        for against, row in (("best peer", best_peer(members)), ("torch.nn", torch_row)):
            if row is not None:
                for name in (cell, "all"):
                    ratios.setdefault((mode, against, name), []).append((row["ratio"], f"{case} {cell}"))
    return [
        {
            **{"mode": mode, "against": against, "cell": cell},
            "mean": geometric_mean(ratio for ratio, _ in members),
            "worst": min(members)[0],
            "worst_case": min(members)[1],
        }
        for (mode, against, cell), members in sorted(ratios.items())
    ]


def format_summary(rows: Iterable[dict[str, Any]]) -> str:
    """Returns the printed summary."""
    lines = [f"{'mode':<10} {'against':<10} {'cell':<9} {'geometric mean':>15} {'worst':>6}"]
    for line in summarize(rows):
        lines.append(
            f"{line['mode']:<10} {line['against']:<10} {line['cell']:<9} {line['mean']:>14.2f}x {line['worst']:>5.2f}x"
            f"  {line['worst_case']}"
        )
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], run: dict[str, Any], path: Path) -> None:
    """Draws every library's time over ours: a panel for each mode and cell, a line of dots for each shape."""
    import matplotlib

    matplotlib.use("Agg")  # files only: works without a display
    from matplotlib import pyplot, ticker

    timed = [row for row in rows if row["status"] == "ok" and row["library"] != OURS]
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in timed)]
    cells = [cell for cell in CELLS if any(row["cell"] == cell for row in timed)]
    names = list(dict.fromkeys(row["case"] for row in timed))
    libraries = [library for library in LIBRARIES if any(row["library"] == library for row in timed)]
    figure, panels = pyplot.subplots(
        len(modes),
        len(cells),
        figsize=(2.5 + 3 * len(cells), 1.2 + (0.8 + 0.3 * len(names)) * len(modes)),
        sharey=True,
        squeeze=False,
    )
    for line, mode in zip(panels, modes, strict=True):
        for panel, cell in zip(line, cells, strict=True):
            for index, library in enumerate(libraries):
                points = [r for r in timed if (r["mode"], r["cell"], r["library"]) == (mode, cell, library)]
                heights = [names.index(row["case"]) + 0.12 * (index - (len(libraries) - 1) / 2) for row in points]
                panel.plot(
                    [row["ratio"] for row in points], heights, "os^D"[index % 4], color=f"C{index}", markersize=4,
                    label=library,
                )  # fmt: skip
            panel.axvline(1.0, color="black", linewidth=0.8)
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(ticker.LogLocator(base=10, subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            panel.xaxis.set_minor_formatter(ticker.NullFormatter())
            panel.tick_params(labelsize="small")
            panel.grid(axis="x", which="major", alpha=0.3)
            panel.set_title(f"{cell}, {mode}", fontsize="medium")
    panels[0][0].set_yticks(range(len(names)), [f"{name}  ({find_case(name).shape})" for name in names])
    panels[0][0].invert_yaxis()
    panels[0][-1].legend(fontsize="small")
    figure.supxlabel("the library's time / rnnfast's time", fontsize="medium")
    figure.suptitle(f"{run['dtype']}, {run['threads']} thread(s), {run['machine']}", fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def make_parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--threads", type=positive_int, default=1, metavar="COUNT", help="of each library; default: %(default)s"
    )
    parser.add_argument(
        "--cells",
        nargs="+",
        default=DEFAULT_CELLS,
        metavar="CELL",
        help=f"rnn (short for rnn_tanh), {', '.join(CELLS)}; default: {' '.join(DEFAULT_CELLS)}",
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="default: both")
    parser.add_argument(
        "--cases",
        nargs="+",
        default=None,
        metavar="CASE",
        help=f"names of shapes in cases.py of one layer and direction; default: {' '.join(CASES)}",
    )
    parser.add_argument("--quick", action="store_true", help="two small shapes, short turns: half a minute")
    parser.add_argument(
        "--seconds",
        type=positive_float,
        default=None,
        help="for each case, cell and mode at most (but at least five rounds); default: 4, with --quick 0.4",
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
    chosen: list[tuple[Case, str, str]],
    contestants: dict[str, Contestant | RemoteContestant],
    seconds: float,
    file: TextIO,
) -> list[dict[str, Any]]:
    """Measures all that was chosen; prints and writes it as soon as it is there."""
    from tqdm import tqdm

    writer = csv.DictWriter(file, FIELDS)
    writer.writeheader()
    rows: list[dict[str, Any]] = []
    with tqdm(chosen, unit="shape", file=sys.stderr) as progress:
        for case, cell, mode in progress:
            progress.set_description(f"{case.name} {cell} {mode}")
            able = {name: one for name, one in contestants.items() if mode in LIBRARIES[name].modes}
            members = measure(able, case, cell, mode, seconds)
            rows += members
            writer.writerows(members)
            file.flush()
            tqdm.write(format_group(members, contestants), file=sys.stdout)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    try:
        cells = find_cells(options.cells)
        cases = [find_case(name) for name in options.cases or (QUICK_CASES if options.quick else CASES)]
    except KeyError as error:
        parser.error(error.args[0])
    for case in cases:
        if (case.L, case.D) != (1, 1):
            parser.error(f"--cases: {case.name} must have one layer and one direction, not {case.L} and {case.D}")
    folder = make_output_folder(parser, options.output)
    seconds = options.seconds or (0.4 if options.quick else 4.0)

    present = []
    for name, library in LIBRARIES.items():
        if missing := library.missing():
            print(f"{name} is left out: {', '.join(missing)} not installed (pip install 'rnnfast[peers]')")
        else:
            present.append(name)
    limit_threads(options.threads)
    run = describe_run(CPU, torch.float32, options.threads)
    run["libraries"] = {name: importlib.metadata.version(LIBRARIES[name].packages[0]) for name in present}
    stem = f"peers{'-quick' if options.quick else ''}-cpu-float32-{options.threads}t"
    print(f"float32, {options.threads} thread(s), {run['machine']}; milliseconds a call")
    print(format_heading(present))
    other_work = OtherWork()
    contestants: dict[str, Contestant | RemoteContestant] = {
        name: Contestant(name, 1, alone=False) if options.threads == 1 else RemoteContestant(name, options.threads)
        for name in present
    }
    try:
        with open(folder / f"{stem}.csv", "w", newline="") as file:
            chosen = [(case, cell.name, mode) for case in cases for cell in cells for mode in options.modes]
            rows = run_cases(chosen, contestants, seconds, file)
    finally:
        for contestant in contestants.values():
            contestant.close()
    other_work.finish(run)
    (folder / f"{stem}.json").write_text(json.dumps(run, indent=2) + "\n")
    print()
    print(format_summary(rows))
    for name in present:
        most = max((row["cores"] for row in rows if row["library"] == name and row["cores"] != ""), default=0.0)
        if most > options.threads + 0.3:
            print(
                f"warning: {name} used {most:.1f} cores where it was given {options.threads} thread(s)", file=sys.stderr
            )
    wrong = [row for row in rows if row["status"] != "ok"]
    if any(best_peer(members) for members in group(rows).values()):
        draw(rows, run, folder / f"{stem}.png")
    print(f"\nwritten: {folder / stem}.csv, .json, .png")
    if wrong:
        print(f"{len(wrong)} of {len(rows)} rows have wrong results and no time", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
