"""Calls that go from a module to its op in C++ (``csrc/plain.cpp``): the long way's numbers, or None."""

from __future__ import annotations

import pytest
import torch
from pairs import LAYERS, H, I, T
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import rnnfast
from rnnfast import _C
from rnnfast.options import KERNELS

N = 3
CELLS = {"RNN_TANH": rnnfast.RNNCell, "GRU": rnnfast.GRUCell, "LSTM": rnnfast.LSTMCell}
OPTIONS = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"batch_first": True, "bias": False},
    {"num_layers": 3, "dropout": 0.5},  # in evaluation
]


def make(kind, **options):
    name, always = LAYERS[kind]
    return getattr(rnnfast, name)(I, H, **always, **options)


def make_state(layer):
    """An hx for a batch of N."""
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    h = torch.randn(rows, N, layer.proj_size or H, requires_grad=True)
    return (h, torch.randn(rows, N, H, requires_grad=True)) if layer.mode == "LSTM" else h


def run_layer(layer, x, hx=None):
    return _C.run_layer(layer, x, hx)


def run_cell(cell, mode, x, h=None, c=None):
    return _C.run_cell(KERNELS[mode].number, cell.__dict__, x, h, c)


def results_of(outputs, leaves):
    """The tensors of what a module returned, and the gradients of their squares."""
    tensors = [t for y in outputs for t in (y if isinstance(y, tuple) else (y,)) if t.numel()]
    return [*tensors, *torch.autograd.grad(sum(t.square().sum() for t in tensors), leaves)]


@pytest.fixture
def long_way(monkeypatch):
    """A function whose call sends all later calls the long way; it gives the list of them."""

    def take():
        calls = []
        monkeypatch.setattr(_C, "run_layer", lambda *arguments: calls.append(arguments))
        monkeypatch.setattr(_C, "run_cell", lambda *arguments: calls.append(arguments))
        return calls

    return take


