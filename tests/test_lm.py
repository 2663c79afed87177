"""The language-model head: look-up, loss, generation; and the ops' tokens against their one-hot rows."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from agreement import evaluate
from hypothesis import given
from hypothesis import strategies as st
from strategies import Call

import rnnfast
from rnnfast import RNNLM, lm, reference
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


# Tokens as the input of an op


def token_call(cell, steps, batch, kinds, hidden, *, bias=True, kind="padded", reverse=False, dtype=torch.float64):
    """A call of an op with tokens, and the same with their one-hot rows."""
    gates = reference.CELLS[cell].num_gates * hidden
    shapes = {"h0": (batch, hidden), "weight_ih": (gates, kinds), "weight_hh": (gates, hidden)}
    if bias:
        shapes |= {"bias_ih": (gates,), "bias_hh": (gates,)}
    if reference.CELLS[cell].num_states == 2:
        shapes["c0"] = (batch, hidden)
    if reference.CELLS[cell].num_peepholes:
        shapes["weight_ch"] = (reference.CELLS[cell].num_peepholes * hidden,)
    tensors = {name: torch.randn(shape, dtype=dtype, requires_grad=True) for name, shape in shapes.items()}
    options = {"reverse": reverse}
    tokens = torch.randint(kinds, (steps, batch))
    if kind == "packed":
        sizes = torch.randint(1, batch + 1, (steps,), device="cpu").sort(descending=True).values
        sizes[0] = batch
        options["batch_sizes"] = sizes
        tokens = torch.randint(kinds, (int(sizes.sum()),))
    elif kind == "lengths":
        options["lengths"] = torch.randint(0, steps + 1, (batch,), device="cpu")
    elif kind == "step":
        tokens = tokens[0]
    dense = F.one_hot(tokens, kinds).to(dtype)
    return Call(cell, {**tensors, "input": tokens}, options), Call(cell, {**tensors, "input": dense}, options)


@given(
    steps=st.sampled_from([1, 2, 5, 40]),
    batch=st.sampled_from([1, 2, 5, 9]),
    kinds=st.sampled_from([1, 3, 28, 40]),
    hidden=st.sampled_from([1, 7, 8, 9, 17, 33]),
    bias=st.booleans(),
    reverse=st.booleans(),
    kind=st.sampled_from(["padded", "packed", "lengths", "step"]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_tokens_are_their_one_hot_rows(cell, isa, steps, batch, kinds, hidden, bias, reverse, kind, dtype):
    """Outputs and all gradients, on calls that pack their weights and calls that read them in place."""
    torch.manual_seed(steps * batch)
    tokens, dense = token_call(cell, steps, batch, kinds, hidden, bias=bias, kind=kind, reverse=reverse, dtype=dtype)
    assert not dense.tensors["input"].requires_grad
    ours, wanted = evaluate(tokens, tokens.op()), evaluate(dense, dense.op())
    assert ours.keys() == wanted.keys() >= {"grad_weight_ih", "grad_weight_hh"}
    atol = 1e-12 if dtype == torch.float64 else 2e-5
    for name, want in wanted.items():
        torch.testing.assert_close(ours[name], want, rtol=atol, atol=atol * max(1.0, want.abs().max().item()))


@on_device
def test_tokens_with_two_threads(cell):
    torch.set_num_threads(2)
    tokens, dense = token_call(cell, 40, 16, 28, 40)
    ours, wanted = evaluate(tokens, tokens.op()), evaluate(dense, dense.op())
    for name, want in wanted.items():
        torch.testing.assert_close(ours[name], want, rtol=1e-11, atol=1e-11)


@on_device
@pytest.mark.parametrize("kind", ["padded", "packed", "step"])
def test_tokens_pass_opcheck_and_double_backward(cell, kind):
    tokens, dense = token_call(cell, 3, 2, 5, 4, kind=kind)
    torch.library.opcheck(tokens.op(), tuple(tokens.positional()), tokens.keywords())

    def second(call):
        output = call(call.op())[0]
        weights = [call.tensors["weight_ih"], call.tensors["weight_hh"]]
        first = torch.autograd.grad(output.square().sum(), weights, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), weights)

    for ours, wanted in zip(second(tokens), second(dense), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)


@on_device
@pytest.mark.few_cells
@pytest.mark.parametrize("token", [-1, 28, 2**62, -(2**62)])
@pytest.mark.parametrize("kind", ["padded", "packed", "step"])
def test_tokens_out_of_range_are_an_index_error(cell, token, kind):
    call, _ = token_call(cell, 20, 4, 28, 8, kind=kind)
    call.tensors["input"].view(-1)[-1] = token
    with pytest.raises(IndexError, match=rf"input: expected tokens from 0 to 27, .* got {token}"):
        call(call.op())


@on_device
@pytest.mark.few_cells
@pytest.mark.parametrize("shape", [(2, 3, 4), ()])
def test_tokens_of_a_wrong_rank(cell, shape):
    call, _ = token_call(cell, 2, 3, 5, 4)
    call.tensors["input"] = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"input: expected 2 dimensions \[T, N\] for tokens"):
        call(call.op())


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


# Generation


def greedy_loop(model, prompt, num_tokens, state=None):
    """What generate must give, a step of Python a token."""
    with torch.no_grad():
        scores, state = model(prompt, state)
        written = []
        for _ in range(num_tokens):
            time = 1 if model.rnn.batch_first and prompt.dim() == 2 else 0
            token = scores.select(time, -1).argmax(-1)
            written.append(token)
            scores, state = model(token.unsqueeze(time), state)
    return torch.stack(written, time), state


@pytest.mark.parametrize("embedding_dim", [None, 5])
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize(
    ("batch", "dtype"),
    [(None, torch.float32), (1, torch.bfloat16), (3, torch.float64), (3, torch.float32), (12, torch.float32)],
)
def test_greedy_is_the_python_loop_exactly(layer, embedding_dim, num_layers, batch, dtype):
    model = RNNLM(
        layer(embedding_dim or V, 6, num_layers=num_layers, dtype=dtype, batch_first=batch == 3),
        V,
        embedding_dim=embedding_dim,
        dropout=0.3,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that it does not say one token over and over
    shape = (4,) if batch is None else (batch, 4) if batch == 3 else (4, batch)
    prompt = torch.randint(V, shape)
    model.eval()
    wanted, wanted_state = greedy_loop(model, prompt, 12)
    model.train()
    tokens, state = model.generate(prompt, 12)
    assert model.training
    assert tokens.equal(wanted)
    for a, b in zip(*(s if isinstance(s, tuple) else (s,) for s in (state, wanted_state)), strict=True):
        assert a.equal(b)
        assert not a.requires_grad
    again, _ = model.generate(prompt, 5, state=state)
    model.eval()
    assert again.equal(greedy_loop(model, prompt, 5, wanted_state)[0])


def fixed_scores(scores):
    """A model that gives these scores whatever it reads."""
    model = RNNLM(rnnfast.GRU(len(scores), 4), len(scores))
    torch.nn.init.zeros_(model.output.weight)
    model.output.bias.data = torch.tensor(scores)
    return model


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"alpha": 2.0}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        ({"alpha": 0.5}, [x**0.5 / sum(y**0.5 for y in (0.4, 0.3, 0.2, 0.1)) for x in (0.4, 0.3, 0.2, 0.1)]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.65}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.75}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"top_k": 3, "top_p": 0.8}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"top_k": 2, "top_p": 0.5}, [1, 0, 0, 0]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_p": 1e-9}, [1, 0, 0, 0]),
    ],
)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3, 1)])
def test_sampling_follows_its_distribution(options, expected, order):
    """Pearson's chi-squared with 3 degrees of freedom: above 21.1 once in 10,000 (and the seed is fixed)."""
    share = [(0.4, 0.3, 0.2, 0.1)[i] for i in order]
    wanted = [expected[i] for i in order]
    model = fixed_scores([math.log(p) + 5 for p in share])
    draws = 100 * 60
    tokens, _ = model.generate(torch.zeros(1, 60, dtype=torch.int64), 100, sample=True, **options)
    counts = torch.bincount(tokens.flatten(), minlength=4).tolist()
    assert all(count == 0 for count, p in zip(counts, wanted, strict=True) if p == 0)
    assert sum((n - draws * p) ** 2 / (draws * p) for n, p in zip(counts, wanted, strict=True) if p > 0) < 21.1


