"""How a benchmark takes a number, and what it writes beside it.

Machines are shared and noisy, so two implementations are never timed one after the other: they take turns, and every
turn gives one ratio; the median of the ratios is reported with its interquartile range. torch.utils.benchmark.Timer
is not used for this: each of its timeit() calls first runs the statement twice more, which makes a call of half a
second three times as dear and lets the machine change between the two sides of a pair.
"""

import argparse
import ctypes
import datetime
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}

# A turn lasts at least this long, so that reading the clock (below 0.1 microseconds) and waking threads do not matter.
_TURN_SECONDS = 1e-3
_MIN_PAIRS = 5
_MAX_PAIRS = 200
# Enough pairs when the standard error of the median, estimated from the interquartile range, is below this share.
_TARGET_ERROR = 0.004


@dataclass(frozen=True)
class Paired:
    """Two implementations timed in turns.

    `ours` and `theirs` are median seconds per call, `ratio` the median of theirs / ours over the pairs of turns (above
    1: ours is faster), `low` and `high` the quartiles of that ratio, `pairs` the number of pairs.
    """

    ours: float
    theirs: float
    ratio: float
    low: float
    high: float
    pairs: int


def synchronize(device: torch.device) -> None:
    """Waits for the device; nothing to wait for on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _turn(call: Callable[[], object], calls: int, device: torch.device) -> float:
    if device.type == "cuda":
        return _turn_on_cuda(call, calls)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def _turn_on_cuda(call: Callable[[], object], calls: int) -> float:
    """By the device's own clock; the work before is done, so that the first call does not wait in a queue."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def seconds_of(call: Callable[[], object], device: torch.device, turns: int = 11) -> float:
    """Returns the median seconds per call of one thing alone: a yardstick, where no two are compared."""
    calls = calls_per_turn(call, device)
    return statistics.median(_turn(call, calls, device) for _ in range(turns))


def calls_per_turn(call: Callable[[], object], device: torch.device, seconds: float = _TURN_SECONDS) -> int:
    """Returns how many calls make a turn of at least `seconds`; runs the call four times to find out."""
    call()
    # The quickest of three: one call that the machine interrupted would make every turn a single call.
    quickest = min(_turn(call, 1, device) for _ in range(3))
    return max(1, math.ceil(seconds / max(quickest, 1e-7)))


def make_turn(
    call: Callable[[], object],
    device: torch.device,
    seconds: float = _TURN_SECONDS,
    prepare: Callable[[], object] | None = None,
) -> Callable[[], float]:
    """Returns a function that takes one turn, of at least `seconds`, and returns the seconds per call.

    `prepare` runs before each turn, outside the clock, and after it, where a turn has several calls, one call that is
    not timed: what `prepare` left asleep or cold is no part of the calls.
    """
    if prepare is not None:
        prepare()
    calls = calls_per_turn(call, device, seconds)

    def turn() -> float:
        if prepare is not None:
            prepare()
            if calls > 1:
                call()
        return _turn(call, calls, device)

    return turn


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns the lower quartile, median and upper quartile of at least one value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def _settled(times: Sequence[tuple[float, ...]]) -> bool:
    """Whether the median ratio of every other implementation to the first is known well enough."""
    if len(times) < 3 * _MIN_PAIRS:
        return False
    for other in range(1, len(times[0])):
        low, ratio, high = quartiles([round_[other] / round_[0] for round_ in times])
        # For a normal distribution the standard error of the median is 0.93 interquartile ranges / sqrt(n).
        if 0.93 * (high - low) / math.sqrt(len(times)) >= _TARGET_ERROR * ratio:
            return False
    return True


def take_turns(turns: Sequence[Callable[[], float]], seconds: float) -> list[tuple[float, ...]]:
    """Lets several implementations take turns until all ratios to the first are settled or `seconds` are spent.

    Returns one tuple per round, at least five, with the result of each of `turns`, in their order.
    """
    times: list[tuple[float, ...]] = []
    end = time.perf_counter() + seconds
    while len(times) < _MAX_PAIRS:
        # Who goes first alternates: otherwise whatever the first leaves behind (caches, frequency) falls on one side.
        order = [(len(times) + i) % len(turns) for i in range(len(turns))]
        taken = {i: turns[i]() for i in order}
        times.append(tuple(taken[i] for i in range(len(turns))))
        if len(times) >= _MIN_PAIRS and (_settled(times) or time.perf_counter() > end):
            break
    return times


def pair(times: Sequence[tuple[float, ...]], other: int) -> Paired:
    """Sets the first implementation of the rounds of `take_turns` against another, by its number."""
    low, ratio, high = quartiles([round_[other] / round_[0] for round_ in times])
    return Paired(
        ours=statistics.median(round_[0] for round_ in times),
        theirs=statistics.median(round_[other] for round_ in times),
        ratio=ratio,
        low=low,
        high=high,
        pairs=len(times),
    )


