"""The Decoder: a sequence taken step by step is the sequence, whatever the cell, and its state is its own."""

import copy
import pickle
import threading

import pytest
import torch
from pairs import make
from torch.nn import GRU as TorchGRU

import rnnfast

T, N, I, H = 5, 3, 6, 17  # noqa: E741  (the letter of the whole code base)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 2e-2, torch.float16: 1e-2}


def steps(decoder: rnnfast.Decoder, x: torch.Tensor) -> torch.Tensor:
    """The outputs of all steps of x."""
    return torch.stack([decoder.step(step) for step in x])


def assert_close(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=TOLERANCE[torch.float32])


@torch.no_grad()
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("num_layers", [1, 3])
def test_steps_are_the_sequence(cell, isa, num_layers, dtype):
    """Outputs and state of T steps are those of one call over them, from a state that was set."""
    layer = make(cell, I, H, num_layers=num_layers, dtype=dtype)
    x = torch.randn(T, N, I).to(dtype)
    states = [torch.randn(num_layers, N, H).to(dtype) for _ in range(1 + isinstance(layer, rnnfast.LSTM))]
    hx = tuple(states) if len(states) == 2 else states[0]
    decoder = rnnfast.Decoder(layer, N)
    decoder.state = hx
    expected = layer(x, hx)
    tolerance = {"rtol": 0.0, "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(steps(decoder, x), expected[0], **tolerance)
    torch.testing.assert_close(decoder.state, expected[1], **tolerance)


@torch.no_grad()
@pytest.mark.parametrize(
    ("cell_name", "options"),
    [
        ("lstm", {"proj_size": 5, "num_layers": 2}),
        ("lstm", {"zoneout": (0.1, 0.4), "bias": False}),
        ("lstm_peephole", {"zoneout": 0.2, "recurrent_dropout": 0.3, "num_layers": 2, "dropout": 0.5}),
        ("gru", {"zoneout": 0.2, "batch_first": True}),
    ],
)
def test_options(cell_name, options):
    """Every option, as in evaluation, though the layer is in training."""
    layer = make(cell_name, I, H, **options)
    decoder = rnnfast.Decoder(layer, N)
    x = torch.randn(T, N, I)
    layer.eval()
    expected = layer(x.transpose(0, 1))[0].transpose(0, 1) if layer.batch_first else layer(x)[0]
    assert_close(steps(decoder, x), expected)


@torch.no_grad()
@pytest.mark.few_cells
def test_without_a_batch(cell):
    layer = make(cell, I, H, num_layers=2)
    x = torch.randn(T, I)
    decoder = rnnfast.Decoder(layer)
    output, state = layer(x)
    assert_close(steps(decoder, x), output)
    assert_close(decoder.state, state)
    assert decoder.step(x[0]).shape == (H,)


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 2])
def test_large_layers_on_threads(cell, threads):
    """Enough units for threads to share, as they were at the construction: later ones do not matter."""
    torch.set_num_threads(threads)
    layer = make(cell, 300, 517)
    x = torch.randn(T, 1, 300)
    expected = layer(x)[0]
    decoder = rnnfast.Decoder(layer, 1)
    torch.set_num_threads(3 - threads)
    assert_close(steps(decoder, x), expected)


@torch.no_grad()
@pytest.mark.few_cells
def test_resets(cell):
    """All, or those of the mask, begin anew; the others go on."""
    layer = make(cell, I, H, num_layers=2)
    x = torch.randn(T, N, I)
    mask = torch.tensor([True, False, True])
    resets = torch.zeros(T, N, dtype=torch.bool)
    resets[2] = mask
    decoder = rnnfast.Decoder(layer, N)
    first = steps(decoder, x[:2])
    decoder.reset(mask)
    assert_close(torch.cat([first, steps(decoder, x[2:])]), layer(x, resets=resets)[0])
    decoder.reset()
    assert_close(steps(decoder, x), layer(x)[0])


def test_the_state_is_a_copy():
    layer = rnnfast.LSTM(I, H)
    decoder = rnnfast.Decoder(layer, N)
    h, c = torch.randn(1, N, H), torch.randn(1, N, H)
    decoder.state = (h, c)
    before = decoder.state
    h.zero_()
    x = torch.randn(N, I)
    output = decoder.step(x)
    kept = output.clone()
    assert not torch.equal(decoder.state[0], before[0])
    decoder.step(x)
    assert torch.equal(output, kept), "a later step wrote into an earlier output"


