"""Ops with weights of several members ``[E, ...]``: sequence ``n`` of the batch runs with weights ``n % E``."""

from dataclasses import replace

import pytest
import torch
from agreement import cotangent
from strategies import DIFFERENTIABLE, MASKS, Call, Case
from test_ops import backward_op, forward_op

from rnnfast.reference import CELLS as REFERENCES

E, T, N, I, H = 3, 4, 6, 3, 17  # noqa: E741  (the letter of the whole code base)
WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr", "weight_ch", "weight_ln")
VARIANTS = {
    "padded": {},
    "reverse": {"reverse": True},
    "no-state": {"h0": False, "c0": False, "bias": False},
    "step": {"kind": "step", "T": 1},
    "packed": {"kind": "packed", "lengths": (4, 4, 4, 2, 2, 2)},
    "lengths": {"lengths": (4, 0, 2, 1, 3, 4), "resets": True},
    "tokens": {},
    "masks": {"masks": frozenset(MASKS)},
    "packed-masks": {"kind": "packed", "lengths": (4, 4, 4, 2, 2, 2), "masks": frozenset(MASKS)},
}


def stacked(cell: str, variant: str, **options) -> Call:
    """A call of E members in float64."""
    sizes = {"T": T, "N": N, "I": I, "H": H} | VARIANTS[variant] | options
    possible = MASKS[: 1 + REFERENCES[cell].num_states]
    sizes["masks"] = frozenset(possible) & sizes.get("masks", frozenset())
    members = [Case(cell, seed=seed, **sizes).call() for seed in range(E)]
    call = members[0]
    for name in WEIGHTS:
        if name in call.tensors:
            call.tensors[name] = torch.stack([member.tensors[name] for member in members])
    if variant == "tokens":
        call.tensors["input"] = torch.randint(I, (T, N))
    return call


def member(call: Call, e: int) -> Call:
    """The call of one member on its sequences."""
    tensors = {}
    for name, tensor in call.tensors.items():
        if name in WEIGHTS:
            tensors[name] = tensor[e]
        else:
            tensors[name] = tensor[:, e::E] if name == "input" and tensor.dim() == 3 else tensor[e::E]
    if not call.tensors["input"].is_floating_point():
        tensors["input"] = call.tensors["input"][:, e::E]
    options = dict(call.options)
    if "batch_sizes" in options:
        options["batch_sizes"] = options["batch_sizes"] // E
    for name in ("lengths", "resets"):
        if name in options:
            options[name] = options[name][..., e::E]
    for name in MASKS:
        if name in options:
            options[name] = options[name][..., e::E, :]
    return replace(call, tensors=tensors, options=options)


