"""torch.nn's recurrent layers on rnnfast's kernels.

Each class is a subclass of torch.nn's class of the same name that overrides ``forward`` and adds no state of its own:
parameters, initial values, state_dict, repr, pickles and hooks are torch's, and ``module.__class__ = rnnfast.LSTM``
turns a living torch.nn module into ours. Weights are looked up by name at every call, so that whatever replaces them
(parametrizations, pruning, weight dropping, ``torch.func.functional_call``) is seen.

What goes wrong is found by cheap comparisons on the way; the message is composed only then, by the ``_refuse_``
functions. :func:`explain` says which kernel a call takes.

Letters: ``T`` steps, ``N`` batch, ``I`` input size, ``H`` hidden size, ``P`` proj_size or ``H``, ``L`` layers,
``D`` directions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, NoReturn, TypeAlias, TypeVar, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnfast import _C

__all__ = ["GRU", "LSTM", "RNN", "Explanation", "GRUCell", "LSTMCell", "LayerPlan", "RNNCell", "explain"]

_States = tuple[Tensor, Tensor]
_Lengths = Tensor | Sequence[int]
_Op = Callable[..., tuple[Tensor, Tensor, Tensor]]
_Layer: TypeAlias = "RNN | GRU | LSTM"

_CELL_OF_MODE = {"RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu", "GRU": "gru", "LSTM": "lstm"}
# A GRU by reset_after and gates.
_CELL_OF_GRU = {
    (True, "both"): "gru",
    (False, "both"): "gru_before",
    (True, "reset"): "gru_reset",
    (False, "reset"): "gru_reset_before",
    (True, "update"): "gru_update",
}
_OPTIONS = ("reset_after", "gates", "peephole", "coupled", "zoneout", "recurrent_dropout")  # that torch.nn has not
_ALL_OPTIONS = (*_OPTIONS, "recompute")  # with that which changes no result


class _Kernel(NamedTuple):
    """What runs a cell: its op, that which also returns c of all steps (of a cell that has it), its weights."""

    op: _Op
    all_c_op: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] | None
    num_gates: int
    num_peepholes: int

    @classmethod
    def of(cls, cell: dict[str, Any]) -> _Kernel:
        ops, name = torch.ops.rnnfast, cell["name"]
        all_c_op = getattr(ops, f"{name}_all_c").default if cell["num_states"] == 2 else None
        return cls(getattr(ops, name).default, all_c_op, cell["num_gates"], cell["num_peepholes"])


# By the name of the cell, and for torch.nn's own by the mode too.
_KERNELS = {cell["name"]: _Kernel.of(cell) for cell in _C.cells()}
_KERNELS |= {mode: _KERNELS[cell] for mode, cell in _CELL_OF_MODE.items()}
_LSTM_OP, _GRU_OP = _KERNELS["LSTM"].op, _KERNELS["GRU"].op
_RNN_OP_OF_NONLINEARITY = {"tanh": _KERNELS["RNN_TANH"].op, "relu": _KERNELS["RNN_RELU"].op}
_any_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled
# torch.nn's own classes, also while patch_torch() has put ours in their place.
_TorchRNN, _TorchGRU, _TorchLSTM = torch.nn.RNN, torch.nn.GRU, torch.nn.LSTM
_TorchRNNCell, _TorchGRUCell, _TorchLSTMCell = torch.nn.RNNCell, torch.nn.GRUCell, torch.nn.LSTMCell


# --- The way of a call through RNN, GRU and LSTM ----------------------------------------------------------------------


def _forward(
    layer: _Layer, input: Any, hx: Any, resets: Any, lengths: Any, return_cells: bool = False
) -> tuple[Any, ...]:
    """All of ``forward`` for the three layers: layers times directions, one op call each."""
    mode = layer.mode
    sorted_indices = unsorted_indices = batch_sizes = None
    packed = isinstance(input, PackedSequence)
    if packed:
        steps, batch_sizes, sorted_indices, unsorted_indices = input
        batch = _packed_batch(steps, batch_sizes)
        ndim = 3
        if resets is not None or lengths is not None:
            _refuse_with_packed(mode, resets)
    else:
        if not isinstance(input, Tensor):
            raise TypeError(f"{_kind(mode)}: input must be a Tensor or a PackedSequence, got {type(input).__name__}")
        ndim = input.dim()
        if ndim == 3:
            steps = input.transpose(0, 1) if layer.batch_first else input
        elif ndim == 2:
            steps = input.unsqueeze(1)
        else:
            tensor = " tensor" if mode.startswith("RNN") else ""
            raise ValueError(f"{_kind(mode)}: Expected input to be 2D or 3D, got {ndim}D{tensor} instead")
        num_steps, batch, _ = steps.shape
        if num_steps == 0:
            raise RuntimeError(
                f"Expected sequence length to be larger than 0 in RNN: input {tuple(input.shape)} has no step"
            )
    if steps.shape[-1] != layer.input_size:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {layer.input_size}, got {steps.shape[-1]}"
        )

    if resets is not None:
        resets = _steps_of_resets(mode, resets, input, layer.batch_first)
    if lengths is not None:
        lengths = _checked_lengths(mode, lengths, ndim, num_steps, batch)

    names_of_layers = layer._all_weights
    hidden_size, bias, proj_size = layer.hidden_size, layer.bias, layer.proj_size
    state_size = proj_size or hidden_size

    h0 = c0 = None
    if hx is not None:
        if mode == "LSTM":
            if not isinstance(hx, (tuple, list)) or len(hx) != 2:
                _refuse_pair("LSTM", hx)
            h0, c0 = hx
            _check_state(mode, "hidden[0]", h0, ndim, (len(names_of_layers), batch, state_size), steps)
            _check_state(mode, "hidden[1]", c0, ndim, (len(names_of_layers), batch, hidden_size), steps)
        else:
            h0 = hx
            _check_state(mode, "hidden", h0, ndim, (len(names_of_layers), batch, state_size), steps)
        if ndim == 2:
            h0 = h0.unsqueeze(1)
            c0 = None if c0 is None else c0.unsqueeze(1)
        elif sorted_indices is not None:
            h0 = h0.index_select(1, sorted_indices)
            c0 = None if c0 is None else c0.index_select(1, sorted_indices)

    weights = [_weights(layer, names, bias, proj_size) for names in names_of_layers]
    first = weights[0][0]
    if steps.device != first.device:
        _refuse_device("input", steps, first)
    output_dtype = None
    if _any_autocast() and _under_autocast(steps):
        stepwise = batch_sizes is not None and batch_sizes[0] != batch_sizes[-1]
        compute_dtype, output_dtype = _autocast_dtypes(mode, proj_size, bool(stepwise), steps, h0, c0)
        if compute_dtype is not None:
            steps, h0, c0 = (_cast(tensor, compute_dtype) for tensor in (steps, h0, c0))
            weights = [tuple(_cast(weight, compute_dtype) for weight in five) for five in weights]
        if steps.dtype != weights[0][0].dtype:
            raise RuntimeError(
                f"{_kind(mode)}: under autocast input and weights must have the same dtype, but got "
                f"{steps.dtype} and {weights[0][0].dtype}: float64 and integers are not cast"
            )
    elif steps.dtype != first.dtype:
        _refuse_input_dtype(steps.dtype, first.dtype)
    if (h0 is not None and h0.dtype != steps.dtype) or (c0 is not None and c0.dtype != steps.dtype):
        _refuse_state_dtype(mode, steps, h0, c0)

    output: Any
    output, h_n, c_n, cells = _run_layers(layer, steps, h0, c0, weights, (batch_sizes, lengths, resets), return_cells)

    if output_dtype is not None:
        output, h_n = output.to(output_dtype), h_n.to(output_dtype)
    if packed:
        output = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        if return_cells:
            cells = PackedSequence(cells, batch_sizes, sorted_indices, unsorted_indices)
        if unsorted_indices is not None:
            h_n = h_n.index_select(1, unsorted_indices)
            c_n = None if c_n is None else c_n.index_select(1, unsorted_indices)
    elif ndim == 2:
        output, h_n = output.squeeze(1), h_n.squeeze(1)
        c_n = None if c_n is None else c_n.squeeze(1)
        cells = None if cells is None else cells.squeeze(1)
    elif layer.batch_first:
        output = output.transpose(0, 1)
        cells = None if cells is None else cells.transpose(0, 1)
    if return_cells:
        return output, (h_n, c_n), cells
    return output, (h_n if c_n is None else (h_n, c_n))


def _run_layers(
    layer: _Layer,
    steps: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[tuple[Any, ...]],
    bounds: tuple[Tensor | None, Tensor | None, Tensor | None],
    return_cells: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Any]:
    """Stack the layers and directions.

    Takes steps ``[T, N, I]`` or ``[rows, I]``, h0 ``[L*D, N, P]``, c0 ``[L*D, N, H]`` and, as ``bounds``, the op's
    batch_sizes, lengths and resets; gives output with last dimension ``D*P``, h_n like h0, c_n like c0 or, for a cell
    with one state, None, and with ``return_cells`` the last layer's c of all steps, last dimension ``D*H``, else None.
    """
    op, all_c_op, num_gates, num_peepholes = _KERNELS[layer._variant or layer.mode]
    is_special = num_peepholes or layer.zoneout or layer.recurrent_dropout or layer.recompute
    extras: tuple[Any, ...] = ()
    gate_size = num_gates * layer.hidden_size
    directions = 2 if layer.bidirectional else 1
    dropout = layer.dropout if layer.training else 0.0
    no_states = (None,) * len(weights)
    h0s = no_states if h0 is None else h0.unbind(0)
    c0s = no_states if c0 is None else c0.unbind(0)
    h_ns: list[Tensor] = []
    c_ns: list[Tensor] = []
    try:
        for i in range(0, len(weights), directions):
            if dropout != 0 and i > 0:
                steps = torch.dropout(steps, dropout, True)
            outputs, cells = [], []
            wants_cells = return_cells and i + directions == len(weights)
            for d in range(i, i + directions):
                five = weights[d]
                if five[1].shape[0] != gate_size:  # the op cannot know hidden_size: it would take the weights' word
                    _refuse_weights(layer)
                if is_special:
                    extras = _extras(layer, d, steps, bounds[0], five[1])
                if wants_cells:
                    assert all_c_op is not None
                    output, h_n, c_n, all_c = all_c_op(steps, h0s[d], c0s[d], *five, *bounds, d > i, *extras)
                    cells.append(all_c)
                else:
                    output, h_n, c_n = op(steps, h0s[d], c0s[d], *five, *bounds, d > i, *extras)
                outputs.append(output)
                h_ns.append(h_n)
                c_ns.append(c_n)
            steps = outputs[0] if directions == 1 else torch.cat(outputs, -1)
    except (RuntimeError, ValueError, TypeError, IndexError):
        _refuse_weights(layer)  # names the parameter, where a parameter is at fault; else the op's own words
        raise
    all_cells = None if not return_cells else cells[0] if directions == 1 else torch.cat(cells, -1)
    if len(h_ns) == 1:
        return steps, h_n.unsqueeze(0), None if all_c_op is None else c_n.unsqueeze(0), all_cells
    return steps, torch.stack(h_ns), None if all_c_op is None else torch.stack(c_ns), all_cells


def _extras(layer: _Layer, d: int, steps: Tensor, batch_sizes: Tensor | None, weight_hh: Tensor) -> tuple[Any, ...]:
    """What plain calls do not have: weight_ch, recurrent_mask, zoneout_h, zoneout_c, recompute; of direction ``d``.

    Masks are drawn from torch's generator, first that of recurrent dropout, then of h, then of c.
    """
    weight_ch = recurrent_mask = None
    if _KERNELS[layer._variant or layer.mode].num_peepholes:
        weight_ch = getattr(layer, _peephole_name(layer, d))
        if _any_autocast():  # cast as the other weights were
            weight_ch = _cast(weight_ch, weight_hh.dtype)
    if layer.recurrent_dropout and layer.training:
        batch = steps.shape[1] if batch_sizes is None else int(batch_sizes[0])
        ones = weight_hh.new_ones(batch, weight_hh.shape[1])
        recurrent_mask = torch.dropout(ones, layer.recurrent_dropout, True)
    rows = steps.shape if steps.dtype == torch.int64 else steps.shape[:-1]
    shape = (*rows, layer.hidden_size)
    masks: list[Tensor | None] = []
    for probability in _zoneouts(layer):
        if not probability:
            masks.append(None)
        elif layer.training:
            masks.append(weight_hh.new_empty(shape).bernoulli_(probability))
        else:
            masks.append(weight_hh.new_full(shape[-1:], probability).expand(shape))
    return weight_ch, recurrent_mask, *masks, layer.recompute


def _zoneouts(layer: Any) -> tuple[float, float]:
    """The probabilities for h and for c; torch.nn's own layers have none."""
    zoneout = getattr(layer, "zoneout", 0.0)
    if isinstance(zoneout, tuple):
        return zoneout
    return zoneout, zoneout if layer.mode == "LSTM" else 0.0


