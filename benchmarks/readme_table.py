"""Writes the tables of the committed results: all of them to README.md beside them, their means to the README.

Reads every layers-*.csv and peers-*.csv in benchmarks/results with the .json beside it, quick runs left out. The README
gets its part between two comment lines, the other file is written whole. With --check nothing is written, and the exit
status is 1 when one of them does not show what the results say.
"""

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import peers
from cases import DEFAULT_CELLS
from layers import MODES, summarize

BEGIN = "<!-- benchmarks: begin (written by benchmarks/readme_table.py) -->"
END = "<!-- benchmarks: end -->"
ROOT = Path(__file__).resolve().parent.parent


class TableError(Exception):
    """Results or a README from which no table can be made."""


class Result(NamedTuple):
    """One run of a script: its description, its rows, and the plot beside them, if there is one."""

    path: Path
    run: dict[str, Any]
    rows: list[dict[str, Any]]


def read_result(path: Path) -> Result:
    """Returns one result. Raises TableError when it is not fit to be shown."""
    description = path.with_suffix(".json")
    if not description.is_file():
        raise TableError(f"{path} has no description: {description.name} is missing")
    with open(path, newline="") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    if not rows:
        raise TableError(f"{path} has no rows")
    wrong = [row for row in rows if row["status"] != "ok"]
    if wrong:
        raise TableError(f"{path}: {wrong[0]['case']} {wrong[0]['cell']} is {wrong[0]['status']}")
    numbers = [{**row, "ms": float(row["ms"]), "ratio": float(row["ratio"])} for row in rows if "ms" in row]
    return Result(path, json.loads(description.read_text()), numbers or rows)


def read_results(folder: Path, script: str) -> list[Result]:
    """Returns all results of a script, in the order of their names, quick runs left out."""
    paths = [path for path in sorted(folder.glob(f"{script}-*.csv")) if "-quick-" not in path.name]
    return [read_result(path) for path in paths]


def format_run(run: dict[str, Any]) -> str:
    """Returns what was measured on what: numbers, threads, machine, torch, commit and day."""
    threads = "1 thread" if run["threads"] == 1 else f"{run['threads']} threads"
    on_cpu = f"{threads}, {run['machine']} ({run['instruction_set']})"
    how = on_cpu if run["device"] == "cpu" else run["machine"]
    busy = run.get("other_work_cores") or 0.0
    note = f" (other work kept {busy:.1f} of {run['cores']} cores busy)" if busy > 0.15 else ""
    prepack = "weights prepacked, " if run.get("prepack") else ""
    when = f"commit {run['git_sha'][:12]}, {run['date'][:10]}"
    return f"{run['dtype']}, {prepack}{how}, torch {run['torch']}, {when}{note}"


def format_table(result: Result, columns: Sequence[tuple[str, str]], values: dict[Any, str], ends: list[str]) -> str:
    """Returns one result as Markdown: how it was taken, a row for each shape, `ends`, and its plot."""
    lines = [
        f"{format_run(result.run)}:",
        "",
        "| shape | T N I H | " + " | ".join(f"{cell} {mode}" for cell, mode in columns) + " |",
        "|---|---|" + "---:|" * len(columns),
    ]
    for name, row in {row["case"]: row for row in result.rows}.items():
        shape = f"{row['T']} {row['N']} {row['I']} {row['H']}"
        shape += f" L{row['L']}" if row.get("L", "1") != "1" else ""
        shape += " bi" if row.get("D", "1") != "1" else ""
        found = [values.get((name, *column), "") for column in columns]
        lines.append(f"| {name} | {shape} | " + " | ".join(found) + " |")
    plot = result.path.with_suffix(".png")
    return "\n".join([*lines, *ends] + ([f"\n![Ratios of all shapes]({plot.name})"] if plot.is_file() else []))


def format_layers(result: Result) -> str:
    """Returns a result of layers.py as a table of ratios with their means and worst cases."""
    values = {(row["case"], row["cell"], row["mode"]): f"{float(row['ratio']):.2f}" for row in result.rows}
    summary = {(group["cell"], group["mode"]): group for group in summarize(result.rows)}
    cells = list(dict.fromkeys(row["cell"] for row in result.rows))
    columns = [(cell, mode) for mode in MODES for cell in cells if (cell, mode) in summary]
    ends = [
        f"| **{name}** | | " + " | ".join(f"**{summary[column][key]:.2f}**" for column in columns) + " |"
        for name, key in (("geometric mean", "mean"), ("worst", "worst"))
    ]
    return format_table(result, columns, values, ends)


