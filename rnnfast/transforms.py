"""The ops inside torch.func's transforms: grad, vjp, jvp, vmap and what is built of them.

Outside a transform nothing here runs. Inside one torch brings a call of ``torch.ops.rnnfast.<cell>`` to the kernel that
is registered here for the dispatch key of the transforms, and the innermost transform decides:

- ``vmap`` over anything but weights: one call on a larger batch. A mapped dimension of size ``B`` is laid inside ``N``
  (sequence ``n`` of example ``b`` becomes ``n * B + b``), for padded, packed and single-step input alike.
- ``vmap`` over weights: one call for each set of weights.
- ``grad`` and ``vjp``: :class:`_Scan`, whose backward is :class:`_ScanBackward`; both obey the same rules of vmap. The
  weights' gradients of one example alone (``vmap`` of ``grad``) are small products of what
  ``_<cell>_backward_factors`` returns for the whole batch.
- ``jvp``, alone or anywhere in the stack: :mod:`rnnfast.reference`, differentiated by torch. So are second derivatives,
  and ``<cell>_all_c`` in a stack with any derivative; ``vmap`` alone folds it like ``<cell>``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch._functorch.vmap import unwrap_batched

from rnnfast import _C, reference

_NUM_OUTPUTS = {cell["name"]: 1 + cell["num_states"] for cell in _C.cells()}
_Results = tuple[Tensor, ...]
_Dims = Sequence[Any]
_TransformType = _functorch.TransformType
_vjp: Any = torch.func.vjp

# Positions in the arguments of <cell>; those of _<cell>_backward come after three gradients.
_WEIGHTS = range(3, 8)
_BATCH_SIZES, _LENGTHS, _RESETS, _REVERSE = 8, 9, 10, 11
_DEFAULTS = (None, None, None, False)  # of those four
_NUM_ARGUMENTS = 12


def _op(name: str) -> Callable[..., _Results]:
    op: Callable[..., _Results] = getattr(torch.ops.rnnfast, name).default
    return op


def _apply(function: Any, *arguments: Any) -> _Results:
    results: _Results = function.apply(*arguments)
    return results


# --- vmap: the mapped dimension becomes part of the batch -------------------------------------------------------------


def _fold(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """``[..., N, K]`` with a mapped dimension ``dim``, or the same for all examples, to ``[..., N*B, K]``."""
    if tensor is None:
        return None
    if dim is None:
        spread = tensor.unsqueeze(-2).expand(*tensor.shape[:-1], size, tensor.shape[-1])
    else:
        spread = tensor.movedim(dim, -2)
    return spread.flatten(-3, -2)


def _split(tensor: Tensor, size: int) -> Tensor:
    """``[..., N*B, K]`` to ``[..., N, B, K]``."""
    return tensor.reshape(*tensor.shape[:-2], tensor.shape[-2] // size, size, tensor.shape[-1])


def _unfold(tensor: Tensor, size: int) -> tuple[Tensor, int | None]:
    """``[..., N*B, K]`` to ``[..., N, B, K]`` and the mapped dimension; what does not exist (``[0]``) is not mapped."""
    if tensor.dim() == 1:
        return tensor, None
    spread = _split(tensor, size)
    return spread, spread.dim() - 2


def _fold_arguments(arguments: Sequence[Any], dims: _Dims, size: int) -> list[Any]:
    """The arguments of ``<cell>`` with unmapped weights and batch_sizes."""
    folded = list(arguments)
    for i in range(3):
        folded[i] = _fold(arguments[i], dims[i], size)
    if arguments[_BATCH_SIZES] is not None:
        folded[_BATCH_SIZES] = arguments[_BATCH_SIZES] * size
    for i in (_LENGTHS, _RESETS):  # [N] and [T, N]
        tensor, dim = arguments[i], dims[i]
        if tensor is not None:
            spread = tensor.unsqueeze(-1).expand(*tensor.shape, size) if dim is None else tensor.movedim(dim, -1)
            folded[i] = spread.flatten(-2)
    return folded


def _is_foldable(dims: _Dims) -> bool:
    """Whether all examples of a call of ``<cell>`` share the weights."""
    return all(dims[i] is None for i in _WEIGHTS)


def _slices(arguments: Sequence[Any], dims: _Dims, example: int) -> list[Any]:
    return [
        argument.select(dim, example) if isinstance(dim, int) else argument
        for argument, dim in zip(arguments, dims, strict=True)
    ]


def _loop(call: Callable[..., _Results], size: int, arguments: Sequence[Any], dims: _Dims) -> tuple[_Results, _Dims]:
    """One call for each example."""
    every = [call(*_slices(arguments, dims, example)) for example in range(size)]
    return tuple(torch.stack(parts) for parts in zip(*every, strict=True)), (0,) * len(every[0])


def _vmap_forward(
    call: Callable[..., _Results], size: int, dims: _Dims, arguments: Sequence[Any], num_mapped: int = 3
) -> tuple[_Results, _Dims]:
    """The rule of ``<cell>``, ``<cell>_all_c`` and ``_<cell>_forward``; the first ``num_mapped`` results are mapped.

    What the last saves is left folded, and so unmapped: :func:`_vmap_backward` knows it by the mapped arguments.
    """
    if dims[_BATCH_SIZES] is not None:
        raise RuntimeError(
            "batch_sizes: expected the same for all examples of a vmap, got mapped ones: their results differ in size. "
            "Pad the sequences and give lengths instead, which may be mapped"
        )
    if not _is_foldable(dims):
        return _loop(call, size, arguments, dims)
    outputs = call(*_fold_arguments(arguments, dims, size))
    unfolded = [_unfold(output, size) for output in outputs[:num_mapped]]
    unfolded += [(saved, None) for saved in outputs[num_mapped:]]
    return tuple(output for output, _ in unfolded), tuple(dim for _, dim in unfolded)


def _vmap_backward(cell: str, size: int, dims: _Dims, arguments: Sequence[Any]) -> tuple[_Results, _Dims]:
    """The rule of ``_<cell>_backward``."""
    leading, saved, needs = arguments[3 : 3 + _NUM_ARGUMENTS], list(arguments[15:18]), arguments[18]
    leading_dims, saved_dims = dims[3 : 3 + _NUM_ARGUMENTS], dims[15:18]
    if not _is_foldable(leading_dims) or any(dim is not None for dim in saved_dims):
        return _loop(lambda *given: _apply(_ScanBackward, cell, *given), size, arguments, dims)

    if all(dim is None for dim in leading_dims):  # the forward was not mapped: what it saved serves every example
        saved = [tensor.repeat_interleave(size, 0) if tensor.numel() else tensor for tensor in saved]
    grads = [_fold(tensor, dim, size) for tensor, dim in zip(arguments[:3], dims[:3], strict=True)]
    folded = [*grads, *_fold_arguments(leading, leading_dims, size), *saved, needs]
    if not any(needs[i] for i in _WEIGHTS):
        results = _apply(_ScanBackward, cell, *folded)
        unfolded = [_unfold(result, size) for result in results[:3]] + [(result, None) for result in results[3:]]
        return tuple(result for result, _ in unfolded), tuple(dim for _, dim in unfolded)

    tensors = [tensor for tensor in folded if isinstance(tensor, Tensor)]
    if torch._C._are_functorch_transforms_active() or (
        torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    ):
        return _loop(_backward_from_scratch(cell), size, arguments, dims)
    return _per_sample(cell, size, folded)


def _backward_from_scratch(cell: str) -> Callable[..., _Results]:
    """``_<cell>_backward`` of one example whose forward was part of a folded call: what that saved is made anew."""

    def call(*arguments: Any) -> _Results:
        leading = arguments[3 : 3 + _NUM_ARGUMENTS]
        detached = [tensor.detach() if isinstance(tensor, Tensor) else tensor for tensor in leading]
        saved = _apply(_Scan, cell, *detached)[3:]
        return _apply(_ScanBackward, cell, *arguments[:3], *leading, *saved, arguments[18])

    return call


def _per_sample(cell: str, size: int, folded: Sequence[Any]) -> tuple[_Results, _Dims]:
    """All gradients of a folded call, the weights' for each example: one backward over time, then ``B`` products."""
    input, needs = folded[3], folded[18]
    lengths, dtype = folded[3 + _LENGTHS], folded[3].dtype
    *states, dgates_ih, dgates_hh, h_prev, dprojected, h_raw = _op(f"_{cell}_backward_factors")(*folded)
    if lengths is not None:  # what lies past an end is not read, and may be NaN
        real = torch.arange(input.shape[0])[:, None] < lengths
        input = input.masked_fill(~real.unsqueeze(-1), 0.0)

    def total(tensor: Tensor) -> Tensor:
        return _split(tensor, size).flatten(0, -3).sum(0).to(dtype)

    def product(left: Tensor, right: Tensor) -> Tensor:
        products: Tensor = torch.ops.rnnfast._sample_products.default(left, right, size)
        return products.to(dtype)

    makers: list[Callable[[], Tensor]] = [
        lambda: product(dgates_ih, input.to(dgates_ih.dtype)),
        lambda: product(dgates_hh, h_prev),
        lambda: total(dgates_ih),
        lambda: total(dgates_hh),
        lambda: product(dprojected, h_raw),
    ]
    results = [_unfold(state, size) for state in states]
    for i, make in zip(_WEIGHTS, makers, strict=True):
        exists = needs[i] and folded[3 + i] is not None
        results.append((make(), 0) if exists else (input.new_empty(0), None))
    return tuple(result for result, _ in results), tuple(dim for _, dim in results)