def _peephole_name(layer: _Layer, d: int) -> str:
    return f"weight_ch{layer._all_weights[d][0].removeprefix('weight_ih')}"


def _loop_weights(layer: Any) -> list[Tensor | None]:
    """All that the loops of ``csrc/generate.cpp`` take of each layer, which run as in evaluation."""
    found: list[Tensor | None] = []
    for d, names in enumerate(layer._all_weights):
        five = _weights(layer, names, layer.bias, layer.proj_size)
        name = _peephole_name(layer, d)
        zoneouts = [five[1].new_full((layer.hidden_size,), z) if z else None for z in _zoneouts(layer)]
        found += [*five, getattr(layer, name, None), *zoneouts]
    return found


def _weights(layer: torch.nn.RNNBase, names: Sequence[str], bias: bool, proj_size: int) -> tuple[Any, ...]:
    """One direction's weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, as they are now; None where there is none."""
    parameters = layer._parameters
    found: list[Any] = []
    for name in names:
        weight = parameters.get(name)
        if weight is None:  # replaced by a plain attribute or a property (weight dropping, parametrize, prune)
            weight = getattr(layer, name)
            if weight is None:
                raise TypeError(f"{_kind(layer.mode)}: {name} must be a Tensor, got None")
        found.append(weight)
    if bias:
        return (*found, None) if not proj_size else tuple(found)
    return (*found, None, None, None) if not proj_size else (found[0], found[1], None, None, found[2])


def _packed_batch(steps: Tensor, batch_sizes: Tensor) -> int:
    """The batch of a packed sequence. The op checks the batch sizes themselves."""
    if torch.compiler.is_exporting():
        raise RuntimeError(
            "a PackedSequence cannot be exported: its sizes are known only from its data (torch.export, torch.onnx). "
            "Export with padded input, or call rnnfast.ops with lengths"
        )
    if steps.dim() != 2:
        raise RuntimeError(
            f"input must have 2 dimensions, got {steps.dim()}: the data of a PackedSequence is [rows, I]"
        )
    if batch_sizes.numel() == 0:
        raise IndexError("input.batch_sizes of the PackedSequence must name at least one step, got none")
    return int(batch_sizes[0])


