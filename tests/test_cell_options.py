"""The cells that torch.nn has not, as options of the layers: against formulas written out step by step, and in use."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_same, cotangent
from hypothesis import given
from hypothesis import strategies as st
from pairs import OPTIONS as CELLS
from pairs import H, I, make, tensors_of
from test_resets_lengths import by_ours, by_packing, by_segments, results
from torch import Tensor, nn

import rnnfast

pytestmark = pytest.mark.usefixtures("default_device")
F64 = torch.float64


def layer_projection(layer: Any, weights: list[Tensor]) -> Tensor:
    """weight_hr, which comes last but for the peepholes' weights."""
    return weights[-2 if layer.peephole else -1]


def extra_names(layer: Any, name: str) -> list[str]:
    """The parameters that torch.nn has not, of the layer and direction of ``name``."""
    suffix = name.removeprefix("weight_ih")
    if getattr(layer, "peephole", False):
        return [f"weight_ch{suffix}"]
    if not getattr(layer, "layer_norm", False):
        return []
    names = ["weight_ln_ih", "weight_ln_hh"]
    if isinstance(layer, nn.LSTM):
        names += ["weight_ln_c", "bias_ln_c"][: 1 + layer.bias]
    return [f"{name}{suffix}" for name in names]


def plain_step(
    layer: Any, weights: list[Tensor], x: Tensor, h: Tensor, c: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One step as the papers print it: a matrix for each gate. x [N, I], h [N, P], c [N, H], mask [N, P]."""
    gates = layer.weight_ih_l0.shape[0] // layer.hidden_size
    w_ih, w_hh = (weights[i].chunk(gates) for i in (0, 1))
    zeros = (x.new_zeros(layer.hidden_size),) * gates
    b_ih, b_hh = (weights[i].chunk(gates) if layer.bias else zeros for i in (2, 3))

    norms = weights[4 if layer.bias else 2 :] if getattr(layer, "layer_norm", False) else []

    def given(g: int) -> Tensor:
        if norms:
            return F.layer_norm(x @ weights[0].T, (gates * layer.hidden_size,), norms[0]).chunk(gates, -1)[g] + b_ih[g]
        return x @ w_ih[g].T + b_ih[g]

    def recurrent(g: int, state: Tensor = h) -> Tensor:
        masked = state if mask is None else mask * state
        if norms:
            whole = F.layer_norm(masked @ weights[1].T, (gates * layer.hidden_size,), norms[1])
            return whole.chunk(gates, -1)[g] + b_hh[g]
        return masked @ w_hh[g].T + b_hh[g]

    if isinstance(layer, nn.RNN):
        return getattr(torch, layer.nonlinearity)(given(0) + recurrent(0)), c
    if isinstance(layer, nn.LSTM):
        w = weights[-1].view(-1, layer.hidden_size) if layer.peephole else c.new_zeros(3, 1)
        i = torch.sigmoid(given(0) + recurrent(0) + w[0] * c)
        f = 1 - i if layer.coupled else torch.sigmoid(given(1) + recurrent(1) + w[1] * c)
        c = f * c + i * torch.tanh(given(gates - 2) + recurrent(gates - 2))
        seen = F.layer_norm(c, c.shape[-1:], *norms[2:]) if norms else c
        h = torch.sigmoid(given(gates - 1) + recurrent(gates - 1) + w[-1] * c) * torch.tanh(seen)
        return (h @ layer_projection(layer, weights).T if layer.proj_size else h), c
    n = gates - 1
    if gates == 3 and layer.reset_after:  # torch's own, for the masks
        r, z = torch.sigmoid(given(0) + recurrent(0)), torch.sigmoid(given(1) + recurrent(1))
        return z * h + (1 - z) * torch.tanh(given(2) + r * recurrent(2)), c
    if layer.gates == "update":
        candidate = torch.tanh(given(n) + recurrent(n))
    else:
        r = torch.sigmoid(given(0) + recurrent(0))
        candidate = torch.tanh(given(n) + (r * recurrent(n) if layer.reset_after else recurrent(n, r * h)))
    if layer.gates == "reset":
        return candidate, c
    z = torch.sigmoid(given(n - 1) + recurrent(n - 1))
    return z * h + (1 - z) * candidate, c


def by_hand(layer: Any, x: Tensor, hx: Any, masks: Any = None) -> tuple[Tensor, Any]:
    """All layers, directions and steps.

    ``masks(d, batch)`` gives those of direction ``d`` of all: of h in the products [N, P], and the shares of h and c
    that stay [T, N, H]; each None or a number or a tensor.
    """
    steps = x.transpose(0, 1) if layer.batch_first else x
    directions = 1 + layer.bidirectional
    rows, batch = layer.num_layers * directions, steps.shape[1]
    zeros = [steps.new_zeros(rows, batch, size) for size in (layer.proj_size or layer.hidden_size, layer.hidden_size)]
    h0, c0 = zeros if hx is None else (hx, zeros[1]) if isinstance(hx, Tensor) else hx
    final_h, final_c = [], []
    for first in range(0, rows, directions):
        outputs = []
        for d in range(first, first + directions):
            names = layer._all_weights[d]
            names = [*names, *extra_names(layer, names[0])]
            weights = [getattr(layer, name) for name in names]
            h, c, every = h0[d], c0[d], {}
            order = range(len(steps))
            mask, keep_h, keep_c = masks(d, batch) if masks else (None, None, None)
            for t in reversed(order) if d > first else order:
                new_h, new_c = plain_step(layer, weights, steps[t], h, c, mask)
                h = new_h if keep_h is None else keep_h[t] * h + (1 - keep_h[t]) * new_h
                c = new_c if keep_c is None else keep_c[t] * c + (1 - keep_c[t]) * new_c
                every[t] = h
            outputs.append(torch.stack([every[t] for t in order]))
            final_h.append(h)
            final_c.append(c)
        steps = torch.cat(outputs, -1)
    h_n, c_n = torch.stack(final_h), torch.stack(final_c)
    output = steps.transpose(0, 1) if layer.batch_first else steps
    return output, (h_n, c_n) if isinstance(layer, nn.LSTM) else h_n


@st.composite
def problems(draw, name: str, shortest: int = 0):
    """A layer, a batch for it, hx, lengths and resets."""
    steps, batch = draw(st.integers(1, 7)), draw(st.sampled_from([1, 2, 3, 6, 19]))
    options = {
        "num_layers": draw(st.integers(1, 3)),
        "bidirectional": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bias": draw(st.booleans()),
    }
    is_lstm = CELLS[name][0] == "LSTM"
    if is_lstm and name != "lstm_layer_norm" and draw(st.booleans()):
        options["proj_size"] = 2
    torch.manual_seed(draw(st.integers(0, 2**16)))
    layer = make(name, I, draw(st.sampled_from([H, 17])), dtype=F64, **options)
    x = torch.randn(steps, batch, I, dtype=F64)
    x = x.transpose(0, 1).contiguous() if options["batch_first"] else x
    rows = options["num_layers"] * (1 + options["bidirectional"])
    hx = None
    if draw(st.booleans()):
        hx = [torch.randn(rows, batch, options.get("proj_size", layer.hidden_size), dtype=F64)]
        hx += [torch.randn(rows, batch, layer.hidden_size, dtype=F64)] if is_lstm else []
    lengths = torch.tensor(draw(st.lists(st.integers(shortest, steps), min_size=batch, max_size=batch)))
    resets = torch.rand(steps, batch) < draw(st.sampled_from([0.0, 0.2, 0.5, 1.0]))
    return layer, x, hx, lengths, resets


@pytest.mark.parametrize("name", CELLS)
@given(data=st.data())
def test_equals_the_formula(name, data):
    """Outputs, final states and the gradients of input, states and every parameter, in float64."""
    layer, x, hx, _, _ = data.draw(problems(name))
    assert_same(results(layer, lambda m, x, hx: m(x, hx), x, hx), results(layer, by_hand, x, hx))


@pytest.mark.parametrize("name", CELLS)
@given(data=st.data())
def test_resets_and_lengths_equal_separate_calls(name, data):
    """Every boundary cuts a sequence in two, in both directions and all layers."""
    layer, x, hx, lengths, resets = data.draw(problems(name))
    want = results(layer, by_segments(resets, lengths), x, hx)
    assert_same(results(layer, by_ours(layer, resets, lengths), x, hx), want)


@pytest.mark.parametrize("name", CELLS)
@given(data=st.data())
def test_packed(name, data):
    """A PackedSequence gives what lengths give."""
    layer, x, hx, lengths, _ = data.draw(problems(name, shortest=1))
    want = results(layer, by_packing(lengths), x, hx)
    assert_same(results(layer, by_ours(layer, None, lengths), x, hx), want)


@pytest.mark.parametrize("name", CELLS)
def test_derivatives(name):
    """First and second, against finite differences, through lengths and resets."""
    layer = make(name, 2, 3, num_layers=2, bidirectional=True, dtype=F64)
    x = torch.randn(3, 2, 2, dtype=F64, requires_grad=True)
    lengths, resets = torch.tensor([2, 3]), torch.tensor([[False, True], [True, False], [False, False]])
    weights = list(layer.parameters())

    def call(x, *_):
        return tuple(tensors_of(layer(x, lengths=lengths, resets=resets)))

    assert torch.autograd.gradcheck(call, (x, *weights), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, *weights), fast_mode=True)


@pytest.mark.cpu_only("a device has no threads of ours")
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("steps", "batch", "hidden"), [(6, 1, 300), (4, 3, 400), (9, 70, 40)])
@pytest.mark.parametrize("name", CELLS)
def test_threads(name, threads, steps, batch, hidden):
    """However the units or the batch are split."""
    torch.set_num_threads(threads)
    layer = make(name, I, hidden, dtype=F64)
    x = torch.randn(steps, batch, I, dtype=F64)
    assert_same(results(layer, lambda m, x, hx: m(x, hx), x, None), results(layer, by_hand, x, None))


@pytest.mark.parametrize("name", [name for name in CELLS if name.startswith("lstm")])
def test_cells_of_an_lstm_variant(name):
    """return_cells gives c of all steps: the last is c_n."""
    layer = make(name, dtype=F64)
    x = torch.randn(4, 2, I, dtype=F64, requires_grad=True)
    _, (_, c_n), cells = layer(x, return_cells=True)
    assert torch.equal(cells[-1], c_n[0])
    states = [layer(x[: t + 1])[1][1][0] for t in range(4)]
    want = torch.stack(states)
    torch.testing.assert_close(cells, want, rtol=1e-12, atol=1e-13)
    leaves = [x, *layer.parameters()]
    for have, expected in zip(
        torch.autograd.grad(cells, leaves, cotangent(cells), materialize_grads=True),
        torch.autograd.grad(want, leaves, cotangent(want), materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(have, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", CELLS)
def test_as_a_module(name):
    """Parameters hold the gates there are, with torch's names and spread; copies, pickles and checkpoints keep all."""
    class_name, own, gates = CELLS[name]
    layer = make(name, num_layers=2, bidirectional=True)
    stock = getattr(nn, class_name)(I, H, num_layers=2, bidirectional=True)
    more = [name for names in layer._all_weights for name in extra_names(layer, names[0])]
    assert layer.state_dict().keys() == {*stock.state_dict(), *more}
    for key, value in layer.state_dict().items():
        if "_ln_" in key:
            assert value.shape == (H if "_c_" in key else gates * H,) and (value == key.startswith("weight")).all()
            continue
        rows = H * (gates if key not in more else gates - 1)
        assert value.shape == (rows, *(() if key in more else stock.state_dict()[key].shape[1:]))
        assert value.abs().max() <= H**-0.5 and value.std() > 0.2 * H**-0.5
    said = ", ".join(f"{key}={value!r}" for key, value in own.items())
    assert all(part in repr(layer) for part in said.split(", "))
    x = torch.randn(4, 2, I)
    other = make(name, num_layers=2, bidirectional=True)
    other.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        assert repr(twin) == repr(layer)
        assert torch.equal(twin(x)[0], layer(x)[0])
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(3.0)
    layer.reset_parameters()
    assert not torch.equal(layer(x)[0], other(x)[0])
    assert all((value == key.startswith("weight")).all() for key, value in layer.state_dict().items() if "_ln_" in key)
    assert layer.double().to(torch.float64)(x.double())[0].dtype == torch.float64
    (plan, *_) = rnnfast.explain(layer, x.double()).plans
    assert plan.cell == name


@pytest.mark.parametrize("class_name", ["GRU", "LSTM", "RNN"])
def test_plain_layers_stay_torchs(class_name):
    """No attribute, parameter or word more; a living torch.nn module still becomes one of ours."""
    stock, ours = getattr(nn, class_name)(I, H), getattr(rnnfast, class_name)(I, H)
    assert vars(stock).keys() == vars(ours).keys() and repr(stock) == repr(ours)
    x = torch.randn(4, 2, I)
    want = stock(x)[0]
    stock.__class__ = getattr(rnnfast, class_name)
    torch.testing.assert_close(stock(x)[0], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("class_name", "options", "match"),
    [
        ("GRU", {"gates": "update", "reset_after": False}, "there is no reset gate"),
        ("GRU", {"gates": "forget"}, "gates should be 'both', 'reset' or 'update', got: 'forget'"),
        ("GRU", {"reset_after": 0}, "reset_after should be of type bool, got: int"),
        ("LSTM", {"coupled": 1}, "coupled should be of type bool, got: int"),
        ("LSTM", {"peephole": 1}, "peephole should be of type bool, got: int"),
        ("LSTM", {"zoneout": 1.5}, r"zoneout should be a number in range \[0, 1\], got: 1.5"),
        ("LSTM", {"zoneout": (0.5, -1)}, r"zoneout\[1\] should be a number in range \[0, 1\], got: -1"),
        ("LSTM", {"zoneout": (0.5, 0.5, 0.5)}, r"zoneout should be a number in range"),
        ("GRU", {"zoneout": (0.5, 0.5)}, r"GRU: zoneout should be a number in range"),
        ("LSTM", {"zoneout": 0.5, "proj_size": 2}, "zoneout does not go with proj_size"),
        ("RNN", {"recurrent_dropout": True}, r"recurrent_dropout should be a number in range \[0, 1\], got: True"),
        ("GRU", {"recurrent_dropout": -0.1}, r"recurrent_dropout should be a number in range \[0, 1\], got: -0.1"),
        ("GRU", {"layer_norm": 1}, "layer_norm should be of type bool, got: int"),
        ("LSTM", {"layer_norm": 1}, "layer_norm should be of type bool, got: int"),
        ("GRU", {"layer_norm": True, "reset_after": False}, "layer_norm does not go with reset_after=False"),
        ("GRU", {"layer_norm": True, "gates": "reset"}, "layer_norm does not go with gates='reset'"),
        ("LSTM", {"layer_norm": True, "peephole": True}, "layer_norm does not go with peephole"),
        ("LSTM", {"layer_norm": True, "coupled": True}, "layer_norm does not go with coupled"),
        ("LSTM", {"layer_norm": True, "proj_size": 2}, "layer_norm does not go with proj_size"),
        ("RNN", {"layer_norm": True}, "unexpected keyword argument 'layer_norm'"),
        ("GRU", {"peephole": True}, "unexpected keyword argument 'peephole'"),
        ("GRU", {"coupled": True}, "unexpected keyword argument 'coupled'"),
        ("LSTM", {"reset_after": False}, "unexpected keyword argument 'reset_after'"),
        ("RNN", {"gates": "reset"}, "unexpected keyword argument 'gates'"),
    ],
)
def test_refused_options(class_name, options, match):
    """An option that a cell has not, or that has no such value."""
    with pytest.raises((TypeError, ValueError), match=match):
        getattr(rnnfast, class_name)(I, H, **options)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", CELLS)
def test_no_way_to_torch(name):
    """What torch.nn cannot express stays ours, and says so."""
    class_name, own, _ = CELLS[name]
    layer = make(name)
    said = next(iter(own))
    with pytest.raises(ValueError, match=f"torch.nn.{class_name} has no .*{said}"):
        layer.to_torch()
    with pytest.raises(ValueError, match=f"torch.nn.{class_name} has no .*{said}"):
        torch.jit.script(nn.Sequential(layer))
    model = nn.Sequential(layer, nn.Linear(H, 1))
    (report,) = rnnfast.revert(model)
    assert not report.changed and said in report.reason and type(layer) is getattr(rnnfast, class_name)
    (report,) = rnnfast.convert(model)
    assert report.reason == "it is rnnfast's already"


@pytest.mark.parametrize("name", CELLS)
def test_wrong_weights_are_named(name):
    """Sizes are those of the cell's own gates."""
    layer = make(name)
    extras = extra_names(layer, "weight_ih_l0")
    for extra in extras:
        kept = getattr(layer, extra)
        setattr(layer, extra, nn.Parameter(torch.randn(7 * H)))
        with pytest.raises(RuntimeError, match=rf"{extra} must have the shape \(\d+,\)"):
            layer(torch.randn(4, 2, I))
        setattr(layer, extra, kept)
    if len(extras) > 1:  # together they are as long as they should be
        gain, other = getattr(layer, extras[0]), getattr(layer, extras[1])
        setattr(layer, extras[0], nn.Parameter(torch.cat([gain, gain[:1]])))
        setattr(layer, extras[1], nn.Parameter(other[1:]))
        with pytest.raises(RuntimeError, match=rf"{extras[0]} must have the shape \(\d+,\)"):
            layer(torch.randn(4, 2, I))
        setattr(layer, extras[0], gain)
        setattr(layer, extras[1], other)
    layer.weight_hh_l0 = nn.Parameter(torch.randn(7 * H, H))
    with pytest.raises(RuntimeError, match=rf"weight_hh_l0 must have the shape \({CELLS[name][2] * H}, {H}\)"):
        layer(torch.randn(4, 2, I))


@pytest.mark.parametrize("name", CELLS)
def test_compile_and_export(name):
    """One graph, the same numbers."""
    layer = make(name)
    x = torch.randn(4, 2, I)
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x)[0], layer(x)[0])
    program = torch.export.export(layer, (x,), strict=False)
    torch.testing.assert_close(program.module()(x)[0], layer(x)[0])


