"""What real programs rely on in torch.nn's layers: each habit found in their source, as a small stand-in."""

import copy
import importlib
import inspect

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_same
from pairs import (
    CELL_MODULES,
    CLASSES,
    IGNORE_TORCH,
    LAYERS,
    H,
    I,
    N,
    T,
    assert_agree,
    evaluate_module,
    make_input,
    make_state,
    pair,
    tensors_of,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnnfast

pytestmark = pytest.mark.filterwarnings(IGNORE_TORCH)
F64 = torch.float64


@pytest.mark.parametrize("name", CLASSES)
def test_is_a_torch_module(name):
    """isinstance and issubclass, also against the base classes; the class itself is our own."""
    ours, theirs = getattr(rnnfast, name), getattr(nn, name)
    assert issubclass(ours, theirs) and ours is not theirs
    assert ours.__bases__ == (theirs,)
    assert issubclass(ours, nn.RNNCellBase if name.endswith("Cell") else nn.RNNBase)
    assert isinstance(ours(I, H), theirs)
    if not name.endswith("Cell"):
        assert ours(I, H).mode == theirs(I, H).mode


@pytest.mark.parametrize("name", CLASSES)
def test_type_equality_by_to_torch(name):
    """`type(m) == nn.GRU` cannot be served; to_torch() can."""
    assert type(getattr(rnnfast, name)(I, H).to_torch()) is getattr(nn, name)


@pytest.mark.parametrize("layer", LAYERS)
def test_subclass_with_cooperative_super(layer):
    """A user's subclass that wraps construction and forward, with a mix-in behind it."""

    class Counting:
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            self.calls = 0

    def make(base: type) -> type:
        class Mine(Counting, base):
            def __init__(self, *args, scale: float, **kwargs) -> None:
                super().__init__(*args, **kwargs)
                self.scale = scale

            def forward(self, x: Tensor, hx=None):
                self.calls += 1
                output, state = super().forward(x * self.scale, hx)
                return output * 2, state

        return Mine

    name, options = LAYERS[layer]
    theirs = make(getattr(nn, name))(I, H, scale=0.5, dtype=F64, **options)
    ours = make(getattr(rnnfast, name))(I, H, scale=0.5, dtype=F64, **options)
    ours.load_state_dict(theirs.state_dict())
    assert_agree(theirs, ours, make_input("batched", theirs, F64))
    assert ours.calls == theirs.calls > 0


@pytest.mark.parametrize("layer", LAYERS)
def test_keywords_and_direct_forward(layer):
    """hx= by keyword, input= too, and forward called without __call__."""
    theirs, ours = pair(layer, dtype=F64)
    x, state = make_input("batched", theirs, F64), make_state("batched", theirs, F64)
    want = tensors_of(theirs(x, state))
    for result in (ours(x, hx=state), ours.forward(x, state), ours(input=x, hx=state), ours.forward(x, hx=state)):
        torch.testing.assert_close(tensors_of(result), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tensors_of(ours(x, None)), tensors_of(theirs(x)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("modules", [LAYERS, CELL_MODULES], ids=["layer", "cell"])
@pytest.mark.parametrize("layer", LAYERS)
def test_class_assignment_on_a_living_module(layer, modules):
    """`m.__class__ = rnnfast.LSTM`: parameters, optimizer state and hooks stay; the way back works too."""
    theirs, _ = pair(layer, modules=modules, dtype=F64)
    ours = copy.deepcopy(theirs)
    optimizers, calls = [], []
    for module in (theirs, ours):
        optimizers.append(torch.optim.Adam(module.parameters(), lr=0.05))
        module.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(N, I, dtype=F64)

    def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        sum(y.square().sum() for y in tensors_of(module(x))).backward()
        optimizer.step()

    own = list(ours.parameters())
    for round_ in range(6):
        if round_ == 2:
            ours.__class__ = getattr(rnnfast, modules[layer][0])
        if round_ == 4:
            ours.__class__ = type(theirs)
        for module, optimizer in zip((theirs, ours), optimizers, strict=True):
            step(module, optimizer)
    assert all(a is b for a, b in zip(own, ours.parameters(), strict=True))
    assert len(calls) == 12
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert type(ours) is type(theirs)


@pytest.mark.parametrize("layer", LAYERS)
def test_caches_stay_out_of_the_module(layer):
    """A call leaves no new name in the module that would be saved, and nothing in state_dict."""
    _, ours = pair(layer)
    before = set(ours.__getstate__())
    ours(make_input("batched", ours))
    with torch.no_grad():
        ours(make_input("batched", ours))
    assert set(ours.__getstate__()) == before
    assert set(ours.state_dict()) == {name for name, _ in ours.named_parameters()}


class WeightDrop(nn.Module):
    """Merity's weight drop: the raw weight is a parameter, what the layer reads is set before each call."""

    def __init__(self, module: nn.Module, p: float) -> None:
        super().__init__()
        self.module, self.p = module, p
        raw = module.weight_hh_l0
        del module._parameters["weight_hh_l0"]
        module.register_parameter("weight_hh_l0_raw", nn.Parameter(raw.detach()))

    def forward(self, x: Tensor, hx=None):
        self.module.weight_hh_l0 = F.dropout(self.module.weight_hh_l0_raw, self.p, self.training)
        return self.module(x, hx)


@pytest.mark.parametrize("layer", LAYERS)
def test_weight_drop(layer):
    """A non-leaf tensor set as the weight while the name is gone from _parameters: fresh each call, with gradients."""
    wrapped = [WeightDrop(module, 0.5) for module in pair(layer, dtype=F64)]
    x = torch.randn(T, N, I, dtype=F64)
    for seed in (1, 2):
        results = []
        for module in wrapped:
            torch.manual_seed(seed)
            results.append(evaluate_module(module, x))
        assert_same(results[1], results[0])
        assert results[1]["grad_module.weight_hh_l0_raw"].abs().sum() > 0
    assert_agree(wrapped[0].eval(), wrapped[1].eval(), x)


@pytest.mark.parametrize("layer", LAYERS)
def test_weights_swapped_under_the_module(layer):
    """As tensordict's to_module does: a skeleton on the meta device, the _parameters dictionary filled from outside."""
    theirs, _ = pair(layer, dtype=F64, num_layers=2)
    skeleton = pair(layer, dtype=F64, num_layers=2, device="meta")[1]
    x = make_input("batched", theirs, F64)
    empty = dict(skeleton._parameters)
    for factor in (1.0, 0.5):
        values = {name: (p.detach() * factor).requires_grad_() for name, p in theirs.named_parameters()}
        skeleton._parameters.update(values)
        output = skeleton(x)[0]
        with torch.no_grad():
            expected = torch.func.functional_call(theirs, values, (x,))[0]
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
        grads = torch.autograd.grad(output.sum(), [values["weight_hh_l0"], values["bias_ih_l1"]])
        assert all(gradient.abs().sum() > 0 for gradient in grads)
        skeleton._parameters.update(empty)
    assert skeleton(x.to("meta"))[0].device.type == "meta"


@pytest.mark.parametrize("layer", LAYERS)
def test_names_around_the_weights(layer):
    """_flat_weights, _flat_weights_names, _all_weights, all_weights: as in torch.nn, and kept up to date."""
    theirs, ours = pair(layer, num_layers=2, bidirectional=True)
    assert ours._flat_weights_names == theirs._flat_weights_names
    assert ours._all_weights == theirs._all_weights
    ours.weight_hh_l0 = nn.Parameter(torch.zeros_like(ours.weight_hh_l0))
    ours(make_input("batched", ours))
    assert all(
        flat is getattr(ours, name) for flat, name in zip(ours._flat_weights, ours._flat_weights_names, strict=True)
    )
    flat = [weight for weights in ours.all_weights for weight in weights]
    assert all(a is b for a, b in zip(flat, ours._flat_weights, strict=True))


def test_flatten_parameters():
    """Cheap, callable at any time, and replaceable per instance."""
    _, ours = pair("lstm")
    x = make_input("batched", ours)
    want = ours(x)[0]
    ours.flatten_parameters()
    assert torch.equal(ours(x)[0], want)
    ours.flatten_parameters = lambda *args, **kwargs: None
    ours._flat_weights = [getattr(ours, name) for name in ours._flat_weights_names]
    assert torch.equal(ours(x)[0], want)


@pytest.mark.parametrize("name", CLASSES)
def test_documented_and_importable(name):
    """A library copies __doc__ at import; pickle finds the class by its qualified name; the signature is torch's."""
    ours = getattr(rnnfast, name)
    assert ours.__doc__ and len(ours.__doc__.split()) > 10
    assert ours.forward.__doc__ or nn.Module.forward.__doc__
    module = importlib.import_module(ours.__module__)
    assert getattr(module, ours.__qualname__) is ours
    assert list(inspect.signature(ours.forward).parameters)[:3] == ["self", "input", "hx"]


@pytest.mark.parametrize("name", CLASSES)
def test_copied_class_dictionary(name):
    """A library rebuilds the class from its dictionary: no method may rely on zero-argument super()."""
    ours = getattr(rnnfast, name)
    body = {key: value for key, value in vars(ours).items() if key not in ("__dict__", "__weakref__")}
    module = type("Copied", ours.__bases__, body)(I, H)
    x = torch.randn(N, I)
    torch.testing.assert_close(tensors_of(module(x)), tensors_of(module.to_torch()(x)), rtol=1e-5, atol=1e-5)
    assert "__class__" not in {
        cell for f in vars(ours).values() for cell in getattr(getattr(f, "__code__", None), "co_freevars", ())
    }


@pytest.mark.parametrize("layer", LAYERS)
def test_seeded_training_is_torchs(layer):
    """Construction, dropout and a few optimizer steps from one seed end at the same weights as with torch.nn."""
    ends = []
    for library in (nn, rnnfast):
        torch.manual_seed(4)
        name, options = LAYERS[layer]
        module = getattr(library, name)(I, H, num_layers=2, dropout=0.3, dtype=F64, **options)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.2)
        for _ in range(5):
            optimizer.zero_grad()
            module(torch.randn(T, N, I, dtype=F64))[0].square().mean().backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
        ends.append(list(module.parameters()))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layer", LAYERS)
def test_learned_initial_state(layer):
    """A parameter expanded over the batch as hx: its gradient is summed over the batch."""
    grads = []
    x = torch.randn(T, N, I, dtype=F64)
    start = torch.randn(1, 1, H, dtype=F64)
    for module in pair(layer, dtype=F64):
        learned = start.clone().requires_grad_()
        hx = learned.expand(1, N, H)
        module(x, (hx, hx.tanh()) if layer == "lstm" else hx)[0].square().sum().backward()
        grads.append(learned.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer", LAYERS)
def test_truncated_backpropagation(layer):
    """State carried over and detached between windows."""
    totals = []
    x = torch.randn(12, N, I, dtype=F64)
    for module in pair(layer, dtype=F64, num_layers=2):
        state = None
        for window in x.split(4):
            output, state = module(window, state)
            output.square().sum().backward()
            state = tuple(s.detach() for s in state) if layer == "lstm" else state.detach()
        totals.append([p.grad for p in module.parameters()])
    torch.testing.assert_close(totals[1], totals[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer", LAYERS)
def test_ragged_unsorted_with_state(layer):
    """Packed input in the caller's order, with hx and its gradient, in float64 and with every length once."""
    theirs, ours = pair(layer, dtype=F64, bidirectional=True)
    x = torch.randn(7, 9, I, dtype=F64)
    packed = pack_padded_sequence(x, torch.tensor([3, 7, 1, 1, 5, 2, 6, 4, 7]), enforce_sorted=False)
    h, c = torch.randn(2, 2, 9, H, dtype=F64)
    assert_agree(theirs, ours, packed, (h, c) if layer == "lstm" else h)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_one_step_at_a_time(layer, batch_first):
    """T = 1 calls on slices of a longer, non-contiguous input, the state handed on: the same as one call."""
    theirs, ours = pair(layer, dtype=F64, batch_first=batch_first, num_layers=2)
    x = (
        torch.randn(I, 20, N, dtype=F64).permute(2, 1, 0)
        if batch_first
        else torch.randn(N, I, 20, dtype=F64).permute(2, 0, 1)
    )
    dim = 1 if batch_first else 0
    assert not x.is_contiguous()
    state, outputs = None, []
    with torch.no_grad():
        for t in range(20):
            output, state = ours(x.narrow(dim, t, 1), state)
            outputs.append(output)
        want, want_state = theirs(x)
    torch.testing.assert_close(torch.cat(outputs, dim), want, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(tensors_of(state), tensors_of(want_state), rtol=1e-11, atol=1e-12)


def test_projection_in_every_direction_and_layer():
    """proj_size with layers, directions, packing and float64."""
    theirs, ours = pair("lstm", dtype=F64, num_layers=3, bidirectional=True, proj_size=3)
    x = make_input("packed_unsorted", theirs, F64)
    assert_agree(theirs, ours, x, make_state("packed_unsorted", theirs, F64))


class Tagger(nn.Module):
    """An embedding, a layer and a head."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(11, I), rnn, nn.Linear(H, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(tokens))[0])


def test_exact_types_by_to_torch():
    """fx keeps the stock layer as a leaf; dynamic quantization finds it."""
    model = Tagger(pair("lstm")[1].to_torch())
    tokens = torch.randint(11, (T, N))
    traced = torch.fx.symbolic_trace(model)
    assert any(node.op == "call_module" and node.target == "rnn" for node in traced.graph.nodes)
    torch.testing.assert_close(traced(tokens), model(tokens))


def test_model_moves_as_a_whole():
    """A model with our layer inside: double(), half a model frozen, parameters() for an optimizer, eval and train."""
    theirs, ours = pair("gru")
    models = [Tagger(theirs), Tagger(ours)]
    models[1].load_state_dict(models[0].state_dict())
    tokens = torch.randint(11, (T, N))
    results = []
    for model in models:
        model.double().train()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten() % 3).backward()
            optimizer.step()
        results.append(model.eval()(tokens))
    torch.testing.assert_close(results[1], results[0], rtol=1e-8, atol=1e-8)
