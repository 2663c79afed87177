"""benchmarks/peers.py: every library gives the same numbers, wrong ones get no time, a short run from end to end."""

import csv
import json

import cases
import peers
import pytest
import torch
from benchmark_runs import run

from rnnfast import _C

# The libraries' own imports warn of what is old in them.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SMALL = cases.Case("small", 5, 3, 4, 6, 1, 1, "made up for the tests")


def skip_without(library):
    if missing := peers.LIBRARIES[library].missing():
        pytest.skip(f"{', '.join(missing)} not installed: needs the extra rnnfast[peers]")


def test_the_cases_are_of_one_layer():
    found = [cases.find_case(name) for name in peers.CASES]
    assert all((case.L, case.D) == (1, 1) for case in found)
    assert {(1, 1, 256, 256), (1000, 1, 64, 64), (32, 1024, 28, 32), (64, 16, 1024, 1024)} <= {
        (case.T, case.N, case.I, case.H) for case in found
    }
    assert set(peers.QUICK_CASES) <= set(peers.CASES)


@pytest.mark.parametrize("name", list(cases.CELLS))
@pytest.mark.parametrize("library", list(peers.LIBRARIES))
def test_every_library_computes_the_same(library, name):
    """Gate order, biases and the GRU's variant; relu in the range where it is not zero too."""
    skip_without(library)
    for mode in peers.LIBRARIES[library].modes:
        problem = peers.make_problem(SMALL, name, mode)
        results = peers.LIBRARIES[library].make(problem, 1).results()
        assert results.keys() == problem.expected.keys()
        for result, value in results.items():
            torch.testing.assert_close(value, problem.expected[result].float(), rtol=1e-4, atol=1e-5)
        assert peers.disagreement(problem, results) is None


def test_disagreement_is_found():
    problem = peers.make_problem(SMALL, "gru", "training")
    right = {name: value.float() for name, value in problem.expected.items()}
    assert peers.disagreement(problem, right) is None
    for name, value in right.items():
        assert peers.disagreement(problem, right | {name: value * 1.002}).startswith(f"{name}: differs by 0.00")
        assert peers.disagreement(problem, right | {name: value * float("nan")}) == f"{name}: differs by nan"
    message = peers.disagreement(problem, right | {"output": right["output"].mT})
    assert message == "output: (5, 6, 3) where (5, 3, 6) was expected"


def test_a_process_of_its_own():
    """The calls of a contestant in another process; one that is ended closes."""
    contestant = peers.RemoteContestant("rnnfast", 1)
    try:
        assert contestant.prepare(SMALL, "gru", "inference")["status"] == "ok"
        assert 0 < contestant.turn() < 10
    finally:
        contestant.close()
    with pytest.raises((EOFError, OSError)):
        contestant.turn()


class Wrong(peers.Contestant):
    def prepare(self, case, cell, mode):
        return {"status": "wrong: for the test"} if self._library is peers.LIBRARIES["torch.nn"] else super().prepare(
            case, cell, mode
        )  # fmt: skip


def run_main(monkeypatch, folder, contestant, *left_out):
    """Runs with rnnfast and torch.nn alone, and what is not installed by name."""
    few = {name: peers.LIBRARIES[name] for name in ("rnnfast", "torch.nn")}
    few |= {name: peers.Library(peers.torch_way, (f"no_such_{name}",)) for name in left_out}
    monkeypatch.setattr(peers, "LIBRARIES", few)
    monkeypatch.setattr(peers, "limit_threads", torch.set_num_threads)
    monkeypatch.setattr(peers, "Contestant", contestant)
    arguments = ["--quick", "--cells", "gru", "--cases", "step-h256", "--seconds", "0.01", "--output", str(folder)]
    return peers.main([*arguments, "--modes", "inference"])