def _steps_of_resets(mode: str, resets: Any, input: Tensor, batch_first: bool) -> Tensor:
    """The resets as the op takes them, ``[T, N]``, or an exception."""
    kind = _kind(mode)
    if not isinstance(resets, Tensor):
        raise TypeError(f"{kind}: resets must be a bool Tensor, got {type(resets).__name__}")
    if resets.dtype != torch.bool:
        raise ValueError(f"{kind}: resets must be of torch.bool, got {resets.dtype}. Convert it: resets.bool()")
    if resets.shape != input.shape[:-1]:
        letters = "[T]" if input.dim() == 2 else "[N, T] (batch_first)" if batch_first else "[T, N]"
        raise ValueError(
            f"{kind}: resets must have the shape {letters} = {tuple(input.shape[:-1])} of the input, "
            f"got {tuple(resets.shape)}"
        )
    if resets.device != input.device:
        raise ValueError(
            f"{kind}: resets must be at the input's device, {input.device}, got {resets.device}. "
            "Convert it: resets.to(input.device)"
        )
    if input.dim() == 2:
        return resets.unsqueeze(1)
    return resets.transpose(0, 1) if batch_first else resets


def _checked_lengths(mode: str, lengths: Any, input_ndim: int, num_steps: int, batch: int) -> Tensor:
    """The lengths as the op takes them, int64 ``[N]`` on the CPU, or an exception."""
    kind = _kind(mode)
    if input_ndim == 2:
        raise ValueError(f"{kind}: lengths need a batch, but the input is 2-D (unbatched): cut off its padding instead")
    if not isinstance(lengths, Tensor):
        try:
            lengths = torch.as_tensor(lengths) if len(lengths) else torch.empty(0, dtype=torch.int64)
        except (TypeError, ValueError, RuntimeError) as error:
            as_tensor = "; give torch.export a Tensor, which keeps them out of the shapes"
            hint = as_tensor if torch.compiler.is_compiling() else ""
            raise ValueError(f"{kind}: lengths must be {batch} integers, [N], got {lengths!r}{hint}") from error
    if lengths.dtype == torch.bool or lengths.is_floating_point() or lengths.is_complex():
        raise ValueError(f"{kind}: lengths must be integers, got {lengths.dtype}. Convert it: lengths.long()")
    if lengths.shape != (batch,):
        raise ValueError(f"{kind}: lengths must have the shape [N] = ({batch},), got {tuple(lengths.shape)}")
    if lengths.is_meta:
        raise ValueError(f"{kind}: lengths must have values, got a tensor at meta")
    counts: Tensor = lengths.to("cpu", torch.int64)
    if not torch.compiler.is_compiling() and batch:  # tracing has no values; the op checks them again
        low, high = (int(value) for value in counts.aminmax())
        if low < 0 or high > num_steps:
            raise ValueError(
                f"{kind}: lengths must be from 0 to T = {num_steps}, the steps of the input, "
                f"got {low if low < 0 else high}"
            )
    return counts


def _check_state(
    mode: str, name: str, state: Any, input_ndim: int, expected: tuple[int, int, int], steps: Tensor
) -> None:
    """Refuse an initial state that is not ``expected`` (without the batch for 2-D input)."""
    if not isinstance(state, Tensor):
        raise TypeError(f"{_kind(mode)}: {name} (hx) must be a Tensor, got {type(state).__name__}")
    if state.dim() != input_ndim:
        batched = "batched 3-D" if input_ndim == 3 else "unbatched 2-D"
        if mode == "LSTM":
            raise RuntimeError(
                f"For {batched} input, hx and cx should also be {input_ndim}-D but got {name} of {state.dim()}-D"
            )
        raise RuntimeError(f"For {batched} input, hx should also be {input_ndim}-D but got {state.dim()}-D tensor")
    shape = state.shape
    if shape[0] != expected[0] or shape[-1] != expected[2] or (input_ndim == 3 and shape[1] != expected[1]):
        raise RuntimeError(
            f"Expected {name} size {expected}, got {list(shape)}"
            f"{'' if input_ndim == 3 else ' (without the batch dimension)'}: "
            "(layers * directions, batch, features), the batch being that of the input"
        )
    if state.device != steps.device:
        raise RuntimeError(
            f"Input and hidden tensors are not at the same device, found input tensor at {steps.device} "
            f"and {name} at {state.device}"
        )


def _under_autocast(input: Tensor) -> bool:
    """Whether autocast is on for the input's kind of device; to be asked after the cheap ``_any_autocast``."""
    kind = input.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What autocast does to an argument: float64 and integers stay as they are, and the op then refuses the mixture."""
    if tensor is None or tensor.dtype == torch.float64 or not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype)


def _autocast_dtypes(
    mode: str, proj_size: int, stepwise: bool, input: Tensor, h0: Tensor | None, c0: Tensor | None
) -> tuple[torch.dtype | None, torch.dtype | None]:
    """The dtype to compute in, and the one to give output and h_n if another; (None, None) where autocast stays away.

    torch casts the products only, so that what comes out depends on the cell. A state that is updated by a sum (GRU's
    h, the LSTM's c) keeps the wider of its own dtype and autocast's; without hx it starts in the input's dtype. The
    exception is an LSTM that torch runs as one fused operation, in autocast's dtype throughout: one without projection
    and not ``stepwise``, which stands for a single step and a ragged packed batch.
    """
    if not input.is_floating_point() or input.dtype == torch.float64:
        return None, None
    low = torch.get_autocast_dtype(input.device.type)
    if mode.startswith("RNN") or (mode == "LSTM" and not proj_size and not stepwise):
        return low, None
    summed = h0 if mode == "GRU" else c0
    own = input.dtype if summed is None else summed.dtype
    compute = low if own == torch.float64 else torch.promote_types(low, own)
    return compute, low if proj_size else None


# --- Refusals ---------------------------------------------------------------------------------------------------------


def _kind(mode: str) -> str:
    return mode.partition("_")[0]


def _refuse_pair(kind: str, hx: Any) -> NoReturn:
    what = f"{len(hx)} values" if isinstance(hx, (tuple, list)) else type(hx).__name__
    raise TypeError(f"{kind}: hx must be a pair (h_0, c_0) of Tensors, got {what}")


def _refuse_with_packed(mode: str, resets: Any) -> NoReturn:
    if resets is None:
        raise ValueError(
            f"{_kind(mode)}: lengths do not go with a PackedSequence, which already says them: leave them out, "
            "or give the padded Tensor with its lengths"
        )
    raise ValueError(
        f"{_kind(mode)}: resets do not go with a PackedSequence: give the padded Tensor, with lengths= if sequences "
        "are of different length (torch.nn.utils.rnn.pad_packed_sequence makes both)"
    )


def _refuse_input_dtype(given: torch.dtype, weight: torch.dtype) -> NoReturn:
    message = f"RNN input dtype ({given}) does not match weight dtype ({weight}). Convert input: input.to({weight})"
    if given.is_floating_point:
        raise ValueError(f"{message}, or convert model: model.to({given})")
    if given.is_complex:
        raise ValueError(
            f"{message}, which drops the imaginary part. No layer computes with complex numbers; as real ones they are "
            "torch.view_as_real(input).flatten(-2), for a layer of twice the input_size"
        )
    raise ValueError(f"{message}; indices of tokens or classes go through an embedding or one_hot first")


def _refuse_device(name: str, tensor: Tensor, weight: Tensor) -> NoReturn:
    raise RuntimeError(
        f"Input and parameter tensors are not at the same device, found {name} tensor at {tensor.device} "
        f"and parameter tensor at {weight.device}"
    )


def _refuse_state_dtype(mode: str, input: Tensor, h0: Tensor | None, c0: Tensor | None) -> NoReturn:
    names = ("hidden[0]", "hidden[1]") if mode == "LSTM" else ("hidden", "")
    name, state = next(
        (name, state)
        for name, state in zip(names, (h0, c0), strict=True)
        if state is not None and state.dtype != input.dtype
    )
    raise RuntimeError(
        f"{_kind(mode)}: the dtype of {name} (hx), {state.dtype}, must be that of the input and the weights, "
        f"{input.dtype}. Convert it: hx.to({input.dtype})"
    )


def _refuse_weights(layer: _Layer) -> None:
    """Raise for the first parameter that does not fit the layer's own sizes, dtype and device; else return."""
    gate_size = _KERNELS[layer._variant or layer.mode].num_gates * layer.hidden_size
    state_size = layer.proj_size or layer.hidden_size
    directions = 2 if layer.bidirectional else 1
    for i, names in enumerate(layer._all_weights):
        input_size = layer.input_size if i < directions else state_size * directions
        shapes = {
            "weight_ih": (gate_size, input_size),
            "weight_hh": (gate_size, state_size),
            "bias_ih": (gate_size,),
            "bias_hh": (gate_size,),
            "weight_hr": (state_size, layer.hidden_size),
        }
        num_peepholes = _KERNELS[layer._variant or layer.mode].num_peepholes
        if num_peepholes:
            shapes["weight_ch"] = (num_peepholes * layer.hidden_size,)
            names = [*names, _peephole_name(layer, i)]
        for name in names:
            _refuse_weight(_kind(layer.mode), name, getattr(layer, name), shapes[name.rpartition("_l")[0]])
    first_name = layer._all_weights[0][0]
    first = getattr(layer, first_name)
    for names in layer._all_weights:
        for name in names:
            weight = getattr(layer, name)
            if weight.dtype != first.dtype or weight.device != first.device:
                raise RuntimeError(
                    f"{_kind(layer.mode)}: {name} is {weight.dtype} at {weight.device}, but {first_name} is "
                    f"{first.dtype} at {first.device}; all parameters must be alike"
                )


def _refuse_weight(kind: str, name: str, weight: Any, expected: tuple[int, ...]) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"{kind}: {name} must be a Tensor, got {type(weight).__name__}")
    if weight.shape != expected:
        raise RuntimeError(f"{kind}: {name} must have the shape {expected}, got {tuple(weight.shape)}")