def results(call: Call, run) -> list[torch.Tensor]:
    """Outputs, and the gradients of all floating-point tensors from one loss."""
    leaves = {n: t.clone().requires_grad_(t.is_floating_point()) for n, t in call.tensors.items()}
    outputs = replace(call, tensors=leaves)
    outputs = outputs(run)[: 1 + REFERENCES[call.cell].num_states]
    inputs = [t for t in leaves.values() if t.is_floating_point()]
    return [*outputs, *torch.autograd.grad(outputs, inputs, [cotangent(y) for y in outputs])]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_members(cell, kernel, variant, threads):
    """Outputs are those of each member alone, all gradients those of the reference, on one thread and on more."""
    torch.set_num_threads(threads)
    options = {"T": 40, "H": 65} if threads > 1 and variant in ("padded", "tokens") else {}  # enough for threads
    call = stacked(cell, variant, **options).on(kernel)
    have = results(call, call.op())
    for e in range(E):
        alone = member(call, e)
        for a, b in zip(have, alone(alone.op())[: 1 + REFERENCES[cell].num_states], strict=False):
            torch.testing.assert_close(a[..., e::E, :], b, rtol=1e-12, atol=1e-12)
    for a, b in zip(have, results(call, call.reference()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.few_cells
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_modes_reach_all_threads(cell, device, mode):
    """Parameters under inference_mode and no_grad: what the members' own threads make has no history either."""
    torch.set_num_threads(2)
    call = stacked(cell, "padded", T=40, H=65).on(device).with_grad()
    want = call(call.reference())
    with mode():
        have = call(call.op())
    for a, b in zip(have, want, strict=True):
        assert not a.requires_grad
        torch.testing.assert_close(a, b.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", ["padded", "lengths"])
def test_all_c_and_projection(device, variant):
    """The LSTM's other results and weights."""
    call = stacked("lstm", variant, P=2).on(device)
    op = torch.ops.rnnfast.lstm_all_c

    def by_reference(*arguments, **named):
        return call.reference()(*arguments, **named, with_all_c=True)

    for a, b in zip(call(op), call(by_reference), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(results(call, op), results(call, by_reference), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.few_cells
def test_16_bits(cell, device):
    """The dtype of the results is that of the arguments."""
    call = stacked(cell, "padded").on(device).to(torch.bfloat16)
    want = results(call.to(torch.float32), call.op())
    for a, b in zip(results(call, call.op()), want, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.float(), b, rtol=0.05, atol=0.05)


@pytest.mark.few_cells
def test_derivatives(cell, device):
    """First and second, against differences."""
    call = stacked(cell, "lengths", T=2, H=2, N=3, lengths=(2, 0, 1)).on(device)
    names = list(call.tensors)

    def function(*tensors):
        return replace(call, tensors=dict(zip(names, tensors, strict=True)))(call.op())[:2]

    leaves = [t.clone().requires_grad_() for t in call.tensors.values()]
    fast = device == "cuda"  # where each entry costs launches
    assert torch.autograd.gradcheck(function, leaves, fast_mode=fast)
    assert torch.autograd.gradgradcheck(function, leaves, atol=1e-4, fast_mode=fast)


@pytest.mark.few_cells
@pytest.mark.parametrize("variant", VARIANTS)
def test_opcheck(cell, device, variant):
    """Schema, registration and fake kernels know stacked weights."""
    call = stacked(cell, variant).on(device)
    call.tensors = {n: t.requires_grad_(t.is_floating_point()) for n, t in call.tensors.items()}
    torch.library.opcheck(call.op(), tuple(call.everything()))
    call.tensors = {n: t.detach() for n, t in call.tensors.items()}
    arguments = call.everything()
    saved = forward_op(cell)(*arguments)
    grads = [cotangent(y) if y.numel() else None for y in saved[:3]]
    needs = [n in call.tensors and call.tensors[n].is_floating_point() for n in DIFFERENTIABLE]
    everything = (*grads, *arguments, *saved[3:], needs)
    torch.library.opcheck(backward_op(cell), everything, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.few_cells
@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("weight_hh", lambda t: t[0], r"weight_hh: expected 3 dimensions, the first of E = 3 members"),
        ("weight_ih", lambda t: t[:2], r"weight_hh: expected 3 dimensions, the first of E = 2 members"),
        ("weight_ih", lambda t: t[:0], r"weight_ih: expected at least one member"),
        ("bias_ih", lambda t: t[0], r"bias_ih: expected 2 dimensions, the first of E = 3 members"),
        ("bias_hh", lambda t: t[..., 1:], r"bias_hh: expected \[G\*H\]"),
        ("weight_hh", lambda t: t[..., 1:], r"weight_hh: expected \[G\*H, P\]"),
        (
            "input",
            lambda t: t[:, 1:],
            r"input: expected a number of sequences that E = 3 members divide, got \[4, 5, 3\]",
        ),
        ("input", lambda t: t[0, 0], r"input: expected .* sequences that E = 3 members divide, got \[3\]"),
        ("h0", lambda t: t[1:], r"h0: expected 2 dimensions, the first a multiple of E = 3, got \[5, 17\]"),
        ("h0", lambda t: t[:3], r"h0: expected \[N, P\] = \[2, 17\], got \[1, 17\]"),
    ],
)
def test_refusals(cell, name, change, match):
    """What does not fit the members is named, on every way into the op."""
    call = stacked(cell, "padded")
    call.tensors[name] = change(call.tensors[name])
    for op in (call.op(), forward_op(cell)):
        with pytest.raises(ValueError, match=match):
            op(*call.everything())
    with pytest.raises(ValueError, match=match):
        call.with_grad()(call.op())


@pytest.mark.few_cells
@pytest.mark.parametrize(
    ("variant", "name", "value", "match"),
    [
        ("packed", "batch_sizes", torch.tensor([6, 5, 4, 3]), r"batch_sizes: expected multiples of E = 3"),
        ("packed", "batch_sizes", torch.tensor([6.0, 6.0]), r"batch_sizes: expected int64"),
        ("lengths", "lengths", torch.tensor([4, 4]), r"lengths: expected 1 dimension, a multiple of E = 3, got \[2\]"),
        ("lengths", "resets", torch.zeros(4, 5, dtype=torch.bool), r"resets: expected 2 dimensions, the last a mult"),
        ("masks", "recurrent_mask", torch.ones(4, 17), r"recurrent_mask: expected 2 dimensions, the first a multiple"),
        ("masks", "zoneout_h", torch.ones(4, 5, 17), r"zoneout_h: expected 2 or 3 dimensions, the last but one a mult"),
        ("masks", "zoneout_h", torch.ones(4, 3, 17).double(), r"zoneout_h: expected \[T, N, H\] = \[4, 2, 17\]"),
    ],
)
def test_refused_options(cell, variant, name, value, match):
    call = stacked(cell, variant)
    call.options[name] = value
    with pytest.raises((ValueError, TypeError), match=match):
        call(call.op())


@pytest.mark.few_cells
def test_refused_gradients(cell, device):
    """The gradients that the backward op is given are checked as its other arguments are."""
    call = stacked(cell, "padded").on(device)
    arguments = call.everything()
    saved = forward_op(cell)(*arguments)
    needs = [name in call.tensors for name in DIFFERENTIABLE]
    for grad, match in (
        (saved[0][0, 0], r"grad_output: expected at least 2 dimensions, got \[17\]"),
        (saved[0][1:], r"grad_output: expected \[T, N, P\]"),
    ):
        with pytest.raises(ValueError, match=match):
            backward_op(cell)(grad, None, None, *arguments, *saved[3:], needs)
    with pytest.raises(ValueError, match=r"gates: expected what _\w+_forward returned"):
        backward_op(cell)(saved[0], None, None, *arguments, saved[3][3:], *saved[4:], needs)
