"""The fused ops against the reference: outputs, final states, every gradient, on every instruction set and device."""

from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from agreement import Results, assert_as_accurate, assert_same, evaluate, in_some_sample, torch_op
from hypothesis import given
from hypothesis import strategies as st
from strategies import Case, cases

from rnnfast import _C, reference

# Sizes beyond the small ones of the strategies: several blocks, chunks and slices of work, and their remainders.
LARGE = {
    "batch_1": Case("", T=40, N=1, I=96, H=160),
    "batch_2": Case("", T=7, N=2, I=5, H=130, P=70),
    "wide_batch": Case("", T=3, N=150, I=28, H=32),
    "long": Case("", T=150, N=3, I=2, H=20),
    "square": Case("", T=5, N=33, I=129, H=128, reverse=True),
    "wide_input": Case("", T=4, N=6, I=700, H=24, bias=False),
    "large": Case("", T=3, N=19, I=257, H=515),
    "ragged": Case("", T=30, N=40, I=17, H=49, kind="packed", lengths=tuple(max(1, 30 - n) for n in range(40))),
    "ragged_reverse": Case(
        "", T=30, N=30, I=17, H=49, P=20, kind="packed", lengths=tuple(range(30, 0, -1)), reverse=True
    ),
    "lengths": Case("", T=25, N=26, I=9, H=40, lengths=tuple(range(26)), resets=True),
    "lengths_reverse": Case("", T=25, N=26, I=9, H=40, lengths=tuple(range(26)), resets=True, reverse=True),
    # chunks without a row, which backward meets first
    "short_lengths": Case("", T=20, N=60, I=9, H=24, lengths=tuple(n % 5 for n in range(60))),
    "one_step": Case("", N=1, I=256, H=256, kind="step"),
    "one_step_batch": Case("", N=70, I=64, H=96, kind="step"),
}


def large(name: str, cell: str) -> Case:
    values = vars(LARGE[name]) | {"cell": cell}
    return Case(**(values if reference.CELLS[cell].has_projection else values | {"P": None}))


def check_accuracy(case: Case, dtype: torch.dtype, device: str) -> None:
    """The tolerance rule; where torch.nn has no such option, ATen's operations one by one stand for it."""

    def check(sample: int) -> None:
        one = replace(case, seed=case.seed + sample)
        call = one.call(dtype)
        ours = evaluate(call.on(device).with_grad(*one.leaves()), call.op())
        assert_as_accurate(ours, *torch_and_exact(one, dtype), floors=1 + reference.CELLS[one.cell].is_normalized)

    in_some_sample(case.cell, dtype, check)


@lru_cache(maxsize=1024)
def torch_and_exact(case: Case, dtype: torch.dtype) -> tuple[Results, Results]:
    """What torch.nn gives in a dtype and in float64; the same for every instruction set."""
    call = case.call(dtype).to(dtype)  # contiguous: torch's bfloat16 product reads what lies between strided rows
    has_counterpart = (
        not case.resets and not case.masks and (case.kind == "packed" or case.lengths is None) and case.N > 0
    )
    theirs = evaluate(call.with_grad(*case.leaves()), torch_op(case.cell) if has_counterpart else call.reference())
    return theirs, exact_results(case, dtype)


@lru_cache(maxsize=1024)
def exact_results(case: Case, dtype: torch.dtype) -> Results:
    """The reference in float64 on the numbers that the dtype can hold."""
    call = case.call(dtype).to(torch.float64).with_grad(*case.leaves())
    return evaluate(call, call.reference())


