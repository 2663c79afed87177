"""convert, revert and patch_torch: what is changed, what is left and why, and that nothing else notices."""

from __future__ import annotations

import abc
import copy
import io
import pickle

import pytest
import torch
from agreement import assert_same
from hypothesis import given
from hypothesis import strategies as st
from pairs import CLASSES, IGNORE_TORCH, evaluate_module, make_input, run_python, tensors_of
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import rnnfast

pytestmark = pytest.mark.filterwarnings(IGNORE_TORCH)
F64 = torch.float64
I, H = 5, 9  # noqa: E741  (the letter of the whole code base)


class Speaker(nn.Module):
    """A program's model: two layers, a cell used step by step, and other things."""

    def __init__(self, **options):
        super().__init__()
        self.embed = nn.Linear(3, I)
        self.rnns = nn.ModuleDict({"up": nn.LSTM(I, H, batch_first=True, **options), "down": nn.GRU(H, H)})
        self.rnns["again"] = self.rnns["down"]
        self.cell = nn.RNNCell(H, H, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnns["up"](self.embed(x))
        y, _ = self.rnns["again"](self.rnns["down"](y)[0])
        return self.cell(y[-1])


class Plain(nn.LSTM):
    """Overrides nothing that matters."""

    extra = 3

    def reset_parameters(self) -> None:
        super().reset_parameters()


class PlainCell(nn.GRUCell):
    """A cell that overrides nothing."""


class Doubling(nn.GRU):
    """A forward around torch.nn's."""

    def forward(self, x, hx=None):
        output, state = super().forward(2 * x, hx)
        return output, state


class OldStyleDoubling(nn.GRU):
    """The same in the style of Python 2."""

    def forward(self, x, hx=None):
        return super(OldStyleDoubling, self).forward(2 * x, hx)  # noqa: UP008


class AbstractHelper(abc.ABC):
    @abc.abstractmethod
    def help(self) -> int: ...


class WithHelper(nn.GRU, AbstractHelper):
    """Another metaclass, and a mix-in behind torch.nn's class."""

    def help(self) -> int:
        return 1


class Own(nn.GRU):
    """A forward of its own."""

    def forward(self, x, hx=None):
        return x, hx


class Lenient(nn.LSTM):
    """Overrides a method that torch.nn's forward calls and ours does not."""

    def check_forward_args(self, input, hidden, batch_sizes) -> None: ...


class Written(rnnfast.GRU):
    """Written for rnnfast."""


class Strange(nn.RNNBase):
    """Of torch.nn's base class, but none of its six."""

    def __init__(self):
        super().__init__("GRU", I, H)

    def forward(self, x):
        return x


def test_a_model_and_back():
    """In place: objects, parameters, order of names, training state; numbers to rounding; the report; and back."""
    model = Speaker(num_layers=2, dropout=0.0).double()
    model.rnns["down"].eval()
    theirs = copy.deepcopy(model)
    modules, parameters = dict(model.named_modules()), list(model.parameters())
    x = torch.randn(4, 6, 3, dtype=F64)
    report = rnnfast.convert(model)
    assert [(c.name, c.before, c.after, c.reason) for c in report] == [
        ("rnns.up", nn.LSTM, rnnfast.LSTM, ""),
        ("rnns.down", nn.GRU, rnnfast.GRU, ""),
        ("cell", nn.RNNCell, rnnfast.RNNCell, ""),
    ]
    assert all(c.changed for c in report)
    assert str(report[0]) == "rnns.up: torch.nn.modules.rnn.LSTM -> rnnfast.modules.LSTM"
    assert all(module is modules[name] for name, module in model.named_modules())
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert [m.training for m in model.modules()] == [m.training for m in theirs.modules()]
    assert list(model.state_dict()) == list(theirs.state_dict()) and repr(model) == repr(theirs)
    assert_same(evaluate_module(model, x), evaluate_module(theirs, x))
    assert [c.reason for c in rnnfast.convert(model)] == ["it is rnnfast's already"] * 3
    back = rnnfast.revert(model)
    assert [(c.name, c.after) for c in back] == [("rnns.up", nn.LSTM), ("rnns.down", nn.GRU), ("cell", nn.RNNCell)]
    assert [type(m) for m in model.modules()] == [type(m) for m in theirs.modules()]
    assert rnnfast.revert(model) == []


@given(data=st.data())
def test_any_module(data):
    """Each of the six alone with any options: outputs and every gradient stay."""
    name = data.draw(st.sampled_from(CLASSES))
    options = {"bias": data.draw(st.booleans())}
    if name.startswith("RNN"):
        options["nonlinearity"] = data.draw(st.sampled_from(["tanh", "relu"]))
    if not name.endswith("Cell"):
        options |= {"num_layers": data.draw(st.integers(1, 2)), "bidirectional": data.draw(st.booleans())}
        options |= {"batch_first": data.draw(st.booleans())}
        if name == "LSTM":
            options["proj_size"] = data.draw(st.sampled_from([0, 3]))
    module = getattr(nn, name)(I, H, dtype=F64, **options)
    x = torch.randn(4, I, dtype=F64)
    if not name.endswith("Cell"):
        x = make_input(data.draw(st.sampled_from(["batched", "unbatched", "packed", "packed_unsorted"])), module, F64)
    want = evaluate_module(module, x)
    (conversion,) = rnnfast.convert(module)
    assert conversion.name == "" and type(module) is conversion.after is getattr(rnnfast, name)
    assert str(conversion).startswith("(the model itself): ")
    assert_same(evaluate_module(module, x), want)
    rnnfast.revert(module)
    assert type(module) is getattr(nn, name)
    assert_same(evaluate_module(module, x), want)


def test_an_optimizer_and_hooks_go_on():
    """Converted in the middle of training, and back: as if nothing had happened."""
    runs = []
    for converts in (False, True):
        torch.manual_seed(5)
        model = Speaker().double()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        calls: list[str] = []
        model.rnns["up"].register_forward_hook(lambda m, a, y, calls=calls: calls.append("forward"))
        model.cell.register_forward_pre_hook(lambda m, a, calls=calls: calls.append("pre"))
        model.embed.weight.register_hook(lambda grad, calls=calls: calls.append("grad"))
        losses = []
        for step in range(6):
            if converts and step == 2:
                rnnfast.convert(model)
            if converts and step == 4:
                rnnfast.revert(model)
            loss = model(torch.linspace(-1, 1, 72, dtype=F64).view(4, 6, 3)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        runs.append((torch.tensor(losses, dtype=F64), calls))
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-9, atol=1e-12)
    assert runs[0][1] == runs[1][1]


@pytest.mark.parametrize("cls", [Plain, Doubling, OldStyleDoubling, WithHelper])
def test_subclasses_keep_their_methods(cls, monkeypatch):
    """Their own class still, by isinstance and name; torch.nn's forward is no longer reached; copies and pickles."""
    module = cls(I, H, dtype=F64)
    theirs = copy.deepcopy(module)
    (conversion,) = rnnfast.convert(module)
    ours = rnnfast.LSTM if cls is Plain else rnnfast.GRU
    assert conversion.changed and conversion.before is cls
    assert str(conversion).endswith(f"test_convert.{cls.__name__} on rnnfast.{ours.__name__}")
    assert isinstance(module, cls) and isinstance(module, ours)
    assert type(module).__name__ == cls.__name__ and repr(module) == repr(theirs)
    x = torch.randn(4, 3, I, dtype=F64)
    want = evaluate_module(theirs, x)
    with monkeypatch.context() as patch:
        patch.setattr(ours.__base__, "forward", None)  # would be called
        assert_same(evaluate_module(module, x), want)
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), pickle.loads(pickle.dumps(module, 0))):
            assert type(twin) is type(module)
            assert_same(evaluate_module(twin, x), want)
    second = cls(I, H)
    rnnfast.convert(second)
    assert type(second) is type(module)  # one class for all of its objects
    rnnfast.revert(module)
    assert type(module) is cls
    assert_same(evaluate_module(module, x), want)


