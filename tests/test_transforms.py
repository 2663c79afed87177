"""torch.func's transforms of the six modules and of the raw ops, against loops of plain calls.

``TRANSFORMS`` x ``MODULES`` x dtype is the table of what works: a test stands behind every entry.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import cases
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import rnnfast
from rnnfast.reference import CELLS as REFERENCES

# torch's, the first time that forward-mode derivatives are used.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
    pytest.mark.usefixtures("default_device"),
]

B, T, N, I, H = 3, 4, 2, 3, 5  # noqa: E741  (the letter of the whole code base)
DTYPES = {"float64": (torch.float64, 1e-11), "float32": (torch.float32, 2e-5), "bfloat16": (torch.bfloat16, 0.03)}


class AllCells(rnnfast.LSTM):
    """An LSTM that returns the cell state of all steps too."""

    def forward(self, x):
        return super().forward(x, return_cells=True)


MODULES = {
    "RNN": lambda **k: rnnfast.RNN(I, H, **k),
    "RNN-relu": lambda **k: rnnfast.RNN(I, H, nonlinearity="relu", bias=False, **k),
    "GRU": lambda **k: rnnfast.GRU(I, H, **k),
    "GRU-deep": lambda **k: rnnfast.GRU(I, H, num_layers=2, bidirectional=True, batch_first=True, **k),
    "LSTM": lambda **k: rnnfast.LSTM(I, H, **k),
    "LSTM-cells": lambda **k: AllCells(I, H, num_layers=2, bidirectional=True, **k),
    "LSTM-projected": lambda **k: rnnfast.LSTM(I, H, proj_size=2, bidirectional=True, **k),
    "GRU-before": lambda **k: rnnfast.GRU(I, H, reset_after=False, bidirectional=True, **k),
    "GRU-reset": lambda **k: rnnfast.GRU(I, H, gates="reset", **k),
    "GRU-norm": lambda **k: rnnfast.GRU(I, H, layer_norm=True, **k),
    "LSTM-norm": lambda **k: rnnfast.LSTM(I, H, layer_norm=True, bidirectional=True, **k),
    "LSTM-peephole": lambda **k: rnnfast.LSTM(I, H, peephole=True, bidirectional=True, **k),
    "LSTM-zoneout": lambda **k: rnnfast.LSTM(I, H, zoneout=(0.2, 0.5), recurrent_dropout=0.5, **k).eval(),
    "LSTM-coupled": lambda **k: rnnfast.LSTM(I, H, coupled=True, **k),
    "RNNCell": lambda **k: rnnfast.RNNCell(I, H, **k),
    "GRUCell": lambda **k: rnnfast.GRUCell(I, H, **k),
    "LSTMCell": lambda **k: rnnfast.LSTMCell(I, H, **k),
}


def outputs_of(result) -> list[torch.Tensor]:
    """All tensors of a module's result, in order."""
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for part in result for tensor in outputs_of(part)]


def upstream(y: torch.Tensor) -> torch.Tensor:
    """A gradient that differs from place to place; without random numbers, which vmap refuses."""
    return torch.arange(y.numel(), device=y.device).mul(0.7).cos().reshape(y.shape).to(y.dtype)


