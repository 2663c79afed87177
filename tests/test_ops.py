"""The raw ops: what torch's own checkers say of them, their part in autograd, memory, and determinism."""

import pytest
import torch
import torch.utils.checkpoint
from agreement import assert_same, cotangent, evaluate
from hypothesis import given
from hypothesis import strategies as st
from strategies import DIFFERENTIABLE, MASKS, OUTPUTS, Call, Case, cases

from rnnfast import _C, ops
from rnnfast.reference import CELLS as REFERENCES

VARIANTS = {
    "plain": Case("", N=2, T=3, I=2, H=3),
    "no_state_no_bias": Case("", N=2, T=3, I=2, H=3, h0=False, c0=False, bias=False),
    "reverse": Case("", N=2, T=3, I=2, H=3, P=2, reverse=True),
    "packed": Case("", N=3, T=3, I=2, H=2, P=1, kind="packed", lengths=(3, 2, 2)),
    "packed_reverse": Case("", N=3, T=3, I=2, H=2, kind="packed", lengths=(3, 2, 2), reverse=True),
    "lengths_resets": Case("", N=3, T=3, I=2, H=2, lengths=(2, 0, 3), resets=True),
    "lengths_resets_reverse": Case("", N=3, T=3, I=2, H=2, P=1, lengths=(2, 0, 3), resets=True, reverse=True),
    "step": Case("", N=2, I=2, H=3, P=2, kind="step"),
    "masks": Case("", N=3, T=3, I=2, H=2, lengths=(2, 0, 3), resets=True, masks=frozenset(MASKS)),
    "masks_reverse": Case("", N=2, T=3, I=2, H=3, reverse=True, masks=frozenset(MASKS)),
    "masks_packed": Case("", N=3, T=3, I=2, H=2, kind="packed", lengths=(3, 2, 2), masks=frozenset(MASKS)),
    "mask_projected": Case("", N=2, T=3, I=2, H=3, P=2, masks=frozenset(MASKS[:1])),
}

HAS_FACTORS = [
    c["name"] for c in _C.cells() if not (c["num_late_gates"] or c["num_peepholes"] or c["num_norm_vectors"])
]


def variant_call(name: str, cell: str, dtype: torch.dtype = torch.float64) -> Call:
    values = vars(VARIANTS[name]) | {"cell": cell}
    if REFERENCES[cell].num_states == 1:
        values |= {"masks": values["masks"] - {"zoneout_c"}}
    if not REFERENCES[cell].has_projection:
        values |= {"P": None}
    return Case(**values).call(dtype)


def forward_op(cell: str):
    return getattr(torch.ops.rnnfast, f"_{cell}_forward")


def backward_op(cell: str):
    return getattr(torch.ops.rnnfast, f"_{cell}_backward")


def backward_arguments(call: Call) -> list:
    """A valid call of the backward op, from a run of the forward op."""
    output, h_n, c_n, *saved = forward_op(call.cell)(*call.everything())
    grads = [cotangent(output), cotangent(h_n), cotangent(c_n) if c_n.dim() == 2 else None]
    needs = [name in call.tensors for name in DIFFERENTIABLE]
    return [*grads, *call.everything(), *saved, needs]


