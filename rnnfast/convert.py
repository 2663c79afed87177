"""Ours in the place of torch.nn's, in models and programs that already exist.

:func:`convert` gives the recurrent modules of a model our classes by ``__class__`` assignment: the objects stay, with
their parameters (and so their optimizers), buffers, hooks, names, attributes and train/eval state. :func:`revert` takes
it back. :class:`patch_torch` puts our classes into ``torch.nn`` itself, for programs whose source one cannot edit.

An object of a subclass of one of torch.nn's six classes gets a class of the same name that has ours between the
subclass and torch.nn's: its own methods stay, and its ``super().forward(...)`` reaches ours. What cannot be served is
left alone, and the report says why.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn.utils import parametrize

from rnnfast import modules
from rnnfast.options import options_beyond_torch

__all__ = ["Conversion", "convert", "patch_torch", "revert"]

_NAMES = ("RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell")
_OURS: dict[type, type] = {getattr(torch.nn, name): getattr(modules, name) for name in _NAMES}
_STOCK: dict[type, type] = {ours: stock for stock, ours in _OURS.items()}
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# What torch.nn's forward calls and ours does not: a subclass that overrides one would be silently ignored.
_BYPASSED = (
    "check_forward_args",
    "check_hidden_size",
    "check_input",
    "get_expected_cell_size",
    "get_expected_hidden_size",
    "permute_hidden",
)


@dataclass(frozen=True)
class Conversion:
    """What became of one recurrent module.

    Attributes:
        name: as in ``model.named_modules()``; empty for the model itself.
        before: the module's class as it was.
        after: its class now; the same where it was left as it is.
        reason: why it was left as it is; empty where it was not.
    """

    name: str
    before: type
    after: type
    reason: str = ""

    @property
    def changed(self) -> bool:
        """Whether the module has another class now."""
        return not self.reason

    def __str__(self) -> str:
        name = self.name or "(the model itself)"
        old, new = _full_name(self.before), _full_name(self.after)
        return f"{name}: {old} -> {new}" if self.changed else f"{name}: {old} left as it is: {self.reason}"


def convert(model: torch.nn.Module) -> list[Conversion]:
    """Give every torch.nn RNN, GRU, LSTM, RNNCell, GRUCell and LSTMCell of a model, itself included, our class.

    In place: nothing is copied, so that optimizers, hooks and references from elsewhere go on working. A subclass of
    one of the six keeps its own methods; it is converted if it inherits ``forward`` or if its ``forward`` goes through
    ``super()``. Pickles and checkpoints of whole converted models need rnnfast to load; state dicts do not.

    Args:
        model: any module.

    Returns:
        One :class:`Conversion` per recurrent module, in the order of ``model.named_modules()``. Left as they are, with
        the reason: modules that are ours already, quantized or scripted ones, subclasses that override what our forward
        would go past, parameters on a device or of a dtype that the kernels do not have.

    Raises:
        TypeError: ``model`` is no torch.nn.Module.
    """
    return _change(model, "convert", _converted)


def revert(model: torch.nn.Module) -> list[Conversion]:
    """Take :func:`convert` back: every rnnfast module of a model, itself included, gets torch.nn's class.

    That includes modules that were made as rnnfast's in the first place; only classes of your own that are written as
    subclasses of rnnfast's are left. Arguments, returns and errors are as in :func:`convert`.
    """
    return _change(model, "revert", _reverted)


class _Left(Exception):
    """Why a module stays as it is."""


def _change(
    model: torch.nn.Module, verb: str, change: Callable[[torch.nn.Module, type], type | None]
) -> list[Conversion]:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{verb}: model must be a torch.nn.Module, got {type(model).__name__}")
    report = []
    for name, module in model.named_modules():
        before = type(module)
        if not _is_recurrent(module):
            continue
        try:
            after = change(module, before)
            if after is None:
                continue
            module.__class__ = after
            report.append(Conversion(name, before, after))
        except _Left as left:
            report.append(Conversion(name, before, before, str(left)))
        except TypeError as error:  # an order of base classes or a memory layout that Python does not allow
            report.append(Conversion(name, before, before, f"its class does not allow it: {error}"))
    return report


def _full_name(cls: type) -> str:
    name = f"{cls.__module__}.{cls.__qualname__}"
    return f"{name} on rnnfast.{cls.__bases__[1].__name__}" if "_rnnfast_stands_for" in vars(cls) else name


def _is_recurrent(module: torch.nn.Module) -> bool:
    if isinstance(module, (torch.nn.RNNBase, torch.nn.RNNCellBase)):
        return True
    if isinstance(module, torch.jit.ScriptModule):
        return getattr(module, "original_name", None) in _NAMES
    return type(module).__name__ in _NAMES and type(module).__module__.startswith("torch.ao.")


def _stock_class(cls: type) -> type | None:
    """Which of torch.nn's six a class is or comes from."""
    return next((base for base in cls.__mro__ if base in _OURS), None)