@pytest.mark.parametrize("name", CELLS)
def test_look_up_in_a_language_model(name):
    """Tokens give what their one-hot rows give."""
    model = rnnfast.RNNLM(make(name, 11, 16), 11).eval()
    prompt = torch.tensor([1, 5, 2, 7])
    rows = torch.nn.functional.one_hot(prompt, 11).float()
    torch.testing.assert_close(model(prompt)[0], model.output(model.rnn(rows)[0]), rtol=1e-5, atol=1e-6)


@pytest.mark.cpu_only("the loop runs on the CPU")
@pytest.mark.parametrize("name", CELLS)
def test_generation_by_a_language_model(name):
    """The C++ loop that writes: what feeding tokens one by one gives."""
    torch.manual_seed(0)
    model = rnnfast.RNNLM(make(name, 11, 16), 11).eval()
    prompt = torch.tensor([1, 5, 2, 7])
    written, _ = model.generate(prompt, 6)
    tokens = prompt
    for _ in range(6):
        tokens = torch.cat([tokens, model(tokens)[0][-1].argmax().view(1)])
    assert written.tolist() == tokens[4:].tolist()


# --- Masks on the recurrent path --------------------------------------------------------------------------------------

PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "gru": ("GRU", {}),
    "lstm": ("LSTM", {}),
    **{name: (class_name, own) for name, (class_name, own, _) in CELLS.items()},
}


