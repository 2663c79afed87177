"""``recompute``: the numbers of a call without it, first and second derivatives too, from less memory."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from agreement import assert_same, cotangent, evaluate
from pairs import LAYERS, make
from strategies import MASKS, Call, Case
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import rnnfast
from rnnfast.reference import CELLS as REFERENCES

# With 70 sequences a part has 8 steps: two whole parts, and one of 3.
T, N, I, H = 19, 70, 3, 5  # noqa: E741  (the letter of the whole code base)
LENGTHS = tuple(n * 7 % (T + 1) for n in range(N))
VARIANTS = {
    "plain": {},
    "no-state": {"h0": False, "c0": False, "bias": False},
    "lengths": {"lengths": LENGTHS, "resets": True},
    "short": {"lengths": (2,) + (0,) * (N - 1)},  # too few rows for the weights to be rearranged, but for the parts
    "packed": {"kind": "packed", "lengths": tuple(sorted((max(1, n) for n in LENGTHS), reverse=True))},
    "masks": {"masks": frozenset(MASKS)},
    "packed-masks": {"kind": "packed", "lengths": (T,) * 30 + (9,) * 20 + (8,) * 20, "masks": frozenset(MASKS)},
    "one-part": {"T": 8},
    "step": {"kind": "step", "T": 1},
}


def variant_call(cell: str, variant: str, **options) -> Call:
    sizes = {"T": T, "N": N, "I": I, "H": H} | VARIANTS[variant] | options
    sizes["masks"] = frozenset(MASKS[: 1 + REFERENCES[cell].num_states]) & sizes.get("masks", frozenset())
    return Case(cell, **sizes).call()


def assert_same_with(call: Call, op=None) -> None:
    op = op or call.op()
    plain = evaluate(call.with_grad(), op)
    assert_same(evaluate(replace(call, options=call.options | {"recompute": True}).with_grad(), op), plain)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_same_gradients(cell, isa, variant, reverse):
    assert_same_with(variant_call(cell, variant, reverse=reverse))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("batch", "size"), [(70, 65), (2, 130)], ids=["batch", "units"])
def test_on_threads(cell, threads, batch, size):
    """Threads take parts of the batch, or of the units: then a part of two sequences has 256 steps."""
    torch.set_num_threads(threads)
    steps = T if batch == 70 else 300
    assert_same_with(Case(cell, T=steps, N=batch, I=17, H=size, resets=True).call())


@pytest.mark.parametrize("name", ["lstm", "lstm_coupled_peephole"])
def test_projection_and_all_cells(name):
    """With a projection; and from a gradient of c at all steps."""
    call = variant_call(name, "lengths", P=3, reverse=True)
    assert_same_with(call)
    op = getattr(torch.ops.rnnfast, f"{name}_all_c").default
    results = []
    for recompute in (False, True):
        leaves = replace(call, options=call.options | {"recompute": recompute}).with_grad()
        outputs = leaves(op)
        grads = torch.autograd.grad(outputs, list(leaves.tensors.values()), [cotangent(y) for y in outputs])
        results.append({str(i): t.detach() for i, t in enumerate([*outputs, *grads])})
    assert_same(results[1], results[0])


@pytest.mark.few_cells
def test_tokens(cell):
    call = variant_call(cell, "lengths")
    call.tensors["input"] = torch.randint(I, (T, N))
    results = []
    for recompute in (False, True):
        leaves = {n: t.clone().requires_grad_(t.is_floating_point()) for n, t in call.tensors.items()}
        made = replace(call, tensors=leaves, options=call.options | {"recompute": recompute})
        outputs = made(call.op())[: 1 + REFERENCES[cell].num_states]
        inputs = [t for t in leaves.values() if t.is_floating_point()]
        grads = torch.autograd.grad(outputs, inputs, [cotangent(y) for y in outputs])
        results.append({str(i): t.detach() for i, t in enumerate([*outputs, *grads])})
    assert_same(results[1], results[0])


@pytest.mark.few_cells
@pytest.mark.parametrize("members", [1, 2])
def test_stacked_weights(cell, members):
    call = Case(cell, T=T, N=70 * members, H=H, resets=True).call()
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_ch", "weight_ln"):
        if name in call.tensors:
            call.tensors[name] = torch.stack([call.tensors[name] * (1 + e) for e in range(members)])
    assert_same_with(call)


@pytest.mark.parametrize("variant", ["plain", "packed", "step"])
@pytest.mark.few_cells
def test_opcheck(cell, variant):
    """Schema, fake kernels and autograd registration of the op and of those that it calls."""
    call = variant_call(cell, variant)
    call = replace(call, options=call.options | {"recompute": True})
    torch.library.opcheck(call.op(), tuple(call.with_grad().everything()))
    forward = getattr(torch.ops.rnnfast, f"_{cell}_forward").default
    torch.library.opcheck(forward, tuple(call.everything()), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.few_cells
def test_second_derivatives(cell):
    call = variant_call(cell, "lengths", N=70, H=2, I=1)
    results = []
    for recompute in (False, True):
        leaves = replace(call, options=call.options | {"recompute": recompute}).with_grad()
        tensors = list(leaves.tensors.values())
        output = leaves(call.op())[0]
        grads = torch.autograd.grad(output, tensors, cotangent(output), create_graph=True)
        seconds = torch.autograd.grad(grads, tensors, [cotangent(g, 2) for g in grads])
        results.append(dict(zip(leaves.tensors, seconds, strict=True)))
    assert_same(results[1], results[0])


# --- The option of the layers -----------------------------------------------------------------------------------------


def kept_bytes(layer, x: Tensor) -> int:
    """What a training call saves, besides arguments and weights."""
    sizes: dict[int, int] = {}
    given = {t.data_ptr() for t in (x, *layer.parameters())}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in given:
            sizes[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(sizes.values())


def twins(cell: str, **options):
    """A layer without and one with recompute, of the same weights."""
    plain, sparing = make(cell, I, H, **options), make(cell, I, H, recompute=True, **options)
    sparing.load_state_dict(plain.state_dict())
    return plain, sparing


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "dropout": 0.3}], ids=["one", "many"])
@pytest.mark.parametrize("kind", ["padded", "packed", "lengths", "masks"])
def test_layers(cell, kind, options):
    """Gradients of the layer's weights and input, dropout and masks from the same random numbers."""
    masks = {"zoneout": 0.2, "recurrent_dropout": 0.2} if kind == "masks" else {}
    results = []
    x = torch.randn(T, N, I, dtype=torch.float64)
    for layer in twins(cell, dtype=torch.float64, **options, **masks):
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        given = (
            pack_padded_sequence(leaf, [max(1, n) for n in LENGTHS], enforce_sorted=False) if kind == "packed" else leaf
        )
        output = layer(given, lengths=LENGTHS)[0] if kind == "lengths" else layer(given)[0]
        output = output.data if kind == "packed" else output
        grads = torch.autograd.grad(output, [leaf, *layer.parameters()], cotangent(output))
        results.append({str(i): t.detach() for i, t in enumerate([output, *grads])})
    assert_same(results[1], results[0])


