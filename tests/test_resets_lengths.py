"""Resets, lengths and the cell states of all steps: the layers against torch.nn's on packed batches and on segments."""

from __future__ import annotations

import inspect
from itertools import pairwise

import pytest
import torch
from agreement import assert_as_accurate, assert_same, cotangent, evaluate
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import IGNORE_TORCH, LAYERS, pair, tensors_of
from strategies import DIFFERENTIABLE, Case, cases
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import rnnfast
from rnnfast import reference

pytestmark = [pytest.mark.filterwarnings(IGNORE_TORCH), pytest.mark.usefixtures("default_device")]
NAMES_DEVICES = pytest.mark.cpu_only("what it is made of is made once, on the CPU")
F64 = torch.float64
I, H = 3, 5  # noqa: E741  (the letter of the whole code base)


@st.composite
def problems(draw, layer: str, shortest: int = 0):
    """A pair of layers, a padded batch in their order of dimensions with junk past the lengths, hx and lengths."""
    steps, batch = draw(st.integers(1, 7)), draw(st.integers(1, 6))
    options = {
        "num_layers": draw(st.integers(1, 3)),
        "bidirectional": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bias": draw(st.booleans()),
    }
    if layer == "lstm" and draw(st.booleans()):
        options["proj_size"] = 2
    torch.manual_seed(draw(st.integers(0, 2**16)))
    theirs, ours = pair(layer, I, H, dtype=F64, **options)
    lengths = torch.tensor(draw(st.lists(st.integers(shortest, steps), min_size=batch, max_size=batch)))
    x = torch.randn(steps, batch, I, dtype=F64)
    if options["batch_first"]:
        x = x.transpose(0, 1).contiguous()
    rows = options["num_layers"] * (1 + options["bidirectional"])
    hx = None
    if draw(st.booleans()):
        hx = [torch.randn(rows, batch, options.get("proj_size", H), dtype=F64)]
        hx += [torch.randn(rows, batch, H, dtype=F64)] if layer == "lstm" else []
    resets = torch.rand(steps, batch) < draw(st.sampled_from([0.0, 0.2, 0.5, 1.0]))
    return theirs, ours, x, hx, lengths, resets


def results(module: nn.Module, function, x: Tensor, hx: list[Tensor] | None) -> dict[str, Tensor]:
    """Outputs of function(module, x, hx), and the gradients of one loss that mixes them for x, hx and parameters."""
    x = x.clone().requires_grad_()
    hx = None if hx is None else [state.clone().requires_grad_() for state in hx]
    outputs = tensors_of(function(module, x, hx if hx is None or len(hx) == 2 else hx[0]))
    leaves = [x, *(hx or []), *module.parameters()]
    live = [y for y in outputs if y.requires_grad]
    grads = [torch.zeros_like(leaf) for leaf in leaves]
    if live:  # sequences of length 0 have results that depend on nothing
        grads = torch.autograd.grad(live, leaves, [cotangent(y) for y in live], materialize_grads=True)
    named = {f"output_{i}": y.detach() for i, y in enumerate(outputs)}
    return named | {f"grad_{i}": grad for i, grad in enumerate(grads)}


def by_packing(lengths: Tensor):
    """What the lengths mean, said in torch.nn's way; none of them may be 0."""

    def function(module: nn.RNNBase, x: Tensor, hx):
        first = module.batch_first
        output, state = module(pack_padded_sequence(x, lengths.cpu(), first, enforce_sorted=False), hx)
        return pad_packed_sequence(output, first, total_length=x.shape[1 if first else 0])[0], state

    return function