def masked(name: str, *sizes: int, **options: Any) -> Any:
    """A layer of any cell, with options."""
    class_name, own = PLAIN[name]
    return getattr(rnnfast, class_name)(*(sizes or (I, H)), **(own | {"dtype": F64} | options))


def draw(layer: Any, x: Tensor):
    """The masks that a call in training draws, in its order: for each layer and direction of h, then of its states."""

    def masks(d: int, batch: int):
        steps = x.shape[1 if layer.batch_first else 0]
        zoneouts = layer.zoneout if isinstance(layer.zoneout, tuple) else (layer.zoneout,) * 2
        dropped = None
        if layer.recurrent_dropout:
            ones = torch.ones(batch, layer.proj_size or layer.hidden_size, dtype=x.dtype)
            dropped = torch.dropout(ones, layer.recurrent_dropout, True)
        kept = [
            torch.empty(steps, batch, layer.hidden_size, dtype=x.dtype).bernoulli_(p) if p else None
            for p in zoneouts[: 1 + isinstance(layer, nn.LSTM)]
        ]
        return dropped, kept[0], kept[1] if len(kept) == 2 else None

    return masks


@pytest.mark.parametrize(
    "options", [{"zoneout": 0.3}, {"recurrent_dropout": 0.4}, {"zoneout": 0.2, "recurrent_dropout": 0.5}]
)
@pytest.mark.parametrize("name", PLAIN)
def test_masks_in_training(name, options):
    """Torch's numbers, drawn once a call; outputs, states and all gradients are those of the formula with them."""
    for more in ({}, {"num_layers": 2, "bidirectional": True, "batch_first": True}):
        layer = masked(name, **options, **more)
        x = torch.randn(5, 5, I, dtype=F64)
        names = results(layer, lambda m, x, hx: (torch.manual_seed(3), m(x, hx))[1], x, None)
        want = results(layer, lambda m, x, hx: (torch.manual_seed(3), by_hand(m, x, hx, draw(m, x)))[1], x, None)
        assert_same(names, want)
        torch.manual_seed(3)
        first = layer(x)[0]
        assert not torch.equal(layer(x)[0], first)
        torch.manual_seed(3)
        assert torch.equal(layer(x)[0], first)


