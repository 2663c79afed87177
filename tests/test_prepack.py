"""rnnfast.prepack: the same numbers from weights that were rearranged once, and never from old weights."""

from __future__ import annotations

import copy
import gc
import pickle
import threading

import pytest
import torch
from pairs import CELL_MODULES, LAYERS, OPTIONS, make, make_input, make_state, pair
from torch import nn

import rnnfast
from rnnfast import _C
from rnnfast.prepack import recurrent_weights

T, N, I, H = 12, 3, 5, 19  # noqa: E741  (more than 16 rows: rearranged with prepack or without)
KINDS = [*LAYERS, *OPTIONS]


def make_layer(kind="lstm", **options):
    return make(kind, I, H, **options).eval()


def run(layer, x, **arguments):
    """All that a call returns, without gradients, in one list."""
    with torch.no_grad():
        output, state = layer(x, **arguments)
    return [output, *state] if isinstance(state, tuple) else [output, state]


def assert_equal(left, right):
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)


def expected_of(layer, x, **arguments):
    """The same from another layer of the same weights."""
    return run(copy.deepcopy(layer), x, **arguments)


def is_in_use(layer, x):
    """Whether a call takes weights of an earlier one: a change that torch does not count is not seen then."""
    before = run(layer, x)
    weight = next(recurrent_weights(layer))
    weight.data.neg_()
    after = run(layer, x)
    weight.data.neg_()
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_same_numbers(kind, dtype, isa):
    layer = make_layer(kind, dtype=dtype)
    x = torch.randn(T, N, I).to(dtype)
    expected = run(layer, x)
    assert not is_in_use(layer, x)
    with rnnfast.prepack(layer) as handle:
        assert handle.nbytes == 0
        for _ in range(3):
            assert_equal(run(layer, x), expected)
        assert handle.nbytes > 0
        assert is_in_use(layer, x)
    assert handle.nbytes == 0
    assert not is_in_use(layer, x)


@pytest.mark.parametrize("rows", [(1, 1), (1, 16), (16, 1), (17, 1)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_few_rows_to_rounding(kind, rows):
    """What else would be read in place."""
    layer = make_layer(kind, dtype=torch.float64)
    x = torch.randn(*rows, I, dtype=torch.float64)
    expected = run(layer, x)
    with rnnfast.prepack(layer):
        for _ in range(2):
            torch.testing.assert_close(run(layer, x), expected, rtol=1e-12, atol=1e-13)
        assert is_in_use(layer, x)


@pytest.mark.parametrize("input_kind", ["batched", "unbatched", "packed_unsorted"])
@pytest.mark.parametrize(
    "options",
    [{"num_layers": 3, "bidirectional": True}, {"proj_size": 4, "num_layers": 2}, {"bias": False, "batch_first": True}],
    ids=str,
)
def test_layers_and_directions(options, input_kind):
    layer = make("lstm", dtype=torch.float64, **options)
    x, hx = make_input(input_kind, layer, torch.float64), make_state(input_kind, layer, torch.float64)
    expected = layer(x, hx)
    with rnnfast.prepack(layer) as handle:
        for _ in range(2):
            torch.testing.assert_close(layer(x, hx), expected, rtol=1e-12, atol=1e-13)
        matrices = sum(w.numel() * 8 for name, w in layer.named_parameters() if name.startswith("weight"))
        assert handle.nbytes >= matrices


@pytest.mark.parametrize("kind", CELL_MODULES)
def test_cells(kind):
    _, cell = pair(kind, modules=CELL_MODULES, dtype=torch.float64)
    x = torch.randn(20, cell.input_size, dtype=torch.float64)
    expected = cell(x)
    with rnnfast.prepack(cell) as handle:
        for _ in range(2):
            torch.testing.assert_close(cell(x), expected, rtol=0, atol=0)
        assert handle.nbytes > 0


@pytest.mark.parametrize("arguments", ["resets", "lengths", "return_cells"])
def test_arguments(arguments):
    layer, x = make_layer(), torch.randn(T, N, I)
    given = {"resets": torch.rand(T, N) < 0.3, "lengths": [T, 0, 5], "return_cells": True}[arguments]

    def results():
        with torch.no_grad():
            output, (h, c), *cells = layer(x, **{arguments: given})
        return [output, h, c, *cells]

    expected = results()
    with rnnfast.prepack(layer):
        for _ in range(2):
            assert_equal(results(), expected)


@pytest.mark.parametrize("tie_weights", [False, True])
def test_tokens(tie_weights):
    """One-hot input is looked up in what is kept of W_ih; an embedding goes before it."""
    model = rnnfast.RNNLM(
        rnnfast.GRU(32, 32), 32, **({"embedding_dim": 32, "tie_weights": True} if tie_weights else {})
    )
    tokens = torch.randint(32, (T, N))
    with torch.no_grad():
        expected = model(tokens)
        with rnnfast.prepack(model) as handle:
            for _ in range(2):
                torch.testing.assert_close(model(tokens), expected, rtol=0, atol=0)
            assert handle.nbytes > 0


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "gru_before", "lstm", "lstm_layer_norm"])
def test_training(kind, recompute):
    """Gradients are the same, and every optimizer step is seen."""
    plain = make(kind, I, H, recompute=recompute)
    kept = copy.deepcopy(plain)
    x = torch.randn(40, 20, I)
    with rnnfast.prepack(kept):
        for layer in (plain, kept):
            optimizer = torch.optim.SGD(layer.parameters(), 0.1)
            for _ in range(3):
                optimizer.zero_grad()
                layer(x)[0].square().sum().backward()
                optimizer.step()
        for a, b in zip(plain.parameters(), kept.parameters(), strict=True):
            assert torch.equal(a, b) and torch.equal(a.grad, b.grad)