# --- The way of a call through the cells ------------------------------------------------------------------------------


def _cell_forward(
    cell: torch.nn.RNNCellBase, kind: str, op: _Op, input: Any, h: Any, c: Any, names: tuple[str, str]
) -> tuple[Tensor, Tensor]:
    """One step: h' ``[N, H]`` and c' (``[0]`` for a cell with one state), or without ``N`` for 1-D input."""
    if not isinstance(input, Tensor):
        raise TypeError(f"{kind}: input must be a Tensor, got {type(input).__name__}")
    ndim = input.dim()
    if ndim != 2:
        if ndim != 1:
            raise ValueError(f"{kind}: Expected input to be 1D or 2D, got {ndim}D instead")
        input = input.unsqueeze(0)
    batch, features = input.shape
    if features != cell.input_size:
        raise RuntimeError(f"input has inconsistent input_size: got {features} expected {cell.input_size}")
    hidden_size = cell.hidden_size
    if h is not None:
        h = _cell_state(kind, names[0], 0, h, ndim, batch, hidden_size)
        if op is _LSTM_OP:
            c = _cell_state(kind, names[1], 1, c, ndim, batch, hidden_size)

    parameters = cell._parameters
    weight_ih: Any = parameters.get("weight_ih")
    weight_hh: Any = parameters.get("weight_hh")
    if weight_ih is None:
        weight_ih = cell.weight_ih
    if weight_hh is None:
        weight_hh = cell.weight_hh
    bias_ih: Any = None
    bias_hh: Any = None
    if cell.bias:
        bias_ih, bias_hh = parameters.get("bias_ih"), parameters.get("bias_hh")
        if bias_ih is None:
            bias_ih = cell.bias_ih
        if bias_hh is None:
            bias_hh = cell.bias_hh

    if input.device != weight_ih.device:
        _refuse_device("input", input, weight_ih)
    if _any_autocast() and _under_autocast(input):
        mode = "LSTM" if op is _LSTM_OP else "GRU" if op is _GRU_OP else "RNN"
        compute_dtype, _ = _autocast_dtypes(mode, 0, True, input, h, c)
        if compute_dtype is not None:
            input, h, c, weight_ih, weight_hh, bias_ih, bias_hh = (
                _cast(tensor, compute_dtype) for tensor in (input, h, c, weight_ih, weight_hh, bias_ih, bias_hh)
            )
    dtype = input.dtype
    if dtype != weight_ih.dtype or (h is not None and h.dtype != dtype) or (c is not None and c.dtype != dtype):
        _refuse_cell_dtype(kind, names, input, h, c, weight_ih)

    try:
        if weight_hh.shape[1] != hidden_size:
            _refuse_cell_weights(cell, kind, op)
        _, h, c = op(input, h, c, weight_ih, weight_hh, bias_ih, bias_hh, None)
    except (RuntimeError, ValueError, TypeError, IndexError):
        _refuse_cell_weights(cell, kind, op)
        raise
    if ndim == 1:
        return h.squeeze(0), c.squeeze(0)
    return h, c


def _cell_state(kind: str, name: str, index: int, state: Any, input_ndim: int, batch: int, hidden_size: int) -> Any:
    """The state as ``[N, H]``, or an exception."""
    if not isinstance(state, Tensor):
        raise TypeError(f"{kind}: {name} must be a Tensor, got {type(state).__name__}")
    ndim = state.dim()
    if ndim not in (1, 2):
        raise ValueError(f"{kind}: Expected {name} to be 1D or 2D, got {ndim}D instead")
    if input_ndim == 1:
        state = state.unsqueeze(0)
        if ndim == 2:
            raise RuntimeError(
                f"hidden{index} has inconsistent hidden_size: got {state.shape[1]}, expected {hidden_size}; "
                f"for unbatched 1-D input {name} should also be 1-D, but it is {ndim}-D"
            )
    rows, size = (state.shape[0], state.shape[-1])
    if ndim == 1 and input_ndim == 2:
        raise RuntimeError(
            f"Input batch size {batch} doesn't match hidden{index} batch size {rows}: "
            f"for batched 2-D input {name} should also be 2-D, but it is 1-D"
        )
    if rows != batch:
        raise RuntimeError(f"Input batch size {batch} doesn't match hidden{index} batch size {rows}")
    if size != hidden_size:
        raise RuntimeError(f"hidden{index} has inconsistent hidden_size: got {size}, expected {hidden_size}")
    return state


def _refuse_cell_dtype(
    kind: str, names: tuple[str, str], input: Tensor, h: Tensor | None, c: Tensor | None, weight: Tensor
) -> NoReturn:
    if input.dtype != weight.dtype:
        raise RuntimeError(
            f"{kind}: input and weights must have the same dtype, but got {input.dtype} and {weight.dtype}. "
            f"Convert input: input.to({weight.dtype})"
        )
    name, state = (names[0], h) if h is not None and h.dtype != input.dtype else (names[1], c)
    given = None if state is None else state.dtype
    raise RuntimeError(f"{kind}: input and {name} must have the same dtype, but got {input.dtype} and {given}")


def _refuse_cell_weights(cell: torch.nn.RNNCellBase, kind: str, op: _Op) -> None:
    """Raise for the first parameter that does not fit the cell's own sizes; else return."""
    gate_size = (4 if op is _LSTM_OP else 3 if op is _GRU_OP else 1) * cell.hidden_size
    _refuse_weight(kind, "weight_ih", cell.weight_ih, (gate_size, cell.input_size))
    _refuse_weight(kind, "weight_hh", cell.weight_hh, (gate_size, cell.hidden_size))
    if cell.bias:
        _refuse_weight(kind, "bias_ih", cell.bias_ih, (gate_size,))
        _refuse_weight(kind, "bias_hh", cell.bias_hh, (gate_size,))


