"""The raw ops called with nonsense: each call raises and names the argument; none crashes or reads outside memory."""

from collections.abc import Callable

import pytest
import torch
from strategies import DIFFERENTIABLE, MASKS, Call, Case
from test_ops import backward_arguments, backward_op, forward_op
from torch import Tensor

from rnnfast.reference import CELLS as REFERENCES

ERRORS = (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError)
T, N, I, H, P = 4, 3, 5, 6, 2  # noqa: E741  (the letter of the whole code base)
Change = Callable[[Tensor], Tensor | None]

pytestmark = pytest.mark.few_cells


def valid(cell: str, kind: str = "padded") -> Call:
    lengths = {"packed": (4, 3, 1), "lengths": (2, 4, 0)}.get(kind)
    return Case(
        cell,
        T=1 if kind == "step" else T,
        N=N,
        I=I,
        H=H,
        P=P if REFERENCES[cell].has_projection else None,
        kind="padded" if kind in ("lengths", "resets") else kind,
        lengths=lengths,
        resets=kind == "resets",
    ).call()


def refuse(call: Call, match: str) -> None:
    """Both the public op and the one that autograd calls refuse, with and without gradients."""
    with pytest.raises(ERRORS, match=match):
        call(call.op())
    with pytest.raises(ERRORS, match=match):
        forward_op(call.cell)(*call.everything())
    if all(t.is_floating_point() for t in call.tensors.values()):
        with pytest.raises(ERRORS, match=match):
            call.with_grad()(call.op())


def test_valid_calls_are_accepted(cell):
    """The calls that the others change are good ones."""
    for kind in ("padded", "packed", "lengths", "resets", "step"):
        call = valid(cell, kind)
        torch.testing.assert_close(call(call.op()), call(call.reference()), rtol=1e-11, atol=1e-12)


WRONG: dict[str, Change] = {
    "a dimension more": lambda t: t.unsqueeze(0).unsqueeze(0),
    "no dimension": lambda t: t.flatten()[0],
    "one longer last": lambda t: torch.cat([t, t[..., :1]], -1),
    "one shorter last": lambda t: t[..., :-1],
    "empty last": lambda t: t[..., :0],
    "one longer first": lambda t: torch.cat([t, t[:1]]),
    "one shorter first": lambda t: t[:-1],
    "float32": lambda t: t.float(),
    "bfloat16": lambda t: t.bfloat16(),
    "int64": lambda t: t.long(),
    "bool": lambda t: t > 0,
    "complex": lambda t: t.to(torch.complex128),
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
}
TENSORS = [*DIFFERENTIABLE]
# These leave a valid call: another number of steps, or of features that agrees with what the others say.
ALLOWED = {("input", "one longer first"), ("input", "one shorter first")}


@pytest.mark.parametrize("change", WRONG)
@pytest.mark.parametrize("name", TENSORS)
def test_wrong_tensor(cell, name, change):
    """Rank, sizes, dtype, layout, device of each tensor."""
    call = valid(cell)
    if name not in call.tensors:
        assert name in ("c0", "weight_hr", "weight_ch", "weight_ln")
        return
    call.tensors[name] = WRONG[change](call.tensors[name])
    if (name, change) in ALLOWED:
        assert call(call.op())[0].shape[0] == call.tensors[name].shape[0]
        return
    # A dtype or a device differs between two tensors: either may be the one that is named. And a weight gives H and P
    # to the call: the tensor that no longer fits may be the one that is named.
    others = change in ("float32", "bfloat16", "int64", "bool", "complex", "sparse", "meta")
    others |= name in ("weight_ih", "weight_hh", "weight_hr", "input")
    match = "|".join(TENSORS) if others else name
    # There is no kernel of this kind at all: torch's dispatcher refuses, in its own words.
    match += "|Could not run" if change == "sparse" else ""
    refuse(call, match)


@pytest.mark.parametrize("kind", ["packed", "step"])
@pytest.mark.parametrize("name", ["input", "h0"])
@pytest.mark.parametrize("change", ["a dimension more", "no dimension", "one longer last", "one longer first", "int64"])
def test_wrong_tensor_of_a_packed_or_single_step_call(cell, kind, name, change):
    """The same for the other forms of the input."""
    call = valid(cell, kind)
    call.tensors[name] = WRONG[change](call.tensors[name])
    refuse(call, "input|h0|c0|batch_sizes")


