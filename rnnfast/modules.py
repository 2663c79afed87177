"""torch.nn's recurrent layers and cells on rnnfast's kernels.

Each class is a subclass of torch.nn's class of the same name that overrides ``forward`` and adds no state of its own:
parameters, initial values, state_dict, repr, pickles and hooks are torch's, and ``module.__class__ = rnnfast.LSTM``
turns a living torch.nn module into ours. The way of a call is in :mod:`rnnfast.call`, the options that torch.nn has not
in :mod:`rnnfast.options`, :mod:`rnnfast.plan` says which kernel a call takes.

Letters: ``T`` steps, ``N`` batch, ``I`` input size, ``H`` hidden size, ``P`` proj_size or ``H``, ``L`` layers,
``D`` directions.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnfast.call import forward_cell, forward_layer, refuse_pair
from rnnfast.options import (
    ALL_OPTIONS,
    become,
    gru_cell,
    lstm_cell,
    options_beyond_torch,
    set_masks,
    set_norm_weight,
    set_options,
    set_recompute,
)

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]

_States = tuple[Tensor, Tensor]
_Lengths = Tensor | Sequence[int]
_MODE_OF_NONLINEARITY = {"tanh": "RNN_TANH", "relu": "RNN_RELU"}
# torch.nn's own classes, also while patch_torch() has put ours in their place.
_TorchRNN, _TorchGRU, _TorchLSTM = torch.nn.RNN, torch.nn.GRU, torch.nn.LSTM
_TorchRNNCell, _TorchGRUCell, _TorchLSTMCell = torch.nn.RNNCell, torch.nn.GRUCell, torch.nn.LSTMCell


class RNN(torch.nn.RNN):
    r"""torch.nn.RNN with fused kernels: the same arguments, parameters, results and errors.

    For each layer and direction, with :math:`\phi` tanh or, for ``nonlinearity="relu"``, the rectifier:

    .. math:: h_t = \phi(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})

    Source: Elman, "Finding structure in time", Cognitive Science 14 (1990).

    Args:
        input_size: ``I``.
        hidden_size: ``H``.
        num_layers: ``L``; each takes the outputs of the one before.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        bias: False leaves out ``b_ih`` and ``b_hh``.
        batch_first: input and output are ``[N, T, ...]``; states stay ``[L*D, N, H]``.
        dropout: probability of dropping an element between layers, in training, from torch's generator.
        bidirectional: ``D`` is 2: a second set of weights reads the sequence backwards, outputs side by side.
        device: where the parameters live.
        dtype: float32, float64, bfloat16 or float16. The 16-bit types accumulate and keep the state in float32.
        zoneout: probability of a unit keeping its old state at a step, in training by a mask of its own for each step,
            from torch's generator; in evaluation the mean of both, ``zoneout * old + (1 - zoneout) * new`` (Krueger et
            al., arXiv:1606.01305, 2016).
        recurrent_dropout: probability of dropping a unit of h where it enters the recurrent product, in training, by
            one mask for all steps of a sequence, a new one at each call (Gal and Ghahramani, arXiv:1512.05287, 2016).
        recompute: save the state between parts of the sequence only, and in the backward pass run each part's forward
            again: the same numbers for less memory and about a third more time. On the CPU.

    Call with input ``[T, N, I]``, ``[T, I]`` or a PackedSequence, and hx ``[L*D, N, H]`` (``[L*D, H]`` for 2-D input)
    or None for zeros. Gives output ``[T, N, D*H]`` (``[T, D*H]``; a PackedSequence) and h_n in the shape of hx.

    ``resets``, bool ``[T, N]`` (``[N, T]`` with batch_first, ``[T]`` for 2-D input), at the input's device: where true,
    a new sequence begins at that step. The state is zero before it, and in the reverse direction, which meets the same
    boundary from the other side, after it. ``lengths``, ``[N]`` integers from 0 to ``T`` in any order (a Tensor
    anywhere, or a list): outputs are zero past a sequence's length, its final states are those of its last real step
    (its initial ones for length 0), and the reverse direction starts there; what the input holds past it is not read.

    Inference saves nothing for the backward pass. Training saves, besides arguments and outputs, 1 number per step,
    sequence and unit in the accumulating dtype (4 bytes; 8 in float64). With ``recompute``
    it is the state every 8 steps (more steps with fewer than 64 sequences).

    Raises:
        ValueError: input of the wrong rank, or of another dtype than the weights; resets or lengths of the wrong shape,
            dtype, device or range, with a PackedSequence, or lengths for 2-D input.
        RuntimeError: input or hx of the wrong size, hx or a weight of the wrong dtype, device or shape, no steps.
        TypeError: input, hx or resets that are not a tensor.
    """

    # Set on the object where they are not these, so that a converted layer and its pickles are torch.nn's.
    zoneout: float = 0.0
    recurrent_dropout: float = 0.0
    recompute: bool = False
    _variant: str | None = None

    def __init__(
        self,
        *args: Any,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        recompute: bool = False,
        **kwargs: Any,
    ) -> None:
        _TorchRNN.__init__(self, *args, **kwargs)
        if zoneout or recurrent_dropout:
            set_masks(self, zoneout, recurrent_dropout)
        if recompute:
            set_recompute(self, recompute)

    @overload
    def forward(
        self, input: Tensor, hx: Tensor | None = None, *, resets: Tensor | None = None, lengths: _Lengths | None = None
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(self, input: PackedSequence, hx: Tensor | None = None) -> tuple[PackedSequence, Tensor]: ...
    def forward(self, input: Any, hx: Any = None, *, resets: Any = None, lengths: Any = None) -> Any:
        """Run the layer over a sequence; see the class."""
        return forward_layer(self, input, hx, resets, lengths)

    def extra_repr(self) -> str:
        """Show torch's options, and ours where they are not the default."""
        return ", ".join(filter(None, (_TorchRNN.extra_repr(self), options_beyond_torch(self, ALL_OPTIONS))))

    def to_torch(self) -> torch.nn.RNN:
        """Give the torch.nn.RNN that shares parameters and hooks; methods of a subclass stay behind."""
        return _as_stock(self, _TorchRNN)

    def __prepare_scriptable__(self) -> torch.nn.RNN:
        """Give torch.jit.script the stock module: it compiles Python source, of which our forward is not the kind."""
        return _as_stock(self, _TorchRNN)


