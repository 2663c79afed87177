"""The language-model head writes: greedy and sampled, from prompts of one length or of several, as a stream."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from test_lm import LAYERS, V

import rnnfast
from rnnfast import RNNLM


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param]


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


def test_the_loops_check_what_python_did_not():
    """The ops behind generate and forecast may be called by anyone."""
    weights = [*rnnfast.GRU(V, 6).parameters(), *[None] * 5]
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
        ({"weights": weights[:3]}, "weights: expected 9 for each layer"),
        ({"weights": []}, "weights: expected 9 for each layer"),
    ):
        with pytest.raises(ValueError, match=match):
            write(**changes)
    # fewer columns to look up than tokens to choose from
    narrow = [*rnnfast.GRU(V - 3, 6).parameters(), *[None] * 5]
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
