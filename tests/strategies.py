"""Hypothesis strategies for calls of the raw ops: sizes round the vector widths, strides, packed batches, options.

A strategy draws the description of a call (a :class:`Case`, small and readable when Hypothesis reports it);
:meth:`Case.call` makes its tensors from a seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from rnnfast import reference

HIDDEN_SIZES = [1, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65]
BATCHES = [1, 2, 3, 5, 6, 7, 8, 9, 13, 17]
INPUT_SIZES = [1, 3, 8, 17, 33]
MAX_STEPS = 6
LAYOUTS = ["contiguous", "transposed", "sliced", "strided", "expanded"]
POSITIONAL = ("input", "h0", "c0", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
DIFFERENTIABLE = (*POSITIONAL, "weight_ch", "weight_ln")
MASKS = ("recurrent_mask", "zoneout_h", "zoneout_c")
OUTPUTS = ("output", "h_n", "c_n")


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values in other memory: only "expanded" changes them, to repeat the first row of the second-last dim."""
    if layout == "transposed" and values.dim() > 1:
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced":  # rows further apart than they are long, and an offset
        wide = values.new_full((*values.shape[:-1], values.shape[-1] + 3), float("nan"))
        wide[..., 2:-1] = values
        return wide[..., 2:-1]
    if layout == "strided":  # the last dimension is not contiguous
        wide = values.new_full((*values.shape, 2), float("nan"))
        wide[..., 0] = values
        return wide[..., 0]
    if layout == "expanded" and values.dim() > 1 and values.shape[-2] > 0:
        return values[..., :1, :].expand_as(values)
    return values.contiguous()


@dataclass
class Call:
    """The arguments of one call of an op, named as in its schema."""

    cell: str
    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, op: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Call the op (or the reference), all arguments by position but the options."""
        return op(*self.positional(), **self.keywords())

    def positional(self) -> list[Tensor | None]:
        """The first eight tensors of the schema."""
        return [self.tensors.get(name) for name in POSITIONAL]

    def keywords(self) -> dict[str, Any]:
        """The options, and weight_ch or weight_ln where there is one."""
        extras = [name for name in DIFFERENTIABLE[len(POSITIONAL) :] if name in self.tensors]
        return self.options | {name: self.tensors[name] for name in extras}

    def everything(self) -> list[Any]:
        """All arguments of the schema."""
        order: dict[str, Any] = {"batch_sizes": None, "lengths": None, "resets": None, "reverse": False}
        order |= dict.fromkeys(("weight_ch", *MASKS, "weight_ln")) | {"recompute": False}
        return [*self.positional(), *(order | self.keywords()).values()]

    def op(self) -> Callable[..., tuple[Tensor, ...]]:
        """The fused op of this cell."""
        return getattr(torch.ops.rnnfast, self.cell)

    def reference(self) -> reference.Cell:
        """The reference of this cell."""
        return reference.CELLS[self.cell]

    def on(self, device: str) -> Call:
        """The same call on a device (strides are kept on the CPU only; batch sizes and lengths stay there)."""
        if device == "cpu":
            return self
        moved = {name: value.to(device) for name, value in self.options.items() if name in ("resets", *MASKS)}
        return replace(self, tensors={n: t.to(device) for n, t in self.tensors.items()}, options=self.options | moved)

    def to(self, dtype: torch.dtype) -> Call:
        """The same values, contiguous, in another dtype."""
        masks = {name: value.to(dtype) for name, value in self.options.items() if name in MASKS}
        tensors = {n: t.detach().to(dtype).contiguous() for n, t in self.tensors.items()}
        return replace(self, tensors=tensors, options=self.options | masks)

    def with_grad(self, *names: str) -> Call:
        """The same tensors as leaves, with gradients for those named (all when none is)."""
        wanted = names or DIFFERENTIABLE
        leaves = {n: t.detach().requires_grad_(n in wanted) for n, t in self.tensors.items()}
        return replace(self, tensors=leaves)


@dataclass(frozen=True)
class Case:
    """A call described by its sizes and options."""

    cell: str
    T: int = 4
    N: int = 3
    I: int = 3  # noqa: E741  (the letter of the whole code base)
    H: int = 5
    P: int | None = None
    kind: str = "padded"  # padded, packed, step
    h0: bool = True
    c0: bool = True
    bias: bool = True
    reverse: bool = False
    lengths: tuple[int, ...] | None = None  # of a packed batch too: there non-increasing and at least 1
    resets: bool = False
    masks: frozenset[str] = frozenset()
    input_layout: str = "contiguous"
    state_layout: str = "contiguous"
    weight_layout: str = "contiguous"
    frozen: frozenset[str] = frozenset()
    seed: int = 0

    def call(self, dtype: torch.dtype = torch.float64) -> Call:
        """Make the tensors, on the CPU. Weights are uniform as torch.nn's, everything else is normal."""
        with torch.device("cpu"):
            return self._call(dtype)

    def _call(self, dtype: torch.dtype) -> Call:
        generator = torch.Generator().manual_seed(self.seed)
        cell = reference.CELLS[self.cell]
        rows, state_size = cell.num_gates * self.H, self.P or self.H

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        def weight(*shape: int) -> Tensor:
            uniform = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
            return (uniform / self.H**0.5).to(dtype)

        options: dict[str, Any] = {}
        shape: tuple[int, ...] = (self.T, self.N, self.I)
        if self.kind == "step":
            shape = (self.N, self.I)
        elif self.kind == "packed":
            assert self.lengths is not None
            sizes = [sum(length > t for length in self.lengths) for t in range(max(self.lengths))]
            options["batch_sizes"] = torch.tensor(sizes)
            shape = (sum(sizes), self.I)
        elif self.lengths is not None:
            options["lengths"] = torch.tensor(self.lengths, dtype=torch.int64)
        if self.resets:
            options["resets"] = torch.rand(self.T, self.N, generator=generator) < 0.3
        if self.reverse:
            options["reverse"] = True

        tensors = {"input": laid_out(normal(*shape), self.input_layout)}
        if self.h0:
            tensors["h0"] = laid_out(normal(self.N, state_size), self.state_layout)
        if self.c0 and cell.num_states == 2:
            tensors["c0"] = laid_out(normal(self.N, self.H), self.state_layout)
        tensors["weight_ih"] = laid_out(weight(rows, self.I), self.weight_layout)
        tensors["weight_hh"] = laid_out(weight(rows, state_size), self.weight_layout)
        if self.bias:
            tensors["bias_ih"] = laid_out(weight(rows), self.weight_layout)
            tensors["bias_hh"] = laid_out(weight(rows), self.weight_layout)
        if self.P is not None:
            tensors["weight_hr"] = laid_out(weight(self.P, self.H), self.weight_layout)
        if cell.num_peepholes:
            tensors["weight_ch"] = laid_out(weight(cell.num_peepholes * self.H), self.weight_layout)
        if cell.is_normalized:
            tensors["weight_ln"] = laid_out(1 + weight(cell.num_norm_vectors * self.H), self.weight_layout)
        shares = torch.rand(*shape[:-1], self.H, generator=generator, dtype=torch.float64)
        for name in sorted(self.masks):
            if name == "recurrent_mask":  # 0 or 1.5, which every dtype holds
                kept = torch.rand(self.N, state_size, generator=generator) < 0.7
                options[name] = laid_out(kept.to(dtype) * 1.5, self.state_layout)
            else:  # of three units one stays, one is new, one is a mixture
                options[name] = laid_out((shares * 3 - 1).clamp(0, 1).to(dtype), self.input_layout)
                shares = shares.flip(-1)
        return Call(self.cell, tensors, options)

    def leaves(self) -> list[str]:
        """The names of the tensors that get a gradient."""
        return [name for name in self.call().tensors if name not in self.frozen]


