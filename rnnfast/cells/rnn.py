"""The Elman cell and its two loops over time, in plain PyTorch: the oracle of every backend.

Shapes: T time steps, B batch, D directions, H hidden size, n heads of S = H / n units. A group is
one direction of one head: an independent recurrence. Direction 1 runs in reverse real time.

    a_t = p_t + h_{t-1} W_hh^T,  h_t = f(n_t)                      (Elman 1990)
    n_t = a_t, or gamma * ahat_t + beta,  ahat_t = (a_t - mean(a_t)) rstd(a_t)
                                                     (Ba et al. 2016, eq. 4; rstd with eps inside)

and, with g_t = dL/dh_t from outside, backpropagation through time (Werbos 1990):

    dh_t = g_t + da_{t+1} W_hh,  dn_t = clip(dh_t) * f'(n_t)  f' from h_t (:func:`_slope_state`)
    da_t = dn_t, or rstd (dahat - mean(dahat) - ahat mean(dahat * ahat)),  dahat = gamma * dn_t

"Edge" e lies between real steps e - 1 and e of a row: state and gradient do not cross it where
``reset[e]`` holds, and the gradient alone does not at multiples of the window.

Nothing here is in place but the record, and nothing depends on values: PyTorch can differentiate,
vmap and trace both loops.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..compiler import constant
from ..recurrence.record import FIELDS

GATES = 1

NONLINEARITIES = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid}

BACKWARD = {  # dh f'(a), from h = f(a) alone
    "tanh": lambda dh, h: dh * (1 - h * h),
    "relu": lambda dh, h: torch.where(h <= 0, 0, dh),  # as torch: an idle unit stops a NaN of dh
    "sigmoid": lambda dh, h: dh * (h * (1 - h)),
}
SIGN_ALONE = {"relu"}  # of h, these ask for the sign


class Options(NamedTuple):
    """What a recurrence is beside its tensors."""

    nonlinearity: str = "tanh"
    heads: int = 1
    norm_eps: float = 1e-5
    bptt_window: int | None = None
    clip_state_grad: float | None = None
    per_sample: bool = False  # the record keeps the rows of the batch apart


def forward(
    p: Tensor,
    w_hh: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    h_0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """All steps of all directions.

    Args:
        p: [T, B, D * H], the input projection.
        w_hh: [D, H, S]: the rows of head k act on head k's slice of the state.
        gamma, beta: [D * H], float32 or float64; gamma None for no layer norm.
        h_0: [D, B, H]; None for zeros.
        lengths: [B] int64; steps from lengths[b] on leave the state as it is and put out 0.
        reset: [T, B] bool; nothing crosses the edge before step t of row b.

    Returns:
        y [T, B, D * H] and h_n [D, B, H]; with layer norm ahat like y and rstd [T, B, D * n].
    """
    T, B = p.shape[:2]
    D, _, S = w_hh.shape
    n = options.heads
    name, limit = options.nonlinearity, options.clip_state_grad
    f = NONLINEARITIES[name]
    clipped = (_ClippedInTransform if in_transform() else _Clipped).apply
    edges = _Edges(T, lengths, reset, options.bptt_window)
    ys, h_ns, ahats, rstds = [], [], [], []
    for d in range(D):
        w = w_hh[d].view(n, S, S)
        gain, bias = (None if v is None else _heads(v[None], d, n, S) for v in (gamma, beta))
        h = p.new_zeros(n, B, S) if h_0 is None else _heads(h_0[d], 0, n, S)
        steps, normal, scales = [], [], []
        for t in _times(T, d):
            valid = edges.valid(t)
            before = _where(edges.cut(t + d), 0, h)
            before = _where(edges.window(t + d), before.detach(), before)
            a = _heads(p[t], d, n, S) + before @ w.mT
            if gamma is not None:
                ahat, rstd = layer_norm(a.to(gamma.dtype), options.norm_eps)
                a = ahat * gain if bias is None else ahat * gain + bias
                normal.append(_where(valid, ahat, 0).to(p.dtype))
                scales.append(_where(valid, rstd, 0))
            h_new = (f(a) if limit is None else clipped(a, name, limit)).to(p.dtype)
            h = _where(valid, h_new, h)
            steps.append(_where(valid, h_new, 0))
        for all_directions, of_this in ((ys, steps), (ahats, normal), (rstds, scales)):
            if of_this:
                x = torch.stack(of_this[::-1] if d else of_this)  # [T, n, B, S or 1]
                all_directions.append(x.transpose(1, 2).flatten(2))
        h_ns.append(h.transpose(0, 1).flatten(1))
    y, h_n = torch.cat(ys, -1), torch.stack(h_ns)
    if gamma is None:
        return y, h_n, None, None
    return y, h_n, torch.cat(ahats, -1), torch.cat(rstds, -1)


def backward(
    grad_y: Tensor | None,
    grad_h_n: Tensor | None,
    grad_ahat: Tensor | None,
    grad_rstd: Tensor | None,
    y: Tensor,
    w_hh: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    ahat: Tensor | None,
    rstd: Tensor | None,
    h_0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    options: Options,
    record: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
    """The gradient of :func:`forward` from what it put out, as a function to differentiate again.

    Args:
        grad_y: [T, B, D * H] or None; grad_h_n: [D, B, H] or None.
        grad_ahat, grad_rstd: of those outputs, which a second derivative reaches; or None.
        y, ahat, rstd: what forward returned; they carry the dependence on p.
        record: [D, T, N, fields] float64, N = B or 1, to be filled; see
            :mod:`rnnfast.recurrence.record`.

    Returns:
        dp [T, B, D * H], dw_hh [D, H, S], dgamma and dbeta [D * H] (None without layer norm),
        dh_0 [D, B, H].
    """
    T, B = y.shape[:2]
    D, H, S = w_hh.shape
    n = options.heads
    through = BACKWARD[options.nonlinearity]
    edges = _Edges(T, lengths, reset, options.bptt_window)
    dps, dws, dgammas, dbetas, dh_0s = [], [], [], [], []
    for d in range(D):
        w = w_hh[d].view(n, S, S)
        zeros = y.new_zeros(n, B, S)
        last = zeros if grad_h_n is None else _heads(grad_h_n[d], 0, n, S)
        start = zeros if h_0 is None else _heads(h_0[d], 0, n, S)
        gain, bias = (None if v is None else _heads(v[None], d, n, S) for v in (gamma, beta))
        dw = torch.zeros_like(w)
        dgamma = dbeta = 0
        carry = zeros
        das: list[Tensor] = []
        times = _times(T, d)
        for s in reversed(range(T)):
            t = times[s]
            valid = edges.valid(t)
            h = _heads(y[t], d, n, S)
            dh = carry + _where(edges.enters(t, d), last, 0)
            if grad_y is not None:
                dh = dh + _heads(grad_y[t], d, n, S)
            clipped = dh
            if options.clip_state_grad is not None:
                clipped = clip(dh, options.clip_state_grad)
            of_slope = h
            if gamma is not None:
                normal, scale = _heads(ahat[t], d, n, S).to(gamma.dtype), _heads(rstd[t], d, n, 1)
                of_slope = _slope_state(h, normal, gain, bias, options.nonlinearity)
            da = _where(valid, through(clipped, of_slope), 0)
            if gamma is not None:
                dn = da.to(gamma.dtype)
                dgamma, dbeta = dgamma + (dn * normal).sum(1), dbeta + dn.sum(1)
                dn = dn * gain
                if grad_ahat is not None:
                    dn = dn + _heads(grad_ahat[t], d, n, S)
                along = (dn * normal).mean(-1, keepdim=True)
                if grad_rstd is not None:
                    along = along + _heads(grad_rstd[t], d, n, 1) * scale / S
                da = (scale * (dn - dn.mean(-1, keepdim=True) - normal * along)).to(y.dtype)
                da = _where(valid, da, 0)
            if record is not None:
                slope = through(torch.ones_like(h), h)
                carried = edges.carried(t, d)
                _measure(record[d, t], valid, carry, dh, clipped, da, h, slope, carried)
            before = _heads(y[times[s - 1]], d, n, S) if s else start
            if d and lengths is not None:  # the reverse direction of this row begins here
                before = torch.where((t + 1 == lengths).unsqueeze(1), start, before)
            before = _where(edges.window(t + d), before.detach(), before)
            dw = dw + da.mT @ _where(edges.cut(t + d), 0, before)
            carry = _where(edges.cut(t + d), zeros, _where(valid, da @ w, carry))
            carry = _where(edges.window(t + d), zeros, carry)
            das.append(da)
        dps.append(torch.stack(das if d else das[::-1]).transpose(1, 2).reshape(T, B, H))
        dws.append(dw.view(H, S))
        if gamma is not None:
            dgammas.append(dgamma.reshape(H))
            dbetas.append(dbeta.reshape(H))
        if lengths is not None:
            carry = torch.where((lengths == 0).unsqueeze(1), last, carry)
        dh_0s.append(carry.transpose(0, 1).reshape(B, H))
    dgamma, dbeta = (torch.cat(v) if v else None for v in (dgammas, dbetas))
    return torch.cat(dps, -1), torch.stack(dws), dgamma, dbeta, torch.stack(dh_0s)


def layer_norm(a: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """ahat and rstd [..., 1] over the last axis, with the biased variance."""
    centred = a - a.mean(-1, keepdim=True)
    centred = centred - centred.mean(-1, keepdim=True)  # what the mean itself has lost to rounding
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * rstd, rstd


def _slope_state(
    h: Tensor, ahat: Tensor, gain: Tensor, bias: Tensor | None, nonlinearity: str
) -> Tensor:
    """The h that f' is taken from, with layer norm.

    One that was rounded to be stored has few digits of f' left where f is flat, and dgamma is the
    sum of what is lost. There f takes it from ahat anew: the flatter f is, the less it makes of the
    rounding of ahat.
    """
    if h.dtype == ahat.dtype or nonlinearity in SIGN_ALONE:
        return h
    return NONLINEARITIES[nonlinearity](ahat * gain if bias is None else ahat * gain + bias)


def clip(dh: Tensor, limit: float) -> Tensor:
    """dh * min(1, limit / ||dh||) over the last axis; a norm that is inf or NaN scales by 1."""
    norm = torch.linalg.vector_norm(dh, dim=-1, keepdim=True, dtype=torch.float64)
    large = (norm > limit) & (norm < torch.inf)
    return dh * (limit / torch.where(large, norm, limit)).to(dh.dtype)


class _Clipped(torch.autograd.Function):
    """f(a), which clips its gradient as a hook on it does: in a second derivative, too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, nonlinearity: str, limit: float) -> Tensor:
        return NONLINEARITIES[nonlinearity](a)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, ctx.nonlinearity, ctx.limit = inputs
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, dh: Tensor) -> tuple[Tensor, None, None]:
        (h,) = ctx.saved_tensors
        return BACKWARD[ctx.nonlinearity](clip(dh, ctx.limit), h), None, None


