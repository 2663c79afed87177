"""torch.onnx.export of the layers: standard nodes, and ONNX Runtime's results."""

import re

import pytest
import torch

import rnnfast
import rnnfast.onnx

pytest.importorskip("onnxscript", reason="needs the extra rnnfast[onnx]")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra rnnfast[onnx]")
# The exporter's own imports warn of what is old in them.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

T, N, I, H = 5, 3, 4, 6  # noqa: E741  (the letter of the whole code base)
LAYERS = {
    "RNN": ("RNN", 1, lambda: rnnfast.RNN(I, H)),
    "RNN-relu": ("RNN", 1, lambda: rnnfast.RNN(I, H, nonlinearity="relu", bias=False)),
    "GRU": ("GRU", 1, lambda: rnnfast.GRU(I, H)),
    "GRU-deep": ("GRU", 4, lambda: rnnfast.GRU(I, H, num_layers=2, bidirectional=True, batch_first=True)),
    "GRU-before": ("GRU", 2, lambda: rnnfast.GRU(I, H, bidirectional=True, reset_after=False)),
    "LSTM": ("LSTM", 1, lambda: rnnfast.LSTM(I, H)),
    "LSTM-deep": ("LSTM", 4, lambda: rnnfast.LSTM(I, H, num_layers=2, bidirectional=True)),
    "RNNCell": ("RNN", 1, lambda: rnnfast.RNNCell(I, H)),
    "GRUCell": ("GRU", 1, lambda: rnnfast.GRUCell(I, H)),
    "LSTMCell": ("LSTM", 1, lambda: rnnfast.LSTMCell(I, H)),
}


