"""How much torch.func's transforms save over loops in Python, and torch.compile over eager.

Three questions: per-sample gradients by vmap(grad) and by a loop over the samples, of our layer and of torch.nn's; an
ensemble of stacked weights by vmap and by one call for each member; a compiled model (linear, LSTM, linear) and the
same in eager mode. Each answer is checked before it is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from measure import OtherWork, Paired, add_run_options, describe_run, interleave, positive_float, start_run
from torch.func import functional_call, grad, stack_module_state, vmap

import rnnfast

Question = tuple[str, Callable[[], object], Callable[[], object]]


def per_sample_gradients(cell: str, device: torch.device, dtype: torch.dtype, stock: bool = False) -> Question:
    """N = 64 samples of T = 32 steps, H = 128: vmap(grad) against autograd for each sample, by us or torch.nn."""
    layer = getattr(rnnfast, cell)(128, 128, device=device, dtype=dtype)
    parameters = dict(layer.named_parameters())
    detached = {name: p.detach() for name, p in parameters.items()}
    xs = torch.randn(64, 32, 128, device=device, dtype=dtype)

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return functional_call(layer, parameters, (x,))[0].square().mean()

    mapped = vmap(grad(loss), in_dims=(None, 0))
    looped = layer.to_torch() if stock else layer

    def ours() -> dict[str, torch.Tensor]:
        return mapped(detached, xs)

    def loop() -> dict[str, torch.Tensor]:
        every = [torch.autograd.grad(looped(x)[0].square().mean(), list(parameters.values())) for x in xs]
        return {name: torch.stack(parts) for name, parts in zip(parameters, zip(*every, strict=True), strict=True)}

    return f"{cell}: per-sample gradients{', loop of torch.nn' if stock else ''}", ours, loop


def ensemble(cell: str, device: torch.device, dtype: torch.dtype) -> Question:
    """8 members with N = 1, H = 64, T = 32: vmap over their stacked weights against 8 calls."""
    members = [getattr(rnnfast, cell)(64, 64, device=device, dtype=dtype) for _ in range(8)]
    parameters, buffers = stack_module_state(members)
    parameters = {name: p.detach() for name, p in parameters.items()}
    x = torch.randn(32, 1, 64, device=device, dtype=dtype)

    def one(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional_call(members[0], (parameters, buffers), (x,))[0]

    mapped = vmap(one)

    @torch.no_grad()
    def ours() -> torch.Tensor:
        return mapped(parameters)

    @torch.no_grad()
    def loop() -> torch.Tensor:
        return torch.stack([member(x)[0] for member in members])

    return f"{cell}: ensemble of 8", ours, loop


class _Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.layer, self.after = torch.nn.Linear(64, 128), rnnfast.LSTM(128, 128), torch.nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.layer(self.before(x))[0])


def compiled(device: torch.device, dtype: torch.dtype) -> Question:
    """Training steps of linear + LSTM + linear, T = 32, N = 16, H = 128: compiled against eager."""
    torch._dynamo.config.allow_rnn = True
    model = _Model().to(device=device, dtype=dtype)
    fast = torch.compile(model, fullgraph=True)
    x = torch.randn(32, 16, 64, device=device, dtype=dtype)

    def step(model: Callable[[torch.Tensor], torch.Tensor], parameters: list[torch.nn.Parameter]) -> object:
        return torch.autograd.grad(model(x).square().mean(), parameters)

    parameters = list(model.parameters())
    return "linear + LSTM + linear, training step", lambda: step(fast, parameters), lambda: step(model, parameters)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_options(parser)
    parser.add_argument(
        "--seconds", type=positive_float, default=5.0, help="at most, per question; default: %(default)s"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which needs g++")
    options = parser.parse_args(arguments)
    device, dtype, threads = start_run(parser, options)
    work, run = OtherWork(), describe_run(device, dtype, threads)
    torch.manual_seed(0)
    questions = [
        make(cell, device, dtype) for make in (per_sample_gradients, ensemble) for cell in ("RNN", "GRU", "LSTM")
    ]
    questions += [per_sample_gradients(cell, device, dtype, stock=True) for cell in ("RNN", "GRU", "LSTM")]
    if not options.no_compile:
        questions.append(compiled(device, dtype))
    print(f"{'question':<48} {'ours ms':>9} {'other ms':>9} {'ratio':>6} (quartiles)")
    for name, ours, other in questions:
        tolerance = 1e-4 if dtype in (torch.float32, torch.float64) else 0.1
        torch.testing.assert_close(ours(), other(), rtol=tolerance, atol=tolerance)
        paired: Paired = interleave(ours, other, options.seconds, device)
        print(
            f"{name:<48} {paired.ours * 1e3:9.3f} {paired.theirs * 1e3:9.3f} {paired.ratio:6.2f} "
            f"({paired.low:.2f} to {paired.high:.2f})",
            flush=True,
        )
    work.finish(run)


if __name__ == "__main__":
    main()