# --- Back to torch.nn -------------------------------------------------------------------------------------------------

_Module = TypeVar("_Module", bound=torch.nn.Module)


def _as_stock(module: torch.nn.Module, stock: type[_Module]) -> _Module:
    """A module of class ``stock`` with ``module``'s state; parameters and hooks are shared, containers are not."""
    options = _options_beyond_torch(module)
    if options:
        raise ValueError(f"{type(module).__name__}: torch.nn.{stock.__name__} has no {options}")
    cls: type[_Module] = stock
    if torch.nn.utils.parametrize.is_parametrized(module):
        # parametrize gives a module a class of its own that holds the parametrized names as properties.
        own = {name: value for name, value in vars(type(module)).items() if name not in ("__dict__", "__weakref__")}
        cls = type(f"Parametrized{stock.__name__}", (stock,), own)
    twin = cls.__new__(cls)
    twin.__dict__.update(
        {
            name: copy.copy(value) if isinstance(value, (dict, list, set)) else value
            for name, value in vars(module).items()
            if name != "recompute"
        }
    )
    return twin


# --- The cells that torch.nn has not ----------------------------------------------------------------------------------


def _options_beyond_torch(module: torch.nn.Module, names: Sequence[str] = _OPTIONS) -> str:
    """What a module has that torch.nn cannot express, as it would be said to the constructor; empty for nothing."""
    given = {name: vars(module)[name] for name in names if name in vars(module)}
    return ", ".join(f"{name}={value!r}" for name, value in given.items() if value != getattr(type(module), name))


def _set_recompute(layer: _Layer, recompute: Any) -> None:
    if not isinstance(recompute, bool):
        raise TypeError(f"{_kind(layer.mode)}: recompute should be of type bool, got: {type(recompute).__name__}")
    _set_options(layer, recompute=recompute)


