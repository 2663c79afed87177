"""The shapes that every benchmark measures, each with where it comes from, and the cells they are measured for.

Letters as in csrc/sequence.h: T steps, N batch, I input size, H hidden size, G gates, L layers, D directions.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """One shape of the grid. `quick` marks the few that `--quick` runs."""

    name: str
    T: int
    N: int
    I: int  # noqa: E741  (the letter is the project's)
    H: int
    L: int
    D: int
    source: str
    quick: bool = False

    @property
    def shape(self) -> str:
        """`T N I H`, and layers and directions where they are not one."""
        text = f"{self.T} {self.N} {self.I} {self.H}"
        return text + (f" L{self.L}" if self.L > 1 else "") + (" bi" if self.D > 1 else "")


CASES: tuple[Case, ...] = (
    # Streaming: one step of one sequence, as in a decoder or a control loop.
    Case("step-h64", 1, 1, 64, 64, 1, 1, "streaming, small controller", quick=True),
    Case("step-h256", 1, 1, 256, 256, 1, 1, "streaming decoder", quick=True),
    Case("step-h1024", 1, 1, 1024, 1024, 1, 1, "streaming speech model"),
    Case("policy-step", 1, 16, 64, 256, 1, 1, "recurrent policy: one step of 16 environments"),
    # One sequence, many steps.
    Case("seq100-h128", 100, 1, 128, 128, 1, 1, "one short sequence, as in online inference", quick=True),
    Case("seq1000-h64", 1000, 1, 64, 64, 1, 1, "one long signal, as in audio effects"),
    Case("seq50-h512", 50, 1, 512, 512, 1, 1, "one sentence, as in a tagger or decoder"),
    # Small training shapes.
    Case("forecast-h25", 24, 32, 1, 25, 1, 1, "time series forecasting libraries' default size", quick=True),
    Case("small-h64", 50, 16, 32, 64, 1, 1, "small sequence classifier"),
    Case("policy-h256", 128, 16, 64, 256, 1, 1, "recurrent PPO: 128 steps of 16 environments"),
    # Dive into Deep Learning.
    Case("d2l", 32, 1024, 28, 32, 1, 1, "d2l's RNN, GRU and LSTM on The Time Machine", quick=True),
    Case("d2l-h256", 35, 32, 28, 256, 1, 1, "d2l's earlier edition: 35 steps, batch 32, 256 hidden units"),
    # Language models.
    Case("lm-h200", 35, 32, 200, 200, 2, 1, "word language model, small, two layers"),
    Case("lm-h256-l1", 35, 32, 256, 256, 1, 1, "language model, one layer", quick=True),
    Case("lm-h256", 35, 32, 256, 256, 2, 1, "language model, two layers"),
    Case("char-t25-h512", 25, 64, 512, 512, 1, 1, "character model, short windows"),
    Case("char-t100-h512", 100, 64, 512, 512, 1, 1, "character model, long windows"),
    # Large.
    Case("large-h800", 50, 16, 800, 800, 1, 1, "speech recogniser's layer"),
    Case("large-h1024", 64, 16, 1024, 1024, 1, 1, "translation model's layer"),
    # Both directions, several layers.
    Case("tagger-bi", 30, 32, 100, 128, 1, 2, "bidirectional sequence tagger"),
    Case("speech-bi-l3", 100, 8, 80, 256, 3, 2, "speech encoder: 80 filter banks, three bidirectional layers"),
    Case("deep-l4", 64, 32, 64, 64, 4, 1, "four small layers"),
)

# On a GPU: the sizes at which the recurrence is limited by the way of its weights and by the meeting of its blocks.
CUDA_CASES: tuple[Case, ...] = (
    *(
        Case(f"t64-n{N}-h{H}", 64, N, H, H, 1, 1, "grid of batch and hidden size", quick=N == 16 and H < 1024)
        for H in (256, 512, 1024)
        for N in (1, 16, 64)
    ),
    Case("t256-n16-h512", 256, 16, 512, 512, 1, 1, "the same with more steps"),
    Case("t1024-n16-h768", 1024, 16, 768, 768, 1, 1, "the shape of FlashRNN's published times"),
)


@dataclass(frozen=True)
class Cell:
    """A cell that torch.nn has too: its class name there and here, extra constructor arguments, and gates."""

    name: str
    class_name: str
    options: dict[str, Any]
    num_gates: int


CELLS: dict[str, Cell] = {
    cell.name: cell
    for cell in (
        Cell("rnn_tanh", "RNN", {}, 1),
        Cell("rnn_relu", "RNN", {"nonlinearity": "relu"}, 1),
        Cell("gru", "GRU", {}, 3),
        Cell("lstm", "LSTM", {}, 4),
    )
}
DEFAULT_CELLS = ("rnn_tanh", "gru", "lstm")


def find_cells(names: Iterable[str]) -> list[Cell]:
    """Returns the cells of these names, each once; `rnn` is short for `rnn_tanh`. Raises KeyError with the choices."""
    full_names = dict.fromkeys("rnn_tanh" if name == "rnn" else name for name in names)
    for name in full_names:
        if name not in CELLS:
            raise KeyError(f"no cell {name!r}; choose from rnn, {', '.join(CELLS)}")
    return [CELLS[name] for name in full_names]


def find_case(name: str) -> Case:
    """Returns the case of this name. Raises KeyError, naming the choices."""
    every = (*CASES, *CUDA_CASES)
    for case in every:
        if case.name == name:
            return case
    raise KeyError(f"no case {name!r}; choose from {', '.join(case.name for case in every)}")


def product_flops(case: Case, cell: Cell, training: bool) -> int:
    """Returns the floating-point operations of the matrix products of one call, a multiply-add counted as two.

    Training is counted as three times inference: the forward product, and one each for the gradients of the
    operands. Gate arithmetic is not counted.
    """
    per_step = 0
    for layer in range(case.L):
        inputs = case.I if layer == 0 else case.H * case.D
        per_step += 2 * cell.num_gates * case.H * (inputs + case.H) * case.D
    return per_step * case.T * case.N * (3 if training else 1)
