"""The ops inside torch.func's transforms: grad, vjp, jvp, vmap and what is built of them.

Outside a transform nothing here runs. Inside one torch brings a call of ``torch.ops.rnnfast.<cell>`` to the kernel that
is registered here for the dispatch key of the transforms, and the innermost transform decides:

- ``vmap`` over anything but weights: one call on a larger batch. A mapped dimension of size ``B`` is laid inside ``N``
  (sequence ``n`` of example ``b`` becomes ``n * B + b``), for padded, packed and single-step input alike.
- ``vmap`` over weights: the same, with weights ``[B, ...]``: sequence ``n`` of the larger batch runs with weights
  ``n % B``, the members of such an ensemble beside one another on the threads.
- ``grad`` and ``vjp``: :class:`_Scan`, whose backward is :class:`_ScanBackward`; both obey the same rules of vmap. The
  weights' gradients of one example alone (``vmap`` of ``grad``) are small products of what
  ``_<cell>_backward_factors`` returns for the whole batch; for a cell without that op, one backward for each example.
- ``jvp``, alone or anywhere in the stack: :mod:`rnnfast.reference`, differentiated by torch. So are second derivatives,
  and calls with peepholes, layer normalization, recurrent dropout or zoneout.

Inside this file ``name`` is that of an op, ``<cell>`` or ``<cell>_all_c``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch._functorch.utils import enable_single_level_autograd_function, unwrap_dead_wrappers

from rnnfast import _C, reference

_NUM_STATES = {cell["name"]: cell["num_states"] for cell in _C.cells()}
_HAS_FACTORS = {cell["name"]: cell["num_late_gates"] == 0 for cell in _C.cells()}  # of those that come here
_Results = tuple[Tensor, ...]
_Dims = Sequence[Any]
_TransformType = _functorch.TransformType
_vjp: Any = torch.func.vjp

# Positions in the arguments of <cell>.
_WEIGHTS = range(3, 8)
_BATCH_SIZES, _LENGTHS, _RESETS, _REVERSE = 8, 9, 10, 11
# Of those four, what plain calls do not have, and recompute: inside a transform everything is kept.
_DEFAULTS = (None, None, None, False, None, None, None, None, None, False)
_NUM_ARGUMENTS, _NUM_PLAIN = 18, 12
# In those of _<cell>_backward: three gradients, the arguments of <cell>, what the forward saved, and these two.
_LEADING, _SAVED = slice(3, 3 + _NUM_ARGUMENTS), slice(3 + _NUM_ARGUMENTS, 6 + _NUM_ARGUMENTS)
_NEEDS, _GRAD_ALL_C = 6 + _NUM_ARGUMENTS, 7 + _NUM_ARGUMENTS


def _op(name: str) -> Callable[..., _Results]:
    op: Callable[..., _Results] = getattr(torch.ops.rnnfast, name).default
    return op


def _num_results(name: str) -> int:
    """What the op ``name`` returns: output, h_n, c_n and perhaps all_c."""
    return 4 if name.endswith("_all_c") else 3


def _apply(function: Any, cell: str, *arguments: Any) -> _Results:
    """``function.apply(cell, *arguments)`` at the level of the innermost transform; the rest is left to those below.

    torch's own way from an autograd.Function to the transforms does the same, but makes two classes at each call and
    walks trees of arguments where a list will do: as much time as the kernels take for some tens of small sequences.
    """
    arguments = unwrap_dead_wrappers(arguments)
    if not torch._C._are_functorch_transforms_active():
        return cast(_Results, function.apply(cell, *arguments))
    interpreter: Any = retrieve_current_functorch_interpreter()
    level, kind = interpreter.level(), interpreter.key()
    if kind == _TransformType.Grad:
        lift = interpreter._cptr.lift
        with enable_single_level_autograd_function():
            return cast(
                _Results,
                _at_grad(function).apply(cell, *(lift(a) if isinstance(a, Tensor) else a for a in arguments)),
            )
    if kind != _TransformType.Vmap:
        _refuse_transform(cell, kind)
    plain, dims = _unwrap_mapped(arguments, level)
    with interpreter.lower():
        if all(dim is None for dim in dims):
            return _apply(function, cell, *plain)
        outputs, out_dims = function.rule(cell, interpreter.batch_size(), dims, plain)
    return _wrap_mapped(outputs, out_dims, level)


@functools.cache
def _at_grad(function: Any) -> Any:
    """``function`` as the node of one level: its forward runs below that level, its backward at it."""

    def forward(cell: str, *arguments: Any) -> _Results:
        interpreter: Any = retrieve_current_functorch_interpreter()
        level = interpreter.level()
        below = [_functorch._unwrap_for_grad(a, level) if isinstance(a, Tensor) else a for a in arguments]
        with torch.enable_grad(), interpreter.lower():
            outputs = _apply(function, cell, *below)
        return tuple(_functorch._wrap_for_grad(output, level) for output in outputs)

    methods = {"forward": forward, "setup_context": function.setup_context, "backward": function.backward}
    base = torch.autograd.function._SingleLevelFunction
    return type(function.__name__, (base,), {name: staticmethod(method) for name, method in methods.items()})


def _unwrap_mapped(arguments: Sequence[Any], level: int) -> tuple[list[Any], list[int | None]]:
    """The arguments without the mapping of ``level``, and the dimension of each that it maps."""
    pairs = [_functorch._unwrap_batched(a, level) if isinstance(a, Tensor) else (a, None) for a in arguments]
    return [plain for plain, _ in pairs], [dim for _, dim in pairs]


def _wrap_mapped(outputs: _Results, dims: _Dims, level: int) -> _Results:
    return tuple(
        output if dim is None else _functorch._add_batch_dim(output, dim, level)
        for output, dim in zip(outputs, dims, strict=True)
    )


def _refuse_transform(name: str, kind: Any) -> NoReturn:
    raise NotImplementedError(
        f"rnnfast::{name}: no rule for the transform {kind.name}; "
        "grad, vjp, jvp and vmap, and what torch.func builds of them, have one"
    )


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


def _fold_tokens(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """The same for tokens, which have no last dimension: ``[..., N]`` to ``[..., N*B]``; also for lengths, resets."""
    spread = tensor.unsqueeze(-1).expand(*tensor.shape, size) if dim is None else tensor.movedim(dim, -1)
    return spread.flatten(-2)


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
    """The arguments of ``<cell>`` for all examples at once; weights stay as they are if all examples share them."""
    folded = list(arguments)
    for i in (0, 1, 2):
        folded[i] = _fold(arguments[i], dims[i], size) if _is_real(arguments[i]) else arguments[i]
    if arguments[_BATCH_SIZES] is not None:
        folded[_BATCH_SIZES] = arguments[_BATCH_SIZES] * size
    for i in (0, _LENGTHS, _RESETS):
        if arguments[i] is not None and not _is_real(arguments[i]):
            folded[i] = _fold_tokens(arguments[i], dims[i], size)
    if not _are_shared(arguments, dims):
        stacked = _num_members(arguments, dims) > 0
        for i in _WEIGHTS:
            if arguments[i] is not None:
                folded[i] = _stack_weights(arguments[i], dims[i], size, stacked)
    return folded


def _is_real(tensor: Tensor | None) -> bool:
    return tensor is None or tensor.is_floating_point()


def _num_members(arguments: Sequence[Any], dims: _Dims) -> int:
    """How many sets of weights one example has, stacked in front; 0 where they are not stacked."""
    weight, dim = arguments[_WEIGHTS[0]], dims[_WEIGHTS[0]]
    shape = [length for i, length in enumerate(weight.shape) if i != dim]
    return shape[0] if len(shape) == 3 else 0


def _are_shared(arguments: Sequence[Any], dims: _Dims) -> bool:
    """Whether one set of weights serves all examples of a call of ``<cell>``."""
    return all(dims[i] is None for i in _WEIGHTS) and not _num_members(arguments, dims)


def _stack_weights(tensor: Tensor, dim: int | None, size: int, stacked: bool) -> Tensor:
    """A weight of each example to ``[B, ...]``; what was ``[E, ...]`` to ``[E*B, ...]``, the order of :func:`_fold`."""
    at = int(stacked)
    if dim is None:
        spread = tensor.unsqueeze(at)
        spread = spread.expand(*spread.shape[:at], size, *spread.shape[at + 1 :])
    else:
        spread = tensor.movedim(dim, at)
    return spread.flatten(0, 1) if stacked else spread


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
    name: str, call: Callable[..., _Results], size: int, dims: _Dims, arguments: Sequence[Any]
) -> tuple[_Results, _Dims]:
    """The rule of ``name`` and of :class:`_Scan`; ``call`` runs it.

    What the last saves is left folded, and so unmapped: :func:`_vmap_backward` knows it by the mapped arguments.
    """
    if dims[_BATCH_SIZES] is not None:
        raise RuntimeError(
            "batch_sizes: expected the same for all examples of a vmap, got mapped ones: their results differ in size. "
            "Pad the sequences and give lengths instead, which may be mapped"
        )
    num_mapped = _num_results(name)
    outputs = call(*_fold_arguments(arguments, dims, size))
    unfolded = [_unfold(output, size) for output in outputs[:num_mapped]]
    unfolded += [(saved, None) for saved in outputs[num_mapped:]]
    return tuple(output for output, _ in unfolded), tuple(dim for _, dim in unfolded)


def _vmap_backward(cell: str, size: int, dims: _Dims, arguments: Sequence[Any]) -> tuple[_Results, _Dims]:
    """The rule of ``_<cell>_backward``."""
    leading, saved, needs = arguments[_LEADING], list(arguments[_SAVED]), arguments[_NEEDS]
    leading_dims, saved_dims = dims[_LEADING], dims[_SAVED]
    if any(dim is not None for dim in saved_dims):
        return _loop(lambda *given: _apply(_ScanBackward, cell, *given), size, arguments, dims)

    members = _num_members(leading, leading_dims)
    if all(dim is None for dim in leading_dims):  # the forward was not mapped: what it saved serves every example
        saved = [_repeat_saved(tensor, size, members) for tensor in saved]
    grads = [_fold(tensor, dim, size) for tensor, dim in zip(arguments[:3], dims[:3], strict=True)]
    of_all_c = _fold(arguments[_GRAD_ALL_C], dims[_GRAD_ALL_C], size)
    folded = [*grads, *_fold_arguments(leading, leading_dims, size), *saved, needs, of_all_c]
    shared = _are_shared(leading, leading_dims)
    if not shared or not any(needs[i] for i in _WEIGHTS):
        results = _apply(_ScanBackward, cell, *folded)
        unfolded = [_unfold(result, size) for result in results[:3]]
        for result in results[3:]:
            if shared or result.dim() == 1:  # it does not exist
                unfolded.append((result, None))
            else:
                unfolded.append((result.view(members, size, *result.shape[1:]), 1) if members else (result, 0))
        return tuple(result for result, _ in unfolded), tuple(dim for _, dim in unfolded)

    tensors = [tensor for tensor in folded if isinstance(tensor, Tensor)]
    if (
        not _HAS_FACTORS[cell]
        or torch._C._are_functorch_transforms_active()
        or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
    ):
        return _loop(_backward_from_scratch(cell), size, arguments, dims)
    return _per_sample(cell, size, folded)


def _repeat_saved(tensor: Tensor, size: int, members: int) -> Tensor:
    """What a forward saved of rows ``[R, ...]`` (one member after the other), for ``size`` examples of the same."""
    if not tensor.numel():
        return tensor
    if not members:
        return tensor.repeat_interleave(size, 0)
    return tensor.view(members, -1, tensor.shape[1]).repeat_interleave(size, 0).flatten(0, 1)


def _backward_from_scratch(cell: str) -> Callable[..., _Results]:
    """``_<cell>_backward`` of one example whose forward was part of a folded call: what that saved is made anew."""

    def call(*arguments: Any) -> _Results:
        leading = arguments[_LEADING]
        detached = [tensor.detach() if isinstance(tensor, Tensor) else tensor for tensor in leading]
        saved = _apply(_Scan, cell, *detached)[3:]
        return _apply(_ScanBackward, cell, *arguments[:3], *leading, *saved, *arguments[_NEEDS:])

    return call


def _per_sample(cell: str, size: int, folded: Sequence[Any]) -> tuple[_Results, _Dims]:
    """All gradients of a folded call, the weights' for each example: one backward over time, then ``B`` products."""
    input, weight_ih, needs = folded[3], folded[3 + _WEIGHTS[0]], folded[_NEEDS]
    lengths, dtype = folded[3 + _LENGTHS], weight_ih.dtype
    *states, dgates_ih, dgates_hh, h_prev, dprojected, h_raw = _op(f"_{cell}_backward_factors")(*folded)
    if lengths is not None and _is_real(input):  # what lies past an end is not read, and may be NaN
        real = torch.arange(input.shape[0], device=input.device)[:, None] < lengths.to(input.device)
        input = input.masked_fill(~real.unsqueeze(-1), 0.0)

    def total(tensor: Tensor) -> Tensor:
        return _split(tensor, size).flatten(0, -3).sum(0).to(dtype)

    def product(left: Tensor, right: Tensor) -> Tensor:
        products: Tensor = torch.ops.rnnfast._sample_products.default(left, right, size)
        return products.to(dtype)

    def product_with_input() -> Tensor:
        if _is_real(input):
            return product(dgates_ih, input.to(dgates_ih.dtype))
        num_tokens = weight_ih.shape[1]  # each row of dgates joins the column of its token and example
        example = torch.arange(size, device=input.device).repeat(input.shape[-1] // size)
        columns = dgates_ih.new_zeros(size * num_tokens, dgates_ih.shape[-1])
        columns.index_add_(0, (example * num_tokens + input).flatten(), dgates_ih.flatten(0, -2))
        return columns.view(size, num_tokens, -1).transpose(1, 2).to(dtype)

    makers: list[Callable[[], Tensor]] = [
        product_with_input,
        lambda: product(dgates_hh, h_prev),
        lambda: total(dgates_ih),
        lambda: total(dgates_hh),
        lambda: product(dprojected, h_raw),
    ]
    results = [_unfold(state, size) for state in states]
    for i, make in zip(_WEIGHTS, makers, strict=True):
        exists = needs[i] and folded[3 + i] is not None
        results.append((make(), 0) if exists else (weight_ih.new_empty(0), None))
    results += [(weight_ih.new_empty(0), None)] * 2  # weight_ch and weight_ln: not here
    return tuple(result for result, _ in results), tuple(dim for _, dim in results)


# --- grad: one op call at one level of the stack ----------------------------------------------------------------------


class _Scan(torch.autograd.Function):
    """The op ``name`` and what backward needs, differentiable at every level: ``apply(name, *arguments of <cell>)``."""

    @staticmethod
    def forward(name: str, *arguments: Any) -> _Results:
        output, h_n, c_n, gates, cells, hidden, *all_c = _op(f"_{name}_forward")(*arguments)
        return output, h_n, c_n, *all_c, gates, cells, hidden

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Results) -> None:
        name, *arguments = inputs
        ctx.num_results, ctx.cell, ctx.reverse = _num_results(name), name.removesuffix("_all_c"), arguments[_REVERSE]
        saved = output[ctx.num_results :]
        ctx.save_for_backward(*arguments[:_REVERSE], *saved)
        ctx.mark_non_differentiable(*(() if _NUM_STATES[ctx.cell] == 2 else (output[2],)), *saved)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        unused = (None,) * (_NUM_ARGUMENTS - 8)
        given = grads[: ctx.num_results]
        if all(grad is None for grad in given):
            return (None,) * 9 + unused
        arguments, saved = ctx.saved_tensors[:_REVERSE], ctx.saved_tensors[_REVERSE:]
        needs = tuple(ctx.needs_input_grad[1:9])
        of_all_c = given[3] if len(given) == 4 else None
        plain = (*arguments, ctx.reverse, *_DEFAULTS[4:])
        results = _apply(_ScanBackward, ctx.cell, *given[:3], *plain, *saved, (*needs, False, False), of_all_c)
        return (None, *(result if need else None for result, need in zip(results, needs, strict=False)), *unused)

    @staticmethod
    def rule(name: str, size: int, dims: _Dims, arguments: Sequence[Any]) -> tuple[_Results, _Dims]:
        return _vmap_forward(name, lambda *given: _apply(_Scan, name, *given), size, dims, arguments)


