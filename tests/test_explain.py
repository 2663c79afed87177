"""rnnfast.explain: which kernel each layer and direction takes, as data and as text, and that what it says is so."""

import pathlib
import re

import pytest
import torch
from pairs import CELL_MODULES, LAYERS, H, I, N, T, make, make_input, make_state, pair
from torch import nn

import rnnfast
from rnnfast import _C

pytestmark = pytest.mark.usefixtures("default_device")
KEYS = {"kernel", "isa", "reason", "accumulate_dtype"}
CPU_KEYS = KEYS | {"threads", "chunk_steps", "packed_weights", "product_dtype"}


def raw(cell: str, dtype: str = "float32", training: bool = False, threads: int = 1, **sizes: int) -> dict:
    """The compiled part's own answer."""
    letters = {name: sizes.get(name, 8) for name in "TNIH"}
    letters["P"] = sizes.get("P", letters["H"])
    return _C.explain(cell, **letters, dtype=dtype, training=training, threads=threads)


@pytest.mark.parametrize("kind", ["batched", "unbatched", "packed_unsorted"])
@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_and_direction(layer, kind):
    """One plan for each, in order, each with its own sizes."""
    _, ours = pair(layer, num_layers=2, bidirectional=True)
    explanation = rnnfast.explain(ours, make_input(kind, ours), make_state(kind, ours))
    assert [(plan.layer, plan.direction) for plan in explanation.plans] == [
        (0, "forward"),
        (0, "reverse"),
        (1, "forward"),
        (1, "reverse"),
    ]
    for plan in explanation.plans:
        assert plan.cell == layer
        assert plan.sizes["I"] == (I if plan.layer == 0 else 2 * H)
        assert (plan.sizes["T"], plan.sizes["H"], plan.sizes["P"]) == (T, H, H)
        assert plan.sizes["N"] == (1 if kind == "unbatched" else N)
        assert plan.kernel and plan.reason
        assert plan.details.keys() >= (KEYS if plan.isa == "cuda" else CPU_KEYS)
    text = str(explanation)
    assert text.count("kernel") >= 4 and explanation.plans[0].reason in text and explanation.plans[0].kernel in text


@pytest.mark.parametrize("layer", CELL_MODULES)
def test_cells(layer):
    """A cell module is one step of one layer."""
    _, ours = pair(layer, modules=CELL_MODULES)
    (plan,) = rnnfast.explain(ours, torch.randn(N, I)).plans
    assert plan.cell == layer
    assert plan.sizes == {"T": 1, "N": N, "I": I, "H": H, "P": H}


def test_projection_batch_first_and_autocast(default_device):
    """Sizes are those of the call; the dtype is the one computed in."""
    _, ours = pair("lstm", proj_size=4, batch_first=True, num_layers=2)
    explanation = rnnfast.explain(ours, torch.randn(2, 7, I))
    assert explanation.plans[1].sizes == {"T": 7, "N": 2, "I": 4, "H": H, "P": 4}
    assert explanation.dtype == torch.float32
    _, plain = pair("lstm")
    with torch.autocast(default_device, dtype=torch.bfloat16):
        assert rnnfast.explain(plain, torch.randn(7, 2, I)).dtype == torch.bfloat16


def test_names_the_instruction_set(isa):
    """The one that is forced."""
    _, ours = pair("gru")
    (plan,) = rnnfast.explain(ours, make_input("batched", ours)).plans
    assert plan.isa == isa and isa in str(plan)


@pytest.mark.parametrize("layer", LAYERS)
def test_training_and_inference(layer):
    """Saving for backward is told apart as the call itself does."""
    _, ours = pair(layer)
    x = make_input("batched", ours)
    assert rnnfast.explain(ours, x).training
    with torch.no_grad():
        assert not rnnfast.explain(ours, x).training
    ours.requires_grad_(False)
    assert not rnnfast.explain(ours, x).training
    assert rnnfast.explain(ours, x.requires_grad_()).training


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_saved_bytes_are_true(cell, dtype):
    """What autograd keeps besides arguments and outputs is what explain says, per step, sequence and unit."""
    steps, batch, hidden = 6, 5, 64
    module = make(cell, I, hidden, dtype=dtype)
    x = torch.randn(steps, batch, I).to(dtype)
    saved: dict[int, torch.Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(id(t), t), lambda t: t):
        output, state = module(x)
    known = {t.untyped_storage().data_ptr() for t in (x, output, *module.parameters())}
    known |= {t.untyped_storage().data_ptr() for t in (state if isinstance(state, tuple) else (state,))}
    storages = {t.untyped_storage().data_ptr(): t.numel() * t.element_size() for t in saved.values()}
    extra = sum(size for pointer, size in storages.items() if pointer not in known)
    name = str(dtype).removeprefix("torch.")
    said = raw(cell, name, training=True, T=steps, N=batch, I=I, H=hidden)["saved_bytes_per_step_unit"]
    # The final states before they are stacked over the layers are kept as outputs of the op.
    assert said * steps * batch * hidden <= extra <= said * steps * batch * hidden + 2 * batch * hidden * 8
    assert raw(cell, name, training=False)["saved_bytes_per_step_unit"] == 0


