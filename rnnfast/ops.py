"""The functions behind the layers: one cell, one layer, one direction, all time steps in one call.

Typed wrappers of ``torch.ops.rnnfast.<cell>``. The schemas and first derivatives are in ``csrc/ops.cpp``, the checks in
``csrc/checks.cpp``; what torch wants of an op beside, registered from Python, in :mod:`rnnfast.registrations`.

Letters: ``T`` steps, ``N`` batch, ``I`` input size, ``H`` hidden size, ``P`` projected size (``H`` without a
projection), ``G`` gates (1 for the plain RNN, 3 for GRU, 4 for LSTM). Last dimension fastest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from rnnfast import registrations  # noqa: F401  (the ops are whole only with them)

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
