"""The drop-in for torch.nn.GRU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import Unpack

from ..argument_types import Backend, GatedInit, NoMore, TrackGradientFlow
from ..tracing import cannot_script
from .base import refuse_unknown
from .init import set_chrono
from .settings import DEFAULTS, GATED_CHECKS, Check, Settings, check_gates
from .stack import Stack


class GRU(Stack):
    """GRU with fused forward and backpropagation through time; takes the place of nn.GRU.

    Arguments, parameter names, shapes, state_dict, initial values under a seed, error types,
    PackedSequence, unbatched input and dropout between layers are those of
    :class:`torch.nn.GRU`. It is an ``nn.RNNBase`` and no ``nn.GRU``, because torch.compile breaks
    the graph at every nn.GRU.

        r = s(W_ir x + b_ir + W_hr h + b_hr),  z = s(W_iz x + b_iz + W_hz h + b_hz)
        n = tanh(W_in x + b_in + r * (W_hn h + b_hn)),  h' = (1 - z) * n + z * h

    with the logistic sigmoid s (Cho et al. 2014, in the form of cuDNN).

    Args:
        init: "torch", "orthogonal" or "glorot", for each gate's block; see
            :mod:`rnnfast.modules.init`.
        chrono_steps: draws b_hz so that units remember for up to that many steps, 3 or more: log U,
            U uniform in [1, chrono_steps - 1] (Tallec & Ollivier 2018). It sets b_iz to 0.
        residual: skip connection around each layer but the last, where input and output have equal
            width. h_n excludes it.
        num_heads: H is split into so many independent recurrences of H / num_heads units.
            weight_hh_l0 is [3 * H, H / num_heads].
        track_gradient_flow: True measures the gradient at every time step of backward
            (:attr:`gradient_flow`), "sample" for each row of the batch.
        clip_state_grad: scale dL/dh_t of each row and head down to this norm, 1e-30 or more, at
            every step of backward.
        bptt_window: truncated BPTT: no gradient crosses between steps t - 1 and t for
            t = k, 2 k, ...
        backend: "auto", "cpu", "cuda", "triton", "torch" or "reference". If the backend you name
            cannot run a call, it raises; there is no silent fallback.

    Raises:
        TypeError, ValueError: as nn.GRU does, in its order.
    """

    _defaults: ClassVar[dict[str, object]] = {**DEFAULTS, "chrono_steps": None}
    _checks: ClassVar[dict[str, Check]] = GATED_CHECKS

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        init: GatedInit = "torch",
        chrono_steps: int | None = None,
        residual: bool = False,
        num_heads: int = 1,
        track_gradient_flow: TrackGradientFlow = False,
        clip_state_grad: float | None = None,
        bptt_window: int | None = None,
        backend: Backend = "auto",
        **unknown: Unpack[NoMore],
    ) -> None:
        if "proj_size" in unknown:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        refuse_unknown("GRU", unknown)
        check_gates(bias, init, chrono_steps)
        self.chrono_steps = chrono_steps
        super().__init__(
            "GRU",
            (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional),
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
        return "gru"

    def _start_gates(self, parameters: dict[str, Tensor]) -> None:
        if self.chrono_steps is not None:
            set_chrono(parameters, self.hidden_size, self.chrono_steps, gate=1, against=None)

    @overload
    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: Tensor | None = None,
        *,
        reset: Tensor | None = None,
        lengths: None = None,
    ) -> tuple[PackedSequence, Tensor]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Runs all layers.

        Args:
            input: [T, B, I], [B, T, I] with batch_first, [T, I] unbatched, or packed.
            hx: [L * D, B, H], or [L * D, H] unbatched; never batch-first; None for zeros.
            reset: bool, shaped like the first two axes of input; [T] unbatched; [T, B] for packed
                input, in the order of the samples. True: the step is the first of a new segment.
                Neither state nor gradient crosses between it and the step before, in either
                direction; at the first step it drops hx.
            lengths: [B] in 0..T, for padded input, as :meth:`rnnfast.RNN.forward` takes them.

        Returns:
            output, like input with D * H features, and h_n, like hx.

        Raises:
            RuntimeError, ValueError: as nn.GRU does; ValueError, TypeError for lengths and reset.
        """
        return self._run(input, hx, lengths, reset, GRU.forward)

    def _check_axes(self, input: Tensor, hx: Tensor | None) -> None:
        if input.dim() not in (2, 3):
            raise ValueError(f"GRU: Expected input to be 2D or 3D, got {input.dim()}D instead")
        if hx is not None and hx.dim() != input.dim():
            kind, d = ("batched", 3) if input.dim() == 3 else ("unbatched", 2)
            raise RuntimeError(
                f"For {kind} {d}-D input, hx should also be {d}-D but got {hx.dim()}-D tensor"
            )

    __prepare_scriptable__ = cannot_script(
        "rnnfast.GRU", "; rnnfast.to_torch(model) puts nn.GRU in its place, which scripts"
    )