# --- grad: one op call at one level of the stack ----------------------------------------------------------------------


class _Scan(torch.autograd.Function):
    """``_<cell>_forward``, differentiable at every level of transforms: ``apply(cell, *arguments of <cell>)``."""

    @staticmethod
    def forward(cell: str, *arguments: Any) -> _Results:
        return _op(f"_{cell}_forward")(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Results) -> None:
        cell, *arguments = inputs
        ctx.cell, ctx.reverse = cell, arguments[_REVERSE]
        ctx.save_for_backward(*arguments[:_REVERSE], *output[3:])
        ctx.mark_non_differentiable(*output[_NUM_OUTPUTS[cell] :])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        unused = (None,) * (_NUM_ARGUMENTS - 8)
        if all(grad is None for grad in grads[:3]):
            return (None,) * 9 + unused
        arguments, saved = ctx.saved_tensors[:_REVERSE], ctx.saved_tensors[_REVERSE:]
        needs = tuple(ctx.needs_input_grad[1:9])
        results = _apply(_ScanBackward, ctx.cell, *grads[:3], *arguments, ctx.reverse, *saved, needs)
        return (None, *(result if need else None for result, need in zip(results, needs, strict=True)), *unused)

    @staticmethod
    def vmap(info: Any, in_dims: _Dims, cell: str, *arguments: Any) -> tuple[_Results, _Dims]:
        return _vmap_forward(lambda *given: _apply(_Scan, cell, *given), info.batch_size, in_dims[1:], arguments)


