"""The benchmarks: sane shapes, no speed for a wrong result, clear errors, and short runs from end to end."""

import csv
import importlib
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import rnnfast
from rnnfast import _C

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"

# The scripts import one another by bare names, as Python does for a script's own folder.
sys.path.insert(0, str(BENCHMARKS))
cases = importlib.import_module("cases")
measure = importlib.import_module("measure")
layers = importlib.import_module("layers")
language_model = importlib.import_module("language_model")
features = importlib.import_module("features")
heads = importlib.import_module("heads")
latency = importlib.import_module("latency")
memory = importlib.import_module("memory")
readme_table = importlib.import_module("readme_table")
scaling = importlib.import_module("scaling")
transforms = importlib.import_module("transforms")

SMALL = cases.Case("small", 5, 3, 4, 6, 2, 2, "made up for the tests")
CPU = torch.device("cpu")
ON_CPU = f"cpu-{measure.describe_run(CPU, torch.float32, 1)['instruction_set']}"


# cases.py


def test_cases_are_sane():
    names = [case.name for case in cases.CASES]
    assert len(names) == len(set(names))
    assert 18 <= len(names) <= 25
    for case in cases.CASES:
        assert min(case.T, case.N, case.I, case.H, case.L) >= 1
        assert case.D in (1, 2)
        assert case.source
        assert cases.find_case(case.name) is case
    assert 3 <= sum(case.quick for case in cases.CASES) <= 8
    shapes = {(case.T, case.N, case.I, case.H) for case in cases.CASES}
    assert {(1, 1, 64, 64), (1, 1, 256, 256), (1, 1, 1024, 1024), (32, 1024, 28, 32), (25, 64, 512, 512)} <= shapes


def test_cells_are_those_of_the_extension():
    gates = {cell["name"]: cell["num_gates"] for cell in _C.cells()}
    for name, cell in cases.CELLS.items():
        assert gates[name] == cell.num_gates
    assert set(cases.DEFAULT_CELLS) <= set(cases.CELLS)


def test_find_names_the_choices():
    assert [cell.name for cell in cases.find_cells(["rnn", "gru", "rnn_tanh"])] == ["rnn_tanh", "gru"]
    with pytest.raises(KeyError, match="no cell 'lstn'; choose from rnn, rnn_tanh, rnn_relu, gru, lstm"):
        cases.find_cells(["gru", "lstn"])
    with pytest.raises(KeyError, match=r"no case 'd3l'; choose from .*d2l"):
        cases.find_case("d3l")


def test_cuda_cases_are_sane():
    names = [case.name for case in (*cases.CASES, *cases.CUDA_CASES)]
    assert len(names) == len(set(names))
    assert 1 <= sum(case.quick for case in cases.CUDA_CASES) < len(cases.CUDA_CASES)
    for case in cases.CUDA_CASES:
        assert cases.find_case(case.name) is case
        assert case.T >= 64 and 1 <= case.N <= 64 and 256 <= case.H <= 1024
    assert {case.H for case in cases.CUDA_CASES} >= {256, 512, 1024}


def test_product_flops():
    case = cases.Case("x", 10, 2, 3, 5, 2, 2, "")
    # Layer 0: 3 gates of 5 units in 2 directions, each with 3 inputs and 5 units; layer 1 has 10 inputs.
    expected = 10 * 2 * 2 * (3 * 5 * 2 * (3 + 5) + 3 * 5 * 2 * (10 + 5))
    assert cases.product_flops(case, cases.CELLS["gru"], training=False) == expected
    assert cases.product_flops(case, cases.CELLS["gru"], training=True) == 3 * expected


def test_columns_of_a_device():
    """What only a row of a CUDA run has: its parts run on the CPU too."""
    floors = [layers.floor_seconds(SMALL, cases.CELLS["gru"], mode, CPU, torch.float32) for mode in layers.MODES]
    assert all(seconds > 0 for seconds in floors)
    row = dict.fromkeys(layers.CUDA_FIELDS, 1.0) | {"case": "t64-n16-h256", "status": "ok"}
    row |= {"cell": "gru", "mode": "training", "step_us": 2.5, "floor_us": 0.125}
    line = layers.format_row(row)
    assert line.split()[-2:] == ["2.5", "0.125"]
    assert len(line) == len(layers.CUDA_HEADING)
    del row["step_us"], row["floor_us"]
    assert len(layers.format_row(row)) == len(layers.HEADING)


