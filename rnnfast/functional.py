"""The recurrence without a module: it begins at the input projection."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .argument_types import Backend, Nonlinearity
from .backends import Problem, check_nonlinearity, rows_for_choice, select
from .cells import CELLS
from .ops import layer
from .recurrence import precision
from .recurrence.groups import Options, Rows, States, Weights
from .tracing import cannot_script
from .values import values_of

LEAST_CLIP = 1e-30  # the smallest clip_state_grad
INTEGERS = {torch.int8, torch.int16, torch.int32, torch.int64}
INTEGERS |= {torch.uint8, torch.uint16, torch.uint32, torch.uint64}


def rnn(
    p: Tensor,
    w_hh: Tensor,
    h_0: Tensor | None = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
    nonlinearity: Nonlinearity = "tanh",
    num_heads: int = 1,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    bptt_window: int | None = None,
    clip_state_grad: float | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """h_t = f(p_t + h_{t-1} W_hh^T) for all t (Elman 1990), with gradients by BPTT.

    Args:
        p: [T, B, D * H], the input projection x W_ih^T + b of D = 1 or 2 directions side by side;
            any strides (a transposed [B, T, D * H] costs no copy).
        w_hh: [D, H, H / num_heads], or [H, H / num_heads] for one direction. Direction 1 runs in
            reverse. The rows of head k act on head k's slice of the state.
        h_0: [D, B, H], or [B, H] with a 2-D w_hh; None for zeros.
        lengths: [B] in 0..T: a list, an array or a tensor of any integer dtype. Steps from
            lengths[b] on leave the state as it is, put out 0 and take no gradient. A tensor on a
            GPU, and one where torch.compile, torch.export or torch.jit.trace records the call, is
            clamped, not checked.
        reset: [T, B] bool: step t is the first of a new segment of row b, and nothing crosses
            between t - 1 and t, in either direction. reset[0] drops h_0.
        nonlinearity: "tanh", "relu", "sigmoid" or "softplus".
        norm_weight, norm_bias: [D * H]; with norm_weight each head's pre-activation goes through
            layer norm (Ba et al. 2016), with norm_eps beside the variance. 16-bit inputs
            take them in 16 bits or in float32.
        bptt_window: no gradient crosses between t - 1 and t for t = k, 2 k, ...
        clip_state_grad: dL/dh_t of a head and row is scaled down to this norm, 1e-30 or more, at
            every t.
        backend: "auto", "cpu", "cuda", "triton" or "reference". If the
            named one cannot run this call, it raises.

    Returns:
        y [T, B, D * H] and h_n, shaped like h_0, both dense. Under autocast both have its dtype.

    Raises:
        ValueError, TypeError: a shape, dtype, length, option or backend name that cannot be.
        RuntimeError: tensors on different devices; T = 0; a backend that cannot run this call.
    """
    if not isinstance(p, Tensor):
        given = dict(locals())
        if not has_torch_function((p,)):
            raise TypeError(f"p: given {type(p).__name__}, wanted a Tensor")
        return handle_torch_function(rnn, (p,), **given)  # torch.fx: one node of its graph
    check_nonlinearity(nonlinearity)
    call = _Call(f"rnn_{nonlinearity}", num_heads, bptt_window, clip_state_grad, backend, norm_eps)
    if norm_bias is not None and norm_weight is None:
        raise ValueError("norm_bias: given without norm_weight")
    own = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    y, states, _ = _recurrence(p, w_hh, States(h_0), own, (lengths, reset), call)
    return y, states.h


@overload
def lstm(
    p: Tensor,
    w_hh: Tensor,
    hx: tuple[Tensor, Tensor] | None = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
    num_heads: int = 1,
    bptt_window: int | None = None,
    clip_state_grad: float | None = None,
    return_cell_states: Literal[False] = False,
    backend: Backend = "auto",
) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...


@overload
def lstm(
    p: Tensor,
    w_hh: Tensor,
    hx: tuple[Tensor, Tensor] | None = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
    num_heads: int = 1,
    bptt_window: int | None = None,
    clip_state_grad: float | None = None,
    return_cell_states: Literal[True],
    backend: Backend = "auto",
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]: ...


def lstm(
    p: Tensor,
    w_hh: Tensor,
    hx: tuple[Tensor, Tensor] | None = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
    num_heads: int = 1,
    bptt_window: int | None = None,
    clip_state_grad: float | None = None,
    return_cell_states: bool = False,
    backend: Backend = "auto",
):
    """The LSTM of :class:`rnnfast.LSTM` for all t, with gradients by BPTT.

        i, f, g, o = the quarters of p_t + h_{t-1} W_hh^T
        c_t = s(f) * c_{t-1} + s(i) * tanh(g),  h_t = s(o) * tanh(c_t)

    Args:
        p: [T, B, D * 4 * H], the input projection x W_ih^T + b_ih + b_hh of D = 1 or 2 directions
            side by side, each with the gates i, f, g, o; any strides.
        w_hh: [D, 4 * H, H / num_heads], or [4 * H, H / num_heads] for one direction.
        hx: (h_0, c_0), each [D, B, H], or [B, H] with a 2-D w_hh; None for zeros.
        clip_state_grad: the joint vector (dL/dh_t, dL/dc_t at fixed h_t) of a head and row is
            scaled down to this norm, 1e-30 or more, at every t.
        return_cell_states: c_t of all steps is the third result.
        lengths, reset, num_heads, bptt_window, backend: as :func:`rnn` takes them.

    Returns:
        y [T, B, D * H] and (h_n, c_n), shaped like hx; with return_cell_states also c of all
        steps [T, B, D * H], which has a gradient and is 0 where a row has no step.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`rnn` does.
    """
    if not isinstance(p, Tensor):
        given = dict(locals())
        if not has_torch_function((p,)):
            raise TypeError(f"p: given {type(p).__name__}, wanted a Tensor")
        return handle_torch_function(lstm, (p,), **given)
    if not isinstance(return_cell_states, bool):
        raise TypeError(f"return_cell_states: given {return_cell_states!r}, wanted a bool")
    if hx is not None and (not isinstance(hx, (tuple, list)) or len(hx) != 2):
        raise TypeError(f"hx: given {type(hx).__name__}, wanted a tuple (h_0, c_0)")
    call = _Call("lstm", num_heads, bptt_window, clip_state_grad, backend)
    call = call._replace(all_cells=return_cell_states)
    states = States() if hx is None else States(*hx)
    y, (h_n, c_n), cells = _recurrence(p, w_hh, states, {}, (lengths, reset), call)
    return (y, (h_n, c_n)) if cells is None else (y, (h_n, c_n), cells)


def gru(
    p: Tensor,
    w_hh: Tensor,
    h_0: Tensor | None = None,
    *,
    b_hn: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
    num_heads: int = 1,
    bptt_window: int | None = None,
    clip_state_grad: float | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """The GRU of :class:`rnnfast.GRU` for all t, with gradients by BPTT.

        r, z = s(p_r + W_hr h_{t-1}), s(p_z + W_hz h_{t-1})
        n = tanh(p_n + r * (W_hn h_{t-1} + b_hn)),  h_t = (1 - z) * n + z * h_{t-1}

    Args:
        p: [T, B, D * 3 * H], the input projection x W_ih^T + b_ih of D = 1 or 2 directions side by
            side, each with the gates r, z, n; any strides. Add the biases b_hr and b_hz to it, but
            not b_hn, which the reset gate multiplies.
        w_hh: [D, 3 * H, H / num_heads], or [3 * H, H / num_heads] for one direction.
        h_0: [D, B, H], or [B, H] with a 2-D w_hh; None for zeros.
        b_hn: [D * H], the recurrent bias of n; None for zeros.
        lengths, reset, num_heads, bptt_window, clip_state_grad, backend: as :func:`rnn` takes
            them.

    Returns:
        y [T, B, D * H] and h_n, shaped like h_0.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`rnn` does.
    """
    if not isinstance(p, Tensor):
        given = dict(locals())
        if not has_torch_function((p,)):
            raise TypeError(f"p: given {type(p).__name__}, wanted a Tensor")
        return handle_torch_function(gru, (p,), **given)
    call = _Call("gru", num_heads, bptt_window, clip_state_grad, backend)
    own = {"b_hn": b_hn}
    y, states, _ = _recurrence(p, w_hh, States(h_0), own, (lengths, reset), call)
    return y, states.h


for _function in (rnn, lstm, gru):
    _function.__prepare_scriptable__ = cannot_script(f"rnnfast.functional.{_function.__name__}")


class _Call(NamedTuple):
    """The settings of a call."""

    cell: str
    num_heads: int
    bptt_window: int | None
    clip_state_grad: float | None
    backend: str
    norm_eps: float = 1e-5
    all_cells: bool = False


def _recurrence(
    p: Tensor,
    w_hh: Tensor,
    states: States,
    own: dict[str, Tensor | None],
    rows: tuple[Tensor | Sequence[int] | None, Tensor | None],
    call: _Call,
) -> tuple[Tensor, States, Tensor | None]:
    """Checks a call and computes it: y, the last states, and c of all steps with
    ``call.all_cells``.

    Args:
        own: [D * H] each, by name: the parameters that this cell alone has.
        rows: lengths and reset.
    """
    heads, gates = call.num_heads, len(CELLS[call.cell].gates)
    if p.dim() != 3:
        raise ValueError(f"p: given shape {tuple(p.shape)}, wanted [T, B, {_product('D', gates)}]")
    one = w_hh.dim() == 2
    if one:
        w_hh = w_hh.unsqueeze(0)
        states = States(*(s if s is None else s.unsqueeze(0) for s in states))
    T, B, width = p.shape
    if w_hh.dim() != 3 or w_hh.shape[0] not in (1, 2) or w_hh.shape[1] % gates:
        raise ValueError(
            f"w_hh: given shape {tuple(w_hh.shape)}, wanted [{_product(gates)}, H / num_heads] or "
            "one more in front"
        )
    D, H = w_hh.shape[0], w_hh.shape[1] // gates
    normed = own.get("norm_weight") is not None
    check_options(H, heads, normed, call.norm_eps, call.bptt_window, call.clip_state_grad)
    if w_hh.shape[2] * heads != H:
        raise ValueError(
            f"w_hh: given shape {tuple(w_hh.shape)}, wanted {(D, gates * H, H // heads)} "
            f"for {heads} heads"
        )
    if width != D * gates * H:
        raise ValueError(
            f"p: given {width} features, wanted {_product('D', gates)} = "
            f"{' * '.join(map(str, (D, gates, H) if gates > 1 else (D, H)))} as w_hh says"
        )
    initial = {"h_0": states.h, "c_0": states.c}
    for given, shape in ((initial, (D, B, H)), (own, (D * H,))):
        for name, x in given.items():
            if x is not None and x.shape != shape:
                raise ValueError(f"{name}: given shape {tuple(x.shape)}, wanted {shape}")
    if T == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    p, w_hh, *initial = precision.autocast(p.device.type, p, w_hh, *states)
    states = States(*initial)
    gamma, beta = map(precision.widened, (own.get("norm_weight"), own.get("norm_bias")))
    (b_n,) = precision.autocast(p.device.type, own.get("b_hn"))
    accurate = precision.arithmetic(p.dtype)
    for name, x, dtype in (
        ("w_hh", w_hh, p.dtype),
        ("h_0", states.h, p.dtype),
        ("c_0", states.c, p.dtype),
        ("norm_weight", gamma, accurate),
        ("norm_bias", beta, accurate),
        ("b_hn", b_n, p.dtype),
    ):
        if x is not None and x.dtype != dtype:
            raise ValueError(f"{name}: given {x.dtype}, wanted {dtype} as p has {p.dtype}")
        if x is not None and x.device != p.device:
            raise RuntimeError(f"{name}: it is on {x.device}, and p on {p.device}")
    lengths = check_lengths(rows[0], T, B, p.device)
    reset = check_reset(rows[1], (T, B), "[T, B]", p.device)
    b_hh = None
    if b_n is not None:  # the other gates have their recurrent bias in p
        b_n = b_n.view(D, 1, H)
        b_hh = torch.cat([b_n.new_zeros(D, gates - 1, H), b_n], 1).flatten()
    size = (w_hh.shape[2], D * heads, rows_for_choice(B), p.device.index)
    extras = (("norm",) if normed else ()) + (("return_cell_states",) if call.all_cells else ())
    chosen = select(call.backend, Problem(p.device.type, p.dtype, call.cell, True, extras, *size))
    options = Options(
        call.cell, D, heads, call.norm_eps, call.bptt_window, call.clip_state_grad,
        all_cells=call.all_cells,
    )  # fmt: skip
    weights = Weights(None, None, b_hh, w_hh.flatten(0, 1), gamma, beta)
    y, last, cells = layer(p, weights, states, Rows(lengths, reset), None, options, chosen)
    if one:  # a view could not be detached in place
        last = States(*(s if s is None else s[0].clone() for s in last))
    return y, last, cells


def _product(*factors: str | int) -> str:
    """The words for a size: D * 4 * H."""
    return " * ".join(str(f) for f in (*factors, "H") if f != 1)


def check_options(
    H: int,
    num_heads: int,
    layer_norm: bool,
    norm_eps: float,
    bptt_window: int | None,
    clip_state_grad: float | None,
) -> None:
    """
    Raises:
        TypeError, ValueError: a recurrence of H units cannot have such an option.
    """
    check_count("num_heads", num_heads)
    if H % num_heads:
        raise ValueError(f"num_heads: given {num_heads}, wanted a divisor of hidden_size = {H}")
    if layer_norm and num_heads == H:
        raise ValueError(
            "norm='layer': given 1 unit per head, wanted 2 or more: the norm of one is always 0"
        )
    check_positive("norm_eps", norm_eps)
    if bptt_window is not None:
        check_count("bptt_window", bptt_window)
    check_clip_state_grad(clip_state_grad)


def check_clip_state_grad(value: float | None) -> None:
    """
    Raises:
        TypeError, ValueError: no gradient can be scaled down to that norm.
    """
    if value is None:
        return
    check_positive("clip_state_grad", value)
    if value < LEAST_CLIP:
        raise ValueError(
            f"clip_state_grad: given {value}, wanted {LEAST_CLIP} or more: float32 has few digits "
            "for what such a gradient is multiplied with"
        )


def check_count(name: str, value: int) -> None:
    """
    Raises:
        TypeError, ValueError: it is no int of at least 1.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: given {value!r}, wanted an int")
    if value < 1:
        raise ValueError(f"{name}: given {value}, wanted 1 or more")