class _ScanBackward(torch.autograd.Function):
    """``_<cell>_backward``, differentiable through the reference: ``apply(cell, *its arguments)``."""

    @staticmethod
    def forward(cell: str, *arguments: Any) -> _Results:
        return _op(f"_{cell}_backward")(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Results) -> None:
        cell, *arguments = inputs
        ctx.cell, ctx.reverse, ctx.needs = cell, arguments[14], arguments[18]
        ctx.save_for_backward(*arguments[:14])
        unwanted = [
            result
            for result, need, primal in zip(output, ctx.needs, arguments[3:11], strict=True)
            if not need or primal is None
        ]
        ctx.mark_non_differentiable(*unwanted)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        live = [i for i in range(11) if saved[i] is not None and ctx.needs_input_grad[1 + i]]
        wanted = [i for i in range(8) if ctx.needs[i] and saved[3 + i] is not None and grad_grads[i] is not None]
        result: list[Tensor | None] = [None] * 20
        if live and wanted:

            def firsts(*tensors: Tensor) -> _Results:
                given = list(saved)
                for i, tensor in zip(live, tensors, strict=True):
                    given[i] = tensor
                return _reference_gradients(ctx.cell, given[:3], given[3:], ctx.reverse, wanted)

            _, pull = _vjp(firsts, *(saved[i] for i in live))
            seconds = pull(tuple(grad_grads[i] for i in wanted))
            for i, second in zip(live, seconds, strict=True):
                result[1 + i] = second
        return tuple(result)

    @staticmethod
    def vmap(info: Any, in_dims: _Dims, cell: str, *arguments: Any) -> tuple[_Results, _Dims]:
        return _vmap_backward(cell, info.batch_size, in_dims[1:], arguments)


