"""ONNX: the translation of rnnfast's ops to the standard nodes RNN, GRU and LSTM.

>>> torch.onnx.export(model, (x,), "model.onnx", dynamo=True, custom_translation_table=rnnfast.onnx.translation_table())

One call of an op, which is one layer in one direction, becomes one node. Needs the extra ``rnnfast[onnx]``. The nodes
and their gate orders: https://onnx.ai/onnx/operators/, opset 14.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["translation_table"]

_GATES = {"rnn_tanh": (0,), "rnn_relu": (0,), "gru": (1, 0, 2), "lstm": (0, 3, 1, 2)}  # ONNX's order in torch's numbers


def _translation(cell: str, opset: Any, with_all_c: bool = False) -> Callable[..., Any]:
    """The function that the exporter calls for an op of ``cell``; it makes nodes by the functions of ``opset``.

    With ``with_all_c`` the op is ``<cell>_all_c``, for which there is no node: the function only says so.
    """
    order = _GATES[cell]

    def reordered(weight: Any, hidden_size: int) -> Any:
        """The row blocks of ``[G*H, ...]`` in ONNX's order."""
        if order == tuple(range(len(order))):
            return weight
        return opset.Concat(
            *(opset.Slice(weight, [g * hidden_size], [(g + 1) * hidden_size], [0]) for g in order), axis=0
        )

    def translate(
        input: Any,
        h0: Any,
        c0: Any,
        weight_ih: Any,
        weight_hh: Any,
        bias_ih: Any = None,
        bias_hh: Any = None,
        weight_hr: Any = None,
        batch_sizes: Any = None,
        lengths: Any = None,
        resets: Any = None,
        reverse: bool = False,
    ) -> Any:
        if with_all_c:
            raise NotImplementedError(
                f"ONNX export of rnnfast::{cell}_all_c: ONNX's LSTM gives c of the last step only: "
                "export a layer without return_cells"
            )
        for name, value, instead in (
            ("weight_hr", weight_hr, "ONNX's LSTM has no projection: export a layer without proj_size"),
            ("batch_sizes", batch_sizes, "ONNX has no packed sequences: export with padded input"),
            ("resets", resets, "ONNX's nodes run without a break: call the model once for each piece"),
        ):
            if value is not None:
                raise NotImplementedError(
                    f"ONNX export of rnnfast::{cell}: {name}: expected None, got a tensor. {instead}"
                )

        def one(value: Any) -> Any:
            """A direction's share: what the node has in front for its number of directions, 1."""
            return None if value is None else opset.Unsqueeze(value, [0])

        hidden_size = weight_hh.shape[0] // len(order)
        is_step = len(input.shape) == 2
        x = opset.Unsqueeze(input, [0]) if is_step else input
        w, r = (one(reordered(weight, hidden_size)) for weight in (weight_ih, weight_hh))
        b = None
        if bias_ih is not None:
            b = one(opset.Concat(reordered(bias_ih, hidden_size), reordered(bias_hh, hidden_size), axis=0))
        steps = None if lengths is None else opset.Cast(lengths, to=6)  # int32
        common: dict[str, Any] = {"hidden_size": hidden_size, "direction": "reverse" if reverse else "forward"}
        if cell == "lstm":
            output, h_n, c_n = opset.LSTM(x, w, r, b, steps, one(h0), one(c0), **common)
            c_n = opset.Squeeze(c_n, [0])
        elif cell == "gru":
            output, h_n = opset.GRU(x, w, r, b, steps, one(h0), linear_before_reset=1, **common)
        else:
            activation = "Tanh" if cell == "rnn_tanh" else "Relu"
            output, h_n = opset.RNN(x, w, r, b, steps, one(h0), activations=[activation], **common)
        if cell != "lstm":
            c_n = opset.ConstantOfShape(opset.Constant(value_ints=[0]))
        return opset.Squeeze(output, [0, 1] if is_step else [1]), opset.Squeeze(h_n, [0]), c_n

    return translate


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Make the table for ``custom_translation_table`` of ``torch.onnx.export(..., dynamo=True)``.

    Raises:
        ImportError: onnxscript is not installed.

    The export itself raises for what the standard nodes cannot do: a projection, packed input, resets, return_cells.
    """
    try:
        opset = importlib.import_module("onnxscript").opset18
    except ImportError as error:
        raise ImportError('rnnfast.onnx needs onnxscript: pip install "rnnfast[onnx]"') from error
    table = {getattr(torch.ops.rnnfast, cell).default: _translation(cell, opset) for cell in _GATES}
    return table | {torch.ops.rnnfast.lstm_all_c.default: _translation("lstm", opset, with_all_c=True)}
