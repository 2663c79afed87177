"""The functions behind the layers: one cell, one layer, one direction, all time steps in one call.

Typed wrappers of ``torch.ops.rnnfast.<cell>``; and, for torch's sake, what the compiled part leaves to Python: the fake
kernels (shapes without data, for the meta device, torch.compile and torch.export), the derivative of the backward
ops, built on :mod:`rnnfast.reference`, and torch.func's transforms (:mod:`rnnfast.transforms`). The schemas, checks and
first derivatives are in ``csrc/ops.cpp`` and ``csrc/call.cpp``.

Letters: ``T`` steps, ``N`` batch, ``I`` input size, ``H`` hidden size, ``P`` projected size (``H`` without a
projection), ``G`` gates (1 for the plain RNN, 3 for GRU, 4 for LSTM). Last dimension fastest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from rnnfast import _C, reference, transforms

__all__ = [
    "gru",
    "gru_before",
    "gru_layer_norm",
    "gru_reset",
    "gru_reset_before",
    "gru_update",
    "lstm",
    "lstm_all_c",
    "lstm_coupled",
    "lstm_coupled_all_c",
    "lstm_coupled_peephole",
    "lstm_coupled_peephole_all_c",
    "lstm_layer_norm",
    "lstm_layer_norm_all_c",
    "lstm_peephole",
    "lstm_peephole_all_c",
    "rnn_relu",
    "rnn_tanh",
]

_Run = TypeVar("_Run", bound=Callable[..., tuple[Tensor, ...]])
_CELLS: dict[str, dict[str, Any]] = {cell["name"]: cell for cell in _C.cells()}


def lstm(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    *,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
    recurrent_mask: Tensor | None = None,
    zoneout_h: Tensor | None = None,
    zoneout_c: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one LSTM layer in one direction. The formula and its source: :func:`rnnfast.reference.lstm`.

    Args:
        input: ``[T, N, I]``; with ``batch_sizes`` the rows of a packed batch, ``[rows, I]``; without, ``[N, I]`` is one
            step. Or tokens, int64 without the last dimension, each in ``0..I-1``: the same as their one-hot rows, but
            the product with ``weight_ih`` is a look-up of its columns.
        h0: ``[N, P]``; None means zeros.
        c0: ``[N, H]``; None means zeros.
        weight_ih: ``[4*H, I]``, gates in the order i, f, g, o.
        weight_hh: ``[4*H, P]``.
        bias_ih: ``[4*H]``, or None together with ``bias_hh``.
        bias_hh: ``[4*H]``.
        weight_hr: ``[P, H]``, or None for no projection (``P = H``). All weights may have one more dimension in front,
            of ``E`` members of an ensemble: sequence ``n`` of the batch runs with weights ``n % E``, and ``E`` divides
            ``N`` (with ``batch_sizes``, each of them).
        batch_sizes: int64 ``[T]`` on the CPU, not increasing, each at least 1, with the sum ``rows``.
        lengths: int64 ``[N]`` on the CPU, each in ``0..T``, any order; padded input only. The output is zero past a
            sequence's end, its final state that of its last real step, and the reverse direction starts there.
        resets: bool ``[T, N]``, padded input only: where true no state crosses from step ``t - 1`` to ``t``, in either
            direction.
        reverse: walk time backwards; each output stays at its own step.
        recurrent_mask: ``[N, P]``: what h is multiplied by where it enters the recurrent product, at every step. This
            and the next two have no derivative.
        zoneout_h: ``[T, N, H]`` in the form of output, from 0 to 1: the share of the old h that stays at each step,
            ``h = zoneout_h * h_old + (1 - zoneout_h) * h_new``. Not with ``weight_hr``.
        zoneout_c: the same for c.

    Returns:
        output ``[T, N, P]`` (``[rows, P]`` or ``[N, P]`` for those kinds of input), h_n ``[N, P]`` and c_n ``[N, H]``.

    Raises:
        RuntimeError, ValueError, TypeError, IndexError: an argument of the wrong shape, dtype, device or range. The
            message names it, what was expected and what came.
    """
    output, h_n, c_n = torch.ops.rnnfast.lstm.default(
        input,
        h0,
        c0,
        weight_ih,
        weight_hh,
        bias_ih,
        bias_hh,
        weight_hr,
        batch_sizes,
        lengths,
        resets,
        reverse,
        None,
        recurrent_mask,
        zoneout_h,
        zoneout_c,
    )
    return output, h_n, c_n


