"""The oracle itself: against torch.nn in float64, by gradcheck, and by what lengths and resets mean."""

import pytest
import torch
from agreement import assert_same, evaluate, torch_op
from hypothesis import given
from hypothesis import strategies as st
from strategies import OUTPUTS, Case, cases, laid_out

from rnnfast import _C, reference


def test_every_cell_has_a_reference():
    """Adding a cell to the extension without its oracle fails here."""
    compiled = {cell["name"]: (cell["num_gates"], cell["num_states"]) for cell in _C.cells()}
    assert compiled == {name: (cell.num_gates, cell.num_states) for name, cell in reference.CELLS.items()}
    for cell in _C.cells():
        assert getattr(reference, cell["name"]) is reference.CELLS[cell["name"]]
        assert cell["source"].strip(), f"{cell['name']} does not say where its formula is from"


@given(data=st.data())
def test_equals_torch(cell, data):
    """Outputs and all gradients, for everything torch.nn can do in one layer and direction."""
    case = data.draw(cases(cell, empty=False, plain=True))
    call = case.call().with_grad(*case.leaves())
    assert_same(evaluate(call, reference.CELLS[cell]), evaluate(call, torch_op(cell)))


@pytest.mark.parametrize("reverse", [False, True])
def test_empty_batch(cell, reverse):
    """No sequence at all: empty outputs of the right shape, zero gradients for the weights."""
    call = Case(cell, N=0, reverse=reverse).call().with_grad()
    results = evaluate(call, reference.CELLS[cell])
    assert results["output"].shape == (4, 0, 5) and results["h_n"].shape == (0, 5)
    assert torch.equal(results["grad_weight_hh"], torch.zeros_like(call.tensors["weight_hh"]))


VARIANTS = {
    "plain": Case("", N=2, T=3, I=2, H=3),
    "no_state_no_bias": Case("", N=2, T=3, I=2, H=3, h0=False, c0=False, bias=False),
    "reverse": Case("", N=2, T=3, I=2, H=3, reverse=True),
    "packed": Case("", N=3, T=3, I=2, H=2, kind="packed", lengths=(3, 2, 2)),
    "lengths_resets": Case("", N=3, T=3, I=2, H=2, lengths=(2, 0, 3), resets=True, reverse=True),
    "step": Case("", N=2, I=2, H=3, kind="step"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients(cell, variant):
    """First and second derivatives against finite differences."""
    case = Case(
        **{
            **vars(VARIANTS[variant]),
            "cell": cell,
            "P": 1 if reference.CELLS[cell].has_projection and variant != "plain" else None,
        }
    )
    call = case.call().with_grad()
    names = list(call.tensors)

    def function(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        call.tensors = dict(zip(names, tensors, strict=True))
        return call(reference.CELLS[cell])[: 1 + reference.CELLS[cell].num_states]

    leaves = tuple(call.tensors.values())
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@given(data=st.data())
def test_lengths_are_packing_without_sorting(cell, data):
    """A padded batch with lengths gives each sequence what it gets alone; what lies in the padding does not matter."""
    T, lengths = 5, data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    reverse = data.draw(st.booleans())
    case = Case(
        cell,
        T=T,
        N=len(lengths),
        lengths=tuple(lengths),
        reverse=reverse,
        P=2 if reference.CELLS[cell].has_projection else None,
    )
    call = case.call()
    for n, length in enumerate(lengths):
        call.tensors["input"][length:, n] = float("nan")
    call = call.with_grad()
    results = evaluate(call, reference.CELLS[cell])
    for n, length in enumerate(lengths):
        assert torch.equal(results["output"][length:, n], torch.zeros(T - length, case.P or case.H).double())
        alone = {name: t[n : n + 1] if name in ("h0", "c0") else t.detach() for name, t in call.tensors.items()}
        state = [alone["h0"], alone.get("c0")]
        extras = {name: alone.pop(name) for name in ("weight_ch", "weight_ln") if name in alone}
        weights = list(alone.values())[1 + sum(s is not None for s in state) :]
        if length == 0:
            torch.testing.assert_close(results["h_n"][n : n + 1], alone["h0"])
            continue
        single = reference.CELLS[cell](alone["input"][:length, n : n + 1], *state, *weights, reverse=reverse, **extras)
        torch.testing.assert_close(results["output"][:length, n : n + 1], single[0])
        torch.testing.assert_close(results["h_n"][n : n + 1], single[1])
    assert all(gradient.isfinite().all() for gradient in results.values())


@pytest.mark.parametrize("reverse", [False, True])
def test_resets_cut_the_sequence(cell, reverse):
    """A boundary for the whole batch equals two separate calls, in either direction."""
    call = Case(cell, T=5, reverse=reverse).call()
    call.options["resets"] = torch.zeros(5, 3, dtype=torch.bool).index_fill(0, torch.tensor([2]), True)
    op = reference.CELLS[cell]
    whole = call(op)
    pieces = [call.tensors["input"][:2], call.tensors["input"][2:]]
    _, h0, c0, *weights = call.positional()
    first_met = 1 if reverse else 0
    results = []
    for index, piece in enumerate(pieces):
        state = (h0, c0) if index == first_met else (None, None)
        extras = {name: call.tensors.get(name) for name in ("weight_ch", "weight_ln")}
        results.append(op(piece, *state, *weights, reverse=reverse, **extras))
    torch.testing.assert_close(whole[0], torch.cat([results[0][0], results[1][0]]))
    for name, have, want in zip(OUTPUTS[1:], whole[1:], results[1 - first_met][1:], strict=True):
        torch.testing.assert_close(have, want, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("reverse", [False, True])
def test_resets_in_the_padding_mean_nothing(cell, reverse):
    """In particular the one just past a sequence's end, which the reverse direction would meet first."""
    case = Case(cell, T=4, N=3, lengths=(2, 4, 0), reverse=reverse)
    call = case.call()
    want = call(reference.CELLS[cell])
    call.options["resets"] = torch.arange(4)[:, None] >= call.options["lengths"]
    torch.testing.assert_close(call(reference.CELLS[cell]), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_floating_dtype(cell, dtype):
    """Every output has the input's dtype."""
    for output in Case(cell, lengths=(1, 4, 2), resets=True).call(dtype)(reference.CELLS[cell]):
        assert output.dtype == dtype


def test_layouts_keep_the_values():
    """The strategies' own promise: other memory, the same numbers."""
    values = torch.randn(3, 4, 5)
    for layout in ("contiguous", "transposed", "sliced", "strided"):
        assert torch.equal(laid_out(values, layout), values)
    assert laid_out(values, "expanded").stride() == (20, 0, 1)
    assert laid_out(values, "strided").stride(-1) == 2