@pytest.mark.parametrize("name", LAYERS)
def test_less_is_kept(name):
    """A part of 8 steps keeps one state, where without the option each step keeps its gates too."""
    plain, sparing = (kept_bytes(layer, torch.randn(80, 64, I)) for layer in twins(name))
    states = 2 if name == "lstm" else 1
    assert sparing == 9 * 64 * H * states * 4 < plain / 7


def test_one_option_of_many():
    layer = rnnfast.LSTM(I, H, recompute=True)
    assert "recompute=True" in repr(layer) and "recompute" not in repr(rnnfast.LSTM(I, H))
    assert pickle.loads(pickle.dumps(layer)).recompute and copy.deepcopy(layer).recompute
    stock = layer.to_torch()  # changes no result, so that torch.nn's layer can stand for it
    assert type(stock) is torch.nn.LSTM and "recompute" not in vars(stock)
    for name in ("RNN", "GRU", "LSTM"):
        with pytest.raises(TypeError, match=f"{name}: recompute should be of type bool, got: int"):
            getattr(rnnfast, name)(I, H, recompute=1)


def test_per_sample_gradients():
    """Inside a transform everything is kept, and the numbers are the same."""
    results = []
    x = torch.randn(N, T, I, dtype=torch.float64)
    for layer in twins("gru", dtype=torch.float64):

        def loss(parameters, sample, layer=layer):
            return torch.func.functional_call(layer, parameters, (sample,))[0].square().sum()

        parameters = {name: p.detach() for name, p in layer.named_parameters()}
        results.append(torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x))
    assert_same(results[1], results[0])


def test_compiled(monkeypatch):
    """Under torch.compile, of dynamic sizes, less is kept too."""
    monkeypatch.setattr(torch._dynamo.config, "allow_rnn", True)
    plain, sparing = twins("lstm", dtype=torch.float64)
    compiled = torch.compile(sparing, fullgraph=True, dynamic=True, backend="aot_eager")
    for steps, batch in ((T, N), (40, 3)):
        x = torch.randn(steps, batch, I, dtype=torch.float64, requires_grad=True)
        results = []
        for layer in (plain, compiled):
            output = layer(x)[0]
            results.append({"x": torch.autograd.grad(output, x, cotangent(output))[0]})
        assert_same(results[1], results[0])
