"""The book's experiments: refusals before any work, killed runs that go on to the same result, both implementations."""

import csv
import dataclasses
import json
import math
import signal
import subprocess
import sys
import time

import d2l
import d2l_models
import pytest
import torch
from benchmark_runs import BENCHMARKS

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")


@pytest.fixture
def book(tmp_path):
    """A text with words, long enough for small settings."""
    generator = torch.Generator().manual_seed(0)
    words = ["the", "time", "traveller", "came", "back", "and", "said", "nothing", "of", "it"]
    order = torch.randint(len(words), (4000,), generator=generator).tolist()
    path = tmp_path / "book.txt"
    path.write_text(" ".join(words[i] for i in order))
    return path


@pytest.fixture
def tiny(monkeypatch, book):
    """Every experiment with models of a second or less, on that book; series as they are, but the sine only."""

    def small(settings):
        for setting in settings:
            if isinstance(setting, d2l.Forecast):
                if setting.series == "sine":
                    yield dataclasses.replace(setting, epochs=2, hidden_size=4, steps=(1, 2, 3))
                continue
            changes = {"corpus": str(book), "num_train": 200, "num_validation": 100, "hidden_size": 8, "num_steps": 6}
            changes |= {"batch_size": 64, "epochs": 2, "books": (str(book),) if setting.books else ()}
            if setting.num_tokens:
                changes |= {"num_tokens": 600, "batch_size": 8}
            yield dataclasses.replace(setting, **changes)

    for name, experiment in d2l.EXPERIMENTS.items():
        settings = list(small(experiment.settings()))
        settings = settings[::60] if name == "grid" else settings
        monkeypatch.setitem(
            d2l.EXPERIMENTS, name, dataclasses.replace(experiment, settings=lambda settings=settings: list(settings))
        )


def run(tmp_path, name, *arguments):
    work = tmp_path / "work"
    status = d2l.main([name, "--work", str(work), *arguments])
    return status, work


def without_times(row):
    timed = ("run", "cpu_seconds", "inference_cpu_ms", "characters_per_cpu_second", "forecast_cpu_seconds")
    return {key: value for key, value in row.items() if key not in timed}


def results(work, stem):
    return json.loads((work / f"{stem}.json").read_text())["results"]


