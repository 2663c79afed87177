"""Every cell and the one scan over time, in plain differentiable PyTorch.

This is the oracle of the tests and the backward of the backward. It is written to be read, not to be fast. Each cell
is one function below: the formula of a single step, in torch's gate order. ``@_cell`` turns it into a callable with
the signature of the op of the same name (see :class:`Cell`) and enters it in :data:`CELLS`.

Letters: ``T`` steps, ``N`` batch, ``I`` input size, ``H`` hidden size, ``P`` projected size (``H`` without a
projection), ``G`` gates. Last dimension fastest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "CELLS",
    "Cell",
    "gru",
    "gru_before",
    "gru_layer_norm",
    "gru_reset",
    "gru_reset_before",
    "gru_update",
    "lstm",
    "lstm_coupled",
    "lstm_coupled_peephole",
    "lstm_layer_norm",
    "lstm_peephole",
    "rnn_relu",
    "rnn_tanh",
]

Formula = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Cell:
    """A recurrent cell scanned over time by plain PyTorch operations.

    ``cell(input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)`` runs one layer in one direction, as
    ``torch.ops.rnnfast.<name>`` does, and may be differentiated any number of times in any floating dtype.

    Attributes:
        name: the op's name.
        num_gates: ``G``.
        num_states: 1 (``h``) or 2 (``h`` and ``c``).
        formula: one step: input gates and recurrent gates, both ``[N, G*H]``, then the old states, to the new states.
        num_late_gates: how many gates, the last ones, take their recurrent product of something else than ``h``. They
            are not among the recurrent gates that the formula gets; its last argument ``late`` is the function that
            makes theirs, ``[N, H]`` to ``[N, late*H]``.
        num_peepholes: how many vectors of weights ``[H]`` the formula gets as its last arguments.
        is_normalized: whether the products go through layer normalization. A formula of two states gets the function
            that normalizes c as its last argument.
    """

    name: str
    num_gates: int
    num_states: int
    formula: Formula
    num_late_gates: int = 0
    num_peepholes: int = 0
    is_normalized: bool = False

    @property
    def num_norm_vectors(self) -> int:
        """How many vectors ``[H]`` the weights of the layer normalization are."""
        return 2 * (self.num_gates + self.num_states - 1) if self.is_normalized else 0

    @property
    def has_projection(self) -> bool:
        """Whether it takes a weight_hr."""
        return self.num_states == 2 and not self.is_normalized

    def __call__(
        self,
        input: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor | None = None,
        bias_hh: Tensor | None = None,
        weight_hr: Tensor | None = None,
        batch_sizes: Tensor | None = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reverse: bool = False,
        weight_ch: Tensor | None = None,
        recurrent_mask: Tensor | None = None,
        zoneout_h: Tensor | None = None,
        zoneout_c: Tensor | None = None,
        weight_ln: Tensor | None = None,
        *,
        with_all_c: bool = False,
    ) -> tuple[Tensor, ...]:
        """Scan the cell over the sequence.

        Args:
            input: ``[T, N, I]``; ``[rows, I]`` with ``batch_sizes``; ``[N, I]`` (one step) without. Or tokens, int64
                without the last dimension, each for the one-hot row of ``I`` numbers (of zeros for a token outside
                0..I-1, which the ops refuse).
            h0: ``[N, P]``, or None for zeros.
            c0: ``[N, H]``, or None for zeros; only for a cell with two states.
            weight_ih: ``[G*H, I]``.
            weight_hh: ``[G*H, P]``.
            bias_ih: ``[G*H]`` or None.
            bias_hh: ``[G*H]`` or None.
            weight_hr: ``[P, H]``, the projection, or None. All weights may have one more dimension in front, of ``E``
                members: sequence ``n`` of the batch runs with weights ``n % E``.
            batch_sizes: int64 ``[T]``, those of a PackedSequence: non-increasing, ``N`` the first.
            lengths: int64 ``[N]``, each 0..T, in any order. Steps past the end are not read: the output is zero there,
                and the final state is that of the last real step (the initial state for length 0).
            resets: bool ``[T, N]``. Where true there is a boundary between ``t - 1`` and ``t``: no state crosses it,
                in either direction. Boundaries in the padding mean nothing.
            reverse: walk time backwards; every output stays at its own step.
            weight_ch: ``[V*H]``, the vectors by which gates see c, one after the other; of a cell with peepholes.
            recurrent_mask: ``[N, P]``: what h is multiplied by where it enters the recurrent product, at every step.
                Recurrent dropout: Gal and Ghahramani, arXiv:1512.05287 (2016).
            zoneout_h: ``[T, N, H]`` in the form of output, from 0 to 1: the share of h_{t-1} that stays,
                h_t = zoneout_h * h_{t-1} + (1 - zoneout_h) * h'_t, where h'_t is what the cell makes. Krueger et al.,
                arXiv:1606.01305 (2016). Not with a projection.
            zoneout_c: the same for c; h'_t is made of the cell's own c'_t.
            weight_ln: ``[V*H]``, of a cell with layer normalization: the gains of the input product and of the
                recurrent product, ``[G*H]`` each; of a cell with two states also gain and bias of c, ``[H]`` each.
            with_all_c: also return c of all steps, as ``torch.ops.rnnfast.<name>_all_c`` does; only for a cell with two
                states.

        Returns:
            output ``[T, N, P]`` (``[rows, P]``, ``[N, P]``), ``h_n`` ``[N, P]``, ``c_n`` ``[N, H]`` (``[0]`` for a cell
            with one state); with ``with_all_c`` also c ``[T, N, H]`` in the form of output.
        """
        if weight_ih.dim() == 3:
            weights = (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, weight_ch, weight_ln)
            of_sequences = (h0, c0, recurrent_mask, zoneout_h, zoneout_c)
            return self._members(input, of_sequences, weights, batch_sizes, (lengths, resets), reverse, with_all_c)
        if not input.is_floating_point():
            # not F.one_hot, which looks at the values and so does not go with vmap
            input = (input.unsqueeze(-1) == torch.arange(weight_ih.shape[1], device=input.device)).to(weight_ih.dtype)
        zoneouts = [zoneout_h, zoneout_c][: self.num_states]
        rows = None
        single_step = batch_sizes is None and input.dim() == 2
        if batch_sizes is not None:  # a packed batch is a padded one whose rows past the lengths were left out
            sizes = batch_sizes.to(input.device)
            present = torch.arange(int(batch_sizes[0]), device=input.device) < sizes[:, None]  # [T, N]
            lengths, rows = present.sum(0), present.flatten().nonzero().squeeze(1)
            padded = input.new_zeros(present.numel(), input.shape[1]).index_copy(0, rows, input)
            input = padded.view(*present.shape, input.shape[1])
            zoneouts = [
                None
                if z is None
                else z.new_zeros(present.numel(), z.shape[1]).index_copy(0, rows, z).view(*present.shape, z.shape[1])
                for z in zoneouts
            ]
        elif single_step:
            input = input.unsqueeze(0)
            zoneouts = [None if z is None else z.unsqueeze(0) for z in zoneouts]
        steps, batch = input.shape[:2]

        real = None
        if lengths is not None:
            real = (torch.arange(steps, device=input.device)[:, None] < lengths.to(input.device)).unsqueeze(-1)
            input = input.masked_fill(~real, 0.0)
        if resets is not None:
            resets = resets.unsqueeze(-1)
            if reverse:  # the boundary before step t + 1 is met on the way from t + 1 to t
                inner = resets if real is None else resets & real
                resets = torch.cat([inner[1:], torch.zeros_like(inner[:1])])

        hidden_size, state_size = weight_hh.shape[0] // self.num_gates, weight_hh.shape[1]
        h = input.new_zeros(batch, state_size) if h0 is None else h0
        c = input.new_zeros(batch, hidden_size) if c0 is None else c0
        state: tuple[Tensor, ...] = (h, c)[: self.num_states]

        def late(h: Tensor) -> Tensor:
            masked = h if recurrent_mask is None else h * recurrent_mask
            return F.linear(masked, weight_hh[early:], None if bias_hh is None else bias_hh[early:])

        early = weight_hh.shape[0] - self.num_late_gates * hidden_size
        weight_h, bias_h = weight_hh[:early], None if bias_hh is None else bias_hh[:early]
        more: tuple[object, ...] = (late,) if self.num_late_gates else ()
        if weight_ch is not None:
            more = weight_ch.view(self.num_peepholes, hidden_size).unbind()
        gains: Sequence[Tensor | None] = (None, None)
        if weight_ln is not None:
            gate_size = self.num_gates * hidden_size
            gains = weight_ln[: 2 * gate_size].chunk(2)
            if self.num_states == 2:
                gain_c, bias_c = weight_ln[2 * gate_size :].chunk(2)
                more = (lambda c: _layer_norm(c, gain_c, bias_c),)
        gates_x = _product(input, weight_ih, bias_ih, gains[0])  # [T, N, G*H], one product over all steps
        states = [state] * steps
        for t in reversed(range(steps)) if reverse else range(steps):
            old = state if resets is None else tuple(s.masked_fill(resets[t], 0.0) for s in state)
            masked = old[0] if recurrent_mask is None else old[0] * recurrent_mask
            new = self.formula(gates_x[t], _product(masked, weight_h, bias_h, gains[1]), *old, *more)
            if weight_hr is not None:
                new = (F.linear(new[0], weight_hr), *new[1:])
            new = tuple(
                n if z is None else z[t] * o + (1 - z[t]) * n for n, o, z in zip(new, old, zoneouts, strict=True)
            )
            state = new if real is None else tuple(torch.where(real[t], n, s) for n, s in zip(new, state, strict=True))
            states[t] = state

        def all_steps(which: int) -> Tensor:
            values = torch.stack([state[which] for state in states])
            if real is not None:
                values = values.masked_fill(~real, 0.0)
            if rows is not None:
                return values.flatten(0, 1).index_select(0, rows)
            return values.squeeze(0) if single_step else values

        final = (all_steps(0), state[0], state[1] if self.num_states == 2 else input.new_empty(0))
        return (*final, all_steps(1)) if with_all_c else final

    def _members(
        self,
        input: Tensor,
        rows: Sequence[Tensor | None],
        weights: Sequence[Tensor | None],
        batch_sizes: Tensor | None,
        bounds: Sequence[Tensor | None],
        reverse: bool,
        with_all_c: bool,
    ) -> tuple[Tensor, ...]:
        """The members of stacked weights one after the other, each on its own sequences."""
        count = len(weights[0]) if weights[0] is not None else 0
        sequences = -2 if input.is_floating_point() else -1
        steps = None if batch_sizes is None else batch_sizes // count
        scan: Callable[..., tuple[Tensor, ...]] = self
        parts = []
        for e in range(count):
            x = input.movedim(sequences, 0)[e::count].movedim(0, sequences)
            h0, c0, *masks = (None if row is None else row[..., e::count, :] for row in rows)
            *member, weight_ch, weight_ln = (None if weight is None else weight[e] for weight in weights)
            lengths, resets = (None if bound is None else bound[..., e::count] for bound in bounds)
            bounded = (steps, lengths, resets, reverse)
            parts.append(scan(x, h0, c0, *member, *bounded, weight_ch, *masks, weight_ln, with_all_c=with_all_c))
        return tuple(
            torch.stack(of_all, -2).flatten(-3, -2) if of_all[0].dim() > 1 else of_all[0]
            for of_all in zip(*parts, strict=True)
        )


CELLS: dict[str, Cell] = {}
"""Every cell by the name of its op."""


def _cell(
    num_gates: int, num_states: int, num_late_gates: int = 0, num_peepholes: int = 0, is_normalized: bool = False
) -> Callable[[Formula], Cell]:
    def register(formula: Formula) -> Cell:
        name = formula.__name__
        CELLS[name] = Cell(name, num_gates, num_states, formula, num_late_gates, num_peepholes, is_normalized)
        return CELLS[name]

    return register


def _layer_norm(a: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """Over the last dimension; Ba, Kiros and Hinton, arXiv:1607.06450 (2016).

    LN(a) = (a - mean(a)) / sqrt(var(a) + 1e-5), times the gain, plus the bias

    Written out, not torch's operation: that has no derivative of every kind in every transform. As there, the 16-bit
    types take the statistics in float32.
    """
    wide = a.float() if a.dtype in (torch.bfloat16, torch.float16) else a
    deviation = wide - wide.mean(-1, keepdim=True)
    normal = deviation * (deviation.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    scaled = gain * normal.to(a.dtype)
    return scaled if bias is None else scaled + bias


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias) if gain is None else _layer_norm(F.linear(x, weight), gain, bias)


def _gates(gates: Tensor, count: int) -> Sequence[Tensor]:
    """The ``G`` gates of ``[N, G*H]``, each ``[N, H]``."""
    return gates.chunk(count, dim=-1)


# x is W_ih x_t + b_ih and u is W_hh h_{t-1} + b_hh, both [N, G*H]; h is h_{t-1} and c is c_{t-1}. With layer
# normalization x is gain_ih * LN(W_ih x_t) + b_ih and u is gain_hh * LN(W_hh h_{t-1}) + b_hh.


@_cell(num_gates=1, num_states=1)
def rnn_tanh(x: Tensor, u: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    """Elman, "Finding structure in time", Cognitive Science 14 (1990), with tanh.

    h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)
    """
    return ((x + u).tanh(),)


@_cell(num_gates=1, num_states=1)
def rnn_relu(x: Tensor, u: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    """Elman's network with a rectifier; as in Le, Jaitly and Hinton, arXiv:1504.00941 (2015).

    h_t = max(0, W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)
    """
    return ((x + u).relu(),)


@_cell(num_gates=3, num_states=1)
def gru(x: Tensor, u: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    """Cho et al., arXiv:1406.1078 (2014); the variant of cuDNN and torch: the reset gate is applied after the product.

    r_t = sigmoid(x_r + u_r)
    z_t = sigmoid(x_z + u_z)
    n_t = tanh(x_n + r_t * u_n)
    h_t = (1 - z_t) * n_t + z_t * h_{t-1}
    """
    x_r, x_z, x_n = _gates(x, 3)
    u_r, u_z, u_n = _gates(u, 3)
    r = (x_r + u_r).sigmoid()
    z = (x_z + u_z).sigmoid()
    n = (x_n + r * u_n).tanh()
    return ((1 - z) * n + z * h,)


@_cell(num_gates=3, num_states=1, num_late_gates=1)
def gru_before(x: Tensor, u: Tensor, h: Tensor, late: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    """Cho et al., arXiv:1406.1078 (2014), as printed, z and 1 - z in torch's places: reset before the product.

    r_t = sigmoid(x_r + u_r)
    z_t = sigmoid(x_z + u_z)
    n_t = tanh(x_n + W_hn (r_t * h_{t-1}) + b_hn)
    h_t = (1 - z_t) * n_t + z_t * h_{t-1}
    """
    x_r, x_z, x_n = _gates(x, 3)
    u_r, u_z = _gates(u, 2)
    r = (x_r + u_r).sigmoid()
    z = (x_z + u_z).sigmoid()
    n = (x_n + late(r * h)).tanh()
    return ((1 - z) * n + z * h,)


@_cell(num_gates=2, num_states=1)
def gru_reset(x: Tensor, u: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    """:data:`gru` without the update gate, z_t = 0: gates r, n.

    r_t = sigmoid(x_r + u_r)
    h_t = tanh(x_n + r_t * u_n)
    """
    x_r, x_n = _gates(x, 2)
    u_r, u_n = _gates(u, 2)
    return ((x_n + (x_r + u_r).sigmoid() * u_n).tanh(),)


@_cell(num_gates=2, num_states=1, num_late_gates=1)
def gru_reset_before(x: Tensor, u: Tensor, h: Tensor, late: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    """:data:`gru_before` without the update gate, z_t = 0: gates r, n.

    r_t = sigmoid(x_r + u_r)
    h_t = tanh(x_n + W_hn (r_t * h_{t-1}) + b_hn)
    """
    x_r, x_n = _gates(x, 2)
    return ((x_n + late((x_r + u).sigmoid() * h)).tanh(),)


@_cell(num_gates=2, num_states=1)
def gru_update(x: Tensor, u: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    """:data:`gru` without the reset gate, r_t = 1: gates z, n. Collins et al., arXiv:1611.09913 (2016): UGRNN.

    z_t = sigmoid(x_z + u_z)
    n_t = tanh(x_n + u_n)
    h_t = (1 - z_t) * n_t + z_t * h_{t-1}
    """
    a_z, a_n = _gates(x + u, 2)
    z = a_z.sigmoid()
    return ((1 - z) * a_n.tanh() + z * h,)


@_cell(num_gates=4, num_states=2)
def lstm(x: Tensor, u: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    """Hochreiter and Schmidhuber (1997) with the forget gate of Gers, Schmidhuber and Cummins (2000), no peepholes.

    i_t, f_t, o_t = sigmoid(x_i + u_i), sigmoid(x_f + u_f), sigmoid(x_o + u_o)
    g_t = tanh(x_g + u_g)
    c_t = f_t * c_{t-1} + i_t * g_t
    h_t = o_t * tanh(c_t), projected to W_hr h_t where there is a projection (Sak et al., arXiv:1402.1128)
    """
    i, f, g, o = _gates(x + u, 4)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


@_cell(num_gates=3, num_states=2)
def lstm_coupled(x: Tensor, u: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    """:data:`lstm` with f_t = 1 - i_t: gates i, g, o. Greff et al., arXiv:1503.04069 (2015), CIFG; no peepholes.

    i_t, o_t = sigmoid(x_i + u_i), sigmoid(x_o + u_o)
    g_t = tanh(x_g + u_g)
    c_t = (1 - i_t) * c_{t-1} + i_t * g_t
    h_t = o_t * tanh(c_t), projected to W_hr h_t where there is a projection
    """
    a_i, a_g, a_o = _gates(x + u, 3)
    i = a_i.sigmoid()
    c = (1 - i) * c + i * a_g.tanh()
    return a_o.sigmoid() * c.tanh(), c


@_cell(num_gates=4, num_states=2, num_peepholes=3)
def lstm_peephole(
    x: Tensor, u: Tensor, h: Tensor, c: Tensor, w_i: Tensor, w_f: Tensor, w_o: Tensor
) -> tuple[Tensor, ...]:
    """:data:`lstm` with peepholes: Gers, Schraudolph and Schmidhuber, JMLR 3 (2002).

    i_t, f_t = sigmoid(x_i + u_i + w_i * c_{t-1}), sigmoid(x_f + u_f + w_f * c_{t-1})
    g_t = tanh(x_g + u_g)
    c_t = f_t * c_{t-1} + i_t * g_t
    o_t = sigmoid(x_o + u_o + w_o * c_t)
    h_t = o_t * tanh(c_t), projected to W_hr h_t where there is a projection
    """
    a_i, a_f, a_g, a_o = _gates(x + u, 4)
    i, f = (a_i + w_i * c).sigmoid(), (a_f + w_f * c).sigmoid()
    c = f * c + i * a_g.tanh()
    return (a_o + w_o * c).sigmoid() * c.tanh(), c


@_cell(num_gates=3, num_states=2, num_peepholes=2)
def lstm_coupled_peephole(x: Tensor, u: Tensor, h: Tensor, c: Tensor, w_i: Tensor, w_o: Tensor) -> tuple[Tensor, ...]:
    """:data:`lstm_coupled` with the peepholes of its two gates: Greff et al., arXiv:1503.04069 (2015), CIFG.

    i_t = sigmoid(x_i + u_i + w_i * c_{t-1})
    g_t = tanh(x_g + u_g)
    c_t = (1 - i_t) * c_{t-1} + i_t * g_t
    o_t = sigmoid(x_o + u_o + w_o * c_t)
    h_t = o_t * tanh(c_t), projected to W_hr h_t where there is a projection
    """
    a_i, a_g, a_o = _gates(x + u, 3)
    i = (a_i + w_i * c).sigmoid()
    c = (1 - i) * c + i * a_g.tanh()
    return (a_o + w_o * c).sigmoid() * c.tanh(), c


@_cell(num_gates=4, num_states=2, is_normalized=True)
def lstm_layer_norm(
    x: Tensor, u: Tensor, h: Tensor, c: Tensor, norm_c: Callable[[Tensor], Tensor]
) -> tuple[Tensor, ...]:
    """:data:`lstm` with layer normalization: Ba, Kiros and Hinton, arXiv:1607.06450 (2016), their equations for it.

    c_t as there, of normalized x and u
    h_t = o_t * tanh(gain_c * LN(c_t) + b_c)
    """
    i, f, g, o = _gates(x + u, 4)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * norm_c(c).tanh(), c


@_cell(num_gates=3, num_states=1, is_normalized=True)
def gru_layer_norm(x: Tensor, u: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    """:data:`gru` of normalized x and u: Ba, Kiros and Hinton, arXiv:1607.06450 (2016).

    They normalize the candidate's numbers apart from the gates'; here they are one, as in their LSTM and in Haste's
    LayerNormGRU (LMNT, 2020).
    """
    return gru.formula(x, u, h)
