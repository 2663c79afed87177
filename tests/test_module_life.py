"""What happens to a module in its life: saving, copying, moving, new weights, hooks, parametrizations, tracing, DDP."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.utils.parametrizations as parametrizations
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
    assert_same_structure,
    evaluate_module,
    make_input,
    pair,
    run_python,
    tensors_of,
)
from torch import nn
from torch.nn.utils import parametrize, prune

import rnnfast

pytestmark = pytest.mark.filterwarnings(IGNORE_TORCH)
F64 = torch.float64


def doubles(layer: str, **options):
    """A pair in float64 with an input."""
    theirs, ours = pair(layer, dtype=F64, **options)
    return theirs, ours, make_input("batched", theirs, F64)


@pytest.mark.parametrize("modules", [LAYERS, CELL_MODULES], ids=["layer", "cell"])
@pytest.mark.parametrize("layer", LAYERS)
def test_state_dict_both_ways(layer, modules):
    """The same names in the same order; loads into torch.nn and back, strictly."""
    theirs, ours = pair(layer, modules=modules)
    for p in ours.parameters():
        nn.init.normal_(p)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))


def test_pickle_to_another_process(tmp_path):
    """Whole modules, used before they were pickled, give the same numbers elsewhere; nothing of a cache travels."""
    modules = [getattr(rnnfast, name)(I, H) for name in CLASSES]
    sizes = [len(pickle.dumps(module)) for module in modules]
    x = torch.randn(N, I)
    expected = [tensors_of(module(x)) for module in modules]
    for module, size in zip(modules, sizes, strict=True):
        assert len(pickle.dumps(module)) <= size + 64
    torch.save((modules, x), tmp_path / "modules.pt")
    run_python(
        "import torch\n"
        "modules, x = torch.load('modules.pt', weights_only=False)\n"
        "torch.save([(type(module).__name__, module(x)) for module in modules], 'results.pt')\n",
        tmp_path,
    )
    for name, want, (kind, result) in zip(CLASSES, expected, torch.load(tmp_path / "results.pt"), strict=True):
        assert kind == name
        torch.testing.assert_close(tensors_of(result), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", LAYERS)
def test_deepcopy(layer):
    """A copy has weights of its own."""
    theirs, ours, x = doubles(layer, num_layers=2)
    before = ours(x)[0].detach()
    copied = copy.deepcopy(ours)
    with torch.no_grad():
        for p in ours.parameters():
            p.mul_(0.5)
    torch.testing.assert_close(copied(x)[0], before)
    assert_agree(theirs, copied, x)
    assert not torch.allclose(ours(x)[0], before)


def change_in_place(module: nn.Module) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(0.7).add_(0.01)


def change_data(module: nn.Module) -> None:
    for p in module.parameters():
        p.data = p.data * 0.7 + 0.01


def change_behind_the_version(module: nn.Module) -> None:
    for p in module.parameters():
        p.data.mul_(0.7).add_(0.01)


def change_by_loading(module: nn.Module) -> None:
    module.load_state_dict({name: value * 0.7 + 0.01 for name, value in module.state_dict().items()})


def change_by_assigning(module: nn.Module) -> None:
    values = {name: value * 0.7 + 0.01 for name, value in module.state_dict().items()}
    module.load_state_dict(values, assign=True)


def change_by_new_parameters(module: nn.Module) -> None:
    for name, p in list(module.named_parameters()):
        setattr(module, name, nn.Parameter(p.detach() * 0.7 + 0.01))


def change_by_optimizer(module: nn.Module) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(torch.ones(T, N, I, dtype=F64))[0].sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def change_by_moving(module: nn.Module) -> None:
    change_in_place(module.float())
    module.double()


def change_by_numpy(module: nn.Module) -> None:
    for p in module.parameters():
        p.detach().numpy()[:] *= 0.7


CHANGES = [
    change_in_place,
    change_data,
    change_behind_the_version,
    change_by_loading,
    change_by_assigning,
    change_by_new_parameters,
    change_by_optimizer,
    change_by_moving,
    change_by_numpy,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("layer", LAYERS)
def test_weights_are_never_stale(layer, change):
    """However the weights changed since the last call, in training and in inference."""
    theirs, ours, x = doubles(layer, num_layers=2)
    for _ in range(2):
        with torch.no_grad():
            before = ours(x)[0]
        change(theirs)
        change(ours)
        with torch.no_grad():
            torch.testing.assert_close(ours(x)[0], theirs(x)[0], rtol=1e-11, atol=1e-12)
            assert not torch.allclose(ours(x)[0], before, atol=1e-6)
        assert_agree(theirs, ours, x)


@pytest.mark.parametrize("layer", LAYERS)
def test_dtype_moves(layer):
    """float, double, bfloat16 and back on one module."""
    theirs, ours = pair(layer)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float64, torch.float32):
        theirs.to(dtype), ours.to(dtype)
        assert_agree(theirs, ours, make_input("batched", theirs, dtype))


@pytest.mark.parametrize("layer", LAYERS)
def test_hooks(layer):
    """Forward, pre-forward and backward hooks run as on torch.nn's module."""
    theirs, ours, x = doubles(layer)
    logs = []
    for module in (theirs, ours):
        log = []
        module.register_forward_pre_hook(lambda m, a, log=log: log.append("pre") or (a[0] * 2, *a[1:]))
        module.register_forward_hook(lambda m, a, y, log=log: log.append("post") or (y[0] + 1, y[1]))
        module.register_full_backward_hook(lambda m, gi, go, log=log: log.append(("back", len(gi), len(go))))
        logs.append(log)
    assert_same(evaluate_module(ours, x), evaluate_module(theirs, x))
    assert logs[0] == logs[1] and "pre" in logs[0] and "post" in logs[0]