def interleave(
    ours: Callable[[], object], theirs: Callable[[], object], seconds: float, device: torch.device
) -> Paired:
    """Times two calls in turns until the median ratio is settled or `seconds` are spent (at least five pairs)."""
    return pair(take_turns([make_turn(ours, device), make_turn(theirs, device)], seconds), 1)


def geometric_mean(values: Iterable[float]) -> float:
    """Returns the geometric mean of at least one positive value."""
    return statistics.geometric_mean(values)


def _cpu_model() -> str:
    # platform.processor() is empty on most Linux systems.
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model"):
                return value.strip()
    return platform.processor() or platform.machine()


def _git_sha() -> str:
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        sha = git("rev-parse", "HEAD")
        # Only the code that is measured makes a result unrepeatable; a table not committed yet does not.
        return sha + ("-dirty" if git("status", "--porcelain", "--", "csrc", "rnnfast", "setup.py") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"  # not a checkout, or no git


def peak_megabytes(call: Callable[[], object]) -> float | None:
    """Returns by how much a call raises the resident memory at most, or None where the system does not tell."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def read(name: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(name))
        return int(line.split()[1])

    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed goes back to the system, so that it counts again
        clear.write_text("5")  # the highest resident size starts again from the present one
        before = read("VmRSS")
        call()
        return round((read("VmHWM") - before) / 1024, 1)
    except (OSError, StopIteration, AttributeError):
        return None


def available_cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _busy_seconds() -> float | None:
    """Returns the processor seconds spent since boot on the cores we may use, by everyone; None where nobody tells."""
    stat = Path("/proc/stat")
    if not stat.is_file() or not hasattr(os, "sched_getaffinity"):
        return None
    names = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    ticks = 0
    for line in stat.read_text().splitlines():
        name, *fields = line.split()
        if name in names:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
            ticks += user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """Returns the processor seconds of this process and of the processes that it started and that have ended."""
    children = os.times()
    return time.process_time() + children.children_user + children.children_system


class OtherWork:
    """How busy others keep the machine, from its construction on.

    Taking turns guards against a machine that changes, not against one that is full: threads that wait for one another
    while one of them has no core lose a factor of hundreds, and not the same for both implementations.
    """

    def __init__(self) -> None:
        self._wall, self._busy, self._own = time.perf_counter(), _busy_seconds(), _own_seconds()

    def cores(self) -> float | None:
        """Returns how many cores others used on average, or None where the system does not tell."""
        busy = _busy_seconds()
        if busy is None or self._busy is None:
            return None
        own = _own_seconds() - self._own
        return max(busy - self._busy - own, 0.0) / max(time.perf_counter() - self._wall, 1e-3)

    def finish(self, run: dict[str, Any]) -> None:
        """Notes the cores in the description of the run as `other_work_cores`, and warns when too few were left."""
        cores = self.cores()
        run["other_work_cores"] = None if cores is None else round(cores, 2)
        if cores is not None and cores > max(available_cores() - run["threads"], 0) + 0.15:
            print(
                f"warning: other work kept {cores:.1f} of {available_cores()} cores busy during this run of "
                f"{run['threads']} thread(s): these times are not to be trusted",
                file=sys.stderr,
            )


def describe_run(device: torch.device, dtype: torch.dtype, threads: int) -> dict[str, Any]:
    """Returns what a reader needs to judge or repeat a result: machine, versions, commit, date (UTC)."""
    import rnnfast
    from rnnfast import _C

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "git_sha": _git_sha(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model(),
        "cores": available_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rnnfast": rnnfast.__version__,
        "rnnfast_build": _C.build_info(),
        "instruction_set": _C.get_isa(),
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": threads,
    }


def positive_int(text: str) -> int:
    """Reads an integer of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def positive_float(text: str) -> float:
    """Reads a finite number above 0, for argparse."""
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return value


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that every benchmark shares: --device, --dtype, --threads."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="default: %(default)s")
    parser.add_argument(
        "--threads",
        type=positive_int,
        default=None,
        metavar="COUNT",
        help="threads torch and rnnfast may each use (torch.set_num_threads); default: torch's own choice",
    )


def start_run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> tuple[torch.device, torch.dtype, int]:
    """Checks what argparse cannot, sets the thread count, and returns device, dtype and threads."""
    from rnnfast import _C

    device = torch.device(options.device)
    if device.type == "cuda":
        build = _C.build_info()
        if not build["cuda"]:
            parser.error(f"--device cuda: this build of rnnfast has no CUDA kernels ({build['cuda_reason']})")
        if not torch.cuda.is_available():
            parser.error("--device cuda: torch sees no CUDA device")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return device, DTYPES[options.dtype], torch.get_num_threads()


def make_output_folder(parser: argparse.ArgumentParser, folder: Path, option: str = "--output") -> Path:
    """Creates the folder and proves that it can be written, before any work is done for it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        parser.error(f"{option} {folder}: cannot be written ({error})")
    return folder