def lstm_all_c(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    *,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
    recurrent_mask: Tensor | None = None,
    zoneout_h: Tensor | None = None,
    zoneout_c: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run one LSTM layer in one direction and return the cell state of all steps too.

    Arguments and errors are those of :func:`lstm`.

    Returns:
        output, h_n and c_n as :func:`lstm`, and c ``[T, N, H]`` in the form of output (``[rows, H]``, ``[N, H]``; zero
        past ``lengths``).
    """
    output, h_n, c_n, all_c = torch.ops.rnnfast.lstm_all_c.default(
        input,
        h0,
        c0,
        weight_ih,
        weight_hh,
        bias_ih,
        bias_hh,
        weight_hr,
        batch_sizes,
        lengths,
        resets,
        reverse,
        None,
        recurrent_mask,
        zoneout_h,
        zoneout_c,
    )
    return output, h_n, c_n, all_c


def gru(
    input: Tensor,
    h0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
    recurrent_mask: Tensor | None = None,
    zoneout_h: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run one GRU layer in one direction. The formula and its source: :func:`rnnfast.reference.gru`.

    ``weight_ih`` is ``[3*H, I]``, ``weight_hh`` ``[3*H, H]`` and each bias ``[3*H]``, gates in the order r, z, n. All
    else, errors included, is as in :func:`lstm`.

    Returns:
        output ``[T, N, H]`` (``[rows, H]`` or ``[N, H]`` for those kinds of input) and h_n ``[N, H]``.
    """
    output, h_n, _ = torch.ops.rnnfast.gru.default(
        input,
        h0,
        None,
        weight_ih,
        weight_hh,
        bias_ih,
        bias_hh,
        None,
        batch_sizes,
        lengths,
        resets,
        reverse,
        None,
        recurrent_mask,
        zoneout_h,
    )
    return output, h_n


def rnn_tanh(
    input: Tensor,
    h0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
    recurrent_mask: Tensor | None = None,
    zoneout_h: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run one plain RNN layer with tanh in one direction. The formula: :func:`rnnfast.reference.rnn_tanh`.

    ``weight_ih`` is ``[H, I]``, ``weight_hh`` ``[H, H]`` and each bias ``[H]``. All else, errors included, is as in
    :func:`lstm`.

    Returns:
        output ``[T, N, H]`` (``[rows, H]`` or ``[N, H]`` for those kinds of input) and h_n ``[N, H]``.
    """
    output, h_n, _ = torch.ops.rnnfast.rnn_tanh.default(
        input,
        h0,
        None,
        weight_ih,
        weight_hh,
        bias_ih,
        bias_hh,
        None,
        batch_sizes,
        lengths,
        resets,
        reverse,
        None,
        recurrent_mask,
        zoneout_h,
    )
    return output, h_n


def rnn_relu(
    input: Tensor,
    h0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
    recurrent_mask: Tensor | None = None,
    zoneout_h: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run one plain RNN layer with a rectifier in one direction. The formula: :func:`rnnfast.reference.rnn_relu`.

    Arguments, results and errors are those of :func:`rnn_tanh`.
    """
    output, h_n, _ = torch.ops.rnnfast.rnn_relu.default(
        input,
        h0,
        None,
        weight_ih,
        weight_hh,
        bias_ih,
        bias_hh,
        None,
        batch_sizes,
        lengths,
        resets,
        reverse,
        None,
        recurrent_mask,
        zoneout_h,
    )
    return output, h_n


def _like_gru(cell: str, gates: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function for a cell that differs from the GRU in its gates only."""
    op = getattr(torch.ops.rnnfast, cell).default

    def run(
        input: Tensor,
        h0: Tensor | None,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor | None = None,
        bias_hh: Tensor | None = None,
        *,
        batch_sizes: Tensor | None = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reverse: bool = False,
        recurrent_mask: Tensor | None = None,
        zoneout_h: Tensor | None = None,
        weight_ln: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        output, h_n, _ = op(
            input,
            h0,
            None,
            weight_ih,
            weight_hh,
            bias_ih,
            bias_hh,
            None,
            batch_sizes,
            lengths,
            resets,
            reverse,
            None,
            recurrent_mask,
            zoneout_h,
            None,
            weight_ln,
        )
        return output, h_n

    return _named(run, cell, "gru", gates)


def _like_lstm(cell: str, gates: str, with_all_c: bool = False) -> Callable[..., tuple[Tensor, ...]]:
    """The function for a cell that differs from the LSTM in its gates only."""
    name = f"{cell}_all_c" if with_all_c else cell
    op = getattr(torch.ops.rnnfast, name).default

    def run(
        input: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor | None = None,
        bias_hh: Tensor | None = None,
        weight_hr: Tensor | None = None,
        *,
        batch_sizes: Tensor | None = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reverse: bool = False,
        weight_ch: Tensor | None = None,
        recurrent_mask: Tensor | None = None,
        zoneout_h: Tensor | None = None,
        zoneout_c: Tensor | None = None,
        weight_ln: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = op(
            input,
            h0,
            c0,
            weight_ih,
            weight_hh,
            bias_ih,
            bias_hh,
            weight_hr,
            batch_sizes,
            lengths,
            resets,
            reverse,
            weight_ch,
            recurrent_mask,
            zoneout_h,
            zoneout_c,
            weight_ln,
        )
        return results

    return _named(run, name, "lstm_all_c" if with_all_c else "lstm", gates)


def _named(run: _Run, name: str, like: str, gates: str) -> _Run:
    run.__name__ = run.__qualname__ = name
    run.__doc__ = f"""Run one layer in one direction. The formula: ``rnnfast.reference.{name.removesuffix("_all_c")}``.

    Arguments, results and errors are those of :func:`{like}`, with the gates in the order {gates}.
    """
    return run


_PEEPHOLES_IFO = "i, f, g, o, and ``weight_ch`` ``[3*H]``, by which i, f and o see c"
_PEEPHOLES_IO = "i, g, o, and ``weight_ch`` ``[2*H]``, by which i and o see c"
_GAINS = "``weight_ln`` ``[{}*H]``: the gains of both products, {}*H each{}"
gru_before = _like_gru("gru_before", "r, z, n")
gru_layer_norm = _like_gru("gru_layer_norm", f"r, z, n, and {_GAINS.format(6, 3, '')}")
gru_reset = _like_gru("gru_reset", "r, n")
gru_reset_before = _like_gru("gru_reset_before", "r, n")
gru_update = _like_gru("gru_update", "z, n")
lstm_coupled = _like_lstm("lstm_coupled", "i, g, o")
lstm_coupled_all_c = _like_lstm("lstm_coupled", "i, g, o", with_all_c=True)
lstm_coupled_peephole = _like_lstm("lstm_coupled_peephole", _PEEPHOLES_IO)
lstm_coupled_peephole_all_c = _like_lstm("lstm_coupled_peephole", _PEEPHOLES_IO, with_all_c=True)
_GAINS_LSTM = f"i, f, g, o, and {_GAINS.format(10, 4, ', then gain and bias of c')}"
lstm_layer_norm = _like_lstm("lstm_layer_norm", _GAINS_LSTM)
lstm_layer_norm_all_c = _like_lstm("lstm_layer_norm", _GAINS_LSTM, with_all_c=True)
lstm_peephole = _like_lstm("lstm_peephole", _PEEPHOLES_IFO)
lstm_peephole_all_c = _like_lstm("lstm_peephole", _PEEPHOLES_IFO, with_all_c=True)


# --- Fake kernels: the shapes and dtypes of what the ops return -------------------------------------------------------


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_PRIMALS = ("input", "h0", "c0", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr", "weight_ch", "weight_ln")
_MASKS = ("recurrent_mask", "zoneout_h", "zoneout_c")


def _output_shapes(
    cell: str,
    input: Tensor,
    h0: Tensor | None,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    batch_sizes: Tensor | None,
) -> tuple[list[Any], list[Any], list[Any]]:
    """The shapes of output, h_n and c_n. Sizes may be symbolic."""
    hidden_size = weight_hh.shape[-2] // _CELLS[cell]["num_gates"]
    state_size = hidden_size if weight_hr is None else weight_hr.shape[-2]
    batch: Any
    if batch_sizes is None:
        batch = input.shape[-2]
    elif h0 is not None:
        batch = h0.shape[0]
    else:
        batch = batch_sizes[0].item()  # under tracing a size that only the data knows
    c_n = [batch, hidden_size] if _CELLS[cell]["num_states"] == 2 else [0]
    return [*input.shape[:-1], state_size], [batch, state_size], c_n


def _one_hot_like(input: Tensor, weight_ih: Tensor) -> Tensor:
    """The input, or for tokens (int64) a stand-in of the shape and dtype of their one-hot rows."""
    if input.dtype != torch.int64:
        return input
    return weight_ih.new_empty((1,)).expand(*input.shape, weight_ih.shape[-1])


def _saved_shapes(
    cell: str, input: Tensor, weight_hh: Tensor, weight_hr: Tensor | None, zoneouts: bool
) -> tuple[torch.dtype, list[Any], list[Any], list[Any]]:
    """The dtype, and the shapes of gates, cells and hidden: what the forward keeps for the backward.

    Must say what ``csrc/call.cpp`` allocates. Rows are the steps of all sequences; the units of a row are rounded up to
    blocks of 64 bytes whatever the instruction set, so that the layout is one on all machines.
    """
    entry = _CELLS[cell]
    accumulate = torch.float64 if input.dtype == torch.float64 else torch.float32
    block = 64 // accumulate.itemsize
    rows = input.shape[0] if input.dim() == 2 else input.shape[0] * input.shape[1]

    def kept(units: int, slots: int) -> list[int]:
        return [rows, (units + block - 1) // block * block * slots]

    hidden_size, state_size = weight_hh.shape[-2] // int(entry["num_gates"]), weight_hh.shape[-1]
    gates = kept(hidden_size, int(entry["num_slots"]))
    cells = kept(hidden_size, 1) if entry["num_states"] == 2 else [0]
    saves_hidden = entry["saves_hidden"] or weight_hr is not None or zoneouts
    hidden = kept(state_size, 1) if saves_hidden else [0]
    return accumulate, gates, cells, hidden


def _shapes_between_parts(
    dtype: torch.dtype, weight_hh: Tensor, steps: Any, h_n: list[Any], c_n: list[Any]
) -> tuple[torch.dtype, list[Any], list[Any], list[Any]]:
    """The same for a call with recompute, which keeps the states between parts of the sequence, as h_n and c_n.

    The length of a part is that of ``part_steps`` in ``csrc/call.cpp``.
    """
    members = weight_hh.shape[0] if weight_hh.dim() == 3 else 1
    largest: Any = torch.sym_max
    part = largest(8, 512 // largest(h_n[0] // members, 1))
    rows = ((steps + part - 1) // part - 1) * h_n[0]
    cells = [rows, c_n[1]] if len(c_n) == 2 else [0]
    return torch.float64 if dtype == torch.float64 else torch.float32, [0], cells, [rows, h_n[1]]


def _register_fakes(cell: str) -> None:
    def check(
        primals: Sequence[Tensor | None],
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        resets: Tensor | None,
        **others: Tensor | None,
    ) -> None:
        """Refuse other dtypes, and a mixture of devices: one meta tensor brings a call with any others here."""
        named = dict(zip(_PRIMALS, primals, strict=True)) | {"resets": resets} | others
        if primals[0] is not None and primals[0].dtype not in (*_DTYPES, torch.int64):
            raise TypeError(
                f"rnnfast::{cell}: input: expected float32, float64, bfloat16, float16 or int64 tokens, "
                f"got {primals[0].dtype}"
            )
        device = next(tensor.device for tensor in primals if tensor is not None)
        on_cpu = {"batch_sizes": batch_sizes, "lengths": lengths}
        for name, tensor in (named | on_cpu).items():
            expected = torch.device("cpu") if name in on_cpu else device
            if tensor is not None and tensor.device != expected:
                raise RuntimeError(
                    f"rnnfast::{cell}: {name}: expected a tensor on {expected}, got one on {tensor.device}"
                )

    def forward(
        input: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor | None,
        bias_hh: Tensor | None,
        weight_hr: Tensor | None,
        batch_sizes: Tensor | None = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reverse: bool = False,
        weight_ch: Tensor | None = None,
        recurrent_mask: Tensor | None = None,
        zoneout_h: Tensor | None = None,
        zoneout_c: Tensor | None = None,
        weight_ln: Tensor | None = None,
        recompute: bool = False,
    ) -> tuple[Tensor, ...]:
        primals = (input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, weight_ch, weight_ln)
        masks = {"recurrent_mask": recurrent_mask, "zoneout_h": zoneout_h, "zoneout_c": zoneout_c}
        check(primals, batch_sizes, lengths, resets, **masks)
        input = _one_hot_like(input, weight_ih)
        shapes = _output_shapes(cell, input, h0, weight_hh, weight_hr, batch_sizes)
        return tuple(input.new_empty(shape) for shape in shapes)

    def forward_and_save(
        input: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor | None,
        bias_hh: Tensor | None,
        weight_hr: Tensor | None,
        batch_sizes: Tensor | None = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reverse: bool = False,
        weight_ch: Tensor | None = None,
        recurrent_mask: Tensor | None = None,
        zoneout_h: Tensor | None = None,
        zoneout_c: Tensor | None = None,
        weight_ln: Tensor | None = None,
        recompute: bool = False,
    ) -> tuple[Tensor, ...]:
        primals = (input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, weight_ch, weight_ln)
        masks = {"recurrent_mask": recurrent_mask, "zoneout_h": zoneout_h, "zoneout_c": zoneout_c}
        check(primals, batch_sizes, lengths, resets, **masks)
        input = _one_hot_like(input, weight_ih)
        shapes = _output_shapes(cell, input, h0, weight_hh, weight_hr, batch_sizes)
        if recompute:
            steps = batch_sizes.shape[0] if batch_sizes is not None else input.shape[0] if input.dim() == 3 else 1
            dtype, *saved = _shapes_between_parts(input.dtype, weight_hh, steps, shapes[1], shapes[2])
        else:
            zoneouts = zoneout_h is not None or zoneout_c is not None
            dtype, *saved = _saved_shapes(cell, input, weight_hh, weight_hr, zoneouts)
        return (
            *(input.new_empty(shape) for shape in shapes),
            *(input.new_empty(shape, dtype=dtype) for shape in saved),
        )

    def check_backward(arguments: Sequence[Any]) -> tuple[Sequence[Tensor | None], Sequence[bool]]:
        """Check the arguments of a backward op, and give those that are differentiated and which are wanted."""
        grads, primals = arguments[:3], (*arguments[3:11], arguments[15], arguments[19])
        kept, needs, grad_all_c = arguments[21:24], arguments[24], (*arguments[25:], None)[0]
        names = ("grad_output", "grad_h_n", "grad_c_n", *_MASKS, "gates", "cells", "hidden", "grad_all_c")
        others = (*grads, *arguments[16:19], *kept, grad_all_c)
        check(primals, *arguments[11:14], **dict(zip(names, others, strict=True)))
        return primals, needs

    def gradients(like: Tensor, primals: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor, ...]:
        return tuple(
            like.new_empty(primal.shape if needed and primal is not None and primal.is_floating_point() else [0])
            for primal, needed in zip(primals, needs, strict=True)
        )

    def backward(*arguments: Any) -> tuple[Tensor, ...]:
        primals, needs = check_backward(arguments)
        return gradients(arguments[6], primals, needs)

    def backward_factors(*arguments: Any) -> tuple[Tensor, ...]:
        primals, needs = check_backward(arguments)
        input, weight_ih, weight_hh, weight_hr, gates = (arguments[i] for i in (3, 6, 7, 10, 21))
        state_size, hidden_size = (0, 0) if weight_hr is None else weight_hr.shape
        rows = input.shape[:-1] if input.is_floating_point() else input.shape
        units = (weight_hh.shape[0], weight_hh.shape[0], weight_hh.shape[1], state_size, hidden_size)
        factors = (weight_ih.new_empty([*rows, size], dtype=gates.dtype) for size in units)
        return (*gradients(weight_ih, primals[:3], needs[:3]), *factors)

    torch.library.register_fake(f"rnnfast::{cell}", forward)
    torch.library.register_fake(f"rnnfast::_{cell}_forward", forward_and_save)
    torch.library.register_fake(f"rnnfast::_{cell}_backward", backward)
    if not any(_CELLS[cell][f"num_{what}"] for what in ("late_gates", "peepholes", "norm_vectors")):
        torch.library.register_fake(f"rnnfast::_{cell}_backward_factors", backward_factors)
    if _CELLS[cell]["num_states"] == 1:
        return

    def with_all_c(plain: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        """The fake of the same op that returns all_c too."""

        def fake(input: Tensor, *others: Any, **named: Any) -> tuple[Tensor, ...]:
            outputs = plain(input, *others, **named)
            return (*outputs, outputs[0].new_empty([*outputs[0].shape[:-1], outputs[2].shape[1]]))

        return fake

    torch.library.register_fake(f"rnnfast::{cell}_all_c", with_all_c(forward))
    torch.library.register_fake(f"rnnfast::_{cell}_all_c_forward", with_all_c(forward_and_save))


# --- The derivative of the backward ops, by running the reference again -----------------------------------------------


def _alias(tensor: Tensor | None) -> Tensor | None:
    """A stand-in to differentiate with respect to, that shares no history with any other argument.

    It stays connected to ``tensor`` where that requires a gradient, for derivatives of higher order still. Without it,
    arguments that depend on one another (``h0`` made from ``input``; one weight in two places) would be counted twice.
    """
    if tensor is None or not tensor.is_floating_point():  # tokens have no derivative
        return tensor
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()


def _register_double_backward(cell: str) -> None:
    scan: Callable[..., tuple[Tensor, ...]] = reference.CELLS[cell]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        # grad_output, grad_h_n, grad_c_n; the op's own arguments up to resets; those after reverse; grad_all_c.
        ctx.save_for_backward(*inputs[:14], *inputs[15:20], inputs[25])
        ctx.reverse, ctx.needs = inputs[14], inputs[24]

    def backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        create_graph = torch.is_grad_enabled()
        saved = ctx.saved_tensors
        with torch.enable_grad():
            grads = [_alias(tensor) for tensor in (*saved[:3], saved[19])]
            primals = [_alias(tensor) for tensor in (*saved[3:11], saved[14], saved[18])]
            bounds, masks = (*saved[11:14], ctx.reverse), saved[15:18]
            outputs = scan(*primals[:8], *bounds, primals[8], *masks, primals[9], with_all_c=grads[3] is not None)
            used = [(o, grad) for o, grad in zip(outputs, grads, strict=False) if grad is not None and o.requires_grad]
            wanted = [
                (primal, grad_grad)
                for primal, grad_grad, needed in zip(primals, grad_grads, ctx.needs, strict=True)
                if needed and primal is not None and grad_grad is not None
            ]
            firsts = torch.autograd.grad(
                [output for output, _ in used],
                [primal for primal, _ in wanted],
                [grad for _, grad in used],
                create_graph=True,
                allow_unused=True,
            )
        pairs = [
            (first, grad_grad)
            for first, (_, grad_grad) in zip(firsts, wanted, strict=True)
            if first is not None and first.requires_grad
        ]
        sources = [*enumerate([*grads[:3], *primals[:8]]), (15, primals[8]), (19, primals[9]), (25, grads[3])]
        targets = [(i, source) for i, source in sources if source is not None and ctx.needs_input_grad[i]]
        result: list[Tensor | None] = [None] * 26
        if pairs and targets:
            seconds = torch.autograd.grad(
                [first for first, _ in pairs],
                [source for _, source in targets],
                [grad_grad for _, grad_grad in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
            for (i, _), second in zip(targets, seconds, strict=True):
                result[i] = second
        return tuple(result[: len(ctx.needs_input_grad)])  # a last argument left at its default is not passed

    torch.library.register_autograd(f"rnnfast::_{cell}_backward", backward, setup_context=setup_context)


def _sample_products_fake(left: Tensor, right: Tensor, size: int) -> Tensor:
    return left.new_empty([size, left.shape[-1], right.shape[-1]])


def _softmax_loss_fake(scores: Tensor, bias: Tensor | None, targets: Tensor, grad: bool) -> Tensor:
    return scores.new_empty(targets.shape)


torch.library.register_fake("rnnfast::_sample_products", _sample_products_fake)
torch.library.register_fake("rnnfast::_softmax_loss_", _softmax_loss_fake)
for _cell in _CELLS:
    _register_fakes(_cell)
    _register_double_backward(_cell)
    transforms.register(_cell)
del _cell