class _ClippedInTransform(_Clipped):
    """With forward mode, which torch.compile refuses to trace."""

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _Clipped.setup_context(ctx, inputs, output)
        ctx.save_for_forward(output)

    @staticmethod
    def jvp(ctx, da: Tensor, *_: None) -> Tensor:
        (h,) = ctx.saved_tensors
        return BACKWARD[ctx.nonlinearity](da, h)


def directions(w_hh: Tensor) -> int:
    """D of w_hh [D, H, S], or of [H, S], which is 1."""
    return w_hh.shape[0] if w_hh.dim() == 3 else 1


@constant
def _is_transformed() -> bool:
    return torch._C._functorch.get_dynamic_layer_stack_depth() > 0


def in_transform() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is under way.

    In these words torch.compile knows the answer as it traces.
    """
    return _is_transformed() or torch.autograd.forward_ad._current_level >= 0


class _Edges:
    """Masks [B, 1] over the rows of the batch; None where the answer is the usual one."""

    def __init__(
        self, T: int, lengths: Tensor | None, reset: Tensor | None, window: int | None
    ) -> None:
        self.T, self.lengths, self.reset, self.every = T, lengths, reset, window

    def valid(self, t: int) -> Tensor | None:
        """Rows with a step t; None for all."""
        return None if self.lengths is None else (t < self.lengths).unsqueeze(1)

    def enters(self, t: int, d: int) -> Tensor | bool:
        """Rows whose last step, in the order of direction d, is t."""
        if d or self.lengths is None:
            inside = self.valid(t)
            last = t == (0 if d else self.T - 1)
            return inside if last and inside is not None else last
        return (t == self.lengths - 1).unsqueeze(1)

    def carried(self, t: int, d: int) -> Tensor | bool:
        """Rows whose step t gets a gradient from the step after it, in the order of direction d."""
        edge = t if d else t + 1
        stops = self.enters(t, d), self.cut(edge), self.window(edge) is not False
        if any(rows is True for rows in stops):
            return False
        masks = [rows for rows in stops if rows is not False]
        return ~(masks[0] | masks[-1]) if masks else True

    def cut(self, e: int) -> Tensor | bool:
        """Rows with a reset at edge e."""
        if self.reset is None or e == self.T:
            return False
        cut = self.reset[e].unsqueeze(1)
        return cut if self.lengths is None else cut & self.valid(e)

    def window(self, e: int) -> Tensor | bool:
        """Rows with an edge of the window at e."""
        if self.every is None or e in (0, self.T) or e % self.every:
            return False
        return True if self.lengths is None else self.valid(e)


def _where(mask: Tensor | bool | None, a, b) -> Tensor | int:
    """torch.where, None for all rows."""
    if mask is None or mask is True:
        return a
    return b if mask is False else torch.where(mask, a, b)


def _heads(x: Tensor, d: int, n: int, S: int) -> Tensor:
    """Direction d of [B, D * n * S] as [n, B, S], by operations that is_grads_batched can map."""
    return x.narrow(1, d * n * S, n * S).reshape(x.shape[0], n, S).transpose(0, 1)


def _measure(
    record: Tensor,
    valid: Tensor | None,
    carry: Tensor,
    dh: Tensor,
    clipped: Tensor,
    da: Tensor,
    h: Tensor,
    slope: Tensor,
    carried: Tensor | bool,
) -> None:
    """Fills record [N, fields] for one step of one direction from [n, B, S]."""

    def over_units(x: Tensor) -> Tensor:
        return _where(valid, x, 0).double().sum((0, 2))

    finite = [x.isfinite() for x in (dh, da, h)]
    ones = torch.ones_like(h)
    values = {
        "state_squares": over_units(dh.double().square()),
        "carry_squares": over_units(carry.double().square()),
        "clipped_squares": over_units(clipped.double().square()),
        "preact_squares": over_units(da.double().square()),
        "state_max": _where(valid, dh.abs(), 0).double().amax((0, 2)),
        "slopes": over_units(slope.abs()),
        "nonfinite_grad": over_units(~(finite[0] & finite[1])),
        "nonfinite_state": over_units(~finite[2]),
        "entries": over_units(ones),
        "carried": over_units(_where(carried, ones, torch.zeros_like(h))),
    }
    rows = torch.stack([values[name] for name in FIELDS], -1).detach()
    if record.shape[0] != rows.shape[0]:
        largest = rows[:, FIELDS.index("state_max")]
        rows = rows.sum(0, keepdim=True)
        if len(largest):  # an empty batch has none
            rows[0, FIELDS.index("state_max")] = largest.amax(0)
    record.copy_(rows)


def _times(T: int, direction: int) -> range:
    return range(T - 1, -1, -1) if direction else range(T)
