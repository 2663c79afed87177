"""When two results agree.

float64: to rounding. float32 and the 16-bit types: the error against float64 on the same input is at most twice that of
torch.nn, plus a floor for the cases where torch happens to be exact: ``FLOOR`` times the dtype's epsilon, times the
largest magnitude in the tensor or 1 (the size of states and of the upstream gradients), whichever is larger. Twice that
floor for a cell with layer normalization, which divides by a spread and so multiplies what errors a product came with.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from strategies import DIFFERENTIABLE, OUTPUTS, Call
from torch import Tensor

from rnnfast import reference

TORCH_CELLS = ["rnn_tanh", "rnn_relu", "gru", "lstm"]
FLOOR = {torch.float32: 8.0, torch.bfloat16: 0.5, torch.float16: 0.5}
# A rectifier has a kink: where a sum is zero to rounding both slopes are right, and so are gradients that differ by a
# unit's whole share. In 16 bits one sample in ten meets that where it counts; a wrong kernel is wrong in every sample.
RELU_SAMPLES = 5
Results = dict[str, Tensor]


def evaluate(call: Call, op: Callable[..., tuple[Tensor, ...]], seed: int = 1) -> Results:
    """Outputs, and the gradients of one loss that mixes them all, for every tensor of the call that requires one."""
    outputs = call(op)
    two_states = call.reference().num_states == 2
    results = dict(zip(OUTPUTS if two_states else OUTPUTS[:2], outputs, strict=False))
    names = [name for name in DIFFERENTIABLE if name in call.tensors and call.tensors[name].requires_grad]
    if names:
        live = list(results.values())
        leaves = [call.tensors[name] for name in names]
        grads = torch.autograd.grad(live, leaves, [cotangent(y, seed) for y in live], materialize_grads=True)
        results |= {f"grad_{name}": grad for name, grad in zip(names, grads, strict=True)}
    return {name: value.detach() for name, value in results.items()}


def cotangent(y: Tensor, seed: int = 1) -> Tensor:
    """A random upstream gradient that is the same number in every dtype and on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    coarse = torch.randint(-8, 9, y.shape, generator=generator, device="cpu").to(torch.float64) / 8
    return coarse.to(dtype=y.dtype, device=y.device)


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Agreement in float64, up to the order of summation."""
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        have, want = actual[name].cpu(), want.cpu()
        assert have.shape == want.shape, f"{name}: shape {tuple(have.shape)}, expected {tuple(want.shape)}"
        assert have.dtype == want.dtype == torch.float64, f"{name}: {have.dtype}"
        if want.numel():
            scale = max(1.0, want.abs().max().item())
            torch.testing.assert_close(have, want, rtol=0.0, atol=1e-12 * scale, msg=lambda m, n=name: f"{n}: {m}")


def assert_as_accurate(
    ours: Mapping[str, Tensor], torchs: Mapping[str, Tensor], exact: Mapping[str, Tensor], floors: int = 1
) -> None:
    """The tolerance rule of the file's head, for float32 and the 16-bit types."""
    assert ours.keys() == exact.keys() == torchs.keys()
    exact = {name: want.cpu() for name, want in exact.items()}
    torch_errors = {name: largest(torchs[name].cpu().double() - want) for name, want in exact.items()}
    # The final states are the outputs of one step: too few numbers to judge by torch's luck with them alone.
    states = [name for name in exact if not name.startswith("grad_")]
    torch_errors |= dict.fromkeys(states, max(torch_errors[name] for name in states))
    for name, want in exact.items():
        have = ours[name].cpu()
        assert have.shape == want.shape, f"{name}: shape {tuple(have.shape)}, expected {tuple(want.shape)}"
        assert have.dtype == torchs[name].dtype, f"{name}: {have.dtype}, torch gives {torchs[name].dtype}"
        error = largest(have.double() - want)
        floor = floors * FLOOR[have.dtype] * torch.finfo(have.dtype).eps * max(1.0, largest(want))
        bound = 2 * torch_errors[name] + floor
        assert error <= bound, f"{name}: error {error:.3g}, torch's {torch_errors[name]:.3g}, allowed {bound:.3g}"


def in_some_sample(cell: str, dtype: torch.dtype, check: Callable[[int], None]) -> None:
    """Run ``check(0)``; for the rectifier in 16 bits, where that fails, ``check(1)`` and on, RELU_SAMPLES in all."""
    last = RELU_SAMPLES - 1 if cell == "rnn_relu" and dtype.itemsize == 2 else 0
    for sample in range(last + 1):
        try:
            return check(sample)
        except AssertionError as error:
            if sample == last:
                raise
            print(f"sample {sample} of {cell} in {dtype}, perhaps at the kink: {error}")


def largest(values: Tensor) -> float:
    """The largest magnitude; NaN if there is one, 0 if there is nothing."""
    return values.abs().max().item() if values.numel() else 0.0


def torch_op(cell: str) -> Callable[..., tuple[Tensor, ...]]:
    """What torch.nn computes, with the signature of our op; a reversed sequence is a second direction's share.

    For the cells that torch.nn has not it is ATen's operations one by one.
    """
    if cell not in TORCH_CELLS:
        return reference.CELLS[cell]

    def op(
        input: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor | None = None,
        bias_hh: Tensor | None = None,
        weight_hr: Tensor | None = None,
        batch_sizes: Tensor | None = None,
        reverse: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        single_step = batch_sizes is None and input.dim() == 2
        if single_step:
            input = input.unsqueeze(0)
        batch = input.shape[1] if batch_sizes is None else int(batch_sizes[0])
        directions = 2 if reverse else 1
        size = weight_hh.shape[1]

        def state(given: Tensor | None, width: int) -> Tensor:
            one = input.new_zeros(batch, width) if given is None else given
            return one.unsqueeze(0) if directions == 1 else torch.stack([torch.zeros_like(one), one])

        weights = [w for w in (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr) if w is not None] * directions
        hx = state(h0, size)
        if cell == "lstm":
            hx = (hx, state(c0, weight_hr.shape[1] if weight_hr is not None else size))
        leading = (input,) if batch_sizes is None else (input, batch_sizes)
        trailing = (directions == 2,) if batch_sizes is not None else (directions == 2, False)
        with warnings.catch_warnings():  # torch's own, about its own speed
            warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
            output, *final = getattr(torch, cell)(
                *leading, hx, weights, bias_ih is not None, 1, 0.0, torch.is_grad_enabled(), *trailing
            )
        output = output[..., -size:]
        c_n = final[1][-1] if cell == "lstm" else input.new_empty(0)
        return output.squeeze(0) if single_step else output, final[0][-1], c_n

    return op