def _reference_gradients(
    cell: str, grads: Sequence[Tensor | None], arguments: Sequence[Any], reverse: bool, wanted: Sequence[int]
) -> _Results:
    """The gradients of the arguments numbered ``wanted``, by the reference: differentiable in all that is given."""

    def run(*tensors: Tensor) -> _Results:
        given = [*arguments, reverse]
        for i, tensor in zip(wanted, tensors, strict=True):
            given[i] = tensor
        outputs = reference.CELLS[cell](*given)
        return tuple(output for output, grad in zip(outputs, grads, strict=True) if grad is not None)

    _, pull = _vjp(run, *(arguments[i] for i in wanted))
    gradients: _Results = pull(tuple(grad for grad in grads if grad is not None))
    return gradients


# --- The kernel for the dispatch key of the transforms ----------------------------------------------------------------


def _transform(cell: str, with_all_c: bool = False) -> Callable[..., _Results]:
    name = f"{cell}_all_c" if with_all_c else cell
    op = _op(name)
    by_reference: Callable[..., _Results] = reference.CELLS[cell]

    def kernel(*given: Any) -> _Results:
        # The dispatcher leaves out trailing arguments that have their default.
        arguments = (*given, *_DEFAULTS[len(given) - _NUM_ARGUMENTS :]) if len(given) < _NUM_ARGUMENTS else given
        if not arguments[0].is_floating_point():
            raise NotImplementedError(
                f"rnnfast::{name}: input: expected floating-point input inside a torch.func transform, got "
                f"{arguments[0].dtype} tokens; give the op torch.nn.functional.one_hot(tokens, num_classes) instead"
            )
        kinds = [interpreter.key() for interpreter in _functorch.get_interpreter_stack() or []]
        if _TransformType.Jvp in kinds or (with_all_c and _TransformType.Grad in kinds):
            return by_reference(*arguments, with_all_c=with_all_c)
        interpreter: Any = retrieve_current_functorch_interpreter()
        if kinds[-1] == _TransformType.Grad:
            return _apply(_Scan, cell, *arguments)[:3]
        if kinds[-1] != _TransformType.Vmap:
            raise NotImplementedError(
                f"rnnfast::{name}: no rule for the transform {kinds[-1].name}; "
                "grad, vjp, jvp and vmap, and what torch.func builds of them, have one"
            )
        level = interpreter.level()
        plain, dims = unwrap_batched(arguments, level)
        with interpreter.lower():
            if all(dim is None for dim in dims):
                outputs: _Results = op(*plain)
                return outputs
            outputs, out_dims = _vmap_forward(op, interpreter.batch_size(), dims, plain, num_mapped=3 + with_all_c)
        return tuple(
            output if dim is None else _functorch._add_batch_dim(output, dim, level)
            for output, dim in zip(outputs, out_dims, strict=True)
        )

    return kernel


# Lives as long as the module: its registrations die with it.
_library: Any = cast(Any, torch.library).Library("rnnfast", "IMPL")


def register(cell: str) -> None:
    """Serve ``torch.ops.rnnfast.<cell>``, and ``<cell>_all_c`` where there is one, inside transforms."""
    _library.impl(cell, _transform(cell), "FuncTorchDynamicLayerFrontMode")
    if _NUM_OUTPUTS[cell] == 3:
        _library.impl(f"{cell}_all_c", _transform(cell, with_all_c=True), "FuncTorchDynamicLayerFrontMode")
