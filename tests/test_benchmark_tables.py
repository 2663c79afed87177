"""benchmarks/readme_table.py, and that the README shows what is committed."""

import csv
import json
import re

import layers
import measure
import pytest
import readme_table
import torch
from benchmark_runs import BENCHMARKS, CPU, ROOT


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
