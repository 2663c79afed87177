"""The autoregression head: windows, whole sequences, forecasts, distributions, scaling; and the known series."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

import rnnfast
from rnnfast import RNNAutoRegression
from rnnfast.forecast import SERIES, load_series, noisy_sine
from rnnfast.text import CorpusError

LAYERS = {
    "RNN": rnnfast.RNN,
    "GRU": rnnfast.GRU,
    "LSTM": rnnfast.LSTM,
    "LSTM projected": lambda *args, **options: rnnfast.LSTM(*args, proj_size=3, **options),
    "torch.nn.LSTM": torch.nn.LSTM,
}


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param]


# On a CUDA device too. Not what is about the loop that continues a series: it is of the CPU.
on_device = pytest.mark.usefixtures("default_device")


def scaled_model(layer, features=2, tau=None, distribution=False, num_layers=2):
    model = RNNAutoRegression(layer(features, 6, num_layers=num_layers).double(), tau, distribution)
    model.fit_scaling(torch.randn(50, 4, features, dtype=torch.float64) * 3 + 7)
    return model


@on_device
@pytest.mark.parametrize("distribution", [False, True])
def test_windows_are_predicted_each_from_its_own_values(layer, distribution):
    model = scaled_model(layer, tau=3, distribution=distribution)
    series = torch.randn(9, 4, 2, dtype=torch.float64)
    prediction, state = model(series)
    assert state is None
    assert prediction.mean.shape == (7, 4, 2)
    for first in range(7):
        alone, _ = model(series[first : first + 3])
        torch.testing.assert_close(prediction.mean[first], alone.mean[0])
        changed = series.clone()
        changed[:first] += 1
        changed[first + 3 :] += 1
        assert model(changed)[0].mean[first].equal(prediction.mean[first])


@on_device
@pytest.mark.parametrize("distribution", [False, True])
def test_whole_sequences_carry_their_state(layer, distribution):
    model = scaled_model(layer, distribution=distribution)
    series = torch.randn(9, 4, 2, dtype=torch.float64)
    whole, _ = model(series)
    assert whole.mean.shape == (9, 4, 2)
    assert (whole.scale is not None) == distribution
    first, state = model(series[:4])
    second, _ = model(series[4:], state)
    torch.testing.assert_close(torch.cat([first.mean, second.mean]), whole.mean)


@pytest.mark.parametrize("tau", [None, 3])
@pytest.mark.parametrize("features", [1, 2])
def test_batch_first_is_the_same_the_other_way_round(layer, tau, features):
    plain = scaled_model(layer, features, tau=tau, distribution=True)
    turned = RNNAutoRegression(layer(features, 6, num_layers=2, batch_first=True).double(), tau, True)
    turned.load_state_dict(plain.state_dict())
    series = torch.randn(9, 4, features, dtype=torch.float64)
    for shape in ([9, 4, features], [9, 4], [9]) if features == 1 else ([9, 4, 2],):
        values = series.flatten()[: torch.Size(shape).numel()].view(shape)
        other = values.transpose(0, 1) if len(shape) > 1 else values

        def back(t, shape=shape):
            return t.transpose(-len(shape), -len(shape) + 1) if len(shape) > 1 else t

        for a, b in zip(turned(other)[0], plain(values)[0], strict=True):
            torch.testing.assert_close(back(a), b)
        torch.testing.assert_close(turned.loss(other)[0], plain.loss(values)[0])
        for options in ({}, {"num_paths": 3}):
            generators = [torch.Generator().manual_seed(0) for _ in range(2)]
            ours = turned.forecast(other, 5, **options, generator=generators[0])
            wanted = plain.forecast(values, 5, **options, generator=generators[1])
            for a, b in zip(ours, wanted, strict=True):
                assert back(a).shape == b.shape
                torch.testing.assert_close(back(a), b)
    turned.fit_scaling(series.transpose(0, 1) * 2)
    plain.fit_scaling(series * 2)
    torch.testing.assert_close(turned.spread, plain.spread)


def python_forecast(model, series, num_steps):
    """What forecast must give, a step of Python a value."""
    shift, spread = model.shift, model.spread
    with torch.no_grad():
        scaled = (series - shift) / spread
        means, scales, state = [], [], None
        output = None
        for step in range(num_steps):
            if model.tau is not None:
                output, _ = model.rnn(scaled[-model.tau :])
                said = model.output(output[-1])
            elif step == 0:
                output, state = model.rnn(scaled)
                said = model.output(output)[-1]
            else:
                output, state = model.rnn(scaled[-1:], state)
                said = model.output(output)[-1]
            features = model.num_features
            means.append(said[:, :features])
            if model.distribution:
                scales.append(F.softplus(said[:, features:]) + 1e-4)
            scaled = torch.cat([scaled, means[-1][None]])
        return torch.stack(means) * spread + shift, torch.stack(scales) * spread if scales else None


@pytest.mark.parametrize("tau", [None, 1, 4])
@pytest.mark.parametrize("distribution", [False, True])
@pytest.mark.parametrize("batch", [1, 4, 12])
def test_forecast_is_the_python_loop_exactly(tau, distribution, batch):
    for make in (rnnfast.RNN, rnnfast.GRU, rnnfast.LSTM, LAYERS["LSTM projected"]):
        model = scaled_model(make, tau=tau, distribution=distribution)
        series = torch.randn(6, batch, 2, dtype=torch.float64)
        mean, scale = model.forecast(series, 10)
        wanted_mean, wanted_scale = python_forecast(model, series, 10)
        assert mean.equal(wanted_mean)
        assert not mean.requires_grad
        assert scale is None if wanted_scale is None else scale.equal(wanted_scale)
        torch.testing.assert_close(mean[0], model(series)[0].mean[-1])


def test_forecast_continues_a_state():
    model = scaled_model(rnnfast.LSTM)
    series = torch.randn(8, 3, 2, dtype=torch.float64)
    _, state = model(series[:5])
    torch.testing.assert_close(model.forecast(series[5:], 4, state=state).mean, model.forecast(series, 4).mean)


@pytest.mark.parametrize("tau", [None, 3])
def test_paths_are_drawn_from_the_distribution(tau):
    """The first step's mean and deviation, within five standard errors; the same seed draws the same paths."""
    model = scaled_model(rnnfast.GRU, tau=tau, distribution=True)
    series = torch.randn(5, 3, 2, dtype=torch.float64) + 7

    def draw(seed):
        return model.forecast(series, 4, num_paths=4000, generator=torch.Generator().manual_seed(seed))

    paths, scales = draw(0)
    assert paths.shape == scales.shape == (4000, 4, 3, 2)
    expected = model(series)[0]
    mean, scale = expected.mean[-1], expected.scale[-1]
    torch.testing.assert_close(scales[:, 0], scale.expand(4000, 3, 2))
    assert ((paths[:, 0].mean(0) - mean).abs() < 5 * scale / 4000**0.5).all()
    assert ((paths[:, 0].std(0) / scale - 1).abs() < 5 / 8000**0.5).all()
    assert scales[:, 3].std(0).min() > 0, "each path must be fed its own values"
    assert paths.equal(draw(0).mean)
    assert not paths.equal(draw(1).mean)