def _converted(module: torch.nn.Module, cls: type) -> type:
    if isinstance(module, torch.jit.ScriptModule):
        raise _Left("it is scripted; convert before torch.jit.script")
    if cls.__module__.startswith("torch.ao."):
        raise _Left("it is quantized; its arithmetic is not that of torch.nn")
    stock = _stock_class(cls)
    if stock is None:
        raise _Left("it comes from none of torch.nn's RNN, GRU, LSTM and their cells")
    if isinstance(module, tuple(_STOCK)):
        raise _Left("it is rnnfast's already")
    if "forward" in vars(module):
        raise _Left("its forward was replaced on the object itself")
    for parameter in module.parameters():
        if parameter.device.type not in ("cpu", "meta"):
            raise _Left(f"its parameters are on {parameter.device}; this version of rnnfast runs on the CPU")
        if parameter.dtype not in _DTYPES:
            raise _Left(f"its parameters are {parameter.dtype}, which rnnfast does not compute in")
    return _with_our_base(cls, parametrize.is_parametrized(module))


def _with_our_base(cls: type, parametrized: bool) -> type:
    if cls in _OURS:
        return _OURS[cls]
    if parametrized:  # parametrize gives a module a class of its own: see _rebased
        return _rebased(cls, _with_our_base(cls.__bases__[0], False))
    stock = _stock_class(cls)
    assert stock is not None
    for name in _BYPASSED:
        if hasattr(stock, name) and getattr(cls, name) is not getattr(stock, name):
            raise _Left(f"it overrides {name}, which rnnfast's forward does not call")
    forward = getattr(cls, "forward")  # noqa: B009  (of any class)
    if forward is not getattr(stock, "forward") and not _goes_through_super(forward):  # noqa: B009
        raise _Left("it overrides forward without super().forward, so that there is nothing of torch.nn's to replace")
    return _between(cls, _OURS[stock])


def _goes_through_super(function: Any) -> bool:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code is not None and ("__class__" in code.co_freevars or "super" in code.co_names)


@cache
def _between(cls: type, ours: type) -> type:
    """A class that is ``cls`` in all but that ``ours`` comes before torch.nn's class in the order of resolution."""

    def reduce(self: Any, protocol: Any) -> Any:
        # The class has no name of its own to be pickled by: it is made again from the one it stands for.
        make, arguments, *rest = super(made, self).__reduce_ex__(protocol)
        return (_new_between, (cls, ours), *rest) if arguments[:1] == (made,) else (make, arguments, *rest)

    def prepare_scriptable(self: Any) -> torch.nn.Module:
        return modules._as_stock(self, cls)

    made: Any = type(cls)(
        cls.__name__,
        (cls, ours),
        {
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
            "__reduce_ex__": reduce,
            "__prepare_scriptable__": prepare_scriptable,
            "_rnnfast_stands_for": cls,
        },
    )
    return made  # type: ignore[no-any-return]


def _new_between(cls: type, ours: type) -> Any:
    made: Any = _between(cls, ours)
    return made.__new__(made)


def _rebased(cls: type, base: type) -> type:
    """A parametrized class over another base: remove_parametrizations gives the module back its first base."""
    own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls)(f"Parametrized{base.__name__}", (base,), own)


def _reverted(module: torch.nn.Module, cls: type) -> type | None:
    if not isinstance(module, tuple(_STOCK)):
        return None
    options = options_beyond_torch(module)
    if options:
        raise _Left(f"torch.nn has no {options}")
    return _without_our_base(cls, parametrize.is_parametrized(module))


def _without_our_base(cls: type, parametrized: bool) -> type:
    if cls in _STOCK:
        return _STOCK[cls]
    if parametrized:
        return _rebased(cls, _without_our_base(cls.__bases__[0], False))
    original = vars(cls).get("_rnnfast_stands_for")
    if original is None:
        raise _Left("it is written as a subclass of rnnfast's class")
    return original  # type: ignore[no-any-return]


class patch_torch:  # a function to its users, as torch.set_grad_enabled
    """Put our six classes in the place of torch.nn's: ``torch.nn.LSTM`` is then ``rnnfast.LSTM``.

    Takes effect at the call, in ``torch.nn``, ``torch.nn.modules`` and ``torch.nn.modules.rnn``, for the whole process.
    With ``with`` it is undone at the end of the block, also by an exception; without, it stays until :meth:`undo`. Any
    number may be in force at once; the last to be undone restores torch.nn.

    >>> with rnnfast.patch_torch():
    ...     layer = torch.nn.LSTM(8, 16)        # or a program that says so somewhere
    >>> isinstance(layer, rnnfast.LSTM)
    True

    Modules made meanwhile stay ours afterwards (:func:`revert` makes them torch.nn's). What had fetched a class before
    (``from torch.nn import LSTM``) goes on with torch.nn's, and modules made before keep their class: while the patch
    is in force ``isinstance(old, torch.nn.LSTM)`` is False for them and pickle refuses them. ``convert`` them instead.
    """

    _lock = threading.Lock()
    _in_force = 0
    _places = (torch.nn, torch.nn.modules, torch.nn.modules.rnn)

    def __init__(self) -> None:
        self._done = False
        with patch_torch._lock:
            patch_torch._in_force += 1
            if patch_torch._in_force == 1:
                self._put(_OURS)

    def undo(self) -> None:
        """Take this patch back; a second time it does nothing."""
        with patch_torch._lock:
            if self._done:
                return
            self._done = True
            patch_torch._in_force -= 1
            if patch_torch._in_force == 0:
                self._put(_STOCK)

    @staticmethod
    def _put(replacement: dict[type, type]) -> None:
        for place in patch_torch._places:
            for name in _NAMES:
                # Where somebody else has put a class of theirs meanwhile, it stays.
                new = replacement.get(getattr(place, name))
                if new is not None:
                    setattr(place, name, new)

    def __enter__(self) -> patch_torch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()
