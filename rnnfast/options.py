"""The cells behind the layers, and the options that make a layer one of those that torch.nn has not.

Such an option is set on the object only where it is not its class's default, so that a converted layer and its pickles
are torch.nn's. Equations, sources and what each option means are in the docstrings of :mod:`rnnfast.modules`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from rnnfast import _C

if TYPE_CHECKING:
    from rnnfast.modules import GRU, LSTM, RNN

Op = Callable[..., tuple[Tensor, Tensor, Tensor]]
Layer: TypeAlias = "RNN | GRU | LSTM"

CELL_OF_MODE = {"RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu", "GRU": "gru", "LSTM": "lstm"}
# A GRU by reset_after and gates.
_CELL_OF_GRU = {
    (True, "both"): "gru",
    (False, "both"): "gru_before",
    (True, "reset"): "gru_reset",
    (False, "reset"): "gru_reset_before",
    (True, "update"): "gru_update",
}
# Those that torch.nn has not.
_OPTIONS = ("reset_after", "gates", "peephole", "coupled", "layer_norm", "zoneout", "recurrent_dropout")
ALL_OPTIONS = (*_OPTIONS, "recompute")  # with that which changes no result


class Kernel(NamedTuple):
    """What runs a cell: its number in ``_C.cells()``, its op, that which also returns c of all steps, its weights."""

    number: int
    op: Op
    all_c_op: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] | None
    num_gates: int
    num_peepholes: int
    num_norm_vectors: int

    @classmethod
    def of(cls, number: int, cell: dict[str, Any]) -> Kernel:
        """That of entry ``number`` of ``_C.cells()``."""
        ops, name = torch.ops.rnnfast, cell["name"]
        all_c_op = getattr(ops, f"{name}_all_c").default if cell["num_states"] == 2 else None
        sizes = (cell["num_gates"], cell["num_peepholes"], cell["num_norm_vectors"])
        return cls(number, getattr(ops, name).default, all_c_op, *sizes)

    def extra_shapes(self, hidden_size: int) -> dict[str, int]:
        """The size of each parameter that torch.nn's layers have not, by its name before ``_l``."""
        shapes = {}
        if self.num_peepholes:
            shapes["weight_ch"] = self.num_peepholes * hidden_size
        if self.num_norm_vectors:
            shapes["weight_ln_ih"] = shapes["weight_ln_hh"] = self.num_gates * hidden_size
        if self.num_norm_vectors > 2 * self.num_gates:
            shapes["weight_ln_c"] = shapes["bias_ln_c"] = hidden_size
        return shapes


# By the name of the cell, and for torch.nn's own by the mode too.
KERNELS = {cell["name"]: Kernel.of(number, cell) for number, cell in enumerate(_C.cells())}
KERNELS |= {mode: KERNELS[cell] for mode, cell in CELL_OF_MODE.items()}


def kind_of(mode: str) -> str:
    """The name of the class: ``"RNN"``, ``"GRU"`` or ``"LSTM"``."""
    return mode.partition("_")[0]


def cell_of(module: torch.nn.Module) -> str:
    """The name of a layer's cell; torch.nn's own layers too."""
    return getattr(module, "_variant", None) or CELL_OF_MODE[str(module.mode)]


def options_beyond_torch(module: torch.nn.Module, names: Sequence[str] = _OPTIONS) -> str:
    """What a module has that torch.nn cannot express, as it would be said to the constructor; empty for nothing."""
    given = {name: vars(module)[name] for name in names if name in vars(module)}
    return ", ".join(f"{name}={value!r}" for name, value in given.items() if value != getattr(type(module), name))