@on_device
@pytest.mark.parametrize("tau", [None, 3])
def test_loss_is_that_of_the_one_step_predictions(tau):
    series = torch.randn(9, 4, 2, dtype=torch.float64) + 7
    for distribution in (False, True):
        model = scaled_model(rnnfast.GRU, tau=tau, distribution=distribution)
        loss, _ = model.loss(series)
        prediction, _ = model(series[:-1])
        errors = (series[tau or 1 :] - prediction.mean) / model.spread
        if distribution:
            normal = torch.distributions.Normal(0, prediction.scale / model.spread)
            wanted = -normal.log_prob(errors).mean()
        else:
            wanted = errors.square().mean()
        torch.testing.assert_close(loss, wanted)
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


def test_shapes_with_one_feature():
    for tau in (None, 3):
        model = RNNAutoRegression(rnnfast.GRU(1, 4), tau, True)
        full = torch.randn(8, 2, 1)
        wanted = model(full)[0]
        assert model(full[..., 0])[0].mean.equal(wanted.mean[..., 0])
        torch.testing.assert_close(model(full[:, 0, 0])[0].scale, wanted.scale[:, 0, 0])
        assert model.forecast(full[..., 0], 5).mean.shape == (5, 2)
        assert model.forecast(full[:, 0, 0], 5).mean.shape == (5,)
        assert model.forecast(full[:, 0, 0], 5, num_paths=7).mean.shape == (7, 5)


@on_device
def test_scaling():
    model = RNNAutoRegression(rnnfast.GRU(2, 4))
    series = torch.stack([torch.randn(500) * 3 + 7, torch.full((500,), 2.0)], -1)[:, None]
    model.fit_scaling(series)
    torch.testing.assert_close(model.shift, torch.stack([series[..., 0].mean(), torch.tensor(2.0)]))
    torch.testing.assert_close(model.spread, torch.stack([series[..., 0].std(correction=0), torch.tensor(1.0)]))
    other = RNNAutoRegression(rnnfast.GRU(2, 4))
    other.load_state_dict(model.state_dict())
    assert other(series)[0].mean.equal(model(series)[0].mean)
    assert (model(series)[0].mean[..., 1] - 2).abs().max() < 2


