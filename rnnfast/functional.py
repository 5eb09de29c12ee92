"""The recurrence without a module: it begins at the input projection."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import precision
from .autograd import layer
from .backends import Problem, check_nonlinearity, select


def rnn(
    p: Tensor,
    w_hh: Tensor,
    h_0: Tensor | None = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    nonlinearity: str = "tanh",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """h_t = f(p_t + h_{t-1} W_hh^T) for all t (Elman 1990), with gradients by BPTT.

    Args:
        p: [T, B, D * H], the input projection x W_ih^T + b of D = 1 or 2 directions side by side;
            any strides (a transposed [B, T, D * H] costs no copy).
        w_hh: [D, H, H], or [H, H] for one direction. Direction 1 runs in reverse.
        h_0: [D, B, H], or [B, H] with a 2-D w_hh; None for zeros.
        lengths: [B] in 0..T, a list or an int64 tensor. Steps from lengths[b] on leave the state as
            it is, put out 0 and take no gradient. On a GPU, and in torch.compile, they are clamped,
            not checked.
        nonlinearity: "tanh", "relu" or "sigmoid".
        backend: "auto", "cpu" or "reference"; a named one serves or raises.

    Returns:
        y [T, B, D * H] and h_n, shaped like h_0. Under autocast both have its dtype.

    Raises:
        ValueError: a shape, dtype, length, nonlinearity or backend name that cannot be.
        RuntimeError: tensors on different devices; T = 0; a backend that cannot serve.
    """
    check_nonlinearity(nonlinearity)
    if p.dim() != 3:
        raise ValueError(f"p: given shape {tuple(p.shape)}, wanted [T, B, D * H]")
    one = w_hh.dim() == 2
    if one:
        w_hh = w_hh.unsqueeze(0)
        h_0 = h_0 if h_0 is None else h_0.unsqueeze(0)
    T, B, width = p.shape
    if w_hh.dim() != 3 or w_hh.shape[0] not in (1, 2) or w_hh.shape[1] != w_hh.shape[2]:
        raise ValueError(f"w_hh: given shape {tuple(w_hh.shape)}, wanted [H, H] or [D, H, H]")
    D, H, _ = w_hh.shape
    if width != D * H:
        raise ValueError(f"p: given {width} features, wanted D * H = {D} * {H} as w_hh says")
    if h_0 is not None and h_0.shape != (D, B, H):
        raise ValueError(f"h_0: given shape {tuple(h_0.shape)}, wanted {(D, B, H)}")
    if T == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    p, w_hh, h_0 = precision.autocast(p.device.type, p, w_hh, h_0)
    for name, x in (("w_hh", w_hh), ("h_0", h_0)):
        if x is not None and x.dtype != p.dtype:
            raise ValueError(f"{name}: given {x.dtype}, wanted {p.dtype} as p has")
        if x is not None and x.device != p.device:
            raise RuntimeError(f"{name}: it is on {x.device}, and p on {p.device}")
    lengths = check_lengths(lengths, T, B, p.device)
    chosen = select(backend, Problem(p.device.type, p.dtype, nonlinearity, projected=True))
    y, h_n = layer(p, None, None, None, w_hh, h_0, lengths, nonlinearity, chosen)
    return y, h_n[0] if one else h_n


def check_lengths(
    lengths: Tensor | Sequence[int] | None, T: int, B: int, device: torch.device
) -> Tensor | None:
    """[B] int64 on ``device``, or None.

    Raises:
        ValueError: another shape or dtype, or a length below 0 or above T.
    """
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor):
        if not isinstance(lengths, Sequence) or not all(type(n) is int for n in lengths):
            raise ValueError(f"lengths: given {lengths!r}, wanted integers")
        lengths = torch.tensor(lengths, dtype=torch.int64)
    if lengths.shape != (B,) or lengths.dtype != torch.int64:
        raise ValueError(
            f"lengths: given {lengths.dtype} of shape {tuple(lengths.shape)}, "
            f"wanted torch.int64 of shape ({B},)"
        )
    # Looking at the values would synchronize, or break the graph.
    if lengths.device.type != "cpu" or torch.compiler.is_compiling():
        return lengths.clamp(0, T).to(device)
    wrong = [n for n in lengths.tolist() if not 0 <= n <= T]
    if wrong:
        raise ValueError(f"lengths: given {wrong[0]}, wanted 0 to T = {T}")
    return lengths.to(device, copy=True)  # nobody changes them after they were checked
