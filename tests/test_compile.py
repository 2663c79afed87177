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
pytestmark = pytest.mark.filterwarnings("ignore")

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


@pytest.mark.parametrize("layer", LAYERS)
def test_compile(layer):
    """One graph forward and backward, the eager results."""
    model = Model(layer)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = sample(layer)
    for have, want in zip(results(compiled, model, x), results(model, model, x), strict=True):
        torch.testing.assert_close(have, want)
    with torch.no_grad():
        torch.testing.assert_close(flat(compiled(x)), flat(model(x)))
    explained = torch._dynamo.explain(model)(x)
    assert explained.graph_break_count == 0 and explained.graph_count == 1


@pytest.mark.parametrize("cell_module", ["RNNCell", "GRUCell", "LSTMCell"])
def test_cells_need_no_setting(cell_module):
    """The setting that the layers need is not needed for cells."""
    model, x = Model(cell_module), sample(cell_module)
    with torch._dynamo.config.patch(allow_rnn=False):
        torch.testing.assert_close(flat(torch.compile(model, fullgraph=True, backend="eager")(x)), flat(model(x)))


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


@pytest.mark.parametrize("layer", LAYERS)
def test_export(layer):
    """Exported with dynamic shapes, saved, loaded, run with other sizes."""
    model = Model(layer).eval()
    x = sample(layer)
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
        x = sample(layer, steps, size)
        torch.testing.assert_close(flat(loaded(x)), flat(model(x)))


def test_export_of_packed_input_is_refused():
    """Lengths that only the data knows: the error says what to do instead."""
    layer = rnnfast.GRU(I, H)
    packed = pack_padded_sequence(torch.randn(T, N, I), torch.tensor([5, 3, 2]))

    class Packed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, data: torch.Tensor, batch_sizes: torch.Tensor):
            return self.layer(torch.nn.utils.rnn.PackedSequence(data, batch_sizes))[1]

    with pytest.raises(RuntimeError, match=r"PackedSequence.*export.*lengths"):
        torch.export.export(Packed(), (packed.data, packed.batch_sizes))


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


def test_complex_is_refused(cell):
    """Also without data: the fake kernels refuse what the real ones do."""
    w, r = torch.randn(4 * 12, I, device="meta"), torch.randn(4 * 12, 12, device="meta")
    x = torch.randn(T, N, I, device="meta", dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"input: expected float32, float64, bfloat16, .*, got torch\.complex64"):
        getattr(torch.ops.rnnfast, cell)(x, None, None, w, r, None, None, None)