def stateful_outputs(call: Call, outputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return list(outputs[: 1 + REFERENCES[call.cell].num_states])


@pytest.mark.few_cells
@pytest.mark.parametrize("variant", VARIANTS)
def test_opcheck(cell, device, variant):
    """Schema, autograd registration, fake kernel and tracing, by torch's own checker."""
    call = variant_call(variant, cell, torch.float32).on(device).with_grad()
    torch.library.opcheck(call.op(), tuple(call.everything()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_opcheck_internal(cell, device, variant):
    """The ops that autograd calls keep the same rules."""
    call = variant_call(variant, cell).on(device)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward_op(cell), tuple(call.everything()), test_utils=checks)
    arguments = tuple(backward_arguments(call))
    torch.library.opcheck(backward_op(cell), arguments, test_utils=checks)
    if cell in HAS_FACTORS:
        torch.library.opcheck(getattr(torch.ops.rnnfast, f"_{cell}_backward_factors"), arguments, test_utils=checks)


@pytest.mark.parametrize("leading", [(), (5,)], ids=str)
def test_sample_products(leading, device):
    """One product for each of three examples, of any strides; other shapes are refused."""
    op = torch.ops.rnnfast._sample_products
    left, right = torch.randn(*leading, 4, 6).transpose(-1, -2).to(device), torch.randn(*leading, 6, 2).to(device)
    torch.library.opcheck(op, (left, right, 3), test_utils=("test_schema", "test_faketensor"))
    left_rows, right_rows = (t.reshape(-1, 3, t.shape[-1]) for t in (left, right))
    want = torch.einsum("rbj,rbk->bjk", left_rows, right_rows)
    torch.testing.assert_close(op(left, right, 3), want)
    with pytest.raises(ValueError, match=r"_sample_products: expected .* with B = 4, got \[.*6, 4\] and \[.*6, 2\]"):
        op(left, right, 4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_backward_factors(cell, kernel, variant):
    """The products of the factors, summed over all rows, are the weight gradients; other cells have no such op."""
    if cell not in HAS_FACTORS:
        assert not hasattr(torch.ops.rnnfast, f"_{cell}_backward_factors")
        return
    check_factors(cell, variant_call(variant, cell).on(kernel))


@pytest.mark.parametrize("batch", [1, 4, 30])
@pytest.mark.parametrize("name", [name for name in HAS_FACTORS if REFERENCES[name].num_states == 2])
def test_backward_factors_with_all_c(kernel, name, batch):
    """The same with a gradient of all c: of few rows, whose weights are read in place, and of many."""
    for options in ({}, {"P": 3, "reverse": True}, {"lengths": (3,) * batch, "resets": True}):
        call = Case(name, T=4, N=batch, H=17, **options).call().on(kernel)
        grad_all_c = cotangent(torch.empty(4, batch, 17, dtype=torch.float64, device=kernel))
        check_factors(name, call, grad_all_c=grad_all_c)


def check_factors(cell, call, **options) -> None:
    arguments = backward_arguments(call)
    *states, w_ih, w_hh, b_ih, b_hh, w_hr, _, _ = backward_op(cell)(*arguments, **options)
    *same_states, dgates_ih, dgates_hh, h_prev, dprojected, h_raw = getattr(
        torch.ops.rnnfast, f"_{cell}_backward_factors"
    )(*arguments, **options)
    x = call.tensors["input"]
    pairs = [(w_ih, dgates_ih, x), (w_hh, dgates_hh, h_prev), (w_hr, dprojected, h_raw)]
    for want, left, right in pairs if w_hr.numel() else pairs[:2]:
        torch.testing.assert_close(left.flatten(0, -2).T @ right.flatten(0, -2), want, rtol=1e-12, atol=1e-12)
    for want, rows in ((b_ih, dgates_ih), (b_hh, dgates_hh)):
        if want.numel():
            torch.testing.assert_close(rows.flatten(0, -2).sum(0), want, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(states, same_states, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(cell, kernel, variant):
    """First and second derivatives against finite differences."""
    call = variant_call(variant, cell).on(kernel).with_grad()
    names = list(call.tensors)

    def function(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        call.tensors = dict(zip(names, tensors, strict=True))
        return tuple(stateful_outputs(call, call(call.op())))

    leaves = tuple(call.tensors.values())
    assert torch.autograd.gradcheck(function, leaves, fast_mode=kernel == "cuda")  # there each entry costs launches
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_gradgradcheck_every_entry(cell):
    """The whole second-order Jacobian, not a random projection of it; on the CPU, for its formulas are torch's."""
    call = Case(cell, N=2, T=2, I=1, H=2, P=1 if REFERENCES[cell].has_projection else None).call().with_grad()
    names = list(call.tensors)

    def function(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        call.tensors = dict(zip(names, tensors, strict=True))
        return tuple(stateful_outputs(call, call(call.op())))

    assert torch.autograd.gradgradcheck(function, tuple(call.tensors.values()))


@given(data=st.data())
def test_double_backward(cell, device, data):
    """A penalty on the gradients, as in a Wasserstein critic, differentiates as it does through the reference."""
    case = data.draw(cases(cell, empty=False))
    call = case.call().on(device).with_grad()
    names = list(call.tensors)

    def penalty_gradients(op) -> dict[str, torch.Tensor]:
        live = stateful_outputs(call, call(op))
        leaves = [call.tensors[name] for name in names]
        firsts = torch.autograd.grad(
            live, leaves, [cotangent(y) for y in live], create_graph=True, materialize_grads=True
        )
        penalty = sum(first.square().sum() for first in firsts if first.requires_grad)
        seconds = torch.autograd.grad(penalty, leaves, materialize_grads=True)
        return dict(zip(names, seconds, strict=True))

    assert_same(penalty_gradients(call.op()), {n: g.cpu() for n, g in penalty_gradients(call.reference()).items()})


@given(data=st.data())
def test_typed_wrapper(cell, device, data):
    """rnnfast.ops: the op with the arguments its cell has, by keyword."""
    call = data.draw(cases(cell)).call().on(device)
    arguments = dict(call.tensors)
    leading = [arguments.pop("input"), arguments.pop("h0", None)]
    if REFERENCES[cell].num_states == 2:
        leading.append(arguments.pop("c0", None))
    results = getattr(ops, cell)(*leading, **arguments, **call.options)
    expected = stateful_outputs(call, call(call.op()))
    assert len(results) == len(expected)
    for have, want in zip(results, expected, strict=True):
        assert torch.equal(have, want)


def test_output_layout(cell, device):
    """Outputs are contiguous whatever the input's strides; a cell without a cell state returns an empty one."""
    call = Case(cell, input_layout="transposed", weight_layout="strided", reverse=True).call().on(device)
    output, h_n, c_n = call(call.op())
    assert output.is_contiguous() and h_n.is_contiguous() and c_n.is_contiguous()
    assert c_n.shape == ((3, 5) if REFERENCES[cell].num_states == 2 else (0,))


# What autograd asks of an op.


@pytest.mark.few_cells
@pytest.mark.parametrize("used", OUTPUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_some_outputs_used(cell, kernel, variant, used):
    """A loss on one output alone."""
    call = variant_call(variant, cell).on(kernel).with_grad()
    index = OUTPUTS.index(used)
    if index > REFERENCES[cell].num_states:
        assert not call(call.op())[index].requires_grad
        return
    leaves = list(call.tensors.values())
    results = []
    for op in (call.op(), call.reference()):
        y = call(op)[index]
        results.append(torch.autograd.grad(y, leaves, cotangent(y), materialize_grads=True))
    for name, have, want in zip(call.tensors, *results, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("wanted", DIFFERENTIABLE)
def test_gradient_of_one_tensor_alone(cell, kernel, wanted):
    """Each gradient by itself is the one computed with all the others."""
    call = Case(cell, T=5, N=7, I=9, H=17, P=8 if REFERENCES[cell].has_projection else None).call().on(kernel)
    if wanted not in call.tensors:
        assert wanted in ("c0", "weight_hr", "weight_ch", "weight_ln")
        return
    alone = evaluate(call.with_grad(wanted), call.op())
    together = evaluate(call.with_grad(), call.op())
    torch.testing.assert_close(alone[f"grad_{wanted}"], together[f"grad_{wanted}"], rtol=1e-12, atol=1e-12)
    assert len([name for name in alone if name.startswith("grad_")]) == 1


@pytest.mark.few_cells
def test_retain_graph(cell, kernel):
    """A second walk over the same graph gives the same gradients; without retain_graph it is refused."""
    call = Case(cell, N=9, H=17).call(torch.float32).on(kernel).with_grad()
    leaves = list(call.tensors.values())
    loss = sum((y * cotangent(y)).sum() for y in stateful_outputs(call, call(call.op())))
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


@pytest.mark.few_cells
@pytest.mark.parametrize("kind", ["expanded", "transposed", "strided"])
def test_strides_of_incoming_gradients(cell, kernel, kind):
    """sum() sends back one number expanded over the whole output (stride 0); views send back their own strides."""
    call = Case(cell, T=5, N=9, I=4, H=17).call().on(kernel).with_grad()
    leaves = list(call.tensors.values())

    def upstream(y: torch.Tensor) -> torch.Tensor:
        if kind == "expanded":
            return torch.tensor(0.5, dtype=y.dtype, device=y.device).expand_as(y)
        if kind == "transposed":
            return cotangent(y).transpose(0, -1).contiguous().transpose(0, -1)
        return torch.stack([cotangent(y), torch.full_like(y, float("nan"))], -1)[..., 0]

    def grads(op, prepare) -> tuple[torch.Tensor, ...]:
        live = stateful_outputs(call, call(op))
        return torch.autograd.grad(live, leaves, [prepare(upstream(y)) for y in live])

    odd = grads(call.op(), lambda g: g)
    plain = grads(call.op(), torch.Tensor.contiguous)
    expected = grads(call.reference(), lambda g: g)
    for have, same, want in zip(odd, plain, expected, strict=True):
        assert torch.equal(have, same)
        torch.testing.assert_close(have, want, rtol=1e-11, atol=1e-12)


@pytest.mark.few_cells
@pytest.mark.parametrize("changed", ["input", "h0", "c0", "weight_ih", "weight_hh", "weight_hr"])
def test_in_place_change_is_detected(cell, device, changed):
    """What backward reads must not have changed since forward: torch says so instead of giving wrong gradients."""
    call = Case(cell, P=3 if REFERENCES[cell].has_projection else None).call().on(device).with_grad()
    if changed not in call.tensors:
        assert changed in ("c0", "weight_hr")
        return
    # Clones, so that a change in place of a non-leaf is allowed.
    leaves, call.tensors = dict(call.tensors), {name: t.clone() for name, t in call.tensors.items()}
    loss = sum((y * cotangent(y)).sum() for y in stateful_outputs(call, call(call.op())))
    call.tensors[changed].detach().mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, list(leaves.values()))


@pytest.mark.few_cells
@pytest.mark.parametrize("index", [0, 1, 2])
def test_in_place_change_of_an_output(cell, device, index):
    """Either refused, or harmless because backward does not read that tensor; never a wrong gradient."""
    call = Case(cell).call().on(device).with_grad()
    if index > REFERENCES[cell].num_states:
        return
    leaves = list(call.tensors.values())
    expected = evaluate(call, call.reference())
    live = stateful_outputs(call, call(call.op()))
    live[index].detach().zero_()
    try:
        grads = torch.autograd.grad(live, leaves, [cotangent(y) for y in live])
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        for name, gradient in zip(call.tensors, grads, strict=True):
            torch.testing.assert_close(gradient, expected[f"grad_{name}"], rtol=1e-11, atol=1e-12)


def count_saved(call: Call) -> int:
    """How many tensors a forward call saves."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call(call.op())
    return len(saved)


def test_inference_saves_nothing(cell, device):
    """Without gradients nothing is kept for backward, in any of the ways to say so."""
    call = Case(cell).call().on(device)
    assert count_saved(call.with_grad()) > 0
    assert count_saved(call) == 0
    with torch.no_grad():
        assert count_saved(call.with_grad()) == 0
        assert not any(y.requires_grad for y in call.with_grad()(call.op()))
    with torch.inference_mode():
        assert count_saved(call) == 0
        outputs = call(call.op())
    assert all(y.is_inference() for y in outputs)


def test_saved_tensors_hooks(cell, device):
    """Offloading what is saved (here: a copy of it) does not change the gradients."""
    call = Case(cell, N=9, H=17).call().on(device).with_grad()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.cpu().clone(), lambda t: t.to(device)):
        hooked = evaluate(call, call.op())
    assert_same(hooked, evaluate(call, call.reference()))


def test_checkpoint(cell, device):
    """Activation checkpointing: forward again inside backward."""
    call = Case(cell, N=9, H=17).call().on(device).with_grad()
    op = call.op()
    rerun = evaluate(call, lambda *a, **k: torch.utils.checkpoint.checkpoint(op, *a, **k, use_reentrant=False))
    direct = evaluate(call, op)
    assert all(torch.equal(rerun[name], direct[name]) for name in direct)


# Memory and determinism.


@pytest.fixture
def _poisoned_memory():
    """Fresh memory is NaN: torch's deterministic mode fills what torch.empty returns."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_poisoned_memory")
@given(data=st.data())
def test_no_unwritten_memory_is_read(cell, kernel, data):
    """With NaN in all fresh memory the results are the same."""
    case = data.draw(cases(cell))
    call = case.call()
    assert_same(
        evaluate(call.on(kernel).with_grad(*case.leaves()), call.op()),
        evaluate(call.with_grad(*case.leaves()), call.reference()),
    )


@pytest.mark.few_cells
@pytest.mark.usefixtures("_poisoned_memory")
@pytest.mark.parametrize("T", [2, 9])
def test_pairs_of_bfloat16_are_filled_with_zeros(cell, T):
    """Products of pairs read one number more where a size or the number of rows is odd; also beside it lies NaN."""
    for P in (None, 7) if REFERENCES[cell].has_projection else (None,):
        call = Case(cell, T=T, N=3, I=5, H=17, P=P, lengths=(T, 1, T - 1)).call(torch.bfloat16)
        beside = torch.full((T, 3, 1), float("nan"), dtype=torch.bfloat16)
        call.tensors["input"] = torch.cat([call.tensors["input"], beside], -1)[..., :5]
        torch.use_deterministic_algorithms(True)
        poisoned = evaluate(call.with_grad(), call.op())
        torch.use_deterministic_algorithms(False)
        clean = evaluate(call.to(torch.bfloat16).with_grad(), call.op())
        for name, want in clean.items():
            assert want.isfinite().all() and torch.equal(poisoned[name], want), (P, name)


@pytest.mark.few_cells
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs_are_bitwise_equal(cell, kernel, dtype, threads):
    """At one thread count, run after run."""
    torch.set_num_threads(threads)
    call = Case(cell, T=12, N=21, I=30, H=67).call(dtype).on(kernel).with_grad()
    first = evaluate(call, call.op())
    for _ in range(5):
        again = evaluate(call, call.op())
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.few_cells
def test_arguments_are_left_alone(cell, kernel):
    """Forward and backward write to none of their arguments."""
    call = Case(cell, N=9, H=17, lengths=(4, 2, 0, 3, 1, 4, 2, 3, 4), resets=True).call().on(kernel)
    before = {name: t.clone() for name, t in call.tensors.items()}
    options = {name: t.clone() for name, t in call.options.items()}
    evaluate(call.with_grad(), call.op())
    assert all(torch.equal(call.tensors[name], before[name]) for name in before)
    assert all(torch.equal(call.options[name], options[name]) for name in options)


def test_outputs_are_fresh(cell, device):
    """No output shares memory with an argument or another output, also where a state passes through unchanged."""
    for call in (
        Case(cell, N=2, lengths=(0, 0)).call().on(device),
        Case(cell, T=1).call().on(device),
        Case(cell, kind="step").call().on(device),
    ):
        outputs = [y for y in call(call.op()) if y.numel()]
        pointers = [t.untyped_storage().data_ptr() for t in (*outputs, *call.tensors.values())]
        assert len(set(pointers)) == len(pointers)