def by_segments(resets: Tensor, lengths: Tensor):
    """What resets and lengths mean: each sequence cut at its boundaries, a torch.nn call on each of the pieces.

    The forward direction carries a state into a piece only from the initial one, at the first; the reverse direction
    only at the last.
    """

    def function(module: nn.RNNBase, x: Tensor, hx):
        if module.batch_first:
            x = x.transpose(0, 1)
        directions = 1 + module.bidirectional
        rows = module.num_layers * directions
        sizes = [module.proj_size or module.hidden_size, module.hidden_size][: 1 + isinstance(module, nn.LSTM)]
        initial = [x.new_zeros(rows, x.shape[1], size) for size in sizes] if hx is None else hx
        initial = [initial] if isinstance(initial, Tensor) else initial
        reverse = torch.tensor([d == 1 for _ in range(module.num_layers) for d in range(directions)])[:, None]
        outputs, finals = [], [[] for _ in sizes]
        for n in range(x.shape[1]):
            length = int(lengths[n])
            cuts = [0, *(t for t in range(1, length) if resets[t, n]), length]
            pieces = []
            final = [state[:, n] for state in initial]
            for begin, end in pairwise(cuts):
                if end == begin:
                    continue
                keeps = torch.where(reverse, torch.tensor(end == length), torch.tensor(begin == 0 and not resets[0, n]))
                start = [torch.where(keeps, state[:, n], 0.0) for state in initial]
                output, state = module(x[begin:end, n], tuple(start) if len(start) == 2 else start[0])
                pieces.append(output)
                # the forward direction ends in the last piece, the reverse direction in the first
                state = [state] if isinstance(state, Tensor) else state
                final = [
                    torch.where(reverse, new if begin == 0 else old, new) for new, old in zip(state, final, strict=True)
                ]
            features = sizes[0] * directions
            outputs.append(torch.cat([*pieces, x.new_zeros(x.shape[0] - length, features)]))
            for all_of_kind, one in zip(finals, final, strict=True):
                all_of_kind.append(one)
        output = torch.stack(outputs, 0 if module.batch_first else 1)
        states = tuple(torch.stack(kind, 1) for kind in finals)
        return output, states if len(states) == 2 else states[0]

    return function


def by_ours(module: nn.RNNBase, resets: Tensor | None = None, lengths: object = None, **options):
    """The layer's own way, resets in its order of dimensions."""
    if resets is not None and module.batch_first:
        resets = resets.T
    return lambda module, x, hx: module(x, hx, resets=resets, lengths=lengths, **options)


@pytest.mark.parametrize("layer", LAYERS)
@given(data=st.data())
def test_lengths_equal_packing(layer, data):
    """Outputs, states and all gradients, in any order of lengths."""
    theirs, ours, x, hx, lengths, _ = data.draw(problems(layer, shortest=1))
    want = results(theirs, by_packing(lengths), x, hx)
    assert_same(results(ours, by_ours(ours, None, lengths), x, hx), want)


@pytest.mark.parametrize("layer", LAYERS)
@given(data=st.data())
def test_resets_and_lengths_equal_separate_calls(layer, data):
    """Every boundary cuts a sequence in two, for both directions and all layers; length 0 gives the state back."""
    theirs, ours, x, hx, lengths, resets = data.draw(problems(layer))
    if data.draw(st.booleans(), label="full length"):
        lengths = torch.full_like(lengths, resets.shape[0])
    want = results(theirs, by_segments(resets, lengths), x, hx)
    assert_same(results(ours, by_ours(ours, resets, lengths), x, hx), want)
    if bool((lengths == resets.shape[0]).all()):
        assert_same(results(ours, by_ours(ours, resets), x, hx), want)


@pytest.mark.parametrize("layer", LAYERS)
def test_resets_equal_the_loop_over_steps(layer):
    """The way of programs that had no resets: a call per step, the state multiplied by what is left of it."""
    theirs, ours = pair(layer, I, H, num_layers=2, dtype=F64)
    x, resets = torch.randn(6, 4, I, dtype=F64), torch.rand(6, 4) < 0.4
    states = [torch.randn(2, 4, H, dtype=F64) for _ in range(2 if layer == "lstm" else 1)]

    def loop(module, x, hx):
        outputs = []
        for t in range(x.shape[0]):
            keep = (~resets[t]).to(F64)[None, :, None]
            hx = tuple(s * keep for s in hx) if isinstance(hx, (tuple, list)) else hx * keep
            output, hx = module(x[t : t + 1], hx)
            outputs.append(output)
        return torch.cat(outputs), hx

    assert_same(results(ours, by_ours(ours, resets), x, states), results(theirs, loop, x, states))