def test_parameter_hooks():
    """Hooks on a parameter's gradient."""
    _, ours, x = doubles("gru")
    seen = []
    ours.weight_hh_l0.register_hook(lambda g: seen.append(g.shape) or g * 0)
    ours(x)[0].sum().backward()
    assert seen == [(3 * H, H)]
    assert torch.equal(ours.weight_hh_l0.grad, torch.zeros(3 * H, H, dtype=F64))


def both(change, layer: str = "lstm") -> None:
    """Apply a change to both modules of a pair and compare before, and twice after (new weights each call)."""
    theirs, ours, x = doubles(layer, num_layers=2)
    assert_agree(theirs, ours, x)
    for module in (theirs, ours):
        torch.manual_seed(2)
        change(module)
    for _ in range(2):
        assert_agree(theirs, ours, x)
        for module in (theirs, ours):
            change_in_place(module)


@pytest.mark.parametrize("layer", LAYERS)
def test_weight_norm(layer):
    """The parametrization: isinstance still holds, gradients reach the two factors."""
    both(lambda m: parametrizations.weight_norm(m, "weight_hh_l0"), layer)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("layer", LAYERS)
def test_old_weight_norm(layer):
    """The hook-based one, which replaces the attribute before each call."""
    both(lambda m: nn.utils.weight_norm(m, "weight_hh_l1"), layer)


def test_spectral_norm_and_orthogonal():
    """Other parametrizations of torch, on one module together."""

    def change(module: nn.Module) -> None:
        module.eval()
        parametrizations.spectral_norm(module, "weight_ih_l0")
        parametrizations.orthogonal(module, "weight_hh_l1")

    theirs, ours, x = doubles("gru", num_layers=2)
    for module in (theirs, ours):
        torch.manual_seed(2)
        change(module)
    assert_agree(theirs, ours, x)


class Halved(nn.Module):
    """A parametrization of the user's own."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


def test_parametrize_cached_and_removed():
    """Within a cache, and after the parametrization was removed again."""
    theirs, ours, x = doubles("lstm")
    for module in (theirs, ours):
        parametrize.register_parametrization(module, "weight_hh_l0", Halved())
    assert isinstance(ours, rnnfast.LSTM)
    with parametrize.cached():
        torch.testing.assert_close(ours(x)[0], theirs(x)[0])
    for module in (theirs, ours):
        parametrize.remove_parametrizations(module, "weight_hh_l0")
    assert_agree(theirs, ours, x)


@pytest.mark.parametrize("layer", LAYERS)
def test_prune(layer):
    """Masked weights, and the pruning made permanent."""
    both(lambda m: prune.l1_unstructured(m, "weight_hh_l0", amount=0.5), layer)
    theirs, ours, x = doubles(layer)
    for module in (theirs, ours):
        prune.l1_unstructured(module, "weight_ih_l0", amount=3)
        prune.remove(module, "weight_ih_l0")
    assert_agree(theirs, ours, x)


@pytest.mark.parametrize("modules", [LAYERS, CELL_MODULES], ids=["layer", "cell"])
@pytest.mark.parametrize("layer", LAYERS)
def test_functional_call(layer, modules):
    """Other weights for one call; gradients reach them; the module's own are back afterwards."""
    theirs, ours = pair(layer, modules=modules, dtype=F64)
    x = torch.randn(N, I, dtype=F64)
    own = tensors_of(ours(x))
    results = []
    for module in (theirs, ours):
        given = {name: (p.detach() * 0.3).requires_grad_() for name, p in module.named_parameters()}
        outputs = tensors_of(torch.func.functional_call(module, given, (x,)))
        grads = torch.autograd.grad(sum(y.square().sum() for y in outputs), list(given.values()))
        results.append([*outputs, *grads])
    for have, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(own, tensors_of(ours(x)), strict=True))