@pytest.mark.parametrize(
    ("dropped", "match"),
    [
        (["bias_ih"], "bias"),
        (["bias_hh"], "bias"),
    ],
)
def test_missing_tensor(cell, dropped, match):
    """Biases come both or not at all."""
    call = valid(cell)
    for name in dropped:
        del call.tensors[name]
    refuse(call, match)


def test_missing_projection():
    """Weights of the projected shape without the projection."""
    call = valid("lstm")
    del call.tensors["weight_hr"]
    refuse(call, "weight_hh|weight_hr|h0")


def test_tensor_the_cell_does_not_have(cell):
    """A cell state or a projection where there is none."""
    if REFERENCES[cell].has_projection:
        return
    call = valid(cell)
    if REFERENCES[cell].num_states == 1:
        call.tensors["c0"] = torch.zeros(N, H, dtype=torch.float64)
        refuse(call, "c0")
    call = valid(cell)
    call.tensors["weight_hr"] = torch.zeros(H, H, dtype=torch.float64)
    refuse(call, "weight_hr")


def test_required_tensors_missing(cell):
    """None for a tensor that must be there."""
    for name in ("input", "weight_ih", "weight_hh"):
        call = valid(cell)
        del call.tensors[name]
        with pytest.raises(ERRORS):
            call(call.op())


def test_not_tensors(cell):
    """Lists, arrays, strings."""
    for value in ([[0.0]], "input", 3.0, object()):
        call = valid(cell)
        call.tensors["input"] = value
        with pytest.raises(ERRORS):
            call(call.op())


def test_empty_sequence(cell):
    """No step at all."""
    call = valid(cell)
    call.tensors["input"] = call.tensors["input"][:0]
    refuse(call, "input|[Ss]equence|step")


BATCH_SIZES = {
    "negative": torch.tensor([3, 2, -2, 2]),
    "zero at the end": torch.tensor([3, 3, 2, 0]),
    "all zero": torch.tensor([0, 0, 0, 0]),
    "increasing": torch.tensor([1, 2, 2, 3]),
    "too many rows": torch.tensor([3, 3, 3, 3]),
    "too few rows": torch.tensor([3, 2, 1]),
    "sum overflows": torch.tensor([2**63 - 1, 2**63 - 1, 10]),
    "huge": torch.tensor([2**62, 1, 1, 1]),
    "empty": torch.tensor([], dtype=torch.int64),
    "two-dimensional": torch.tensor([[3, 2, 2, 1]]),
    "zero-dimensional": torch.tensor(8),
    "int32": torch.tensor([3, 2, 2, 1], dtype=torch.int32),
    "float": torch.tensor([3.0, 2.0, 2.0, 1.0]),
    "bool": torch.tensor([True, True]),
    "meta": torch.tensor([3, 2, 2, 1], device="meta"),
}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("wrong", BATCH_SIZES)
def test_wrong_batch_sizes(cell, wrong, reverse):
    """Sizes that no PackedSequence has."""
    call = valid(cell, "packed")
    call.options |= {"batch_sizes": BATCH_SIZES[wrong], "reverse": reverse}
    refuse(call, "batch_sizes|input|h0")


LENGTHS = {
    "negative": torch.tensor([2, -1, 3]),
    "very negative": torch.tensor([2, -(2**63), 3]),
    "over-long": torch.tensor([2, T + 1, 3]),
    "huge": torch.tensor([2, 2**62, 3]),
    "too few": torch.tensor([2, 3]),
    "too many": torch.tensor([2, 3, 1, 1]),
    "empty": torch.tensor([], dtype=torch.int64),
    "two-dimensional": torch.tensor([[2, 3, 1]]),
    "zero-dimensional": torch.tensor(3),
    "int32": torch.tensor([2, 3, 1], dtype=torch.int32),
    "float": torch.tensor([2.0, 3.0, 1.0]),
    "meta": torch.tensor([2, 3, 1], device="meta"),
}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("wrong", LENGTHS)
def test_wrong_lengths(cell, wrong, reverse):
    """Lengths that the sequences cannot have."""
    call = valid(cell, "lengths")
    call.options |= {"lengths": LENGTHS[wrong], "reverse": reverse}
    refuse(call, "lengths")


