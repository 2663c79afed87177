"""The compiled part, ``csrc/bindings.cpp``: what torch's dispatcher cannot carry. Importing it registers the ops."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

def cells() -> list[dict[str, Any]]:
    """Describe every cell.

    Each has ``name`` (of its op), ``num_gates``, ``num_states`` (1: h; 2: h and c), ``num_slots`` (numbers kept per
    unit for the backward, states not counted), ``saves_hidden`` (whether h is kept besides), ``num_late_gates`` (whose
    recurrent product is not of h alone), ``num_peepholes`` (vectors of weights by which gates see c),
    ``num_norm_vectors`` (vectors of layer normalization's weights), ``on_cuda`` (whether this build
    runs it there), ``source`` of the formula.
    """

def build_info() -> dict[str, Any]:
    """Describe the build: ``torch`` it was compiled for, ``compiler``, ``cuda`` (bool) and ``cuda_reason``."""

def supported_isas() -> list[str]:
    """The instruction sets this machine and this build have, best first: of ``avx512``, ``avx2``, ``baseline``."""

def get_isa() -> str:
    """The instruction set the kernels use."""

def set_isa(name: str) -> None:
    """Make the kernels use another instruction set from now on.

    The environment variable ``RNNFAST_ISA`` does this at import. Raises ValueError for an unknown name or one that this
    machine lacks.
    """

def _add_drivers(table: int) -> None:
    """Make another set of kernels known to :func:`set_isa`, by the address of its DriverTable (``csrc/sequence.h``)."""

def explain(
    cell: str,
    T: int,
    N: int,
    I: int,
    H: int,
    P: int,
    dtype: str,
    training: bool,
    threads: int,
    device: int | None = None,
    recompute: bool = False,
    prepacked: bool = False,
) -> dict[str, Any]:
    """What the kernel policy decides for one layer and direction: ``kernel``, ``isa``, ``reason``, ``threads`` ...

    On the CPU ``product_dtype`` is that of the numbers multiplied: bfloat16 where the processor has products of it;
    ``packed_weights``, whether weights are rearranged, and ``prepacked``, as given, whether they are from an earlier
    call.

    ``device`` is the number of a CUDA device, or None for the CPU. For a device there is also what was decided for the
    backward pass, with ``training``: the same names after ``backward_``.
    """

def run_layer(layer: Any, input: Any, hx: Any) -> tuple[Any, ...] | None:
    """Run the forward of one of our layers through the op of its cell.

    None, and nothing is done, if the call is not plain (a padded batch, tensors and parameters of torch's own classes,
    no option that other cells than torch.nn's have arguments for, no dropout, autocast, mode or transform at work) or
    would raise: then the caller goes the long way.
    """

def run_cell(cell: int, attributes: dict[str, Any], input: Any, h: Any, c: Any) -> tuple[Tensor, Tensor] | None:
    """Take the step of a cell, by its ``__dict__`` and the number of its op: h and c, ``[0]`` where there is none."""

class Prepacked:
    """Keeps the rearranged weights of the layers with these weight_hh, see :func:`rnnfast.prepack`."""

    def __init__(self, weights: Sequence[Tensor]) -> None: ...
    def hold(self, weights: Sequence[Tensor]) -> None:
        """Let go of what is kept, and keep those of these from now on."""

    def remove(self) -> None: ...
    @property
    def nbytes(self) -> int: ...

def is_prepacked(weight_hh: Tensor) -> bool:
    """Whether the rearranged weights of the layer with this weight_hh are kept."""

def forget_prepacked(weights: Sequence[Tensor]) -> None:
    """Let go of the rearranged weights that were made from any of these."""

class Decoder:
    """Layers of one cell taken step by step: see :class:`rnnfast.Decoder`.

    ``weights`` are, of each layer: weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, weight_ch, the zoneout of h and
    of c, each ``[H]``, and weight_ln; None for those not there.
    """

    def __init__(self, cell: str, weights: Sequence[Tensor | None], batch_size: int | None) -> None: ...
    def load(self, cell: str, weights: Sequence[Tensor | None]) -> None: ...
    def step(self, input: Tensor) -> Tensor:
        """Take one step, input ``[N, I]`` (``[I]``) to output ``[N, P]`` (``[P]``), from the state to the next.

        Raises:
            TypeError: input that is not a tensor, or not of the layer's dtype.
            ValueError: input of the wrong shape.
            RuntimeError: input that is not on the CPU, or requires a gradient while gradients are enabled.
        """

    def reset(self, mask: Tensor | None = None) -> None:
        """Set the state to zeros: of all sequences, or of those where mask, bool ``[N]``, is true.

        Raises:
            TypeError: mask that is not a bool tensor.
            ValueError: mask of the wrong shape, or one where there is no batch.
            RuntimeError: mask that is not on the CPU.
        """

    def get_state(self) -> tuple[Tensor, Tensor | None]: ...
    def set_state(self, h: Tensor, c: Tensor | None) -> None: ...
