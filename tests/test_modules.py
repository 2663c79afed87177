"""The layers and cells against torch.nn: every option, every kind of input, dtypes, dropout."""

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from agreement import assert_same, in_some_sample
from hypothesis import given
from hypothesis import strategies as st
from pairs import (
    CELL_MODULES,
    CLASSES,
    IGNORE_TORCH,
    KINDS,
    LAYERS,
    OPTIONS,
    H,
    I,
    N,
    T,
    assert_agree,
    assert_same_structure,
    evaluate_module,
    make_input,
    make_state,
    map_tensors,
    pair,
    tensors_of,
)
from strategies import BATCHES, HIDDEN_SIZES, INPUT_SIZES, LAYOUTS, laid_out
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

import rnnfast

pytestmark = [pytest.mark.filterwarnings(IGNORE_TORCH), pytest.mark.usefixtures("default_device")]
CUDNN_DROPOUT = pytest.mark.cpu_only("cuDNN draws the masks between its layers from a state of its own")
DTYPES = [torch.float32, torch.float64]
LOW = [torch.bfloat16, torch.float16]
# In which torch.nn's autocast is a pattern: on CUDA its bfloat16 ends in cuDNN's float16.
LOW_OF = {"cpu": torch.bfloat16, "cuda": torch.float16}


def option_product() -> list[tuple[str, dict]]:
    """Every combination of the options of every layer."""
    switches = itertools.product([1, 2], [True, False], [False, True], [False, True], LAYERS, [0, 4])
    return [
        (cell, dict(num_layers=layers, bias=bias, batch_first=first, bidirectional=both, proj_size=proj))
        for layers, bias, first, both, cell, proj in switches
        if proj == 0 or cell == "lstm"
    ]


def without_zero_projection(options: dict) -> dict:
    """torch's RNN and GRU refuse proj_size, even 0."""
    return {name: value for name, value in options.items() if name != "proj_size" or value}


def option_id(value: object) -> str:
    if isinstance(value, dict):
        return ",".join(f"{name}={setting}" for name, setting in without_zero_projection(value).items())
    return str(value)


def test_every_cell_has_modules():
    """A cell of the extension without a layer and a cell module fails here."""
    assert {cell["name"] for cell in rnnfast._C.cells()} == set(LAYERS) | set(OPTIONS)
    assert set(LAYERS) == set(CELL_MODULES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("layer", "options"), option_product(), ids=option_id)
def test_options(layer, options, kind, dtype):
    """Outputs, final states and all gradients, with and without initial states."""
    theirs, ours = pair(layer, dtype=dtype, **without_zero_projection(options))
    x = make_input(kind, theirs, dtype)
    assert_agree(theirs, ours, x)
    assert_agree(theirs, ours, x, make_state(kind, theirs, dtype))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", LAYERS)
def test_16_bits(layer, kind, dtype):
    """No worse than torch.nn in the same dtype."""
    theirs, ours = pair(layer, dtype=dtype, num_layers=2, bidirectional=True)
    state = make_state(kind, theirs, dtype)
    in_some_sample(layer, dtype, lambda seed: assert_agree(theirs, ours, make_input(kind, theirs, dtype, seed), state))


@pytest.mark.parametrize("dtype", [*DTYPES, *LOW], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("layer", CELL_MODULES)
def test_cells(layer, batched, bias, dtype):
    """RNNCell, GRUCell and LSTMCell, with and without a state."""
    theirs, ours = pair(layer, modules=CELL_MODULES, bias=bias, dtype=dtype)
    x, h, c = (torch.randn(*([N] if batched else []), size).to(dtype) for size in (I, H, H))
    assert_agree(theirs, ours, x)
    assert_agree(theirs, ours, x, (h, c) if layer == "lstm" else h)


@pytest.mark.parametrize("layer", CELL_MODULES)
def test_cell_loop_equals_layer(layer):
    """A cell called step by step is the layer."""
    theirs, ours = pair(layer, dtype=torch.float64)
    _, cell = pair(layer, modules=CELL_MODULES, dtype=torch.float64)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in theirs.state_dict().items()})
    x, state, outputs = torch.randn(6, N, I, dtype=torch.float64), None, []
    for step in x:
        state = cell(step, state)
        outputs.append(state[0] if layer == "lstm" else state)
    torch.testing.assert_close(torch.stack(outputs), ours(x)[0], rtol=1e-12, atol=1e-12)


