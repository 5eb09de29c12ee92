"""The drop-in for torch.nn.LSTM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, Literal, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import TypeVar, Unpack

from ..argument_types import Backend, GatedInit, NoMore, TrackGradientFlow
from ..recurrence.groups import States
from ..tracing import cannot_script
from .base import refuse_unknown
from .init import set_chrono, set_gate_bias
from .settings import DEFAULTS, GATED_CHECKS, Check, Settings, check_bool, check_gates
from .stack import Stack

Pair = tuple[Tensor, Tensor]  # h and c
# The type of return_cell_states, for type checkers: forward then returns three values.
Cells = TypeVar("Cells", bound=bool, default=Literal[False], covariant=True)


class LSTM(Stack, Generic[Cells]):
    """LSTM with fused forward and backpropagation through time; takes the place of nn.LSTM.

    Arguments, parameter names, shapes, state_dict, initial values under a seed, error types,
    PackedSequence, unbatched input and dropout between layers are those of
    :class:`torch.nn.LSTM`. It is an ``nn.RNNBase`` and no ``nn.LSTM``, because torch.compile breaks
    the graph at every nn.LSTM.

        i, f, g, o = the quarters of W_ih x + b_ih + W_hh h + b_hh
        c' = s(f) * c + s(i) * tanh(g),  h' = s(o) * tanh(c')

    with the logistic sigmoid s (Hochreiter & Schmidhuber 1997; the forget gate f of Gers et al.
    2000).

    Args:
        proj_size: projects h to that many features (Sak et al. 2014). Only torch's kernels compute
            it: backend="auto" takes them, and options that they do not have raise.
        init: "torch", "orthogonal" or "glorot", for each gate's block; see
            :mod:`rnnfast.modules.init`.
        forget_bias: sets b_hf to this number and b_if to 0; 1.0 lets a new LSTM remember
            (Jozefowicz et al. 2015). None leaves the biases to ``init``.
        chrono_steps: draws b_hf so that units remember for up to that many steps, 3 or more: log U,
            U uniform in [1, chrono_steps - 1], and b_hi = -b_hf (Tallec & Ollivier 2018). It sets
            b_if and b_ii to 0. Not together with forget_bias.
        residual: skip connection around each layer but the last, where input and output have equal
            width. h_n excludes it.
        num_heads: H is split into so many independent recurrences of H / num_heads units.
            weight_hh_l0 is [4 * H, H / num_heads].
        track_gradient_flow: True measures the gradient at every time step of backward
            (:attr:`gradient_flow`), "sample" for each row of the batch.
        clip_state_grad: scale the joint vector (dL/dh_t, dL/dc_t at fixed h_t) of each row and head
            down to this norm, 1e-30 or more, at every step of backward.
        bptt_window: truncated BPTT: no gradient crosses between steps t - 1 and t for
            t = k, 2 k, ...
        return_cell_states: forward returns the last layer's c_t of all steps as a third value.
        backend: "auto", "cpu", "cuda", "triton", "torch" or "reference". If the backend you name
            cannot run a call, it raises; there is no silent fallback.

    Raises:
        TypeError, ValueError: as nn.LSTM does, in its order.
    """

    _defaults: ClassVar[dict[str, object]] = {
        **DEFAULTS,
        "forget_bias": None,
        "chrono_steps": None,
        "return_cell_states": False,
    }
    _checks: ClassVar[dict[str, Check]] = GATED_CHECKS

    @overload
    def __init__(
        self: LSTM[Literal[False]],
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        init: GatedInit = "torch",
        forget_bias: float | None = None,
        chrono_steps: int | None = None,
        residual: bool = False,
        num_heads: int = 1,
        track_gradient_flow: TrackGradientFlow = False,
        clip_state_grad: float | None = None,
        bptt_window: int | None = None,
        return_cell_states: Literal[False] = False,
        backend: Backend = "auto",
        **unknown: Unpack[NoMore],
    ) -> None: ...

    @overload
    def __init__(
        self: LSTM[Literal[True]],
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        init: GatedInit = "torch",
        forget_bias: float | None = None,
        chrono_steps: int | None = None,
        residual: bool = False,
        num_heads: int = 1,
        track_gradient_flow: TrackGradientFlow = False,
        clip_state_grad: float | None = None,
        bptt_window: int | None = None,
        return_cell_states: Literal[True],
        backend: Backend = "auto",
        **unknown: Unpack[NoMore],
    ) -> None: ...

    @overload
    def __init__(
        self: LSTM[bool],
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        init: GatedInit = "torch",
        forget_bias: float | None = None,
        chrono_steps: int | None = None,
        residual: bool = False,
        num_heads: int = 1,
        track_gradient_flow: TrackGradientFlow = False,
        clip_state_grad: float | None = None,
        bptt_window: int | None = None,
        return_cell_states: bool,
        backend: Backend = "auto",
        **unknown: Unpack[NoMore],
    ) -> None: ...

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        init: GatedInit = "torch",
        forget_bias: float | None = None,
        chrono_steps: int | None = None,
        residual: bool = False,
        num_heads: int = 1,
        track_gradient_flow: TrackGradientFlow = False,
        clip_state_grad: float | None = None,
        bptt_window: int | None = None,
        return_cell_states: bool = False,
        backend: Backend = "auto",
        **unknown: Unpack[NoMore],
    ) -> None:
        refuse_unknown("LSTM", unknown)
        check_gates(bias, init, chrono_steps)
        check_forget_bias(bias, forget_bias, chrono_steps)
        check_bool("return_cell_states", return_cell_states)
        if proj_size and num_heads != 1:
            raise ValueError(
                f"proj_size: given {proj_size} with num_heads={num_heads}, wanted 1 head"
            )
        self.forget_bias, self.chrono_steps = forget_bias, chrono_steps
        self.return_cell_states = return_cell_states
        arguments = input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional
        super().__init__(
            "LSTM",
            (*arguments, proj_size),
            Settings(
                init=init,
                residual=residual,
                num_heads=num_heads,
                track_gradient_flow=track_gradient_flow,
                clip_state_grad=clip_state_grad,
                bptt_window=bptt_window,
                backend=backend,
            ),
            {"device": device, "dtype": dtype},
        )

    def _cell(self) -> str:
        return "lstm"

    def _start_gates(self, parameters: dict[str, Tensor]) -> None:
        if self.forget_bias is not None:
            set_gate_bias(parameters, 1, self.hidden_size, self.forget_bias)
        if self.chrono_steps is not None:
            set_chrono(parameters, self.hidden_size, self.chrono_steps, gate=1, against=0)

    @overload
    def forward(
        self: LSTM[Literal[False]],
        input: Tensor,
        hx: Pair | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor, Pair]: ...

    @overload
    def forward(
        self: LSTM[Literal[False]],
        input: PackedSequence,
        hx: Pair | None = None,
        *,
        reset: Tensor | None = None,
        lengths: None = None,
    ) -> tuple[PackedSequence, Pair]: ...

    @overload
    def forward(
        self: LSTM[Literal[True]],
        input: Tensor,
        hx: Pair | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor, Pair, Tensor]: ...

    @overload
    def forward(
        self: LSTM[Literal[True]],
        input: PackedSequence,
        hx: Pair | None = None,
        *,
        reset: Tensor | None = None,
        lengths: None = None,
    ) -> tuple[PackedSequence, Pair, PackedSequence]: ...

    @overload
    def forward(
        self: LSTM[bool],
        input: Tensor | PackedSequence,
        hx: Pair | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Any, ...]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Pair | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Any, ...]:
        """Runs all layers.

        Args:
            input: [T, B, I], [B, T, I] with batch_first, [T, I] unbatched, or packed.
            hx: (h_0, c_0), each [L * D, B, H], or [L * D, H] unbatched; never batch-first; h_0 has
                proj_size features where that is set; None for zeros.
            reset: bool, shaped like the first two axes of input; [T] unbatched; [T, B] for packed
                input, in the order of the samples. True: the step is the first of a new segment.
                Neither state nor gradient crosses between it and the step before, in either
                direction; at the first step it drops hx.
            lengths: [B] in 0..T, for padded input, as :meth:`rnnfast.RNN.forward` takes them.

        Returns:
            output, like input with D * H features, and (h_n, c_n), like hx. With
            return_cell_states the third value is c of all steps, like output: 0 where a row has no
            step, and with a gradient.

        Raises:
            RuntimeError, ValueError: as nn.LSTM does; ValueError, TypeError for lengths and reset.
        """
        return self._run(input, hx, lengths, reset, LSTM.forward)

    # ----------------------------------------------------------------------------- a pair of states

    def _is_state(self, hx: object) -> bool:
        return isinstance(hx, (tuple, list)) and all(isinstance(s, Tensor) for s in hx)

    def _check_axes(self, input: Tensor, hx: Pair | None) -> None:
        if input.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        if hx is None:
            return
        if not isinstance(hx, (tuple, list)) or len(hx) != 2:
            given = f"{len(hx)} tensors" if isinstance(hx, (tuple, list)) else type(hx).__name__
            raise TypeError(f"hx: given {given}, wanted a tuple (h_0, c_0)")
        h, c = hx
        if h.dim() != input.dim() or c.dim() != input.dim():
            kind, d = ("batched", 3) if input.dim() == 3 else ("unbatched", 2)
            raise RuntimeError(
                f"For {kind} {d}-D input, hx and cx should also be {d}-D but got "
                f"({h.dim()}-D, {c.dim()}-D) tensors"
            )

    def _check_states(self, input: Tensor, hx: Pair, batch_sizes: Tensor | None) -> None:
        sizes = (
            self.get_expected_hidden_size(input, batch_sizes),
            self.get_expected_cell_size(input, batch_sizes),
        )
        for i, (state, size) in enumerate(zip(hx, sizes)):
            self.check_hidden_size(state, size, f"Expected hidden[{i}] size {{}}, got {{}}")
        for state in hx:
            self._check_state(input, state)

    def get_expected_cell_size(
        self, input: Tensor, batch_sizes: Tensor | None
    ) -> tuple[int, int, int]:
        batch = int(batch_sizes[0]) if batch_sizes is not None else None
        if batch is None:
            batch = input.shape[0 if self.batch_first else 1]
        return self.num_layers * (2 if self.bidirectional else 1), batch, self.hidden_size

    def permute_hidden(self, hx: Pair, permutation: Tensor | None) -> Pair:
        if permutation is None:
            return hx
        h, c = hx
        return h.index_select(1, permutation), c.index_select(1, permutation)

    def _with_batch(self, hx: Pair) -> Pair:
        return hx[0].unsqueeze(1), hx[1].unsqueeze(1)

    def _without_batch(self, h_n: Pair) -> Pair:
        return h_n[0].squeeze(1), h_n[1].squeeze(1)

    def _zeros(self, like: Tensor, batch: int) -> Pair:
        layers = self.num_layers * (2 if self.bidirectional else 1)
        width = self.proj_size or self.hidden_size
        return like.new_zeros(layers, batch, width), like.new_zeros(layers, batch, self.hidden_size)

    def _states_before(self, index: int, hx: Pair | None) -> States:
        if hx is None:
            return States()
        D = 2 if self.bidirectional else 1
        h, c = hx
        return States(h[index * D : (index + 1) * D], c[index * D : (index + 1) * D])

    def _joined(self, states: list[States]) -> Pair:
        if len(states) == 1:
            return states[0].h, states[0].c
        h, c = zip(*states)
        return torch.cat(h), torch.cat(c)

    __prepare_scriptable__ = cannot_script(
        "rnnfast.LSTM", "; rnnfast.to_torch(model) puts nn.LSTM in its place, which scripts"
    )


def check_forget_bias(bias: bool, forget_bias: float | None, chrono_steps: int | None) -> None:
    """
    Raises:
        TypeError, ValueError: an LSTM cannot have this forget_bias.
    """
    if forget_bias is None:
        return
    if not isinstance(forget_bias, (int, float)) or isinstance(forget_bias, bool):
        raise TypeError(f"forget_bias: given {forget_bias!r}, wanted a float")
    if not math.isfinite(forget_bias):
        raise ValueError(f"forget_bias: given {forget_bias}, wanted a finite number")
    if not bias:
        raise ValueError("forget_bias: given with bias=False, wanted the bias that carries it")
    if chrono_steps is not None:
        raise ValueError("forget_bias: given with chrono_steps, wanted one of them")
