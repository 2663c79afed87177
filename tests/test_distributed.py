"""Training beside others: two processes (DistributedDataParallel, fully_shard), checkpointing, scaling, optimizers."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import rnnfast

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

T, N, I, H = 5, 4, 3, 8  # noqa: E741  (the letter of the whole code base)
LAYERS = {
    "RNN": lambda: rnnfast.RNN(I, H),
    "GRU": lambda: rnnfast.GRU(I, H, num_layers=2, bidirectional=True),
    "LSTM": lambda: rnnfast.LSTM(I, H, num_layers=2, proj_size=4),
    "RNNCell": lambda: rnnfast.RNNCell(I, H),
    "GRUCell": lambda: rnnfast.GRUCell(I, H),
    "LSTMCell": lambda: rnnfast.LSTMCell(I, H),
}


class Model(torch.nn.Module):
    """Layer, then a product of its output."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layer = LAYERS[name]()
        self.head = torch.nn.LazyLinear(2)
        self(sample(name))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.layer(x)
        return self.head(result if isinstance(result, torch.Tensor) else result[0])


def sample(name: str) -> torch.Tensor:
    """A batch of ``N``, the batch in dimension -2."""
    return torch.randn(N, I) if name.endswith("Cell") else torch.randn(T, N, I)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, xs) -> None:
    for x in xs:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def two_processes(rank: int, folder: str) -> None:
    """Train every layer on halves of the batch; must end with the weights of one process with the whole batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for name in LAYERS:
        torch.manual_seed(0)
        alone = Model(name)
        parallel, sharded = copy.deepcopy(alone), copy.deepcopy(alone)
        xs = [sample(name) for _ in range(3)]
        halves = [x.chunk(2, -2)[rank] for x in xs]
        train(alone, torch.optim.SGD(alone.parameters(), 0.1), xs)
        parallel_model = DistributedDataParallel(parallel)
        train(parallel_model, torch.optim.SGD(parallel.parameters(), 0.1), halves)
        fully_shard(sharded.layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        train(sharded, torch.optim.SGD(sharded.parameters(), 0.1), halves)
        for key, want in alone.state_dict().items():
            torch.testing.assert_close(
                parallel.state_dict()[key], want, msg=lambda m, k=f"{name} {key}": f"DDP {k}: {m}"
            )
            whole = sharded.state_dict()[key].full_tensor()
            torch.testing.assert_close(whole, want, msg=lambda m, k=f"{name} {key}": f"fully_shard {k}: {m}")
    dist.barrier()  # neither leaves while the other still talks to it
    dist.destroy_process_group()
    with open(os.path.join(folder, f"done{rank}"), "w"):
        pass
    os._exit(0)  # gloo's threads can abort an interpreter that shuts down while they end


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes(tmp_path):
    """DistributedDataParallel and fully_shard end where one process ends."""
    torch.multiprocessing.spawn(two_processes, (str(tmp_path),), nprocs=2)
    assert (tmp_path / "done0").exists() and (tmp_path / "done1").exists()


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(layer, reentrant):
    """The forward runs again in the backward, to the same gradients."""
    model = Model(layer)
    x = sample(layer).requires_grad_()
    leaves = [x, *model.parameters()]
    plain = torch.autograd.grad(model(x).square().sum(), leaves)
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    for leaf, want in zip(leaves, plain, strict=True):
        assert torch.equal(leaf.grad, want)


@pytest.mark.parametrize("layer", LAYERS)
def test_gradient_scaling(layer):
    """A scaled float16 step is the float32 step, and one with an infinite gradient is skipped."""
    model = Model(layer)
    expected = copy.deepcopy(model)
    x = sample(layer)
    train(expected, torch.optim.SGD(expected.parameters(), 0.1), [x])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with torch.autocast("cpu", torch.float16):
        loss = model(x).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    for have, want in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(have, want, rtol=0, atol=2e-3)
    before = [p.clone() for p in model.parameters()]
    optimizer.zero_grad()
    scaler.scale(model(x * float("inf")).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_optimizers(optimizer, options):
    """The horizontally and vertically fused steps take our gradients as they are."""
    for name in LAYERS:
        model = Model(name)
        expected = copy.deepcopy(model)
        xs = [sample(name) for _ in range(2)]
        train(model, optimizer(model.parameters(), lr=0.01, **options), xs)
        train(expected, optimizer(expected.parameters(), lr=0.01, foreach=False), xs)
        for have, want in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(have, want)