def forward_replaced() -> nn.Module:
    module = nn.GRU(I, H)
    module.forward = lambda x: x
    return module


def small_floats() -> nn.Module:
    module = nn.GRU(I, H)
    for p in module.parameters():
        p.data = p.data.to(torch.float8_e4m3fn)
    return module


def left() -> dict:
    """Modules that stay as they are, and a part of the reason."""
    return {
        "own forward": (Own(I, H), "overrides forward without super"),
        "bypassed method": (Lenient(I, H), "overrides check_forward_args"),
        "replaced forward": (forward_replaced(), "replaced on the object"),
        "other kind": (Strange(), "none of torch.nn's"),
        "ours": (rnnfast.GRU(I, H), "already"),
        "ours, subclassed": (Written(I, H), "already"),
        "small floats": (small_floats(), "float8_e4m3fn"),
    }


@pytest.mark.parametrize("name", left())
def test_what_is_left(name):
    module, reason = left()[name]
    cls = type(module)
    (conversion,) = rnnfast.convert(nn.ModuleList([module]))
    assert conversion.name == "0" and reason in conversion.reason and not conversion.changed
    assert conversion.before is conversion.after is cls is type(module)
    assert "left as it is" in str(conversion)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_scripted_is_left():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(3, I), nn.GRU(I, H)))
    (conversion,) = rnnfast.convert(nn.ModuleList([scripted]))
    assert conversion.name == "0.1" and "scripted" in conversion.reason