def test_sampling_is_repeated_by_its_generator():
    model = RNNLM(rnnfast.LSTM(V, 6), V)
    prompt = torch.randint(V, (3, 2))

    def write(seed):
        return model.generate(prompt, 30, sample=True, generator=torch.Generator().manual_seed(seed)).tokens

    assert write(1).equal(write(1))
    assert not write(1).equal(write(2))
    torch.manual_seed(5)
    first = model.generate(prompt, 30, sample=True).tokens
    torch.manual_seed(5)
    assert first.equal(model.generate(prompt, 30, sample=True).tokens)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("sample", [False, True])
def test_stream_gives_the_same_tokens_as_they_come(batch_first, chunk, sample):
    model = RNNLM(rnnfast.LSTM(V, 6, batch_first=batch_first), V)
    for prompt in (torch.randint(V, (3, 2)), torch.randint(V, (3,))):
        time = 1 if batch_first and prompt.dim() == 2 else 0
        options = [{"sample": sample, "generator": torch.Generator().manual_seed(1)} for _ in range(3)]
        whole = model.generate(prompt, 10, **options[0]).tokens
        parts = list(model.stream(prompt, 10, chunk=chunk, **options[1]))
        assert torch.cat(parts, time).equal(whole)
        assert len(parts) == math.ceil(10 / chunk)
        begun = torch.cat(list(itertools.islice(model.stream(prompt, 10**9, **options[2]), 4)), time)
        assert begun.equal(whole.narrow(time, 0, 4))


