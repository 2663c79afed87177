"""A small training loop in plain PyTorch, for the heads of this package or any model with a loss.

It is the loop one would write: zero the gradients, loss, backward, clip, step. What it adds is what a run needs to be
trusted: losses that are not finite stop it, checkpoints are whole files or none, a run that was killed goes on to the
same result, and a CSV log says what happened.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rnnfast.text import Vocab, _store

__all__ = ["Epoch", "NonFiniteLossError", "average_gradients", "fit", "largest_gradient", "plot_curves"]


class NonFiniteLossError(FloatingPointError):
    """A loss or a gradient is infinite or NaN: the message names the step and the largest gradient."""


@dataclass(frozen=True)
class Epoch:
    """What one epoch came to: a line of the log.

    Attributes:
        epoch: from 1.
        steps: since the start of the run.
        loss: the mean of the steps' losses.
        validation: what ``validate`` gave, NaN without one.
    """

    epoch: int
    steps: int
    loss: float
    validation: float


class _Largest(NamedTuple):
    name: str
    value: float


def largest_gradient(model: nn.Module) -> _Largest:
    """Name and magnitude of the largest element of all gradients; a NaN counts as larger than any number."""
    found = _Largest("none", 0.0)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.numel():
            value = float(parameter.grad.detach().abs().max())
            if math.isnan(value):
                return _Largest(name, value)
            if value > found.value:
                found = _Largest(name, value)
    return found


def average_gradients(model: nn.Module) -> None:
    """Make each gradient the mean over the processes of ``torch.distributed``, if there are any.

    With equal shares of a batch and losses that are means, this is the gradient of the joint batch.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if grads:
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        means = torch.split(flat, [grad.numel() for grad in grads])
        for grad, mean in zip(grads, means, strict=True):
            grad.copy_(mean.view_as(grad))


def fit(
    model: nn.Module,
    batches: Callable[[int], Iterable[Any]],
    loss: Callable[[Any], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    clip: float | None = None,
    validate: Callable[[], float] | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = False,
    autocast: torch.dtype | None = None,
    vocab: Vocab | None = None,
    after_epoch: Callable[[Epoch], object] | None = None,
) -> list[Epoch]:
    """Train a model; with a folder, so that it can be killed at any time and called again.

    The folder holds ``last.pt`` (model, optimizer, torch's random state and the log, after each epoch), ``best.pt``
    (the model's state_dict at the lowest validation) and ``log.csv``. A call that finds ``last.pt`` goes on after it,
    to the same numbers as an unbroken run, if ``batches`` gives the same batches for the same epoch.

    Under ``torch.distributed`` every process calls it with its own share of each batch; gradients are averaged, and
    only process 0 writes.

    Args:
        model: on its device, in the mode in which it is to be trained.
        batches: gives the batches of an epoch, numbered from 1. Shuffle by a generator seeded with the number.
        loss: of one batch, a mean.
        optimizer: of the model's parameters.
        epochs: how many in all, those of an earlier call included.
        clip: the largest norm of all gradients together, or None.
        validate: the number to minimise, such as the perplexity of a held-out text.
        folder: where to keep checkpoints and log; made if missing.
        progress: show a bar of the epochs; needs tqdm.
        autocast: run ``loss`` and ``validate`` under torch.autocast with this dtype, torch.bfloat16.
        vocab: of the text the model is trained on; kept in the checkpoint, so that another one is refused.
        after_epoch: called with each new line of the log, after its checkpoint is written.

    Returns:
        One :class:`Epoch` for each, those of earlier calls included.

    Raises:
        NonFiniteLossError: a loss or gradient is not finite. The last good checkpoint stays as it is.
        ValueError: an option out of range, an epoch without batches, or a checkpoint of another vocabulary.
        RuntimeError: a checkpoint of another model.
    """
    if autocast not in (None, torch.bfloat16):
        raise ValueError(
            f"autocast: expected torch.bfloat16 or None (float16 would need scaled losses), got {autocast}"
        )
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    if epochs < 0:
        raise ValueError(f"epochs: expected at least 0, got {epochs}")
    if clip is not None and not (math.isfinite(clip) and clip > 0):
        raise ValueError(f"clip: expected a finite number above 0, got {clip}")
    directory = None if folder is None else Path(folder)
    log = [] if directory is None else _resume(directory / "last.pt", model, optimizer, vocab)
    steps = log[-1].steps if log else 0
    numbers: Iterable[int] = range(len(log) + 1, epochs + 1)
    if progress:
        from tqdm import tqdm  # type: ignore[import-untyped]  # of the extra `bench`: not needed without a bar

        numbers = tqdm(numbers, unit="epoch", initial=len(log), total=epochs)
    for number in numbers:
        losses = []
        for batch in batches(number):
            steps += 1
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, autocast, enabled=autocast is not None):
                value = loss(batch)
            value.backward()  # type: ignore[no-untyped-call]
            average_gradients(model)
            norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf if clip is None else clip)
            losses.append(value.item())
            if not (math.isfinite(losses[-1]) and math.isfinite(norm)):
                # clipping by a norm that is not finite has made the gradients NaN: find the culprit again
                optimizer.zero_grad(set_to_none=True)
                with torch.autocast(device, autocast, enabled=autocast is not None):
                    value = loss(batch)
                value.backward()  # type: ignore[no-untyped-call]
                name, size = largest_gradient(model)
                raise NonFiniteLossError(
                    f"the loss is {losses[-1]} and the norm of the gradients {float(norm)} at step {steps} (epoch "
                    f"{number}); the largest gradient is {size} of {name}. A smaller learning rate or clip may help"
                    + ("" if directory is None else f"; the last good checkpoint is in {directory}")
                )
            optimizer.step()
        if not losses:
            raise ValueError(f"batches: expected at least one in epoch {number}, got none")
        best = min((line.validation for line in log if not math.isnan(line.validation)), default=math.inf)
        with torch.autocast(device, autocast, enabled=autocast is not None):
            reached = math.nan if validate is None else validate()
        entry = Epoch(number, steps, math.fsum(losses) / len(losses), reached)
        log.append(entry)
        if directory is not None and _is_first_process():
            _save(directory, model, optimizer, log, vocab, is_best=entry.validation < best)
        if after_epoch is not None:
            after_epoch(entry)
    return log


