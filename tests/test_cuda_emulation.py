"""The GPU drivers on the CPU, over the emulated device of ``tests/cuda_emulation``, through the ordinary operators.

What it shows: the logic of every kernel and schedule, with threads in many orders, against the reference. What it
cannot show: memory fences, what the compiler for the device does, and time. The drivers are compiled here, which takes
about half a minute.
"""

import ctypes
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from agreement import TORCH_CELLS, assert_as_accurate, assert_same, cotangent, evaluate, torch_op
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import MASKS, Call, Case, cases

from rnnfast import _C
from rnnfast.reference import CELLS as REFERENCES

SOURCE = Path(__file__).parent / "cuda_emulation" / "emulated.cpp"
EMULATED = [name for name, cell in REFERENCES.items() if not cell.is_normalized]
MAX_HIDDEN = 40  # of drawn sizes: each step of a resident kernel switches among all its threads many times


@dataclass(frozen=True)
class Device:
    """The device that is played."""

    capability: int = 90
    multiprocessors: int = 132
    block_memory: int = 227 * 1024  # bytes of shared memory
    tf32: bool = False


# One whose blocks hold all weights; with less memory than the real ones, so that small layers too are shared out to
# several blocks, also with few multiprocessors; one without such kernels.
DEVICES = {
    "roomy": Device(),
    "hopper": Device(block_memory=44 * 1024),
    "small": Device(86, 8, 44 * 1024),
    "turing": Device(75, 40, 64 * 1024),
}


class Emulation:
    """The compiled drivers, registered as a set of kernels that can be forced."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.emulated_table.restype = ctypes.c_void_p
        _C._add_drivers(self.library.emulated_table())

    def play(self, device: Device, seed: int = 0, left_out: int = -1) -> None:
        """Force the drivers, on such a device, with threads in the seed's order and without a barrier."""
        _C.set_isa("cuda_emulation")
        self.library.emulated_device(
            device.capability, device.multiprocessors, ctypes.c_int64(device.block_memory), int(device.tf32)
        )
        self.library.emulated_order(ctypes.c_uint64(seed), left_out)
        self.launches()

    def launches(self) -> tuple[int, int]:
        """All launches since the last call, and those of resident kernels among them."""
        counts = (ctypes.c_int64 * 2)()
        self.library.emulated_launches(ctypes.byref(counts, 0), ctypes.byref(counts, 8))
        return counts[0], counts[1]


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Emulation:
    """Compile the drivers once for all workers of the run."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder if worker_id == "master" else folder.parent
    library, lock = folder / "emulated.so", folder / "emulated.lock"
    try:
        os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        while not library.exists():
            assert lock.exists(), "another worker could not compile the emulated drivers"
            time.sleep(0.2)
    else:
        part = folder / "emulated.part.so"
        command = [os.environ.get("CXX", "g++"), "-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
        command += ["-Wno-unknown-pragmas", f"-I{SOURCE.parent}", str(SOURCE), "-o", str(part)]
        try:
            subprocess.run(command, check=True)
        except BaseException:
            lock.unlink()
            raise
        part.rename(library)
    return Emulation(library)


@pytest.fixture(params=DEVICES)
def played(request: pytest.FixtureRequest) -> Device:
    """Each device in turn."""
    return DEVICES[request.param]


def exact_results(call: Call) -> dict[str, torch.Tensor]:
    """What the reference gives in float64 for the very numbers of the call."""
    names = [name for name, tensor in call.tensors.items() if tensor.requires_grad]
    return evaluate(call.to(torch.float64).with_grad(*names), call.reference())


def check(emulation: Emulation, call: Call, device: Device, seed: int = 0) -> None:
    """Outputs and gradients of the emulated drivers against the reference's."""
    exact = exact_results(call)
    emulation.play(device, seed)
    ours = evaluate(call, call.op())
    _C.set_isa(_C.supported_isas()[0])
    if call.tensors["weight_ih"].dtype == torch.float64:
        assert_same(ours, exact)
    else:
        assert_as_accurate(ours, evaluate(call, call.reference()), exact)


@pytest.mark.parametrize("name", EMULATED)
@given(data=st.data())
def test_agrees(emulation, name, data):
    """Any call of any cell, in float64: the per-step schedule."""
    case = data.draw(cases(name))
    call = case.call().with_grad(*case.leaves())
    check(emulation, call, DEVICES["hopper"])


@pytest.mark.parametrize("name", [*TORCH_CELLS, "gru_reset_before", "lstm_coupled_peephole"])
@settings(max_examples=8)
@given(data=st.data())
def test_agrees_in_float32(emulation, name, played, data):
    """Any call in float32: the schedule that the device has for it, with threads in any order."""
    case = data.draw(cases(name, expanded=False).filter(lambda case: case.H <= MAX_HIDDEN and case.I <= 8))
    call = case.call(torch.float32).with_grad(*case.leaves())
    check(emulation, call, played, data.draw(st.integers(0, 2**32)))


RESIDENT = {
    "plain": Case("", T=5, N=3, I=3, H=20),
    "two_tiles": Case("", T=4, N=11, I=3, H=33),
    "groups": Case("", T=4, N=20, I=3, H=40),
    "no_state_no_bias": Case("", T=4, N=2, I=3, H=16, h0=False, c0=False, bias=False),
    "reverse": Case("", T=5, N=3, I=3, H=40, reverse=True),
    "packed": Case("", T=5, N=3, I=3, H=40, kind="packed", lengths=(5, 3, 1)),
    "packed_reverse": Case("", T=5, N=3, I=3, H=40, kind="packed", lengths=(5, 3, 1), reverse=True),
    "lengths_resets": Case("", T=5, N=4, I=3, H=40, lengths=(2, 0, 5, 3), resets=True),
    "lengths_resets_reverse": Case("", T=5, N=4, I=3, H=40, lengths=(2, 0, 5, 3), resets=True, reverse=True),
    "masks": Case("", T=5, N=4, I=3, H=40, lengths=(2, 0, 5, 3), resets=True, masks=frozenset(MASKS)),
}


