"""``python -m rnnfast``: describe this installation and check it. Exits with 1 when a check fails.

The check runs every cell forward and backward, in float32 and float64, on every instruction set of the machine and on
its CUDA device where this build has kernels for it, and compares outputs and gradients with :mod:`rnnfast.reference` in
float64.
"""

import platform
import sys
import time
from typing import Any

import torch
from torch import Tensor

import rnnfast
from rnnfast import _C, reference

# T, N, I, H: round and odd ones, one sequence and several, more units than one vector holds.
_SHAPES = ((1, 1, 3, 5), (7, 1, 4, 33), (5, 6, 8, 16), (9, 4, 5, 40))
# Of the largest magnitude compared: room for the order of summation over these few steps.
_TOLERANCES = {torch.float32: 2e-5, torch.float64: 1e-12}


def _describe() -> None:
    info = _C.build_info()
    isas = ", ".join(rnnfast.supported_isas())
    lines = {
        "rnnfast": rnnfast.__version__,
        "torch": f"{torch.__version__} (built for {info['torch']})",
        "python": platform.python_version(),
        "compiler": info["compiler"],
        "instruction set": f"{rnnfast.get_isa()} (of {isas}; RNNFAST_ISA chooses)",
        "threads": f"{torch.get_num_threads()} (torch.set_num_threads)",
        "cuda": f"{'yes' if info['cuda'] else 'no'}: {info['cuda_reason']}",
        "cuda device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use",
    }
    for name, value in lines.items():
        print(f"{name:<16}{value}")


def _arguments(cell: dict[str, Any], shape: tuple[int, int, int, int]) -> list[Tensor | None]:
    """The op's first eight arguments, weight_ch and weight_ln, in float64."""
    steps, batch, inputs, hidden = shape
    gates, peepholes, norm_vectors = (cell[f"num_{what}"] for what in ("gates", "peepholes", "norm_vectors"))
    generator = torch.Generator().manual_seed(0)

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=generator, dtype=torch.float64) - 0.5

    return [
        uniform(steps, batch, inputs),
        uniform(batch, hidden),
        uniform(batch, hidden) if cell["num_states"] == 2 else None,
        uniform(gates * hidden, inputs),
        uniform(gates * hidden, hidden),
        uniform(gates * hidden),
        uniform(gates * hidden),
        None,
        uniform(peepholes * hidden) if peepholes else None,
        uniform(norm_vectors * hidden) if norm_vectors else None,
    ]


def _evaluate(
    op: object, arguments: list[Tensor | None], dtype: torch.dtype, reverse: bool, device: str = "cpu"
) -> list[Tensor]:
    """Outputs, then the gradients of one loss that mixes all of them."""
    assert callable(op)
    leaves = [None if tensor is None else tensor.to(device, dtype).requires_grad_() for tensor in arguments]
    extras = {"reverse": reverse, "weight_ch": leaves[8], "weight_ln": leaves[9]}
    outputs = [out for out in op(*leaves[:8], **extras) if out.requires_grad]
    loss = torch.stack([(out.double() * (1 + out.detach().double().cos())).sum() for out in outputs]).sum()
    gradients = torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None])
    return [tensor.detach().double().cpu() for tensor in (*outputs, *gradients)]


def _check(cell: dict[str, Any], device: str) -> tuple[float, int]:
    """The largest error over the tolerance (good up to 1), and the number of comparisons; for the present ISA."""
    worst, count = 0.0, 0
    for shape in _SHAPES:
        arguments = _arguments(cell, shape)
        for reverse in (False, True):
            exact = _evaluate(getattr(reference, cell["name"]), arguments, torch.float64, reverse)
            for dtype, tolerance in _TOLERANCES.items():
                ours = _evaluate(getattr(torch.ops.rnnfast, cell["name"]), arguments, dtype, reverse, device)
                for have, want in zip(ours, exact, strict=True):
                    error = (have - want).abs().max().item() / max(1.0, want.abs().max().item())
                    worst = max(worst, error / tolerance if error == error else float("inf"))
                    count += 1
    return worst, count


def main() -> int:
    """Print the description, run the check, and give the exit status."""
    _describe()
    print()
    start, before, failures = time.perf_counter(), rnnfast.get_isa(), 0
    kernels = list(rnnfast.supported_isas())
    if _C.build_info()["cuda"] and torch.cuda.is_available():
        kernels.append("cuda")
        # No tf32 in float32 products: to the end of the process, which is near.
        torch.backends.cudnn.rnn.fp32_precision = "ieee"  # type: ignore[attr-defined]
    for kernel in kernels:
        device = "cuda" if kernel == "cuda" else "cpu"
        if device == "cpu":
            rnnfast.set_isa(kernel)
        for cell in _C.cells():
            if device == "cuda" and not cell["on_cuda"]:
                print(f"none    {cell['name']:<21} {kernel:<9} this cell has no kernels there")
                continue
            worst, count = _check(cell, device)
            failures += not worst <= 1
            print(
                f"{'ok    ' if worst <= 1 else 'FAILED'}  {cell['name']:<21} {kernel:<9} forward and gradient, "
                f"{count} comparisons, largest error {worst:.2f} of the tolerance"
            )
    rnnfast.set_isa(before)
    print(
        f"\n{'all checks passed' if not failures else f'{failures} checks FAILED'}, {time.perf_counter() - start:.1f} s"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
