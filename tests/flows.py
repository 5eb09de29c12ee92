"""A loop over single samples that PyTorch differentiates, to compare the record with."""

from __future__ import annotations

import copy
import itertools
import math

import torch
from torch import Tensor
from twins import EXACT

import rnnfast
from rnnfast.gradient_flow import GradientFlow
from rnnfast.gradient_flow.flow import FIELDS, NORMS

T, B, IN, H = 6, 3, 3, 8
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def make(backend: str, *sizes: int, **options) -> rnnfast.RNN:
    torch.manual_seed(0)
    options = {"track_gradient_flow": True, "dtype": EXACT} | options
    return rnnfast.RNN(*(sizes or (IN, H)), backend=backend, **options)


def inputs(*shape: int, dtype: torch.dtype = EXACT, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (T, B, IN)), generator=generator, dtype=torch.float64).to(dtype)


def same(a, b) -> bool:
    """Bit for bit, NaN as NaN, for tensors and sequences of them."""
    if isinstance(a, Tensor):
        return (
            a.shape == b.shape
            and torch.equal(a.isnan(), b.isnan())
            and torch.equal(a.nan_to_num(), b.nan_to_num())
        )
    if isinstance(a, GradientFlow):
        a, b = a.fields().values(), b.fields().values()
    return len(a) == len(b) and all(map(same, a, b))


def assert_close(found: GradientFlow, wanted: GradientFlow, tolerance: float) -> None:
    """Relative, every single value; what is 0 or not finite agrees exactly."""
    for name, a in found.fields().items():
        w = getattr(wanted, name)
        assert a.dtype == torch.float64, name
        assert a.shape == w.shape, name
        assert torch.equal(a.isnan(), w.isnan()), f"{name}: {a} for {w}"
        usual = w.isfinite()
        assert torch.equal(a[~usual & ~w.isnan()], w[~usual & ~w.isnan()]), name
        wrong = (a[usual] - w[usual]).abs() > tolerance * w[usual].abs()
        assert not wrong.any(), f"{name}: {a[usual][wrong]} for {w[usual][wrong]}"


# ------------------------------------------------------------------------------------- the oracle

SLOPES = {
    "tanh": lambda n: 1 - n.tanh() ** 2,
    "relu": lambda n: (~(n <= 0)).to(n.dtype),  # as torch: NaN passes
    "sigmoid": lambda n: n.sigmoid() * (1 - n.sigmoid()),
    "softplus": lambda n: n.sigmoid(),
}


class Step:
    """One step of one head of one sample: nodes of the graph whose gradients are looked at."""

    def __init__(self, rnn: rnnfast.RNN, p: Tensor, w: Tensor, before: Tensor, norm) -> None:
        self.a = p + w @ before
        n = self.a
        if norm is not None:
            mean, var = n.mean(), n.var(correction=0)
            n = norm[0] * (n - mean) / (var + rnn.norm_eps).sqrt() + norm[1]
        self.clipped = getattr(torch, rnn.nonlinearity)(n)
        self.h = self.clipped.clone()
        self.through = self.h.clone()  # what the step after sees
        if rnn.clip_state_grad is not None:
            self.clipped.register_hook(lambda g: clip(g, rnn.clip_state_grad))
        for node in (self.a, self.clipped, self.h, self.through):
            node.retain_grad()  # of a tensor with a hook: what the hook returns
        self.carried = False  # until a step after it sends a gradient back
        self.slope = SLOPES[rnn.nonlinearity](n.detach())


def clip(g: Tensor, limit: float) -> Tensor:
    norm = math.sqrt(sum(x * x for x in g.tolist()))
    return g * (limit / norm) if limit < norm < math.inf else g


