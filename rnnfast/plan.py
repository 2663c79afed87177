"""Which kernel a call takes, and why: :func:`explain`, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnfast import _C
from rnnfast.call import any_autocast, autocast_dtypes, packed_batch, under_autocast
from rnnfast.modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from rnnfast.options import CELL_OF_MODE, cell_of
from rnnfast.prepack import recurrent_weights

__all__ = ["Explanation", "LayerPlan", "explain"]


@dataclass(frozen=True)
class LayerPlan:
    """How one layer runs in one direction.

    Attributes:
        layer: from 0.
        direction: ``"forward"`` or ``"reverse"``.
        cell: the name of the op, as in ``torch.ops.rnnfast``.
        sizes: ``T``, ``N``, ``I``, ``H`` and ``P``.
        kernel: the schedule taken.
        isa: the instruction set: ``"avx512"``, ``"avx2"`` or ``"baseline"``; on a CUDA device ``"cuda"``.
        reason: why this kernel.
        details: all that the compiled part has to say, these three included.
    """

    layer: int
    direction: str
    cell: str
    sizes: dict[str, int]
    kernel: str
    isa: str
    reason: str
    details: dict[str, Any] = field(repr=False)

    def __str__(self) -> str:
        sizes = " ".join(f"{letter}={size}" for letter, size in self.sizes.items())
        rest = ", ".join(
            f"{name} {value}" for name, value in self.details.items() if name not in ("kernel", "isa", "reason")
        )
        return (
            f"layer {self.layer} {self.direction}: {self.cell} {sizes}\n"
            f"  kernel {self.kernel} ({self.isa}): {self.reason}\n"
            f"  {rest}"
        )


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found: ``str()`` of it is text to read.

    Attributes:
        module: the class of the module.
        dtype: in which the kernels take their arguments (under autocast not that of the input).
        training: whether the call would save what a backward pass needs.
        plans: one per layer and direction, in the order of running.
    """

    module: str
    dtype: torch.dtype
    training: bool
    plans: tuple[LayerPlan, ...]

    def __str__(self) -> str:
        way = "with what the backward pass needs" if self.training else "inference, nothing saved"
        return "\n".join([f"{self.module} in {self.dtype}, {way}", *(str(plan) for plan in self.plans)])


def _options(layer: torch.nn.RNNBase | torch.nn.RNNCellBase) -> tuple[str, int, int, int]:
    """Mode, number of layers, number of directions and proj_size of a layer or cell."""
    if isinstance(layer, torch.nn.RNNBase):
        return layer.mode, layer.num_layers, 2 if layer.bidirectional else 1, layer.proj_size
    if isinstance(layer, torch.nn.RNNCell):
        return f"RNN_{layer.nonlinearity.upper()}", 1, 1, 0
    return "GRU" if isinstance(layer, torch.nn.GRUCell) else "LSTM", 1, 1, 0


def _sequence_sizes(layer: Any, input: Tensor | PackedSequence, is_cell: bool) -> tuple[Tensor, int, int]:
    """The data of the input, ``T`` and ``N``."""
    if isinstance(input, PackedSequence):
        return input.data, len(input.batch_sizes), packed_batch(input.data, input.batch_sizes)
    ranks = (1, 2) if is_cell else (2, 3)
    if input.dim() not in ranks:
        raise ValueError(f"explain: Expected input to be {ranks[0]}D or {ranks[1]}D, got {input.dim()}D instead")
    outer = input.shape[:-1]
    if is_cell:
        return input, 1, outer[0] if outer else 1
    if len(outer) == 1:
        return input, outer[0], 1
    return input, outer[layer.batch_first], outer[1 - layer.batch_first]


def explain(layer: torch.nn.Module, input: Tensor | PackedSequence, hx: Any = None) -> Explanation:
    """Say which kernel each layer and direction of ``layer(input, hx)`` takes, and why, without running it.

    Args:
        layer: one of rnnfast's six modules.
        input: what the layer would be called with; only its shape, dtype, device and requires_grad matter.
        hx: likewise.

    Returns:
        An :class:`Explanation`: data, and readable text by ``str()``.

    Raises:
        TypeError: ``layer`` is no module of rnnfast's.
        ValueError, RuntimeError: input that the layer would refuse for its rank or size.
    """
    if not isinstance(layer, (RNN, GRU, LSTM, RNNCell, GRUCell, LSTMCell)):
        raise TypeError(f"explain: layer must be one of rnnfast's modules, got {type(layer).__name__}")
    is_cell = isinstance(layer, torch.nn.RNNCellBase)
    mode, num_layers, directions, proj_size = _options(layer)
    data, num_steps, batch = _sequence_sizes(layer, input, is_cell)
    if data.shape[-1] != layer.input_size:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {layer.input_size}, got {data.shape[-1]}"
        )
    states: list[Tensor] = [] if hx is None else [hx] if isinstance(hx, Tensor) else list(hx)
    dtype = data.dtype
    if any_autocast() and under_autocast(data):
        h0, c0 = [*states, None, None][:2]
        stepwise = is_cell or (isinstance(input, PackedSequence) and input.batch_sizes[0] != input.batch_sizes[-1])
        dtype = autocast_dtypes(mode, proj_size, bool(stepwise), data, h0, c0)[0] or dtype
    training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (data, *states, *layer.parameters()))
    dtype_name = str(dtype).removeprefix("torch.")
    device = data.device.index if data.is_cuda else None
    state_size = proj_size or layer.hidden_size
    cell = CELL_OF_MODE[mode] if is_cell else cell_of(layer)
    weights = recurrent_weights(layer)
    plans = []
    for i in range(num_layers):
        sizes: dict[str, int] = {
            "T": num_steps,
            "N": batch,
            "I": layer.input_size if i == 0 else state_size * directions,
            "H": layer.hidden_size,
            "P": state_size,
        }
        for direction in ("forward", "reverse")[:directions]:
            weight_hh = next(weights)
            details = _C.explain(
                cell,
                **sizes,
                dtype=dtype_name,
                training=training,
                threads=torch.get_num_threads(),
                device=device,
                recompute=getattr(layer, "recompute", False),
                prepacked=weight_hh is not None and weight_hh.dtype == dtype and _C.is_prepacked(weight_hh),
            )
            kernel, isa, reason = str(details["kernel"]), str(details["isa"]), str(details["reason"])
            plans.append(LayerPlan(i, direction, cell, sizes, kernel, isa, reason, dict(details)))
    return Explanation(type(layer).__name__, dtype, training, tuple(plans))