class Subject:
    """A module as functions of its parameters and input."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float64) -> None:
        if name.endswith("-norm") and torch.get_default_device().type == "cuda":
            pytest.skip("this cell has no kernels on CUDA")
        self.make = lambda: MODULES[name](dtype=dtype)
        self.module = self.make()
        self.parameters = {name: p.detach() for name, p in self.module.named_parameters()}
        shape = (N, I) if "Cell" in name else (T, N, I)
        self.x = torch.randn(shape, dtype=torch.float64).to(dtype)
        self.xs = torch.randn(B, *shape, dtype=torch.float64).to(dtype)

    def run(self, parameters, x) -> tuple[torch.Tensor, ...]:
        return tuple(outputs_of(functional_call(self.module, parameters, (x,))))

    def loss(self, parameters, x) -> torch.Tensor:
        return sum((y * upstream(y)).square().sum() for y in self.run(parameters, x))

    def plain_gradients(self, parameters, x, of_input: bool = True):
        """By ordinary autograd, outside of any transform."""
        leaves = [p.clone().requires_grad_() for p in parameters.values()] + [x.clone().requires_grad_()]
        loss = self.loss(dict(zip(parameters, leaves[:-1], strict=True)), leaves[-1])
        gradients = torch.autograd.grad(loss, leaves)
        named = dict(zip(parameters, gradients[:-1], strict=True))
        return (named, gradients[-1]) if of_input else named


def stack(results):
    """A list of equal trees of tensors to one tree of stacked tensors."""
    return torch.utils._pytree.tree_map(lambda *parts: torch.stack(parts), *results)


# Each gives what the transform makes, and the same by plain calls.


def check_grad(s: Subject):
    return grad(s.loss, argnums=(0, 1))(s.parameters, s.x), s.plain_gradients(s.parameters, s.x)


def check_vjp(s: Subject):
    outputs, pull = vjp(s.run, s.parameters, s.x)
    leaves = [p.clone().requires_grad_() for p in s.parameters.values()] + [s.x.clone().requires_grad_()]
    plain = s.run(dict(zip(s.parameters, leaves[:-1], strict=True)), leaves[-1])
    expected = torch.autograd.grad(plain, leaves, [upstream(y) for y in plain])
    named, of_x = pull(tuple(upstream(y) for y in outputs))
    return (outputs, *named.values(), of_x), (tuple(y.detach() for y in plain), *expected)


def check_vmap_inputs(s: Subject):
    return vmap(s.run, in_dims=(None, 0))(s.parameters, s.xs), stack([s.run(s.parameters, x) for x in s.xs])


def check_vmap_inner_dimension(s: Subject):
    mapped = vmap(s.run, in_dims=(None, -2), out_dims=1)(s.parameters, s.xs.movedim(0, -2))
    return mapped, torch.utils._pytree.tree_map(lambda y: y.movedim(0, 1), check_vmap_inputs(s)[1])


def check_vmap_weights(s: Subject):
    models = [s.make() for _ in range(B)]
    parameters, _ = stack_module_state(models)
    plain = [tuple(outputs_of(model(s.x))) for model in models]
    return vmap(s.run, in_dims=(0, None))(parameters, s.x), stack(plain)


def check_vmap_both(s: Subject):
    models = [s.make() for _ in range(B)]
    parameters, _ = stack_module_state(models)
    plain = [tuple(outputs_of(model(x))) for model, x in zip(models, s.xs, strict=True)]
    return vmap(s.run)(parameters, s.xs), stack(plain)


def check_vmap_grad(s: Subject):
    """Per-sample gradients."""
    mapped = vmap(grad(s.loss, argnums=(0, 1)), in_dims=(None, 0))(s.parameters, s.xs)
    return mapped, stack([s.plain_gradients(s.parameters, x) for x in s.xs])


def check_vmap_grad_of_ensemble(s: Subject):
    parameters = {name: torch.stack([p, 0.5 * p, -p]) for name, p in s.parameters.items()}
    every = [{name: p[b] for name, p in parameters.items()} for b in range(B)]
    mapped = vmap(grad(s.loss), in_dims=(0, None))(parameters, s.x)
    return mapped, stack([s.plain_gradients(one, s.x, of_input=False) for one in every])


def check_grad_of_vmap(s: Subject):
    def loss(parameters):
        return vmap(s.loss, in_dims=(None, 0))(parameters, s.xs).sum()

    every = stack([s.plain_gradients(s.parameters, x, of_input=False) for x in s.xs])
    return grad(loss)(s.parameters), {name: g.sum(0) for name, g in every.items()}


def check_jacrev(s: Subject):
    first = next(iter(s.parameters))

    def function(weight, x):
        return s.run(s.parameters | {first: weight}, x)[-1]

    arguments = (s.parameters[first], s.x)
    return jacrev(function, argnums=(0, 1))(*arguments), torch.autograd.functional.jacobian(function, arguments)


def check_jvp(s: Subject):
    tangents = ({name: upstream(p) for name, p in s.parameters.items()}, upstream(s.x))
    names = list(s.parameters)

    def flat(*tensors):
        return s.run(dict(zip(names, tensors[:-1], strict=True)), tensors[-1])

    expected = torch.autograd.functional.jvp(flat, (*s.parameters.values(), s.x), (*tangents[0].values(), tangents[1]))
    return jvp(s.run, (s.parameters, s.x), tangents), expected


def check_jacfwd(s: Subject):
    def function(x):
        return s.run(s.parameters, x)[-1]

    return jacfwd(function)(s.x), torch.autograd.functional.jacobian(function, s.x)


TRANSFORMS = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("module", MODULES)
def test_transform(module, transform, dtype):
    """Every transform of every module agrees with plain calls of the same module."""
    type_, tolerance = DTYPES[dtype]
    if dtype == "bfloat16" and module.endswith("-norm"):
        tolerance *= 4  # the reference rounds each product to it, and the division by its spread multiplies that
    have, want = TRANSFORMS[transform](Subject(module, type_))
    flat_have, flat_want = (torch.utils._pytree.tree_leaves(tree) for tree in (have, want))
    assert len(flat_have) == len(flat_want) > 0
    for a, b in zip(flat_have, flat_want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        scale = max(1.0, b.abs().max().item())
        torch.testing.assert_close(a, b, rtol=0.0, atol=tolerance * scale, check_stride=False)


def test_hessian():
    """Forward over reverse, and reverse over reverse, in float64."""
    s = Subject("LSTM")

    def loss(x):
        return s.loss(s.parameters, x)

    expected = torch.autograd.functional.hessian(loss, s.x)
    torch.testing.assert_close(hessian(loss)(s.x), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(jacrev(jacrev(loss))(s.x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("module", ["RNN", "GRU-deep", "LSTM-projected"])
def test_grad_through_per_sample_gradients(module):
    """A penalty on per-sample gradient norms: derivative of vmap(grad), inside a transform and by ordinary autograd."""
    s = Subject(module)

    def penalty(parameters):
        gradients = vmap(grad(s.loss), in_dims=(None, 0))(parameters, s.xs)
        return sum(g.square().sum() for g in gradients.values())

    leaves = {name: p.clone().requires_grad_() for name, p in s.parameters.items()}
    plain = 0.0
    for x in s.xs:
        gradients = torch.autograd.grad(s.loss(leaves, x), list(leaves.values()), create_graph=True)
        plain = plain + sum(g.square().sum() for g in gradients)
    expected = dict(zip(leaves, torch.autograd.grad(plain, list(leaves.values())), strict=True))
    inside = grad(penalty)(s.parameters)
    outside = torch.autograd.grad(penalty(leaves), list(leaves.values()))
    for (name, want), by_autograd in zip(expected.items(), outside, strict=True):
        torch.testing.assert_close(inside[name], want, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(by_autograd, want, rtol=1e-10, atol=1e-10)


def test_nested_vmap():
    """Two mapped dimensions, the gradients per sample of both."""
    s = Subject("GRU")
    xs = torch.stack([s.xs, 2 * s.xs])
    once = vmap(grad(s.loss), in_dims=(None, 0))
    have = vmap(once, in_dims=(None, 0))(s.parameters, xs)
    want = stack([stack([s.plain_gradients(s.parameters, x, of_input=False) for x in group]) for group in xs])
    for name in want:
        torch.testing.assert_close(have[name], want[name], rtol=1e-11, atol=1e-11)


@given(data=st.data())
def test_ops(cell, device, data):
    """Any call of an op, any of its arguments mapped: outputs and all gradients per example, as by single calls."""
    live = 1 + REFERENCES[cell].num_states
    check_op(data, cell, lambda call: call(call.op())[:live], device)


@given(data=st.data())
def test_op_with_all_c(device, data):
    """The same of the op that returns the cell state of all steps."""
    check_op(data, "lstm", lambda call: call(torch.ops.rnnfast.lstm_all_c), device)


def check_op(data, cell: str, run, device: str) -> None:
    case = data.draw(cases(cell, empty=False, expanded=False))
    call = case.call().on(device)
    names = [*call.tensors, *(n for n in ("lengths", "resets") if n in call.options)]
    everything = {n: call.tensors.get(n, call.options.get(n)) for n in names}
    mapped = data.draw(st.sets(st.sampled_from(names), min_size=1), label="mapped")
    size = data.draw(st.integers(1, 3), label="size")
    generator = torch.Generator("cpu").manual_seed(case.seed)
    given_, dims = {}, {}
    for name, tensor in everything.items():
        if name in mapped:
            order = [torch.randperm(tensor.shape[0], generator=generator, device="cpu") for _ in range(size)]
            given_[name], dims[name] = torch.stack([tensor[o] for o in order], -1), -1
        else:
            given_[name], dims[name] = tensor, None

    def function(tensors):
        call.tensors = {n: tensors[n] for n in call.tensors}
        call.options = {n: tensors.get(n, v) for n, v in call.options.items()}
        outputs = run(call)
        return sum((y * upstream(y)).sum() for y in outputs), outputs

    def gradients(tensors):
        floats = {n: t for n, t in tensors.items() if t.is_floating_point()}
        rest = {n: t for n, t in tensors.items() if not t.is_floating_point()}
        return grad(lambda f: function(f | rest), has_aux=True)(floats)

    have = vmap(gradients, in_dims=(dims,))(given_)
    mapped_outputs = vmap(lambda tensors: function(tensors)[1], in_dims=(dims,))(given_)
    for example in range(size):
        one = {n: t if dims[n] is None else t[..., example].clone() for n, t in given_.items()}
        leaves = {n: t.clone().requires_grad_() for n, t in one.items() if t.is_floating_point()}
        loss, outputs = function(one | leaves)
        plain = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        for name, want in zip(leaves, plain, strict=True):
            torch.testing.assert_close(
                have[0][name][example], want, rtol=1e-10, atol=1e-11, msg=lambda m, n=name: n + m
            )
        for a, b, c in zip(have[1], mapped_outputs, outputs, strict=True):
            torch.testing.assert_close(a[example], c.detach(), rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(b[example], c.detach(), rtol=1e-11, atol=1e-12)


def count_calls(function, *arguments) -> list[str]:
    """The names of our ops that a call runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        function(*arguments)
    return [event.key for event in profile.events() if event.key.startswith("rnnfast::")]


