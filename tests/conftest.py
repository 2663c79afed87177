"""Hypothesis profiles, the machine's instruction sets and devices as fixtures.

``RNNFAST_TEST_PROFILE``: ``quick`` (default; the same examples every time) or ``deep`` (many, new ones each time).
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from rnnfast import _C

# Shared and noisy machines: no deadlines. A fixture of this suite names a kernel; it is the same for every example.
_shared = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}
settings.register_profile("quick", max_examples=20, derandomize=True, **_shared)
settings.register_profile("deep", max_examples=1000, print_blob=True, **_shared)
settings.load_profile(os.environ.get("RNNFAST_TEST_PROFILE", "quick"))

# A graph that torch's cache on disk has from another build of this project calls the ops as they were there.
torch.compiler.config.cache_key_tag = f"rnnfast {os.stat(_C.__file__).st_mtime_ns}"

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
CELLS = [cell["name"] for cell in _C.cells()]
# torch.nn's, one of two gates of which one is late, one of three gates with peepholes, and one with norms.
FEW_CELLS = ["rnn_tanh", "rnn_relu", "gru", "lstm", "gru_reset_before", "lstm_coupled_peephole", "lstm_layer_norm"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test with an argument ``cell`` runs for each cell that the extension has.

    With the mark ``few_cells`` for some: where the subject is not the formula, but what all cells share.
    """
    if "cell" in metafunc.fixturenames:
        few = metafunc.definition.get_closest_marker("few_cells") is not None
        metafunc.parametrize("cell", FEW_CELLS if few else CELLS)


@pytest.fixture(autouse=True)
def _clean_state():
    """The same seed, instruction set and thread (tests about threads ask for more) whatever the test before did."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    best = _C.supported_isas()[0] if "RNNFAST_ISA" not in os.environ else _C.get_isa()
    _C.set_isa(best)
    yield
    _C.set_isa(best)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Every device that this machine and this torch have."""
    return request.param


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