def _probability(kind: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{kind}: {name} should be a number in range [0, 1], got: {value!r}")
    return float(value)


def set_options(layer: Layer, **options: Any) -> None:
    """Set those that are not their class's default, which alone may be found on the object."""
    for name, value in options.items():
        if value != getattr(type(layer), name):
            setattr(layer, name, value)


def set_masks(layer: Layer, zoneout: Any, recurrent_dropout: Any) -> None:
    """Check and set the options of the recurrent path."""
    kind = kind_of(layer.mode)
    if isinstance(zoneout, (tuple, list)) and layer.mode == "LSTM" and len(zoneout) == 2:
        zoneout = (_probability(kind, "zoneout[0]", zoneout[0]), _probability(kind, "zoneout[1]", zoneout[1]))
        zoneout = zoneout if any(zoneout) else 0.0
    else:
        zoneout = _probability(kind, "zoneout", zoneout)
    if zoneout and layer.proj_size:
        raise ValueError(f"{kind}: zoneout does not go with proj_size: h has another size than what the cell makes")
    recurrent_dropout = _probability(kind, "recurrent_dropout", recurrent_dropout)
    set_options(layer, zoneout=zoneout, recurrent_dropout=recurrent_dropout)


def set_recompute(layer: Layer, recompute: Any) -> None:
    """Check and set the option to save less in training."""
    _check_flags(kind_of(layer.mode), recompute=recompute)
    set_options(layer, recompute=recompute)


def _check_flags(kind: str, **flags: Any) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{kind}: {name} should be of type bool, got: {type(value).__name__}")


def lstm_cell(peephole: Any, coupled: Any, layer_norm: Any) -> str:
    """The name of the cell, or an exception."""
    _check_flags("LSTM", peephole=peephole, coupled=coupled, layer_norm=layer_norm)
    if layer_norm and (peephole or coupled):
        other = "peephole" if peephole else "coupled"
        raise ValueError(f"LSTM: layer_norm does not go with {other}: there is no such cell")
    return f"lstm{'_layer_norm' * layer_norm}{'_coupled' * coupled}{'_peephole' * peephole}"


def gru_cell(reset_after: Any, gates: Any, layer_norm: Any) -> str:
    """The name of the cell, or an exception."""
    _check_flags("GRU", reset_after=reset_after, layer_norm=layer_norm)
    if gates not in ("both", "reset", "update"):
        raise ValueError(f"GRU: gates should be 'both', 'reset' or 'update', got: {gates!r}")
    if gates == "update" and not reset_after:
        raise ValueError("GRU: reset_after=False with gates='update' makes no sense: there is no reset gate")
    if layer_norm and not (reset_after and gates == "both"):
        other = "reset_after=False" if not reset_after else f"gates={gates!r}"
        raise ValueError(f"GRU: layer_norm does not go with {other}: there is no such cell")
    return "gru_layer_norm" if layer_norm else _CELL_OF_GRU[reset_after, gates]


def become(layer: Layer, cell: str) -> None:
    """Make a layer that torch.nn just made one of another cell: parameters keep the rows of as many gates as it has."""
    if KERNELS[cell].num_norm_vectors and layer.proj_size:
        raise ValueError("LSTM: layer_norm does not go with proj_size: there is no such cell")
    rows = KERNELS[cell].num_gates * layer.hidden_size
    layer._variant = cell
    for d in range(len(layer._all_weights)):
        for name, size in KERNELS[cell].extra_shapes(layer.hidden_size).items():
            if name == "bias_ln_c" and not layer.bias:
                continue
            like: Any = layer.weight_ih_l0
            weight = torch.nn.Parameter(like.detach().new_empty(size))
            if not set_norm_weight(name, weight):
                torch.nn.init.uniform_(weight, -(layer.hidden_size**-0.5), layer.hidden_size**-0.5)
            layer.register_parameter(extra_name(layer, name, d), weight)
    if rows == KERNELS[layer.mode].num_gates * layer.hidden_size:
        return
    for name in [name for names in layer._all_weights for name in names if not name.startswith("weight_hr")]:
        setattr(layer, name, torch.nn.Parameter(getattr(layer, name).detach()[:rows].clone()))


def zoneouts_of(layer: Any) -> tuple[float, float]:
    """The probabilities for h and for c; torch.nn's own layers have none."""
    zoneout = getattr(layer, "zoneout", 0.0)
    if isinstance(zoneout, tuple):
        return zoneout
    return zoneout, zoneout if layer.mode == "LSTM" else 0.0


def set_norm_weight(name: str, weight: Tensor) -> bool:
    """Give a parameter of layer normalization its first value, gains 1 and biases 0; whether it is one."""
    if not name.startswith(("weight_ln", "bias_ln")):
        return False
    torch.nn.init.constant_(weight, float(name.startswith("weight")))
    return True


def extra_name(layer: Layer, name: str, d: int) -> str:
    """The name of a parameter that torch.nn's layers have not, of direction ``d`` of all."""
    return f"{name}{layer._all_weights[d][0].removeprefix('weight_ih')}"