def test_weights_are_a_snapshot():
    """The layer's later weights are seen after refresh, which leaves the state."""
    layer = rnnfast.GRU(I, H)
    decoder = rnnfast.Decoder(layer)
    x = torch.randn(I)
    state = torch.randn(1, H)
    decoder.state = state
    old = decoder.step(x)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(0.5)
    decoder.state = state
    assert torch.equal(decoder.step(x), old)
    decoder.state = state
    decoder.refresh()
    assert_close(decoder.step(x), layer(x[None], state)[0][0].detach())
    decoder.layer = rnnfast.GRU(I, H + 1)
    with pytest.raises(ValueError, match="sizes it was made with"):
        decoder.refresh()


def test_layers_of_torch_strided_input_and_inference_mode():
    layer = TorchGRU(I, H)
    x = torch.randn(I, N)
    with torch.inference_mode():
        decoder = rnnfast.Decoder(layer, N)
        first = decoder.step(x.t())
    decoder.reset(torch.ones(N, dtype=torch.bool))
    assert_close(first.clone(), layer(x.t()[None])[0][0].detach())
    assert_close(decoder.step(x.t()), first.clone())
    assert not first.requires_grad


def test_bfloat16_in_inference_mode():
    layer = rnnfast.LSTM(I, H, dtype=torch.bfloat16)
    decoder = rnnfast.Decoder(layer)
    x = torch.randn(I, dtype=torch.bfloat16)
    with torch.inference_mode():
        first = decoder.step(x)
        decoder.reset()
    assert torch.equal(decoder.step(x), first.clone())


def test_an_instruction_set_forced_later():
    """The weights lie as the set at the construction wants them."""
    layer = rnnfast.LSTM(I, H)
    x = torch.randn(I)
    decoder = rnnfast.Decoder(layer)
    before = decoder.step(x)
    for name in rnnfast.supported_isas():
        rnnfast.set_isa(name)
        decoder.reset()
        assert torch.equal(decoder.step(x), before)


def test_threads_take_turns():
    """Steps of several threads on one decoder: each is whole, and the state that of all of them."""
    layer = rnnfast.GRU(I, H)
    x, count, workers = torch.randn(I), 200, 4
    decoder, alone = rnnfast.Decoder(layer), rnnfast.Decoder(layer)
    threads = [threading.Thread(target=lambda: [decoder.step(x) for _ in range(count)]) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in range(count * workers):
        alone.step(x)
    assert torch.equal(decoder.state, alone.state)


def test_refusals():
    layer = rnnfast.LSTM(I, H)
    decoder, single = rnnfast.Decoder(layer, N), rnnfast.Decoder(rnnfast.GRU(I, H))
    x = torch.randn(N, I)
    with pytest.raises(TypeError, match="layer must be an RNN, GRU or LSTM, got Linear"):
        rnnfast.Decoder(torch.nn.Linear(2, 3))
    with pytest.raises(ValueError, match="one direction"):
        rnnfast.Decoder(rnnfast.GRU(I, H, bidirectional=True))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        rnnfast.Decoder(layer, 0)
    with pytest.raises(TypeError, match="batch_size must be an int or None, got float"):
        rnnfast.Decoder(layer, 2.0)
    with pytest.raises(RuntimeError, match="on the CPU, got one on meta"):
        rnnfast.Decoder(rnnfast.GRU(I, H, device="meta"))
    with pytest.raises(ValueError, match=r"expected \[N, I\] = \[3, 6\], got \[2, 6\]"):
        decoder.step(x[:2])
    with pytest.raises(ValueError, match=r"expected \[I\] = \[6\], got \[3, 6\]"):
        single.step(x)
    with pytest.raises(TypeError, match="expected Float"):
        decoder.step(x.double())
    with pytest.raises(TypeError):
        decoder.step([1.0])
    with pytest.raises(RuntimeError, match="requires a gradient"):
        decoder.step(x.clone().requires_grad_())
    with torch.no_grad():
        decoder.step(x.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="CPU tensor, got one on meta"):
        decoder.step(x.to("meta"))
    with pytest.raises(TypeError, match="expected bool"):
        decoder.reset(torch.ones(N))
    with pytest.raises(ValueError, match=r"expected \[N\]"):
        decoder.reset(torch.ones(N + 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="without a batch"):
        single.reset(torch.ones(1, dtype=torch.bool))
    with pytest.raises(ValueError, match="a pair"):
        decoder.state = torch.zeros(1, N, H)
    with pytest.raises(ValueError, match="h alone"):
        single.state = (torch.zeros(1, H), torch.zeros(1, H))
    with pytest.raises(ValueError, match=r"h: expected \[L, units\]"):
        single.state = torch.zeros(1, H + 1)
    with pytest.raises(TypeError, match=r"c: expected Float, got Double"):
        decoder.state = (torch.zeros(1, N, H), torch.zeros(1, N, H).double())
    with pytest.raises(TypeError, match="expected h or a pair"):
        decoder.state = 1
    for way in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be pickled or copied"):
            way(decoder)
    assert repr(single) == "Decoder(GRU(6, 17), batch_size=None)"