@pytest.mark.parametrize("embedding_dim", [None, 5])
@pytest.mark.parametrize("batch_first", [False, True])
def test_prompts_of_different_lengths(layer, embedding_dim, batch_first):
    """Each goes on as if it were alone, states included."""
    rnn = layer(embedding_dim or V, 6, num_layers=2, batch_first=batch_first, dtype=torch.float64)
    model = RNNLM(rnn, V, embedding_dim=embedding_dim)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    prompts = [torch.randint(V, (length,)) for length in (4, 1, 9, 4)]
    tokens, state = model.generate(prompts, 10)
    assert tokens.shape == ((4, 10) if batch_first else (10, 4))
    for n, prompt in enumerate(prompts):
        alone, alone_state = model.generate(prompt, 10)
        assert alone.equal(tokens[n] if batch_first else tokens[:, n])
        pairs = zip(*(s if isinstance(s, tuple) else (s,) for s in (state, alone_state)), strict=True)
        for together, one in pairs:
            torch.testing.assert_close(together[:, n], one, rtol=1e-10, atol=1e-10)
    streamed = list(model.stream(prompts, 10, chunk=3))
    assert torch.cat(streamed, 1 if batch_first else 0).equal(tokens)


def test_callback_gets_each_step_as_it_comes():
    model = RNNLM(rnnfast.LSTM(V, 6, batch_first=True), V)
    for prompt in (torch.randint(V, (3, 2)), torch.randint(V, (2,))):
        seen = []
        options = {"sample": True, "generator": torch.Generator().manual_seed(3)}
        tokens, state = model.generate(prompt, 8, **options, callback=seen.append)
        options["generator"].manual_seed(3)
        whole, whole_state = model.generate(prompt, 8, **options)
        assert len(seen) == 8
        assert torch.cat(seen, -1).equal(tokens)
        assert tokens.equal(whole)
        assert all(a.equal(b) for a, b in zip(state, whole_state, strict=True))

    def refuse(step):
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        model.generate(torch.randint(V, (3, 2)), 8, callback=refuse)
    assert model.training


def test_stop_token_ends_a_sequence():
    model = RNNLM(rnnfast.GRU(V, 16), V)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    prompt = torch.randint(V, (2, 6))
    free = model.generate(prompt, 60, sample=True, generator=torch.Generator().manual_seed(0)).tokens
    for stop in range(V):
        options = {"sample": True, "stop_token": stop}
        tokens = model.generate(prompt, 60, **options, generator=torch.Generator().manual_seed(0)).tokens
        ends = [column.tolist().index(stop) if stop in column else 60 for column in free.t()]
        assert len(tokens) == min(60, max(ends) + 1)
        for n, end in enumerate(ends):
            assert tokens[:end, n].equal(free[:end, n][: len(tokens)])
            assert (tokens[end:, n] == stop).all()
        streamed = list(model.stream(prompt, 60, **options, generator=torch.Generator().manual_seed(0)))
        assert torch.cat(streamed).equal(tokens)


