"""What the tests of the benchmarks share. The scripts are imported by their bare names, as they import one another
(`pythonpath` in pyproject.toml)."""

import subprocess
import sys
from pathlib import Path

import cases
import measure
import torch

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
SMALL = cases.Case("small", 5, 3, 4, 6, 2, 2, "made up for the tests")
CPU = torch.device("cpu")
ON_CPU = f"cpu-{measure.describe_run(CPU, torch.float32, 1)['instruction_set']}"


def run(script, *arguments):
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