@pytest.mark.parametrize("layer", LAYERS)
def test_unbatched_resets(layer):
    theirs, ours = pair(layer, I, H, num_layers=2, bidirectional=True, dtype=F64)
    x, resets = torch.randn(6, I, dtype=F64), torch.tensor([0, 1, 0, 0, 1, 0], dtype=torch.bool)
    want = results(theirs, by_segments(resets[:, None], torch.tensor([6])), x[:, None], None)
    have = results(ours, lambda m, x, hx: m(x, hx, resets=resets), x, None)
    assert_same({name: value.reshape(want[name].shape) for name, value in have.items()}, want)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_padding_is_neither_read_nor_written(layer, batch_first, bidirectional):
    """Whatever lies past a length, NaN too: zero in the output of every layer, no gradient, nothing elsewhere."""
    _, ours = pair(layer, I, H, num_layers=3, bidirectional=bidirectional, batch_first=batch_first, dropout=0.5)
    lengths = torch.tensor([2, 0, 5, 3])
    x = torch.randn(5, 4, I)
    padding = torch.arange(5)[:, None] >= lengths.to(x.device)
    x[padding] = float("nan")
    if batch_first:
        x, padding = x.transpose(0, 1), padding.T
    x.requires_grad_()
    output, state = ours(x, lengths=lengths)
    assert all(y.isfinite().all() for y in (output, *tensors_of(state)))
    assert (output[padding] == 0).all() and output[~padding].abs().sum() > 0
    assert all((s[:, 1] == 0).all() for s in tensors_of(state))
    output.square().sum().backward()
    assert (x.grad[padding] == 0).all() and x.grad[~padding].abs().sum() > 0
    assert all(p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("layer", LAYERS)
def test_dropout_between_layers(layer):
    """Torch's mask on the padded output of a layer, whatever the lengths and resets."""
    _, ours = pair(layer, I, H, num_layers=2, dropout=0.5)
    lengths, resets = torch.tensor([2, 5, 3]), torch.rand(5, 3) < 0.3
    x = torch.randn(5, 3, I)
    torch.manual_seed(3)
    output, _ = ours(x, lengths=lengths, resets=resets)
    one, two = (type(ours)(size, H, **LAYERS[layer][1]) for size in (I, H))
    for k, part in enumerate((one, two)):
        part.load_state_dict({n[:-1] + "0": p for n, p in ours.state_dict().items() if n.endswith(str(k))})
    torch.manual_seed(3)
    between = torch.dropout(one(x, lengths=lengths, resets=resets)[0], 0.5, True)
    assert torch.equal(output, two(between, lengths=lengths, resets=resets)[0])
    torch.manual_seed(3)
    full = ours(x, lengths=[5, 5, 5], resets=torch.zeros(5, 3, dtype=torch.bool))[0]
    torch.manual_seed(3)
    torch.testing.assert_close(full, ours(x)[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("layer", LAYERS)
def test_double_backward(layer):
    """First and second derivatives through resets, lengths and, for the LSTM, the cell states."""
    _, ours = pair(layer, 2, 3, num_layers=2, bidirectional=True, dtype=F64)
    x = torch.randn(4, 3, 2, dtype=F64, requires_grad=True)
    lengths, resets = torch.tensor([2, 4, 0]), torch.rand(4, 3) < 0.4
    options = {"return_cells": True} if layer == "lstm" else {}
    weights = list(ours.parameters())

    def call(x, *_):
        return tuple(tensors_of(ours(x, lengths=lengths, resets=resets, **options)))

    if layer == "rnn_relu":  # its slopes are constant: one check suffices, away from the kink
        assert torch.autograd.gradcheck(call, (x, *weights[:2]))
        return
    assert torch.autograd.gradcheck(call, (x, *weights[:2]), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, *weights[:2]), fast_mode=True)


@NAMES_DEVICES
@pytest.mark.parametrize("lengths", [[3, 1], (3, 1), torch.tensor([3, 1], dtype=torch.int32), torch.tensor([3, 1])])
def test_kinds_of_lengths(lengths):
    """A list, a tuple, any integer dtype."""
    layer, x = rnnfast.GRU(I, H), torch.randn(4, 2, I)
    assert torch.equal(layer(x, lengths=lengths)[0], layer(x, lengths=torch.tensor([3, 1]))[0])
    for dtype in (torch.uint8, torch.int8, torch.int16):
        assert torch.equal(layer(x, lengths=torch.tensor([3, 1], dtype=dtype))[0], layer(x, lengths=lengths)[0])


@pytest.mark.few_cells
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [(10, *(0,) * 69), (0, 2, *(0,) * 68)], ids=["ten", "two"])
def test_few_real_rows_in_many_steps(cell, lengths, reverse):
    """So few rows would have their weights read in place, were the steps not too many for one sum of gradients."""
    call = Case(cell, T=19, N=70, lengths=lengths, reverse=reverse).call().with_grad()
    assert_same(evaluate(call, call.op()), evaluate(call, call.reference()))


def test_empty_batch():
    output, h_n = rnnfast.GRU(I, H)(torch.randn(4, 0, I), lengths=[], resets=torch.zeros(4, 0, dtype=torch.bool))
    assert output.shape == (4, 0, H) and h_n.shape == (1, 0, H)


# --- Cell states of all steps -----------------------------------------------------------------------------------------


def all_c_results(call, op, **options):
    """Outputs of an op that also returns all_c, and the gradients of one loss that mixes them."""
    outputs = dict(
        zip(("output", "h_n", "c_n", "all_c"), op(*call.positional(), **call.keywords(), **options), strict=True)
    )
    leaves = {n: call.tensors[n] for n in DIFFERENTIABLE if n in call.tensors and call.tensors[n].requires_grad}
    if leaves:
        live = list(outputs.values())
        grads = torch.autograd.grad(live, list(leaves.values()), [cotangent(y) for y in live], materialize_grads=True)
        outputs |= {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: value.detach() for name, value in outputs.items()}


@given(data=st.data())
def test_all_c_against_the_reference(kernel, data):
    """Every kind of call, on every instruction set; float32 by the tolerance rule."""
    torch.set_num_threads(data.draw(st.sampled_from([1, 2]), label="threads"))
    case = data.draw(cases("lstm", expanded=False))
    op = torch.ops.rnnfast.lstm_all_c
    exact = case.call().with_grad(*case.leaves())
    want = all_c_results(exact, reference.lstm, with_all_c=True)
    assert_same(all_c_results(case.call().on(kernel).with_grad(*case.leaves()), op), want)
    single = case.call(torch.float32)
    exact = single.to(F64).with_grad(*case.leaves())
    assert_as_accurate(
        all_c_results(single.on(kernel).with_grad(*case.leaves()), op),
        all_c_results(single.with_grad(*case.leaves()), reference.lstm, with_all_c=True),
        all_c_results(exact, reference.lstm, with_all_c=True),
    )


def test_the_gradient_of_all_c_alone(device):
    """It needs no gradient of the output beside it."""
    call = Case("lstm", T=5, N=3, H=17, lengths=(2, 5, 0), resets=True).call().on(device)
    grads = []
    for op, options in ((call.op(), {}), (call.reference(), {"with_all_c": True})):
        leaves = call.with_grad()
        op = torch.ops.rnnfast.lstm_all_c if not options else op
        all_c = op(*leaves.positional(), **leaves.options, **options)[3]
        values = torch.autograd.grad(all_c, list(leaves.tensors.values()), cotangent(all_c), materialize_grads=True)
        grads.append(dict(zip(leaves.tensors, values, strict=True)))
    assert_same(*grads)


@pytest.mark.parametrize(
    "case", [Case("lstm", lengths=(2, 4, 0), resets=True), Case("lstm", P=2), Case("lstm", kind="step", T=1)]
)
def test_opcheck(case, device):
    """Schema, fake kernel, autograd registration of the ops with all_c."""
    call = case.call().on(device).with_grad()
    torch.library.opcheck(torch.ops.rnnfast.lstm_all_c.default, call.everything())
    torch.library.opcheck(
        torch.ops.rnnfast._lstm_all_c_forward.default,
        case.call().on(device).everything(),
        test_utils=("test_schema", "test_faketensor"),
    )


@NAMES_DEVICES
def test_meta_all_c():
    call = Case("lstm", T=4, N=3, H=5, P=2).call()
    tensors = [None if t is None else t.to("meta") for t in call.positional()]
    shapes = [tuple(y.shape) for y in torch.ops.rnnfast.lstm_all_c(*tensors)]
    assert shapes == [(4, 3, 2), (3, 2), (3, 5), (4, 3, 5)]


@NAMES_DEVICES
def test_only_cells_with_c_have_it(cell):
    has_it = reference.CELLS[cell].num_states == 2
    assert hasattr(torch.ops.rnnfast, f"{cell}_all_c") == has_it
    if not has_it:
        forward, backward = (getattr(torch.ops.rnnfast, f"_{cell}_{way}") for way in ("forward", "backward"))
        call = Case(cell).call()
        saved = forward(*call.everything())[3:]
        with pytest.raises(ValueError, match=r"grad_all_c.*no second state"):
            backward(None, None, None, *call.everything(), *saved, [True] * 10, torch.ones(4, 3, 5, dtype=F64))


@settings(max_examples=10)
@given(data=st.data())
def test_return_cells(data):
    """Against torch.nn called step by step: the last layer's c, for any lengths and resets, with its gradients."""
    theirs, ours, x, hx, lengths, resets = data.draw(problems("lstm"))
    first = theirs.batch_first
    directions = 1 + theirs.bidirectional
    with_cells = by_ours(ours, resets, lengths, return_cells=True)
    output, state, cells = with_cells(ours, x, hx)
    plain_output, plain_state = by_ours(ours, resets, lengths)(ours, x, hx)
    assert torch.equal(output, plain_output)
    assert all(torch.equal(a, b) for a, b in zip(state, plain_state, strict=True))
    assert cells.shape == (*x.shape[:2], directions * H)
    by_step = cells.transpose(0, 1) if first else cells
    for n, length in enumerate(lengths.tolist()):
        assert (by_step[length:, n] == 0).all()
        if length:
            assert torch.equal(by_step[length - 1, n, :H], state[1][-directions, n])
        if length and theirs.bidirectional:
            assert torch.equal(by_step[0, n, H:], state[1][-1, n])
    if theirs.bidirectional:
        return  # each step of it is checked by the op's test

    def loop(module, x, hx):
        x = x.transpose(0, 1) if first else x
        rows, batch = module.num_layers, x.shape[1]
        if hx is None:
            hx = (x.new_zeros(rows, batch, module.proj_size or H), x.new_zeros(rows, batch, H))
        outputs, cells = [], []
        for t in range(x.shape[0]):
            real = (t < lengths)[None, :, None]
            old = [torch.where(resets[t][None, :, None] & real, 0.0, s) for s in hx]
            step = x[t : t + 1].transpose(0, 1) if first else x[t : t + 1]
            output, new = module(step, tuple(old))
            hx = [torch.where(real, a, b) for a, b in zip(new, old, strict=True)]
            outputs.append(torch.where(real, output.transpose(0, 1) if first else output, 0.0))
            cells.append(torch.where(real, hx[1][-1:], 0.0))
        dim = 0
        output, cells = torch.cat(outputs, dim), torch.cat(cells, dim)
        return (output.transpose(0, 1), tuple(hx), cells.transpose(0, 1)) if first else (output, tuple(hx), cells)

    assert_same(results(ours, with_cells, x, hx), results(theirs, loop, x, hx))


@pytest.mark.parametrize("sorted_", [True, False])
def test_return_cells_of_a_packed_sequence(sorted_):
    """A PackedSequence in the order of the output; the same numbers as with lengths."""
    _, ours = pair("lstm", I, H, bidirectional=True)
    lengths = torch.tensor([4, 3, 1] if sorted_ else [3, 1, 4])
    x = torch.randn(4, 3, I)
    output, _, cells = ours(pack_padded_sequence(x, lengths.cpu(), enforce_sorted=sorted_), return_cells=True)
    assert isinstance(cells, PackedSequence)
    assert torch.equal(cells.batch_sizes, output.batch_sizes)
    want = ours(x, lengths=lengths, return_cells=True)[2]
    torch.testing.assert_close(pad_packed_sequence(cells)[0], want, rtol=1e-6, atol=1e-7)


def test_return_cells_unbatched_and_autocast(default_device):
    _, ours = pair("lstm", I, H)
    x = torch.randn(4, I)
    output, (_, c_n), cells = ours(x, return_cells=True)
    assert cells.shape == output.shape and torch.equal(cells[-1:], c_n)
    with torch.autocast(default_device, torch.bfloat16):
        _, (_, c_n), cells = ours(x, return_cells=True)
    assert cells.dtype == c_n.dtype


# --- Bad input, and the drop-in ---------------------------------------------------------------------------------------

X = torch.randn(4, 3, I)
FLAGS = torch.zeros(4, 3, dtype=torch.bool)
PACKED = PackedSequence(torch.randn(6, I), torch.tensor([3, 2, 1]))
WRONG = {
    "lengths with packed": (PACKED, {"lengths": [3, 2, 1]}, "lengths.*PackedSequence"),
    "resets with packed": (PACKED, {"resets": FLAGS}, "resets.*PackedSequence"),
    "both with packed": (PACKED, {"resets": FLAGS, "lengths": [3, 2, 1]}, "PackedSequence"),
    "unbatched lengths": (X[:, 0], {"lengths": [2]}, "lengths.*2-D"),
    "too many lengths": (X, {"lengths": [1, 2, 3, 4]}, r"lengths.*\[N\] = \(3,\).*got \(4,\)"),
    "2-D lengths": (X, {"lengths": torch.ones(3, 1, dtype=torch.int64)}, r"lengths.*\[N\] = \(3,\).*got \(3, 1\)"),
    "float lengths": (X, {"lengths": [1.0, 2.0, 3.0]}, "lengths.*integers.*float32"),
    "bool lengths": (X, {"lengths": torch.tensor([True, True, True])}, "lengths.*integers.*bool"),
    "complex lengths": (X, {"lengths": torch.ones(3, dtype=torch.complex64)}, "lengths.*integers.*complex"),
    "lengths that are none": (X, {"lengths": 3}, "lengths.*3 integers.*got 3"),
    "lengths of words": (X, {"lengths": ["a", "b", "c"]}, "lengths.*3 integers.*got"),
    "negative length": (X, {"lengths": [1, -1, 2]}, "lengths.*0 to T = 4.*got -1"),
    "length beyond T": (X, {"lengths": [1, 5, 2]}, "lengths.*0 to T = 4.*got 5"),
    "lengths without values": (X, {"lengths": torch.ones(3, dtype=torch.int64, device="meta")}, "lengths.*meta"),
    "resets of another shape": (X, {"resets": FLAGS[:3]}, r"resets.*\[T, N\] = \(4, 3\).*got \(3, 3\)"),
    "resets transposed": (X, {"resets": FLAGS.T}, r"resets.*\[T, N\] = \(4, 3\).*got \(3, 4\)"),
    "batched resets for one sequence": (X[:, 0], {"resets": FLAGS[:, :1]}, r"resets.*\[T\] = \(4,\).*got \(4, 1\)"),
    "integer resets": (X, {"resets": FLAGS.long()}, "resets.*torch.bool.*int64"),
    "float resets": (X, {"resets": FLAGS.float()}, "resets.*torch.bool.*float32"),
    "resets elsewhere": (X, {"resets": FLAGS.to("meta")}, "resets.*device.*cpu.*meta"),
}


@NAMES_DEVICES
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("layer", LAYERS)
def test_refusals(layer, wrong):
    """A ValueError that names the argument, what was expected and what came."""
    x, options, match = WRONG[wrong]
    _, ours = pair(layer, I, H)
    with pytest.raises(ValueError, match=match):
        ours(x, **options)


@NAMES_DEVICES
def test_refusals_with_batch_first_and_of_types():
    layer = rnnfast.GRU(I, H, batch_first=True)
    with pytest.raises(ValueError, match=r"resets.*\[N, T\].*= \(3, 4\).*got \(4, 3\)"):
        layer(X.transpose(0, 1), resets=FLAGS)
    with pytest.raises(TypeError, match="resets must be a bool Tensor, got list"):
        layer(X.transpose(0, 1), resets=FLAGS.tolist())
    with pytest.raises(TypeError, match="return_cells"):
        layer(X.transpose(0, 1), return_cells=True)


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_positional_arguments_are_torchs(name):
    """What is new is by keyword only, so that a call written for torch.nn means the same."""
    parameters = inspect.signature(getattr(rnnfast, name).forward).parameters.values()
    assert [p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY] == ["self", "input", "hx"]


@NAMES_DEVICES
def test_subclass_hands_them_on():
    """Through a user's forward with cooperative super(), and through __call__ with its hooks."""

    class Mine(rnnfast.GRU):
        def forward(self, input, hx=None, **options):
            return super().forward(input * 2, hx, **options)

    seen = []
    layer = Mine(I, H)
    layer.register_forward_hook(lambda m, args, kwargs, y: seen.append(sorted(kwargs)), with_kwargs=True)
    resets = torch.rand(4, 3) < 0.5
    output, _ = layer(X, resets=resets, lengths=[4, 2, 1])
    plain = rnnfast.GRU(I, H)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(output, plain(X * 2, resets=resets, lengths=[4, 2, 1])[0])
    assert seen == [["lengths", "resets"]]
