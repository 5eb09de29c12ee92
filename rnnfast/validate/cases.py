"""Contracting recurrences to compute, made from a seed on the CPU in float64."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..cells import CELLS
from ..recurrence.groups import Kept, Options, OutputGradients, Rows, Saved, States, Weights
from ..recurrence.precision import arithmetic

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NONLINEARITIES = ["tanh", "relu", "sigmoid", "softplus"]
# What a module can compute: nonlinearities of the RNN, or the name of another cell.
CELLS_OF = {"RNN": NONLINEARITIES, "LSTM": ["lstm"], "GRU": ["gru"]}


def cell_name(name: str) -> str:
    """The name in CELLS."""
    return name if name in CELLS else f"rnn_{name}"


class Case(NamedTuple):
    p: Tensor  # [T, B, D * G * H]
    w_hh: Tensor  # [D, G * H, H / heads]
    gamma: Tensor | None  # [D * H]
    beta: Tensor | None
    h_0: Tensor | None  # [D, B, H]
    lengths: Tensor | None  # [B]
    reset: Tensor | None  # [T, B]
    grad_y: Tensor | None
    grad_h_n: Tensor | None
    b_hh: Tensor | None = None  # [D * G * H], of the gates in cell.apart; 0 for the others
    c_0: Tensor | None = None  # [D, B, H], as grad_c_n; of a cell with c
    grad_c_n: Tensor | None = None
    grad_cells: Tensor | None = None  # [T, B, D * H]; wanted with options.all_cells
    options: Options = Options()

    @property
    def nonlinearity(self) -> str:
        return self.options.cell.removeprefix("rnn_")

    @property
    def apart(self) -> bool:
        """Whether the recurrence adds b_hh itself."""
        return bool(CELLS[self.options.cell].apart)

    @property
    def H(self) -> int:
        return self.options.heads * self.w_hh.shape[2]

    @property
    def weights(self) -> Weights:
        return Weights(None, None, self.b_hh, self.w_hh.flatten(0, 1), self.gamma, self.beta)

    @property
    def states(self) -> States:
        return States(self.h_0, self.c_0)

    @property
    def rows(self) -> Rows:
        return Rows(self.lengths, self.reset)

    @property
    def given(self) -> OutputGradients:
        states = States(self.grad_h_n, self.grad_c_n)
        return OutputGradients(self.grad_y, states, self.grad_cells)

    def kept(self, y: Tensor, saved: Saved) -> Kept:
        return Kept(None, y, self.weights, self.states, self.rows, saved)

    def to(self, dtype: torch.dtype) -> Case:
        """Converts the case; gamma and beta take the dtype of the arithmetic."""
        found = Case(*(cast(x, dtype) for x in self[:-1]), self.options)
        accurate = arithmetic(dtype)
        return found._replace(gamma=cast(self.gamma, accurate), beta=cast(self.beta, accurate))

    def on(self, device: str) -> Case:
        return Case(*(x if x is None else x.to(device) for x in self[:-1]), self.options)

    def with_options(self, **changed) -> Case:
        if "nonlinearity" in changed:
            changed["cell"] = f"rnn_{changed.pop('nonlinearity')}"
        return self._replace(options=self.options._replace(**changed))


def cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return x if x is None or not x.is_floating_point() else x.to(dtype)


@functools.lru_cache(maxsize=16)
def _contracting(seed: int, D: int, G: int, H: int, heads: int) -> tuple[Tensor, Tensor]:
    """W_hh [D, G * H, H / heads] with ||W_hh||_2 = 0.95 in each gate of each head, and the
    generator's state afterwards. Cached, because the norm takes seconds at 1000 units. Callers must
    copy W_hh.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = D * G * heads, H // heads, H // heads
    w = torch.randn(*shape, generator=generator, dtype=torch.float64)
    w *= 0.95 / torch.linalg.matrix_norm(w, 2)[:, None, None]
    return w.view(D, G * H, H // heads), generator.get_state()


def make_case(
    T: int,
    B: int,
    H: int,
    D: int = 1,
    dtype: torch.dtype = torch.float32,
    nonlinearity: str = "tanh",
    seed: int = 0,
    **options,
) -> Case:
    """A contracting recurrence: ||W_hh||_2 = 0.95 in each gate of each head, gamma below 1.

    Args:
        nonlinearity: of an RNN, or the name of another cell.
        options: lengths, norm and reset: True for random ones; heads; fields of Options.
    """
    lengths, norm, reset = (options.pop(name, False) for name in ("lengths", "norm", "reset"))
    heads = options.pop("heads", 1)
    name = cell_name(nonlinearity)
    cell, G = CELLS[name], len(CELLS[name].gates)
    w, state = _contracting(seed, D, G, H, heads)
    generator = torch.Generator()
    generator.set_state(state)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    p, h_0, grad_y, grad_h_n = (
        normal(*shape) for shape in [(T, B, D * G * H), (D, B, H), (T, B, D * H), (D, B, H)]
    )
    n = torch.randint(0, T + 1, (B,), generator=generator) if lengths else None
    gamma = beta = cut = None
    if norm:
        gamma = 0.5 + torch.rand(D * G * H, generator=generator, dtype=torch.float64) / 2
        beta = normal(D * G * H) / 2
    if reset:
        cut = torch.rand(T, B, generator=generator) < 0.25
    chosen = Options(name, D, heads, **options)
    found = Case(p, w.clone(), gamma, beta, h_0, n, cut, grad_y, grad_h_n, options=chosen)
    if cell.apart:
        inside = torch.tensor([gate in cell.apart for gate in cell.gates]).repeat_interleave(H)
        found = found._replace(b_hh=normal(D * G * H) * inside.repeat(D))
    if "c" in cell.states:
        found = found._replace(c_0=normal(D, B, H), grad_c_n=normal(D, B, H))
    if chosen.all_cells:
        found = found._replace(grad_cells=normal(T, B, D * H))
    return found.to(dtype)