@pytest.mark.parametrize(("dtype", "accumulate"), [("float32", "float32"), ("float64", "float64")])
def test_accumulation(cell, dtype, accumulate):
    """Full-width types accumulate in themselves, the 16-bit ones in float32."""
    assert raw(cell, dtype)["accumulate_dtype"] == accumulate
    for low in ("bfloat16", "float16"):
        assert raw(cell, low)["accumulate_dtype"] == "float32"


@pytest.mark.cpu_only("of the CPU's kernels")
def test_product_dtype(isa):
    """bfloat16 is multiplied as such where the processor can; with ``recompute`` and as float16 it is widened."""
    flags = re.search("^flags.*", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    can = isa == "avx512" and flags is not None and "avx512_bf16" in flags.group().split()
    x = torch.randn(T, N, I, dtype=torch.bfloat16)
    for options, want in (({}, "bfloat16" if can else "float32"), ({"recompute": True}, "float32")):
        (plan,) = rnnfast.explain(rnnfast.GRU(I, H, dtype=torch.bfloat16, **options), x).plans
        assert plan.details["product_dtype"] == want and f"product_dtype {want}" in str(plan)
    assert raw("gru", "float16")["product_dtype"] == raw("gru")["product_dtype"] == "float32"
    assert raw("gru", "float64")["product_dtype"] == "float64"


@pytest.mark.cpu_only("a device has no threads of ours")
def test_threads(cell):
    """Never more than there are, and more than one where the batch is large."""
    for threads in (1, 2, 4):
        assert 1 <= raw(cell, threads=threads, N=1, H=8)["threads"] <= threads
        assert 1 <= raw(cell, threads=threads, T=50, N=256, I=256, H=256)["threads"] <= threads
    assert raw(cell, threads=2, T=50, N=256, I=256, H=256)["threads"] == 2


def test_does_not_run(cell):
    """Only shapes matter: an input far too large to compute with is explained at once, and nothing is drawn."""
    module = make(cell, num_layers=2, dropout=0.5)
    x = torch.zeros(1).expand(2**20, 2**10, I)
    before = torch.get_rng_state()
    assert rnnfast.explain(module, x).plans[0].sizes["T"] == 2**20
    assert torch.equal(torch.get_rng_state(), before)


def test_on_cuda():
    """A layer on a device is explained by that device's policy; a build without kernels says that it has none."""
    if not _C.build_info()["cuda"]:
        with pytest.raises(ValueError, match="device: expected None, for this build has no CUDA kernels: "):
            _C.explain("gru", T=8, N=8, I=8, H=8, P=8, dtype="float32", training=False, threads=1, device=0)
        return
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device, whose properties the policy asks for")
    layer = rnnfast.GRU(I, H, device="cuda")
    (plan,) = rnnfast.explain(layer, torch.randn(64, N, I, device="cuda")).plans
    assert plan.isa == "cuda" and plan.kernel in ("per_step", "resident", "streamed") and plan.reason
    assert plan.details["backward_kernel"] in ("per_step", "resident", "streamed")


def test_refusals():
    """A module that is not ours, and inputs that the layer would refuse."""
    with pytest.raises(TypeError, match="LSTM"):
        rnnfast.explain(nn.LSTM(I, H), torch.randn(T, N, I))
    with pytest.raises(TypeError, match="Linear"):
        rnnfast.explain(nn.Linear(I, H), torch.randn(T, N, I))
    with pytest.raises(RuntimeError, match=f"Expected {I}, got {I + 1}"):
        rnnfast.explain(rnnfast.LSTM(I, H), torch.randn(T, N, I + 1))
    with pytest.raises(ValueError, match="2D or 3D"):
        rnnfast.explain(rnnfast.LSTM(I, H), torch.randn(I))


@pytest.mark.parametrize(
    "change",
    [{"cell": "elman"}, {"dtype": "int64"}, {"dtype": ""}, {"T": -1}, {"H": 0}, {"threads": 0}],
    ids=str,
)
def test_raw_refusals(change):
    """The compiled part checks what it is asked."""
    arguments = {"cell": "gru"} | change
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        raw(**arguments)