def test_folding():
    """Mapped inputs are one call on a larger batch, and per-sample gradients one forward and one backward."""
    s = Subject("LSTM")
    assert count_calls(vmap(s.run, in_dims=(None, 0)), s.parameters, s.xs).count("rnnfast::lstm") == 2  # and the outer
    cells = Subject("LSTM-cells")
    names = count_calls(vmap(cells.run, in_dims=(None, 0)), cells.parameters, cells.xs)
    assert names.count("rnnfast::lstm_all_c") == names.count("rnnfast::lstm") == 4  # a layer each, two directions
    names = count_calls(vmap(grad(s.loss), in_dims=(None, 0)), s.parameters, s.xs)
    assert names.count("rnnfast::_lstm_forward") == 1
    assert names.count("rnnfast::_lstm_backward_factors") == 1
    assert names.count("rnnfast::_lstm_backward") == 0


def test_ensemble_is_one_call():
    """Mapped weights are one call too, forward and backward; so is a mixture of mapped weights and shared ones."""
    for module in ("RNN", "GRU", "LSTM"):
        s = Subject(module)
        cell = {"RNN": "rnn_tanh"}.get(module, module.lower())
        parameters = {name: torch.stack([p, 0.5 * p, -p]) for name, p in s.parameters.items()}
        assert count_calls(vmap(s.run, in_dims=(0, None)), parameters, s.x).count(f"rnnfast::{cell}") == 2
        names = count_calls(vmap(grad(s.loss), in_dims=(0, None)), parameters, s.x)
        assert names.count(f"rnnfast::_{cell}_forward") == names.count(f"rnnfast::_{cell}_backward") == 1
        shared = dict.fromkeys(s.parameters) | {"weight_hh_l0": 0}
        mixed = s.parameters | {"weight_hh_l0": parameters["weight_hh_l0"]}
        have = vmap(grad(s.loss), in_dims=(shared, None))(mixed, s.x)
        for b in range(B):
            one = s.parameters | {"weight_hh_l0": parameters["weight_hh_l0"][b]}
            want = s.plain_gradients(one, s.x, of_input=False)
            for name in want:
                torch.testing.assert_close(have[name][b], want[name], rtol=1e-11, atol=1e-11)


