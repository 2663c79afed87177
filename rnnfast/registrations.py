"""What the compiled part leaves to Python of each op, registered when this module is imported.

The fake kernels (shapes without data, for the meta device, torch.compile and torch.export); the derivative of the
backward ops, built on :mod:`rnnfast.reference`; and torch.func's transforms (:mod:`rnnfast.transforms`). The schemas,
checks and first derivatives are in ``csrc/ops.cpp`` and ``csrc/checks.cpp``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rnnfast import _C, reference, transforms

_CELLS: dict[str, dict[str, Any]] = {cell["name"]: cell for cell in _C.cells()}


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


def _linear_loss_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk_rows: int, needs: list[bool]
) -> tuple[Tensor, ...]:
    tensors = (hidden, weight, bias)
    grads = (
        t.new_empty(t.shape if need else 0) if t is not None else hidden.new_empty(0)
        for t, need in zip(tensors, needs, strict=True)
    )
    return hidden.new_empty(targets.shape), *grads


torch.library.register_fake("rnnfast::_linear_loss", _linear_loss_fake)
torch.library.register_fake("rnnfast::_sample_products", _sample_products_fake)
torch.library.register_fake("rnnfast::_softmax_loss_", _softmax_loss_fake)
for _cell in _CELLS:
    _register_fakes(_cell)
    _register_double_backward(_cell)
    transforms.register(_cell)
del _cell
