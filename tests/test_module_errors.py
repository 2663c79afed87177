"""Bad input to the layers: torch's own error cases, and clearer messages where torch's are cryptic."""

import pytest
import torch
from pairs import CELL_MODULES, CLASSES, LAYERS, H, I, N, T, make_input, make_state, pair
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import rnnfast

ERRORS = (RuntimeError, ValueError, TypeError, IndexError)
STATE = "hx|h0|h_0|hidden|cx|c0|c_0|state"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_torchs_own_error_cases(name, dtype):
    """The error inputs of torch's module database: the same type, torch's text in the message."""
    pytest.importorskip("expecttest", reason="torch's test database needs the package expecttest")
    from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

    (entry,) = [info for info in module_db if info.module_cls is getattr(nn, name)]
    cases = entry.module_error_inputs_func(entry, device="cpu", dtype=dtype, requires_grad=False, training=True)
    assert cases
    for case in cases:
        constructor = case.module_error_input.constructor_input
        make = getattr(rnnfast, name)
        if case.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(case.error_type, match=case.error_regex):
                make(*constructor.args, **constructor.kwargs)
            continue
        module = make(*constructor.args, **({"dtype": dtype} | constructor.kwargs))
        forward = case.module_error_input.forward_input
        with pytest.raises(case.error_type, match=case.error_regex):
            module(*forward.args, **forward.kwargs)


def wrong_calls() -> dict:
    """Calls that torch.nn refuses too: what is wrong with them, and the call."""
    x = torch.randn(T, N, I)
    h = torch.randn(1, N, H)
    packed = PackedSequence(torch.randn(6, I), torch.tensor([3, 2, 1]))
    return {
        "1-D input": ((torch.randn(I),), "2D or 3D"),
        "4-D input": ((torch.randn(1, T, N, I),), "2D or 3D"),
        "input size": ((torch.randn(T, N, I + 1),), f"[Ee]xpected {I}, got {I + 1}"),
        "input dtype": ((x.double(),), "float64.*float32"),
        "state of another batch": ((x, h[:, :-1]), rf"Expected hidden.*\({1}, {N}, {H}\).*\[?1, {N - 1}, {H}"),
        "state of another size": ((x, h[..., :-1]), "Expected hidden"),
        "state of another number of layers": ((x, torch.randn(2, N, H)), "Expected hidden"),
        "2-D state for a batch": ((x, h[0]), "3-D"),
        "3-D state for one sequence": ((x[:, 0], h), "2-D"),
        "packed state of another batch": ((packed, torch.randn(1, 4, H)), STATE),
        "empty sequence": ((x[:0],), "[Ss]equence|input"),
    }


@pytest.mark.parametrize("wrong", wrong_calls())
@pytest.mark.parametrize("layer", LAYERS)
def test_calls_that_torch_refuses(layer, wrong):
    """The same error type as torch.nn's, and its message where it says what was expected and given."""
    (x, *state), match = wrong_calls()[wrong]
    if layer == "lstm":
        state = [(h, h) for h in state]
    theirs, ours = pair(layer)
    with pytest.raises(ERRORS) as expected:
        theirs(x, *state)
    with pytest.raises(type(expected.value), match=match):
        ours(x, *state)


@pytest.mark.parametrize("kind", ["batched", "unbatched", "packed"])
@pytest.mark.parametrize("layer", LAYERS)
def test_dtype_of_state(layer, kind):
    """Named, with both dtypes, before anything is computed."""
    _, ours = pair(layer)
    with pytest.raises(ERRORS, match=rf"(?s)({STATE}).*float64|float64.*({STATE})") as error:
        ours(make_input(kind, ours), make_state(kind, ours, torch.float64))
    assert "float32" in str(error.value)


@pytest.mark.parametrize("part", [0, 1])
def test_one_state_of_an_lstm_is_wrong(part):
    """h_0 and c_0 are checked one by one."""
    _, ours = pair("lstm", proj_size=4)
    x, good = make_input("batched", ours), make_state("batched", ours)
    for change in (torch.Tensor.double, lambda t: t[:, :-1], lambda t: t[..., :-1], lambda t: t.long(), lambda t: t[0]):
        state = list(good)
        state[part] = change(state[part])
        with pytest.raises(ERRORS, match=STATE):
            ours(x, tuple(state))
    for state in (good[0], (good[0],), (*good, good[0]), (None, good[1])):
        with pytest.raises((*ERRORS, AttributeError)):
            ours(x, state)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_input_that_is_no_floating_point(layer, dtype):
    """Token ids handed to a layer without an embedding."""
    _, ours = pair(layer)
    with pytest.raises(ERRORS, match=rf"input.*{str(dtype).removeprefix('torch.')}"):
        ours(torch.ones(T, N, I).to(dtype))