def test_quantized_is_left():
    """A class of torch.ao's of the same name, which is none of torch.nn's."""
    quantized = type("LSTM", (nn.Module,), {"__module__": "torch.ao.nn.quantized.dynamic.modules.rnn"})()
    (conversion,) = rnnfast.convert(nn.ModuleList([quantized]))
    assert "quantized" in conversion.reason


def test_a_subclass_of_ours_is_not_reverted():
    (conversion,) = rnnfast.revert(Written(I, H))
    assert "subclass of rnnfast's" in conversion.reason


def test_not_a_module():
    for function in (rnnfast.convert, rnnfast.revert):
        with pytest.raises(TypeError, match=f"{function.__name__}: model must be a torch.nn.Module, got list"):
            function([nn.GRU(I, H)])


@pytest.mark.parametrize("cls", [nn.GRU, Doubling])
def test_parametrized(cls):
    """The parametrization goes on, and can be removed afterwards; so can one that came after the conversion."""
    x = torch.randn(4, 3, I, dtype=F64)
    for late in (False, True):
        module = cls(I, H, dtype=F64)
        if late:
            rnnfast.convert(module)
        parametrizations.weight_norm(module, "weight_hh_l0")
        theirs = copy.deepcopy(module)
        rnnfast.revert(theirs)
        want = evaluate_module(theirs, x)
        if not late:
            (conversion,) = rnnfast.convert(module)
            assert conversion.changed
        assert isinstance(module, rnnfast.GRU) and isinstance(module, cls) and parametrize.is_parametrized(module)
        assert_same(evaluate_module(module, x), want)
        parametrize.remove_parametrizations(module, "weight_hh_l0")
        assert isinstance(module, rnnfast.GRU) and not parametrize.is_parametrized(module)
        torch.testing.assert_close(module(x)[0], theirs(x)[0], rtol=1e-12, atol=1e-12)
        rnnfast.revert(module)
        assert type(module) is cls


def test_pruned_and_functional_call():
    """Weights that are not parameters, and weights from elsewhere."""
    module = prune.l1_unstructured(nn.GRU(I, H, dtype=F64), "weight_hh_l0", 0.5)
    x = torch.randn(4, 3, I, dtype=F64)
    want = module(x)[0]
    rnnfast.convert(module)
    torch.testing.assert_close(module(x)[0], want, rtol=1e-12, atol=1e-12)
    values = {name: 0 * value for name, value in module.named_parameters()}
    assert torch.func.functional_call(module, values, (x,))[0].abs().max() < 1e-12


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_script_of_a_converted_model():
    """torch.jit.script takes the class it was before, of which torch can script cells."""
    model = nn.Sequential(PlainCell(I, H))
    rnnfast.convert(model)
    scripted = torch.jit.script(model)
    assert getattr(scripted, "0").original_name == "PlainCell"
    x = torch.randn(4, I)
    torch.testing.assert_close(scripted(x), model(x), rtol=1e-5, atol=1e-6)