@pytest.mark.parametrize("name", PLAIN)
def test_masks_in_evaluation(name):
    """Zoneout is the mean of old and new, recurrent dropout nothing; no random number is drawn."""
    layer = masked(name, zoneout=0.25, recurrent_dropout=0.5, num_layers=2).eval()
    x = torch.randn(5, 3, I, dtype=F64)

    def shares(d: int, batch: int):
        return None, [0.25] * 5, [0.25] * 5

    before = torch.get_rng_state()
    have = results(layer, lambda m, x, hx: m(x, hx), x, None)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(have, results(layer, lambda m, x, hx: by_hand(m, x, hx, shares), x, None))
    layer.zoneout = 0.0
    plain = masked(name, num_layers=2)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x)[0], plain(x)[0])


def test_zoneout_of_h_and_c_apart():
    """A pair is that of h and that of c; all of a state stays at 1."""
    x = torch.randn(5, 3, I, dtype=F64)
    h, c = torch.randn(1, 3, H, dtype=F64), torch.randn(1, 3, H, dtype=F64)
    for training in (True, False):
        output, (h_n, c_n) = masked("lstm", zoneout=(1.0, 0.0)).train(training)(x, (h, c))
        assert torch.equal(h_n, h) and torch.equal(output, h.expand_as(output)) and not torch.equal(c_n, c)
        _, (h_n, c_n) = masked("lstm", zoneout=(0.0, 1.0)).train(training)(x, (h, c))
        assert torch.equal(c_n, c) and not torch.equal(h_n, h)
    layer = masked("lstm", zoneout=(0.5, 0.0))
    assert "zoneout=(0.5, 0.0)" in repr(layer)