@pytest.mark.parametrize("modules", [LAYERS, CELL_MODULES], ids=["layer", "cell"])
@pytest.mark.parametrize("layer", LAYERS)
def test_to_torch_shares_parameters(layer, modules):
    """The stock class, exactly, with the same parameter objects, mode and options; ours stays what it was."""
    theirs, ours = pair(layer, modules=modules)
    ours.eval()
    ours.register_buffer("extra", torch.ones(2))
    stock = ours.to_torch()
    assert type(stock) is type(theirs) and type(ours) is not type(theirs)
    assert not stock.training
    assert repr(stock) == repr(theirs)
    own = dict(ours.named_parameters())
    assert all(p is own[name] for name, p in stock.named_parameters()) and len(own) == len(list(stock.parameters()))
    x = torch.randn(N, I)
    change_in_place(ours)
    for have, want in zip(tensors_of(ours(x)), tensors_of(stock(x)), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)


def test_to_torch_of_a_subclass():
    """A user's subclass goes back to the stock layer under it."""

    class Mine(rnnfast.GRU):
        """A subclass."""

    assert type(Mine(I, H).to_torch()) is nn.GRU


class Container(nn.Module):
    """A small model for scripting and tracing."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(H, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("layer", LAYERS)
def test_script_of_a_container(layer, tmp_path):
    """torch.jit.script takes the stock layer in our layer's place, sharing its weights; it saves and loads.

    torch puts what it scripted into the container too: the layer in it is the stock one afterwards.
    """
    model = Container(pair(layer)[1])
    scripted = torch.jit.script(model)
    x = torch.randn(T, N, I)
    torch.testing.assert_close(scripted(x), model(x), rtol=1e-5, atol=1e-5)
    change_in_place(model)
    torch.testing.assert_close(scripted(x), model(x), rtol=1e-5, atol=1e-5)
    scripted.save(str(tmp_path / "model.ts"))
    torch.testing.assert_close(torch.jit.load(str(tmp_path / "model.ts"))(x), model(x), rtol=1e-5, atol=1e-5)


def test_distributed_data_parallel(tmp_path):
    """One gloo process: gradients arrive as without it, for every layer."""
    run_python(
        "import copy, os, torch, rnnfast\n"
        "import torch.distributed as dist\n"
        "torch.manual_seed(0)\n"
        "dist.init_process_group('gloo', init_method='file://' + os.path.abspath('store'), rank=0, world_size=1)\n"
        f"for name, options in {list(LAYERS.values())!r}:\n"
        f"    module = getattr(rnnfast, name)({I}, {H}, num_layers=2, bidirectional=True, **options)\n"
        f"    x = torch.randn({T}, {N}, {I})\n"
        "    plain = copy.deepcopy(module)\n"
        "    plain(x)[0].square().sum().backward()\n"
        "    wrapped = torch.nn.parallel.DistributedDataParallel(module)\n"
        "    for step in range(2):\n"
        "        module.zero_grad()\n"
        "        wrapped(x)[0].square().sum().backward()\n"
        "    for a, b in zip(module.parameters(), plain.parameters(), strict=True):\n"
        "        torch.testing.assert_close(a.grad, b.grad)\n"
        "dist.destroy_process_group()\n",
        tmp_path,
        GLOO_SOCKET_IFNAME="lo",
    )


def test_data_parallel_replica():
    """The replicas of nn.DataParallel share no list of weights with their original."""
    ours = rnnfast.GRU(I, H)
    replica = ours._replicate_for_data_parallel()
    for name, p in ours.named_parameters():
        setattr(replica, name, p.detach() * 2)
    x = torch.randn(T, N, I)
    assert not torch.allclose(replica(x)[0], ours(x)[0])
    torch.testing.assert_close(ours(x)[0], ours.to_torch()(x)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("modules", [LAYERS, CELL_MODULES], ids=["layer", "cell"])
@pytest.mark.parametrize("layer", LAYERS)
def test_transforms(layer, modules):
    """torch.func.grad gives the gradient of ordinary autograd; more in test_transforms.py."""
    _, ours = pair(layer, modules=modules)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return sum(y.square().sum() for y in tensors_of(ours(x)))

    x = torch.randn(N, I)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(x), torch.autograd.grad(loss(leaf), leaf)[0])


@pytest.mark.parametrize("layer", LAYERS)
def test_share_memory(layer):
    """Weights in shared memory, as for a pool of worker processes."""
    theirs, ours, x = doubles(layer)
    assert_agree(theirs, ours.share_memory(), x)
    assert all(p.is_shared() for p in ours.parameters())


def test_locks_and_caches_do_not_hinder_copies():
    """After use, in training and inference and from another thread, a module still pickles and copies."""
    module = rnnfast.LSTM(I, H, num_layers=2)
    x = torch.randn(T, N, I)
    module(x)[0].sum().backward()
    with torch.no_grad():
        thread = threading.Thread(target=lambda: module(x))
        thread.start()
        thread.join()
        module(x)
    for again in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module), copy.copy(module)):
        assert torch.equal(again(x)[0], module(x)[0])
        assert_same_structure(module(x), again(x))
