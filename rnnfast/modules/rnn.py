"""The drop-in for torch.nn.RNN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import Unpack

from ..argument_types import Backend, Init, NoMore, Nonlinearity, Norm, TrackGradientFlow
from ..backends import check_nonlinearity
from ..tracing import cannot_script
from .base import refuse_unknown
from .settings import CHECKS, DEFAULTS, Check, Settings
from .stack import Stack

MODES = {  # of a nonlinearity
    "tanh": "RNN_TANH",
    "relu": "RNN_RELU",
    "sigmoid": "RNN_SIGMOID",
    "softplus": "RNN_SOFTPLUS",
}


def _nonlinearity(rnn: nn.RNNBase, name: str, value: object) -> None:
    check_nonlinearity(value)


def _mode(rnn: nn.RNNBase, name: str, value: object) -> None:
    known = list(MODES.values())
    if value not in known:
        raise ValueError(f"mode: given {value!r}, wanted one of {known}")


class RNN(Stack):
    """Elman RNN with fused forward and backpropagation through time; takes the place of nn.RNN.

    Arguments, parameter names, shapes, state_dict, initial values under a seed, error types,
    PackedSequence, unbatched input and dropout between layers are those of
    :class:`torch.nn.RNN`. It is an ``nn.RNNBase`` and no ``nn.RNN``, because torch.compile breaks
    the graph at every nn.RNN.

        h_t = f(n_t),  n_t = a_t = x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh    (Elman 1990)

    and with norm="layer", mean and variance over the units of each head (Ba et al. 2016):

        n_t = norm_weight * (a_t - mean(a_t)) / sqrt(var(a_t) + norm_eps) + norm_bias

    Args:
        nonlinearity: "tanh", "relu", or "sigmoid" and "softplus", which nn.RNN does not have.
        norm: "layer" adds the parameters norm_weight_l0 and norm_bias_l0 [H]. "batch" normalizes
            x_t W_ih^T over the valid points of the batch, before the biases (Laurent et al. 2015).
            It adds the same parameters and, as nn.BatchNorm1d, running statistics (momentum 0.1),
            which torch.optim.swa_utils.update_bn finds; nn.SyncBatchNorm is refused. bias=False
            leaves norm_bias out.
        norm_eps: a number that is added to the variance.
        init: "torch", "orthogonal", "identity", "glorot" or "he"; see :mod:`rnnfast.modules.init`.
        residual: skip connection around each layer but the last, where input and output have equal
            width. h_n excludes it. Warns where no layer but the last has such an input.
        num_heads: H is split into so many independent recurrences of H / num_heads units.
            weight_hh_l0 is [H, H / num_heads]; the rows of a head act on its own units.
        track_gradient_flow: True measures the gradient at every time step of backward
            (:attr:`gradient_flow`), "sample" for each row of the batch.
        clip_state_grad: scale dL/dh_t of each row and head down to this norm, 1e-30 or more, at
            every step of backward. Under a GradScaler it is the scaled loss that counts. A norm of
            inf or NaN stays.
        bptt_window: truncated BPTT: no gradient crosses between steps t - 1 and t for
            t = k, 2 k, ...
        backend: "auto", "cpu", "cuda", "triton", "torch" or "reference". If the backend you name
            cannot run a call, it raises; there is no silent fallback. :func:`rnnfast.explain` says
            which backend "auto" takes and why.

    An argument that is set on a module is checked then. num_layers, bias, bidirectional, num_heads
    and norm cannot be set, because the parameters were made for them; input_size and hidden_size
    follow the weights.

    Raises:
        TypeError, ValueError: as nn.RNN does, in its order.
    """

    _defaults: ClassVar[dict[str, object]] = {"nonlinearity": "tanh", **DEFAULTS}
    _checks: ClassVar[dict[str, Check]] = {"nonlinearity": _nonlinearity, "mode": _mode, **CHECKS}

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: Nonlinearity = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        norm: Norm | None = None,
        norm_eps: float = 1e-5,
        init: Init = "torch",
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
        check_nonlinearity(nonlinearity)
        refuse_unknown("RNN", unknown)
        self.nonlinearity = nonlinearity
        super().__init__(
            MODES[nonlinearity],
            (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional),
            Settings(
                norm=norm,
                norm_eps=norm_eps,
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
        return f"rnn_{self.nonlinearity}"

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
            lengths: [B] in 0..T, for padded input: a list, an array or a tensor of any integer
                dtype. Steps from lengths[b] on leave the state as it is, put out 0 and take no
                gradient; the reverse direction begins at lengths[b] - 1. A tensor on a GPU is
                clamped, not checked, and so is any tensor while torch.compile, torch.export or
                torch.jit.trace records the call.

        Returns:
            output, like input with D * H features, and h_n, like hx. Both lie in memory as
            nn.RNN's do: output is dense in the order [T, B, D * H], with batch_first, too. As with
            cuDNN, backward reads output: PyTorch refuses backward after a write into it
            (``output += x``).

        Raises:
            RuntimeError, ValueError: as nn.RNN does; ValueError, TypeError for lengths and reset.
        """
        return self._run(input, hx, lengths, reset, RNN.forward)

    def _check_axes(self, input: Tensor, hx: Tensor | None) -> None:
        if input.dim() not in (2, 3):
            raise ValueError(
                f"RNN: Expected input to be 2D or 3D, got {input.dim()}D tensor instead"
            )
        if hx is not None and hx.dim() != input.dim():
            kind, d = ("batched", 3) if input.dim() == 3 else ("unbatched", 2)
            raise RuntimeError(
                f"For {kind} {d}-D input, hx should also be {d}-D but got {hx.dim()}-D tensor"
            )

    def _follow(self, name: str) -> None:
        if name == "nonlinearity":
            self.__dict__["mode"] = MODES[self.nonlinearity]
        elif name == "mode":
            nonlinearity = next(f for f, mode in MODES.items() if mode == self.mode)
            self.__dict__["nonlinearity"] = nonlinearity
        else:
            super()._follow(name)

    __prepare_scriptable__ = cannot_script(
        "rnnfast.RNN", "; rnnfast.to_torch(model) puts nn.RNN in its place, which scripts"
    )