def test_pickle_to_another_process(tmp_path):
    """A converted model travels; there it is ours still."""
    model = nn.Sequential(Plain(I, H))
    rnnfast.convert(model)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    nn.Sequential(nn.LSTM(I, H)).load_state_dict(torch.load(buffer))
    named = nn.Sequential(nn.LSTM(I, H))
    rnnfast.convert(named)
    torch.save(named, tmp_path / "model.pt")
    run_python(
        "import torch\n"
        "model = torch.load('model.pt', weights_only=False)\n"
        "import rnnfast\n"
        "assert type(model[0]) is rnnfast.LSTM\n",
        tmp_path,
    )


# --- patch_torch ------------------------------------------------------------------------------------------------------

PLACES = [nn, torch.nn.modules, torch.nn.modules.rnn]


def is_patched() -> bool:
    found = {getattr(place, name) is getattr(rnnfast, name) for place in PLACES for name in CLASSES}
    assert len(found) == 1, "patched in part"
    return found.pop()


def test_patch_as_a_block():
    """In all places, undone at the end; what was made inside stays ours; to_torch() is torch's all the time."""
    stock = {name: getattr(nn, name) for name in CLASSES}
    assert not is_patched()
    with rnnfast.patch_torch():
        assert is_patched()
        model = Speaker()
        twins = [getattr(nn, name)(I, H).to_torch() for name in CLASSES]
    assert not is_patched()
    assert all(getattr(nn, name) is stock[name] for name in CLASSES)
    assert [type(twin) for twin in twins] == list(stock.values())
    assert type(model.rnns["up"]) is rnnfast.LSTM and type(model.cell) is rnnfast.RNNCell
    assert model(torch.randn(4, 6, 3)).shape == (6, H)
    assert len(rnnfast.revert(model)) == 3


def test_patch_is_undone_by_an_exception():
    with pytest.raises(ZeroDivisionError), rnnfast.patch_torch():
        assert is_patched()
        raise ZeroDivisionError
    assert not is_patched()


def test_patches_nest_in_any_order():
    first, second = rnnfast.patch_torch(), rnnfast.patch_torch()
    with rnnfast.patch_torch():
        assert is_patched()
    assert is_patched()
    first.undo()
    first.undo()
    assert is_patched()
    second.undo()
    assert not is_patched()


def test_patch_leaves_what_others_put_there(monkeypatch):
    """A class that somebody else put in torch.nn is not ours to replace or to restore."""
    monkeypatch.setattr(nn, "GRU", Own)
    with rnnfast.patch_torch():
        assert nn.GRU is Own and nn.LSTM is rnnfast.LSTM
    assert nn.GRU is Own and nn.LSTM is not rnnfast.LSTM


def test_convert_and_revert_while_patched():
    """They mean torch's own classes, whatever name these have at the time."""
    module, stock = nn.LSTM(I, H), nn.LSTM
    with rnnfast.patch_torch():
        (conversion,) = rnnfast.convert(module)
        assert conversion.after is rnnfast.LSTM
        rnnfast.revert(module)
        assert type(module) is stock
        assert len(tensors_of(rnnfast.LSTM(I, H)(torch.randn(2, 3, I)))) == 3


def test_patch_and_a_subclass_made_meanwhile():
    """A program that defines its layers while the patch is in force."""
    with rnnfast.patch_torch():

        class Mine(nn.GRU):
            def forward(self, x, hx=None):
                return super().forward(x + 1, hx)

        module = Mine(I, H)
    assert isinstance(module, rnnfast.GRU)
    x = torch.randn(4, 3, I)
    torch.testing.assert_close(module(x)[0], module.to_torch()(x + 1)[0], rtol=1e-5, atol=1e-6)