class _ScanBackward(torch.autograd.Function):
    """``_<cell>_backward``, differentiable through the reference: ``apply(cell, *its arguments)``."""

    @staticmethod
    def forward(cell: str, *arguments: Any) -> _Results:
        return _op(f"_{cell}_backward")(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Results) -> None:
        cell, *arguments = inputs
        ctx.cell, ctx.reverse, ctx.needs = cell, arguments[3 + _REVERSE], arguments[_NEEDS]
        ctx.save_for_backward(*arguments[:14], arguments[_GRAD_ALL_C])
        unwanted = [
            result
            for result, need, primal in zip(output, ctx.needs, (*arguments[3:11], None, None), strict=True)
            if not need or primal is None
        ]
        ctx.mark_non_differentiable(*unwanted)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)  # three gradients, eleven arguments, the gradient of all_c
        places = [*range(14), _GRAD_ALL_C]
        live = [i for i, at in enumerate(places) if saved[i] is not None and ctx.needs_input_grad[1 + at]]
        wanted = [i for i in range(8) if ctx.needs[i] and saved[3 + i] is not None and grad_grads[i] is not None]
        result: list[Tensor | None] = [None] * (2 + _GRAD_ALL_C)
        if live and wanted:

            def firsts(*tensors: Tensor) -> _Results:
                given = list(saved)
                for i, tensor in zip(live, tensors, strict=True):
                    given[i] = tensor
                return _reference_gradients(ctx.cell, (*given[:3], given[14]), given[3:14], ctx.reverse, wanted)

            _, pull = _vjp(firsts, *(saved[i] for i in live))
            seconds = pull(tuple(grad_grads[i] for i in wanted))
            for i, second in zip(live, seconds, strict=True):
                result[1 + places[i]] = second
        return tuple(result)

    @staticmethod
    def rule(cell: str, size: int, dims: _Dims, arguments: Sequence[Any]) -> tuple[_Results, _Dims]:
        return _vmap_backward(cell, size, dims, arguments)