RESETS = {
    "too few steps": torch.zeros(T - 1, N, dtype=torch.bool),
    "too many steps": torch.zeros(T + 1, N, dtype=torch.bool),
    "transposed": torch.zeros(N, T, dtype=torch.bool),
    "one-dimensional": torch.zeros(T, dtype=torch.bool),
    "three-dimensional": torch.zeros(T, N, 1, dtype=torch.bool),
    "int64": torch.zeros(T, N, dtype=torch.int64),
    "uint8": torch.zeros(T, N, dtype=torch.uint8),
    "float": torch.zeros(T, N),
    "meta": torch.zeros(T, N, dtype=torch.bool, device="meta"),
}


@pytest.mark.parametrize("wrong", RESETS)
def test_wrong_resets(cell, wrong):
    """Masks that do not fit."""
    call = valid(cell, "resets")
    call.options["resets"] = RESETS[wrong]
    refuse(call, "resets")


@pytest.mark.parametrize("option", ["lengths", "resets"])
@pytest.mark.parametrize("kind", ["packed", "step"])
def test_options_for_padded_input_only(cell, kind, option):
    """A packed batch has its lengths already; one step has no sequence."""
    call = valid(cell, kind)
    steps = 1 if kind == "step" else T
    values = {"lengths": torch.tensor([1, 1, 1]), "resets": torch.zeros(steps, N, dtype=torch.bool)}
    call.options[option] = values[option]
    refuse(call, option)


def expanded(*shape: int) -> Tensor:
    """A tensor of any size that occupies one number."""
    return torch.zeros(1, dtype=torch.float64).expand(shape)


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        # No memory holds these; the allocator's own words are as good as ours.
        ({"T": 2**40}, "input|allocate"),
        ({"N": 2**40}, "input|allocate"),
        ({"I": 2**40}, "weight_ih|input|allocate"),
        # The number of gates over all steps, or its bytes, does not fit in 64 bits.
        ({"T": 2**31, "N": 2**30, "I": 1}, "input|h0"),
        ({"T": 2**62, "N": 1, "I": 1}, "input"),
        ({"T": 1, "N": 2**61, "I": 1}, "input|h0"),
        ({"N": 2**30, "H": 2**30, "I": 1}, "input|weight|h0"),
        ({"I": 2**60, "H": 1}, "input|weight|overflowed with sizes"),
    ],
    ids=str,
)
@pytest.mark.parametrize("states", [False, True])
def test_sizes_that_overflow(cell, sizes, match, states):
    """Valid shapes whose products do not fit in 32 or 64 bits, or in any memory; stride 0, so they cost none."""
    size = {"T": 2, "N": 2, "I": 2, "H": 2} | sizes
    gates = REFERENCES[cell].num_gates
    tensors = {"input": expanded(size["T"], size["N"], size["I"])}
    if states:
        tensors["h0"] = expanded(size["N"], size["H"])
        if REFERENCES[cell].num_states == 2:
            tensors["c0"] = expanded(size["N"], size["H"])
    tensors["weight_ih"] = expanded(gates * size["H"], size["I"])
    tensors["weight_hh"] = expanded(gates * size["H"], size["H"])
    if REFERENCES[cell].num_peepholes:
        tensors["weight_ch"] = expanded(REFERENCES[cell].num_peepholes * size["H"])
    if REFERENCES[cell].is_normalized:
        tensors["weight_ln"] = expanded(REFERENCES[cell].num_norm_vectors * size["H"])
    call = Call(cell, tensors)
    with pytest.raises(ERRORS, match=match):
        call(call.op())
    with pytest.raises(ERRORS, match=match):
        forward_op(cell)(*call.everything())


def test_rows_of_a_packed_batch_that_overflow(cell):
    """As many rows as 64 bits can count, in one step."""
    gates = REFERENCES[cell].num_gates
    tensors = {
        "input": expanded(2**62, 1),
        "weight_ih": expanded(gates, 1),
        "weight_hh": expanded(gates, 1),
    }
    call = Call(cell, tensors, {"batch_sizes": torch.tensor([2**62])})
    with pytest.raises(ERRORS, match=r"input|batch_sizes"):
        call(call.op())


# The backward op, called by hand.

NUM_GRADS = 3
BACKWARD_NAMES = ["grad_output", "grad_h_n", "grad_c_n", *TENSORS[:8], "batch_sizes", "lengths", "resets", "reverse"]
BACKWARD_NAMES += ["weight_ch", *MASKS, "weight_ln", "recompute", "gates", "cells", "hidden", "needs"]


