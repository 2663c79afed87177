"""Fused RNN, GRU and LSTM for PyTorch: torch.nn's recurrent layers with the same numbers and less time.

>>> import torch, rnnfast
>>> layer = rnnfast.LSTM(8, 16, num_layers=2)
>>> output, (h_n, c_n) = layer(torch.randn(5, 3, 8))

``RNN``, ``GRU``, ``LSTM``, ``RNNCell``, ``GRUCell`` and ``LSTMCell`` take the place of torch.nn's classes of those
names. ``ops`` holds the functions behind them, ``reference`` the same in plain PyTorch, ``explain`` says which kernel a
call takes and why, ``onnx`` exports. ``Decoder`` takes a layer one step at a time, in real time; ``prepack(model)``
keeps rearranged weights between the calls of any model. ``convert(model)``
gives the layers of a model our classes in place, ``revert`` takes it back, and ``patch_torch`` puts our classes into
torch.nn for programs that one cannot edit. ``RNNLM`` is a language model around a layer, ``RNNAutoRegression`` a
forecaster of time series. ``python -m rnnfast`` describes the installation and checks it.
"""

import importlib
import importlib.metadata
import re

import torch

__version__ = "0.1.0"


def _check_torch() -> None:
    """Raise ImportError when torch's minor version is not the one that ``_C`` was compiled for.

    This must come before ``_C`` is loaded: its symbols are those of one minor version, and loading it into another
    ends in an undefined symbol at best.
    """
    try:
        requirements = importlib.metadata.requires("rnnfast") or []
    except importlib.metadata.PackageNotFoundError:
        return
    built = re.search(r"^torch==(\d+\.\d+)\.\*", "\n".join(requirements), re.MULTILINE)
    if built is not None and not torch.__version__.startswith(f"{built[1]}."):
        raise ImportError(
            f"rnnfast {__version__} was built against torch {built[1]}, but torch {torch.__version__} is running. "
            f'Either install the torch it was built for: pip install "torch=={built[1]}.*" '
            "or rebuild rnnfast for this torch, in its source folder: "
            "pip install --no-build-isolation --no-deps --force-reinstall ."
        )


_check_torch()

try:
    importlib.import_module("rnnfast._C")
except ModuleNotFoundError as error:
    raise ImportError(
        f"{__path__[0]} holds rnnfast's source without its compiled part. If rnnfast is installed, start Python in "
        "another folder; else build it here: pip install -e ."
    ) from error

from rnnfast import onnx, ops, reference
from rnnfast._C import get_isa, set_isa, supported_isas
from rnnfast.convert import Conversion, convert, patch_torch, revert
from rnnfast.decoder import Decoder
from rnnfast.forecast import RNNAutoRegression
from rnnfast.lm import RNNLM
from rnnfast.modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from rnnfast.plan import Explanation, explain
from rnnfast.prepack import PrepackHandle, prepack

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "RNNLM",
    "Conversion",
    "Decoder",
    "Explanation",
    "GRUCell",
    "LSTMCell",
    "PrepackHandle",
    "RNNAutoRegression",
    "RNNCell",
    "__version__",
    "convert",
    "explain",
    "get_isa",
    "onnx",
    "ops",
    "patch_torch",
    "prepack",
    "reference",
    "revert",
    "set_isa",
    "supported_isas",
]
