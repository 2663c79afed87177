"""The way of a call through a module: the arguments of torch.nn's layers and cells, checked, to the ops and back.

Weights are looked up by name at every call, so that whatever replaces them (parametrizations, pruning, weight dropping,
``torch.func.functional_call``) is seen. What goes wrong is found by cheap comparisons on the way; the message is
composed only then, by the ``refuse`` functions.

Letters: ``T`` steps, ``N`` batch, ``I`` input size, ``H`` hidden size, ``P`` proj_size or ``H``, ``L`` layers,
``D`` directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnfast import _C
from rnnfast.options import KERNELS, Kernel, Layer, cell_of, extra_name, kind_of, zoneouts_of

any_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled
is_dynamo_compiling = torch.compiler.is_dynamo_compiling


# --- The way of a call through RNN, GRU and LSTM ----------------------------------------------------------------------


def forward_layer(
    layer: Layer, input: Any, hx: Any, resets: Any, lengths: Any, return_cells: bool = False
) -> tuple[Any, ...]:
    """All of ``forward`` for the three layers: layers times directions, one op call each."""
    if resets is lengths is None and not (return_cells or is_dynamo_compiling()):
        # Without the words for what might be wrong, which cost a short call as much time as its kernel: None is left to
        # what follows here.
        results: tuple[Any, ...] | None = _C.run_layer(layer, input, hx)
        if results is not None:
            return results
    mode = layer.mode
    sorted_indices = unsorted_indices = batch_sizes = None
    packed = isinstance(input, PackedSequence)
    if packed:
        steps, batch_sizes, sorted_indices, unsorted_indices = input
        batch = packed_batch(steps, batch_sizes)
        ndim = 3
        if resets is not None or lengths is not None:
            _refuse_with_packed(mode, resets)
    else:
        if not isinstance(input, Tensor):
            raise TypeError(f"{kind_of(mode)}: input must be a Tensor or a PackedSequence, got {type(input).__name__}")
        ndim = input.dim()
        if ndim == 3:
            steps = input.transpose(0, 1) if layer.batch_first else input
        elif ndim == 2:
            steps = input.unsqueeze(1)
        else:
            tensor = " tensor" if mode.startswith("RNN") else ""
            raise ValueError(f"{kind_of(mode)}: Expected input to be 2D or 3D, got {ndim}D{tensor} instead")
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
                refuse_pair("LSTM", hx)
            h0, c0 = hx
            check_state(mode, "hidden[0]", h0, ndim, (len(names_of_layers), batch, state_size), steps)
            check_state(mode, "hidden[1]", c0, ndim, (len(names_of_layers), batch, hidden_size), steps)
        else:
            h0 = hx
            check_state(mode, "hidden", h0, ndim, (len(names_of_layers), batch, state_size), steps)
        if ndim == 2:
            h0 = h0.unsqueeze(1)
            c0 = None if c0 is None else c0.unsqueeze(1)
        elif sorted_indices is not None:
            h0 = h0.index_select(1, sorted_indices)
            c0 = None if c0 is None else c0.index_select(1, sorted_indices)

    weights = [weights_of(layer, names, bias, proj_size) for names in names_of_layers]
    first = weights[0][0]
    if steps.device != first.device:
        _refuse_device("input", steps, first)
    output_dtype = None
    if any_autocast() and under_autocast(steps):
        stepwise = batch_sizes is not None and batch_sizes[0] != batch_sizes[-1]
        compute_dtype, output_dtype = autocast_dtypes(mode, proj_size, bool(stepwise), steps, h0, c0)
        if compute_dtype is not None:
            steps, h0, c0 = (cast(tensor, compute_dtype) for tensor in (steps, h0, c0))
            weights = [tuple(cast(weight, compute_dtype) for weight in five) for five in weights]
        if steps.dtype != weights[0][0].dtype:
            raise RuntimeError(
                f"{kind_of(mode)}: under autocast input and weights must have the same dtype, but got "
                f"{steps.dtype} and {weights[0][0].dtype}: float64 and integers are not cast"
            )
    elif steps.dtype != first.dtype:
        _refuse_input_dtype(steps.dtype, first.dtype)
    if (h0 is not None and h0.dtype != steps.dtype) or (c0 is not None and c0.dtype != steps.dtype):
        refuse_state_dtype(mode, steps, h0, c0)

    output: Any
    output, h_n, c_n, cells = run_layers(layer, steps, h0, c0, weights, (batch_sizes, lengths, resets), return_cells)

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


def is_special(layer: Layer, kernel: Kernel) -> bool:
    """Whether the op gets arguments that plain calls do not have."""
    return bool(
        layer.zoneout or layer.recurrent_dropout or layer.recompute or kernel.num_peepholes or kernel.num_norm_vectors
    )


def run_layers(
    layer: Layer,
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
    kernel = KERNELS[layer._variant or layer.mode]
    op, all_c_op = kernel.op, kernel.all_c_op
    has_extras = is_special(layer, kernel)
    extras: tuple[Any, ...] = ()
    gate_size = kernel.num_gates * layer.hidden_size
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
                if has_extras:
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


def _extras(layer: Layer, d: int, steps: Tensor, batch_sizes: Tensor | None, weight_hh: Tensor) -> tuple[Any, ...]:
    """What plain calls do not have: weight_ch, recurrent_mask, zoneout_h, zoneout_c, weight_ln and recompute.

    Of direction ``d``.

    Masks are drawn from torch's generator, first that of recurrent dropout, then of h, then of c.
    """
    weight_ch, weight_ln = _extra_weights(layer, d)
    recurrent_mask = None
    if any_autocast():  # cast as the other weights were
        weight_ch, weight_ln = cast(weight_ch, weight_hh.dtype), cast(weight_ln, weight_hh.dtype)
    if layer.recurrent_dropout and layer.training:
        batch = steps.shape[1] if batch_sizes is None else int(batch_sizes[0])
        ones = weight_hh.new_ones(batch, weight_hh.shape[1])
        recurrent_mask = torch.dropout(ones, layer.recurrent_dropout, True)
    rows = steps.shape if steps.dtype == torch.int64 else steps.shape[:-1]
    shape = (*rows, layer.hidden_size)
    masks: list[Tensor | None] = []
    for probability in zoneouts_of(layer):
        if not probability:
            masks.append(None)
        elif layer.training:
            masks.append(weight_hh.new_empty(shape).bernoulli_(probability))
        else:
            masks.append(weight_hh.new_full(shape[-1:], probability).expand(shape))
    return weight_ch, recurrent_mask, *masks, weight_ln, layer.recompute


def _extra_weights(layer: Layer, d: int) -> tuple[Tensor | None, Tensor | None]:
    """The op's weight_ch and weight_ln of direction ``d`` of all."""
    shapes = KERNELS[cell_of(layer)].extra_shapes(layer.hidden_size)
    found: list[Tensor] = []
    for name, size in shapes.items():
        if name == "bias_ln_c" and not layer.bias:
            found.append(torch.zeros_like(found[-1]))
            continue
        weight = getattr(layer, extra_name(layer, name, d))
        if weight.shape != (size,):  # parts of a wrong size could make a whole of the right one
            _refuse_weights(layer)
        found.append(weight)
    if "weight_ln_ih" in shapes:
        return None, torch.cat(found)
    return found[0] if found else None, None