@pytest.mark.parametrize("impl", ["rnnfast", "torch"])
@pytest.mark.parametrize("name", list(d2l.EXPERIMENTS))
def test_each_experiment_from_end_to_end(tiny, tmp_path, capsys, name, impl):
    status, work = run(tmp_path, name, "--impl", impl)
    assert status == 0
    stem = f"d2l-{name}-{impl}"
    with open(work / f"{stem}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = d2l.EXPERIMENTS[name].settings()
    if impl == "torch":
        expected = [setting for setting in expected if not setting.is_variant]
    assert [row["model"] for row in rows] == [setting.name for setting in expected]
    assert tuple(rows[0]) == ("model", *d2l.EXPERIMENTS[name].columns)
    for row in rows:
        for column in {"cpu_seconds", "perplexity", "train_perplexity"} & set(row):
            assert float(row[column]) > 0
    assert (work / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((work / f"{stem}.json").read_text())
    assert summary["impl"] == impl
    markdown = (work / f"d2l-{name}.md").read_text()
    assert all(f"| {setting.name} |" in markdown for setting in expected)
    assert ("words that the book has" in markdown) == (name == "sampling")
    assert [set(run) >= {"machine", "git_sha", "threads"} for run in summary["runs"]] == [True]
    assert all(row["run"] == 0 for row in summary["results"])
    printed = capsys.readouterr()
    assert d2l.EXPERIMENTS[name].title in printed.out
    assert "100%" in printed.err
    assert ("torch.nn has no such GRU" in printed.err) == (name == "gates" and impl == "torch")


@pytest.mark.parametrize("name", ["cells", "partitions", "forecasts"])
def test_both_implementations_reach_the_same(tiny, tmp_path, capsys, name):
    _, work = run(tmp_path, name)
    run(tmp_path, name, "--impl", "torch")
    count = len(d2l.EXPERIMENTS[name].settings())
    assert capsys.readouterr().out.count("torch.nn's CPU time over rnnfast's") == count
    comparison = (work / f"d2l-{name}.md").read_text().split("| model | torch.nn's CPU time / rnnfast's |")[1]
    assert comparison.count("\n| ") == count + 1
    for ours, theirs in zip(results(work, f"d2l-{name}-rnnfast"), results(work, f"d2l-{name}-torch"), strict=True):
        for key in ("perplexity", "train_perplexity", "error_1", "error_3"):
            if key in ours:
                assert math.isclose(ours[key], theirs[key], rel_tol=1e-3)
        assert ours.get("texts", {}).keys() == theirs.get("texts", {}).keys()


def test_only_the_models_asked_for(tiny, tmp_path):
    _, work = run(tmp_path, "gates", "--models", "reset gate only*", "both")
    names = [row["name"] for row in results(work, "d2l-gates-rnnfast")]
    assert names == ["reset gate only", "reset gate only, before the product"]


def test_times_are_those_of_the_process_and_not_of_the_clock(tiny, tmp_path, monkeypatch):
    """A machine busy with other work: a model that waits a second in every epoch has used no more CPU time for it."""
    fit = d2l_models.fit

    def waiting(model, batches, *rest, **options):
        def late(epoch):
            time.sleep(1.0)
            return batches(epoch)

        return fit(model, late, *rest, **options)

    monkeypatch.setattr(d2l_models, "fit", waiting)
    _, work = run(tmp_path, "cells", "--cell", "rnn")
    assert 0 < results(work, "d2l-cells-rnnfast")[0]["cpu_seconds"] < 1.0


def test_a_result_keeps_the_run_that_trained_it(tiny, tmp_path, monkeypatch):
    """A call that adds models to finished ones describes both runs."""
    described = d2l.describe_run(torch.device("cpu"), torch.float32, 1)
    for sha, models in (("a" * 40, ["rnn"]), ("b" * 40, ["rnn", "gru"])):
        monkeypatch.setattr(d2l, "describe_run", lambda *_, sha=sha: described | {"git_sha": sha})
        _, work = run(tmp_path, "cells", "--models", *models)
    summary = json.loads((work / "d2l-cells-rnnfast.json").read_text())
    assert [run["git_sha"][0] for run in summary["runs"]] == ["a", "b"]
    assert [row["run"] for row in summary["results"]] == [0, 1]
    text = (work / "d2l-cells.md").read_text()
    assert "commit aaaaaaaaaaaa" in text
    assert "commit bbbbbbbbbbbb" in text


def test_finished_models_are_not_trained_again(tiny, tmp_path, monkeypatch):
    _, work = run(tmp_path, "cells")
    before = results(work, "d2l-cells-rnnfast")
    monkeypatch.setattr(d2l_models, "fit", lambda *_, **__: pytest.fail("trained again"))
    run(tmp_path, "cells")
    assert results(work, "d2l-cells-rnnfast") == before


@pytest.mark.parametrize("name", ["depth", "partitions", "forecasts"])
def test_an_interrupted_run_goes_on_to_the_same_result(tiny, tmp_path, monkeypatch, capsys, name):
    """Ctrl-C after the first epoch of the second model: what is there is written, and the next call does the rest."""
    _, whole = run(tmp_path / "whole", name)
    store, seen = d2l_models._store, []

    def stop(content, path):
        store(content, path)
        seen.append(path.name)
        if seen.count("seconds.json") == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(d2l_models, "_store", stop)
    status, work = run(tmp_path / "broken", name)
    monkeypatch.setattr(d2l_models, "_store", store)
    assert status == 130
    assert "stopped after 1 of" in capsys.readouterr().err
    stem = f"d2l-{name}-rnnfast"
    assert len(results(work, stem)) == 1
    status, work = run(tmp_path / "broken", name)
    assert status == 0
    rows = [[without_times(row) for row in results(folder, stem)] for folder in (work, whole)]
    assert rows[0] == rows[1]


def test_a_killed_run_goes_on_to_the_same_result(tmp_path, book):
    """SIGKILL, as soon as there is a checkpoint; and the whole run in another folder."""
    text = book.read_text()
    book.write_text(" ".join([text] * 3))

    def start(folder):
        command = [sys.executable, str(BENCHMARKS / "d2l.py"), "cells", "--cell", "rnn", "--epochs", "6"]
        command += ["--corpus", str(book), "--work", str(folder)]
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    broken = start(tmp_path / "broken")
    log = tmp_path / "broken" / "d2l-cells-rnnfast" / "rnn" / "log.csv"
    for _ in range(6000):
        if log.is_file() or broken.poll() is not None:
            break
        time.sleep(0.02)
    broken.send_signal(signal.SIGKILL)
    output = broken.communicate()[0]
    assert broken.returncode == -signal.SIGKILL, output
    assert not (log.parent / "result.json").exists()
    for folder in ("broken", "whole"):
        process = start(tmp_path / folder)
        output = process.communicate()[0]
        assert process.returncode == 0, output
    rows = [results(tmp_path / folder, "d2l-cells-rnnfast") for folder in ("broken", "whole")]
    assert [without_times(row) for row in rows[0]] == [without_times(row) for row in rows[1]]
    assert rows[0][0]["cpu_seconds"] > 0


def test_only_results_of_equal_settings_are_compared():
    row = {"name": "gru", "cpu_seconds": 2.0, "perplexity": 6.0, "setting": {"impl": "rnnfast", "epochs": 50}}
    twin = row | {"cpu_seconds": 5.0, "perplexity": 6.1, "setting": {"impl": "torch", "epochs": 50}}
    assert d2l.compare([row], [twin]) == [("gru", 2.5, "perplexity", 6.0, 6.1)]
    assert d2l.compare([row], [twin | {"setting": {"impl": "torch", "epochs": 20}}]) == []
    assert d2l.compare([row], [twin | {"stopped": "diverged"}]) == []


def test_other_settings_in_the_same_folder_are_refused(tiny, tmp_path, capsys):
    run(tmp_path, "cells")
    with pytest.raises(SystemExit) as status:
        run(tmp_path, "cells", "--epochs", "3")
    assert status.value.code == 2
    assert "is of a run with other settings: delete it, or name another --work folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: NAME"),
        (["cooking"], "invalid choice: 'cooking'"),
        (["cells", "--impl", "jax"], "invalid choice: 'jax'"),
        (["cells", "--epochs", "0"], "0 is not at least 1"),
        (["cells", "--seed", "-1"], "-1 is not between 0 and 2^32 - 1"),
        (["cells", "--threads", "no"], "invalid positive_int value: 'no'"),
        (["cells", "--cell", "gur"], "invalid choice: 'gur'"),
        (["depth", "--cell", "lstm"], "--cell lstm: this experiment has no such model"),
        (["cells", "--models", "lstn", "x *"], "--models 'lstn' --models 'x *': this experiment has no such model"),
        (["cells", "--corpus", "moby-dick"], "'moby-dick' is neither a file nor one of the known corpora"),
        (["books", "--corpus", "python-docs"], "corpus 'war-of-the-worlds' is not in"),
        (["forecasts"], "series 'co2': put co2_mm_mlo.csv"),
        (["cells", "--corpus", "python-docs", "--work", __file__], f"--work {__file__}: cannot be written"),
        (["cells", "--corpus", "python-docs", "--output", __file__], f"--output {__file__}: cannot be written"),
    ],
)
def test_refusals_before_any_work(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("RNNFAST_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(d2l, "run_one", lambda *_: pytest.fail("work was started"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as status:
        d2l.main(arguments)
    assert status.value.code == 2
    assert message in capsys.readouterr().err


def test_a_text_that_is_too_short_is_refused(tmp_path, capsys):
    (tmp_path / "short.txt").write_text("the time traveller " * 20)
    with pytest.raises(SystemExit) as status:
        d2l.main(["cells", "--corpus", str(tmp_path / "short.txt"), "--work", str(tmp_path)])
    assert status.value.code == 2
    assert "has 380 tokens, 'rnn' needs 15065" in capsys.readouterr().err


def test_help_names_every_experiment(capsys):
    with pytest.raises(SystemExit) as status:
        d2l.main(["--help"])
    assert status.value.code == 0
    printed = capsys.readouterr().out
    for name, experiment in d2l.EXPERIMENTS.items():
        assert f"{name} " in printed
        assert experiment.title in printed


def test_the_grid_is_the_one_asked_for():
    settings = d2l.EXPERIMENTS["grid"].settings()
    assert len(settings) == 3 * 5 * 5 * 4
    assert len({setting.name for setting in settings}) == len(settings)
    for experiment in d2l.EXPERIMENTS.values():
        names = [setting.name for setting in experiment.settings()]
        assert len(names) == len(set(names))


def test_training_that_diverges_is_a_result(tiny, tmp_path, monkeypatch):
    experiment = d2l.EXPERIMENTS["clipping"]
    settings = [dataclasses.replace(s, learning_rate=1e30) for s in experiment.settings()[:2]]
    monkeypatch.setitem(d2l.EXPERIMENTS, "clipping", dataclasses.replace(experiment, settings=lambda: settings))
    status, work = run(tmp_path, "clipping")
    assert status == 0
    stopped = [row.get("stopped", "") for row in results(work, "d2l-clipping-rnnfast")]
    assert any("at step" in text or "too large" in text for text in stopped)


def test_bytes_kept_for_backward(book):
    setting = d2l.of_book("rnn", "rnn", corpus=str(book), num_steps=6, hidden_size=16)
    vocab, tokens, _ = d2l_models.read_tokens(setting)
    trained = d2l_models.Trained(setting, vocab, "rnnfast", 0)
    windows = d2l_models.Windows(tokens, 6)
    once, twice = (d2l_models.saved_bytes(trained, windows.__getitems__(range(n))) for n in (200, 400))
    assert 200 * 6 * 16 * 4 <= once < 20 * 200 * 6 * 16 * 4
    assert 1.8 < twice / once < 2.2


def test_texts_are_judged_by_the_words_of_the_book():
    figures = d2l_models.text_figures("begun the time the machine xyzzy cut", "the time machine")
    assert figures == {"known_words": 0.8, "distinct_words": 0.8}