def unrolled(rnn, x, hx, lengths, reset) -> tuple[Tensor, Tensor, dict]:
    """y, h_n and {(layer, direction, t, b): the steps of its heads}; x [T, B, I]."""
    T, B, _ = x.shape
    heads, S = rnn.num_heads, rnn.hidden_size // rnn.num_heads
    weights = dict(rnn.named_parameters())
    steps, h_n, u = {}, [], x
    for layer in range(rnn.num_layers):
        outputs = []
        for d in range(1 + rnn.bidirectional):
            suffix = f"_l{layer}" + "_reverse" * d
            w_ih, w_hh, b_ih, b_hh = (
                weights[name + suffix] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            y = [[torch.zeros_like(b_ih)] * B for _ in range(T)]
            last = []
            for b in range(B):
                length = T if lengths is None else lengths[b]
                h = torch.zeros_like(b_ih) if hx is None else hx[len(h_n), b]
                through, each = h, []
                for t in reversed(range(length)) if d else range(length):
                    edge = t + d  # between real steps edge - 1 and edge
                    window = rnn.bptt_window or T
                    leaves = 0 < edge < length and edge % window == 0
                    if leaves:
                        through = through.detach()
                    cut = reset is not None and edge < length and reset[edge, b]
                    if cut:
                        through = torch.zeros_like(through)
                    for step in each:
                        step.carried = not (leaves or cut)
                    p = w_ih @ u[t, b] + b_ih + b_hh
                    each = []
                    for k in range(heads):
                        own = slice(k * S, (k + 1) * S)
                        norm = None
                        if rnn.norm == "layer":
                            norm = [weights[f"norm_{x}{suffix}"][own] for x in ("weight", "bias")]
                        each.append(Step(rnn, p[own], w_hh[own], through[own], norm))
                    steps[layer, d, t, b] = each
                    h = y[t][b] = torch.cat([step.h for step in each])
                    through = torch.cat([step.through for step in each])
                last.append(h)
            h_n.append(torch.stack(last))
            outputs.append(torch.stack([torch.stack(row) for row in y]))
        u = torch.cat(outputs, -1)
    return u, torch.stack(h_n), steps


def gradients(steps: list[Step], name: str) -> Tensor:
    nodes = [getattr(step, name) for step in steps]
    return torch.cat([torch.zeros_like(v) if v.grad is None else v.grad for v in nodes])


def measured(rnn: rnnfast.RNN, steps: dict, T: int, B: int) -> GradientFlow:
    """The table of what is recorded, from .grad of every step; per sample or of the batch."""
    shape = rnn.num_layers, 1 + rnn.bidirectional, T, B
    per_sample = rnn.track_gradient_flow == "sample"
    columns = [[b] for b in range(B)] if per_sample else [range(B)]
    fields = {name: torch.zeros(*shape[:3], len(columns), dtype=torch.float64) for name in FIELDS}
    for at in itertools.product(*map(range, shape[:3]), range(len(columns))):
        each = [s for b in columns[at[3]] for s in steps.get((*at[:3], b), ())]
        if not each:
            fields["gain"][at] = math.nan
            continue

        dh, carry, clipped, da = (gradients(each, n) for n in ("h", "through", "clipped", "a"))
        h = torch.cat([step.h for step in each])
        for name, value in zip(NORMS, (dh, carry, clipped, da)):
            fields[name][at] = value.double().square().sum().sqrt()
        fields["state_max"][at] = dh.abs().max()
        fields["gain"][at] = torch.cat([step.slope for step in each]).abs().mean()
        fields["nonfinite_grad"][at] = (~(dh.isfinite() & da.isfinite())).sum()
        fields["nonfinite_state"][at] = (~h.isfinite()).sum()
        fields["entries"][at] = h.numel()
        fields["carried"][at] = sum(len(step.h) for step in each if step.carried)
    return GradientFlow(**{n: x if per_sample else x.squeeze(-1) for n, x in fields.items()})


def compare(rnn, x, hx=None, lengths=None, reset=None, grad_y=None, grad_h_n=None, tolerance=0.0):
    """Runs the module and the loop (in float64); the record, which agrees."""
    oracle = copy.deepcopy(rnn).double()
    wide = [v if v is None else v.double() for v in (x, hx, grad_y, grad_h_n)]
    with torch.enable_grad():
        y, h_n, steps = unrolled(oracle, wide[0], wide[1], lengths, reset)
        backward(y, h_n, *wide[2:])
    y, h_n = rnn(x, hx, lengths=lengths, reset=reset)
    backward(y, h_n, grad_y, grad_h_n)
    wanted = measured(oracle, steps, *x.shape[:2])
    assert_close(rnn.gradient_flow, wanted, tolerance or TOLERANCE[x.dtype])
    return rnn.gradient_flow


def backward(y: Tensor, h_n: Tensor, grad_y: Tensor | None, grad_h_n: Tensor | None) -> None:
    pairs = [(v, g) for v, g in ((y, grad_y), (h_n, grad_h_n)) if g is not None]
    torch.autograd.backward(*zip(*pairs))