def test_nothing_to_write():
    model = RNNLM(rnnfast.LSTM(V, 6), V)
    prompt = torch.randint(V, (3, 2))
    tokens, state = model.generate(prompt, 0)
    assert tokens.shape == (0, 2)
    assert state[0].equal(model(prompt)[1][0])
    assert list(model.stream(prompt, 0)) == []


# Refusals


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"alpha": 0.0}, ValueError, "alpha: expected a finite number above 0, got 0.0"),
        ({"alpha": -1.0}, ValueError, "alpha: .* got -1.0"),
        ({"alpha": math.inf}, ValueError, "alpha: .* got inf"),
        ({"alpha": math.nan}, ValueError, "alpha: .* got nan"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a finite number above 0, got 0.0"),
        ({"temperature": -2.0}, ValueError, "temperature: .* got -2.0"),
        ({"temperature": 2.0, "alpha": 2.0}, ValueError, "alpha, temperature: expected one of them"),
        ({"top_k": V + 1}, ValueError, f"top_k: expected 1 to {V}, the size of the vocabulary, got {V + 1}"),
        ({"top_k": 0}, ValueError, "top_k: .* got 0"),
        ({"top_p": 0.0}, ValueError, "top_p: expected a number above 0, at most 1, got 0.0"),
        ({"top_p": 1.5}, ValueError, "top_p: .* got 1.5"),
        ({"stop_token": V}, ValueError, f"stop_token: expected 0 to {V - 1}, got {V}"),
        ({"num_tokens": -1}, ValueError, "num_tokens: expected at least 0, got -1"),
        ({"prompt": torch.zeros(0, 2, dtype=torch.int64)}, ValueError, "prompt: expected at least one token"),
        ({"prompt": torch.zeros(0, dtype=torch.int64)}, ValueError, "prompt: expected at least one token"),
        ({"prompt": torch.full((2, 2), V)}, IndexError, f"tokens: expected token numbers from 0 to {V - 1}, got {V}"),
        ({"prompt": torch.zeros(2, 2)}, TypeError, "tokens: expected token numbers, int64, got torch.float32"),
        ({"prompt": torch.zeros(2, 2, 2, dtype=torch.int64)}, ValueError, r"tokens: expected \[T, N\] or \[T\]"),
        ({"prompt": "abc"}, TypeError, "tokens: expected a Tensor, got str"),
        ({"prompt": []}, ValueError, "prompt: expected at least one prompt, got none"),
        ({"prompt": [torch.zeros(2, dtype=torch.int64), torch.zeros(0)]}, ValueError, "at least one token as prompt 1"),
        ({"prompt": [torch.zeros(2, 1, dtype=torch.int64)]}, ValueError, r"as prompt 0, \[T_n\], got \[2, 1\]"),
        ({"prompt": [torch.zeros(2, dtype=torch.int64), "b"]}, TypeError, "expected a Tensor as prompt 1, got str"),
        ({"state": torch.zeros(1, 5, 6)}, RuntimeError, r"Expected hidden size \(1, 2, 6\)"),
    ],
)
@pytest.mark.parametrize("embedding_dim", [None, 5])
def test_generate_refuses(options, error, match, embedding_dim):
    model = RNNLM(rnnfast.GRU(embedding_dim or V, 6), V, embedding_dim=embedding_dim)
    arguments = {"prompt": torch.zeros(2, 2, dtype=torch.int64), "num_tokens": 3, **options}
    try:
        with pytest.raises(error, match=match):
            model.generate(**arguments)
    finally:
        assert model.training


def test_generation_is_on_the_cpu():
    """Of a model that is elsewhere: the error says where to move it."""
    model = RNNLM(rnnfast.GRU(V, 6, device="meta"), V)
    prompt = torch.zeros(2, 2, dtype=torch.int64, device="meta")
    match = r'generation runs on the CPU: move the model there, model\.to\("cpu"\); it is on meta'
    with pytest.raises(RuntimeError, match=match):
        model.generate(prompt, 3)
    with pytest.raises(RuntimeError, match=match):
        next(model.stream(prompt, 3))


def test_prompts_of_different_lengths_need_our_layers():
    model = RNNLM(torch.nn.GRU(V, 6), V)
    with pytest.raises(ValueError, match=r"need a layer of rnnfast, got torch\.nn\.modules\.rnn\.GRU"):
        model.generate([torch.zeros(2, dtype=torch.int64)], 3)


