"""Threads and processes: torch's thread count, the interpreter lock, several callers, forked workers."""

import os
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from agreement import assert_same
from pairs import LAYERS, H, I, N, T, evaluate_module, pair, run_python, tensors_of

import rnnfast

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="counts threads in /proc, which is not here"
)
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@needs_proc
@pytest.mark.parametrize("threads", [1, 2])
def test_thread_count_is_obeyed(tmp_path, threads):
    """The process has no more threads after large calls than torch was told to use."""
    result = run_python(
        "import os, torch\n"
        f"torch.set_num_threads({threads})\n"
        "import rnnfast\n"
        "tasks = lambda: len(os.listdir('/proc/self/task'))\n"
        "before = tasks()\n"
        "for name in ('RNN', 'GRU', 'LSTM'):\n"
        "    for dtype in (torch.float32, torch.float64, torch.bfloat16):\n"
        "        module = getattr(rnnfast, name)(64, 128, num_layers=2, bidirectional=True, dtype=dtype)\n"
        "        for batch in (1, 40):\n"
        "            module(torch.randn(20, batch, 64, dtype=dtype))[0].sum().backward()\n"
        "            with torch.no_grad():\n"
        "                module(torch.randn(20, batch, 64, dtype=dtype))\n"
        "print(before, tasks())\n",
        tmp_path,
    )
    before, after = map(int, result.stdout.split())
    # The autograd engine may start a thread of its own; the pool adds one less than the number asked for.
    assert after - before <= threads - 1 + 1, f"{before} threads before, {after} after"


@pytest.mark.parametrize("layer", LAYERS)
def test_results_do_not_depend_on_when(layer):
    """Bitwise the same at one thread count, whatever ran between."""
    _, ours = pair(layer, 40, 70, num_layers=2, bidirectional=True)
    x = torch.randn(15, 21, 40)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        first = evaluate_module(ours, x)
        for _ in range(3):
            torch.randn(200, 200) @ torch.randn(200, 200)
            again = evaluate_module(ours, x)
            assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize("layer", LAYERS)
def test_several_python_threads_call_one_module(layer):
    """Forward and backward from four threads at once, each with its own input, on one module."""
    theirs, ours = pair(layer, 20, 33, num_layers=2, dtype=torch.float64)
    inputs = [torch.randn(10 + n, 3 + n, 20, dtype=torch.float64) for n in range(4)]
    expected = [evaluate_module(theirs, x) for x in inputs]
    failures: list[BaseException] = []
    start = threading.Barrier(len(inputs))

    def work(index: int) -> None:
        try:
            torch.set_num_threads(1 + index % 2)
            start.wait(timeout=60)
            for _ in range(10):
                assert_same(evaluate_module(ours, inputs[index]), expected[index])
                with torch.no_grad():
                    torch.testing.assert_close(ours(inputs[index])[0], expected[index]["output_0"])
        except BaseException as failure:  # carried to the main thread and raised there
            failures.append(failure)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
        assert not worker.is_alive(), "deadlock"
    if failures:
        raise failures[0]


@pytest.mark.parametrize("layer", LAYERS)
def test_interpreter_lock_is_released(layer):
    """While a long call runs, another Python thread goes on."""
    _, ours = pair(layer, 64, 256, num_layers=1)
    torch.set_num_threads(1)
    x = torch.randn(60, 64, 64)
    steps = 60
    with torch.no_grad():
        while True:  # a call long enough to see
            began = time.perf_counter()
            ours(x)
            took = time.perf_counter() - began
            if took > 0.3:
                break
            steps *= 4
            x = torch.randn(steps, 64, 64)
        spans: list[tuple[float, float]] = []

        def call() -> None:
            with torch.no_grad():
                began = time.perf_counter()
                ours(x)
                spans.append((began, time.perf_counter()))

        worker = threading.Thread(target=call)
        ticks = []
        worker.start()
        while worker.is_alive():
            ticks.append(time.perf_counter())
            time.sleep(0.001)
        worker.join()
    ((began, ended),) = spans
    during = [tick for tick in ticks if began < tick < ended]
    longest = max(b - a for a, b in zip([began, *during], [*during, ended], strict=True))
    assert longest < 0.5 * (ended - began), f"{longest:.3f} s without the lock in a call of {ended - began:.3f} s"


class Sums(torch.utils.data.Dataset):
    """Items computed by a module, in whichever process asks for them."""

    def __init__(self, module: torch.nn.Module, inputs: torch.Tensor) -> None:
        self.module, self.inputs = module, inputs

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> torch.Tensor:
        x = self.inputs[index].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(sum(y.square().sum() for y in tensors_of(self.module(x))), x)
        return gradient


@needs_fork
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:os.fork.. was called:RuntimeWarning")  # JAX's, where another test imported it
@pytest.mark.parametrize("layer", LAYERS)
def test_forked_worker_after_the_parent_used_the_kernels(layer):
    """A DataLoader worker computes with the module that its parent has used on two threads."""
    torch.set_num_threads(2)
    _, ours = pair(layer, I, 40)
    inputs = torch.randn(4, T, N, I)
    data = Sums(ours, inputs)
    with torch.no_grad():
        ours(torch.randn(30, 40, I))
    # Backward in the parent would start autograd's own threads, which no fork survives: torch refuses that by itself.
    loader = torch.utils.data.DataLoader(
        data, num_workers=2, multiprocessing_context="fork", timeout=60, batch_size=None
    )
    gradients = list(loader)
    for index, gradient in enumerate(gradients):
        torch.testing.assert_close(gradient, data[index], rtol=1e-5, atol=1e-6)


@needs_fork
def test_forked_child_with_threads_of_its_own(tmp_path):
    """A forked child may raise its thread count again; it finishes and agrees."""
    run_python(
        "import os, sys, torch, rnnfast\n"
        "torch.set_num_threads(2)\n"
        f"module = rnnfast.LSTM({I}, {H}).requires_grad_(False)\n"
        f"x = torch.randn(30, 40, {I})\n"
        "want = module(x)[0]\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    torch.set_num_threads(1)\n"
        "    os._exit(0 if torch.allclose(module(x)[0], want, atol=1e-6) else 3)\n"
        "_, status = os.waitpid(child, 0)\n"
        "sys.exit(os.waitstatus_to_exitcode(status))\n",
        tmp_path,
        PYTHONWARNINGS="ignore::DeprecationWarning",
    )


def test_inside_a_thread_pool_of_torch():
    """torch.jit.fork and friends aside: a call from a thread that never touched torch before."""
    _, ours = pair("gru", dtype=torch.float64)
    x = torch.randn(T, N, I, dtype=torch.float64)
    want = evaluate_module(ours, x)
    results = []
    thread = threading.Thread(target=lambda: results.append(evaluate_module(ours, x)))
    thread.start()
    thread.join()
    assert_same(results[0], want)
    assert sys.modules["rnnfast"] is rnnfast
