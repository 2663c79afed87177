"""The layers of a module one step at a time, for real-time use: audio, control, text as it is typed.

A step of a module goes through Python, torch's dispatcher and checks of every argument, and reads its weights where
they lie. A :class:`Decoder` has all that behind it after its construction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rnnfast import _C
from rnnfast.call import loop_weights
from rnnfast.options import cell_of

__all__ = ["Decoder"]

_State = Tensor | tuple[Tensor, Tensor]


class Decoder(_C.Decoder):
    """Takes a layer, ours or torch.nn's, one step at a time.

    The weights are a snapshot in an order of its own: as many bytes again as the layer has (in float32 for the 16-bit
    types), and later changes of the layer are not seen before :meth:`refresh`. Steps run as in evaluation: without
    dropout, zoneout by its mean. They give no gradients. They release the interpreter's lock; threads that call the
    same decoder take turns. A step takes as many threads as torch was set to at the construction, where they pay.

    Args:
        layer: RNN, GRU or LSTM on the CPU, of any number of layers, one direction, any option and dtype.
        batch_size: ``N`` independent sequences, each with its state; None for one without that dimension.

    Raises:
        TypeError: layer that is none of these.
        ValueError: a bidirectional layer, which would have to know the future; batch_size below 1.
        RuntimeError: weights of the wrong shape or device.

    >>> layer = rnnfast.LSTM(64, 256, num_layers=2)
    >>> decoder = rnnfast.Decoder(layer)
    >>> output = decoder.step(torch.randn(64))
    """

    layer: torch.nn.RNNBase
    batch_size: int | None

    def __init__(self, layer: torch.nn.RNNBase, batch_size: int | None = None) -> None:
        if not isinstance(layer, torch.nn.RNNBase):
            raise TypeError(f"Decoder: layer must be an RNN, GRU or LSTM, got {type(layer).__name__}")
        if layer.bidirectional:
            raise ValueError("Decoder: layer must have one direction: the other would begin at the end of the sequence")
        if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int)):
            raise TypeError(f"Decoder: batch_size must be an int or None, got {type(batch_size).__name__}")
        super().__init__(*self._weights(layer), batch_size)
        self.layer, self.batch_size = layer, batch_size

    @staticmethod
    def _weights(layer: torch.nn.RNNBase) -> tuple[str, Sequence[Tensor | None]]:
        with torch.no_grad():
            return cell_of(layer), loop_weights(layer)

    def refresh(self) -> None:
        """Take the layer's weights as they are now; the state stays.

        Raises:
            ValueError: weights of another dtype or size than before.
        """
        self.load(*self._weights(self.layer))

    @property
    def state(self) -> Any:
        """The state as a new hx of the layer: h ``[L, N, P]``, of an LSTM the pair of h and c ``[L, N, H]``.

        Without ``N`` where batch_size is None. May be set to such a value, which is copied; begins as zeros.
        """
        h, c = self.get_state()
        return h if c is None else (h, c)

    @state.setter
    def state(self, value: _State) -> None:
        if isinstance(value, Tensor):
            self.set_state(value, None)
        elif isinstance(value, (tuple, list)) and len(value) == 2:
            self.set_state(*value)
        else:
            raise TypeError(f"Decoder.state: expected h or a pair (h, c) of Tensors, got {type(value).__name__}")

    def __reduce__(self) -> Any:
        """Refuse pickle and copy: nothing tells whether the layer's weights are still those of the snapshot."""
        raise TypeError("a Decoder cannot be pickled or copied: make another of the layer, and give it the state")

    def __repr__(self) -> str:
        return f"Decoder({self.layer!r}, batch_size={self.batch_size})"