def resident_call(name: str, cell: str, dtype: torch.dtype) -> Call:
    values = vars(RESIDENT[name]) | {"cell": cell}
    if REFERENCES[cell].num_states == 1:
        values |= {"masks": values["masks"] - {"zoneout_c"}}
    return Case(**values).call(dtype).with_grad()


@pytest.mark.parametrize("device", ["roomy", "hopper", "small"])
@pytest.mark.parametrize("variant", RESIDENT)
@pytest.mark.parametrize("name", TORCH_CELLS)
def test_resident_kernels(emulation, name, variant, device):
    """torch.nn's cells in float32, and that it is the resident kernels that ran, forward and backward."""
    call = resident_call(variant, name, torch.float32)
    check(emulation, call, DEVICES[device], seed=7)
    _, resident = emulation.launches()
    assert resident >= 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "tf32"], ids=str)
@pytest.mark.parametrize("name", TORCH_CELLS)
@pytest.mark.parametrize("variant", ["plain", "two_tiles", "groups", "masks"])
@pytest.mark.parametrize("kilobytes", {"resident": 24, "streamed": 12}.items(), ids=lambda x: x[0])
def test_tensor_cores(emulation, name, dtype, variant, kilobytes):
    """Products by tiles of 16-bit numbers, and of float32 rounded to tf32; weights in shared memory and streamed."""
    if (name, variant) == ("rnn_relu", "groups"):
        pytest.skip("of so many numbers some come so near to the kink of relu that either slope is right")
    device = Device(block_memory=kilobytes[1] * (2 if dtype == "tf32" else 1) * 1024, tf32=dtype == "tf32")
    call = resident_call(variant, name, torch.float32 if dtype == "tf32" else dtype)
    exact = exact_results(call)
    emulation.play(device, seed=3)
    ours = evaluate(call, call.op())
    assert emulation.launches()[1] >= 2
    # A rounding of every factor of every product, and of what passes between steps.
    eps = 2.0**-11 if dtype == "tf32" else torch.finfo(dtype).eps
    for key, want in exact.items():
        error = (ours[key].double() - want).abs().max().item()
        bound = 8 * eps * max(1.0, want.abs().max().item())
        assert error <= bound, f"{key}: error {error:.3g}, allowed {bound:.3g}"


BARRIERS = {"staged": 1, "multiplied": 2, "taken": 3, "loaded": 4}  # as resident.h numbers them; the last of forward


@pytest.mark.parametrize("barrier", BARRIERS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_missing_barrier_is_noticed(emulation, barrier, backward):
    """Without any one barrier some order of threads gives wrong numbers; with all of them no order does."""
    if backward and barrier == "loaded":
        pytest.skip("backward has no such barrier")
    call = Case("lstm", T=6, N=3, I=3, H=40).call(torch.float32).with_grad()
    wanted = evaluate(call, call.reference())

    def is_right(left_out: int, seed: int) -> bool:
        emulation.play(DEVICES["hopper"], seed, left_out if not backward else -1)
        outputs = call(call.op())
        emulation.play(DEVICES["hopper"], seed, left_out)
        leaves = list(call.tensors.values())
        grads = torch.autograd.grad(outputs, leaves, [cotangent(y) for y in outputs])
        results = grads if backward else outputs
        names = [f"grad_{name}" for name in call.tensors] if backward else ["output", "h_n", "c_n"]
        return all(
            torch.allclose(have, wanted[name], rtol=1e-4, atol=1e-4) for name, have in zip(names, results, strict=True)
        )

    assert all(is_right(-1, seed) for seed in range(4))
    assert not all(is_right(BARRIERS[barrier], seed) for seed in range(100))  # to the first that is wrong


@pytest.mark.parametrize("name", TORCH_CELLS)
def test_tokens(emulation, name):
    """Tokens in the place of one-hot rows: the same results, the gradient of W_ih included."""
    call = Case(name, T=5, N=3, I=7, H=20, h0=False, c0=False).call(torch.float64).with_grad()
    tokens = torch.randint(0, 7, (5, 3))
    rows = Call(name, call.tensors | {"input": torch.nn.functional.one_hot(tokens, 7).double()})
    expected = evaluate(rows, rows.reference())
    emulation.play(DEVICES["hopper"])
    ours = evaluate(Call(name, call.tensors | {"input": tokens}), call.op())
    assert_same(ours, expected)


def test_torchs_own_error(emulation):
    """torch.nn's own results in float32 are no nearer to float64 than the emulated ones."""
    call = Case("gru", T=6, N=5, I=4, H=32).call(torch.float32).with_grad()
    emulation.play(DEVICES["hopper"], seed=1)
    ours = evaluate(call, call.op())
    assert_as_accurate(ours, evaluate(call, torch_op("gru")), exact_results(call))


@pytest.mark.parametrize("name", [name for name in REFERENCES if name not in EMULATED])
def test_refused(emulation, name):
    """A cell without GPU kernels is refused by name."""
    call = Case(name).call(torch.float32)
    emulation.play(DEVICES["hopper"])
    with pytest.raises(RuntimeError, match=f"{name}: input: expected a tensor on the CPU: this cell has no kernels"):
        call(call.op())