def non_increasing_lengths(N: int, T: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Lengths of a packed batch: sorted, at least one step each, the longest of any length up to T."""
    one = st.integers(1, T)
    return st.lists(one, min_size=N, max_size=N).map(lambda lengths: tuple(sorted(lengths, reverse=True)))


@st.composite
def cases(draw: st.DrawFn, cell: str, *, empty: bool = True, plain: bool = False, expanded: bool = True) -> Case:
    """Any valid call of a cell.

    ``plain`` leaves out what torch.nn has no counterpart for (lengths and resets). Without ``expanded``, which is for
    comparing rounding errors, no two sequences are the same, whose errors would all have one sign; nor has a cell with
    layer normalization one input only: that changes no more than the scale of a product, so that its gradient is zero
    but for rounding.
    """
    is_normalized = reference.CELLS[cell].is_normalized
    kind = draw(st.sampled_from(["padded", "padded", "packed", "step"]))
    T = 1 if kind == "step" else draw(st.integers(1, MAX_STEPS))
    N = draw(st.sampled_from(BATCHES + ([0] if empty and kind == "padded" else [])))
    H = draw(st.sampled_from(HIDDEN_SIZES))
    P = None
    if reference.CELLS[cell].has_projection and H > 1 and draw(st.booleans()):
        P = draw(st.sampled_from(sorted({1, H // 2 or 1, H - 1})))
    lengths = None
    if kind == "packed":
        lengths = draw(non_increasing_lengths(N, T))
        T = max(lengths)
    elif kind == "padded" and not plain and draw(st.booleans()):
        lengths = tuple(draw(st.lists(st.integers(0, T), min_size=N, max_size=N)))
    layouts = st.sampled_from(LAYOUTS if expanded else LAYOUTS[:-1])
    masks: frozenset[str] = frozenset()
    if not plain and draw(st.booleans()):
        possible = [*(["recurrent_mask"] if P else MASKS[: 1 + reference.CELLS[cell].num_states])]
        masks = draw(st.frozensets(st.sampled_from(possible)))
    return Case(
        cell=cell,
        T=T,
        N=N,
        I=draw(st.sampled_from([size for size in INPUT_SIZES if size > 1 or expanded or not is_normalized])),
        H=H,
        P=P,
        kind=kind,
        h0=draw(st.booleans()),
        c0=draw(st.booleans()),
        bias=draw(st.booleans()),
        reverse=draw(st.booleans()),
        lengths=lengths,
        resets=kind == "padded" and not plain and draw(st.booleans()),
        masks=masks,
        input_layout=draw(layouts),
        state_layout=draw(layouts),
        # equal rows of weights have no spread for a normalization to divide by but that of rounding errors
        weight_layout=draw(st.sampled_from(LAYOUTS[:-1]) if is_normalized else layouts),
        frozen=draw(st.frozensets(st.sampled_from(DIFFERENTIABLE), max_size=3)),
        seed=draw(st.integers(0, 2**16)),
    )