@given(data=st.data())
@pytest.mark.parametrize("layer", LAYERS)
def test_shapes_and_strides(layer, data):
    """Any sizes, non-contiguous and expanded inputs and states."""
    sizes = data.draw(st.sampled_from(INPUT_SIZES)), data.draw(st.sampled_from(HIDDEN_SIZES))
    dtype = data.draw(st.sampled_from(DTYPES))
    options = {"num_layers": data.draw(st.integers(1, 3)), "bidirectional": data.draw(st.booleans())}
    theirs, ours = pair(layer, *sizes, dtype=dtype, batch_first=data.draw(st.booleans()), **options)
    steps, batch = data.draw(st.integers(1, 5)), data.draw(st.sampled_from(BATCHES))
    layout = data.draw(st.sampled_from(LAYOUTS))
    x = laid_out(torch.randn(steps, batch, sizes[0], dtype=dtype), layout)
    x = x.transpose(0, 1) if theirs.batch_first else x
    rows = options["num_layers"] * (1 + options["bidirectional"])
    h, c = (laid_out(torch.randn(rows, batch, sizes[1], dtype=dtype), layout) for _ in range(2))
    state = (h, c) if layer == "lstm" else h
    plain = evaluate_module(theirs, x.contiguous(), map_tensors(state, torch.Tensor.contiguous))
    # Called directly, so that the strides are not lost in a clone.
    outputs = tensors_of(ours(x, state))
    for index, y in enumerate(outputs):
        tolerance = 1e-12 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(y.detach(), plain[f"output_{index}"], rtol=tolerance, atol=tolerance)
    assert_agree(theirs, ours, x, state)