def test_recurrent_dropout_of_everything():
    """At 1 no step sees the one before."""
    layer = masked("rnn_tanh", recurrent_dropout=1.0)
    x = torch.randn(5, 3, I, dtype=F64)
    alone = torch.cat([layer(step)[0] for step in x.split(1)])
    torch.testing.assert_close(layer(x)[0], alone)


@pytest.mark.parametrize("name", PLAIN)
def test_masks_with_lengths_packing_and_projection(name):
    """The same seed, the same mask: a packed batch drops what a padded one with its lengths does."""
    options = {"proj_size": 2} if name.startswith("lstm") and name != "lstm_layer_norm" else {}
    layer = masked(name, recurrent_dropout=0.5, bidirectional=True, **options)
    x, lengths = torch.randn(5, 3, I, dtype=F64), torch.tensor([5, 3, 1])

    def seeded(function):
        return lambda m, x, hx: (torch.manual_seed(5), function(m, x, hx))[1]

    want = results(layer, seeded(by_packing(lengths)), x, None)
    assert_same(results(layer, seeded(by_ours(layer, None, lengths)), x, None), want)


def test_a_living_module_gets_masks():
    """An option set on a converted layer counts; with it torch.nn cannot have the layer back."""
    layer = nn.LSTM(I, H)
    layer.__class__ = rnnfast.LSTM
    x = torch.randn(4, 2, I)
    plain = layer(x)[0]
    layer.zoneout = 0.5
    assert not torch.equal(layer(x)[0], plain)
    with pytest.raises(ValueError, match=r"has no zoneout=0\.5"):
        layer.to_torch()
    layer.zoneout = 0.0
    assert torch.equal(layer(x)[0], plain) and type(layer.to_torch()) is nn.LSTM


