"""The autoregression head: a series' next values from its own past, around any recurrent layer of the package.

Forecasts of several steps feed each value back to the layer; that loop runs in C++ (``csrc/generate.cpp``).

Letters: ``T`` steps, ``N`` series side by side, ``F`` features of each, ``W`` windows, ``H`` hidden size.
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnnfast.call import loop_weights, refuse_loop
from rnnfast.lm import _evaluating
from rnnfast.options import cell_of
from rnnfast.text import DATA_VARIABLE, CorpusError

__all__ = ["SERIES", "Prediction", "RNNAutoRegression", "Series", "load_series", "noisy_sine"]

# Added to a predicted scale, in scaled units: a likelihood of a scale that reaches zero has no bound.
_LEAST_SCALE = 1e-4


class Prediction(NamedTuple):
    """What the next values are thought to be, in the units of the series.

    Attributes:
        mean: the expected values.
        scale: the standard deviation of each, or None without a distribution.
    """

    mean: Tensor
    scale: Tensor | None


class RNNAutoRegression(nn.Module):
    r"""Predicts the next value of a series from its last ``tau`` values, or from all before it.

    Args:
        rnn: an RNN, GRU or LSTM of one direction and any depth; its input size is ``F``. With ``batch_first``
            series, and all that is said of them below, begin with ``[N, T]`` in place of ``[T, N]``.
        tau: the number of values each prediction is made from, the layer starting from zeros (the way of Dive into
            Deep Learning, 9.1); or None: the layer reads the whole sequence and carries its state along.
        distribution: predict the scale of a normal distribution beside its mean.

    A call takes series ``[T, N, F]`` (also ``[T, N]`` or ``[T]`` where ``F`` is 1) and, without ``tau``, a state of the
    layer or None. It gives the :class:`Prediction` of the value after each step: ``[T, N, F]`` without ``tau``, and
    ``[T - tau + 1, N, F]`` with it (the first from the values ``0..tau-1``); and the layer's new state, None with
    ``tau``.

    Series are scaled inside by ``(x - shift) / spread``, buffers ``[F]`` that are 0 and 1 until :meth:`fit_scaling`.

    Raises:
        TypeError: a layer or a series of the wrong type.
        ValueError: sizes that do not fit, too few steps, a bidirectional layer.
    """

    shift: Tensor
    spread: Tensor

    def __init__(self, rnn: nn.RNNBase, tau: int | None = None, distribution: bool = False) -> None:
        super().__init__()
        if not isinstance(rnn, (nn.RNN, nn.GRU, nn.LSTM)):
            raise TypeError(f"RNNAutoRegression: rnn: expected an RNN, GRU or LSTM layer, got {type(rnn).__name__}")
        if rnn.bidirectional:
            raise ValueError("RNNAutoRegression: rnn: expected one direction, got bidirectional=True")
        if tau is not None and tau < 1:
            raise ValueError(f"RNNAutoRegression: tau: expected at least 1, or None for all values, got {tau}")
        first = rnn.weight_ih_l0
        like: dict[str, Any] = {"device": first.device, "dtype": first.dtype} if isinstance(first, Tensor) else {}
        self.rnn, self.tau, self.distribution = rnn, tau, distribution
        self.num_features = rnn.input_size
        self.output = nn.Linear(rnn.proj_size or rnn.hidden_size, self.num_features * (1 + distribution), **like)
        self.register_buffer("shift", torch.zeros(self.num_features, **like))
        self.register_buffer("spread", torch.ones(self.num_features, **like))

    def fit_scaling(self, series: Tensor) -> None:
        """Take shift and spread from series: mean and standard deviation of each feature, 1 for one that is constant.

        Give it what the model may know: the training part.
        """
        values = self._check(series, 1).flatten(0, 1)
        deviation = values.std(0, correction=0)
        self.shift.copy_(values.mean(0))
        self.spread.copy_(torch.where(deviation > 0, deviation, torch.ones_like(deviation)))

    def forward(self, series: Tensor, state: Any = None) -> tuple[Prediction, Any]:
        """Predict the value after each step; see the class."""
        scaled = self._scaled(self._check(series, self.tau or 1))
        said, state = self._said(scaled, state)
        return self._in_units(*self._parts(said), series), state

    def loss(self, series: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Predict each value from those before it; how wrong that is, and the new state.

        The squared error of the scaled values, or with a distribution their negative log likelihood (natural units,
        the constant included), the mean over all values predicted. ``series`` is ``[T, N, F]``: at least 2 steps, or
        with ``tau`` at least ``tau + 1``. The state is that before the last value, which is only predicted.
        """
        scaled = self._scaled(self._check(series, (self.tau or 1) + 1))
        said, state = self._said(scaled[:-1], state)
        mean, scale = self._parts(said)
        wanted = scaled[self.tau or 1 :]
        if scale is None:
            return F.mse_loss(mean, wanted), state
        return F.gaussian_nll_loss(mean, wanted, scale.square(), full=True, eps=_LEAST_SCALE**2), state

    def forecast(
        self,
        series: Tensor,
        num_steps: int,
        *,
        num_paths: int | None = None,
        generator: torch.Generator | None = None,
        state: Any = None,
    ) -> Prediction:
        """Continue series by ``num_steps`` values, each fed back to predict the next: a loop in C++, on the CPU.

        Args:
            series: the known values, ``[T, N, F]`` (``[T, N]``, ``[T]``); with ``tau`` only the last ``tau`` count.
            num_steps: k, at least 1.
            num_paths: None feeds the means back. A number draws so many paths from the distribution, each fed its own
                values, and needs ``distribution=True``.
            generator: of the random numbers, or None for torch's own.
            state: the layer's state before the series, without ``tau``.

        Returns:
            mean and, with a distribution, scale, ``[k, N, F]`` (``[k, N]``, ``[k]``). With paths they have a first
            dimension more, ``[num_paths, ...]``; ``mean`` then holds the values drawn, and ``scale`` the deviations
            they were drawn with.
        """
        if num_steps < 1:
            raise ValueError(f"RNNAutoRegression: num_steps: expected at least 1, got {num_steps}")
        if num_paths is not None and (num_paths < 1 or not self.distribution):
            raise ValueError(
                f"RNNAutoRegression: num_paths: expected at least 1 and distribution=True, got {num_paths} and "
                f"distribution={self.distribution}"
            )
        refuse_loop("RNNAutoRegression: forecasting", self.output.weight)
        rnn = self.rnn
        with _evaluating(self):
            scaled = self._scaled(self._check(series, self.tau or 1))
            window = head = h = c = None
            if self.tau is None:
                said, state = self._said(scaled, state)
                head = said[-1]
                h, c = [*(state if isinstance(state, tuple) else (state,)), None][:2]
            else:
                self._refuse_state(state)
                window = scaled[-self.tau :]
            if num_paths is not None:  # paths are more series side by side, path by path
                head, window, h, c = (
                    None if part is None else part.repeat(*[1] * (part.dim() - 2), num_paths, 1)
                    for part in (head, window, h, c)
                )
            weights = loop_weights(rnn)
            mean, scale = torch.ops.rnnfast._forecast.default(
                cell_of(rnn),
                window,
                head,
                h,
                c,
                weights,
                self.output.weight,
                self.output.bias,
                num_steps,
                self.distribution,
                num_paths is not None,
                _LEAST_SCALE,
                generator,
            )
            if num_paths is None:
                return self._in_units(mean, scale if self.distribution else None, series)
            shape = (num_steps, num_paths, -1, self.num_features)
            mean, scale = mean.view(shape).transpose(0, 1), scale.view(shape).transpose(0, 1)
            return self._in_units(mean, scale, series)

    def extra_repr(self) -> str:
        """Show what the submodules do not."""
        return f"tau={self.tau}, distribution={self.distribution}"

    def _check(self, series: Tensor, least_steps: int) -> Tensor:
        """The series as ``[T, N, F]``, whatever the layout of the layer."""
        if not isinstance(series, Tensor):
            raise TypeError(f"RNNAutoRegression: series: expected a Tensor, got {type(series).__name__}")
        if series.dtype != self.shift.dtype:
            raise TypeError(
                f"RNNAutoRegression: series: expected the dtype of the model, {self.shift.dtype}, got {series.dtype}"
            )
        missing = 3 - series.dim()
        if missing < 0 or series.dim() == 0 or (missing and self.num_features != 1):
            short = ", [T, N] or [T]" if self.num_features == 1 else ""
            raise ValueError(
                f"RNNAutoRegression: series: expected [T, N, F]{short} with F = {self.num_features}, "
                f"got {list(series.shape)}"
            )
        full = series.reshape(*series.shape, *[1] * missing)
        if self.rnn.batch_first and series.dim() > 1:
            full = full.transpose(0, 1)
        if full.shape[-1] != self.num_features:
            raise ValueError(
                f"RNNAutoRegression: series: expected [T, N, F] with F = {self.num_features}, got {list(series.shape)}"
            )
        if len(full) < least_steps:
            raise ValueError(f"RNNAutoRegression: series: expected at least {least_steps} steps, got {len(full)}")
        return full

    def _refuse_state(self, state: Any) -> None:
        if state is not None:
            raise ValueError("RNNAutoRegression: state: expected None with tau: each window starts from zeros")

    def _scaled(self, series: Tensor) -> Tensor:
        return (series - self.shift) / self.spread

    def _said(self, scaled: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The output layer after each step (each window), and the new state."""
        if self.tau is None:
            hidden, state = self._run(scaled, state)
            return self.output(hidden), state
        self._refuse_state(state)
        windows = scaled.unfold(0, self.tau, 1).permute(3, 0, 1, 2)  # [tau, W, N, F]
        hidden, _ = self._run(windows.flatten(1, 2), None)
        return self.output(hidden[-1]).view(*windows.shape[1:3], -1), None

    def _run(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The layer on ``[T, N, F]`` to ``[T, N, P]``, whatever its layout."""
        if not self.rnn.batch_first:
            output, state = self.rnn(x, state)
            return output, state
        output, state = self.rnn(x.transpose(0, 1), state)
        return output.transpose(0, 1), state

    def _parts(self, said: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and scale, in scaled units, of what the output layer said."""
        if not self.distribution:
            return said, None
        mean, raw = said.chunk(2, -1)
        return mean, F.softplus(raw) + _LEAST_SCALE

    def _in_units(self, mean: Tensor, scale: Tensor | None, like: Tensor) -> Prediction:
        """In the units of the series, and with as many dimensions behind the steps."""
        mean = mean * self.spread + self.shift
        scale = None if scale is None else scale * self.spread
        if self.rnn.batch_first and like.dim() > 1:  # steps are the third dimension from the end
            mean, scale = mean.transpose(-3, -2), None if scale is None else scale.transpose(-3, -2)
        for _ in range(3 - like.dim()):
            mean, scale = mean.squeeze(-1), None if scale is None else scale.squeeze(-1)
        return Prediction(mean, scale)


# --- Series -----------------------------------------------------------------------------------------------------------


def noisy_sine(
    num_steps: int = 1000,
    noise: float = 0.2,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``sin(0.01 t) + noise * normal`` for t = 1 .. ``num_steps``, ``[num_steps]``.

    The series of Dive into Deep Learning, 9.1 (there with tau 4 and 600 values to train on).
    """
    time = torch.arange(1, num_steps + 1, dtype=dtype or torch.get_default_dtype())
    return torch.sin(0.01 * time) + noise * torch.randn(num_steps, generator=generator, dtype=time.dtype)


@dataclass(frozen=True)
class Series:
    """A measured series that is known by name.

    Attributes:
        name: what :func:`load_series` is called with.
        title: what was measured, where and in which units.
        file_name: its name in the data directory.
        sha256: digest of the file.
        columns: the columns of numbers, from 0. Several are read row by row, one after the other in time.
        header: number of lines before the numbers.
    """

    name: str
    title: str
    file_name: str
    sha256: str
    columns: tuple[int, ...]
    header: int = 1


SERIES: Mapping[str, Series] = {
    series.name: series
    for series in (
        Series(
            "sunspots",
            "monthly sunspot number, 1749 to 2008 (NOAA)",
            "sunspots_monthly.csv",
            "a9730a5a0626d1d6b92ebe394763f9be49d98031e786558baa9bf23393ff02c3",
            (1,),
        ),
        Series(
            "el-nino",
            "monthly sea-surface temperature of the El Nino region, degrees Celsius, from 1950 (NOAA)",
            "elnino.csv",
            "b647be00e0fd264be9764e317e6b963f35030014ecca2b21b204521716e463ad",
            tuple(range(1, 13)),
        ),
        Series(
            "co2",
            "monthly CO2 at Mauna Loa, parts per million, from 1958 (NOAA)",
            "co2_mm_mlo.csv",
            "46c07e9423aa6ca0723bf6e892ba0ade1488ca6f7d3f14aa0cddd10272fbe59b",
            (2,),
        ),
    )
}


def load_series(name: str, *, dtype: torch.dtype | None = None) -> Tensor:
    """Read a measured series, ``[T]``, from the directory that ``RNNFAST_DATA`` names.

    Raises:
        CorpusError: an unknown name; the directory is not set or lacks the file; the file is not the one it should be.
    """
    series = SERIES.get(name)
    if series is None:
        raise CorpusError(f"series {name!r} is none of the known ones: {', '.join(SERIES)}")
    wanted = f"{series.file_name} ({series.title}; sha256 {series.sha256})"
    data = os.environ.get(DATA_VARIABLE)
    path = Path(data or "", series.file_name)
    if not data or not path.is_file():
        raise CorpusError(f"series {name!r}: put {wanted} in a directory and set {DATA_VARIABLE} to it")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error}") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != series.sha256:
        raise CorpusError(f"{path} is not the series it should be: expected {wanted}, found sha256 {digest}")
    rows = list(csv.reader(content.decode("utf-8").splitlines()))[series.header :]
    values = [float(row[column]) for row in rows for column in series.columns]
    return torch.tensor(values, dtype=dtype or torch.get_default_dtype())