@pytest.mark.parametrize("layer", LAYERS)
def test_device_of_input_and_state(layer):
    """Both devices named."""
    _, ours = pair(layer)
    with pytest.raises(ERRORS, match=r"(?s)input.*meta|meta.*input"):
        ours(torch.empty(T, N, I, device="meta"))
    state = torch.empty(1, N, H, device="meta")
    with pytest.raises(ERRORS, match="meta"):
        ours(torch.randn(T, N, I), (state, state) if layer == "lstm" else state)


@pytest.mark.parametrize(
    "sizes",
    [[3, 2, -1, 2], [3, 3, 0], [1, 2, 3], [3, 2], [3, 3, 3], [2**62, 6], [0, 0], []],
    ids=str,
)
@pytest.mark.parametrize("layer", LAYERS)
def test_packed_sequence_by_hand(layer, sizes):
    """Batch sizes that are negative, zero, increasing, or do not add up to the 6 rows."""
    _, ours = pair(layer)
    with pytest.raises(ERRORS, match=r"batch_sizes|packed|Packed|length|input"):
        ours(PackedSequence(torch.randn(6, I), torch.tensor(sizes, dtype=torch.int64)))


@pytest.mark.parametrize("weight", ["weight_ih_l0", "weight_hh_l1", "bias_ih_l1", "bias_hh_l0"])
@pytest.mark.parametrize("layer", LAYERS)
def test_weights_by_surgery(layer, weight):
    """A weight of the wrong shape, dtype or kind put in after construction."""
    _, ours = pair(layer, num_layers=2)
    x = make_input("batched", ours)
    good = getattr(ours, weight)
    for wrong in (good[:-1], good.double(), good.unsqueeze(0), good[:0], good.to("meta")):
        setattr(ours, weight, nn.Parameter(wrong.detach()))
        with pytest.raises(ERRORS, match=r"weight|bias|dtype|input|h0|hx"):
            ours(x)
    setattr(ours, weight, good)
    assert ours(x)[0].isfinite().all()


@pytest.mark.parametrize("value", [None, [[0.0]], "text", 3.0])
@pytest.mark.parametrize("layer", LAYERS)
def test_input_that_is_no_tensor(layer, value):
    """As in torch.nn, an exception; which one is Python's business."""
    _, ours = pair(layer)
    with pytest.raises((*ERRORS, AttributeError)):
        ours(value)


@pytest.mark.parametrize("layer", CELL_MODULES)
def test_cells(layer):
    """Wrong calls of the cell modules name what is wrong."""
    _, ours = pair(layer, modules=CELL_MODULES)
    x, h = torch.randn(N, I), torch.randn(N, H)

    def call(x: torch.Tensor, h: torch.Tensor) -> None:
        ours(x, (h, h) if layer == "lstm" else h)

    for wrong, match in [
        ((x.double(), h), "float64"),
        ((x, h.double()), "float64"),
        ((x.long(), h), "input|int64|Long"),
        ((x[:-1], h), "batch"),
        ((x, h[..., :-1]), "hidden|hx|h0"),
        ((x[0], h), "1D|1-D|2D|2-D|hx|h0|hidden|batch"),
        ((torch.randn(1, N, I), h), "1D or 2D"),
    ]:
        with pytest.raises(ERRORS, match=match):
            call(*wrong)


def test_construction():
    """torch's checks of the options still run."""
    with pytest.raises(ValueError, match="proj_size"):
        rnnfast.GRU(3, 4, proj_size=2)
    with pytest.raises(ValueError, match="proj_size"):
        rnnfast.LSTM(3, 4, proj_size=4)
    with pytest.raises(ValueError, match="nonlinearity"):
        rnnfast.RNN(3, 4, nonlinearity="sigmoid")
    with pytest.raises(ValueError, match="dropout"):
        rnnfast.LSTM(3, 4, dropout=1.5)
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        rnnfast.LSTM(3, 4, dropout=0.5)