def plot_curves(logs: Mapping[str, list[Epoch]], path: str | os.PathLike[str], *, title: str = "") -> None:
    """Draw learning curves into a file: the loss of each run over its epochs and, where there is one, its validation.

    Args:
        logs: the runs by name, each as :func:`fit` gives it.
        path: the picture; its ending says the format.
        title: above it.

    Raises:
        ValueError: no run, or one without epochs.
        OSError: the file cannot be written.
    """
    if not logs or not all(logs.values()):
        raise ValueError(f"logs: expected at least one run, each of at least one epoch, got {list(logs)}")
    from matplotlib.figure import Figure  # of the extra `bench`: not needed without a picture

    measures = ["loss"]
    if any(not math.isnan(entry.validation) for log in logs.values() for entry in log):
        measures.append("validation")
    figure = Figure(figsize=(1 + 5 * len(measures), 4), layout="constrained")
    panels = figure.subplots(1, len(measures), squeeze=False)[0]
    for panel, measure in zip(panels, measures, strict=True):
        for name, log in logs.items():
            panel.plot([entry.epoch for entry in log], [getattr(entry, measure) for entry in log], label=name)
        panel.set(xlabel="epoch", ylabel=measure, yscale="log" if measure == "validation" else "linear")
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    figure.suptitle(title, fontsize="small")
    figure.savefig(path, dpi=120)


def _is_first_process() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _save(
    directory: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    log: list[Epoch],
    vocab: Vocab | None,
    *,
    is_best: bool,
) -> None:
    """Each file in one step; ``last.pt`` last, for it is what a run goes on from."""
    lines = io.StringIO()
    writer = csv.DictWriter(lines, list(asdict(log[0])))
    writer.writeheader()
    writer.writerows(asdict(entry) for entry in log)
    _store(lines.getvalue().encode(), directory / "log.csv")
    if is_best:
        _store(_bytes(model.state_dict()), directory / "best.pt")
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "log": [asdict(entry) for entry in log],
        "vocab": None if vocab is None else list(vocab.tokens),
    }
    _store(_bytes(checkpoint), directory / "last.pt")


def _bytes(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, vocab: Vocab | None) -> list[Epoch]:
    """Load the checkpoint if there is one; the log so far."""
    if not path.is_file():
        return []
    checkpoint = torch.load(path, weights_only=True)
    there = checkpoint.get("vocab")
    if vocab is not None and there is not None and tuple(there) != vocab.tokens:
        pairs = zip(there, vocab.tokens, strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(there), len(vocab)))
        raise ValueError(
            f"vocab: expected the one that {path} was trained with, of {len(there)} tokens, got one of {len(vocab)}; "
            f"they differ from token number {first} on"
        )
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    torch.set_rng_state(checkpoint["random"])
    return [Epoch(**entry) for entry in checkpoint["log"]]