def test_masks_compile_export_and_vmap():
    """In one graph; export in evaluation; vmap draws a mask for each example when it is asked to."""
    layer = masked("gru", zoneout=0.3, recurrent_dropout=0.5, dtype=torch.float32)
    x = torch.randn(4, 2, I)
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        outputs = compiled(x)[0]
        assert outputs.shape == (4, 2, H) and not torch.equal(compiled(x)[0], outputs)
        torch.testing.assert_close(torch.compile(layer.eval(), backend="aot_eager", fullgraph=True)(x)[0], layer(x)[0])
    torch.testing.assert_close(torch.export.export(layer, (x,), strict=False).module()(x)[0], layer(x)[0])
    layer.train()
    xs = x.expand(3, 4, 2, I)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(lambda x: layer(x)[0])(xs)
    torch.manual_seed(1)
    same = torch.func.vmap(lambda x: layer(x)[0], randomness="same")(xs)
    torch.testing.assert_close(same[0], same[1])


@pytest.mark.cpu_only("the loops run on the CPU")
def test_masks_in_the_loops_of_the_heads():
    """Generation and forecasting run as in evaluation, zoneout included."""
    torch.manual_seed(0)
    layer = rnnfast.LSTM(11, 16, peephole=True, zoneout=(0.3, 0.6), recurrent_dropout=0.5, num_layers=2)
    model = rnnfast.RNNLM(layer, 11).eval()
    tokens = torch.tensor([1, 5, 2, 7])
    written, _ = model.generate(tokens, 6)
    for _ in range(6):
        tokens = torch.cat([tokens, model(tokens)[0][-1].argmax().view(1)])
    assert written.tolist() == tokens[4:].tolist()
    forecaster = rnnfast.RNNAutoRegression(rnnfast.GRU(1, 6, zoneout=0.4), tau=4).eval()
    series = torch.randn(9, 3, 1)
    mean = forecaster.forecast(series, 3).mean
    values = series
    for _ in range(3):
        values = torch.cat([values, forecaster.forecast(values, 1).mean])
    torch.testing.assert_close(mean, values[9:])
    torch.testing.assert_close(mean[0], forecaster(series)[0].mean[-1])
