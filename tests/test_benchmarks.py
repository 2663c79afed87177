"""The other benchmarks: clear errors, no time for a wrong result, and short runs as a user starts them."""

import csv
import json
import math
import re
import shutil

import features
import heads
import language_model
import latency
import layers
import measure
import memory
import pytest
import readme_table
import scaling
import torch
import transforms
from benchmark_runs import CPU, run

import rnnfast
from rnnfast import _C


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