# --- Changes ----------------------------------------------------------------------------------------------------------


def step_with(optimizer_class, **options):
    def change(layer):
        optimizer = optimizer_class(layer.parameters(), 0.1, **options)
        layer(torch.randn(T, N, I))[0].square().sum().backward()
        optimizer.step()

    return change


def fused_step_of(name):
    def change(layer):
        weight = getattr(layer, name)
        weight.grad = torch.ones_like(weight)
        torch.optim.SGD([weight], 0.1, fused=True).step()

    return change


def no_grad_(function):
    def change(layer):
        with torch.no_grad():
            function(layer)

    return change


def in_inference_mode(layer):
    with torch.inference_mode():
        layer.weight_hh_l0.neg_()


def set_parameter(layer):
    layer.weight_hh_l0 = nn.Parameter(torch.randn_like(layer.weight_hh_l0))


def assign_data(name):
    def change(layer):
        weight = getattr(layer, name)
        weight.data = torch.randn_like(weight)

    return change


def assign_data_twice(layer):
    """The second may lie where the first weight lay."""
    for _ in range(2):
        layer.weight_hh_l0.data = torch.randn_like(layer.weight_hh_l0)
        gc.collect()


def other_dtype_and_back(layer):
    layer.half().float()


def transpose(layer):
    weight = layer.weight_hh_l0
    weight.data = torch.randn(weight.shape[1], weight.shape[0]).t()


def resize_storage(layer):
    """As sharded models free and fill their parameters."""
    weight = layer.weight_hh_l0
    values = torch.randn_like(weight)
    size = weight.untyped_storage().size()
    weight.untyped_storage().resize_(0)
    weight.untyped_storage().resize_(size)
    with torch.no_grad():
        weight.copy_(values)


