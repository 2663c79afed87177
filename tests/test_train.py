"""The training loop: plain steps, clipping, resuming, refusals, two processes."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rnnfast
from rnnfast import RNNLM
from rnnfast.text import Vocab, split_windows, window_loader
from rnnfast.train import NonFiniteLossError, fit, largest_gradient, plot_curves

ROOT = Path(__file__).resolve().parent.parent
TEXT = "the quick brown fox jumps over the lazy dog and runs away " * 8


class Run:
    """A small model on a small text; everything follows from the seed."""

    def __init__(self, seed=0, optimizer="Adam", dropout=0.2):
        torch.manual_seed(seed)
        vocab = Vocab(TEXT)
        self.train, self.held_out = split_windows(vocab.encode(TEXT), 8, 200, 100)
        self.model = RNNLM(rnnfast.GRU(len(vocab), 12), len(vocab), dropout=dropout)
        self.optimizer = getattr(torch.optim, optimizer)(self.model.parameters(), lr=0.05)

    def batches(self, epoch):
        return window_loader(self.train, 50, generator=torch.Generator().manual_seed(epoch))

    def loss(self, batch):
        return self.model.loss(*batch)[0]

    def validate(self):
        return self.model.perplexity(*self.held_out.__getitems__(range(100)))

    def fit(self, epochs, **options):
        return fit(self.model, self.batches, self.loss, self.optimizer, epochs=epochs, **options)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_steps_are_the_plain_ones(optimizer, clip):
    ours = Run(optimizer=optimizer)
    log = ours.fit(2, clip=clip)
    plain = Run(optimizer=optimizer)  # sets the seed again: the same weights and the same dropout
    losses = []
    for epoch in (1, 2):
        for batch in plain.batches(epoch):
            plain.optimizer.zero_grad()
            loss = plain.loss(batch)
            loss.backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(plain.model.parameters(), clip)
            plain.optimizer.step()
            losses.append(loss.item())
    for a, b in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        assert a.equal(b)
    assert [entry.steps for entry in log] == [4, 8]
    assert [entry.loss for entry in log] == [math.fsum(losses[:4]) / 4, math.fsum(losses[4:]) / 4]
    assert math.isnan(log[0].validation)


def test_training_lowers_the_perplexity_and_keeps_the_best(tmp_path):
    run = Run()
    log = run.fit(8, clip=1.0, validate=run.validate, folder=tmp_path)
    assert log[-1].validation < 0.5 * log[0].validation
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["validation"]) for row in rows] == [entry.validation for entry in log]
    best = Run(seed=9)
    best.model.load_state_dict(torch.load(tmp_path / "best.pt", weights_only=True))
    assert best.validate() == min(entry.validation for entry in log)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "last.pt", "log.csv"]


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_a_killed_run_goes_on_to_the_same_result(tmp_path, optimizer):
    """The kill comes in the middle of epoch 3; dropout draws from torch's generator all the while."""
    whole = Run(optimizer=optimizer)
    wanted = whole.fit(5, validate=whole.validate)

    class Killed(Exception):
        pass

    broken = Run(optimizer=optimizer)
    seen = []

    def loss(batch):
        seen.append(batch)
        if len(seen) == 11:
            raise Killed
        return broken.loss(batch)

    with pytest.raises(Killed):
        fit(broken.model, broken.batches, loss, broken.optimizer, epochs=5, validate=broken.validate, folder=tmp_path)
    resumed = Run(seed=7, optimizer=optimizer)
    log = resumed.fit(5, validate=resumed.validate, folder=tmp_path)
    assert log == wanted
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert a.equal(b)
    assert resumed.fit(5, folder=tmp_path) == wanted, "nothing is left to do"


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_numbers_that_are_not_finite_stop_training(tmp_path, where):
    run = Run(dropout=0.0)
    run.fit(2, folder=tmp_path)
    kept = (tmp_path / "last.pt").read_bytes()
    before = [parameter.detach().clone() for parameter in run.model.parameters()]

    def loss(batch):
        if where == "loss":
            return run.loss(batch) + run.model.output.bias.sum() * math.inf
        return run.loss(batch) + run.model.output.bias[0].sub(run.model.output.bias[0].detach()).abs().sqrt()

    with pytest.raises(NonFiniteLossError) as error:
        fit(run.model, run.batches, loss, run.optimizer, epochs=3, clip=1.0, folder=tmp_path)
    assert "at step 9 (epoch 3)" in str(error.value)
    assert "of output.bias" in str(error.value)
    assert f"the last good checkpoint is in {tmp_path}" in str(error.value)
    assert (tmp_path / "last.pt").read_bytes() == kept
    assert all(a.equal(b) for a, b in zip(before, run.model.parameters(), strict=True))