def _probability(kind: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{kind}: {name} should be a number in range [0, 1], got: {value!r}")
    return float(value)


def _set_options(layer: _Layer, **options: Any) -> None:
    """Set those that are not their class's default, which alone may be found on the object."""
    for name, value in options.items():
        if value != getattr(type(layer), name):
            setattr(layer, name, value)


def _set_masks(layer: _Layer, zoneout: Any, recurrent_dropout: Any) -> None:
    """Check and set the options of the recurrent path."""
    kind = _kind(layer.mode)
    if isinstance(zoneout, (tuple, list)) and layer.mode == "LSTM" and len(zoneout) == 2:
        zoneout = (_probability(kind, "zoneout[0]", zoneout[0]), _probability(kind, "zoneout[1]", zoneout[1]))
        zoneout = zoneout if any(zoneout) else 0.0
    else:
        zoneout = _probability(kind, "zoneout", zoneout)
    if zoneout and layer.proj_size:
        raise ValueError(f"{kind}: zoneout does not go with proj_size: h has another size than what the cell makes")
    recurrent_dropout = _probability(kind, "recurrent_dropout", recurrent_dropout)
    _set_options(layer, zoneout=zoneout, recurrent_dropout=recurrent_dropout)


def _cell_of(module: torch.nn.Module) -> str:
    """The name of a layer's cell; torch.nn's own layers too."""
    return getattr(module, "_variant", None) or _CELL_OF_MODE[str(module.mode)]


def _gru_cell(reset_after: Any, gates: Any) -> str:
    """The name of the cell, or an exception."""
    if not isinstance(reset_after, bool):
        raise TypeError(f"GRU: reset_after should be of type bool, got: {type(reset_after).__name__}")
    if gates not in ("both", "reset", "update"):
        raise ValueError(f"GRU: gates should be 'both', 'reset' or 'update', got: {gates!r}")
    if gates == "update" and not reset_after:
        raise ValueError("GRU: reset_after=False with gates='update' makes no sense: there is no reset gate")
    return _CELL_OF_GRU[reset_after, gates]


def _become(layer: _Layer, cell: str) -> None:
    """Make a layer that torch.nn just made one of another cell: parameters keep the rows of as many gates as it has."""
    rows = _KERNELS[cell].num_gates * layer.hidden_size
    layer._variant = cell
    for d in range(len(layer._all_weights) if _KERNELS[cell].num_peepholes else 0):
        like: Any = layer.weight_ih_l0
        weight = like.new_empty(_KERNELS[cell].num_peepholes * layer.hidden_size)
        torch.nn.init.uniform_(weight, -(layer.hidden_size**-0.5), layer.hidden_size**-0.5)
        layer.register_parameter(_peephole_name(layer, d), torch.nn.Parameter(weight.detach()))
    if rows == _KERNELS[layer.mode].num_gates * layer.hidden_size:
        return
    for name in [name for names in layer._all_weights for name in names if not name.startswith("weight_hr")]:
        setattr(layer, name, torch.nn.Parameter(getattr(layer, name).detach()[:rows].clone()))


# --- The classes ------------------------------------------------------------------------------------------------------


class RNN(torch.nn.RNN):
    r"""torch.nn.RNN with fused kernels: the same arguments, parameters, results and errors.

    For each layer and direction, with :math:`\phi` tanh or, for ``nonlinearity="relu"``, the rectifier:

    .. math:: h_t = \phi(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})

    Source: Elman, "Finding structure in time", Cognitive Science 14 (1990).

    Args:
        input_size: ``I``.
        hidden_size: ``H``.
        num_layers: ``L``; each takes the outputs of the one before.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        bias: False leaves out ``b_ih`` and ``b_hh``.
        batch_first: input and output are ``[N, T, ...]``; states stay ``[L*D, N, H]``.
        dropout: probability of dropping an element between layers, in training, from torch's generator.
        bidirectional: ``D`` is 2: a second set of weights reads the sequence backwards, outputs side by side.
        device: where the parameters live.
        dtype: float32, float64, bfloat16 or float16. The 16-bit types accumulate and keep the state in float32.
        zoneout: probability of a unit keeping its old state at a step, in training by a mask of its own for each step,
            from torch's generator; in evaluation the mean of both, ``zoneout * old + (1 - zoneout) * new`` (Krueger et
            al., arXiv:1606.01305, 2016).
        recurrent_dropout: probability of dropping a unit of h where it enters the recurrent product, in training, by
            one mask for all steps of a sequence, a new one at each call (Gal and Ghahramani, arXiv:1512.05287, 2016).
        recompute: save the state between parts of the sequence only, and in the backward pass run each part's forward
            again: the same numbers for less memory and a quarter to a third more time.

    Call with input ``[T, N, I]``, ``[T, I]`` or a PackedSequence, and hx ``[L*D, N, H]`` (``[L*D, H]`` for 2-D input)
    or None for zeros. Gives output ``[T, N, D*H]`` (``[T, D*H]``; a PackedSequence) and h_n in the shape of hx.

    ``resets``, bool ``[T, N]`` (``[N, T]`` with batch_first, ``[T]`` for 2-D input), at the input's device: where true,
    a new sequence begins at that step. The state is zero before it, and in the reverse direction, which meets the same
    boundary from the other side, after it. ``lengths``, ``[N]`` integers from 0 to ``T`` in any order (a Tensor
    anywhere, or a list): outputs are zero past a sequence's length, its final states are those of its last real step
    (its initial ones for length 0), and the reverse direction starts there; what the input holds past it is not read.

    Inference saves nothing for the backward pass. Training saves, besides arguments and outputs, 1 number per step,
    sequence and unit in the accumulating dtype (4 bytes; 8 in float64). With ``recompute`` it
    saves the state every 8 steps (more steps with fewer than 64 sequences).

    Raises:
        ValueError: input of the wrong rank, or of another dtype than the weights; resets or lengths of the wrong shape,
            dtype, device or range, with a PackedSequence, or lengths for 2-D input.
        RuntimeError: input or hx of the wrong size, hx or a weight of the wrong dtype, device or shape, no steps.
        TypeError: input, hx or resets that are not a tensor.
    """

    # Set on the object where they are not these, so that a converted layer and its pickles are torch.nn's.
    zoneout: float = 0.0
    recurrent_dropout: float = 0.0
    recompute: bool = False
    _variant: str | None = None

    def __init__(
        self,
        *args: Any,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        recompute: bool = False,
        **kwargs: Any,
    ) -> None:
        _TorchRNN.__init__(self, *args, **kwargs)
        if zoneout or recurrent_dropout:
            _set_masks(self, zoneout, recurrent_dropout)
        _set_recompute(self, recompute)

    @overload
    def forward(
        self, input: Tensor, hx: Tensor | None = None, *, resets: Tensor | None = None, lengths: _Lengths | None = None
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(self, input: PackedSequence, hx: Tensor | None = None) -> tuple[PackedSequence, Tensor]: ...
    def forward(self, input: Any, hx: Any = None, *, resets: Any = None, lengths: Any = None) -> Any:
        """Run the layer over a sequence; see the class."""
        return _forward(self, input, hx, resets, lengths)

    def extra_repr(self) -> str:
        """Show torch's options, and ours where they are not the default."""
        return ", ".join(filter(None, (_TorchRNN.extra_repr(self), _options_beyond_torch(self, _ALL_OPTIONS))))

    def to_torch(self) -> torch.nn.RNN:
        """Give the torch.nn.RNN that shares parameters and hooks; methods of a subclass stay behind."""
        return _as_stock(self, _TorchRNN)

    def __prepare_scriptable__(self) -> torch.nn.RNN:
        """Give torch.jit.script the stock module: it compiles Python source, of which our forward is not the kind."""
        return _as_stock(self, _TorchRNN)


class GRU(torch.nn.GRU):
    r"""torch.nn.GRU with fused kernels: the same arguments, parameters, results and errors.

    For each layer and direction:

    .. math::
        r_t &= \sigma(W_{ir} x_t + b_{ir} + W_{hr} h_{t-1} + b_{hr}) \\
        z_t &= \sigma(W_{iz} x_t + b_{iz} + W_{hz} h_{t-1} + b_{hz}) \\
        n_t &= \tanh(W_{in} x_t + b_{in} + r_t \odot (W_{hn} h_{t-1} + b_{hn})) \\
        h_t &= (1 - z_t) \odot n_t + z_t \odot h_{t-1}

    Source: Cho et al., arXiv:1406.1078 (2014), in torch's and cuDNN's variant: the reset gate after the product.
    With ``reset_after=False`` it is the paper's own, which Keras had first and textbooks print:

    .. math:: n_t = \tanh(W_{in} x_t + b_{in} + W_{hn} (r_t \odot h_{t-1}) + b_{hn})

    With ``gates="reset"`` there is no update gate: :math:`h_t = n_t`. With ``gates="update"`` there is no reset gate,
    :math:`r_t = 1`: the update gate RNN of Collins et al., arXiv:1611.09913 (2016).

    Args:
        input_size: ``I``.
        hidden_size: ``H``.
        num_layers: ``L``; each takes the outputs of the one before.
        bias: False leaves out ``b_ih`` and ``b_hh``.
        batch_first: input and output are ``[N, T, ...]``; states stay ``[L*D, N, H]``.
        dropout: probability of dropping an element between layers, in training, from torch's generator.
        bidirectional: ``D`` is 2: a second set of weights reads the sequence backwards, outputs side by side.
        device: where the parameters live.
        dtype: float32, float64, bfloat16 or float16. The 16-bit types accumulate and keep the state in float32.
        reset_after: the reset gate is applied after the recurrent product (torch's variant), or before it.
        gates: ``"both"``, ``"reset"`` or ``"update"``. The parameters hold the gates r, z, n that there are, in this
            order: ``[2*H, ...]`` with one gate of the two.
        zoneout: probability of a unit keeping its old state at a step, in training by a mask of its own for each step,
            from torch's generator; in evaluation the mean of both, ``zoneout * old + (1 - zoneout) * new`` (Krueger et
            al., arXiv:1606.01305, 2016).
        recurrent_dropout: probability of dropping a unit of h where it enters a recurrent product, in training, by one
            mask for all steps of a sequence, a new one at each call (Gal and Ghahramani, arXiv:1512.05287, 2016).
        recompute: save the state between parts of the sequence only, and in the backward pass run each part's forward
            again: the same numbers for less memory and a quarter to a third more time.

    Call with input ``[T, N, I]``, ``[T, I]`` or a PackedSequence, and hx ``[L*D, N, H]`` (``[L*D, H]`` for 2-D input)
    or None for zeros. Gives output ``[T, N, D*H]`` (``[T, D*H]``; a PackedSequence) and h_n in the shape of hx.

    ``resets``, bool ``[T, N]`` (``[N, T]`` with batch_first, ``[T]`` for 2-D input), at the input's device: where true,
    a new sequence begins at that step. The state is zero before it, and in the reverse direction, which meets the same
    boundary from the other side, after it. ``lengths``, ``[N]`` integers from 0 to ``T`` in any order (a Tensor
    anywhere, or a list): outputs are zero past a sequence's length, its final states are those of its last real step
    (its initial ones for length 0), and the reverse direction starts there; what the input holds past it is not read.

    Inference saves nothing for the backward pass. Training saves, besides arguments and outputs, 5 numbers per step,
    sequence and unit in the accumulating dtype (20 bytes; 40 in float64): three gates, the recurrent part of the
    candidate, the state; 4 with ``reset_after=False``, 3 with one gate. With ``recompute`` it saves the state
    every 8 steps (more steps with fewer than 64 sequences).

    Raises:
        ValueError: gates that are none of these, or that reset_after does not go with; input of the wrong rank, or of
            another dtype than the weights; resets or lengths of the wrong shape, dtype, device or range, with a
            PackedSequence, or lengths for 2-D input.
        RuntimeError: input or hx of the wrong size, hx or a weight of the wrong dtype, device or shape, no steps.
        TypeError: input, hx or resets that are not a tensor.
    """

    # Set on the object where they are not these, so that a converted layer and its pickles are torch.nn's.
    reset_after: bool = True
    gates: str = "both"
    zoneout: float = 0.0
    recurrent_dropout: float = 0.0
    recompute: bool = False
    _variant: str | None = None

    def __init__(
        self,
        *args: Any,
        reset_after: bool = True,
        gates: str = "both",
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        recompute: bool = False,
        **kwargs: Any,
    ) -> None:
        cell = _gru_cell(reset_after, gates)
        _TorchGRU.__init__(self, *args, **kwargs)
        if cell != "gru":
            _set_options(self, reset_after=reset_after, gates=gates)
            _become(self, cell)
        if zoneout or recurrent_dropout:
            _set_masks(self, zoneout, recurrent_dropout)
        _set_recompute(self, recompute)

    @overload
    def forward(
        self, input: Tensor, hx: Tensor | None = None, *, resets: Tensor | None = None, lengths: _Lengths | None = None
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(self, input: PackedSequence, hx: Tensor | None = None) -> tuple[PackedSequence, Tensor]: ...
    def forward(self, input: Any, hx: Any = None, *, resets: Any = None, lengths: Any = None) -> Any:
        """Run the layer over a sequence; see the class."""
        return _forward(self, input, hx, resets, lengths)

    def extra_repr(self) -> str:
        """Show torch's options, and ours where they are not the default."""
        return ", ".join(filter(None, (_TorchGRU.extra_repr(self), _options_beyond_torch(self, _ALL_OPTIONS))))

    def to_torch(self) -> torch.nn.GRU:
        """Give the torch.nn.GRU that shares parameters and hooks; methods of a subclass stay behind."""
        return _as_stock(self, _TorchGRU)

    def __prepare_scriptable__(self) -> torch.nn.GRU:
        """Give torch.jit.script the stock module: it compiles Python source, of which our forward is not the kind."""
        return _as_stock(self, _TorchGRU)


class LSTM(torch.nn.LSTM):
    r"""torch.nn.LSTM with fused kernels: the same arguments, parameters, results and errors.

    For each layer and direction:

    .. math::
        i_t &= \sigma(W_{ii} x_t + b_{ii} + W_{hi} h_{t-1} + b_{hi}) \\
        f_t &= \sigma(W_{if} x_t + b_{if} + W_{hf} h_{t-1} + b_{hf}) \\
        g_t &= \tanh(W_{ig} x_t + b_{ig} + W_{hg} h_{t-1} + b_{hg}) \\
        o_t &= \sigma(W_{io} x_t + b_{io} + W_{ho} h_{t-1} + b_{ho}) \\
        c_t &= f_t \odot c_{t-1} + i_t \odot g_t \\
        h_t &= o_t \odot \tanh(c_t), \text{ projected to } W_{hr} h_t \text{ with } \texttt{proj\_size}

    Sources: Hochreiter and Schmidhuber, Neural Computation 9 (1997); the forget gate from Gers, Schmidhuber and
    Cummins, Neural Computation 12 (2000); the projection from Sak et al., arXiv:1402.1128 (2014).

    With ``coupled=True`` there is no forget gate: :math:`f_t = 1 - i_t` (Greff et al., arXiv:1503.04069, 2015: CIFG).
    With ``peephole=True`` the gates see c too (Gers, Schraudolph and Schmidhuber, JMLR 3, 2002):
    :math:`w_{ci} \odot c_{t-1}` and :math:`w_{cf} \odot c_{t-1}` join the sums of i and f,
    :math:`w_{co} \odot c_t` that of o.

    Args:
        input_size: ``I``.
        hidden_size: ``H``.
        num_layers: ``L``; each takes the outputs of the one before.
        bias: False leaves out ``b_ih`` and ``b_hh``.
        batch_first: input and output are ``[N, T, ...]``; states stay ``[L*D, N, ...]``.
        dropout: probability of dropping an element between layers, in training, from torch's generator.
        bidirectional: ``D`` is 2: a second set of weights reads the sequence backwards, outputs side by side.
        proj_size: ``P`` if positive, smaller than ``H``; 0 for no projection (``P = H``).
        device: where the parameters live.
        dtype: float32, float64, bfloat16 or float16. The 16-bit types accumulate and keep the state in float32.
        peephole: the gates see the cell state, by a parameter more, ``weight_ch_l{k}[_reverse]`` ``[3*H]``: the weights
            of i, f and o (coupled: i and o, ``[2*H]``).
        coupled: the input gate is the forget gate's complement. The parameters hold the gates i, g, o, in this order:
            ``[3*H, ...]``.
        zoneout: probability of a unit keeping its old state at a step, in training by a mask of its own for each step,
            from torch's generator; in evaluation the mean of both, ``zoneout * old + (1 - zoneout) * new`` (Krueger et
            al., arXiv:1606.01305, 2016). A pair is that of h and that of c. Not with proj_size.
        recurrent_dropout: probability of dropping a unit of h where it enters the recurrent product, in training, by
            one mask for all steps of a sequence, a new one at each call (Gal and Ghahramani, arXiv:1512.05287, 2016).
        recompute: save the state between parts of the sequence only, and in the backward pass run each part's forward
            again: the same numbers for less memory and a quarter to a third more time.

    Call with input ``[T, N, I]``, ``[T, I]`` or a PackedSequence, and hx a pair (h_0 ``[L*D, N, P]``, c_0
    ``[L*D, N, H]``), without ``N`` for 2-D input, or None for zeros. Gives output ``[T, N, D*P]`` (``[T, D*P]``; a
    PackedSequence) and the pair (h_n, c_n) in the shapes of hx.

    ``resets``, bool ``[T, N]`` (``[N, T]`` with batch_first, ``[T]`` for 2-D input), at the input's device: where true,
    a new sequence begins at that step. The state is zero before it, and in the reverse direction, which meets the same
    boundary from the other side, after it. ``lengths``, ``[N]`` integers from 0 to ``T`` in any order (a Tensor
    anywhere, or a list): outputs are zero past a sequence's length, its final states are those of its last real step
    (its initial ones for length 0), and the reverse direction starts there; what the input holds past it is not read.

    With ``return_cells`` a third result is the cell state c of all steps of the last layer, ``[T, N, D*H]`` in the form
    of the output (zero past ``lengths``), differentiable as the others.

    Inference saves nothing for the backward pass. Training saves, besides arguments and outputs, 5 numbers per step,
    sequence and unit in the accumulating dtype (20 bytes; 40 in float64): four gates (three coupled) and the cell
    state; with a projection also the projected state. With ``recompute`` it saves h and c every 8 steps (more steps with
    fewer than 64 sequences).

    Raises:
        ValueError: input of the wrong rank, or of another dtype than the weights; resets or lengths of the wrong shape,
            dtype, device or range, with a PackedSequence, or lengths for 2-D input.
        RuntimeError: input or hx of the wrong size, hx or a weight of the wrong dtype, device or shape, no steps.
        TypeError: input or resets that are not a tensor, hx that is not a pair of tensors.
    """

    # Set on the object where they are not these, so that a converted layer and its pickles are torch.nn's.
    peephole: bool = False
    coupled: bool = False
    zoneout: float | tuple[float, float] = 0.0
    recurrent_dropout: float = 0.0
    recompute: bool = False
    _variant: str | None = None

    def __init__(
        self,
        *args: Any,
        peephole: bool = False,
        coupled: bool = False,
        zoneout: float | tuple[float, float] = 0.0,
        recurrent_dropout: float = 0.0,
        recompute: bool = False,
        **kwargs: Any,
    ) -> None:
        for name, value in (("peephole", peephole), ("coupled", coupled)):
            if not isinstance(value, bool):
                raise TypeError(f"LSTM: {name} should be of type bool, got: {type(value).__name__}")
        _TorchLSTM.__init__(self, *args, **kwargs)
        if peephole or coupled:
            _set_options(self, peephole=peephole, coupled=coupled)
            _become(self, f"lstm{'_coupled' * coupled}{'_peephole' * peephole}")
        if zoneout or recurrent_dropout:
            _set_masks(self, zoneout, recurrent_dropout)
        _set_recompute(self, recompute)

    @overload
    def forward(
        self,
        input: Tensor,
        hx: _States | None = None,
        *,
        resets: Tensor | None = None,
        lengths: _Lengths | None = None,
        return_cells: Literal[False] = False,
    ) -> tuple[Tensor, _States]: ...
    @overload
    def forward(
        self,
        input: Tensor,
        hx: _States | None = None,
        *,
        resets: Tensor | None = None,
        lengths: _Lengths | None = None,
        return_cells: Literal[True],
    ) -> tuple[Tensor, _States, Tensor]: ...
    @overload
    def forward(
        self, input: PackedSequence, hx: _States | None = None, *, return_cells: Literal[False] = False
    ) -> tuple[PackedSequence, _States]: ...
    @overload
    def forward(
        self, input: PackedSequence, hx: _States | None = None, *, return_cells: Literal[True]
    ) -> tuple[PackedSequence, _States, PackedSequence]: ...
    def forward(
        self, input: Any, hx: Any = None, *, resets: Any = None, lengths: Any = None, return_cells: bool = False
    ) -> Any:
        """Run the layer over a sequence; see the class."""
        return _forward(self, input, hx, resets, lengths, return_cells)

    def extra_repr(self) -> str:
        """Show torch's options, and ours where they are not the default."""
        return ", ".join(filter(None, (_TorchLSTM.extra_repr(self), _options_beyond_torch(self, _ALL_OPTIONS))))

    def to_torch(self) -> torch.nn.LSTM:
        """Give the torch.nn.LSTM that shares parameters and hooks; methods of a subclass stay behind."""
        return _as_stock(self, _TorchLSTM)

    def __prepare_scriptable__(self) -> torch.nn.LSTM:
        """Give torch.jit.script the stock module: it compiles Python source, of which our forward is not the kind."""
        return _as_stock(self, _TorchLSTM)


class RNNCell(torch.nn.RNNCell):
    r"""torch.nn.RNNCell, one step of :class:`RNN`, fused: the same arguments, parameters, results and errors.

    .. math:: h' = \phi(W_{ih} x + b_{ih} + W_{hh} h + b_{hh})

    Args:
        input_size: ``I``.
        hidden_size: ``H``.
        bias: False leaves out ``b_ih`` and ``b_hh``.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        device: where the parameters live.
        dtype: float32, float64, bfloat16 or float16.

    Call with input ``[N, I]`` or ``[I]``, and hx ``[N, H]`` or ``[H]``, or None for zeros. Gives h' in the shape of hx.

    Raises:
        ValueError: input or hx of the wrong rank.
        RuntimeError: input or hx of the wrong size or dtype, or a weight of the wrong shape.
        TypeError: input or hx that is not a tensor.
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Take one step; see the class."""
        op = _RNN_OP_OF_NONLINEARITY.get(self.nonlinearity)
        if op is None:
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return _cell_forward(self, "RNNCell", op, input, hx, None, ("hidden", ""))[0]

    def to_torch(self) -> torch.nn.RNNCell:
        """Give the torch.nn.RNNCell that shares parameters and hooks; methods of a subclass stay behind."""
        return _as_stock(self, _TorchRNNCell)

    def __prepare_scriptable__(self) -> torch.nn.RNNCell:
        """Give torch.jit.script the stock module: it compiles Python source, of which our forward is not the kind."""
        return _as_stock(self, _TorchRNNCell)


class GRUCell(torch.nn.GRUCell):
    r"""torch.nn.GRUCell, one step of :class:`GRU`, fused: the same arguments, parameters, results and errors.

    .. math::
        r &= \sigma(W_{ir} x + b_{ir} + W_{hr} h + b_{hr}) \\
        z &= \sigma(W_{iz} x + b_{iz} + W_{hz} h + b_{hz}) \\
        n &= \tanh(W_{in} x + b_{in} + r \odot (W_{hn} h + b_{hn})) \\
        h' &= (1 - z) \odot n + z \odot h

    Args:
        input_size: ``I``.
        hidden_size: ``H``.
        bias: False leaves out ``b_ih`` and ``b_hh``.
        device: where the parameters live.
        dtype: float32, float64, bfloat16 or float16.

    Call with input ``[N, I]`` or ``[I]``, and hx ``[N, H]`` or ``[H]``, or None for zeros. Gives h' in the shape of hx.

    Raises:
        ValueError: input or hx of the wrong rank.
        RuntimeError: input or hx of the wrong size or dtype, or a weight of the wrong shape.
        TypeError: input or hx that is not a tensor.
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Take one step; see the class."""
        return _cell_forward(self, "GRUCell", _GRU_OP, input, hx, None, ("hidden", ""))[0]

    def to_torch(self) -> torch.nn.GRUCell:
        """Give the torch.nn.GRUCell that shares parameters and hooks; methods of a subclass stay behind."""
        return _as_stock(self, _TorchGRUCell)

    def __prepare_scriptable__(self) -> torch.nn.GRUCell:
        """Give torch.jit.script the stock module: it compiles Python source, of which our forward is not the kind."""
        return _as_stock(self, _TorchGRUCell)


class LSTMCell(torch.nn.LSTMCell):
    r"""torch.nn.LSTMCell, one step of :class:`LSTM`, fused: the same arguments, parameters, results and errors.

    .. math::
        i &= \sigma(W_{ii} x + b_{ii} + W_{hi} h + b_{hi}) \\
        f &= \sigma(W_{if} x + b_{if} + W_{hf} h + b_{hf}) \\
        g &= \tanh(W_{ig} x + b_{ig} + W_{hg} h + b_{hg}) \\
        o &= \sigma(W_{io} x + b_{io} + W_{ho} h + b_{ho}) \\
        c' &= f \odot c + i \odot g \\
        h' &= o \odot \tanh(c')

    Args:
        input_size: ``I``.
        hidden_size: ``H``.
        bias: False leaves out ``b_ih`` and ``b_hh``.
        device: where the parameters live.
        dtype: float32, float64, bfloat16 or float16.

    Call with input ``[N, I]`` or ``[I]``, and hx a pair (h, c), each ``[N, H]`` or ``[H]``, or None for zeros. Gives
    the pair (h', c') in the same shapes.

    Raises:
        ValueError: input, h or c of the wrong rank.
        RuntimeError: input, h or c of the wrong size or dtype, or a weight of the wrong shape.
        TypeError: input that is not a tensor, hx that is not a pair of tensors.
    """

    def forward(self, input: Tensor, hx: _States | None = None) -> _States:
        """Take one step; see the class."""
        if hx is None:
            return _cell_forward(self, "LSTMCell", _LSTM_OP, input, None, None, ("hx[0]", "hx[1]"))
        if not isinstance(hx, (tuple, list)) or len(hx) != 2:
            _refuse_pair("LSTMCell", hx)
        return _cell_forward(self, "LSTMCell", _LSTM_OP, input, hx[0], hx[1], ("hx[0]", "hx[1]"))

    def to_torch(self) -> torch.nn.LSTMCell:
        """Give the torch.nn.LSTMCell that shares parameters and hooks; methods of a subclass stay behind."""
        return _as_stock(self, _TorchLSTMCell)

    def __prepare_scriptable__(self) -> torch.nn.LSTMCell:
        """Give torch.jit.script the stock module: it compiles Python source, of which our forward is not the kind."""
        return _as_stock(self, _TorchLSTMCell)


# --- Which kernel a call takes ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerPlan:
    """How one layer runs in one direction.

    Attributes:
        layer: from 0.
        direction: ``"forward"`` or ``"reverse"``.
        cell: the name of the op, as in ``torch.ops.rnnfast``.
        sizes: ``T``, ``N``, ``I``, ``H`` and ``P``.
        kernel: the schedule taken.
        isa: the instruction set: ``"avx512"``, ``"avx2"`` or ``"baseline"``.
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
        return input.data, len(input.batch_sizes), _packed_batch(input.data, input.batch_sizes)
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
        input: what the layer would be called with; only its shape, dtype and requires_grad matter.
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
    if _any_autocast() and _under_autocast(data):
        h0, c0 = [*states, None, None][:2]
        stepwise = is_cell or (isinstance(input, PackedSequence) and input.batch_sizes[0] != input.batch_sizes[-1])
        dtype = _autocast_dtypes(mode, proj_size, bool(stepwise), data, h0, c0)[0] or dtype
    training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (data, *states, *layer.parameters()))
    dtype_name = str(dtype).removeprefix("torch.")
    state_size = proj_size or layer.hidden_size
    cell = _CELL_OF_MODE[mode] if is_cell else _cell_of(layer)
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
            details = _C.explain(cell, **sizes, dtype=dtype_name, training=training, threads=torch.get_num_threads())
            kernel, isa, reason = str(details["kernel"]), str(details["isa"]), str(details["reason"])
            plans.append(LayerPlan(i, direction, cell, sizes, kernel, isa, reason, dict(details)))
    return Explanation(type(layer).__name__, dtype, training, tuple(plans))
