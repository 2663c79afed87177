"""The language-model head: tokens in, the next token's scores out, around any recurrent layer of the package.

One-hot input is never made: its product with ``W_ih`` is a look-up of columns inside the layer's op (an op takes int64
tokens in place of its input). The loss joins the output layer and the cross entropy, a piece of the scores at a time.
Generation runs in C++ (``csrc/generate.cpp``).

Letters: ``T`` steps, ``N`` batch, ``V`` vocabulary, ``E`` embedding, ``H`` hidden size, ``P`` projected size or ``H``,
``L`` layers, ``D`` directions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnnfast import call, modules
from rnnfast.options import cell_of

__all__ = ["RNNLM", "Generated", "detach_state", "linear_cross_entropy"]

# Scores held at a time by the loss: half a megabyte in float32, to stay in the cache; but rows enough for a product to
# run well. Other devices than the CPU want more work at a time.
_CHUNK_SCORES = 1 << 17
_CHUNK_SCORES_ON_DEVICE = 1 << 24
_CHUNK_ROWS = 128
_Prompt = Tensor | list[Tensor] | tuple[Tensor, ...]
_VECTOR_ROWS = 16  # kSoftmaxRows of csrc/sequence.h


class Generated(NamedTuple):
    """What :meth:`RNNLM.generate` gives.

    Attributes:
        tokens: int64, the new ones only, in the layout of the prompt. A sequence that met the stop token repeats it;
            where all did, there are fewer than asked for.
        state: the layer's state after the prompt and all of ``tokens``.
    """

    tokens: Tensor
    state: Any


def _padded(rows: int) -> int:
    """A length for the rows of a buffer: whole vectors, and not whole pages, whose columns would share a cache set."""
    length = -(-rows // _VECTOR_ROWS) * _VECTOR_ROWS
    return length + _VECTOR_ROWS if length % 1024 == 0 else length


def _softmax_loss(scores: Tensor, bias: Tensor | None, targets: Tensor, grad: bool) -> Tensor:
    """Losses ``[R]`` of the first R columns of ``scores`` ``[V, ld]``, which become gradients: ``csrc/loss.cpp``."""
    if scores.device.type == "cpu":
        losses: Tensor = torch.ops.rnnfast._softmax_loss_.default(scores, bias, targets, grad)
        return losses
    return _plain_softmax_loss(scores, bias, targets, grad)


def _plain_softmax_loss(scores: Tensor, bias: Tensor | None, targets: Tensor, grad: bool) -> Tensor:
    """The same for devices without that kernel."""
    columns = scores[:, : len(targets)]
    log_p = torch.log_softmax(columns if bias is None else columns + bias[:, None], 0)
    losses = -log_p.gather(0, targets[None])[0]
    if grad:
        columns.copy_(log_p.exp_())
        columns.scatter_add_(0, targets[None], columns.new_full((1, 1), -1.0).expand(1, len(targets)))
    return losses


class _Progress(NamedTuple):
    """Where generation stands: the scores ``[N, V]`` of the next token, who has finished ``[N]``, and h and c."""

    scores: Tensor
    finished: Tensor
    states: list[Tensor | None]


class _LinearCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of ``hidden @ weight.T + bias``; the gradients are made on the way, chunk by chunk.

    The backward pass would need the scores again: keeping them is what costs memory, making them twice costs time.
    Summed in float32 (float64 for float64).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk_rows: int, train: bool
    ) -> Tensor:
        rows, vocab_size = hidden.shape[0], weight.shape[0]
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        needs = [train and needed for needed in ctx.needs_input_grad[:3]]
        if hidden.device.type == "cpu" and hidden.dtype == exact:
            losses, *made = torch.ops.rnnfast._linear_loss.default(hidden, weight, bias, targets, chunk_rows, needs)
            own = (grad if need else None for grad, need in zip(made, needs, strict=True))
            ctx.save_for_backward(hidden, weight, bias, targets, *own)
            mean: Tensor = losses.mean(dtype=torch.float64).to(exact)
            return mean
        grad_hidden = torch.empty_like(hidden) if needs[0] else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if needs[1] else None
        grad_bias = torch.zeros_like(bias, dtype=exact) if bias is not None and needs[2] else None
        # One buffer for all chunks: new memory for each would be handed back to the system and zeroed again.
        scores = hidden.new_empty(vocab_size, _padded(min(rows, chunk_rows)), dtype=exact)
        loss, share = hidden.new_zeros((), dtype=torch.float64), 1.0 / rows
        for first in range(0, rows, chunk_rows):
            part, wanted = hidden[first : first + chunk_rows], targets[first : first + chunk_rows]
            columns = scores[:, : len(part)]
            if hidden.dtype == exact:
                torch.mm(weight, part.t(), out=columns)
                losses = _softmax_loss(scores, bias, wanted, any(needs))
            else:
                columns.copy_(F.linear(part, weight, bias).t())
                losses = _softmax_loss(scores, None, wanted, any(needs))
            loss += losses.sum(dtype=torch.float64)
            if grad_bias is not None:
                grad_bias.add_(columns.sum(1), alpha=share)
            grad = columns.to(hidden.dtype) if any(needs) else columns
            if grad_weight is not None:
                if hidden.dtype == exact:
                    grad_weight.addmm_(grad, part, alpha=share)
                else:
                    grad_weight.add_(grad @ part, alpha=share)
            if grad_hidden is not None:
                to = grad_hidden[first : first + chunk_rows]
                torch.addmm(to, grad.t(), weight, beta=0, alpha=share, out=to)
        low = (None if grad is None else grad.to(hidden.dtype) for grad in (grad_hidden, grad_weight, grad_bias))
        ctx.save_for_backward(hidden, weight, bias, targets, *low)
        return (loss * share).to(exact)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, *grads = ctx.saved_tensors
        if not torch.is_grad_enabled():
            if grad_loss.device.type != "cpu" or grad_loss.item() != 1.0:  # elsewhere asking costs more
                grads = [None if grad is None else grad * grad_loss.to(grad.dtype) for grad in grads]
            return (*grads, None, None, None)
        # With create_graph: the plain way, which can be differentiated again. The views are new leaves of a kind, for
        # hidden may itself depend on weight (tied weights), which would then be counted twice.
        leaves: list[Any] = [None if t is None else t.view_as(t) for t in (hidden, weight, bias)]
        loss = F.cross_entropy(F.linear(*leaves).to(grad_loss.dtype), targets)
        wanted = [i for i in range(3) if ctx.needs_input_grad[i]]
        firsts = torch.autograd.grad(loss, [leaves[i] for i in wanted], grad_loss, create_graph=True)
        result: list[Tensor | None] = [None] * 6
        for i, first in zip(wanted, firsts, strict=True):
            result[i] = first
        return tuple(result)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, chunk_rows: int | None = None
) -> Tensor:
    """Mean cross entropy of a linear layer's scores, without ever holding all of them.

    The value and the gradients are those of ``F.cross_entropy(F.linear(hidden, weight, bias), targets)``, up to
    rounding. torch has a function of this name from 2.13 on; this one serves the older versions too, and may be
    differentiated again (with create_graph all scores are held). On the CPU products and softmax are kernels of ours,
    in the 16-bit types only the softmax; elsewhere it is ``torch.log_softmax``, piece by piece.

    Args:
        hidden: ``[rows, P]``.
        weight: ``[V, P]``.
        bias: ``[V]`` or None.
        targets: int64 ``[rows]``, each in ``0..V-1``.
        chunk_rows: how many rows' scores to hold at a time; None for a number that suits V.

    Returns:
        The mean over the rows, natural units; in float32 for the 16-bit dtypes.

    Raises:
        ValueError: shapes that do not fit, or no rows.
        IndexError: a target out of range.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"linear_cross_entropy: expected hidden [rows, P] and weight [V, P], got {list(hidden.shape)} and "
            f"{list(weight.shape)}"
        )
    if targets.shape != hidden.shape[:1] or len(targets) == 0:
        raise ValueError(
            f"linear_cross_entropy: expected targets [rows] = [{len(hidden)}], at least one, got {list(targets.shape)}"
        )
    _check_tokens("targets", targets, weight.shape[0])
    if chunk_rows is None:
        scores = _CHUNK_SCORES if weight.device.type == "cpu" else _CHUNK_SCORES_ON_DEVICE
        chunk_rows = max(scores // weight.shape[0], _CHUNK_ROWS)
    if chunk_rows < 1:
        raise ValueError(f"linear_cross_entropy: chunk_rows: expected at least 1, got {chunk_rows}")
    train = torch.is_grad_enabled()
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, chunk_rows, train
    )
    return loss