def test_largest_gradient():
    model = torch.nn.Linear(2, 2)
    assert largest_gradient(model) == ("none", 0.0)
    model.weight.grad = torch.tensor([[1.0, -7.0], [2.0, 3.0]])
    model.bias.grad = torch.tensor([4.0, 5.0])
    assert largest_gradient(model) == ("weight", 7.0)
    model.bias.grad[0] = math.nan
    assert largest_gradient(model).name == "bias"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"epochs": -1}, "epochs: expected at least 0, got -1"),
        ({"clip": 0.0}, "clip: expected a finite number above 0, got 0.0"),
        ({"clip": math.nan}, "clip: .* got nan"),
        ({"autocast": torch.float16}, r"autocast: expected torch\.bfloat16 or None .* got torch\.float16"),
        ({"batches": lambda _: []}, "batches: expected at least one in epoch 1"),
    ],
)
def test_refusals(options, match):
    run = Run()
    arguments = {"batches": run.batches, "epochs": 1, **options}
    with pytest.raises(ValueError, match=match):
        fit(run.model, loss=run.loss, optimizer=run.optimizer, **arguments)


def test_autocast_is_torchs_around_loss_and_validation():
    ours = Run(dropout=0.0)
    seen = []

    def loss(batch):
        seen.append(torch.is_autocast_enabled("cpu"))
        return ours.loss(batch)

    def validate():
        seen.append(torch.is_autocast_enabled("cpu"))
        return ours.validate()

    log = fit(ours.model, ours.batches, loss, ours.optimizer, epochs=1, autocast=torch.bfloat16, validate=validate)
    assert seen == [True] * 5
    plain = Run(dropout=0.0)
    for batch in plain.batches(1):
        plain.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            value = plain.loss(batch)
        value.backward()
        plain.optimizer.step()
    for a, b in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        assert a.dtype == torch.float32
        assert a.equal(b)
    assert log[0].loss != Run(dropout=0.0).fit(1)[0].loss


def test_after_each_epoch(tmp_path):
    run, seen = Run(), []
    log = run.fit(3, folder=tmp_path, after_epoch=lambda entry: seen.append((entry, (tmp_path / "last.pt").exists())))
    assert seen == [(entry, True) for entry in log]


def test_learning_curves_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    run = Run()
    logs = {"validated": run.fit(2, validate=run.validate), "not": Run().fit(2)}
    plot_curves(logs, tmp_path / "curves.png", title="two runs")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    plot_curves({"not": logs["not"]}, tmp_path / "curves.svg")
    assert "<svg" in (tmp_path / "curves.svg").read_text()
    for nothing in ({}, {"empty": []}):
        with pytest.raises(ValueError, match="logs: expected at least one run, each of at least one epoch"):
            plot_curves(nothing, tmp_path / "none.png")
    with pytest.raises(OSError, match="no such folder"):
        plot_curves(logs, tmp_path / "no such folder" / "curves.png")


def test_a_checkpoint_of_another_vocabulary_is_refused(tmp_path):
    run = Run()
    vocab = Vocab(TEXT)
    run.fit(1, folder=tmp_path, vocab=vocab)
    assert len(run.fit(2, folder=tmp_path, vocab=Vocab(TEXT))) == 2
    other = Vocab(TEXT.replace("q", "Q"))
    assert len(other) == len(vocab)
    with pytest.raises(ValueError, match=rf"of {len(vocab)} tokens, got one of {len(vocab)}; .* number 2 on"):
        run.fit(3, folder=tmp_path, vocab=other)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    Run().fit(1, folder=tmp_path)
    model = RNNLM(rnnfast.GRU(9, 12), 9)
    with pytest.raises(RuntimeError, match=r"size mismatch for rnn\.weight_ih_l0"):
        fit(model, lambda _: [], model.loss, torch.optim.Adam(model.parameters()), epochs=1, folder=tmp_path)


WORKER = """
import sys

import torch
import torch.distributed as dist

sys.path.insert(0, "tests")
from test_train import Run

from rnnfast.train import fit

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
run = Run(dropout=0.0)
shares = lambda epoch: ([part.tensor_split(size, 1)[rank] for part in batch] for batch in run.batches(epoch))
log = fit(run.model, shares, run.loss, run.optimizer, epochs=2, clip=0.5, folder=sys.argv[1])
mean = torch.tensor([entry.loss for entry in log], dtype=torch.float64)
dist.all_reduce(mean)
if rank == 0:
    torch.save({"loss": mean / size, "model": run.model.state_dict()}, sys.argv[1] + "/result.pt")
dist.barrier()  # a process that leaves while another still writes would abort it
dist.destroy_process_group()
"""


def test_two_processes_are_one_with_the_joint_batch(tmp_path):
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(tmp_path / "worker.py"), str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    single = Run(dropout=0.0)
    log = single.fit(2, clip=0.5)
    wanted = torch.tensor([entry.loss for entry in log], dtype=torch.float64)
    torch.testing.assert_close(result["loss"], wanted, rtol=1e-4, atol=1e-5)
    for name, want in single.model.state_dict().items():
        torch.testing.assert_close(result["model"][name], want, rtol=1e-2, atol=1e-3)