@given(data=st.data())
def test_float64(cell, kernel, data):
    """Equal to the reference up to the order of summation; gradients for any subset of the tensors."""
    case = data.draw(cases(cell))
    torch.set_num_threads(data.draw(st.sampled_from([1, 2]), label="threads"))
    ours = evaluate(case.call().on(kernel).with_grad(*case.leaves()), case.call().op())
    assert_same(ours, exact_results(case, torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@given(data=st.data())
def test_accuracy(cell, kernel, dtype, data):
    """At most twice torch.nn's error."""
    check_accuracy(data.draw(cases(cell, expanded=False)), dtype, kernel)


@pytest.mark.parametrize("name", LARGE)
def test_large_float64(cell, kernel, name):
    """Several blocks of work in every dimension."""
    case = large(name, cell)
    call = case.call()
    assert_same(evaluate(call.on(kernel).with_grad(), call.op()), exact_results(case, torch.float64))


@pytest.mark.few_cells
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_large_accuracy(cell, kernel, name, dtype):
    """At most twice torch.nn's error where the sums are long."""
    check_accuracy(large(name, cell), dtype, kernel)


@pytest.mark.few_cells
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", ["batch_1", "batch_2", "wide_batch", "ragged", "lengths_reverse", "short_lengths"])
def test_threads(cell, isa, name, threads):
    """However the work is split; also more threads than there are cores or sequences."""
    torch.set_num_threads(threads)
    check_accuracy(large(name, cell), torch.float32, "cpu")


@pytest.mark.few_cells
@pytest.mark.parametrize("name", ["batch_1", "wide_batch", "ragged", "ragged_reverse", "lengths_reverse"])
def test_threads_bfloat16(cell, name):
    """Where numbers are multiplied in pairs, however many rows a thread has."""
    torch.set_num_threads(3)
    check_accuracy(large(name, cell), torch.bfloat16, "cpu")


@given(data=st.data())
def test_inference_equals_training(cell, kernel, data):
    """What is computed without gradients is bit for bit what training computes."""
    call = data.draw(cases(cell)).call(data.draw(st.sampled_from([torch.float32, torch.bfloat16]))).on(kernel)
    trained = call.with_grad()
    with torch.no_grad():
        inferred = call(call.op())
    for have, want in zip(inferred, trained(call.op()), strict=True):
        assert torch.equal(have, want)
        assert not have.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_activations(isa, dtype):
    """tanh and sigmoid by themselves, in units of the last place, from the smallest numbers to infinity."""
    small = torch.logspace(-30, 0, 300, dtype=torch.float64)
    special = torch.tensor([0.0, 100.0, 1000.0, torch.inf])
    magnitudes = torch.cat([small, torch.linspace(0.001, 40, 1000, dtype=torch.float64), special])
    x = torch.cat([magnitudes, -magnitudes, torch.tensor([torch.nan])]).to(dtype)
    nothing, input, one = (torch.zeros(1, size, dtype=dtype) for size in (len(x), 1, len(x)))
    one += 1

    def units(have, want):
        have, want = have.double(), want.double()
        assert torch.equal(have.isnan(), want.isnan())
        unit = torch.finfo(dtype).eps * want.abs() + torch.finfo(dtype).tiny  # less than the smallest normal may be 0
        return ((have - want) / unit)[~want.isnan()].abs().max().item()

    weights = [torch.zeros(len(x), size, dtype=dtype) for size in (1, len(x))]
    (tanh, _, _) = torch.ops.rnnfast.rnn_tanh(input, None, None, *weights, x, nothing[0], None)
    assert units(tanh[0], x.double().tanh()) <= 3
    # an update gate alone, between a candidate of 0 and an old state of 1
    weights = [torch.cat([weight, weight]) for weight in weights]
    bias = torch.cat([x, nothing[0]])
    (sigmoid, _, _) = torch.ops.rnnfast.gru_update(input, one, None, *weights, bias, torch.zeros_like(bias), None)
    assert units(sigmoid[0], x.double().sigmoid()) <= 4


@pytest.mark.parametrize("scale", [1.0, 2.0**14, 2.0**66])
def test_saturation(cell, kernel, scale):
    """Gates far beyond where exp overflows: finite, exact and with zero slope."""
    case = Case(cell, T=3, N=9, I=4, H=33, bias=False)
    call = case.call(torch.float32)
    # Whole numbers, so that the products are exact and no order of summation is luckier than another.
    call.tensors["input"].round_()
    call.tensors["weight_ih"] = (call.tensors["weight_ih"] * 64).round()
    if cell != "rnn_relu":  # which has no bound
        call.tensors["weight_ih"] *= scale
    ours = evaluate(call.on(kernel).with_grad(), call.op())
    theirs = evaluate(call.with_grad(), torch_op(cell))
    assert all(value.isfinite().all() for value in ours.values())
    assert_as_accurate(ours, theirs, evaluate(call.to(torch.float64).with_grad(), call.reference()))


@pytest.mark.few_cells
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3e38, 1e-45])
@pytest.mark.parametrize("where", ["input", "h0", "weight_ih", "weight_hh", "bias_hh"])
def test_special_values_pass_as_in_torch(cell, kernel, where, value):
    """NaN stays NaN, infinities saturate, denormals are harmless: the same class of number in the same places."""
    if reference.CELLS[cell].is_normalized and value == 3e38:
        value = 1e30  # whether a sum of larger ones overflows depends on its order
    call = Case(cell, T=3, N=9, I=4, H=33).call(torch.float32)
    call.tensors[where].view(-1)[call.tensors[where].numel() // 2] = value
    ours = call.on(kernel)(call.op())
    theirs = call(torch_op(cell))
    for have, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(have.cpu(), want, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_sequences_do_not_mix(cell, kernel):
    """A NaN in one sequence leaves the outputs of the others alone, bit for bit."""
    call = Case(cell, T=4, N=11, I=5, H=18).call(torch.float32).on(kernel)
    clean = call(call.op())[0]
    call.tensors["input"][1, 4] = float("nan")
    poisoned = call(call.op())[0]
    others = [n for n in range(11) if n != 4]
    assert torch.equal(poisoned[:, others], clean[:, others])
    assert torch.equal(poisoned[:1], clean[:1])
    assert poisoned[1:, 4].isnan().all()


def test_padding_is_not_read(cell, kernel):
    """Past a sequence's length anything may lie in the input, NaN too: outputs and gradients stay as they are."""
    case = Case(cell, T=6, N=9, I=5, H=17, lengths=(6, 0, 3, 1, 5, 2, 4, 6, 0))
    call = case.call()
    want = evaluate(call.with_grad(), call.reference())
    for n, length in enumerate(case.lengths):
        call.tensors["input"][length:, n] = float("nan")
    assert_same(evaluate(call.on(kernel).with_grad(), call.op()), want)


@pytest.mark.parametrize("reverse", [False, True])
def test_resets_in_the_padding_mean_nothing(cell, kernel, reverse):
    """Also not the one just past a sequence's end, which the reverse direction would meet first."""
    call = Case(cell, T=4, N=3, H=17, lengths=(2, 4, 0), reverse=reverse).call()
    want = evaluate(call.with_grad(), call.reference())
    call.options["resets"] = torch.arange(4)[:, None] >= call.options["lengths"]
    assert_same(evaluate(call.on(kernel).with_grad(), call.op()), want)


def test_instruction_sets_agree(cell):
    """No path has a formula of its own: in float64 they differ by rounding only."""
    call = Case(cell, T=6, N=9, I=17, H=33).call()
    results = {}
    for name in _C.supported_isas():
        _C.set_isa(name)
        results[name] = evaluate(call.with_grad(), call.op())
    first, *rest = results.values()
    for other in rest:
        assert_same(other, first)
