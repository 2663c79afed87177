"""Writes the README's benchmark tables from the committed results of layers.py, between two comment lines.

Reads every layers-*.csv in benchmarks/results with the .json beside it, quick runs left out. With --check nothing is
written, and the exit status is 1 when the README does not show what the results say.
"""

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

from layers import MODES, summarize

BEGIN = "<!-- benchmarks: begin (written by benchmarks/readme_table.py) -->"
END = "<!-- benchmarks: end -->"
ROOT = Path(__file__).resolve().parent.parent


class TableError(Exception):
    """Results or a README from which no table can be made."""


def read_results(path: Path) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Returns the description and the rows of one result. Raises TableError when it is not fit to be shown."""
    description = path.with_suffix(".json")
    if not description.is_file():
        raise TableError(f"{path} has no description: {description.name} is missing")
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise TableError(f"{path} has no rows")
    wrong = [row for row in rows if row["status"] != "ok"]
    if wrong:
        raise TableError(f"{path}: {wrong[0]['case']} {wrong[0]['cell']} is {wrong[0]['status']}")
    return json.loads(description.read_text()), rows


def format_result(run: dict[str, Any], rows: list[dict[str, str]], plot: str | None) -> str:
    """Returns one result as Markdown: how it was taken, and a table of ratios with their means and worst cases."""
    ratios = {(row["case"], row["cell"], row["mode"]): float(row["ratio"]) for row in rows}
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    summary = {(group["cell"], group["mode"]): group for group in summarize(rows)}
    columns = [(cell, mode) for mode in MODES for cell in cells if (cell, mode) in summary]
    threads = "1 thread" if run["threads"] == 1 else f"{run['threads']} threads"
    on_cpu = f"{threads}, {run['machine']} ({run['instruction_set']})"
    how = on_cpu if run["device"] == "cpu" else run["machine"]
    busy = run.get("other_work_cores") or 0.0
    lines = [
        f"{run['dtype']}, {how}, torch {run['torch']}, "
        f"commit {run['git_sha'][:12]}, {run['date'][:10]}"
        + (f" (other work kept {busy:.1f} of {run['cores']} cores busy):" if busy > 0.15 else ":"),
        "",
        "| shape | T N I H | " + " | ".join(f"{cell} {mode}" for cell, mode in columns) + " |",
        "|---|---|" + "---:|" * len(columns),
    ]
    shapes = {row["case"]: row for row in rows}
    for name, row in shapes.items():
        shape = f"{row['T']} {row['N']} {row['I']} {row['H']}"
        shape += f" L{row['L']}" if row["L"] != "1" else ""
        shape += " bi" if row["D"] != "1" else ""
        found = [ratios.get((name, cell, mode)) for cell, mode in columns]
        values = ["" if ratio is None else f"{ratio:.2f}" for ratio in found]
        lines.append(f"| {name} | {shape} | " + " | ".join(values) + " |")
    lines.append("| **geometric mean** | | " + " | ".join(f"**{summary[c]['mean']:.2f}**" for c in columns) + " |")
    lines.append("| **worst** | | " + " | ".join(f"**{summary[c]['worst']:.2f}**" for c in columns) + " |")
    if plot is not None:
        lines += ["", f"![Ratios of all shapes with their quartiles]({plot})"]
    return "\n".join(lines)


def make_tables(folder: Path) -> str:
    """Returns the Markdown of all results in a folder. Raises TableError when there are none or one is unfit."""
    paths = [path for path in sorted(folder.glob("layers-*.csv")) if not path.name.startswith("layers-quick-")]
    if not paths:
        raise TableError(f"no results in {folder}: run benchmarks/layers.py --output {folder} first")
    parts = []
    for path in paths:
        plot = path.with_suffix(".png")
        link = plot.relative_to(ROOT).as_posix() if plot.is_file() and plot.is_relative_to(ROOT) else None
        parts.append(format_result(*read_results(path), link))
    return "\n\n".join(parts)


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
    try:
        old = options.readme.read_text()
        new = replace_tables(old, make_tables(options.results.resolve()))
    except (OSError, TableError) as error:
        print(f"readme_table.py: {error}", file=sys.stderr)
        return 1
    if options.check:
        if new != old:
            print(f"{options.readme} is out of date: run benchmarks/readme_table.py", file=sys.stderr)
            return 1
    elif new != old:
        options.readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