CHANGES = {
    "sgd": step_with(torch.optim.SGD),
    "sgd_foreach": step_with(torch.optim.SGD, foreach=True),
    "adam_foreach": step_with(torch.optim.Adam, foreach=True),
    "adam_fused": step_with(torch.optim.Adam, fused=True),  # counts no version
    "sgd_fused": step_with(torch.optim.SGD, fused=True),
    "fused_of_another_weight": fused_step_of("weight_ih_l0"),
    "load_state_dict": lambda layer: layer.load_state_dict(make_layer().state_dict()),
    "load_state_dict_assign": lambda layer: layer.load_state_dict(make_layer().state_dict(), assign=True),
    "reset_parameters": lambda layer: layer.reset_parameters(),
    "copy": no_grad_(lambda layer: layer.weight_hh_l0.copy_(torch.randn(4 * H, H))),
    "index": no_grad_(lambda layer: layer.weight_hh_l0.__setitem__((3, 2), 5.0)),
    "weight_ih": no_grad_(lambda layer: layer.weight_ih_l0.neg_()),
    "bias": no_grad_(lambda layer: layer.bias_hh_l0.add_(1)),
    "view": no_grad_(lambda layer: layer.weight_hh_l0.view(-1)[7:9].zero_()),
    "detached": lambda layer: layer.weight_hh_l0.detach().neg_(),
    "foreach": no_grad_(lambda layer: torch._foreach_mul_(list(layer.parameters()), 0.5)),
    "init": lambda layer: nn.init.orthogonal_(layer.weight_hh_l0),
    "inference_mode": in_inference_mode,
    "data_hh": assign_data("weight_hh_l0"),
    "data_ih": assign_data("weight_ih_l0"),
    "data_bias": assign_data("bias_ih_l0"),
    "data_twice": assign_data_twice,
    "parameter": set_parameter,
    "dtype": other_dtype_and_back,
    "transposed": transpose,
    "storage": resize_storage,
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(change):
    layer, x = make_layer(), torch.randn(T, N, I)
    with rnnfast.prepack(layer):
        before = run(layer, x)
        assert is_in_use(layer, x)
        CHANGES[change](layer)
        for _ in range(2):
            after = run(layer, x)
            assert_equal(after, expected_of(layer, x))
            assert not torch.equal(before[0], after[0])


@pytest.mark.parametrize("name", ["weight_hr_l0", "weight_ch_l0", "weight_ln_hh_l0", "bias_ln_c_l0"])
def test_changes_of_other_weights_are_seen(name):
    kind, options = {
        "weight_hr_l0": ("lstm", {"proj_size": 4}),
        "weight_ch_l0": ("lstm_peephole", {}),
        "weight_ln_hh_l0": ("lstm_layer_norm", {}),
        "bias_ln_c_l0": ("lstm_layer_norm", {}),
    }[name]
    layer, x = make_layer(kind, **options), torch.randn(T, N, I)
    with rnnfast.prepack(layer):
        before = run(layer, x)
        with torch.no_grad():
            getattr(layer, name).add_(0.5)
        after = run(layer, x)
        assert not torch.equal(before[0], after[0])
        assert_equal(after, expected_of(layer, x))


@pytest.mark.filterwarnings("ignore")  # torch.compile's own
def test_compiled_optimizer_is_seen():
    layer, x = make_layer(), torch.randn(T, N, I)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, fused=True)
    with rnnfast.prepack(layer):
        before = run(layer, x)
        layer(x)[0].sum().backward()
        torch.compile(optimizer.step)()
        after = run(layer, x)
        assert not torch.equal(before[0], after[0])
        assert_equal(after, expected_of(layer, x))


def test_swapped_tensors_are_seen(monkeypatch):
    """torch.nn's layers refuse it, its cells do not."""
    monkeypatch.setattr(torch.__future__, "get_swap_module_params_on_conversion", lambda: True)
    cell, x = rnnfast.LSTMCell(I, H), torch.randn(20, I)
    with rnnfast.prepack(cell) as handle, torch.no_grad():
        before = cell(x)[0]
        assert handle.nbytes > 0
        cell.double()
        cell.weight_ih.neg_()
        after = cell(x.double())[0]
        assert not torch.allclose(before.double(), after)
        torch.testing.assert_close(after, copy.deepcopy(cell)(x.double())[0], rtol=0, atol=0)


def test_refresh():
    """After changes that torch does not count, and after new parameters."""
    layer, x = make_layer(), torch.randn(T, N, I)
    handle = rnnfast.prepack(layer)
    before = run(layer, x)
    layer.weight_hh_l0.data.neg_()
    assert_equal(run(layer, x), before)
    handle.refresh()
    assert_equal(run(layer, x), expected_of(layer, x))
    set_parameter(layer)
    assert not is_in_use(layer, x)
    handle.refresh()
    assert_equal(run(layer, x), expected_of(layer, x))
    assert is_in_use(layer, x)


def test_other_ways_to_arrange(isa):
    """A call that needs another arrangement makes it, whatever was there."""
    layer = make("rnn_tanh", 256, 512).eval()
    inputs = [torch.randn(20, n, 256) for n in (1, 40)]
    with rnnfast.prepack(layer):
        for threads in (1, 3, 2, 1):
            torch.set_num_threads(threads)
            for x in inputs:
                assert_equal(run(layer, x), expected_of(layer, x))
        for name in _C.supported_isas():
            _C.set_isa(name)
            assert_equal(run(layer, inputs[1]), expected_of(layer, inputs[1]))


