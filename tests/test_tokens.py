"""Tokens as the input of an op, against their one-hot rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from agreement import evaluate
from hypothesis import given
from hypothesis import strategies as st
from strategies import Call

from rnnfast import reference

on_device = pytest.mark.usefixtures("default_device")


def token_call(cell, steps, batch, kinds, hidden, *, bias=True, kind="padded", reverse=False, dtype=torch.float64):
    """A call of an op with tokens, and the same with their one-hot rows."""
    gates = reference.CELLS[cell].num_gates * hidden
    shapes = {"h0": (batch, hidden), "weight_ih": (gates, kinds), "weight_hh": (gates, hidden)}
    if bias:
        shapes |= {"bias_ih": (gates,), "bias_hh": (gates,)}
    if reference.CELLS[cell].num_states == 2:
        shapes["c0"] = (batch, hidden)
    if reference.CELLS[cell].num_peepholes:
        shapes["weight_ch"] = (reference.CELLS[cell].num_peepholes * hidden,)
    if reference.CELLS[cell].is_normalized:
        shapes["weight_ln"] = (reference.CELLS[cell].num_norm_vectors * hidden,)
    tensors = {name: torch.randn(shape, dtype=dtype, requires_grad=True) for name, shape in shapes.items()}
    options = {"reverse": reverse}
    tokens = torch.randint(kinds, (steps, batch))
    if kind == "packed":
        sizes = torch.randint(1, batch + 1, (steps,), device="cpu").sort(descending=True).values
        sizes[0] = batch
        options["batch_sizes"] = sizes
        tokens = torch.randint(kinds, (int(sizes.sum()),))
    elif kind == "lengths":
        options["lengths"] = torch.randint(0, steps + 1, (batch,), device="cpu")
    elif kind == "step":
        tokens = tokens[0]
    dense = F.one_hot(tokens, kinds).to(dtype)
    return Call(cell, {**tensors, "input": tokens}, options), Call(cell, {**tensors, "input": dense}, options)


@given(
    steps=st.sampled_from([1, 2, 5, 40]),
    batch=st.sampled_from([1, 2, 5, 9]),
    kinds=st.sampled_from([1, 3, 28, 40]),
    hidden=st.sampled_from([1, 7, 8, 9, 17, 33]),
    bias=st.booleans(),
    reverse=st.booleans(),
    kind=st.sampled_from(["padded", "packed", "lengths", "step"]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_tokens_are_their_one_hot_rows(cell, isa, steps, batch, kinds, hidden, bias, reverse, kind, dtype):
    """Outputs and all gradients, on calls that pack their weights and calls that read them in place."""
    torch.manual_seed(steps * batch)
    tokens, dense = token_call(cell, steps, batch, kinds, hidden, bias=bias, kind=kind, reverse=reverse, dtype=dtype)
    assert not dense.tensors["input"].requires_grad
    ours, wanted = evaluate(tokens, tokens.op()), evaluate(dense, dense.op())
    assert ours.keys() == wanted.keys() >= {"grad_weight_ih", "grad_weight_hh"}
    atol = 1e-12 if dtype == torch.float64 else 2e-5
    for name, want in wanted.items():
        torch.testing.assert_close(ours[name], want, rtol=atol, atol=atol * max(1.0, want.abs().max().item()))


@pytest.mark.parametrize("steps", [1, 9])
def test_bfloat16_tokens(cell, steps):
    """Of a vocabulary and a number of rows that do not come in pairs; one token in several rows."""
    tokens, dense = token_call(cell, steps, 3, 7, 17, dtype=torch.bfloat16)
    ours, wanted = evaluate(tokens, tokens.op()), evaluate(dense, dense.op())
    assert ours.keys() == wanted.keys() >= {"grad_weight_ih", "grad_weight_hh"}
    for name, want in wanted.items():
        torch.testing.assert_close(ours[name], want, rtol=1e-2, atol=1e-2 * max(1.0, want.abs().max().item()))


@on_device
def test_tokens_with_two_threads(cell):
    torch.set_num_threads(2)
    tokens, dense = token_call(cell, 40, 16, 28, 40)
    ours, wanted = evaluate(tokens, tokens.op()), evaluate(dense, dense.op())
    for name, want in wanted.items():
        torch.testing.assert_close(ours[name], want, rtol=1e-11, atol=1e-11)


@on_device
@pytest.mark.few_cells_on_cuda
@pytest.mark.parametrize("kind", ["padded", "packed", "step"])
def test_tokens_pass_opcheck_and_double_backward(cell, kind):
    tokens, dense = token_call(cell, 3, 2, 5, 4, kind=kind)
    torch.library.opcheck(tokens.op(), tuple(tokens.positional()), tokens.keywords())

    def second(call):
        output = call(call.op())[0]
        weights = [call.tensors["weight_ih"], call.tensors["weight_hh"]]
        first = torch.autograd.grad(output.square().sum(), weights, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), weights)

    for ours, wanted in zip(second(tokens), second(dense), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)


@on_device
@pytest.mark.few_cells
@pytest.mark.parametrize("token", [-1, 28, 2**62, -(2**62)])
@pytest.mark.parametrize("kind", ["padded", "packed", "step"])
def test_tokens_out_of_range_are_an_index_error(cell, token, kind):
    call, _ = token_call(cell, 20, 4, 28, 8, kind=kind)
    call.tensors["input"].view(-1)[-1] = token
    with pytest.raises(IndexError, match=rf"input: expected tokens from 0 to 27, .* got {token}"):
        call(call.op())


@on_device
@pytest.mark.few_cells
@pytest.mark.parametrize("shape", [(2, 3, 4), ()])
def test_tokens_of_a_wrong_rank(cell, shape):
    call, _ = token_call(cell, 2, 3, 5, 4)
    call.tensors["input"] = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"input: expected 2 dimensions \[T, N\] for tokens"):
        call(call.op())
