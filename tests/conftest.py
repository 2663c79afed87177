"""Hypothesis profiles, the machine's instruction sets and devices as fixtures.

A test runs on a CUDA device too, where there is one and the build has kernels for it, by one of three ways: an argument
``device`` or ``kernel``, or, in a file that says ``usefixtures("default_device")``, without a word of its own: what it
makes is made on the device. ``cpu_only`` takes a test of such a file out.

``RNNFAST_TEST_PROFILE``: ``quick`` (default; the same examples every time), ``device`` (fewer: on a CUDA device each
costs many launches) or ``deep`` (many, new ones each time).
"""

import os
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from hypothesis import HealthCheck, settings

from rnnfast import _C

# Shared and noisy machines: no deadlines. A fixture of this suite names a kernel; it is the same for every example.
_shared = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}
settings.register_profile("quick", max_examples=12, derandomize=True, **_shared)
settings.register_profile("device", max_examples=8, derandomize=True, **_shared)
settings.register_profile("deep", max_examples=1000, print_blob=True, **_shared)
settings.load_profile(os.environ.get("RNNFAST_TEST_PROFILE", "quick"))

# A graph that torch's cache on disk has from another build of this project calls the ops as they were there.
torch.compiler.config.cache_key_tag = f"rnnfast {os.stat(_C.__file__).st_mtime_ns}"


def missing_cuda() -> str:
    """Why there is no CUDA device to test on; empty where there is one."""
    build = _C.build_info()
    if not build["cuda"]:
        return f"this build has no CUDA kernels ({build['cuda_reason']})"
    return "" if torch.cuda.is_available() else "torch sees no CUDA device"


DEVICES = ["cpu"] if missing_cuda() else ["cpu", "cuda"]
CPU_CELLS = {cell["name"] for cell in _C.cells() if not cell["on_cuda"]}
CELLS = [cell["name"] for cell in _C.cells()]
# torch.nn's, one of two gates of which one is late, one of three gates with peepholes, and one with norms.
FEW_CELLS = ["rnn_tanh", "rnn_relu", "gru", "lstm", "gru_reset_before", "lstm_coupled_peephole", "lstm_layer_norm"]


def pytest_report_header() -> str:
    return f"devices: {', '.join(DEVICES)}" + (f"; no tests on CUDA: {missing_cuda()}" if missing_cuda() else "")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test with an argument ``cell`` runs for each cell that the extension has.

    With the mark ``few_cells`` for some: where the subject is not the formula, but what all cells share.
    """
    if "cell" in metafunc.fixturenames:
        few = metafunc.definition.get_closest_marker("few_cells") is not None
        metafunc.parametrize("cell", FEW_CELLS if few else CELLS)
    names = set(metafunc.fixturenames)
    is_fixed = names & {"device", "kernel", "isa"} or metafunc.definition.get_closest_marker("cpu_only")
    if len(DEVICES) > 1 and "default_device" in names and not is_fixed:
        metafunc.parametrize("default_device", DEVICES, indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip on CUDA what has no kernels or no meaning there, and what ``few_cells_on_cuda`` leaves out."""
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        values = [value for value in params.values() if isinstance(value, str)]
        if "cuda" not in values:
            continue
        few = item.get_closest_marker("few_cells_on_cuda") is not None
        if CPU_CELLS.intersection(values):
            item.add_marker(pytest.mark.skip(reason="this cell has no kernels on CUDA"))
        elif params.get("threads", 1) != 1:
            item.add_marker(pytest.mark.skip(reason="a device has no threads of ours"))
        elif few and params["cell"] not in FEW_CELLS:
            item.add_marker(pytest.mark.skip(reason="not for all cells on CUDA: few_cells_on_cuda"))


@pytest.fixture(autouse=True)
def _clean_state():
    """The same seed, instruction set and thread (tests about threads ask for more) whatever the test before did."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    best = _C.supported_isas()[0] if "RNNFAST_ISA" not in os.environ else _C.get_isa()
    _C.set_isa(best)
    if len(DEVICES) > 1:
        torch.backends.cudnn.allow_tf32 = False  # float32 is judged as such; what tf32 does has its own tests
    yield
    _C.set_isa(best)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Every device that this machine and this torch have."""
    return request.param


@pytest.fixture
def default_device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Tensors and modules are made on this device where the test does not say another."""
    device = getattr(request, "param", "cpu")
    with torch.device(device) if device != "cpu" else nullcontext():
        yield device


@pytest.fixture(params=_C.supported_isas())
def isa(request: pytest.FixtureRequest) -> str:
    """Every instruction set of this machine, forced for the test."""
    _C.set_isa(request.param)
    assert _C.get_isa() == request.param
    return request.param


@pytest.fixture(params=[*_C.supported_isas(), *DEVICES[1:]])
def kernel(request: pytest.FixtureRequest) -> str:
    """Every set of kernels: the device that runs it, with its instruction set forced on the CPU."""
    if request.param in DEVICES:
        return request.param
    _C.set_isa(request.param)
    return "cpu"
