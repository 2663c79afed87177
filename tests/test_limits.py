"""benchmarks/scaling.py and memory.py: short runs from end to end, and what their summaries count."""

import argparse
import csv
import json

import cases
import measure
import memory
import pytest
import scaling
from benchmark_runs import run

import rnnfast


def test_scaling_from_end_to_end(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    arguments = ("--quick", "--cells", "lstm", "--seconds", "0.01", "--threads", "1", "--output", tmp_path)
    done = run("scaling.py", *arguments)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "scaling-quick-cpu-float32.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["axis"] for row in rows} == {"T", "N", "H", "share"}
    for axis, values in scaling.QUICK_AXES.items():
        for mode in scaling.MODES:
            found = [int(row[axis]) for row in rows if (row["axis"], row["mode"]) == (axis, mode)]
            assert sorted(found) == sorted(values)
    assert all(row["status"] == "ok" and float(row["rnnfast_ms"]) > 0 for row in rows)
    shares = [row for row in rows if row["axis"] == "share"]
    for row in shares:
        share = float(row["gflops"]) / float(row["ceiling_gflops"])
        assert 0.2 * share < float(row["share"]) < 5 * share, "the median of ratios is near the ratio of medians"
    assert f"lstm inference, T=4 N=8 H=32, 1 thread(s): {float(shares[0]['share']):.0%} of the ceiling" in done.stdout
    for row in rows:
        assert row["limit"] in ("products", "reading", "calls")
        assert float(row["near"]) == pytest.approx(
            float(row["floor_ms"]) / float(row["rnnfast_ms"]), rel=0.01, abs=1e-3
        )
        product = (
            0.999
            * cases.product_flops(
                scaling.make_case({letter: int(row[letter]) for letter in "TNH"}),
                cases.CELLS["lstm"],
                row["mode"] == "training",
            )
            / max(float(row["ceiling_gflops"]) for row in shares)
        )
        assert float(row["floor_ms"]) * 1e6 >= product
    ceiling = json.loads((tmp_path / "scaling-quick-cpu-float32.json").read_text())["ceilings"]["1"]
    assert ceiling["gflops"] == max(float(row["ceiling_gflops"]) for row in shares)
    assert (tmp_path / "scaling-quick-cpu-float32.png").read_bytes().startswith(b"\x89PNG")


def test_scaling_products_count_their_operations():
    products = scaling.make_products((3, 5, 7))
    assert [product.flops for product in products if product.name != "rnnfast, one step"] == [2 * 3 * 5 * 7] * (
        len(products) - 1
    )
    step = cases.Case("", 1, 3, 5, 7, 1, 1, "")
    assert products[-1].flops == cases.product_flops(step, cases.CELLS["rnn_relu"], training=False)
    assert all(product.call() is not None for product in products)


def test_scaling_summary_counts_a_shape_once():
    def row(axis, N, speedup):
        row = dict.fromkeys(scaling.FIELDS, "") | {"axis": axis, "cell": "gru", "mode": "training", "status": "ok"}
        return row | {"threads": 2 if speedup else 1, "T": 32, "N": N, "H": 256, "speedup": speedup or 1.0}

    rows = [row("T", 16, None), row("T", 16, 1.0), row("N", 16, 1.0), row("N", 64, 4.0), row("N", 4, 0.1)]
    assert "geometric mean 2.00x, worst 1.00x (gru training, T=32 N=16 H=256)" in scaling.format_summary(rows)


def test_memory_from_end_to_end(tmp_path):
    pytest.importorskip("tqdm")
    if measure.peak_megabytes(lambda: None) is None:
        pytest.skip("the system does not tell the highest resident size")
    done = run("memory.py", "--cases", "policy-h256", "--cells", "lstm", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "memory-cpu-float32-1t.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    # Output and input's gradient of 2,048 rows, two states, the weights' gradients.
    expected = (128 * 16 * (256 + 64) + 2 * 16 * 256 + 4 * 256 * (64 + 256 + 2)) * 4 / 2**20
    assert float(row["results_mb"]) == round(expected, 1)
    # torch.nn keeps the four gates and both states of every row at the least, and ours a number less.
    kept = 128 * 16 * 256 * 4 / 2**20
    assert float(row["torch_mb"]) > expected + 4 * kept
    assert float(row["rnnfast_mb"]) > expected
    assert float(row["ratio"]) == pytest.approx(float(row["rnnfast_mb"]) / float(row["torch_mb"]), abs=1e-3)
    assert ("recompute is left out" in done.stdout) == (row["recompute_mb"] == "")
    assert json.loads((tmp_path / "memory-cpu-float32-1t.json").read_text())["threads"] == 1


def test_recompute_is_measured_where_the_layers_have_it(monkeypatch):
    class WithRecompute(rnnfast.LSTM):
        def __init__(self, *args, recompute=False, **kwargs):
            super().__init__(*args, **kwargs)

    peaks = {"torch": 10.0, "rnnfast": 6.0, "recompute": 3.0}
    monkeypatch.setattr(rnnfast, "LSTM", WithRecompute)
    monkeypatch.setattr(memory, "peak_in_fresh_process", lambda context, name, *_: peaks[name])
    options = argparse.Namespace(threads=1, seconds=0.01)
    row = memory.measure_case(None, cases.find_case("step-h64"), cases.CELLS["lstm"], options)
    assert (row["ratio"], row["recompute_ratio"]) == (0.6, 0.3)
    assert row["recompute_time"] > 0
    assert "with recompute   1 shapes, geometric mean 0.30 of torch.nn's" in memory.format_summary([row])