def test_one_weight_of_two_layers():
    """A layer that shares W_hh with another has W_ih of its own."""
    first, second, x = make_layer(), make_layer(), torch.randn(T, N, I)
    second.weight_hh_l0 = first.weight_hh_l0
    with rnnfast.prepack(nn.ModuleList([first, second])):
        for layer in (first, second, first):
            assert_equal(run(layer, x), expected_of(layer, x))


def test_other_weights_in_a_call():
    """functional_call, parametrizations and autocast bring weights that are not the parameters."""
    layer, x = make_layer(), torch.randn(T, N, I)
    with rnnfast.prepack(layer) as handle, torch.no_grad():
        run(layer, x)
        others = {name: torch.randn_like(weight) for name, weight in layer.named_parameters()}
        output, _ = torch.func.functional_call(layer, others, x)
        other = make_layer()
        other.load_state_dict(others)
        assert torch.equal(output, other(x)[0])
        nbytes = handle.nbytes
        with torch.autocast("cpu", torch.bfloat16):
            output, _ = layer(x)
            assert not rnnfast.explain(layer, x).plans[0].details["prepacked"]
        assert output.dtype == torch.bfloat16 and handle.nbytes == nbytes
    nn.utils.parametrizations.orthogonal(layer, "weight_hh_l0")
    with pytest.raises(ValueError, match="plain parameters"):
        rnnfast.prepack(layer)


def test_threads_that_call_at_once():
    layer, x = make("gru", 32, 64).eval(), torch.randn(30, 4, 32)
    expected = run(layer, x)
    results = [[] for _ in range(4)]

    def work(mine):
        for _ in range(200):
            mine.append(run(layer, x)[0])

    with rnnfast.prepack(layer) as handle:
        threads = [threading.Thread(target=work, args=(mine,)) for mine in results]
        for thread in threads:
            thread.start()
        for _ in range(50):
            handle.refresh()
        for thread in threads:
            thread.join()
    assert all(torch.equal(output, expected[0]) for mine in results for output in mine)
    assert [len(mine) for mine in results] == [200] * 4


# --- The handle -------------------------------------------------------------------------------------------------------


def test_it_ends_with_the_model():
    layer = make_layer()
    weight = layer.weight_hh_l0
    handle = rnnfast.prepack(layer)
    run(layer, torch.randn(T, N, I))
    assert _C.is_prepacked(weight) and handle.nbytes > 0
    del layer
    gc.collect()
    assert not _C.is_prepacked(weight) and handle.nbytes == 0
    with pytest.raises(RuntimeError, match="the model is gone"):
        handle.refresh()


def test_it_outlives_the_handle():
    layer = make_layer()
    rnnfast.prepack(layer)
    gc.collect()
    assert is_in_use(layer, torch.randn(T, N, I))


def test_two_handles():
    layer, x = make_layer(), torch.randn(T, N, I)
    first, second = rnnfast.prepack(layer), rnnfast.prepack(nn.Sequential(layer))
    first.remove()
    first.remove()
    # the Sequential is gone, and what it asked for with it
    assert second.nbytes == 0 and not _C.is_prepacked(layer.weight_hh_l0)
    first, second = rnnfast.prepack(layer), rnnfast.prepack(layer)
    first.remove()
    assert is_in_use(layer, x)
    second.remove()
    assert not is_in_use(layer, x)
    with pytest.raises(RuntimeError, match="removed"):
        first.refresh()


def test_explain_says_it():
    layer, x = make_layer(), torch.randn(1, 1, I)
    details = rnnfast.explain(layer, x).plans[0].details
    assert not details["prepacked"] and not details["packed_weights"]
    with rnnfast.prepack(layer):
        details = rnnfast.explain(layer, x).plans[0].details
        assert details["prepacked"] and details["packed_weights"]


def test_refusals():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        rnnfast.prepack(3)
    with pytest.raises(ValueError, match=r"rnnfast\.convert"):
        rnnfast.prepack(nn.LSTM(2, 3))
    with torch.inference_mode():
        layer = make_layer()
    with pytest.raises(ValueError, match="inference_mode"):
        rnnfast.prepack(layer)
    with pytest.raises(ValueError, match="on another device"):
        rnnfast.prepack(make_layer(device="meta"))
    handle = rnnfast.prepack(make_layer())
    for take in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be pickled or copied"):
            take(handle)
    assert "PrepackHandle" in repr(handle)
