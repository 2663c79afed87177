"""benchmarks/layers.py: no speed for a wrong result, and short runs as a user starts them."""

import csv
import itertools
import json

import cases
import layers
import pytest
import readme_table
import torch
from benchmark_runs import CPU, ON_CPU, SMALL, run

from rnnfast import _C


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list(cases.CELLS))
def test_agreement_is_found(name, dtype):
    ours, theirs = layers.build_pair(SMALL, cases.CELLS[name], CPU, dtype)
    assert type(ours).__module__.startswith("rnnfast")
    layers.check_agreement(ours, theirs, torch.randn(SMALL.T, SMALL.N, SMALL.I, dtype=dtype))


class WrongOutput(torch.nn.GRU):
    def forward(self, input, hx=None):
        output, h_n = super().forward(input, hx)
        return output * (1 + 1e-5), h_n


class WrongState(torch.nn.GRU):
    def forward(self, input, hx=None):
        output, h_n = super().forward(input, hx)
        return output, h_n.flip(0)


class NotFinite(torch.nn.GRU):
    def forward(self, input, hx=None):
        output, h_n = super().forward(input, hx)
        return output.where(output < output.max(), float("nan")), h_n


class WrongInInference(torch.nn.GRU):
    def forward(self, input, hx=None):
        output, h_n = super().forward(input, hx)
        return (output if torch.is_grad_enabled() else output + 1e-4), h_n


class WrongShape(torch.nn.GRU):
    def forward(self, input, hx=None):
        output, h_n = super().forward(input, hx)
        return output.transpose(0, 1), h_n


class WrongGradient(torch.nn.GRU):
    def forward(self, input, hx=None):
        output, h_n = super().forward(input, hx)
        # The value is untouched; a thousandth of the gradient is lost.
        return output - 1e-3 * (output - output.detach()), h_n


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (WrongOutput, "^output: error 1e-05 against float64"),
        (WrongState, "^h_n: "),
        (NotFinite, "^output: error nan"),
        (WrongInInference, "^output in inference: "),
        (WrongGradient, "^gradient of input: error "),
        (WrongShape, r"^output: \(3, 5, 12\) where torch.nn has \(5, 3, 12\)"),
    ],
)
def test_wrong_results_are_refused(wrong, message):
    ours, theirs = layers.build_pair(SMALL, cases.CELLS["gru"], CPU, torch.float32)
    ours.__class__ = wrong
    with pytest.raises(layers.WrongResultError, match=message):
        layers.check_agreement(ours, theirs, torch.randn(SMALL.T, SMALL.N, SMALL.I))


@pytest.mark.parametrize(("name", "attempts"), [("rnn_relu", layers.RELU_ATTEMPTS), ("gru", 1)])
def test_only_relu_gets_another_input(monkeypatch, name, attempts):
    """Its kink makes a right gradient differ; what differs for every input is wrong all the same."""
    inputs = []

    def refuse(ours, theirs, input):
        inputs.append(input)
        raise layers.WrongResultError("gradient of input")

    monkeypatch.setattr(layers, "check_agreement", refuse)
    (row,) = layers.measure_case(SMALL, cases.CELLS[name], ["inference"], CPU, torch.float32, 0.01)
    assert row["status"] == "wrong: gradient of input"
    assert len(inputs) == attempts
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(inputs, 2))


def test_no_time_for_a_wrong_result(monkeypatch, tmp_path, capsys):
    pytest.importorskip("tqdm")
    build_pair = layers.build_pair

    def build_wrong_pair(*arguments):
        ours, theirs = build_pair(*arguments)
        ours.__class__ = WrongOutput
        return ours, theirs

    monkeypatch.setattr(layers, "build_pair", build_wrong_pair)
    monkeypatch.setattr(layers, "interleave", lambda *_: pytest.fail("a wrong result was timed"))
    arguments = ["--cells", "gru", "--cases", "forecast-h25", "--threads", "1", "--output", str(tmp_path)]
    assert layers.main(arguments) == 1
    printed = capsys.readouterr()
    assert "wrong: output" in printed.out
    assert "2 of 2 rows have wrong results" in printed.err
    with open(tmp_path / f"layers-{ON_CPU}-float32-1t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["mode"] for row in rows] == ["inference", "training"]
    for row in rows:
        assert row["status"].startswith("wrong: output")
        assert row["ratio"] == row["rnnfast_ms"] == ""


def test_layers_from_end_to_end(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    shapes = ("--cases", "step-h64", "forecast-h25", "--cells", "rnn", "lstm")
    done = run("layers.py", "--quick", *shapes, "--seconds", "0.02", "--threads", "1", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "geometric mean" in done.stdout
    with open(tmp_path / f"layers-quick-{ON_CPU}-float32-1t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["cell"], row["mode"]) for row in rows] == [
        (case, cell, mode)
        for case in ("step-h64", "forecast-h25")
        for cell in ("rnn_tanh", "lstm")
        for mode in ("inference", "training")
    ]
    for row in rows:
        assert row["status"] == "ok"
        assert float(row["rnnfast_ms"]) > 0
        assert float(row["ratio_low"]) <= float(row["ratio"]) <= float(row["ratio_high"])
    description = json.loads((tmp_path / f"layers-quick-{ON_CPU}-float32-1t.json").read_text())
    assert (description["threads"], description["dtype"]) == (1, "float32")
    assert (tmp_path / f"layers-quick-{ON_CPU}-float32-1t.png").read_bytes().startswith(b"\x89PNG")


def test_layers_with_prepacked_weights(monkeypatch, tmp_path):
    """Inference alone, of layers whose weights are kept, in files that say so."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    used = []
    make_call = layers.make_call

    def watched(layer, mode, *tensors):
        used.append((type(layer).__module__.partition(".")[0], mode, _C.is_prepacked(layer.weight_hh_l0)))
        return make_call(layer, mode, *tensors)

    monkeypatch.setattr(layers, "make_call", watched)
    arguments = ["--quick", "--prepack", "--cases", "step-h64", "--cells", "gru", "--seconds", "0.01", "--threads", "1"]
    assert layers.main([*arguments, "--output", str(tmp_path)]) == 0
    assert used == [("rnnfast", "inference", True), ("torch", "inference", False)]
    (description,) = tmp_path.glob("*.json")
    assert description.stem == f"layers-quick-{ON_CPU}-prepack-float32-1t"
    assert "weights prepacked" in readme_table.format_run(json.loads(description.read_text()))