@pytest.mark.parametrize("with_hx", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_layer_equals_the_long_way(kind, options, with_hx, long_way):
    layer = make(kind, **options)
    layer.train(not layer.dropout)
    x = torch.randn(T, N, I, requires_grad=True)
    hx = make_state(layer) if with_hx else None
    states = [] if hx is None else [*hx] if isinstance(hx, tuple) else [hx]
    leaves = [x, *states, *layer.parameters()]
    if layer.batch_first:
        x = x.transpose(0, 1)
    plain = run_layer(layer, x, hx)
    assert plain is not None
    calls = long_way()
    expected = layer(x, hx)
    assert len(calls) == 1
    assert plain[0].stride() == expected[0].stride()
    for have, want in zip(results_of(plain, leaves), results_of(expected, leaves), strict=True):
        assert torch.equal(have, want)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mode", CELLS)
def test_cell_equals_the_long_way(mode, bias, long_way):
    cell = CELLS[mode](I, H, bias=bias)
    x, h, c = (torch.randn(N, size, requires_grad=True) for size in (I, H, H))
    states = (h, c) if mode == "LSTM" else (h,)
    plain = run_cell(cell, mode, x, *states)
    assert plain is not None
    calls = long_way()
    expected = cell(x, states if mode == "LSTM" else h)
    expected = expected if mode == "LSTM" else (expected,)
    assert len(calls) == 1
    leaves = [x, *states, *cell.parameters()]
    for have, want in zip(results_of(plain, leaves), results_of(expected, leaves), strict=True):
        assert torch.equal(have, want)


@pytest.mark.parametrize("options", [{"gates": "update"}, {"reset_after": False}], ids=str)
def test_other_cells(options, long_way):
    """Cells that torch.nn has not, without arguments that others do not have, are plain too."""
    layer = rnnfast.GRU(I, H, **options)
    x = torch.randn(T, N, I)
    plain = run_layer(layer, x)
    long_way()
    for have, want in zip(plain, layer(x), strict=True):
        assert torch.equal(have, want)


class OtherTensor(Tensor):
    """A class that may want a word."""


def not_plain_arguments():
    """Inputs and states of a GRU that are another matter, by name."""
    x, h = torch.randn(T, N, I), torch.randn(1, N, H)
    return {
        "unbatched": (x[:, 0], None),
        "no step": (x[:0], None),
        "input size": (x[..., 1:], None),
        "dtype": (x.double(), None),
        "tokens": (torch.zeros(T, N, dtype=torch.int64), None),
        "meta": (x.to("meta"), None),
        "class": (x.as_subclass(OtherTensor), None),
        "class of the state": (x, h.as_subclass(OtherTensor)),
        "rank of the state": (x, h[0]),
        "layers of the state": (x, h.expand(2, N, H)),
        "batch of the state": (x, h[:, 1:]),
        "dtype of the state": (x, h.double()),
        "pair": (x, (h, h)),
        "list": ([x], None),
    }


@pytest.mark.parametrize("name", not_plain_arguments())
def test_arguments_that_are_not_plain(name):
    assert run_layer(rnnfast.GRU(I, H), *not_plain_arguments()[name]) is None


def test_modules_that_are_not_plain():
    x = torch.randn(T, N, I)
    assert run_layer(rnnfast.GRU(I, H, num_layers=2, dropout=0.5), x) is None
    layer = rnnfast.GRU(I, H)
    layer.weight_hh_l0 = nn.Parameter(torch.randn(3 * H + 3, H + 1))
    assert run_layer(layer, x) is None
    layer = rnnfast.GRU(I, H)
    torch.nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
    assert run_layer(layer, x) is None
    layer = rnnfast.GRU(I, H).double()
    layer.bias_hh_l0 = nn.Parameter(layer.bias_hh_l0.float())
    assert run_layer(layer, x.double()) is None
    layer = rnnfast.GRU(I, H)
    layer.__dict__["batch_first"] = 1
    assert run_layer(layer, x) is None
    del layer.__dict__["batch_first"]
    assert run_layer(layer, x) is None
    lstm = rnnfast.LSTM(I, H)
    h = torch.randn(1, N, H)
    assert run_layer(lstm, x, [h, h]) is None
    assert run_layer(lstm, x, (h, h, h)) is None
    assert run_layer(lstm, x, (h, h)) is not None


class Zoned(rnnfast.GRU):
    """A class may set what instances else set."""

    zoneout = 0.5


@pytest.mark.parametrize("layer_class", [rnnfast.GRU, Zoned])
def test_options_that_are_not_plain(layer_class):
    x = torch.randn(T, N, I)
    layer = layer_class(I, H)
    assert (run_layer(layer, x) is None) == (layer_class is Zoned)
    layer.zoneout = 0.0
    assert run_layer(layer, x) is not None
    for name, value in (("zoneout", 0.5), ("recurrent_dropout", 0.5), ("recompute", True), ("_variant", "none such")):
        setattr(layer, name, value)
        assert run_layer(layer, x) is None
        delattr(layer, name)
        layer.zoneout = 0.0
    for options in ({"layer_norm": True}, {"zoneout": 0.1}, {"recurrent_dropout": 0.1}, {"recompute": True}):
        assert run_layer(rnnfast.GRU(I, H, **options), x) is None
    assert run_layer(rnnfast.LSTM(I, H, peephole=True), x) is None
    assert run_layer(object(), x) is None
    assert run_layer(nn.GRU(I, H), x) is None  # not ours


def test_cells_that_are_not_plain():
    cell, x = rnnfast.GRUCell(I, H), torch.randn(N, I)
    assert run_cell(cell, "GRU", x[0]) is None
    assert run_cell(cell, "GRU", x[:, 1:]) is None
    assert run_cell(cell, "GRU", x, torch.randn(N, H + 1)) is None
    assert run_cell(cell, "GRU", x.as_subclass(OtherTensor)) is None
    cell.weight_hh = nn.Parameter(torch.randn(3 * H, H + 1))
    assert run_cell(cell, "GRU", x) is None


@pytest.mark.parametrize(
    ("kind", "hook"), [(TorchFunctionMode, "__torch_function__"), (TorchDispatchMode, "__torch_dispatch__")]
)
def test_modes_see_the_op(kind, hook):
    layer, x = rnnfast.GRU(I, H), torch.randn(T, N, I)
    seen = []

    def note(self, func, types, args=(), kwargs=None):
        seen.append(str(func))
        return func(*args, **(kwargs or {}))

    with type("Notes", (kind,), {hook: note})():
        assert run_layer(layer, x) is None
        layer(x)
    assert any("rnnfast" in name and "gru" in name for name in seen)
    assert run_layer(layer, x) is not None


def test_modules_give_what_they_get(monkeypatch):
    """Where the short way has a result, it is the module's."""
    monkeypatch.setattr(_C, "run_layer", lambda *arguments: ("output", "states"))
    monkeypatch.setattr(_C, "run_cell", lambda *arguments: ("h", "c"))
    assert rnnfast.LSTM(I, H)(torch.randn(T, N, I)) == ("output", "states")
    assert rnnfast.LSTMCell(I, H)(torch.randn(N, I)) == ("h", "c")
    assert rnnfast.GRUCell(I, H)(torch.randn(N, I)) == "h"


def test_transforms_and_the_profiler_see_the_op():
    layer, x = rnnfast.GRU(I, H), torch.randn(T, N, I)
    inside = []
    torch.func.vmap(lambda one: inside.append(run_layer(layer, one)) or layer(one)[0])(torch.stack([x, x]))
    assert inside == [None]
    with torch.profiler.profile() as profile:
        layer(x)
    assert any(event.key == "rnnfast::gru" for event in profile.key_averages())


def test_autocast_goes_the_long_way():
    layer, cell, x = rnnfast.LSTM(I, H), rnnfast.LSTMCell(I, H), torch.randn(T, N, I)
    with torch.autocast("cpu", torch.bfloat16):
        assert run_layer(layer, x) is None and run_cell(cell, "LSTM", x[0]) is None
        assert layer(x)[0].dtype == torch.bfloat16
    assert run_layer(layer, x) is not None and run_cell(cell, "LSTM", x[0]) is not None