def loop_weights(layer: Any) -> list[Tensor | None]:
    """All that the loops of ``csrc/generate.cpp`` take of each layer, which run as in evaluation."""
    found: list[Tensor | None] = []
    for d, names in enumerate(layer._all_weights):
        five = weights_of(layer, names, layer.bias, layer.proj_size)
        weight_ch, weight_ln = _extra_weights(layer, d)
        zoneouts = [five[1].new_full((layer.hidden_size,), z) if z else None for z in zoneouts_of(layer)]
        found += [*five, weight_ch, *zoneouts, weight_ln]
    return found


def weights_of(layer: torch.nn.RNNBase, names: Sequence[str], bias: bool, proj_size: int) -> tuple[Any, ...]:
    """One direction's weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, as they are now; None where there is none."""
    parameters = layer._parameters
    found: list[Any] = []
    for name in names:
        weight = parameters.get(name)
        if weight is None:  # replaced by a plain attribute or a property (weight dropping, parametrize, prune)
            weight = getattr(layer, name)
            if weight is None:
                raise TypeError(f"{kind_of(layer.mode)}: {name} must be a Tensor, got None")
        found.append(weight)
    if bias:
        return (*found, None) if not proj_size else tuple(found)
    return (*found, None, None, None) if not proj_size else (found[0], found[1], None, None, found[2])


