"""A torch.nn layer and ours with the same weights, inputs of every kind for them, and what they give."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from agreement import Results, assert_as_accurate, assert_same, cotangent
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnfast

# Every layer and cell module by a name, with the class and the options that make it.
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "gru": ("GRU", {}),
    "lstm": ("LSTM", {}),
}
CELL_MODULES: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_tanh": ("RNNCell", {}),
    "rnn_relu": ("RNNCell", {"nonlinearity": "relu"}),
    "gru": ("GRUCell", {}),
    "lstm": ("LSTMCell", {}),
}
# The cells that torch.nn has not, by name: class, options, number of gates.
OPTIONS: dict[str, tuple[str, dict[str, Any], int]] = {
    "gru_before": ("GRU", {"reset_after": False}, 3),
    "gru_layer_norm": ("GRU", {"layer_norm": True}, 3),
    "gru_reset": ("GRU", {"gates": "reset"}, 2),
    "gru_reset_before": ("GRU", {"gates": "reset", "reset_after": False}, 2),
    "gru_update": ("GRU", {"gates": "update"}, 2),
    "lstm_coupled": ("LSTM", {"coupled": True}, 3),
    "lstm_coupled_peephole": ("LSTM", {"coupled": True, "peephole": True}, 3),
    "lstm_layer_norm": ("LSTM", {"layer_norm": True}, 4),
    "lstm_peephole": ("LSTM", {"peephole": True}, 4),
}
CLASSES = ["RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"]
KINDS = ["batched", "unbatched", "packed", "packed_unsorted"]
LENGTHS = {"packed": [4, 4, 2, 1], "packed_unsorted": [2, 4, 1, 4]}
T, N, I, H = 4, 4, 5, 9  # noqa: E741  (the letter of the whole code base)
# torch's remark on its own speed, where torch.nn runs beside ours.
IGNORE_TORCH = "ignore:LSTM with projections is not supported with oneDNN:UserWarning"


def pair(cell: str, *sizes: int, modules: dict[str, tuple[str, dict[str, Any]]] = LAYERS, **options: Any):
    """The stock module and ours, with equal weights."""
    name, always = modules[cell]
    theirs = getattr(nn, name)(*(sizes or (I, H)), **always, **options)
    ours = getattr(rnnfast, name)(*(sizes or (I, H)), **always, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def make(cell: str, *sizes: int, **options: Any) -> Any:
    """Our layer of any cell."""
    name, always = (LAYERS | {cell: (class_name, own) for cell, (class_name, own, _) in OPTIONS.items()})[cell]
    return getattr(rnnfast, name)(*(sizes or (I, H)), **(always | options))


def make_input(kind: str, module: nn.RNNBase, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A batch of a kind, in the layer's own order of dimensions."""
    generator = torch.Generator("cpu").manual_seed(seed)
    x = torch.randn(T, N, module.input_size, generator=generator, dtype=torch.float64, device="cpu").to(dtype)
    x = x.to(torch.get_default_device())
    if kind == "unbatched":
        return x[:, 0].contiguous()
    if module.batch_first:
        x = x.transpose(0, 1).contiguous()
    if kind == "batched":
        return x
    lengths = torch.tensor(LENGTHS[kind], device="cpu")
    return pack_padded_sequence(x, lengths, batch_first=module.batch_first, enforce_sorted=kind == "packed")


def make_state(kind: str, module: nn.RNNBase, dtype: torch.dtype = torch.float32) -> Any:
    """Initial states that fit the input of the same kind."""
    generator = torch.Generator("cpu").manual_seed(7)
    rows = module.num_layers * (2 if module.bidirectional else 1)
    batch = () if kind == "unbatched" else (N,)

    def state(size: int) -> Tensor:
        values = torch.randn(rows, *batch, size, generator=generator, dtype=torch.float64, device="cpu")
        return values.to(torch.get_default_device(), dtype)

    h = state(module.proj_size or module.hidden_size)
    return (h, state(module.hidden_size)) if isinstance(module, nn.LSTM) else h


def map_tensors(value: Any, function) -> Any:
    """Apply to the tensors of an input or a state; a PackedSequence keeps its own structure."""
    if value is None:
        return None
    if isinstance(value, PackedSequence):
        return value._replace(data=function(value.data))
    if isinstance(value, tuple):
        return tuple(function(v) for v in value)
    return function(value)


def tensors_of(value: Any) -> list[Tensor]:
    """All floating tensors, in order, of an input, a state or a result."""
    if value is None:
        return []
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, tuple):
        return [tensor for part in value for tensor in tensors_of(part)]
    return [value]


def evaluate_module(module: nn.Module, x: Any, *state: Any) -> Results:
    """Outputs, and the gradients of one loss that mixes them all, for input, states and every parameter."""
    x, *state = (map_tensors(v, lambda t: t.detach().clone().requires_grad_()) for v in (x, *state))
    result = module(x, *state)
    outputs = tensors_of(result)
    named = {f"input_{i}": leaf for i, leaf in enumerate([*tensors_of(x), *tensors_of(tuple(state))])}
    named |= dict(module.named_parameters())
    grads = torch.autograd.grad(outputs, list(named.values()), [cotangent(y) for y in outputs], materialize_grads=True)
    results = {f"output_{i}": y.detach() for i, y in enumerate(outputs)}
    return results | {f"grad_{name}": grad for name, grad in zip(named, grads, strict=True)}


def assert_agree(theirs: nn.Module, ours: nn.Module, x: Any, *state: Any) -> None:
    """float64: equal to rounding; other dtypes: by the tolerance rule. Also the structure around the numbers."""
    their_state = [map_tensors(value, torch.Tensor.contiguous) for value in state]  # cuDNN takes no other
    assert_same_structure(theirs(x, *their_state), ours(x, *state))
    torchs, results = evaluate_module(theirs, x, *their_state), evaluate_module(ours, x, *state)
    if tensors_of(x)[0].dtype == torch.float64:
        assert_same(results, torchs)
        return
    doubles = [map_tensors(value, torch.Tensor.double) for value in (x, *their_state)]
    assert_as_accurate(results, torchs, evaluate_module(copy.deepcopy(theirs).double(), *doubles))


def assert_same_structure(theirs: Any, ours: Any) -> None:
    """The same nesting, shapes and dtypes; for packed sequences the same batch sizes and permutations."""
    if isinstance(theirs, PackedSequence):
        assert type(ours) is PackedSequence
        for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
            expected, given = getattr(theirs, name), getattr(ours, name)
            assert given is None if expected is None else torch.equal(given, expected), name
        theirs, ours = theirs.data, ours.data
    if isinstance(theirs, tuple):
        assert type(ours) is type(theirs) and len(ours) == len(theirs)
        for their_part, our_part in zip(theirs, ours, strict=True):
            assert_same_structure(their_part, our_part)
        return
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype


def run_python(code: str, folder: Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program with the installed package, away from the source folder."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    if check:
        assert result.returncode == 0, result.stderr
    return result