class GRU(torch.nn.GRU):
    r"""torch.nn.GRU with fused kernels: the same arguments, parameters, results and errors.

    For each layer and direction:

    .. math::
        r_t &= \sigma(W_{ir} x_t + b_{ir} + W_{hr} h_{t-1} + b_{hr}) \\
        z_t &= \sigma(W_{iz} x_t + b_{iz} + W_{hz} h_{t-1} + b_{hz}) \\
        n_t &= \tanh(W_{in} x_t + b_{in} + r_t \odot (W_{hn} h_{t-1} + b_{hn})) \\
        h_t &= (1 - z_t) \odot n_t + z_t \odot h_{t-1}

    Source: Cho et al., arXiv:1406.1078 (2014), in torch's and cuDNN's variant: the reset gate after the product.
    With ``reset_after=False`` it is the paper's own, which Keras had first and textbooks print:

    .. math:: n_t = \tanh(W_{in} x_t + b_{in} + W_{hn} (r_t \odot h_{t-1}) + b_{hn})

    With ``layer_norm=True`` each product goes through layer normalization over its ``3*H`` numbers (Ba, Kiros and
    Hinton, arXiv:1607.06450, 2016; they normalize the candidate apart from the gates, Haste's LayerNormGRU as here): in
    the place of :math:`W_{i*} x_t` and :math:`W_{h*} h_{t-1}` come :math:`\gamma_i \odot LN(W_i x_t)` and
    :math:`\gamma_h \odot LN(W_h h_{t-1})`,

    .. math:: LN(a) = (a - \mathrm{mean}(a)) / \sqrt{\mathrm{var}(a) + 10^{-5}}

    With ``gates="reset"`` there is no update gate: :math:`h_t = n_t`. With ``gates="update"`` there is no reset gate,
    :math:`r_t = 1`: the update gate RNN of Collins et al., arXiv:1611.09913 (2016).

    Args:
        input_size: ``I``.
        hidden_size: ``H``.
        num_layers: ``L``; each takes the outputs of the one before.
        bias: False leaves out ``b_ih`` and ``b_hh``.
        batch_first: input and output are ``[N, T, ...]``; states stay ``[L*D, N, H]``.
        dropout: probability of dropping an element between layers, in training, from torch's generator.
        bidirectional: ``D`` is 2: a second set of weights reads the sequence backwards, outputs side by side.
        device: where the parameters live.
        dtype: float32, float64, bfloat16 or float16. The 16-bit types accumulate and keep the state in float32.
        reset_after: the reset gate is applied after the recurrent product (torch's variant), or before it.
        gates: ``"both"``, ``"reset"`` or ``"update"``. The parameters hold the gates r, z, n that there are, in this
            order: ``[2*H, ...]`` with one gate of the two.
        layer_norm: normalizes the products, by parameters more, which begin as ones: the gains ``weight_ln_ih_l{k}``
            and ``weight_ln_hh_l{k}`` (with ``_reverse`` for the second direction), ``[3*H]``. Not with the two above.
        zoneout: probability of a unit keeping its old state at a step, in training by a mask of its own for each step,
            from torch's generator; in evaluation the mean of both, ``zoneout * old + (1 - zoneout) * new`` (Krueger et
            al., arXiv:1606.01305, 2016).
        recurrent_dropout: probability of dropping a unit of h where it enters a recurrent product, in training, by one
            mask for all steps of a sequence, a new one at each call (Gal and Ghahramani, arXiv:1512.05287, 2016).
        recompute: save the state between parts of the sequence only, and in the backward pass run each part's forward
            again: the same numbers for less memory and about a third more time. On the CPU.

    Call with input ``[T, N, I]``, ``[T, I]`` or a PackedSequence, and hx ``[L*D, N, H]`` (``[L*D, H]`` for 2-D input)
    or None for zeros. Gives output ``[T, N, D*H]`` (``[T, D*H]``; a PackedSequence) and h_n in the shape of hx.

    ``resets``, bool ``[T, N]`` (``[N, T]`` with batch_first, ``[T]`` for 2-D input), at the input's device: where true,
    a new sequence begins at that step. The state is zero before it, and in the reverse direction, which meets the same
    boundary from the other side, after it. ``lengths``, ``[N]`` integers from 0 to ``T`` in any order (a Tensor
    anywhere, or a list): outputs are zero past a sequence's length, its final states are those of its last real step
    (its initial ones for length 0), and the reverse direction starts there; what the input holds past it is not read.

    Inference saves nothing for the backward pass. Training saves, besides arguments and outputs, 5 numbers per step,
    sequence and unit in the accumulating dtype (20 bytes; 40 in float64): three gates, the recurrent part of the
    candidate, the state; 4 with ``reset_after=False``, 3 with one gate, 11 with ``layer_norm=True``. With
    ``recompute`` it is the state every 8 steps (more steps with fewer than 64 sequences).

    Raises:
        ValueError: gates that are none of these, options that do not go together; input of the wrong rank, or of
            another dtype than the weights; resets or lengths of the wrong shape, dtype, device or range, with a
            PackedSequence, or lengths for 2-D input.
        RuntimeError: input or hx of the wrong size, hx or a weight of the wrong dtype, device or shape, no steps.
        TypeError: input, hx or resets that are not a tensor.
    """

    # Set on the object where they are not these, so that a converted layer and its pickles are torch.nn's.
    reset_after: bool = True
    gates: str = "both"
    layer_norm: bool = False
    zoneout: float = 0.0
    recurrent_dropout: float = 0.0
    recompute: bool = False
    _variant: str | None = None

    def __init__(
        self,
        *args: Any,
        reset_after: bool = True,
        gates: str = "both",
        layer_norm: bool = False,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        recompute: bool = False,
        **kwargs: Any,
    ) -> None:
        cell = gru_cell(reset_after, gates, layer_norm)
        _TorchGRU.__init__(self, *args, **kwargs)
        if cell != "gru":
            set_options(self, reset_after=reset_after, gates=gates, layer_norm=layer_norm)
            become(self, cell)
        if zoneout or recurrent_dropout:
            set_masks(self, zoneout, recurrent_dropout)
        if recompute:
            set_recompute(self, recompute)

    @overload
    def forward(
        self, input: Tensor, hx: Tensor | None = None, *, resets: Tensor | None = None, lengths: _Lengths | None = None
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(self, input: PackedSequence, hx: Tensor | None = None) -> tuple[PackedSequence, Tensor]: ...
    def forward(self, input: Any, hx: Any = None, *, resets: Any = None, lengths: Any = None) -> Any:
        """Run the layer over a sequence; see the class."""
        return forward_layer(self, input, hx, resets, lengths)

    def flatten_parameters(self) -> None:
        """Lay the weights together for cuDNN, as torch.nn does, if it has this cell."""
        if self._variant is None:
            _TorchGRU.flatten_parameters(self)

    def reset_parameters(self) -> None:
        """Give all parameters their first values anew."""
        _TorchGRU.reset_parameters(self)
        for name, parameter in self.named_parameters():
            set_norm_weight(name, parameter)

    def extra_repr(self) -> str:
        """Show torch's options, and ours where they are not the default."""
        return ", ".join(filter(None, (_TorchGRU.extra_repr(self), options_beyond_torch(self, ALL_OPTIONS))))

    def to_torch(self) -> torch.nn.GRU:
        """Give the torch.nn.GRU that shares parameters and hooks; methods of a subclass stay behind."""
        return _as_stock(self, _TorchGRU)

    def __prepare_scriptable__(self) -> torch.nn.GRU:
        """Give torch.jit.script the stock module: it compiles Python source, of which our forward is not the kind."""
        return _as_stock(self, _TorchGRU)


class LSTM(torch.nn.LSTM):
    r"""torch.nn.LSTM with fused kernels: the same arguments, parameters, results and errors.

    For each layer and direction:

    .. math::
        i_t &= \sigma(W_{ii} x_t + b_{ii} + W_{hi} h_{t-1} + b_{hi}) \\
        f_t &= \sigma(W_{if} x_t + b_{if} + W_{hf} h_{t-1} + b_{hf}) \\
        g_t &= \tanh(W_{ig} x_t + b_{ig} + W_{hg} h_{t-1} + b_{hg}) \\
        o_t &= \sigma(W_{io} x_t + b_{io} + W_{ho} h_{t-1} + b_{ho}) \\
        c_t &= f_t \odot c_{t-1} + i_t \odot g_t \\
        h_t &= o_t \odot \tanh(c_t), \text{ projected to } W_{hr} h_t \text{ with } \texttt{proj\_size}

    Sources: Hochreiter and Schmidhuber, Neural Computation 9 (1997); the forget gate from Gers, Schmidhuber and
    Cummins, Neural Computation 12 (2000); the projection from Sak et al., arXiv:1402.1128 (2014).

    With ``coupled=True`` there is no forget gate: :math:`f_t = 1 - i_t` (Greff et al., arXiv:1503.04069, 2015: CIFG).
    With ``peephole=True`` the gates see c too (Gers, Schraudolph and Schmidhuber, JMLR 3, 2002):
    :math:`w_{ci} \odot c_{t-1}` and :math:`w_{cf} \odot c_{t-1}` join the sums of i and f,
    :math:`w_{co} \odot c_t` that of o. With ``layer_norm=True`` both products go through layer normalization, each over
    its ``4*H`` numbers, and c where it makes h (Ba, Kiros and Hinton, arXiv:1607.06450, 2016, their LSTM; its shifts
    are the biases): in the place of :math:`W_{i*} x_t` and :math:`W_{h*} h_{t-1}` come
    :math:`\gamma_i \odot LN(W_i x_t)` and :math:`\gamma_h \odot LN(W_h h_{t-1})`, and

    .. math::
        h_t &= o_t \odot \tanh(\gamma_c \odot LN(c_t) + b_c) \\
        LN(a) &= (a - \mathrm{mean}(a)) / \sqrt{\mathrm{var}(a) + 10^{-5}}

    Args:
        input_size: ``I``.
        hidden_size: ``H``.
        num_layers: ``L``; each takes the outputs of the one before.
        bias: False leaves out ``b_ih`` and ``b_hh``.
        batch_first: input and output are ``[N, T, ...]``; states stay ``[L*D, N, ...]``.
        dropout: probability of dropping an element between layers, in training, from torch's generator.
        bidirectional: ``D`` is 2: a second set of weights reads the sequence backwards, outputs side by side.
        proj_size: ``P`` if positive, smaller than ``H``; 0 for no projection (``P = H``).
        device: where the parameters live.
        dtype: float32, float64, bfloat16 or float16. The 16-bit types accumulate and keep the state in float32.
        peephole: the gates see the cell state, by a parameter more, ``weight_ch_l{k}[_reverse]`` ``[3*H]``: the weights
            of i, f and o (coupled: i and o, ``[2*H]``).
        coupled: the input gate is the forget gate's complement. The parameters hold the gates i, g, o, in this order:
            ``[3*H, ...]``.
        layer_norm: normalizes the products and c, by parameters more, ``weight_ln_ih_l{k}`` and ``weight_ln_hh_l{k}``
            ``[4*H]``, ``weight_ln_c_l{k}`` and, if there are biases, ``bias_ln_c_l{k}`` ``[H]`` (with ``_reverse`` for
            the second direction). Weights begin as ones, the bias as zeros. Not with proj_size and the two above.
        zoneout: probability of a unit keeping its old state at a step, in training by a mask of its own for each step,
            from torch's generator; in evaluation the mean of both, ``zoneout * old + (1 - zoneout) * new`` (Krueger et
            al., arXiv:1606.01305, 2016). A pair is that of h and that of c. Not with proj_size.
        recurrent_dropout: probability of dropping a unit of h where it enters the recurrent product, in training, by
            one mask for all steps of a sequence, a new one at each call (Gal and Ghahramani, arXiv:1512.05287, 2016).
        recompute: save the state between parts of the sequence only, and in the backward pass run each part's forward
            again: the same numbers for less memory and about a third more time. On the CPU.

    Call with input ``[T, N, I]``, ``[T, I]`` or a PackedSequence, and hx a pair (h_0 ``[L*D, N, P]``, c_0
    ``[L*D, N, H]``), without ``N`` for 2-D input, or None for zeros. Gives output ``[T, N, D*P]`` (``[T, D*P]``; a
    PackedSequence) and the pair (h_n, c_n) in the shapes of hx.

    ``resets``, bool ``[T, N]`` (``[N, T]`` with batch_first, ``[T]`` for 2-D input), at the input's device: where true,
    a new sequence begins at that step. The state is zero before it, and in the reverse direction, which meets the same
    boundary from the other side, after it. ``lengths``, ``[N]`` integers from 0 to ``T`` in any order (a Tensor
    anywhere, or a list): outputs are zero past a sequence's length, its final states are those of its last real step
    (its initial ones for length 0), and the reverse direction starts there; what the input holds past it is not read.

    With ``return_cells`` a third result is the cell state c of all steps of the last layer, ``[T, N, D*H]`` in the form
    of the output (zero past ``lengths``), differentiable as the others.

    Inference saves nothing for the backward pass. Training saves, besides arguments and outputs, 5 numbers per step,
    sequence and unit in the accumulating dtype (20 bytes; 40 in float64): four gates (three coupled) and the cell
    state; with a projection also the projected state; with ``layer_norm=True`` 15 in all. With ``recompute`` it
    is h and c every 8 steps (more steps with fewer than 64 sequences).

    Raises:
        ValueError: input of the wrong rank, or of another dtype than the weights; resets or lengths of the wrong shape,
            dtype, device or range, with a PackedSequence, or lengths for 2-D input.
        RuntimeError: input or hx of the wrong size, hx or a weight of the wrong dtype, device or shape, no steps.
        TypeError: input or resets that are not a tensor, hx that is not a pair of tensors.
    """

    # Set on the object where they are not these, so that a converted layer and its pickles are torch.nn's.
    peephole: bool = False
    coupled: bool = False
    layer_norm: bool = False
    zoneout: float | tuple[float, float] = 0.0
    recurrent_dropout: float = 0.0
    recompute: bool = False
    _variant: str | None = None

    def __init__(
        self,
        *args: Any,
        peephole: bool = False,
        coupled: bool = False,
        layer_norm: bool = False,
        zoneout: float | tuple[float, float] = 0.0,
        recurrent_dropout: float = 0.0,
        recompute: bool = False,
        **kwargs: Any,
    ) -> None:
        cell = lstm_cell(peephole, coupled, layer_norm)
        _TorchLSTM.__init__(self, *args, **kwargs)
        if cell != "lstm":
            set_options(self, peephole=peephole, coupled=coupled, layer_norm=layer_norm)
            become(self, cell)
        if zoneout or recurrent_dropout:
            set_masks(self, zoneout, recurrent_dropout)
        if recompute:
            set_recompute(self, recompute)

    @overload
    def forward(
        self,
        input: Tensor,
        hx: _States | None = None,
        *,
        resets: Tensor | None = None,
        lengths: _Lengths | None = None,
        return_cells: Literal[False] = False,
    ) -> tuple[Tensor, _States]: ...
    @overload
    def forward(
        self,
        input: Tensor,
        hx: _States | None = None,
        *,
        resets: Tensor | None = None,
        lengths: _Lengths | None = None,
        return_cells: Literal[True],
    ) -> tuple[Tensor, _States, Tensor]: ...
    @overload
    def forward(
        self, input: PackedSequence, hx: _States | None = None, *, return_cells: Literal[False] = False
    ) -> tuple[PackedSequence, _States]: ...
    @overload
    def forward(
        self, input: PackedSequence, hx: _States | None = None, *, return_cells: Literal[True]
    ) -> tuple[PackedSequence, _States, PackedSequence]: ...
    def forward(
        self, input: Any, hx: Any = None, *, resets: Any = None, lengths: Any = None, return_cells: bool = False
    ) -> Any:
        """Run the layer over a sequence; see the class."""
        return forward_layer(self, input, hx, resets, lengths, return_cells)

    def flatten_parameters(self) -> None:
        """Lay the weights together for cuDNN, as torch.nn does, if it has this cell."""
        if self._variant is None:
            _TorchLSTM.flatten_parameters(self)

    def reset_parameters(self) -> None:
        """Give all parameters their first values anew."""
        _TorchLSTM.reset_parameters(self)
        for name, parameter in self.named_parameters():
            set_norm_weight(name, parameter)

    def extra_repr(self) -> str:
        """Show torch's options, and ours where they are not the default."""
        return ", ".join(filter(None, (_TorchLSTM.extra_repr(self), options_beyond_torch(self, ALL_OPTIONS))))

    def to_torch(self) -> torch.nn.LSTM:
        """Give the torch.nn.LSTM that shares parameters and hooks; methods of a subclass stay behind."""
        return _as_stock(self, _TorchLSTM)

    def __prepare_scriptable__(self) -> torch.nn.LSTM:
        """Give torch.jit.script the stock module: it compiles Python source, of which our forward is not the kind."""
        return _as_stock(self, _TorchLSTM)


class RNNCell(torch.nn.RNNCell):
    r"""torch.nn.RNNCell, one step of :class:`RNN`, fused: the same arguments, parameters, results and errors.

    .. math:: h' = \phi(W_{ih} x + b_{ih} + W_{hh} h + b_{hh})

    Args:
        input_size: ``I``.
        hidden_size: ``H``.
        bias: False leaves out ``b_ih`` and ``b_hh``.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        device: where the parameters live.
        dtype: float32, float64, bfloat16 or float16.

    Call with input ``[N, I]`` or ``[I]``, and hx ``[N, H]`` or ``[H]``, or None for zeros. Gives h' in the shape of hx.

    Raises:
        ValueError: input or hx of the wrong rank.
        RuntimeError: input or hx of the wrong size or dtype, or a weight of the wrong shape.
        TypeError: input or hx that is not a tensor.
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Take one step; see the class."""
        mode = _MODE_OF_NONLINEARITY.get(self.nonlinearity)
        if mode is None:
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return forward_cell(self, mode, input, hx, None, ("hidden", ""))[0]

    def to_torch(self) -> torch.nn.RNNCell:
        """Give the torch.nn.RNNCell that shares parameters and hooks; methods of a subclass stay behind."""
        return _as_stock(self, _TorchRNNCell)

    def __prepare_scriptable__(self) -> torch.nn.RNNCell:
        """Give torch.jit.script the stock module: it compiles Python source, of which our forward is not the kind."""
        return _as_stock(self, _TorchRNNCell)


class GRUCell(torch.nn.GRUCell):
    r"""torch.nn.GRUCell, one step of :class:`GRU`, fused: the same arguments, parameters, results and errors.

    .. math::
        r &= \sigma(W_{ir} x + b_{ir} + W_{hr} h + b_{hr}) \\
        z &= \sigma(W_{iz} x + b_{iz} + W_{hz} h + b_{hz}) \\
        n &= \tanh(W_{in} x + b_{in} + r \odot (W_{hn} h + b_{hn})) \\
        h' &= (1 - z) \odot n + z \odot h

    Args:
        input_size: ``I``.
        hidden_size: ``H``.
        bias: False leaves out ``b_ih`` and ``b_hh``.
        device: where the parameters live.
        dtype: float32, float64, bfloat16 or float16.

    Call with input ``[N, I]`` or ``[I]``, and hx ``[N, H]`` or ``[H]``, or None for zeros. Gives h' in the shape of hx.

    Raises:
        ValueError: input or hx of the wrong rank.
        RuntimeError: input or hx of the wrong size or dtype, or a weight of the wrong shape.
        TypeError: input or hx that is not a tensor.
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Take one step; see the class."""
        return forward_cell(self, "GRU", input, hx, None, ("hidden", ""))[0]

    def to_torch(self) -> torch.nn.GRUCell:
        """Give the torch.nn.GRUCell that shares parameters and hooks; methods of a subclass stay behind."""
        return _as_stock(self, _TorchGRUCell)

    def __prepare_scriptable__(self) -> torch.nn.GRUCell:
        """Give torch.jit.script the stock module: it compiles Python source, of which our forward is not the kind."""
        return _as_stock(self, _TorchGRUCell)


class LSTMCell(torch.nn.LSTMCell):
    r"""torch.nn.LSTMCell, one step of :class:`LSTM`, fused: the same arguments, parameters, results and errors.

    .. math::
        i &= \sigma(W_{ii} x + b_{ii} + W_{hi} h + b_{hi}) \\
        f &= \sigma(W_{if} x + b_{if} + W_{hf} h + b_{hf}) \\
        g &= \tanh(W_{ig} x + b_{ig} + W_{hg} h + b_{hg}) \\
        o &= \sigma(W_{io} x + b_{io} + W_{ho} h + b_{ho}) \\
        c' &= f \odot c + i \odot g \\
        h' &= o \odot \tanh(c')

    Args:
        input_size: ``I``.
        hidden_size: ``H``.
        bias: False leaves out ``b_ih`` and ``b_hh``.
        device: where the parameters live.
        dtype: float32, float64, bfloat16 or float16.

    Call with input ``[N, I]`` or ``[I]``, and hx a pair (h, c), each ``[N, H]`` or ``[H]``, or None for zeros. Gives
    the pair (h', c') in the same shapes.

    Raises:
        ValueError: input, h or c of the wrong rank.
        RuntimeError: input, h or c of the wrong size or dtype, or a weight of the wrong shape.
        TypeError: input that is not a tensor, hx that is not a pair of tensors.
    """

    def forward(self, input: Tensor, hx: _States | None = None) -> _States:
        """Take one step; see the class."""
        if hx is None:
            return forward_cell(self, "LSTM", input, None, None, ("hx[0]", "hx[1]"))
        if not isinstance(hx, (tuple, list)) or len(hx) != 2:
            refuse_pair("LSTMCell", hx)
        return forward_cell(self, "LSTM", input, hx[0], hx[1], ("hx[0]", "hx[1]"))

    def to_torch(self) -> torch.nn.LSTMCell:
        """Give the torch.nn.LSTMCell that shares parameters and hooks; methods of a subclass stay behind."""
        return _as_stock(self, _TorchLSTMCell)

    def __prepare_scriptable__(self) -> torch.nn.LSTMCell:
        """Give torch.jit.script the stock module: it compiles Python source, of which our forward is not the kind."""
        return _as_stock(self, _TorchLSTMCell)


_Module = TypeVar("_Module", bound=torch.nn.Module)


def _as_stock(module: torch.nn.Module, stock: type[_Module]) -> _Module:
    """A module of class ``stock`` with ``module``'s state; parameters and hooks are shared, containers are not."""
    options = options_beyond_torch(module)
    if options:
        raise ValueError(f"{type(module).__name__}: torch.nn.{stock.__name__} has no {options}")
    cls: type[_Module] = stock
    if torch.nn.utils.parametrize.is_parametrized(module):
        # parametrize gives a module a class of its own that holds the parametrized names as properties.
        own = {name: value for name, value in vars(type(module)).items() if name not in ("__dict__", "__weakref__")}
        cls = type(f"Parametrized{stock.__name__}", (stock,), own)
    twin = cls.__new__(cls)
    twin.__dict__.update(
        {
            name: copy.copy(value) if isinstance(value, (dict, list, set)) else value
            for name, value in vars(module).items()
            if name != "recompute"
        }
    )
    return twin