@CUDNN_DROPOUT
@pytest.mark.parametrize("kind", ["batched", "packed_unsorted"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_dropout_draws_torchs_masks(layer, bidirectional, kind):
    """Same seed, same masks, same position of the generator afterwards; nothing is drawn in eval mode."""
    theirs, ours = pair(layer, dtype=torch.float64, num_layers=3, dropout=0.4, bidirectional=bidirectional)
    x = make_input(kind, theirs, torch.float64)
    results, states = [], []
    for module in (theirs, ours):
        torch.manual_seed(5)
        results.append(evaluate_module(module, x))
        states.append(torch.get_rng_state())
    assert_same(results[1], results[0])
    assert torch.equal(*states)
    torch.manual_seed(6)
    assert not torch.equal(evaluate_module(ours, x)["output_0"], results[1]["output_0"])
    before = torch.get_rng_state()
    assert_agree(theirs.eval(), ours.eval(), x)
    assert torch.equal(torch.get_rng_state(), before)


@CUDNN_DROPOUT
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_dropout_in_float32(layer, batch_first):
    """The masks do not depend on which of torch's code paths a dtype or layout takes."""
    theirs, ours = pair(layer, num_layers=2, dropout=0.5, batch_first=batch_first)
    x, outputs = make_input("batched", theirs), []
    for module in (theirs, ours):
        torch.manual_seed(5)
        outputs.append(module(x)[0])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)


@CUDNN_DROPOUT
def test_dropout_may_change_after_construction():
    """module.dropout is read at each call, up to the certainty of 1.0."""
    theirs, ours = pair("lstm", num_layers=2, dropout=0.1, dtype=torch.float64)
    x = make_input("batched", theirs, torch.float64)
    for p in (0.7, 0.0, 1.0):
        theirs.dropout = ours.dropout = p
        outputs = []
        for module in (theirs, ours):
            torch.manual_seed(3)
            outputs.append(evaluate_module(module, x))
        assert_same(outputs[1], outputs[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_empty_batch(layer, dtype):
    """Nothing in, nothing out, of torch's shapes; the weights' gradients are zero."""
    theirs, ours = pair(layer, dtype=dtype, num_layers=2, bidirectional=True)
    x = torch.empty(T, 0, I, dtype=dtype)
    assert_same_structure(theirs.cpu()(x.cpu()), ours(x))  # cuDNN takes none
    results = evaluate_module(ours, x)
    assert all(torch.equal(results[f"grad_{n}"], torch.zeros_like(p)) for n, p in ours.named_parameters())


@pytest.mark.parametrize("layer", LAYERS)
def test_packed_equals_each_sequence_alone(layer):
    """Against no packing at all, unsorted and ragged; the results come back in the caller's order."""
    _, ours = pair(layer, dtype=torch.float64, bidirectional=True, num_layers=2)
    sequences = [torch.randn(length, I, dtype=torch.float64) for length in (3, 7, 1, 5, 7)]
    with torch.device("cpu"):  # where pack_sequence must make the lengths
        packed = pack_sequence(sequences, enforce_sorted=False)
    output, final = ours(packed)
    padded, lengths = pad_packed_sequence(output)
    for n, sequence in enumerate(sequences):
        alone, alone_final = ours(sequence)
        torch.testing.assert_close(padded[: lengths[n], n], alone)
        for state, alone_state in zip(tensors_of(final), tensors_of(alone_final), strict=True):
            torch.testing.assert_close(state[:, n], alone_state)


@pytest.mark.parametrize("layer", LAYERS)
def test_packed_by_hand(layer):
    """A PackedSequence made from data and batch sizes alone, as some programs do."""
    theirs, ours = pair(layer, dtype=torch.float64)
    x = PackedSequence(torch.randn(6, I, dtype=torch.float64), torch.tensor([3, 2, 1], device="cpu"))
    assert_agree(theirs, ours, x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", LAYERS)
def test_autocast(layer, kind, default_device):
    """The dtypes that torch.nn gives, and parameter gradients in the parameters' own.

    torch's own fused LSTM fails on processors without bfloat16 products: there only ours is run.
    """
    theirs, ours = pair(layer, num_layers=2)
    x, state = make_input(kind, theirs), make_state(kind, theirs)
    exact = evaluate_module(theirs, x, state)
    torch_fails = layer == "lstm" and default_device == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    with torch.autocast(default_device, dtype=LOW_OF[default_device]):
        for arguments in ((x, state), (x,)):
            result = ours(*arguments)
            if not torch_fails:
                assert_same_structure(theirs(*arguments), result)
        results = evaluate_module(ours, x, state)
    for name, want in exact.items():
        tolerance = 0.05 * max(1.0, want.abs().max().item())
        error = (results[name].float() - want).abs().max().item()
        assert error <= tolerance, f"{name}: error {error:.3g}, allowed {tolerance:.3g}"
    assert all(results[f"grad_{name}"].dtype == torch.float32 for name, _ in ours.named_parameters())


@pytest.mark.cpu_only("test_autocast has float16 there")
@pytest.mark.parametrize("layer", LAYERS)
def test_autocast_to_float16(layer):
    """float16, also for the LSTM, where torch's own call fails on processors without float16 products."""
    theirs, ours = pair(layer)
    x = make_input("batched", theirs)
    exact = theirs(x)
    with torch.autocast("cpu", dtype=torch.float16):
        result = ours(x)
        if layer != "lstm":
            assert_same_structure(theirs(x), result)
    for have, want in zip(tensors_of(result), tensors_of(exact), strict=True):
        assert have.dtype == torch.float16 or layer != "lstm"
        torch.testing.assert_close(have.float(), want, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("layer", CELL_MODULES)
def test_autocast_of_cells(layer, default_device):
    """The dtypes that torch.nn gives."""
    theirs, ours = pair(layer, modules=CELL_MODULES)
    x, h = torch.randn(N, I), torch.randn(N, H)
    state = (h, h) if layer == "lstm" else h
    with torch.autocast(default_device, dtype=LOW_OF[default_device]):
        assert_same_structure(theirs(x, state), ours(x, state))
        assert_same_structure(theirs(x), ours(x))


@pytest.mark.parametrize("layer", LAYERS)
def test_autocast_accepts_mixed_dtypes(layer, default_device):
    """Under autocast an input in the low dtype meets float32 weights."""
    theirs, ours = pair(layer)
    low = LOW_OF[default_device]
    x = make_input("batched", theirs).to(low)
    with torch.autocast(default_device, dtype=low):
        assert_same_structure(theirs(x), ours(x))


@pytest.mark.cpu_only("it is about CUDA, but makes no tensor there")
@pytest.mark.parametrize("low", LOW, ids=str)
def test_autocast_on_cuda(low, monkeypatch):
    """All in autocast's dtype there, whatever the mode, the call and the states; float64 is left alone."""
    monkeypatch.setattr(torch, "get_autocast_dtype", {"cuda": low}.__getitem__)
    x, h, c = (
        SimpleNamespace(dtype=torch.float32, device=torch.device("cuda"), is_floating_point=lambda: True) for _ in "xhc"
    )
    for mode, proj_size, stepwise in itertools.product(["RNN_TANH", "RNN", "GRU", "LSTM"], [0, 3], [False, True]):
        for states in ((None, None), (h, c)):
            assert rnnfast.call.autocast_dtypes(mode, proj_size, stepwise, x, *states) == (low, None)
    x.dtype = torch.float64
    assert rnnfast.call.autocast_dtypes("GRU", 0, False, x, None, None) == (None, None)


@pytest.mark.parametrize("kind", ["batched", "packed_unsorted"])
@pytest.mark.parametrize("layer", LAYERS)
@torch.backends.cudnn.flags(enabled=False)  # it has none
def test_double_backward(layer, kind):
    """A gradient penalty through layers and directions, against torch.nn."""
    theirs, ours = pair(layer, dtype=torch.float64, num_layers=2, bidirectional=True)
    x = make_input(kind, theirs, torch.float64)
    results = []
    for module in (theirs, ours):
        leaf = map_tensors(x, lambda t: t.detach().clone().requires_grad_())
        outputs = tensors_of(module(leaf))
        parameters = list(module.parameters())
        (first,) = torch.autograd.grad(sum(y.square().sum() for y in outputs), tensors_of(leaf), create_graph=True)
        seconds = torch.autograd.grad(first.square().sum(), parameters, materialize_grads=True)
        results.append({name: grad for (name, _), grad in zip(module.named_parameters(), seconds, strict=True)})
    assert_same(results[1], results[0])


@pytest.mark.parametrize("layer", LAYERS)
def test_frozen_weights(layer):
    """Any weights may be frozen; the others keep their gradients, and all frozen means nothing is saved."""
    theirs, ours = pair(layer, dtype=torch.float64, num_layers=2)
    x = make_input("batched", theirs, torch.float64)
    full = {}
    ours(x)[0].square().sum().backward()
    full = {name: p.grad.clone() for name, p in ours.named_parameters()}
    for frozen in full:
        ours.zero_grad()
        for name, p in ours.named_parameters():
            p.requires_grad_(name != frozen)
        ours(x)[0].square().sum().backward()
        for name, p in ours.named_parameters():
            if name == frozen:
                assert p.grad is None
            else:
                torch.testing.assert_close(p.grad, full[name], rtol=1e-12, atol=1e-12)
    assert not ours.requires_grad_(False)(x)[0].requires_grad


def test_tied_weights():
    """One tensor as the weight of two layers collects both gradients."""
    theirs, ours = pair("gru", H, H, num_layers=2, dtype=torch.float64)
    for module in (theirs, ours):
        module.weight_hh_l1 = module.weight_hh_l0
        module.weight_ih_l1 = module.weight_ih_l0
    assert len(list(ours.parameters())) == 6
    assert_agree(theirs, ours, make_input("batched", theirs, torch.float64))


@pytest.mark.parametrize("name", CLASSES)
def test_initial_values_and_repr(name):
    """The same seed gives the same weights, the same generator state, the same text."""
    variants = [{}, {"bias": False}]
    if not name.endswith("Cell"):
        variants.append({"num_layers": 3, "bidirectional": True, "dropout": 0.1, "batch_first": True})
    if name == "LSTM":
        variants.append({"proj_size": 2, "num_layers": 2})
    if name.startswith("RNN"):
        variants.append({"nonlinearity": "relu"})
    for options in variants:
        made, states = [], []
        for library in (nn, rnnfast):
            torch.manual_seed(11)
            made.append(getattr(library, name)(5, 7, **options))
            states.append(torch.get_rng_state())
        theirs, ours = made
        assert list(theirs.state_dict()) == list(ours.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))
        assert torch.equal(*states)
        assert repr(ours) == repr(theirs)


@pytest.mark.cpu_only("it names its devices")
@pytest.mark.parametrize("layer", LAYERS)
def test_meta_device(layer):
    """Shapes without memory, then real weights from a state dict."""
    theirs, ours = pair(layer, num_layers=2, bidirectional=True, device="meta")
    x = torch.empty(T, N, I, device="meta")
    assert_same_structure(theirs(x), ours(x))
    assert all(y.device.type == "meta" for y in tensors_of(ours(x)))
    real, _ = pair(layer, num_layers=2, bidirectional=True, dtype=torch.float32)
    ours.load_state_dict(real.state_dict(), assign=True)
    assert_agree(real, ours, make_input("batched", real))
    materialised = copy.deepcopy(pair(layer, device="meta")[1]).to_empty(device="cpu")
    materialised.reset_parameters()
    assert materialised(torch.randn(T, N, I))[0].isfinite().all()
