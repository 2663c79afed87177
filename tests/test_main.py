"""The package as a whole: python -m rnnfast, environment variables, the check of torch's version."""

import importlib.metadata
import os
import re
import subprocess
import sys

import pytest
import torch
from pairs import run_python

import rnnfast
from rnnfast import _C


def run_main(folder, **environment: str) -> subprocess.CompletedProcess[str]:
    """python -m rnnfast, away from the source folder."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "rnnfast"],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_main_describes_and_checks(tmp_path):
    """Versions, instruction set, threads, CUDA with the reason, and a check of every cell; exit status 0."""
    result = run_main(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    info = _C.build_info()
    for expected in (rnnfast.__version__, torch.__version__, info["torch"], info["compiler"], _C.supported_isas()[0]):
        assert str(expected) in result.stdout
    assert re.search(r"(?i)threads\W+\d", result.stdout)
    assert re.search(r"(?i)cuda\W+(yes|no\W.*\w)", result.stdout)
    if not info["cuda"]:
        assert info["cuda_reason"] and info["cuda_reason"] in result.stdout
    for cell in _C.cells():
        for isa in _C.supported_isas():
            assert re.search(rf"ok\s+{cell['name']}\s+{isa}\s.*gradient", result.stdout), result.stdout


def test_main_fails_when_a_check_fails(tmp_path):
    """With a reference that is a little off the exit status is not 0, and the cell is named."""
    result = run_python(
        "import runpy, sys\n"
        "from rnnfast import reference\n"
        "true = reference.gru\n"
        "off = lambda *a: tuple(1.001 * s for s in true.formula(*a))\n"
        "reference.gru = reference.Cell('gru', 3, 1, off)\n"
        "sys.argv = ['rnnfast']\n"
        "runpy.run_module('rnnfast', run_name='__main__')\n",
        tmp_path,
        check=False,
    )
    assert result.returncode not in (0, None), result.stdout
    assert re.search(r"FAILED\s+gru", result.stdout), result.stdout + result.stderr
    assert re.search(r"ok\s+lstm", result.stdout)


@pytest.mark.parametrize("isa", _C.supported_isas())
def test_environment_forces_an_instruction_set(tmp_path, isa):
    """RNNFAST_ISA is read once at load."""
    result = run_python("import rnnfast\nprint(rnnfast._C.get_isa())\n", tmp_path, RNNFAST_ISA=isa)
    assert result.stdout.strip() == isa


@pytest.mark.parametrize("wrong", ["avx1024", "AVX 2", "none"])
def test_environment_with_a_wrong_instruction_set(tmp_path, wrong):
    """The import fails, naming the variable, its value, and what there is."""
    result = run_python("import rnnfast\n", tmp_path, check=False, RNNFAST_ISA=wrong)
    assert result.returncode not in (0, None)
    last = result.stderr.strip().splitlines()[-1]
    assert "Error" in last
    for expected in ("RNNFAST_ISA", wrong, "baseline"):
        assert expected in result.stderr


def test_set_isa():
    """Best first; any of the machine's by name; others refused and nothing changed."""
    isas = _C.supported_isas()
    assert isas and isas[-1] == "baseline" and set(isas) <= {"avx512", "avx2", "baseline"}
    for isa in isas:
        _C.set_isa(isa)
        assert _C.get_isa() == isa
    for wrong in {"avx512", "avx2", "neon", "", "Baseline"} - set(isas):
        with pytest.raises(ValueError, match=r"baseline|support|known|isa"):
            _C.set_isa(wrong)
        assert _C.get_isa() == isas[-1]


def test_build_info():
    """Against which torch and with which compiler, and whether there is CUDA."""
    info = _C.build_info()
    assert info["torch"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert isinstance(info["cuda"], bool) and info["compiler"]
    assert all(isinstance(value, str | bool) for value in info.values())


@pytest.mark.parametrize("version", ["1.13.1", "99.0.0+cpu"])
def test_another_torch_is_refused(tmp_path, version):
    """Under another minor version of torch the import fails before the extension loads, and says what to do."""
    try:
        importlib.metadata.version("rnnfast")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("rnnfast is importable but not installed: there is no record of the torch it requires")
    result = run_python(f"import torch\ntorch.__version__ = {version!r}\nimport rnnfast\n", tmp_path, check=False)
    assert result.returncode not in (0, None)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError")
    built = ".".join(_C.build_info()["torch"].split(".")[:2])
    for expected in (version, built, "pip install"):
        assert expected in result.stderr


def test_public_names():
    """What __all__ promises is there, documented, and the version is the installed one."""
    for name in rnnfast.__all__:
        assert hasattr(rnnfast, name), name
        assert name.startswith("__") or getattr(rnnfast, name).__doc__, name
    assert {"RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell", "explain", "ops", "reference"} <= set(
        rnnfast.__all__
    )
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", rnnfast.__version__)
