"""torch.compile without a graph break, torch.export with dynamic shapes, and packages of AOTInductor.

Dynamo refuses every subclass of torch.nn's RNN, GRU and LSTM by name unless ``torch._dynamo.config.allow_rnn``; the
README tells users to set it, and so does this file. torch.export needs nothing.
"""

import io
import shutil

import pytest
import torch
import torch._dynamo.testing
import torch._inductor
from agreement import cotangent
from torch.nn.utils.rnn import pack_padded_sequence

import rnnfast

# torch's compilers warn of their own imports and of what they skip.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("default_device")]

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
T, N, I, H = 5, 3, 4, 6  # noqa: E741  (the letter of the whole code base)


class AllCells(rnnfast.LSTM):
    """An LSTM that returns the cell state of all steps too."""

    def forward(self, x):
        return super().forward(x, return_cells=True)


LAYERS = {
    "RNN": lambda: rnnfast.RNN(I, H),
    "RNN-relu": lambda: rnnfast.RNN(I, H, nonlinearity="relu", bias=False),
    "GRU": lambda: rnnfast.GRU(I, H),
    "GRU-deep": lambda: rnnfast.GRU(I, H, num_layers=2, bidirectional=True, batch_first=True),
    "LSTM": lambda: rnnfast.LSTM(I, H),
    "LSTM-cells": lambda: AllCells(I, H),
    "LSTM-projected": lambda: rnnfast.LSTM(I, H, num_layers=2, proj_size=2),
    "RNNCell": lambda: rnnfast.RNNCell(I, H),
    "GRUCell": lambda: rnnfast.GRUCell(I, H),
    "LSTMCell": lambda: rnnfast.LSTMCell(I, H),
}
gpp = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs g++, which this machine lacks")


@pytest.fixture(autouse=True)
def _allow_rnn():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True, error_on_recompile=False):
        yield
    torch._dynamo.reset()


class Model(torch.nn.Module):
    """Linear, layer, linear."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layer, self.before = LAYERS[name](), torch.nn.Linear(I, I)

    def forward(self, x: torch.Tensor):
        return self.layer(self.before(x))


def flat(result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else [tensor for part in result for tensor in flat(part)]


def sample(name: str, steps: int = T, batch: int = N) -> torch.Tensor:
    return torch.randn(batch, I) if name.endswith("Cell") else torch.randn(steps, batch, I)


def results(function, model: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Outputs and all gradients."""
    x = x.clone().requires_grad_()
    outputs = flat(function(x))
    grads = torch.autograd.grad(outputs, [x, *model.parameters()], [cotangent(y) for y in outputs])
    return [*outputs, *grads]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS)
def test_compile(layer, dtype):
    """One graph forward and backward, the eager results."""
    model = Model(layer).to(DTYPES[dtype])
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = sample(layer).to(DTYPES[dtype])
    for have, want in zip(results(compiled, model, x), results(model, model, x), strict=True):
        torch.testing.assert_close(have, want)
    with torch.no_grad():
        torch.testing.assert_close(flat(compiled(x)), flat(model(x)))
    explained = torch._dynamo.explain(model)(x)
    assert explained.graph_break_count == 0 and explained.graph_count == 1


@pytest.mark.parametrize("layer", ["RNN", "GRU-deep", "LSTM"])
def test_dynamic_shapes(layer):
    """Other numbers of steps and sequences use the graph that is there."""
    model = Model(layer)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for steps, batch in ((5, 3), (7, 3), (7, 4), (2, 9)):
        x = sample(layer, steps, batch)
        for have, want in zip(results(compiled, model, x), results(model, model, x), strict=True):
            torch.testing.assert_close(have, want)
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 4  # all that is compiled is compiled for the first


@pytest.mark.cpu_only("compiling for a device takes a minute, and what is compiled is not ours")
@gpp
def test_inductor():
    """The default backend, in training."""
    model = Model("LSTM")
    x = sample("LSTM")
    compiled = torch.compile(model, fullgraph=True)
    for have, want in zip(results(compiled, model, x), results(model, model, x), strict=True):
        torch.testing.assert_close(have, want)


def test_compiled_per_sample_gradients():
    """A transform inside a compiled function."""
    layer = rnnfast.LSTM(I, H)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,))[0].square().sum()

    def per_sample(parameters, xs):
        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, xs)

    xs = torch.randn(N, T, I)
    have = torch.compile(per_sample, fullgraph=True, backend="aot_eager")(parameters, xs)
    for name, want in per_sample(parameters, xs).items():
        torch.testing.assert_close(have[name], want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS)
def test_export(layer, dtype):
    """Exported with dynamic shapes, saved, loaded, run with other sizes."""
    model = Model(layer).to(DTYPES[dtype]).eval()
    x = sample(layer).to(DTYPES[dtype])
    batch = torch.export.Dim("batch", min=2)
    dims = {0: batch} if layer.endswith("Cell") else {0: torch.export.Dim("steps", min=2), 1: batch}
    program = torch.export.export(model, (x,), dynamic_shapes=(dims,))
    ops = [node.target for node in program.graph.nodes if str(node.target).startswith("rnnfast.")]
    assert len(ops) == {"GRU-deep": 4, "LSTM-projected": 2}.get(layer, 1)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for steps, size in ((T, N), (9, 7)):
        x = sample(layer, steps, size).to(DTYPES[dtype])
        torch.testing.assert_close(flat(loaded(x)), flat(model(x)))