def read(folder):
    with open(folder / "peers-quick-cpu-float32-1t.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_no_time_for_a_wrong_result(monkeypatch, tmp_path, capsys):
    pytest.importorskip("tqdm")
    pytest.importorskip("matplotlib")
    assert run_main(monkeypatch, tmp_path, Wrong) == 1
    printed = capsys.readouterr()
    assert "torch.nn: wrong: for the test" in printed.out and "1 of 2 rows have wrong results" in printed.err
    ours, theirs = read(tmp_path)
    assert ours["status"] == "ok" and float(ours["ms"]) > 0
    assert theirs["status"] == "wrong: for the test" and theirs["ms"] == theirs["ratio"] == ""


def test_nobody_is_timed_when_ours_is_wrong(monkeypatch):
    monkeypatch.setattr(peers, "disagreement", lambda problem, results: "output: differs by 1")
    monkeypatch.setattr(peers, "take_turns", lambda *_: pytest.fail("a wrong result was timed"))
    contestants = {"rnnfast": peers.Contestant("rnnfast", 1, alone=False)}
    (row,) = peers.measure(contestants, SMALL, "gru", "inference", 0.01)
    assert row["status"] == "wrong: output: differs by 1"


def test_what_is_missing_is_named(monkeypatch, tmp_path, capsys):
    pytest.importorskip("tqdm")
    pytest.importorskip("matplotlib")
    assert run_main(monkeypatch, tmp_path, peers.Contestant, "onnxruntime") == 0
    assert "onnxruntime is left out: no_such_onnxruntime not installed" in capsys.readouterr().out
    assert [row["library"] for row in read(tmp_path)] == ["rnnfast", "torch.nn"]


@pytest.mark.parametrize(("library", "is_kept"), [(peers.OURS, True), (peers.PLAIN, False)])
def test_ours_is_prepacked_and_once_more_plain(monkeypatch, library, is_kept):
    layers = []
    make_call = peers.make_call
    monkeypatch.setattr(peers, "make_call", lambda layer, *rest: layers.append(layer) or make_call(layer, *rest))
    problem = peers.make_problem(SMALL, "gru", "inference")
    assert peers.disagreement(problem, peers.LIBRARIES[library].make(problem, 1).results()) is None
    assert _C.is_prepacked(layers[-1].weight_hh_l0) == is_kept


def test_plain_is_no_peer():
    times = {peers.OURS: 3, peers.PLAIN: 4, "jax": 5}
    rows = [{"library": library, "status": "ok", "ms": ms} for library, ms in times.items()]
    assert peers.best_peer(rows)["library"] == "jax"


def test_summary():
    def rows(case, *ratios):
        for library, ratio in zip(("rnnfast", "torch.nn", "jax"), (1.0, *ratios), strict=True):
            row = dict.fromkeys(peers.FIELDS, "") | {"case": case, "cell": "gru", "mode": "training"}
            yield row | {"library": library, "ms": 5 * ratio, "ratio": ratio, "status": "ok"}

    taken = [*rows("step-h256", 8.0, 2.0), *rows("d2l", 2.0, 32.0)]
    assert [peers.best_peer(members)["library"] for members in peers.group(taken).values()] == ["jax", "torch.nn"]
    found = {(line["against"], line["cell"]): line for line in peers.summarize(taken)}
    assert found.keys() == {(against, cell) for against in ("best peer", "torch.nn") for cell in ("all", "gru")}
    assert found["best peer", "all"]["mean"] == pytest.approx(2.0)
    assert found["torch.nn", "gru"]["mean"] == pytest.approx(4.0)
    assert (found["torch.nn", "gru"]["worst"], found["torch.nn", "gru"]["worst_case"]) == (2.0, "d2l gru")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cells", "gur"], "no cell 'gur'; choose from"),
        (["--cases", "huge"], "no case 'huge'; choose from"),
        (["--cases", "tagger-bi"], "tagger-bi must have one layer and one direction, not 1 and 2"),
        (["--threads", "0"], "0 is not at least 1"),
        (["--output", __file__], "cannot be written"),
    ],
)
def test_argument_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as status:
        peers.main(arguments)
    assert status.value.code == 2
    assert message in capsys.readouterr().err


def test_from_end_to_end(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    arguments = ("--quick", "--cases", "step-h256", "--cells", "rnn", "--seconds", "0.01", "--output", tmp_path)
    done = run("peers.py", *arguments)
    assert done.returncode == 0, done.stderr
    description = json.loads((tmp_path / "peers-quick-cpu-float32-1t.json").read_text())
    assert description["threads"] == 1 and description["libraries"]["torch.nn"] == torch.__version__
    for name, library in peers.LIBRARIES.items():
        assert (name in description["libraries"]) != bool(library.missing())
        assert (f"{name} is left out" in done.stdout) == bool(library.missing())
    rows = read(tmp_path)
    assert [(row["mode"], row["library"]) for row in rows] == [
        (mode, name) for mode in peers.MODES for name in description["libraries"] if mode in peers.LIBRARIES[name].modes
    ]
    for row in rows:
        assert row["status"] == "ok" and float(row["ms"]) > 0 and float(row["cores"]) >= 0
        assert float(row["ratio_low"]) <= float(row["ratio"]) <= float(row["ratio_high"])
    assert (tmp_path / "peers-quick-cpu-float32-1t.png").read_bytes().startswith(b"\x89PNG")
