"""Rearranged weights kept from call to call: :func:`prepack`, and the handle that it gives."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from rnnfast import _C
from rnnfast.modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

__all__ = ["PrepackHandle", "prepack", "recurrent_weights"]


class PrepackHandle:
    """What :func:`prepack` gives: ends it by :meth:`remove`, or at the end of a ``with``."""

    def __init__(self, model: torch.nn.Module) -> None:
        _watch_optimizers()
        self._kept = _C.Prepacked(_weights_to_keep(model))
        self._model = weakref.ref(model)
        self._end = weakref.finalize(model, self._kept.remove)

    @property
    def nbytes(self) -> int:
        """The memory that the rearranged weights take now, in bytes; layers that were not called yet have none."""
        return self._kept.nbytes

    def refresh(self) -> None:
        """Have the weights rearranged anew, each layer's at its next call, those of new parameters too.

        Raises:
            RuntimeError: after :meth:`remove`, or when the model is gone.
            ValueError: a model without weights that can be kept, as :func:`prepack`.
        """
        model = self._model()
        if model is None or not self._end.alive:
            raise RuntimeError("PrepackHandle.refresh: the model is gone or the handle was removed: call prepack again")
        self._kept.hold(_weights_to_keep(model))

    def remove(self) -> None:
        """Free the rearranged weights; from now on every call makes its own."""
        self._end()

    def __enter__(self) -> PrepackHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"<PrepackHandle {'of' if self._end.alive else 'removed from'} {type(self._model()).__name__}>"

    def __reduce__(self) -> Any:
        """Refuse pickle and copy: the rearranged weights are this process's."""
        raise TypeError("a PrepackHandle cannot be pickled or copied: call prepack on the other model")


def prepack(model: torch.nn.Module) -> PrepackHandle:
    """Keep the rearranged weights of a model's layers and cells between calls, for inference.

    A call on the CPU rearranges its weights for the products, unless it has so few rows that it reads them where they
    lie. With this they are rearranged once: short calls of wide layers are 1.1 to 1.6 times as fast, long ones about as
    fast as before. It costs memory: for each layer and direction as many bytes again as its weights have
    (in float32 for 16-bit types whose products the processor has not), in the arrangement of its last call.

    It lasts until the handle's ``remove()``, the end of ``with prepack(model):``, or the end of the model. Weights that
    change are rearranged at the next call: by an optimizer of torch's, ``load_state_dict``, ``copy_`` and other
    in-place operations of torch, by ``weight.data = ...`` and ``.to()``. Not seen, because torch does not count them,
    are changes through ``weight.data`` (``weight.data.mul_(2)``), through an array or another process that shares the
    memory, and by torch.distributed's collectives and sharding: after those call ``refresh()``. Weights that are no
    plain parameters on the CPU (parametrized, pruned, other parameters put in their place since) are rearranged by
    every call, as without this; so are those of calls under autocast.

    Calls of few rows round otherwise than without it: in the last bits.

    Args:
        model: a layer or cell of ours, or any module that contains some (see :func:`rnnfast.convert`).

    Raises:
        TypeError: model that is not a Module.
        ValueError: a model without a weight that can be kept.

    >>> with rnnfast.prepack(model), torch.inference_mode():
    ...     for chunk in stream:
    ...         output, state = model(chunk, state)
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"prepack: model must be a torch.nn.Module, got {type(model).__name__}")
    return PrepackHandle(model)


def recurrent_weights(layer: torch.nn.Module) -> Iterator[Tensor | None]:
    """Of each layer and direction of one of our modules weight_hh, or None where it is no plain parameter."""
    if isinstance(layer, torch.nn.RNNBase):
        for names in layer._all_weights:
            yield layer._parameters.get(names[1])
    else:
        yield layer._parameters.get("weight_hh")


@functools.cache
def _watch_optimizers() -> None:
    """Have every optimizer's step, from now on, tell of the weights that it changed: fused ones count no version."""
    register_optimizer_step_post_hook(_forget)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _forget(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    _C.forget_prepacked([weight for group in optimizer.param_groups for weight in group["params"]])


def _weights_to_keep(model: torch.nn.Module) -> Sequence[Tensor]:
    ours = [module for module in model.modules() if isinstance(module, (RNN, GRU, LSTM, RNNCell, GRUCell, LSTMCell))]
    if not ours:
        raise ValueError(
            "prepack: expected a model with a layer or cell of rnnfast's, got none in "
            f"{type(model).__name__}: rnnfast.convert(model) makes torch.nn's ours"
        )
    found = [weight for module in ours for weight in recurrent_weights(module)]
    weights = [w for w in found if type(w) is torch.nn.Parameter and w.device.type == "cpu" and not w.is_inference()]
    if not weights:
        raise ValueError(
            f"prepack: expected weights that are plain parameters on the CPU, got none in {type(model).__name__} "
            "(parametrized, on another device, or made under torch.inference_mode, whose tensors count no changes)"
        )
    return weights