def check_positive(name: str, value: float) -> None:
    """
    Raises:
        TypeError, ValueError: it is no number above 0.
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: given {value!r}, wanted a float")
    if not value > 0:  # NaN, too
        raise ValueError(f"{name}: given {value}, wanted a number above 0")


def check_reset(
    reset: Tensor | None, shape: tuple[int, ...], what: str, device: torch.device
) -> Tensor | None:
    """``reset`` on ``device``.

    Raises:
        TypeError, ValueError: no tensor, another shape or dtype.
    """
    if reset is None:
        return None
    if not isinstance(reset, Tensor):
        raise TypeError(f"reset: given {type(reset).__name__}, wanted a bool tensor {what}")
    if reset.dtype != torch.bool or reset.shape != shape:
        raise ValueError(
            f"reset: given {reset.dtype} of shape {tuple(reset.shape)}, "
            f"wanted torch.bool of shape {what} = {tuple(shape)}"
        )
    return reset.to(device)


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
        listed = _integers(lengths)
        _check_kind(torch.int64, (len(listed),), B)
        if not torch.compiler.is_compiling():
            _check_range(listed, T)
        return torch.tensor(listed, dtype=torch.int64, device=device)
    _check_kind(lengths.dtype, lengths.shape, B)
    if lengths.device.type == "meta" and device.type != "meta":
        raise ValueError(f"lengths: given a tensor on meta, wanted one with values, on {device}")
    values = values_of(lengths)
    if values is None:
        return lengths.to(torch.int64).clamp(0, T).to(device)
    _check_range(values.flatten().tolist(), T)
    # A copy, so that nobody changes the lengths after the check.
    return lengths.to(device, torch.int64, copy=True)


def _integers(lengths) -> Sequence[int]:
    """The entries of a list, or of an array of another library, as Python's integers.

    Raises:
        ValueError: something else is there; a bool is no integer.
    """
    if hasattr(lengths, "__array__") and hasattr(lengths, "tolist"):
        listed = lengths.tolist()
    else:
        listed = lengths
    if isinstance(listed, Sequence) and not isinstance(listed, (str, bytes, bytearray)):
        if all(type(n) is int for n in listed):
            return listed
        kinds = (str(getattr(n, "dtype", type(n).__name__)) for n in listed)
        if not any(kind in ("bool", "torch.bool") for kind in kinds):
            with contextlib.suppress(TypeError):  # no integer
                return [operator.index(n) for n in listed]
    raise ValueError(f"lengths: given {lengths!r}, wanted integers")


def _check_kind(dtype: torch.dtype, shape: tuple[int, ...], B: int) -> None:
    if dtype not in INTEGERS or shape != (B,):
        raise ValueError(
            f"lengths: given {dtype} of shape {tuple(shape)}, wanted integers of shape ({B},)"
        )


def _check_range(lengths: Sequence[int], T: int) -> None:
    wrong = [n for n in lengths if not 0 <= n <= T]
    if wrong:
        raise ValueError(f"lengths: given {wrong[0]}, wanted 0 to T = {T}")