def test_export_of_packed_input_is_refused():
    """Lengths that only the data knows: the error says what to do instead."""
    layer = rnnfast.GRU(I, H)
    packed = pack_padded_sequence(torch.randn(T, N, I), torch.tensor([5, 3, 2], device="cpu"))

    class Packed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, data: torch.Tensor, batch_sizes: torch.Tensor):
            return self.layer(torch.nn.utils.rnn.PackedSequence(data, batch_sizes))[1]

    with pytest.raises(RuntimeError, match=r"PackedSequence.*export.*lengths"):
        torch.export.export(Packed(), (packed.data, packed.batch_sizes))


class WithLengths(torch.nn.Module):
    """A bidirectional layer over padded sequences."""

    def __init__(self, as_list: bool = False) -> None:
        super().__init__()
        self.layer, self.as_list = rnnfast.GRU(I, H, bidirectional=True), as_list

    def forward(self, x: torch.Tensor, lengths: torch.Tensor, resets: torch.Tensor):
        return self.layer(x, lengths=lengths.tolist() if self.as_list else lengths, resets=resets)


def test_export_with_lengths_and_resets():
    """The lengths are data, not shapes: exported once, run with other ones and other sizes."""
    model = WithLengths().eval()
    steps, batch = torch.export.Dim("steps", min=2), torch.export.Dim("batch", min=2)
    dims = ({0: steps, 1: batch}, {0: batch}, {0: steps, 1: batch})
    first = (torch.randn(T, N, I), torch.tensor([5, 2, 3]), torch.rand(T, N) < 0.3)
    second = (torch.randn(7, 2, I), torch.tensor([0, 7]), torch.rand(7, 2) < 0.3)
    program = torch.export.export(model, first, dynamic_shapes=dims).module()
    for arguments in (first, second):
        torch.testing.assert_close(flat(program(*arguments)), flat(model(*arguments)))
    with pytest.raises(ValueError, match=r"lengths: expected values from 0 to T = 7, got 8 for sequence 1"):
        program(second[0], torch.tensor([0, 8]), second[2])


def test_export_of_lengths_in_shapes_is_refused():
    """A list made of a tensor's values: the error says to give the tensor."""
    arguments = (torch.randn(T, N, I), torch.tensor([5, 2, 3]), torch.rand(T, N) < 0.3)
    with pytest.raises(ValueError, match=r"lengths must be 3 integers, \[N\], got .*; give torch.export a Tensor"):
        torch.export.export(WithLengths(as_list=True), arguments)


@pytest.mark.parametrize("layer", LAYERS)
def test_setting(layer):
    """What README quotes: without the setting layers break the graph, and eager results come all the same."""
    model, x = Model(layer), sample(layer)
    with torch._dynamo.config.patch(allow_rnn=False):
        torch.testing.assert_close(flat(torch.compile(model, backend="eager")(x)), flat(model(x)))
        torch._dynamo.reset()
        whole = torch.compile(model, fullgraph=True, backend="eager")
        if layer.endswith("Cell"):
            torch.testing.assert_close(flat(whole(x)), flat(model(x)))
        else:
            with pytest.raises(torch._dynamo.exc.Unsupported, match=r"(?s)Attempted to wrap RNN.*allow_rnn=True"):
                whole(x)


def test_jit_trace():
    """torch.jit's tracer records our op; what it saved runs with other sizes."""
    model = Model("LSTM").eval()
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, (sample("LSTM"),)), buffer)
    buffer.seek(0)
    x = sample("LSTM", 9, 7)
    torch.testing.assert_close(flat(torch.jit.load(buffer)(x)), flat(model(x)))


@pytest.mark.cpu_only("compiling for a device takes a minute, and what is compiled is not ours")
@gpp
def test_aot_inductor(tmp_path):
    """A package compiled ahead of time, run with sizes it has not seen."""
    model = Model("LSTM").eval()
    dims = {0: torch.export.Dim("steps", min=2, max=64), 1: torch.export.Dim("batch", min=2, max=64)}
    with torch.no_grad():
        program = torch.export.export(model, (sample("LSTM"),), dynamic_shapes=(dims,))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        loaded = torch._inductor.aoti_load_package(path)
        for steps, batch in ((T, N), (9, 7)):
            x = sample("LSTM", steps, batch)
            torch.testing.assert_close(flat(loaded(x)), flat(model(x)))


@pytest.mark.parametrize("layer", ["GRU", "LSTMCell"])
def test_complex_input_is_refused(layer):
    """Modules say so too, and what to do instead."""
    x = sample(layer).to(torch.complex64)
    match = r"complex64.*view_as_real" if layer == "GRU" else r"same dtype, but got torch\.complex64"
    with pytest.raises((ValueError, RuntimeError), match=match):
        LAYERS[layer]()(x)


@pytest.mark.cpu_only("it names its devices")
def test_complex_is_refused(cell):
    """Also without data: the fake kernels refuse what the real ones do."""
    w, r = torch.randn(4 * 12, I, device="meta"), torch.randn(4 * 12, 12, device="meta")
    x = torch.randn(T, N, I, device="meta", dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"input: expected float32, float64, bfloat16, .*, got torch\.complex64"):
        getattr(torch.ops.rnnfast, cell)(x, None, None, w, r, None, None, None)