def _check_tokens(name: str, tokens: Tensor, vocab_size: int) -> None:
    if tokens.dtype != torch.int64:
        raise TypeError(f"{name}: expected token numbers, int64, got {tokens.dtype}")
    if tokens.numel() and tokens.device.type != "meta":
        least, most = (int(end) for end in torch.aminmax(tokens))
        if least < 0 or most >= vocab_size:
            wrong = least if least < 0 else most
            raise IndexError(f"{name}: expected token numbers from 0 to {vocab_size - 1}, got {wrong}")


def detach_state(state: Any) -> Any:
    """Cut a layer's state (a tensor, a pair, or None) from the graph: gradients stop there, the numbers go on."""
    if state is None or isinstance(state, Tensor):
        return None if state is None else state.detach()
    return tuple(one.detach() for one in state)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """No dropout and no gradients inside; every submodule's mode as it was afterwards."""
    modes = {part: part.training for part in module.modules()}
    try:
        module.eval()
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


class RNNLM(nn.Module):
    r"""A language model: tokens, a recurrent layer, and a linear layer to the scores of the next token.

    Args:
        rnn: an RNN, GRU or LSTM, of any depth, its input size ``vocab_size`` for one-hot input, else
            ``embedding_dim``. Its ``batch_first`` is the layout of the tokens. torch.nn's own layers work too, but get
            their one-hot rows made.
        vocab_size: ``V``.
        embedding_dim: ``E``, the size of a learned embedding, or None for one-hot input.
        tie_weights: the output layer's weight is the embedding's; needs ``E`` to be the size of the layer's output.
        dropout: probability of dropping an element, in training, of the embedding and of the last layer's output
            (one-hot input is not dropped).

    Call with tokens ``[T, N]`` (``[N, T]`` for ``batch_first``) or ``[T]``, and the layer's state or None. Gives the
    scores of the tokens that follow, ``[T, N, V]`` (``[N, T, V]``, ``[T, V]``), and the layer's new state.

    A layer with forward hooks (weight norm and pruning use them) is called the plain way, one-hot rows and all, so
    that they run.

    Raises:
        ValueError: sizes that do not fit one another; tokens of the wrong rank, or none.
        TypeError: a layer or tokens of the wrong type.
        IndexError: a token out of range.
        RuntimeError: a state that does not fit.
    """

    def __init__(
        self,
        rnn: nn.RNNBase,
        vocab_size: int,
        embedding_dim: int | None = None,
        tie_weights: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not isinstance(rnn, (nn.RNN, nn.GRU, nn.LSTM)):
            raise TypeError(f"RNNLM: rnn: expected an RNN, GRU or LSTM layer, got {type(rnn).__name__}")
        if vocab_size < 1:
            raise ValueError(f"RNNLM: vocab_size: expected at least 1, got {vocab_size}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"RNNLM: dropout: expected a probability from 0 to below 1, got {dropout}")
        name, expected = ("vocab_size", vocab_size) if embedding_dim is None else ("embedding_dim", embedding_dim)
        if rnn.input_size != expected:
            raise ValueError(
                f"RNNLM: rnn: expected an input_size of {expected} ({name}), got a layer of {rnn.input_size}"
            )
        size = (rnn.proj_size or rnn.hidden_size) * (2 if rnn.bidirectional else 1)
        if tie_weights and embedding_dim != size:
            raise ValueError(
                f"RNNLM: tie_weights: expected an embedding_dim of {size}, the size of the layer's output, "
                f"got {embedding_dim}"
            )
        first = rnn.weight_ih_l0
        like: dict[str, Any] = {"device": first.device, "dtype": first.dtype} if isinstance(first, Tensor) else {}
        self.rnn = rnn
        self.vocab_size = vocab_size
        self.dropout = dropout
        self.embedding = None if embedding_dim is None else nn.Embedding(vocab_size, embedding_dim, **like)
        self.output = nn.Linear(size, vocab_size, **like)
        if tie_weights and self.embedding is not None:
            self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Score the tokens that follow each of ``tokens``; see the class."""
        hidden, state = self._hidden(tokens, state)
        return self.output(hidden), state

    def loss(self, tokens: Tensor, targets: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Mean cross entropy of ``targets`` after ``tokens``, in natural units, and the new state.

        The scores are never all in memory. Same value and gradients as ``F.cross_entropy`` of the scores, up to
        rounding.

        Args:
            tokens: as in a call.
            targets: int64 in the shape of ``tokens``: the token that follows each.
            state: of the layer, or None.

        Raises:
            ValueError, TypeError, IndexError: as for a call, for ``targets`` too.
        """
        if targets.shape != tokens.shape:
            raise ValueError(
                f"RNNLM: targets: expected the shape of tokens, {list(tokens.shape)}, got {list(targets.shape)}"
            )
        hidden, state = self._hidden(tokens, state)
        rows = hidden.flatten(0, -2)
        weight: Tensor = self.output.weight
        bias: Tensor = self.output.bias
        device = hidden.device.type
        if call.any_autocast() and call.under_autocast(hidden):
            low = torch.get_autocast_dtype(device)
            rows, weight, bias = rows.to(low), weight.to(low), bias.to(low)
        with torch.autocast(device, enabled=False):
            return linear_cross_entropy(rows, weight, bias, targets.flatten()), state

    def perplexity(self, tokens: Tensor, targets: Tensor, state: Any = None) -> float:
        """Give ``exp`` of the loss, without dropout: between 1 (certain and right) and, for a blind guess, ``V``."""
        with _evaluating(self):
            return math.exp(self.loss(tokens, targets, state)[0].item())

    def generate(
        self,
        prompt: _Prompt,
        num_tokens: int,
        sample: bool = False,
        alpha: float = 1.0,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        stop_token: int | None = None,
        generator: torch.Generator | None = None,
        state: Any = None,
        callback: Callable[[Tensor], object] | None = None,
    ) -> Generated:
        """Write tokens after a prompt: one fused call for the prompt, then a loop in C++.

        The loop runs on the CPU, and so must the model be there: ``model.to("cpu").generate(...)``.

        Greedy by default (the lowest number among equals). With ``sample`` the next token is drawn with a probability
        proportional to ``p ** alpha``: above 1 sharpens, below 1 flattens. ``top_k`` and then ``top_p`` narrow the
        choice first: to the k likeliest, and to the fewest of these that together have at least the share p.

        Args:
            prompt: int64 ``[T, N]`` (``[N, T]`` for ``batch_first``) or ``[T]``, at least one step; or N prompts of
                different lengths, a list of int64 ``[T_n]``.
            num_tokens: how many to write after it.
            sample: draw; False takes the likeliest.
            alpha: exponent of the probabilities.
            temperature: ``1 / alpha``, to be given in its place.
            top_k: from 1 to ``V``, or None for all.
            top_p: above 0 and at most 1, or None for all.
            stop_token: a sequence ends with it.
            generator: of the random numbers, a CPU generator; None is torch's own. Equal generators write equal tokens.
            state: the layer's state before the prompt.
            callback: called with the tokens of each step as they come, one step in the layout of the prompt.

        Raises:
            ValueError: an empty prompt, an option out of its range, a bidirectional layer; prompts of different lengths
                with a layer of torch.nn.
            IndexError: a token of the prompt out of range.
            RuntimeError: scores that are not finite; a model that is not on the CPU.
        """
        choice = self._choice(
            sample=sample,
            alpha=alpha,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop_token=stop_token,
            generator=generator,
        )
        read, start = self._read(prompt, num_tokens, state)
        parts, states = [read.new_empty(0, len(start.finished))], start.states
        for tokens, progress in self._pieces(start, num_tokens, num_tokens if callback is None else 1, choice):
            parts.append(tokens)
            states = progress.states
            if callback is not None:
                callback(self._as_prompt(tokens, read))
        return Generated(self._as_prompt(torch.cat(parts), read), self._as_state(states, read))

    def stream(
        self, prompt: _Prompt, num_tokens: int, *, chunk: int = 1, state: Any = None, **options: Any
    ) -> Iterator[Tensor]:
        """Write the tokens that :meth:`generate` does, and give them as they come, up to ``chunk`` steps at a time.

        Args:
            prompt: as for :meth:`generate`.
            num_tokens: as there.
            chunk: the number of steps.
            state: as there.
            options: of the choice, as there: ``sample``, ``alpha``, ``temperature``, ``top_k``, ``top_p``,
                ``stop_token``, ``generator``.

        Yields:
            int64 ``[steps, N]`` (``[N, steps]``, ``[steps]``), the layout of the prompt.

        Raises:
            ValueError, IndexError, RuntimeError: as :meth:`generate`, at the first token.
        """
        choice = self._choice(**options)
        if chunk < 1:
            raise ValueError(f"RNNLM: chunk: expected at least 1, got {chunk}")
        read, start = self._read(prompt, num_tokens, state)
        for tokens, _ in self._pieces(start, num_tokens, chunk, choice):
            yield self._as_prompt(tokens, read)

    def extra_repr(self) -> str:
        """Show what the submodules do not."""
        tied = self.embedding is not None and self.output.weight is self.embedding.weight
        return f"vocab_size={self.vocab_size}, dropout={self.dropout}, tie_weights={tied}"

    # --- the way of tokens through the layers ---

    def _hidden(self, tokens: Tensor, state: Any, lengths: Tensor | None = None) -> tuple[Tensor, Any]:
        """The last layer's output, in the layout of the tokens, and the new state; lengths ``[N]`` of padded tokens."""
        if not isinstance(tokens, Tensor):
            raise TypeError(f"RNNLM: tokens: expected a Tensor, got {type(tokens).__name__}")
        if tokens.dim() not in (1, 2):
            layout = "[N, T]" if self.rnn.batch_first else "[T, N]"
            raise ValueError(f"RNNLM: tokens: expected {layout} or [T], got {list(tokens.shape)}")
        steps = tokens.shape[tokens.dim() - 1 if self.rnn.batch_first else 0]
        if steps == 0:
            raise ValueError(f"RNNLM: tokens: expected at least one step, got {list(tokens.shape)}")
        _check_tokens("RNNLM: tokens", tokens, self.vocab_size)
        if self.embedding is None and self._looks_up(tokens):
            output, state = self._look_up(tokens, state, lengths)
        else:
            if self.embedding is None:
                rows = F.one_hot(tokens, self.vocab_size).to(self.output.weight.dtype)
            else:
                rows = F.dropout(self.embedding(tokens), self.dropout, self.training)
            options = {} if lengths is None else {"lengths": lengths}
            output, state = self.rnn(rows, state, **options)
        return F.dropout(output, self.dropout, self.training), state

    def _looks_up(self, tokens: Tensor) -> bool:
        """Whether the op may be called past the layer's ``forward``: it is ours, it is as made, and has kernels."""
        rnn = self.rnn
        return (
            type(rnn).forward in (modules.RNN.forward, modules.GRU.forward, modules.LSTM.forward)
            and tokens.device.type in ("cpu", "cuda")
            and not (rnn._forward_hooks or rnn._forward_pre_hooks or rnn._backward_hooks or rnn._backward_pre_hooks)
        )

    def _look_up(self, tokens: Tensor, state: Any, lengths: Tensor | None) -> tuple[Tensor, Any]:
        """What ``rnn(one_hot(tokens), state)`` gives, without the one-hot rows."""
        rnn: Any = self.rnn
        mode = rnn.mode
        steps = tokens.unsqueeze(1) if tokens.dim() == 1 else tokens.t() if rnn.batch_first else tokens
        ndim = tokens.dim() + 1
        names = ("hidden[0]", "hidden[1]") if mode == "LSTM" else ("hidden",)
        if mode == "LSTM" and state is not None and (not isinstance(state, (tuple, list)) or len(state) != 2):
            call.refuse_pair("LSTM", state)
        states = [] if state is None else list(state) if mode == "LSTM" else [state]
        directions = len(rnn._all_weights)
        for name, one, size in zip(names, states, (rnn.proj_size or rnn.hidden_size, rnn.hidden_size), strict=False):
            call.check_state(mode, name, one, ndim, (directions, steps.shape[1], size), steps)
        if ndim == 2:
            states = [one.unsqueeze(1) for one in states]
        weights: list[tuple[Any, ...]] = [
            call.weights_of(rnn, names, rnn.bias, rnn.proj_size) for names in rnn._all_weights
        ]
        output_dtype = None
        h0, c0 = [*states, None, None][:2]
        if call.any_autocast() and call.under_autocast(steps):
            stand_in = weights[0][0]  # one-hot rows would be made in its dtype
            compute, output_dtype = call.autocast_dtypes(mode, rnn.proj_size, False, stand_in, h0, c0)
            if compute is not None:
                h0, c0 = call.cast(h0, compute), call.cast(c0, compute)
                weights = [tuple(call.cast(weight, compute) for weight in five) for five in weights]
        for one in (h0, c0):
            if one is not None and one.dtype != weights[0][0].dtype:
                call.refuse_state_dtype(mode, weights[0][0], h0, c0)
        bounds = (None, lengths, None)  # neither packed nor with resets
        output, h_n, c_n, _ = call.run_layers(rnn, steps, h0, c0, weights, bounds, False)
        if output_dtype is not None:
            output, h_n = output.to(output_dtype), h_n.to(output_dtype)
        if ndim == 2:
            output, h_n = output.squeeze(1), h_n.squeeze(1)
            c_n = None if c_n is None else c_n.squeeze(1)
        elif rnn.batch_first:
            output = output.transpose(0, 1)
        return output, h_n if c_n is None else (h_n, c_n)

    # --- generation ---

    def _choice(
        self,
        *,
        sample: bool = False,
        alpha: float = 1.0,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        stop_token: int | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Any, ...]:
        """The options of the C++ loop, checked."""
        if self.rnn.bidirectional:
            raise ValueError(
                "RNNLM: a bidirectional layer cannot generate: its state would need the tokens that are yet to come"
            )
        if temperature is not None:
            if alpha != 1.0:
                raise ValueError("RNNLM: alpha, temperature: expected one of them, temperature being 1 / alpha")
            if not (math.isfinite(temperature) and temperature > 0):
                raise ValueError(f"RNNLM: temperature: expected a finite number above 0, got {temperature}")
            alpha = 1.0 / temperature
        if not (math.isfinite(alpha) and alpha > 0):
            raise ValueError(f"RNNLM: alpha: expected a finite number above 0, got {alpha}")
        if top_k is not None and not 1 <= top_k <= self.vocab_size:
            raise ValueError(f"RNNLM: top_k: expected 1 to {self.vocab_size}, the size of the vocabulary, got {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"RNNLM: top_p: expected a number above 0, at most 1, got {top_p}")
        if stop_token is not None and not 0 <= stop_token < self.vocab_size:
            raise ValueError(f"RNNLM: stop_token: expected 0 to {self.vocab_size - 1}, got {stop_token}")
        stop = -1 if stop_token is None else stop_token
        return sample, alpha, top_k or 0, 1.0 if top_p is None else top_p, stop, generator

    def _read(self, prompt: _Prompt, num_tokens: int, state: Any) -> tuple[Tensor, _Progress]:
        """The prompt as one tensor, padded where there were several, and what is known after it."""
        if num_tokens < 0:
            raise ValueError(f"RNNLM: num_tokens: expected at least 0, got {num_tokens}")
        call.refuse_loop("RNNLM: generation", self.output.weight)
        tokens: Tensor
        tokens, lengths = self._side_by_side(prompt) if isinstance(prompt, (list, tuple)) else (prompt, None)
        if isinstance(tokens, Tensor) and tokens.numel() == 0:
            raise ValueError(f"RNNLM: prompt: expected at least one token, got {list(tokens.shape)}")
        with _evaluating(self):
            hidden, state = self._hidden(tokens, state, lengths)
            states = [*(state if isinstance(state, tuple) else (state,)), None][:2]
            if tokens.dim() == 1:
                states = [None if one is None else one.unsqueeze(1) for one in states]
                hidden = hidden.unsqueeze(1)
            elif self.rnn.batch_first:
                hidden = hidden.transpose(0, 1)
            if lengths is None:
                last = hidden[-1:]
            else:
                last = hidden[lengths.to(hidden.device) - 1, torch.arange(len(lengths), device=hidden.device)][None]
            scores = self.output(last).squeeze(0)
        return tokens, _Progress(scores, torch.zeros(len(scores), dtype=torch.bool, device=scores.device), states)

    def _side_by_side(self, prompts: list[Any] | tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """Prompts ``[T_n]`` as one, padded, in the layout of the layer, and their lengths ``[N]``."""
        if not isinstance(self.rnn, (modules.RNN, modules.GRU, modules.LSTM)):
            raise ValueError(
                "RNNLM: prompt: expected one Tensor: prompts of different lengths need a layer of rnnfast, "
                f"got {type(self.rnn).__module__}.{type(self.rnn).__name__}"
            )
        for n, prompt in enumerate(prompts):
            if not isinstance(prompt, Tensor):
                raise TypeError(f"RNNLM: prompt: expected a Tensor as prompt {n}, got {type(prompt).__name__}")
            if prompt.dim() != 1 or len(prompt) == 0:
                raise ValueError(
                    f"RNNLM: prompt: expected at least one token as prompt {n}, [T_n], got {list(prompt.shape)}"
                )
        if not prompts:
            raise ValueError("RNNLM: prompt: expected at least one prompt, got none")
        padded = nn.utils.rnn.pad_sequence(list(prompts), batch_first=self.rnn.batch_first)
        return padded, torch.tensor([len(prompt) for prompt in prompts])

    def _pieces(
        self, progress: _Progress, num_tokens: int, chunk: int, choice: tuple[Any, ...]
    ) -> Iterator[tuple[Tensor, _Progress]]:
        """New tokens ``[steps, N]``, up to ``chunk`` steps at a time, and what is known after them."""
        written = 0
        while written < num_tokens:
            with _evaluating(self):
                tokens, progress = self._write(progress, min(chunk, num_tokens - written), choice)
            if len(tokens) == 0:
                return
            written += len(tokens)
            yield tokens, progress

    def _write(self, progress: _Progress, num_tokens: int, choice: tuple[Any, ...]) -> tuple[Tensor, _Progress]:
        """New tokens ``[steps, N]``, and what is known after them."""
        rnn = self.rnn
        weights = call.loop_weights(rnn)
        embedding = None if self.embedding is None else self.embedding.weight
        tokens, scores, h, c, finished = torch.ops.rnnfast._generate.default(
            cell_of(rnn),
            progress.scores,
            *progress.states,
            weights,
            embedding,
            self.output.weight,
            self.output.bias,
            progress.finished,
            num_tokens,
            *choice,
        )
        return tokens, _Progress(scores, finished, [h, c if rnn.mode == "LSTM" else None])

    def _as_prompt(self, tokens: Tensor, prompt: Tensor) -> Tensor:
        if prompt.dim() == 1:
            return tokens.squeeze(1)
        return tokens.t() if self.rnn.batch_first else tokens

    def _as_state(self, states: list[Tensor | None], prompt: Tensor) -> Any:
        h, c = (one.squeeze(1) if one is not None and prompt.dim() == 1 else one for one in states)
        return h if c is None else (h, c)