def test_backward_op_accepts_its_own_arguments(cell):
    """The call that the next tests change is a good one."""
    call = valid(cell)
    grads = backward_op(cell)(*backward_arguments(call))
    assert len(grads) == len(TENSORS)
    for name, gradient in zip(TENSORS, grads, strict=True):
        assert gradient.shape == (call.tensors[name].shape if name in call.tensors else (0,))


@pytest.mark.parametrize(
    "change", ["a dimension more", "no dimension", "one longer last", "empty last", "float32", "meta"]
)
@pytest.mark.parametrize(
    "name", ["grad_output", "grad_h_n", "grad_c_n", "gates", "cells", "hidden", "input", "weight_hh"]
)
def test_wrong_tensor_in_backward(cell, name, change):
    """Gradients and saved tensors of another shape, dtype or device; what is saved is opaque, but checked."""
    arguments = backward_arguments(valid(cell))
    index = BACKWARD_NAMES.index(name)
    saved = name in ("gates", "cells", "hidden")
    if arguments[index] is None or arguments[index].numel() == 0:
        assert saved or name == "grad_c_n"
        return
    if saved and change == "a dimension more":  # of what is opaque only the extent and the dtype matter
        change = "one shorter first"
    arguments[index] = WRONG[change](arguments[index])
    with pytest.raises(ERRORS, match="|".join(BACKWARD_NAMES)):
        backward_op(cell)(*arguments)


def test_wrong_needs(cell):
    """Not nine answers."""
    *arguments, needs = backward_arguments(valid(cell))
    for wrong in (needs[:-1], [*needs, True], []):
        with pytest.raises(ERRORS):
            backward_op(cell)(*arguments, wrong)


def test_saved_tensors_of_another_call(cell):
    """A shorter sequence's saved tensors would be read past their end."""
    short, full = valid(cell), valid(cell)
    short.tensors["input"] = short.tensors["input"][:2]
    for index, name in enumerate(BACKWARD_NAMES):
        if name not in ("gates", "cells", "hidden"):
            continue
        arguments, others = backward_arguments(full), backward_arguments(short)
        if arguments[index].numel() == 0:
            continue
        arguments[index] = others[index]
        with pytest.raises(ERRORS, match=name):
            backward_op(cell)(*arguments)


@pytest.mark.parametrize(
    "change", ["one longer last", "one longer first", "no dimension", "a dimension more", "float32", "int64"]
)
@pytest.mark.parametrize("name", MASKS)
def test_wrong_masks(cell, name, change):
    """Masks of other shapes or dtypes; zoneout of a state that the cell has not."""
    call = valid(cell)
    if REFERENCES[cell].num_states == 2 and name != "recurrent_mask":  # these do not go with a projection
        call.tensors.pop("weight_hr", None)
        call.tensors |= {
            "h0": torch.randn(N, H, dtype=torch.float64),
            "weight_hh": torch.randn_like(call.tensors["weight_ih"][:, :1]).expand(-1, H).contiguous(),
        }
    size = call.tensors["weight_hh"].shape[1]
    call.options[name] = torch.ones((N, size) if name == "recurrent_mask" else (T, N, H), dtype=torch.float64)
    if name == "zoneout_c" and REFERENCES[cell].num_states == 1:
        refuse(call, "zoneout_c: this cell has no second state")
        return
    call(call.op())
    call.options[name] = WRONG[change](call.options[name])
    refuse(call, name)


def test_masks_with_a_projection():
    """Zoneout would mix states of two sizes."""
    for name in MASKS[1:]:
        call = valid("lstm")
        call.options[name] = torch.ones(T, N, H, dtype=torch.float64)
        refuse(call, f"{name}: not with weight_hr")


@pytest.mark.parametrize(
    ("cell_with", "name", "what", "weights"),
    [
        ("lstm_peephole", "weight_ch", "peepholes", "the peepholes"),
        ("lstm_layer_norm", "weight_ln", "layer normalization", "layer normalization"),
        ("gru_layer_norm", "weight_ln", "layer normalization", "layer normalization"),
    ],
)
def test_missing_and_superfluous_extras(cell_with, name, what, weights):
    """A cell with peepholes or layer normalization needs their weights, another has none."""
    call = valid(cell_with)
    extra = call.tensors.pop(name)
    refuse(call, rf"{name}: expected the weights of {weights}, \[V\*H\], got None")
    call = valid("lstm")
    call.tensors[name] = extra
    refuse(call, f"{name}: this cell has no {what}; expected None")