def test_all_c_by_the_kernels():
    """Per-sample gradients of a loss of all cell states are one forward and one backward."""
    layer = rnnfast.LSTM(I, H, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, x):
        return functional_call(layer, parameters, (x,), {"return_cells": True})[2].square().sum()

    xs = torch.randn(B, T, N, I, dtype=torch.float64)
    names = count_calls(vmap(grad(loss), in_dims=(None, 0)), parameters, xs)
    assert names.count("rnnfast::_lstm_all_c_forward") == names.count("rnnfast::_lstm_backward_factors") == 1


def test_training_an_ensemble():
    """loss.backward() over vmapped weights, without torch.func.grad."""
    s = Subject("LSTM-projected")
    parameters = {name: torch.stack([p, 0.5 * p]).requires_grad_() for name, p in s.parameters.items()}
    sum(y.square().sum() for y in vmap(s.run, in_dims=(0, None))(parameters, s.x)).backward()
    for b in range(2):
        one = {name: p[b].detach().requires_grad_() for name, p in parameters.items()}
        sum(y.square().sum() for y in s.run(one, s.x)).backward()
        for name, p in one.items():
            torch.testing.assert_close(parameters[name].grad[b], p.grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("module", ["GRU", "LSTM-cells", "LSTM-projected"])
def test_nested_ensembles(module):
    """Weights mapped twice, and weights with an input mapped outside or inside of them."""
    s = Subject(module)
    twice = {
        name: torch.stack([torch.stack([p, -p]), torch.stack([0.5 * p, 2 * p])]) for name, p in s.parameters.items()
    }
    once = {name: p[0] for name, p in twice.items()}

    def gradients(parameters, x):
        return grad(s.loss, argnums=(0, 1))(parameters, x)

    def plain(parameters, x):
        return s.plain_gradients(parameters, x)

    def pick(parameters, *index):
        return {name: p[index] for name, p in parameters.items()}

    pairs = [
        (
            vmap(vmap(gradients, in_dims=(0, None)), in_dims=(0, None))(twice, s.x),
            stack([stack([plain(pick(twice, a, b), s.x) for b in range(2)]) for a in range(2)]),
        ),
        (
            vmap(vmap(gradients, in_dims=(0, None)), in_dims=(None, 0))(once, s.xs),
            stack([stack([plain(pick(once, b), x) for b in range(2)]) for x in s.xs]),
        ),
        (
            vmap(vmap(gradients, in_dims=(None, 0)), in_dims=(0, None))(once, s.xs),
            stack([stack([plain(pick(once, b), x) for x in s.xs]) for b in range(2)]),
        ),
    ]
    for have, want in pairs:
        leaves = (torch.utils._pytree.tree_leaves(tree) for tree in (have, want))
        for a, b in zip(*leaves, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)

    def last(parameters):
        return vmap(s.run, in_dims=(0, None))(parameters, s.x)[-1]

    for name in ("weight_ih_l0", "bias_hh_l0"):
        have = jacrev(lambda p, name=name: last(once | {name: p}))(once[name])
        want = torch.autograd.functional.jacobian(lambda p, name=name: last(once | {name: p}), once[name])
        torch.testing.assert_close(have, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("lengths", [None, (4, 0)], ids=["full", "lengths"])
def test_tokens(cell, lengths):
    """Tokens in every transform are the one-hot rows they stand for."""
    size, states = 6, REFERENCES[cell].num_states
    gates = REFERENCES[cell].num_gates * H
    shapes: list[tuple[int, ...]] = [(gates, size), (gates, H), (gates,), (gates,)]
    if REFERENCES[cell].num_peepholes:
        shapes.append((REFERENCES[cell].num_peepholes * H,))
    if REFERENCES[cell].is_normalized:
        shapes.append((REFERENCES[cell].num_norm_vectors * H,))
    weights = tuple(torch.randn(*shape, dtype=torch.float64) for shape in shapes)
    h0 = torch.randn(N, H, dtype=torch.float64)
    op = getattr(torch.ops.rnnfast, cell)
    options = {} if lengths is None else {"lengths": torch.tensor(lengths, device="cpu")}

    def run(weights, h0, tokens):
        name = "weight_ln" if REFERENCES[cell].is_normalized else "weight_ch"
        extras = dict(zip([name], weights[4:], strict=False))
        return op(tokens, h0, None, *weights[:4], None, **options, **extras)[: 1 + states]

    def by_one_hot(weights, h0, tokens):
        return run(weights, h0, torch.eye(size, dtype=torch.float64)[tokens])

    def loss(run, weights, h0, tokens):
        return sum((y * upstream(y)).square().sum() for y in run(weights, h0, tokens))

    tokens = torch.randint(size, (B, T, N))
    many = tuple(torch.stack([w, 0.5 * w, -w]) for w in weights)

    def everything(run):
        def first(weights, h0, tokens):
            return grad(lambda w, h: loss(run, w, h, tokens), argnums=(0, 1))(weights, h0)

        def plain(weights, h0, x):
            return run(weights, h0, x)

        return [
            first(weights, h0, tokens[0]),
            vmap(plain, in_dims=(None, None, 0))(weights, h0, tokens),
            vmap(plain, in_dims=(0, None, None))(many, h0, tokens[0]),
            vmap(first, in_dims=(None, None, 0))(weights, h0, tokens),
            vmap(first, in_dims=(0, None, 0))(many, h0, tokens),
            jvp(lambda w: run(w, h0, tokens[0]), (weights,), (weights,)),
            jacrev(lambda h: run(weights, h, tokens[0])[0])(h0),
            jacrev(jacrev(lambda h: loss(run, weights, h, tokens[0])))(h0),
        ]

    for have, want in zip(everything(run), everything(by_one_hot), strict=True):
        leaves = (torch.utils._pytree.tree_leaves(tree) for tree in (have, want))
        for a, b in zip(*leaves, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.cpu_only(reason="on a GPU nobody waits for the tokens to look at them")
@pytest.mark.parametrize("token", [-1, 6])
def test_tokens_outside_are_refused(cell, token):
    """In every transform, also where the reference runs, which does not look at them."""
    gates = REFERENCES[cell].num_gates * H
    w, r = torch.randn(gates, 6), torch.randn(gates, H)
    tokens = torch.zeros(B, T, N, dtype=torch.int64)
    tokens[1, 2, 1] = token

    def output(tokens, w):
        return getattr(torch.ops.rnnfast, cell)(tokens, None, None, w, r, None, None, None)[0]

    def tangent(tokens):
        return jvp(lambda w: output(tokens, w), (w,), (w,))[1]

    for refused in (lambda: vmap(lambda t: output(t, w))(tokens), lambda: vmap(tangent)(tokens)):
        with pytest.raises(IndexError, match=f"input: expected tokens from 0 to 5, .* got {token}"):
            refused()


def test_training_through_vmap():
    """loss.backward() over a vmapped layer, without torch.func.grad."""
    s = Subject("LSTM")
    vmap(lambda x: s.module(x)[0], in_dims=0)(s.xs).square().sum().backward()
    mapped = {name: p.grad.clone() for name, p in s.module.named_parameters()}
    s.module.zero_grad()
    sum(s.module(x)[0].square().sum() for x in s.xs).backward()
    for name, p in s.module.named_parameters():
        torch.testing.assert_close(mapped[name], p.grad, rtol=1e-11, atol=1e-11)


def test_mapped_packed_lengths_are_refused():
    """batch_sizes that differ from example to example give results of different sizes."""
    sizes = torch.tensor([[2, 1], [1, 1]], device="cpu")
    w = torch.randn(H, I), torch.randn(H, H)
    with pytest.raises(RuntimeError, match="batch_sizes"):
        vmap(lambda s, x: rnnfast.ops.rnn_tanh(x, None, *w, batch_sizes=s)[0])(sizes, torch.randn(2, 3, I))


def test_functionalize_is_refused():
    """A transform without a rule says so and names those that have one."""
    layer = rnnfast.RNN(I, H)
    with pytest.raises(NotImplementedError, match=r"rnn_tanh: no rule .* Functionalize; grad, vjp, jvp and vmap"):
        torch.func.functionalize(lambda x: layer(x)[0])(torch.randn(T, N, I))
