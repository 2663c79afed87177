"""benchmarks/cases.py and measure.py: sane shapes, turns that alternate, a description of the run."""

import itertools
import json
import math
import re
import types

import cases
import layers
import measure
import pytest
import torch
from benchmark_runs import CPU, SMALL

import rnnfast
from rnnfast import _C


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