def format_peers(result: Result) -> str:
    """Returns a result of peers.py as a table of ratios to the quickest other library."""
    best = {key: peers.best_peer(rows) for key, rows in peers.group(result.rows).items()}
    values = {key: f"{row['ratio']:.2f} {row['library']}" for key, row in best.items() if row is not None}
    cells = list(dict.fromkeys(row["cell"] for row in result.rows))
    columns = [(cell, mode) for mode in MODES for cell in cells if any(key[1:] == (cell, mode) for key in values)]
    return format_table(result, columns, values, [])


def format_summary(rows: list[tuple[str, dict[tuple[str, str], Any]]]) -> str:
    """Returns means and worst cases of several runs as Markdown, a row for each."""
    present = {column for _, summary in rows for column in summary}
    columns = [(cell, mode) for mode in MODES for cell in DEFAULT_CELLS if (cell, mode) in present]
    lines = [
        "| run | " + " | ".join(f"{cell} {mode}" for cell, mode in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for name, summary in rows:
        groups = [summary.get(column) for column in columns]
        values = ["" if group is None else f"{group['mean']:.2f} ({group['worst']:.2f})" for group in groups]
        lines.append(f"| {name} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def make_tables(folder: Path) -> tuple[str, str]:
    """Returns what the README shows of the results in a folder, and the text of the README beside them.

    Raises TableError when there are none or one is unfit.
    """
    layers, beside = read_results(folder, "layers"), read_results(folder, "peers")
    if not layers:
        raise TableError(f"no results in {folder}: run benchmarks/layers.py --output {folder} first")
    rows = [(format_run(r.run), {(g["cell"], g["mode"]): g for g in summarize(r.rows)}) for r in layers]
    parts = ["Beside `torch.nn`, geometric mean of all shapes (and the worst):", format_summary(rows)]
    if beside:
        rows = [
            (
                f"{format_run(result.run)}, to {against}",
                {(g["cell"], g["mode"]): g for g in peers.summarize(result.rows) if g["against"] == against},
            )
            for result in beside
            for against in ("best peer", "torch.nn")
        ]
        parts += [
            "Beside the quickest, for each shape, of ONNX Runtime, OpenVINO, JAX and `torch.nn` (JAX and `torch.nn`\n"
            "in training), which keep weights as they like them best between the calls:",
            format_summary(rows),
        ]
    pages = [
        "# Results",
        "Written by `benchmarks/readme_table.py` from the files in this folder. Ratios of times: above 1, rnnfast is "
        "faster.",
        "## Beside torch.nn (layers.py)",
        *map(format_layers, layers),
    ]
    if beside:
        pages += ["## Beside the quickest of all peers (peers.py)", *map(format_peers, beside)]
    return "\n\n".join(parts), "\n\n".join(pages) + "\n"


def replace_tables(readme: str, tables: str) -> str:
    """Returns the README with the tables between its two comment lines. Raises TableError when these are missing."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise TableError(f"the README must have the lines {BEGIN!r} and {END!r} once, in this order")
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{tables}\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    """Writes or checks the README; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit status 1 when the README is out of date"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", metavar="FOLDER")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE")
    options = parser.parse_args(arguments)
    page = options.results / "README.md"
    try:
        old = options.readme.read_text()
        summary, tables = make_tables(options.results.resolve())
        new = {options.readme: replace_tables(old, summary), page: tables}
    except (OSError, TableError) as error:
        print(f"readme_table.py: {error}", file=sys.stderr)
        return 1
    status = 0
    for path, text in new.items():
        if path.is_file() and path.read_text() == text:
            continue
        if options.check:
            print(f"{path} is out of date: run benchmarks/readme_table.py", file=sys.stderr)
            status = 1
        else:
            path.write_text(text)
    return status


if __name__ == "__main__":
    sys.exit(main())