class Model(torch.nn.Module):
    """A layer between two products; all of its results."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer, self.before = layer, torch.nn.Linear(I, I)

    def forward(self, x: torch.Tensor, *state: torch.Tensor):
        hx = None if not state else state[0] if len(state) == 1 else state
        return self.layer(self.before(x), hx)


def flat(result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else [tensor for part in result for tensor in flat(part)]


def export(model: torch.nn.Module, arguments: tuple, **options):
    return torch.onnx.export(
        model.eval(),
        arguments,
        dynamo=True,
        verbose=False,
        custom_translation_table=rnnfast.onnx.translation_table(),
        **options,
    )


def run(program, arguments: tuple) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    named = dict(zip((i.name for i in session.get_inputs()), (a.numpy() for a in arguments), strict=True))
    return [torch.from_numpy(y) for y in session.run(None, named)]


@pytest.mark.parametrize("with_state", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("layer", LAYERS)
def test_export(layer, with_state):
    """One standard node per layer and direction, and the results to 1e-5."""
    node, count, make = LAYERS[layer]
    model = Model(make())
    is_cell = layer.endswith("Cell")
    x = torch.randn((N, I) if is_cell else (N, T, I) if layer == "GRU-deep" else (T, N, I))
    state = (torch.randn((N, H) if is_cell else (count, N, H)),) * (node == "LSTM") + (
        torch.randn((N, H) if is_cell else (count, N, H)),
    )
    arguments = (x, *state) if with_state else (x,)
    program = export(model, arguments)
    check_nodes(program, node, count)
    check_results(program, model, arguments)
    directions = 2 if getattr(model.layer, "bidirectional", False) else 1
    assert rnnfast.onnx.join_directions(program) == (count // 2 if directions == 2 else 0)
    check_nodes(program, node, count // directions)
    check_results(program, model, arguments)


def check_nodes(program, node: str, count: int) -> None:
    """So many standard nodes, nothing of a domain of its own, no loop."""
    nodes = program.model_proto.graph.node
    names = [n.op_type for n in nodes]
    assert names.count(node) == count
    assert not set(names) & {"Loop", "Scan"} and all(not n.domain for n in nodes)


def check_results(program, model: torch.nn.Module, arguments: tuple) -> None:
    with torch.no_grad():
        expected = flat(model(*arguments))
    for have, want in zip(run(program, arguments), expected, strict=True):
        torch.testing.assert_close(have, want, rtol=0, atol=1e-5)


def test_dynamic_shapes():
    """Exported once, run with other numbers of steps and sequences."""
    model = Model(rnnfast.GRU(I, H, bidirectional=True))
    shapes = {0: torch.export.Dim("T", min=2), 1: torch.export.Dim("N", min=2)}
    program = export(model, (torch.randn(T, N, I),), dynamic_shapes=(shapes,))
    assert rnnfast.onnx.join_directions(program) == 1
    for steps, batch in ((2, 9), (11, 2)):
        check_results(program, model, (torch.randn(steps, batch, I),))


def test_lengths():
    """Padded sequences of different lengths, by the op, in both directions."""

    class Padded(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = torch.nn.LSTM(I, H, bidirectional=True)

        def forward(self, x: torch.Tensor, lengths: torch.Tensor):
            weights = list(self.lstm.parameters())
            one = rnnfast.ops.lstm(x, None, None, *weights[:4], lengths=lengths)
            return one, rnnfast.ops.lstm(x, None, None, *weights[4:], lengths=lengths, reverse=True)

    model, arguments = Padded(), (torch.randn(T, N, I), torch.tensor([2, 5, 1]))
    program = export(model, arguments)
    check_results(program, model, arguments)
    rnnfast.onnx.join_directions(program)
    check_results(program, model, arguments)


def test_lengths_of_a_layer():
    """The lengths option of a bidirectional layer, joined to one node."""

    class Padded(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = rnnfast.LSTM(I, H, bidirectional=True)

        def forward(self, x: torch.Tensor, lengths: torch.Tensor):
            return self.layer(x, lengths=lengths)

    model, arguments = Padded(), (torch.randn(T, N, I), torch.tensor([2, 5, 1]))
    program = export(model, arguments)
    assert rnnfast.onnx.join_directions(program) == 1
    check_nodes(program, "LSTM", 1)
    check_results(program, model, arguments)


def test_directions_that_depend_are_not_joined():
    """A reverse call whose state comes from the forward one stays a node of its own; so do other sizes."""

    class Chained(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.GRU(I, H), torch.nn.GRU(I, H)
            self.third = torch.nn.GRU(I, H + 1)

        def forward(self, x: torch.Tensor):
            one = rnnfast.ops.gru(x, x.new_zeros(N, H), *self.first.parameters())
            two = rnnfast.ops.gru(x, one[1], *self.second.parameters(), reverse=True)
            return one, two, rnnfast.ops.gru(x, x.new_zeros(N, H + 1), *self.third.parameters(), reverse=True)

    model, arguments = Chained(), (torch.randn(T, N, I),)
    program = export(model, arguments)
    assert rnnfast.onnx.join_directions(program) == 0
    check_nodes(program, "GRU", 3)
    check_results(program, model, arguments)


def test_projection_is_refused():
    """The error says what cannot be and what to do instead."""
    check_refused(Model(rnnfast.LSTM(I, H, proj_size=2)), "no projection: export a layer without proj_size")


@pytest.mark.parametrize("options", [{"gates": "reset"}, {"gates": "reset", "reset_after": False}, {"gates": "update"}])
def test_cells_without_a_node_are_refused(options):
    """ONNX's GRU has both of its gates."""
    check_refused(Model(rnnfast.GRU(I, H, **options)), "ONNX has no node for this cell")


@pytest.mark.parametrize("option", ["coupled", "layer_norm"])
def test_an_lstm_without_a_node_is_refused(option):
    check_refused(Model(rnnfast.LSTM(I, H, **{option: True})), f"lstm_{option}: ONNX has no node for this cell")


def test_return_cells_is_refused():
    """The standard node gives the last cell state only."""

    class AllCells(rnnfast.LSTM):
        def forward(self, x, hx=None):
            return super().forward(x, hx, return_cells=True)

    check_refused(Model(AllCells(I, H)), "lstm_all_c: .*export a layer without return_cells")


def check_refused(model: torch.nn.Module, message: str) -> None:
    with pytest.raises(torch.onnx.errors.OnnxExporterError) as caught:
        export(model, (torch.randn(T, N, I),))
    messages, error = "", caught.value
    while error is not None:
        messages, error = messages + str(error), error.__cause__
    assert re.search(message, messages)