def test_it_learns_the_noisy_sine():
    """The series of Dive into Deep Learning: 600 values to train on; one step ahead the error nears the noise's."""
    series = noisy_sine(generator=torch.Generator().manual_seed(1))
    assert series.shape == (1000,)
    assert noisy_sine(300, 0.0, dtype=torch.float64)[99] == torch.sin(torch.tensor(1.0, dtype=torch.float64))
    model = RNNAutoRegression(rnnfast.GRU(1, 16), tau=4)
    model.fit_scaling(series[:604])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        loss, _ = model.loss(series[:604])
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        error = (model(series[600:-1])[0].mean - series[604:]).square().mean().sqrt()
    naive = (series[604:] - series[603:-1]).square().mean().sqrt()
    assert error < 0.26 < naive


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda m, w: m(torch.zeros(5, 3, 3)), ValueError, r"expected \[T, N, F\] with F = 2, got \[5, 3, 3\]"),
        (lambda m, w: m(torch.zeros(5, 3)), ValueError, r"expected \[T, N, F\] with F = 2, got \[5, 3\]"),
        (lambda m, w: m(torch.zeros(1, 5, 3, 2)), ValueError, "with F = 2"),
        (lambda m, w: m(torch.zeros(5, 3, 2).double()), TypeError, "expected the dtype of the model, torch.float32"),
        (lambda m, w: m([1.0]), TypeError, "series: expected a Tensor, got list"),
        (lambda m, w: m(torch.zeros(0, 3, 2)), ValueError, "expected at least 1 steps, got 0"),
        (lambda m, w: m.loss(torch.zeros(1, 3, 2)), ValueError, "expected at least 2 steps, got 1"),
        (lambda m, w: w(torch.zeros(3, 3, 2)), ValueError, "expected at least 4 steps, got 3"),
        (lambda m, w: w.loss(torch.zeros(4, 3, 2)), ValueError, "expected at least 5 steps, got 4"),
        (lambda m, w: w.forecast(torch.zeros(3, 3, 2), 1), ValueError, "expected at least 4 steps, got 3"),
        (lambda m, w: m.forecast(torch.zeros(3, 3, 2), 0), ValueError, "num_steps: expected at least 1, got 0"),
        (
            lambda m, w: m.forecast(torch.zeros(3, 3, 2), 1, num_paths=3),
            ValueError,
            "num_paths: expected .*distribution",
        ),
        (lambda m, w: w(torch.zeros(5, 3, 2), torch.zeros(1, 3, 4)), ValueError, "state: expected None with tau"),
        (lambda m, w: w.forecast(torch.zeros(5, 3, 2), 2, state=torch.zeros(1, 3, 4)), ValueError, "state: expected"),
        (lambda m, w: m(torch.zeros(5, 3, 2), torch.zeros(1, 2, 4)), RuntimeError, r"Expected hidden size \(1, 3, 4\)"),
        (lambda m, w: RNNAutoRegression(rnnfast.GRU(2, 4, bidirectional=True)), ValueError, "expected one direction"),
        (lambda m, w: RNNAutoRegression(rnnfast.GRU(2, 4), 0), ValueError, "tau: expected at least 1"),
        (lambda m, w: RNNAutoRegression(torch.nn.Linear(2, 4)), TypeError, "expected an RNN, GRU or LSTM layer"),
    ],
)
def test_refusals(call, error, match):
    with pytest.raises(error, match=match):
        call(RNNAutoRegression(rnnfast.GRU(2, 4)), RNNAutoRegression(rnnfast.GRU(2, 4), tau=4))


def test_forecasting_is_on_the_cpu():
    """Of a model that is elsewhere: the error says where to move it."""
    model = RNNAutoRegression(rnnfast.GRU(2, 4, device="meta"))
    with pytest.raises(RuntimeError, match=r"forecasting runs on the CPU: move the model there, .*; it is on meta"):
        model.forecast(torch.zeros(5, 3, 2, device="meta"), 2)


def test_series_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(CorpusError, match="series 'tides' is none of the known ones: sunspots, el-nino, co2"):
        load_series("tides")
    monkeypatch.delenv("RNNFAST_DATA", raising=False)
    with pytest.raises(CorpusError, match=r"put sunspots_monthly\.csv .* and set RNNFAST_DATA to it"):
        load_series("sunspots")
    monkeypatch.setenv("RNNFAST_DATA", str(tmp_path))
    with pytest.raises(CorpusError, match=r"put sunspots_monthly\.csv"):
        load_series("sunspots")
    (tmp_path / "sunspots_monthly.csv").write_text("month,sunspots\n1749-01,58.0\n")
    with pytest.raises(CorpusError, match=r"is not the series it should be: expected .* found sha256"):
        load_series("sunspots")


@pytest.mark.skipif(not os.environ.get("RNNFAST_DATA"), reason="RNNFAST_DATA is not set")
@pytest.mark.parametrize(
    ("name", "first", "last", "bounds"),
    [
        ("sunspots", 58.0, None, (0, 260)),
        ("el-nino", 23.11, 22.07, (17, 31)),
        ("co2", 315.71, 431.44, (310, 440)),
    ],
)
def test_real_series(name, first, last, bounds):
    assert set(SERIES) == {"sunspots", "el-nino", "co2"}
    series = load_series(name, dtype=torch.float64)
    assert series.dim() == 1
    assert len(series) > 700
    assert series[0] == first
    assert last is None or series[-1] == last
    assert bounds[0] <= series.min() < series.max() <= bounds[1]