def packed_batch(steps: Tensor, batch_sizes: Tensor) -> int:
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
    kind = kind_of(mode)
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
    kind = kind_of(mode)
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


def check_state(
    mode: str, name: str, state: Any, input_ndim: int, expected: tuple[int, int, int], steps: Tensor
) -> None:
    """Refuse an initial state that is not ``expected`` (without the batch for 2-D input)."""
    if not isinstance(state, Tensor):
        raise TypeError(f"{kind_of(mode)}: {name} (hx) must be a Tensor, got {type(state).__name__}")
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


def under_autocast(input: Tensor) -> bool:
    """Whether autocast is on for the input's kind of device; to be asked after the cheap ``_any_autocast``."""
    kind = input.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What autocast does to an argument: float64 and integers stay as they are, and the op then refuses the mixture."""
    if tensor is None or tensor.dtype == torch.float64 or not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype)


def autocast_dtypes(
    mode: str, proj_size: int, stepwise: bool, input: Tensor, h0: Tensor | None, c0: Tensor | None
) -> tuple[torch.dtype | None, torch.dtype | None]:
    """The dtype to compute in, and the one to give output and h_n if another; (None, None) where autocast stays away.

    On CUDA all is done in autocast's dtype, as torch does for layers and cells (but its layers under bfloat16 end in
    cuDNN's float16).

    On the CPU torch casts the products only, so that what comes out depends on the cell. A state that is updated by a
    sum (GRU's h, the LSTM's c) keeps the wider of its own dtype and autocast's; without hx it starts in the input's
    dtype. The exception is an LSTM that torch runs as one fused operation, in autocast's dtype throughout: one without
    projection and not ``stepwise``, which stands for a single step and a ragged packed batch.
    """
    if not input.is_floating_point() or input.dtype == torch.float64:
        return None, None
    low = torch.get_autocast_dtype(input.device.type)
    if input.device.type == "cuda":
        return low, None
    if mode.startswith("RNN") or (mode == "LSTM" and not proj_size and not stepwise):
        return low, None
    summed = h0 if mode == "GRU" else c0
    own = input.dtype if summed is None else summed.dtype
    compute = low if own == torch.float64 else torch.promote_types(low, own)
    return compute, low if proj_size else None


# --- Refusals ---------------------------------------------------------------------------------------------------------


def refuse_pair(kind: str, hx: Any) -> NoReturn:
    """Refuse an hx that is not the two states of an LSTM."""
    what = f"{len(hx)} values" if isinstance(hx, (tuple, list)) else type(hx).__name__
    raise TypeError(f"{kind}: hx must be a pair (h_0, c_0) of Tensors, got {what}")


def _refuse_with_packed(mode: str, resets: Any) -> NoReturn:
    if resets is None:
        raise ValueError(
            f"{kind_of(mode)}: lengths do not go with a PackedSequence, which already says them: leave them out, "
            "or give the padded Tensor with its lengths"
        )
    raise ValueError(
        f"{kind_of(mode)}: resets do not go with a PackedSequence: give the padded Tensor, with lengths= if sequences "
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


def refuse_loop(what: str, weight: Tensor) -> None:
    """Raise where a model is not on the CPU, on which the loops of ``csrc/generate.cpp`` run; else return."""
    if weight.device.type != "cpu":
        raise RuntimeError(f'{what} runs on the CPU: move the model there, model.to("cpu"); it is on {weight.device}')


def refuse_state_dtype(mode: str, input: Tensor, h0: Tensor | None, c0: Tensor | None) -> NoReturn:
    """Refuse states of another dtype than the input's."""
    names = ("hidden[0]", "hidden[1]") if mode == "LSTM" else ("hidden", "")
    name, state = next(
        (name, state)
        for name, state in zip(names, (h0, c0), strict=True)
        if state is not None and state.dtype != input.dtype
    )
    raise RuntimeError(
        f"{kind_of(mode)}: the dtype of {name} (hx), {state.dtype}, must be that of the input and the weights, "
        f"{input.dtype}. Convert it: hx.to({input.dtype})"
    )