# measure.py


class Clock:
    """Time that passes only when a call says so, in place of the module `time` in measure.py."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def spend(self, *seconds):
        """A call that takes the given times in turn."""
        times = itertools.cycle(seconds)

        def call():
            self.now += next(times)

        return call


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(measure, "time", clock)
    return clock


def test_interleave_measures_the_ratio(clock):
    paired = measure.interleave(clock.spend(0.25), clock.spend(1.0), 1e9, CPU)
    assert (paired.ours, paired.theirs) == (0.25, 1.0)
    assert paired.ratio == paired.low == paired.high == 4.0
    assert paired.pairs == 15, "times that never vary are settled as soon as they may be"


def test_interleave_stops_when_the_time_is_spent(clock):
    paired = measure.interleave(clock.spend(1.0), clock.spend(1.0, 2.0, 3.0, 5.0, 8.0), 20.0, CPU)
    assert 5 <= paired.pairs <= 8
    assert paired.low < paired.ratio < paired.high
    assert measure.interleave(clock.spend(100.0), clock.spend(100.0), 1.0, CPU).pairs == 5


def test_interleave_repeats_short_calls_within_a_turn(clock):
    short, calls = clock.spend(2.0**-20), 0

    def counted():
        nonlocal calls
        calls += 1
        short()

    paired = measure.interleave(counted, clock.spend(1.0), 0.0, CPU)
    assert calls >= paired.pairs * 1000
    assert math.isclose(paired.ours, 2.0**-20)


def test_all_take_turns(clock):
    """Each begins a round in its turn, and every ratio is to the first."""
    order = []

    def turn(name, seconds):
        def take():
            order.append(name)
            return clock.spend(seconds)() or seconds

        return take

    times = measure.take_turns([turn("a", 1.0), turn("b", 2.0), turn("c", 0.5)], 1e9)
    assert order[:9] == list("abcbcacab")
    assert times == [(1.0, 2.0, 0.5)] * 15, "times that never vary are settled as soon as they may be"
    assert [measure.pair(times, other).ratio for other in (1, 2)] == [2.0, 0.5]


def test_a_turn_is_prepared_outside_the_clock(clock):
    events = []

    def call():
        events.append("call")
        clock.spend(0.25)()

    turn = measure.make_turn(call, CPU, 1.0, lambda: events.append("prepare"))
    events.clear()
    assert turn() == 0.25
    assert events == ["prepare", *["call"] * 5], "one call that is not timed, then four of a quarter of a second"


def test_quartiles():
    assert measure.quartiles([2.0]) == (2.0, 2.0, 2.0)
    assert measure.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
    assert math.isclose(measure.geometric_mean([1.0, 4.0]), 2.0)


def test_description_is_json_and_complete():
    run = json.loads(json.dumps(measure.describe_run(CPU, torch.float32, 2)))
    assert run["torch"] == torch.__version__
    assert run["rnnfast"] == rnnfast.__version__
    assert run["instruction_set"] == _C.get_isa()
    assert re.fullmatch(r"unknown|[0-9a-f]{40}(-dirty)?", run["git_sha"])
    assert run["machine"]


@pytest.mark.skipif(measure.OtherWork().cores() is None, reason="the system does not tell")
@pytest.mark.parametrize(("busy", "threads", "warned"), [(0.05, 2, False), (0.6, 2, True), (0.6, 1, False)])
def test_a_full_machine_is_noticed(monkeypatch, capsys, busy, threads, warned):
    seconds = iter([100.0, 100.0 + 10 * busy + 4.0])
    monkeypatch.setattr(measure, "_busy_seconds", lambda: next(seconds))
    monkeypatch.setattr(measure, "available_cores", lambda: 2)
    times = {"perf_counter": iter([0.0, 10.0]).__next__, "process_time": iter([1.0, 5.0]).__next__}
    monkeypatch.setattr(measure, "time", types.SimpleNamespace(**times))
    run = {"threads": threads}
    measure.OtherWork().finish(run)
    assert run["other_work_cores"] == busy
    assert ("not to be trusted" in capsys.readouterr().err) == warned


# layers.py: the check before the clock


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


# Arguments


@pytest.mark.parametrize(
    "script", [layers, language_model, features, heads, latency, memory, readme_table, scaling, transforms]
)
def test_help(script, capsys):
    with pytest.raises(SystemExit) as status:
        script.main(["--help"])
    assert status.value.code == 0
    assert script.__doc__.splitlines()[0] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (layers, ["--cells", "gur"], "no cell 'gur'; choose from"),
        (layers, ["--cases", "huge"], "no case 'huge'; choose from"),
        (layers, ["--threads", "0"], "0 is not at least 1"),
        (layers, ["--seconds", "-1"], "-1 is not a finite number above 0"),
        (layers, ["--dtype", "int8"], "invalid choice: 'int8'"),
        (layers, ["--modes", "training", "sleeping"], "invalid choice: 'sleeping'"),
        (layers, ["--output", __file__], "cannot be written"),
        (layers, ["--prepack", "--modes", "training"], "--prepack: gains are in inference only"),
        (features, ["--cells", "gur"], "no cell 'gur'; choose from"),
        (features, ["--output", __file__], "cannot be written"),
        (latency, ["--cells", "gur"], "invalid choice: 'gur'"),
        (heads, ["--cells", "gur"], "no cell 'gur'; choose from"),
        (heads, ["--questions", "why"], "invalid choice: 'why'"),
        (heads, ["--output", __file__], "cannot be written"),
        (transforms, ["--output", __file__], "cannot be written"),
        (memory, ["--cells", "gur"], "no cell 'gur'; choose from"),
        (memory, ["--cases", "huge"], "no case 'huge'; choose from"),
        (memory, ["--output", __file__], "cannot be written"),
        (scaling, ["--cells", "gur"], "no cell 'gur'; choose from"),
        (scaling, ["--threads", "1", "4096"], "--threads: 4096 is more than the"),
        (scaling, ["--output", __file__], "cannot be written"),
        (language_model, ["--cell", "gur"], "no cell 'gur'; choose from"),
        (language_model, ["--corpus", "moby-dick"], "'moby-dick' is neither a file nor one of the known corpora"),
        (language_model, ["--steps", "none"], "invalid positive_int value: 'none'"),
        (language_model, ["--learning-rate", "nan"], "nan is not a finite number above 0"),
        (language_model, ["--temperature", "-1"], "must be a finite number of at least 0"),
        (language_model, ["--prompt", ""], "--prompt: must not be empty"),
        (language_model, ["--num-steps", "1000000"], "too few for --num-steps 1000000"),
        (language_model, ["--output", __file__], "cannot be written"),
    ],
)
def test_argument_errors(script, arguments, message, capsys):
    with pytest.raises(SystemExit) as status:
        script.main(arguments)
    assert status.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(bool(_C.build_info()["cuda"]), reason="this build has CUDA kernels")
@pytest.mark.parametrize("script", [layers, language_model, features, heads, transforms])
def test_cuda_is_refused_without_kernels(script, capsys):
    with pytest.raises(SystemExit) as status:
        script.main(["--device", "cuda"])
    assert status.value.code == 2
    assert "this build of rnnfast has no CUDA kernels" in capsys.readouterr().err


# heads.py


def test_heads_from_end_to_end(tmp_path, capsys):
    arguments = ["--quick", "--seconds", "0.01", "--threads", "1", "--cells", "gru", "--output", str(tmp_path)]
    assert heads.main(arguments) == 0
    with open(tmp_path / "heads-quick-cpu-float32-1t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["question"] for row in rows] == ["loss", "generation", "generation", "step"]
    assert all(row["status"] == "ok" and float(row["ratio"]) > 0 for row in rows)
    assert json.loads((tmp_path / "heads-quick-cpu-float32-1t.json").read_text())["threads"] == 1
    assert "gru H=256" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["loss", "generation", "step"])
def test_heads_give_no_time_for_a_wrong_result(monkeypatch, capsys, wrong):
    loss = heads.linear_cross_entropy
    monkeypatch.setattr(heads, "linear_cross_entropy", lambda *a: loss(*a) * (1.01 if wrong == "loss" else 1))
    if wrong == "generation":
        monkeypatch.setattr(heads, "python_loop", lambda *_: torch.zeros(1, dtype=torch.int64))
    if wrong == "step":
        model_loss = rnnfast.RNNLM.loss
        monkeypatch.setattr(rnnfast.RNNLM, "loss", lambda *a: (1.01 * model_loss(*a)[0], None))
    monkeypatch.setattr(heads, "interleave", lambda *_: pytest.fail("a wrong result was timed"))
    assert heads.main(["--quick", "--questions", wrong, "--cells", "gru"]) == 1
    assert "not what the plain way gives" in capsys.readouterr().out


def test_peak_memory_is_that_of_the_call():
    kept = []

    def call():
        kept.append(torch.ones(50, 1 << 18))  # 50 MiB
        kept.clear()

    peak = measure.peak_megabytes(call)
    if peak is None:
        pytest.skip("the system does not tell the highest resident size")
    assert 45 < peak < 70


# language_model.py


def test_windows_are_pieces_of_the_text():
    tokens = torch.arange(50)
    windows = language_model.draw_windows(tokens, 7, 200, torch.Generator().manual_seed(0))
    assert windows.shape == (7, 200)
    assert (windows.diff(dim=0) == 1).all()
    assert windows[0].min() == 0
    assert windows[-1].max() == 49


def test_generated_text_is_the_one_asked_for():
    vocab = language_model.Vocab(" abc")
    model = rnnfast.RNNLM(rnnfast.GRU(len(vocab), 8), len(vocab))

    def write(temperature, seed):
        generator = torch.Generator().manual_seed(seed)
        return language_model.generate(model, vocab, "ab", 20, temperature, generator)

    assert write(1.0, 0) == write(1.0, 0) != write(1.0, 1)
    assert write(0, 0) == write(0, 1)
    for text in (write(1.0, 0), write(0, 0)):
        assert text.startswith("ab")
        assert len(text) == 22
        assert set(text) <= set(" abc")


def test_training_that_diverges_stops_with_the_step(capsys):
    pytest.importorskip("tqdm")
    arguments = ["--quick", "--cell", "gru", "--optimizer", "sgd", "--learning-rate", "1e38", "--clip", "1e38"]
    assert language_model.main(arguments) == 1
    assert re.search(r"gru: the loss is (nan|inf) at step \d+; a smaller --learning-rate", capsys.readouterr().err)


def test_curves_that_differ_are_an_error(monkeypatch, capsys):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(language_model, "largest_difference", lambda ours, theirs: 0.002)
    arguments = ["--quick", "--compare", "--cell", "lstm", "--steps", "5"]
    assert language_model.main(arguments) == 1
    assert "the loss curves of lstm differ by more than --tolerance 0.001" in capsys.readouterr().err
    assert language_model.main([*arguments, "--tolerance", "0.01"]) == 0


def test_largest_difference():
    assert math.isclose(language_model.largest_difference([2.0, 3.3, 1.0], [2.0, 3.0, 1.05]), 0.1)


# Short runs, as a user starts them


def run(script, *arguments):
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


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


def test_features_from_end_to_end(tmp_path):
    arguments = ("--quick", "--cells", "gru", "lstm", "--modes", "training", "--seconds", "0.01", "--threads", "1")
    done = run("features.py", *arguments, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "features-quick-cpu-float32-1t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    common = [("resets", "plain"), ("resets", "loop"), ("lengths", "packing"), ("lengths", "plain")]
    every = [("gru", *pair) for pair in common]
    every += [("gru", name, "plain") for name in features.OPTIONS["GRU"]]
    every += [("lstm", *pair) for pair in [*common, ("cells", "plain"), ("cells", "loop")]]
    every += [("lstm", name, "plain") for name in features.OPTIONS["LSTM"]]
    assert [(row["cell"], row["feature"], row["against"]) for row in rows] == every
    assert all(row["status"] == "ok" and float(row["rnnfast_ms"]) > 0 for row in rows)
    assert json.loads((tmp_path / "features-quick-cpu-float32-1t.json").read_text())["threads"] == 1


def test_features_gives_no_time_for_a_wrong_result(monkeypatch, tmp_path, capsys):
    """Where the other way resets nothing, the numbers differ."""
    loop = features.loop_over_steps
    monkeypatch.setattr(features, "loop_over_steps", lambda layer, x, keep, cells: loop(layer, x, None, cells))
    monkeypatch.setattr(features, "RESET_RATE", 0.5)
    arguments = ["--quick", "--cells", "gru", "--modes", "training", "--seconds", "0.01", "--output", str(tmp_path)]
    assert features.main(arguments) == 1
    captured = capsys.readouterr()
    rows = 4 + len(features.OPTIONS["GRU"])
    assert "wrong: differs by" in captured.out and f"1 of {rows} rows have wrong results" in captured.err


def test_latency_from_end_to_end(tmp_path):
    arguments = ("--quick", "--cells", "rnn", "lstm", "--seconds", "0.01", "--threads", "1", "--output", tmp_path)
    done = run("latency.py", *arguments)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "latency-cpu-float32-1t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    ways = ["module", "prepack", "cell", "decoder", *([] if "skipped onnx" in done.stderr else ["onnx"])]
    every = [(cell, str(size), way) for cell in ("rnn_tanh", "lstm") for size in latency.QUICK_SIZES for way in ways]
    assert [(row["cell"], row["H"], row["way"]) for row in rows] == every
    assert all(row["status"] == "ok" and float(row["us"]) > 0 for row in rows)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch's exporter warns of its own
def test_latency_gives_no_time_for_a_wrong_result(monkeypatch, capsys):
    monkeypatch.setattr(latency.rnnfast.Decoder, "step", lambda self, x: x + 1)
    assert latency.main(["--quick", "--cells", "gru", "--seconds", "0.01", "--threads", "1"]) == 1
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert all(("differs" in row) == (row[2] == "decoder") for row in rows[1:])


def test_transforms_from_end_to_end(tmp_path):
    arguments = ("--quick", "--no-compile", "--seconds", "0.01", "--threads", "1")
    done = run("transforms.py", *arguments, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "transforms-quick-cpu-float32-1t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    one = [("per-sample", "loop"), ("per-sample", "torch.nn"), *[("ensemble", "loop")] * 2, *[("stacked", "loop")] * 2]
    every = [(cell, *pair) for cell in ("RNN", "GRU", "LSTM") for pair in one] + [("Linear", "vmap", "loop")]
    assert [(row["cell"], row["question"], row["against"]) for row in rows] == every
    assert all(row["status"] == "ok" and float(row["rnnfast_ms"]) > 0 for row in rows)
    assert json.loads((tmp_path / "transforms-quick-cpu-float32-1t.json").read_text())["threads"] == 1


def test_transforms_gives_no_time_for_a_wrong_result(monkeypatch, tmp_path, capsys):
    """Where one way gives other numbers."""

    def questions(*_):
        yield transforms.Question(*"abcd", (1, 1, 1, 1), lambda: torch.zeros(2), lambda: torch.ones(2))

    monkeypatch.setattr(transforms, "questions", questions)
    assert transforms.main(["--quick", "--seconds", "0.01", "--output", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "wrong: Tensor-likes are not close" in captured.out and "1 of 1 rows have wrong results" in captured.err


@pytest.mark.filterwarnings("ignore")  # torch's compilers warn of their own imports
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs g++, which this machine lacks")
def test_compiled_questions_agree():
    """The compiled model is one graph and gives what eager mode gives."""
    with torch._dynamo.config.patch(allow_rnn=True):
        for question in transforms.compiled(CPU, torch.float32, quick=True):
            torch.testing.assert_close(question.ours(), question.other(), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_language_model_from_end_to_end(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    done = run("language_model.py", "--quick", "--compare", "--steps", "15", "--threads", "1", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    for part in ("python-docs", "rnn_tanh", "gru", "lstm", "torch.nn", "time ratio", "loss curves", "'the "):
        assert part in done.stdout
    with open(tmp_path / "language_model.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 15
    assert float(rows[14]["rnnfast_loss"]) < float(rows[0]["rnnfast_loss"])
    description = json.loads((tmp_path / "language_model.json").read_text())
    assert [figures["cell"] for figures in description["results"]] == ["rnn_tanh", "gru", "lstm"]
    assert all(figures["difference"] < 1e-3 for figures in description["results"])
    assert (tmp_path / "language_model.png").read_bytes().startswith(b"\x89PNG")


# readme_table.py


def write_result(folder, name="layers-cpu-avx2-float32-2t", **changes):
    row = dict.fromkeys(layers.FIELDS, "1") | {"case": "d2l", "status": "ok"}
    folder.mkdir(exist_ok=True)
    with open(folder / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, layers.FIELDS)
        writer.writeheader()
        for cell, mode, ratio in (("gru", "inference", 2.0), ("gru", "training", 3.0), ("lstm", "training", 1.5)):
            writer.writerow(row | {"cell": cell, "mode": mode, "ratio": ratio})
        writer.writerow(row | {"case": "lm-h200", "cell": "gru", "mode": "inference", "ratio": 8.0, "L": 2} | changes)
    (folder / f"{name}.json").write_text(json.dumps(measure.describe_run(CPU, torch.float32, 2)))


def test_readme_table(tmp_path, capsys):
    results, readme = tmp_path / "results", tmp_path / "README.md"
    write_result(results)
    readme.write_text(f"before\n{readme_table.BEGIN}\nold\n{readme_table.END}\nafter\n")
    arguments = ["--results", str(results), "--readme", str(readme)]
    assert readme_table.main([*arguments, "--check"]) == 1
    assert "out of date" in capsys.readouterr().err
    assert readme_table.main(arguments) == 0
    assert readme_table.main([*arguments, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{readme_table.END}\nafter\n")
    assert "old" not in text
    assert "| run | gru inference | gru training | lstm training |" in text
    assert " | 4.00 (2.00) | 3.00 (3.00) | 1.50 (1.50) |" in text
    page = (results / "README.md").read_text()
    assert "| shape | T N I H | gru inference | gru training | lstm training |" in page
    assert "| d2l | 1 1 1 1 | 2.00 | 3.00 | 1.50 |" in page
    assert "| lm-h200 | 1 1 1 1 L2 | 8.00 |  |  |" in page
    assert "| **geometric mean** | | **4.00** | **3.00** | **1.50** |" in page
    assert "| **worst** | | **2.00** | **3.00** | **1.50** |" in page


def test_readme_table_of_peers(tmp_path):
    results, readme = tmp_path / "results", tmp_path / "README.md"
    write_result(results)
    readme.write_text(f"{readme_table.BEGIN}\n{readme_table.END}\n")
    with open(results / "peers-cpu-float32-1t.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, readme_table.peers.FIELDS)
        writer.writeheader()
        row = dict.fromkeys(readme_table.peers.FIELDS, "1") | {"case": "d2l", "cell": "gru", "mode": "inference"}
        for library, ms in (("rnnfast", 2.0), ("torch.nn", 6.0), ("jax", 3.0)):
            writer.writerow(row | {"library": library, "ms": ms, "ratio": ms / 2, "status": "ok"})
    (results / "peers-cpu-float32-1t.json").write_text(json.dumps(measure.describe_run(CPU, torch.float32, 1)))
    assert readme_table.main(["--results", str(results), "--readme", str(readme)]) == 0
    assert re.search(r"to best peer \| 1\.50 \(1\.50\) \|", readme.read_text())
    assert re.search(r"to torch\.nn \| 3\.00 \(3\.00\) \|", readme.read_text())
    assert "| d2l | 1 1 1 1 | 1.50 jax |" in (results / "README.md").read_text()


def test_readme_table_refuses_what_is_not_fit(tmp_path, capsys):
    results, readme = tmp_path / "results", tmp_path / "README.md"
    readme.write_text("no table here")
    arguments = ["--results", str(results), "--readme", str(readme)]
    assert readme_table.main(arguments) == 1
    assert "no results in" in capsys.readouterr().err
    write_result(results, name="layers-quick-cpu-float32-2t")
    assert readme_table.main(arguments) == 1
    assert "no results in" in capsys.readouterr().err
    write_result(results)
    assert readme_table.main(arguments) == 1
    assert "the README must have the lines" in capsys.readouterr().err
    write_result(results, status="wrong: output")
    assert readme_table.main(arguments) == 1
    assert "lm-h200 gru is wrong: output" in capsys.readouterr().err
    (results / "layers-cpu-avx2-float32-2t.json").unlink()
    assert readme_table.main(arguments) == 1
    assert "layers-cpu-avx2-float32-2t.json is missing" in capsys.readouterr().err
    assert readme.read_text() == "no table here"


@pytest.mark.skipif(not list((BENCHMARKS / "results").glob("layers-*.csv")), reason="no results are committed")
def test_readme_shows_the_committed_results():
    assert readme_table.main(["--check"]) == 0


@pytest.mark.parametrize("name", ["run", "test"])
def test_readme_has_the_command(name):
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(rf"<!-- command: {name} -->\n```(?:sh|bash)\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 1
    assert blocks[0].startswith("pip install")
    for script in re.findall(r"python (\S+\.py)", blocks[0]):
        assert (ROOT / script).is_file()