def test_options_of_stream_are_those_of_generate():
    model = RNNLM(rnnfast.GRU(V, 6), V)
    prompt = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(TypeError, match="unexpected keyword argument 'top_q'"):
        next(model.stream(prompt, 3, top_q=3))
    with pytest.raises(ValueError, match="top_k: expected 1 to"):
        next(model.stream(prompt, 3, top_k=V + 1))
    with pytest.raises(ValueError, match="num_tokens: expected at least 0, got -1"):
        next(model.stream(prompt, -1))


def test_bidirectional_layers_cannot_generate():
    model = RNNLM(rnnfast.LSTM(V, 6, bidirectional=True), V)
    with pytest.raises(ValueError, match="a bidirectional layer cannot generate"):
        model.generate(torch.zeros(2, 2, dtype=torch.int64), 3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("sample", [False, True])
def test_scores_that_are_not_finite_stop_generation(value, sample):
    model = fixed_scores([0.0, value, 1.0])
    with pytest.raises(RuntimeError, match="the scores of the next token are not finite"):
        model.generate(torch.zeros(2, 2, dtype=torch.int64), 3, sample=sample)


def test_a_score_of_minus_infinity_is_a_token_that_never_comes():
    model = fixed_scores([-math.inf, 0.0, 1.0])
    tokens, _ = model.generate(torch.zeros(1, 50, dtype=torch.int64), 50, sample=True)
    assert set(tokens.flatten().tolist()) == {1, 2}


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


def test_the_loops_check_what_python_did_not():
    """The ops behind generate and forecast may be called by anyone."""
    weights = [*rnnfast.GRU(V, 6).parameters(), None, None, None, None]
    output = torch.nn.Linear(6, V)
    finished = torch.zeros(2, dtype=torch.bool)

    def write(**changes):
        arguments = {"scores": torch.zeros(2, V), "finished": finished, "num": 3, "alpha": 1.0, "k": 0, "p": 1.0}
        arguments |= {"stop": -1, "h": None, "weights": weights, **changes}
        a = arguments
        with torch.no_grad():
            return torch.ops.rnnfast._generate(
                "gru", a["scores"], a["h"], None, a["weights"], None, output.weight, output.bias, a["finished"],
                a["num"], False, a["alpha"], a["k"], a["p"], a["stop"], None,
            )  # fmt: skip

    assert write()[0].shape == (3, 2)
    for changes, match in (
        ({"scores": torch.zeros(V)}, "scores: expected"),
        ({"scores": torch.zeros(2, V + 1)}, "output_weight: expected"),
        ({"finished": finished[:1]}, "finished: expected bool"),
        ({"num": -1}, "num_tokens"),
        ({"alpha": 0.0}, "alpha"),
        ({"k": V + 1}, "top_k"),
        ({"p": 0.0}, "top_p"),
        ({"stop": V}, "stop_token"),
        ({"h": torch.zeros(2, 2, 6)}, r"h: expected \[L, N"),
        ({"weights": weights[:3]}, "weights: expected 8 for each layer"),
        ({"weights": []}, "weights: expected 8 for each layer"),
    ):
        with pytest.raises(ValueError, match=match):
            write(**changes)
    # fewer columns to look up than tokens to choose from
    narrow = [*rnnfast.GRU(V - 3, 6).parameters(), None, None, None, None]
    certain = torch.zeros(2, V)
    certain[1, V - 1] = 9.0
    with pytest.raises(IndexError, match=f"input: expected tokens from 0 to {V - 4}, .* got {V - 1}"):
        write(weights=narrow, scores=certain)


@pytest.mark.parametrize("batch", [1, 6, 40])
def test_generation_with_two_threads_is_that_of_one(layer, batch):
    """Of a size that divides hidden units, or the batch, among them."""
    model = RNNLM(layer(V, 200), V)
    prompt = torch.randint(V, (3, batch))
    wanted = model.generate(prompt, 12)
    torch.set_num_threads(2)
    tokens, state = model.generate(prompt, 12)
    assert tokens.equal(wanted.tokens)
    for a, b in zip(*(s if isinstance(s, tuple) else (s,) for s in (state, wanted.state)), strict=True):
        torch.testing.assert_close(a, b)