def _refuse_weights(layer: Layer) -> None:
    """Raise for the first parameter that does not fit the layer's own sizes, dtype and device; else return."""
    gate_size = KERNELS[layer._variant or layer.mode].num_gates * layer.hidden_size
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
        extras = KERNELS[layer._variant or layer.mode].extra_shapes(layer.hidden_size)
        if not layer.bias:
            extras.pop("bias_ln_c", None)
        shapes |= {name: (size,) for name, size in extras.items()}
        for name in [*names, *(extra_name(layer, name, i) for name in extras)]:
            _refuse_weight(kind_of(layer.mode), name, getattr(layer, name), shapes[name.rpartition("_l")[0]])
    first_name = layer._all_weights[0][0]
    first = getattr(layer, first_name)
    for names in layer._all_weights:
        for name in names:
            weight = getattr(layer, name)
            if weight.dtype != first.dtype or weight.device != first.device:
                raise RuntimeError(
                    f"{kind_of(layer.mode)}: {name} is {weight.dtype} at {weight.device}, but {first_name} is "
                    f"{first.dtype} at {first.device}; all parameters must be alike"
                )


def _refuse_weight(kind: str, name: str, weight: Any, expected: tuple[int, ...]) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"{kind}: {name} must be a Tensor, got {type(weight).__name__}")
    if weight.shape != expected:
        raise RuntimeError(f"{kind}: {name} must have the shape {expected}, got {tuple(weight.shape)}")


# --- The way of a call through the cells ------------------------------------------------------------------------------


def forward_cell(
    cell: torch.nn.RNNCellBase, mode: str, input: Any, h: Any, c: Any, names: tuple[str, str]
) -> tuple[Tensor, Tensor]:
    """One step: h' ``[N, H]`` and c' (``[0]`` for a cell with one state), or without ``N`` for 1-D input."""
    kernel, kind = KERNELS[mode], f"{kind_of(mode)}Cell"
    if not is_dynamo_compiling():
        states: tuple[Tensor, Tensor] | None = _C.run_cell(kernel.number, cell.__dict__, input, h, c)  # as run_layer
        if states is not None:
            return states
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
        if mode == "LSTM":
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
    if any_autocast() and under_autocast(input):
        compute_dtype, _ = autocast_dtypes(mode, 0, True, input, h, c)
        if compute_dtype is not None:
            input, h, c, weight_ih, weight_hh, bias_ih, bias_hh = (
                cast(tensor, compute_dtype) for tensor in (input, h, c, weight_ih, weight_hh, bias_ih, bias_hh)
            )
    dtype = input.dtype
    if dtype != weight_ih.dtype or (h is not None and h.dtype != dtype) or (c is not None and c.dtype != dtype):
        _refuse_cell_dtype(kind, names, input, h, c, weight_ih)

    try:
        if weight_hh.shape[1] != hidden_size:
            _refuse_cell_weights(cell, kind, kernel)
        _, h, c = kernel.op(input, h, c, weight_ih, weight_hh, bias_ih, bias_hh, None)
    except (RuntimeError, ValueError, TypeError, IndexError):
        _refuse_cell_weights(cell, kind, kernel)
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


def _refuse_cell_weights(cell: torch.nn.RNNCellBase, kind: str, kernel: Kernel) -> None:
    """Raise for the first parameter that does not fit the cell's own sizes; else return."""
    gate_size = kernel.num_gates * cell.hidden_size
    _refuse_weight(kind, "weight_ih", cell.weight_ih, (gate_size, cell.input_size))
    _refuse_weight(kind, "weight_hh", cell.weight_hh, (gate_size, cell.hidden_size))
    if cell.bias:
        _refuse_weight(kind, "bias_ih", cell.bias_ih, (gate_size,))
        _refuse_weight(kind, "bias_hh", cell.bias_hh, (gate_size,))
