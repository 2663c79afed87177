"""ONNX: the translation of rnnfast's ops to the standard nodes RNN, GRU and LSTM.

>>> torch.onnx.export(model, (x,), "model.onnx", dynamo=True, custom_translation_table=rnnfast.onnx.translation_table())

One call of an op, which is one layer in one direction, becomes one node; :func:`join_directions` makes one node of the
two of a bidirectional layer. Needs the extra ``rnnfast[onnx]``. The nodes and their gate orders:
https://onnx.ai/onnx/operators/, opset 14.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from rnnfast import _C

__all__ = ["join_directions", "translation_table"]

# ONNX's order in torch's numbers; the cells that are not here have no node.
_GATES = {"rnn_tanh": (0,), "rnn_relu": (0,), "gru": (1, 0, 2), "gru_before": (1, 0, 2), "lstm": (0, 3, 1, 2)}


def _translation(cell: str, opset: Any, with_all_c: bool = False) -> Callable[..., Any]:
    """The function that the exporter calls for an op of ``cell``; it makes nodes by the functions of ``opset``.

    With ``with_all_c`` the op is ``<cell>_all_c``, for which there is no node: the function only says so.
    """
    if cell not in _GATES:
        return _refusal(cell + "_all_c" * with_all_c)
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
        weight_ch: Any = None,
        recurrent_mask: Any = None,
        zoneout_h: Any = None,
        zoneout_c: Any = None,
        weight_ln: Any = None,  # of cells without a node
        recompute: bool = False,  # of training
    ) -> Any:
        if with_all_c:
            raise NotImplementedError(
                f"ONNX export of rnnfast::{cell}_all_c: ONNX's LSTM gives c of the last step only: "
                "export a layer without return_cells"
            )
        for name, value, instead in (
            ("weight_hr", weight_hr, "ONNX's LSTM has no projection: export a layer without proj_size"),
            ("batch_sizes", batch_sizes, "ONNX has no packed sequences: export with padded input"),
            ("recurrent_mask", recurrent_mask, "recurrent dropout is of training: export after eval()"),
            ("zoneout_h", zoneout_h, "ONNX's nodes have no zoneout: export a layer without"),
            ("zoneout_c", zoneout_c, "ONNX's nodes have no zoneout: export a layer without"),
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
        elif cell in ("gru", "gru_before"):
            output, h_n = opset.GRU(x, w, r, b, steps, one(h0), linear_before_reset=int(cell == "gru"), **common)
        else:
            activation = "Tanh" if cell == "rnn_tanh" else "Relu"
            output, h_n = opset.RNN(x, w, r, b, steps, one(h0), activations=[activation], **common)
        if cell != "lstm":
            c_n = opset.ConstantOfShape(opset.Constant(value_ints=[0]))
        return opset.Squeeze(output, [0, 1] if is_step else [1]), opset.Squeeze(h_n, [0]), c_n

    return translate


def _refusal(name: str) -> Callable[..., Any]:
    def translate(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"ONNX export of rnnfast::{name}: ONNX has no node for this cell")

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
    table = {}
    for cell in _C.cells():
        name = cell["name"]
        table[getattr(torch.ops.rnnfast, name).default] = _translation(name, opset)
        if cell["num_states"] == 2:
            table[getattr(torch.ops.rnnfast, f"{name}_all_c").default] = _translation(name, opset, with_all_c=True)
    return table


def join_directions(program: Any) -> int:
    """Make one node with ``direction="bidirectional"`` of the two nodes of each bidirectional layer, in place.

    Args:
        program: what ``torch.onnx.export(..., dynamo=True)`` returned.

    Returns:
        how many pairs were joined: two nodes of one kind and size over the same input, one of each direction.

    Raises:
        ImportError: onnx_ir, a part of onnxscript, is not installed.
    """
    try:
        ir: Any = importlib.import_module("onnx_ir")
    except ImportError as error:
        raise ImportError('rnnfast.onnx needs onnxscript: pip install "rnnfast[onnx]"') from error
    graph = program.model.graph
    waiting: dict[tuple[Any, ...], Any] = {}  # nodes that run forward, by what a partner must share with them
    pairs = 0
    for node in list(graph):
        if node.domain or node.op_type not in ("RNN", "GRU", "LSTM"):
            continue
        given = {name: attribute.value for name, attribute in node.attributes.items()}
        direction = given.pop("direction", "forward")
        inputs = [*node.inputs, *(None,) * (8 - len(node.inputs))]
        exists = tuple(value is not None for value in inputs)
        sharing = (id(inputs[0]), id(inputs[4]), exists, node.op_type, str(sorted(given.items())))
        if direction == "forward":
            waiting[sharing] = node
        elif direction == "reverse" and sharing in waiting and not _depends(node, waiting[sharing]):
            _join(ir, graph, waiting.pop(sharing), node)
            pairs += 1
    if pairs:
        graph.sort()
        program.optimize()  # folds the concatenated weights
    return pairs


def _depends(node: Any, on: Any) -> bool:
    """Whether anything that ``node`` reads is made from what ``on`` writes."""
    seen, waiting = set(), [node]
    while waiting:
        for value in waiting.pop().inputs:
            maker = None if value is None else value.producer()
            if maker is on:
                return True
            if maker is not None and maker not in seen:
                seen.add(maker)
                waiting.append(maker)
    return False


def _join(ir: Any, graph: Any, forward: Any, reverse: Any) -> None:
    """Put a bidirectional node in the place of the two; who reads their results gets slices of its."""
    new = []

    def emit(op: str, inputs: list[Any], attributes: dict[str, Any], num_outputs: int = 1) -> Any:
        new.append(ir.node(op, inputs, attributes, num_outputs=num_outputs))
        return new[-1].outputs

    def constant(number: int) -> Any:
        return emit("Constant", [], {"value_ints": [number]})[0]

    both = []
    for place, (a, b) in enumerate(zip(forward.inputs, reverse.inputs, strict=True)):
        shared = a is None or place in (0, 4)  # the input, its lengths
        both.append(a if shared else emit("Concat", [a, b], {"axis": 0})[0])
    attributes = {name: attribute.value for name, attribute in forward.attributes.items()}
    attributes |= {name: value * 2 for name, value in attributes.items() if name == "activations"}
    attributes["direction"] = "bidirectional"
    results = emit(forward.op_type, both, attributes, len(forward.outputs))
    for result, axis, olds in zip(results, (1, 0, 0), zip(forward.outputs, reverse.outputs, strict=True), strict=False):
        for d, old in enumerate(olds):  # Y is [T, D, N, H], Y_h and Y_c are [D, N, H]
            part = emit("Slice", [result, constant(d), constant(d + 1), constant(axis)], {})[0]
            part.shape, part.type = old.shape, old.type
            ir.convenience.replace_all_uses_with(old, part)
    graph.insert_before(reverse, new)
    graph.remove([forward, reverse], safe=True)
