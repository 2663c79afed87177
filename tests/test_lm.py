"""The language-model head: look-up and loss. What it writes: test_generation.py."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import rnnfast
from rnnfast import RNNLM, lm
from rnnfast.lm import detach_state, linear_cross_entropy

LAYERS = {
    "RNN": rnnfast.RNN,
    "ReLU": lambda *args, **options: rnnfast.RNN(*args, nonlinearity="relu", **options),
    "GRU": rnnfast.GRU,
    "LSTM": rnnfast.LSTM,
    "LSTM projected": lambda *args, **options: rnnfast.LSTM(*args, proj_size=3, **options),
}
V = 11
# On a CUDA device too. Not what is about the loops that write, or the kernel of the softmax: these are of the CPU.
on_device = pytest.mark.usefixtures("default_device")


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param]


# RNNLM: forward


@on_device
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_one_hot_is_an_embedding_with_identity_weights(layer, num_layers, bidirectional, batch_first):
    options = {"num_layers": num_layers, "bidirectional": bidirectional, "batch_first": batch_first}
    rnn = layer(V, 6, dtype=torch.float64, **options)
    one_hot, embedded = RNNLM(rnn, V), RNNLM(rnn, V, embedding_dim=V)
    embedded.embedding.weight.data = torch.eye(V, dtype=torch.float64)
    embedded.output = one_hot.output
    tokens = torch.randint(V, (4, 3))
    _, state = rnn(F.one_hot(torch.randint(V, tokens.shape), V).double())
    for start in (None, detach_state(state)):
        results = []
        for model in (one_hot, embedded):
            rnn.zero_grad()
            scores, new = model(tokens, start)
            (scores.square().sum() + sum(s.sum() for s in (new if isinstance(new, tuple) else (new,)))).backward()
            results.append([scores, *(new if isinstance(new, tuple) else (new,)), *(p.grad for p in rnn.parameters())])
        assert results[0][0].shape == (*tokens.shape, V)
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    single, _ = one_hot(tokens[:, 0] if not batch_first else tokens[0])
    whole, _ = one_hot(tokens)
    torch.testing.assert_close(single, whole[:, 0] if not batch_first else whole[0], rtol=1e-11, atol=1e-11)


def test_one_hot_rows_are_never_made(layer, monkeypatch):
    monkeypatch.setattr(F, "one_hot", lambda *_: pytest.fail("one-hot rows were made"))
    model = RNNLM(layer(V, 6), V)
    tokens = torch.randint(V, (5, 2))
    model.loss(tokens, tokens)[0].backward()
    model.generate(tokens, 3)


def test_layers_of_torch_and_layers_with_hooks_are_called_the_plain_way():
    torch_rnn, ours = torch.nn.GRU(V, 6), rnnfast.GRU(V, 6)
    ours.load_state_dict(torch_rnn.state_dict())
    tokens = torch.randint(V, (5, 2))
    models = [RNNLM(torch_rnn, V), RNNLM(ours, V)]
    models[1].output = models[0].output
    seen = []
    ours.register_forward_hook(lambda *_: seen.append(True))
    torch.testing.assert_close(models[0](tokens)[0], models[1](tokens)[0])
    assert seen == [True]
    assert models[0].generate(tokens, 7).tokens.equal(models[1].generate(tokens, 7).tokens)


def test_same_random_numbers_as_the_parts_in_order():
    torch.manual_seed(3)
    model = RNNLM(rnnfast.LSTM(4, 6), V, embedding_dim=4)
    torch.manual_seed(3)
    parts = torch.nn.LSTM(4, 6), torch.nn.Embedding(V, 4), torch.nn.Linear(6, V)
    for ours, theirs in zip(model.parameters(), (p for part in parts for p in part.parameters()), strict=True):
        assert ours.equal(theirs)


@on_device
def test_tied_weights_are_one_parameter():
    model = RNNLM(rnnfast.GRU(6, 6), V, embedding_dim=6, tie_weights=True)
    assert model.output.weight is model.embedding.weight
    assert len(list(model.parameters())) == 4 + 1 + 1
    tokens = torch.randint(V, (4, 3))
    model.loss(tokens, tokens)[0].backward()
    grad = model.embedding.weight.grad.clone()
    model.zero_grad()
    F.cross_entropy(model(tokens)[0].flatten(0, 1), tokens.flatten()).backward()
    torch.testing.assert_close(grad, model.embedding.weight.grad)
    assert "tie_weights=True" in repr(model)


@on_device
def test_dropout_is_for_training_only():
    model = RNNLM(rnnfast.GRU(4, 6), V, embedding_dim=4, dropout=0.5)
    tokens = torch.randint(V, (4, 3))
    assert not model(tokens)[0].equal(model(tokens)[0])
    assert model.perplexity(tokens, tokens) == model.perplexity(tokens, tokens)
    assert model.training and model.rnn.training
    model.eval()
    assert model(tokens)[0].equal(model(tokens)[0])


@on_device
@pytest.mark.parametrize("embedding_dim", [None, 4])
def test_autocast(layer, embedding_dim, default_device):
    model = RNNLM(layer(embedding_dim or V, 6), V, embedding_dim=embedding_dim)
    tokens = torch.randint(V, (7, 3))
    exact, _ = model.loss(tokens, tokens)
    with torch.autocast(default_device, dtype=torch.bfloat16):
        scores, _ = model(tokens)
        loss, _ = model.loss(tokens, tokens)
    assert scores.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.backward()
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0.02)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


# Loss


@on_device
@pytest.mark.parametrize("chunk_rows", [1, 3, None])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_chunked_loss_is_the_plain_one(chunk_rows, bias, dtype):
    hidden, weight = torch.randn(10, 6, dtype=dtype), torch.randn(V, 6, dtype=dtype)
    leaves = [t.requires_grad_() for t in (hidden, weight, *([torch.randn(V, dtype=dtype)] if bias else []))]
    targets = torch.randint(V, (10,))
    offset = leaves[2] if bias else None
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    plain = F.cross_entropy(F.linear(wide[0], wide[1], wide[2] if bias else None), targets)
    ours = linear_cross_entropy(hidden, weight, offset, targets, chunk_rows=chunk_rows)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    torch.testing.assert_close(ours.double(), plain, rtol=tolerance, atol=tolerance)
    for a, b in zip(torch.autograd.grad(3 * ours, leaves), torch.autograd.grad(3 * plain, wide), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("kinds", "rows"), [(1, 1), (3, 15), (28, 16), (28, 33), (700, 40)])
def test_one_pass_over_the_scores_is_the_plain_softmax(isa, grad, bias, dtype, kinds, rows):
    """On every instruction set; the plain way is also what devices without the kernel take."""
    scores = 20 * torch.randn(kinds, 48, dtype=dtype)
    scores[:, rows:] = math.nan  # room for whole vectors: whatever is there must not matter
    targets = torch.randint(kinds, (rows,))
    offset = torch.randn(kinds, dtype=dtype) if bias else None
    exact = scores.double() + (offset.double()[:, None] if bias else 0)
    wanted = F.cross_entropy(exact[:, :rows].t(), targets, reduction="none")
    gradient = torch.softmax(exact[:, :rows], 0) - F.one_hot(targets, kinds).t()
    plain = scores.to(dtype).clone()
    columns = plain[:, :rows] if offset is None else plain[:, :rows] + offset[:, None]
    error_of_torch = (torch.softmax(columns, 0).double() - torch.softmax(exact[:, :rows], 0)).abs().max().item()
    losses = torch.ops.rnnfast._softmax_loss_(scores, offset, targets, grad)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(losses.double(), wanted, rtol=tolerance, atol=20 * tolerance)
    if grad:
        error = (scores[:, :rows].double() - gradient).abs().max().item()
        assert error <= 2 * error_of_torch + 16 * torch.finfo(dtype).eps


def test_the_plain_softmax_of_other_devices_is_the_same():
    """What a device without the kernel runs; the test lets it run here."""
    scores = torch.randn(28, 48, dtype=torch.float64)
    targets, offset = torch.randint(28, (33,)), torch.randn(28, dtype=torch.float64)
    ours, plain = scores.clone(), scores.clone()
    losses = torch.ops.rnnfast._softmax_loss_(ours, offset, targets, True)
    torch.testing.assert_close(lm._plain_softmax_loss(plain, offset, targets, True), losses, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(plain[:, :33], ours[:, :33], rtol=1e-12, atol=1e-12)


def test_softmax_with_scores_that_are_not_finite():
    scores = torch.tensor([[math.nan, math.inf, -math.inf, 0.0], [0.0, 0.0, 0.0, -math.inf]]).repeat(1, 4)
    losses = torch.ops.rnnfast._softmax_loss_(scores, None, torch.zeros(4, dtype=torch.int64), True)
    assert losses[:2].isnan().all()
    assert losses[2] == math.inf
    assert losses[3] == 0


def test_softmax_loss_passes_opcheck_and_refuses():
    scores, targets = torch.randn(5, 16), torch.randint(5, (7,))
    torch.library.opcheck(torch.ops.rnnfast._softmax_loss_.default, (scores, torch.randn(5), targets, True))
    for arguments, error, match in (
        ((scores.half(), None, targets, True), TypeError, "scores: expected float32 or float64"),
        ((scores[:, :15], None, targets, True), ValueError, "scores: expected contiguous"),
        ((torch.randn(5, 15), None, targets, True), ValueError, "ld a multiple of 16"),
        ((scores, None, targets.int(), True), TypeError, "targets: expected int64"),
        ((scores, None, torch.zeros(17, dtype=torch.int64), True), ValueError, "R at most 16"),
        ((scores, None, targets + 5, True), IndexError, "targets: expected 0 to 4"),
        ((scores, torch.randn(4), targets, True), ValueError, r"bias: expected \[V\] with V = 5"),
        ((scores, torch.randn(5).double(), targets, True), TypeError, "bias: expected"),
    ):
        with pytest.raises(error, match=match):
            torch.ops.rnnfast._softmax_loss_(*arguments)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("rows", "size", "kinds", "chunk_rows"),
    [(1, 1, 1, 8), (70, 32, 28, 70), (200, 64, 50, 64), (130, 67, 300, 65), (65, 150, 3, 1), (1030, 3, 7, 2048)],
)
def test_products_of_the_loss(isa, threads, dtype, rows, size, kinds, chunk_rows):
    """Blocks, panels and chunks with and without remainders, on every instruction set; any subset of the gradients."""
    torch.set_num_threads(threads)
    hidden, weight, bias = torch.randn(rows, size), torch.randn(kinds, size) / size**0.5, torch.randn(kinds)
    leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight, bias)]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    targets = torch.randint(kinds, (rows,))
    plain = F.cross_entropy(F.linear(*wide), targets)
    wanted = torch.autograd.grad(plain, wide)
    theirs = [leaf.detach().requires_grad_() for leaf in leaves]
    narrow = torch.autograd.grad(F.cross_entropy(F.linear(*theirs), targets), theirs)
    for needs in ([True] * 3, [False] * 3, [True, False, False], [False, True, False], [False, False, True]):
        losses, *grads = torch.ops.rnnfast._linear_loss(*leaves[:3], targets, chunk_rows, needs)
        torch.testing.assert_close(losses.double().mean(), plain, rtol=1e-6, atol=1e-6)
        for need, have, low, want in zip(needs, grads, narrow, wanted, strict=True):
            if not need:
                assert have.numel() == 0
                continue
            error, error_of_torch = ((x.double() - want).abs().max().item() for x in (have, low))
            floor = 8 * torch.finfo(dtype).eps * max(want.abs().max().item(), 1 / rows)
            assert error <= 2 * error_of_torch + floor


def test_linear_loss_passes_opcheck_and_refuses():
    hidden, weight, bias, targets = torch.randn(7, 4), torch.randn(5, 4), torch.randn(5), torch.randint(5, (7,))
    op, needs = torch.ops.rnnfast._linear_loss, [True] * 3
    torch.library.opcheck(op.default, (hidden, weight, bias, targets, 3, needs))
    torch.library.opcheck(op.default, (hidden, weight, None, targets, 3, [False, True, False]))
    for arguments, error, match in (
        ((hidden.half(), weight, bias, targets, 3, needs), TypeError, "hidden: expected float32 or float64"),
        ((hidden[0], weight, bias, targets, 3, needs), ValueError, r"hidden: expected \[R, P\]"),
        ((hidden, weight[:, :3], bias, targets, 3, needs), ValueError, r"weight: expected \[V, P\] with P = 4"),
        ((hidden, weight.double(), bias, targets, 3, needs), TypeError, "weight and bias: expected Float"),
        ((hidden, weight, bias[:4], targets, 3, needs), ValueError, r"bias: expected \[V\] with V = 5"),
        ((hidden, weight, bias, targets[:6], 3, needs), ValueError, r"targets: expected \[R\] with R = 7"),
        ((hidden, weight, bias, targets.int(), 3, needs), TypeError, "targets: expected int64"),
        ((hidden, weight, bias, targets - 5, 3, needs), IndexError, "targets: expected 0 to 4"),
        ((hidden, weight, bias, targets, 0, needs), ValueError, "chunk_rows: expected at least 1"),
    ):
        with pytest.raises(error, match=match):
            op(*arguments)


def test_linear_loss_with_numbers_that_are_not_finite():
    """They stay in their rows, but for the sums over rows."""
    hidden, weight = torch.randn(70, 4), torch.randn(5, 4)
    hidden[3, 1] = math.nan
    losses, grad_hidden, grad_weight, _ = torch.ops.rnnfast._linear_loss(
        hidden, weight, None, torch.zeros(70, dtype=torch.int64), 64, [True, True, False]
    )
    for values in (losses, grad_hidden):
        assert values[3].isnan().all() and values[torch.arange(70) != 3].isfinite().all()
    assert grad_weight.isnan().all()


@on_device
def test_chunked_loss_backward_twice_and_partly():
    hidden, weight = torch.randn(10, 6, requires_grad=True), torch.randn(V, 6)
    loss = linear_cross_entropy(hidden, weight, None, torch.randint(V, (10,)))
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0].clone()
    assert first.equal(torch.autograd.grad(loss, hidden, retain_graph=True)[0])
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, None, torch.randint(V, (10,))).requires_grad


@on_device
def test_chunked_loss_has_second_derivatives():
    """Also where hidden depends on the weight: tied weights."""
    start, weight = (torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in (10, V))
    targets = torch.randint(V, (10,))

    def second(loss):
        first = torch.autograd.grad(
            2 * loss(start * weight[:1], weight, None, targets), [start, weight], create_graph=True
        )
        return torch.autograd.grad(sum(g.square().sum() for g in first), [start, weight])

    wanted = second(lambda hidden, weight, bias, targets: F.cross_entropy(F.linear(hidden, weight, bias), targets))
    for ours, want in zip(second(linear_cross_entropy), wanted, strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-11, atol=1e-12)


@on_device
@pytest.mark.parametrize("embedding_dim", [None, 5])
def test_model_loss_and_perplexity(layer, embedding_dim):
    model = RNNLM(layer(embedding_dim or V, 6, dtype=torch.float64), V, embedding_dim=embedding_dim)
    tokens, targets = torch.randint(V, (2, 5, 3))
    state = None
    for _ in range(2):
        loss, new = model.loss(tokens, targets, state)
        ours = torch.autograd.grad(loss, list(model.parameters()))
        scores, plain_state = model(tokens, state)
        plain = F.cross_entropy(scores.flatten(0, 1), targets.flatten())
        torch.testing.assert_close(loss, plain, rtol=1e-12, atol=1e-12)
        for a, b in zip(ours, torch.autograd.grad(plain, list(model.parameters())), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
        assert math.isclose(model.perplexity(tokens, targets, state), math.exp(plain.item()), rel_tol=1e-12)
        state = detach_state(new)
        torch.testing.assert_close(state, detach_state(plain_state))


def test_perplexity_of_a_blind_guess_is_the_vocabulary():
    model = RNNLM(rnnfast.GRU(V, 6), V)
    for parameter in model.output.parameters():
        torch.nn.init.zeros_(parameter)
    tokens = torch.randint(V, (9, 4))
    assert math.isclose(model.perplexity(tokens, tokens), V, rel_tol=1e-5)


# Refusals


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: RNNLM(torch.nn.Linear(V, 4), V), TypeError, "expected an RNN, GRU or LSTM layer, got Linear"),
        (lambda: RNNLM(rnnfast.GRU(V, 6), V + 1), ValueError, rf"expected an input_size of {V + 1} \(vocab_size\)"),
        (lambda: RNNLM(rnnfast.GRU(V, 6), V, 5), ValueError, r"expected an input_size of 5 \(embedding_dim\)"),
        (lambda: RNNLM(rnnfast.GRU(5, 6), V, 5, tie_weights=True), ValueError, "an embedding_dim of 6, the size"),
        (lambda: RNNLM(rnnfast.GRU(V, 6), V, tie_weights=True), ValueError, "embedding_dim of 6.* got None"),
        (lambda: RNNLM(rnnfast.GRU(V, 6), V, dropout=1.0), ValueError, "dropout: expected a probability"),
        (lambda: RNNLM(rnnfast.GRU(V, 6), 0), ValueError, "vocab_size: expected at least 1, got 0"),
    ],
)
def test_models_that_do_not_fit(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_loss_refuses():
    model = RNNLM(rnnfast.GRU(V, 6), V)
    tokens = torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"targets: expected the shape of tokens, \[3, 2\], got \[2, 2\]"):
        model.loss(tokens, tokens[:2])
    for wrong in (V, -1, -100):
        with pytest.raises(IndexError, match=f"targets: expected token numbers from 0 to {V - 1}, got {wrong}"):
            model.loss(tokens, torch.full_like(tokens, wrong))
    with pytest.raises(ValueError, match="tokens: expected at least one step"):
        model.loss(tokens[:0], tokens[:0])
    with pytest.raises(ValueError, match=r"expected hidden \[rows, P\] and weight \[V, P\]"):
        linear_cross_entropy(torch.zeros(3, 4), torch.zeros(5, 6), None, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="chunk_rows: expected at least 1, got 0"):
        linear_cross_entropy(
            torch.zeros(3, 4), torch.zeros(5, 4), None, torch.zeros(3, dtype=torch.int64), chunk_rows=0
        )
    with pytest.raises(ValueError, match=r"expected targets \[rows\] = \[3\]"):
        linear_cross_entropy(torch.zeros(3, 4), torch.zeros(5, 4), None, torch.zeros(2, dtype=torch.int64))