def _reference_gradients(
    cell: str, grads: Sequence[Tensor | None], arguments: Sequence[Any], reverse: bool, wanted: Sequence[int]
) -> _Results:
    """The gradients of the arguments numbered ``wanted``, by the reference: differentiable in all that is given.

    ``grads`` are those of output, h_n, c_n and all_c.
    """

    def run(*tensors: Tensor) -> _Results:
        given = [*arguments, reverse]
        for i, tensor in zip(wanted, tensors, strict=True):
            given[i] = tensor
        scan: Callable[..., _Results] = reference.CELLS[cell]
        outputs = scan(*given, with_all_c=grads[3] is not None)
        return tuple(output for output, grad in zip(outputs, grads, strict=False) if grad is not None)

    _, pull = _vjp(run, *(arguments[i] for i in wanted))
    gradients: _Results = pull(tuple(grad for grad in grads if grad is not None))
    return gradients


# --- The kernel for the dispatch key of the transforms ----------------------------------------------------------------


def _check_tokens(name: str, tokens: Tensor, weight_ih: Tensor) -> None:
    """What the op checks, for the reference, which cannot look at values inside of ``vmap``."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tokens):
        tokens = torch._C._functorch.get_unwrapped(tokens)
    outside = tokens[(tokens < 0) | (tokens >= weight_ih.shape[-1])]
    if outside.numel():
        raise IndexError(
            f"rnnfast::{name}: input: expected tokens from 0 to {weight_ih.shape[-1] - 1}, the columns of weight_ih, "
            f"got {int(outside[0])}"
        )


def _transform(cell: str, with_all_c: bool = False) -> Callable[..., _Results]:
    name = f"{cell}_all_c" if with_all_c else cell
    op = _op(name)
    by_reference: Callable[..., _Results] = reference.CELLS[cell]

    def kernel(*given: Any) -> _Results:
        # The dispatcher leaves out trailing arguments that have their default.
        given = given[: _NUM_ARGUMENTS - 1]
        arguments = (*given, *_DEFAULTS[len(given) - _NUM_ARGUMENTS :])
        kinds = [interpreter.key() for interpreter in _functorch.get_interpreter_stack() or []]
        is_plain = all(argument is None for argument in arguments[_NUM_PLAIN:-1])
        if not is_plain or _TransformType.Jvp in kinds:
            if not _is_real(arguments[0]):
                _check_tokens(name, arguments[0], arguments[_WEIGHTS[0]])
            return by_reference(*arguments[:-1], with_all_c=with_all_c)
        interpreter: Any = retrieve_current_functorch_interpreter()
        if kinds[-1] == _TransformType.Grad:
            return _apply(_Scan, name, *arguments)[: _num_results(name)]
        if kinds[-1] != _TransformType.Vmap:
            _refuse_transform(name, kinds[-1])
        level = interpreter.level()
        plain, dims = _unwrap_mapped(arguments, level)
        with interpreter.lower():
            if all(dim is None for dim in dims):
                outputs: _Results = op(*plain)
                return outputs
            outputs, out_dims = _vmap_forward(name, op, interpreter.batch_size(), dims, plain)
        return _wrap_mapped(outputs, out_dims, level)

    return kernel


# Lives as long as the module: its registrations die with it.
_library: Any = cast(Any, torch.library).Library("rnnfast", "IMPL")


def register(cell: str) -> None:
    """Serve ``torch.ops.rnnfast.<cell>``, and ``<cell>_all_c`` where there is one, inside transforms."""
    _library.impl(cell, _transform(cell), "FuncTorchDynamicLayerFrontMode")
    if _NUM_STATES[cell] == 2:
        _library.impl(f"{cell}_all_c", _transform(cell, with_all_c=True), "FuncTorchDynamicLayerFrontMode")
