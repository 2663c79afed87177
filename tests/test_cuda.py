"""What only a CUDA device has: streams, graphs, a second device, tf32, and arguments that lie on two devices."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from pairs import make
from strategies import Case

import rnnfast
from rnnfast import _C

BUILD = _C.build_info()
pytestmark = [
    pytest.mark.skipif(not BUILD["cuda"], reason=f"this build has no CUDA kernels: {BUILD['cuda_reason']}"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
T, N, I, H = 12, 5, 6, 40  # noqa: E741  (the letter of the whole code base)
LAYERS = {"rnn": rnnfast.RNN, "gru": rnnfast.GRU, "lstm": rnnfast.LSTM}


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param](I, H, num_layers=2, device="cuda")


def train(layer: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output and all gradients."""
    x = x.detach().requires_grad_()
    output, _ = layer(x)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])]


def assert_equal(have: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))


def test_another_stream(layer):
    """Work is put on the current stream, in order with what else is there; the numbers are the same."""
    x = torch.randn(T, N, I, device="cuda")
    want = train(layer, x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(20_000_000)
        late.copy_(x)
        have = train(layer, late)
    torch.cuda.current_stream().wait_stream(stream)
    assert_equal(have, want)


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Raise where torch itself would make the host wait for the device."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype feature")
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:  # the mode is the whole process's
            torch.cuda.set_sync_debug_mode("default")


def test_a_call_waits_for_nothing(layer):
    """The host is not held up, also by what it must send to the device for packed and padded batches."""
    x, lengths = torch.randn(T, N, I, device="cuda"), torch.randint(1, T + 1, (N,))
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    resets = torch.rand(T, N, device="cuda") < 0.2

    def step(*arguments, **options) -> None:
        output, _ = layer(*arguments, **options)
        (output if isinstance(output, torch.Tensor) else output.data).sum().backward()

    for arguments, options in (((x,), {}), ((packed,), {}), ((x,), {"lengths": lengths, "resets": resets})):
        step(*arguments, **options)  # what is made once
        with waiting_is_an_error():
            step(*arguments, **options)
    with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"), waiting_is_an_error():
        x.sum().item()


def test_graph_of_inference(layer):
    """A captured call, run again on other numbers."""
    static = torch.randn(T, N, I, device="cuda")
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            layer(static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output, _ = layer(static)
        for _ in range(3):
            static.copy_(torch.randn(T, N, I, device="cuda"))
            graph.replay()
            assert torch.equal(output, layer(static)[0])


# The helper captures on another stream than it warms up on, and the last round of that is still alive then.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match:UserWarning")
def test_graph_of_training(layer):
    """Forward and backward captured by torch's own helper."""
    x = torch.randn(T, N, I, device="cuda", requires_grad=True)
    want = train(layer, x)
    graphed = torch.cuda.make_graphed_callables(lambda x: layer(x)[0], (x,))
    for _ in range(2):
        layer.zero_grad()
        output = graphed(x)
        assert torch.equal(output, want[0])
        (gradient,) = torch.autograd.grad(output.square().sum(), x)
        assert torch.equal(gradient, want[1])


def test_graph_of_a_training_step(layer):
    """A whole step captured as torch's notes say: warmed up on a side stream, gradients None before the capture.

    On the same stream, and with nothing left of the rounds before, so that no node of theirs is met again.
    """
    static = torch.randn(T, N, I, device="cuda")

    def step() -> torch.Tensor:
        layer.zero_grad(set_to_none=True)
        output, _ = layer(static)
        output.square().sum().backward()
        return output.detach()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        output = step()
    gradients = [parameter.grad for parameter in layer.parameters()]
    for _ in range(3):
        static.copy_(torch.randn(T, N, I, device="cuda"))
        graph.replay()
        want_output, _, *want = train(layer, static)
        assert_equal([output, *gradients], [want_output, *want])


def test_lengths_are_refused_by_a_graph(layer):
    """Their values are read on the host, once: a graph that runs again would know nothing of others."""
    x, lengths = torch.randn(T, N, I, device="cuda"), torch.full((N,), T - 1)
    layer(x, lengths=lengths)
    torch.cuda.synchronize()
    with (
        pytest.raises(RuntimeError, match="lengths: expected None while a CUDA graph is captured"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        layer(x, lengths=lengths)


@pytest.mark.parametrize("name", [cell["name"] for cell in _C.cells() if cell["on_cuda"]])
def test_a_layer_moves(name):
    """Made on the CPU, moved to the device, and there to float64: at each move torch.nn lays its weights out anew."""
    layer = make(name, I, H, num_layers=2)
    x = torch.randn(T, N, I)
    want, _ = layer(x)
    torch.testing.assert_close(layer.to("cuda")(x.to("cuda"))[0].cpu(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.double()(x.to("cuda").double())[0].cpu().float(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are fewer than two CUDA devices")
def test_a_second_device(layer):
    """A call runs where its tensors are, whatever device is current."""
    x = torch.randn(T, N, I, device="cuda:0")
    want = [tensor.cpu() for tensor in train(layer.to("cuda:0"), x)]
    with torch.cuda.device(0):
        have = train(layer.to("cuda:1"), x.to("cuda:1"))
    for a, b in zip(have, want, strict=True):
        assert a.device == torch.device("cuda:1")
        torch.testing.assert_close(a.cpu(), b)


@pytest.mark.parametrize("name", ["h0", "weight_hh", "bias_ih", "input", "resets", "zoneout_h"])
def test_devices_do_not_mix(name):
    """The tensor that is elsewhere is named."""
    call = Case("gru", resets=True, masks=frozenset({"zoneout_h"})).call().on("cuda")
    holder = call.tensors if name in call.tensors else call.options
    holder[name] = holder[name].cpu()
    match = f"rnnfast::gru: {'h0' if name == 'input' else name}: expected a tensor on (cuda:0|cpu), .*got one on"
    with pytest.raises(RuntimeError, match=match):
        call(call.op())


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="this device has no tf32"
)
def test_tf32_is_torchs_setting_for_rnns():
    """Rounded factors where torch.backends.cudnn.rnn.fp32_precision says so, and only there."""
    call = Case("lstm", T=20, N=16, I=64, H=128).call(torch.float32)
    exact = call.to(torch.float64).on("cuda")
    want = exact(exact.op())[0]
    call = call.on("cuda")
    errors = {}
    for setting in ("ieee", "tf32"):
        torch.backends.cudnn.rnn.fp32_precision = setting
        errors[setting] = (call(call.op())[0].double() - want).abs().max().item()
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    assert errors["ieee"] < 1e-5 < errors["tf32"] < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_runs_are_bitwise_equal(layer, dtype):
    """Nothing depends on which block comes first."""
    layer = layer.to(dtype)
    x = torch.randn(64, 24, I, device="cuda", dtype=dtype)
    want = train(layer, x)
    for _ in range(5):
        assert_equal(train(layer, x), want)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(layer, low):
    """Everything is in autocast's dtype, gradients in the parameters' own."""
    x = torch.randn(T, N, I, device="cuda")
    exact, _ = layer(x)
    with torch.autocast("cuda", dtype=low):
        output, state = layer(x)
    states = state if isinstance(state, tuple) else (state,)
    assert all(y.dtype == low for y in (output, *states))
    torch.testing.assert_close(output.float(), exact, rtol=0.05, atol=0.05)
    output.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
