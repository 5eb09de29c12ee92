"""Half-life, horizon and verdict, from the norms of a gradient on its way back through time.

Tensors are [L, D, T] or, with the rows of the batch kept apart, [L, D, T, B]; T is real time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..cells import CELLS
from ..cells.cell import Cell

# The smallest norm that is a measurement. Below it float32 runs out of digits; so does float16,
# in which da may be stored, at 100 sqrt(H) units in the last place.
SMALLEST, SMALLEST_HALF = 1e-30, 1e-4
HORIZON = 1e-3  # the part of the gradient that is left at the horizon
GROWTH = 1e3  # a gradient that grows so much over all steps explodes; the inverse: it vanishes
DEAD = 0.05  # the gain of a ReLU step with hardly a unit active
SATURATED = 0.1  # a mean gain below this part of the steepest slope


def step_after(x: Tensor) -> Tensor:
    """At t the value of x at the step after: t + 1, or t - 1 in reverse. 0 at the last step."""
    nothing = torch.zeros_like(x[:, :, :1])
    forward = torch.cat([x[:, :1, 1:], nothing[:, :1]], 2)
    return torch.cat([forward, torch.cat([nothing[:, 1:], x[:, 1:, :-1]], 2)], 1)


def factors(
    carry: Tensor, clipped: Tensor, carried: Tensor, entries: Tensor, smallest: float
) -> Tensor:
    """||c_t|| / ||dh_{t+1}||, where c_t is the part of dh_t that came back through time: one step
    back multiplies the norm of the gradient by this number.

    NaN where it is unknown: no gradient comes back to t, a reset or the window stops some rows on
    the way, or dh_{t+1} is below ``smallest`` or not finite. 0 where f' is 0 everywhere.
    """
    whole = (carried > 0) & (carried == step_after(entries))
    source = step_after(clipped)
    known = whole & (source >= smallest) & source.isfinite() & carry.isfinite()
    return torch.where(known, carry / source, torch.nan)


def mean_log(factors: Tensor, *over: int) -> Tensor:
    """Mean natural logarithm of the known factors over the axes ``over``; NaN without any."""
    return factors.log().nanmean(over)


def half_life(rate: Tensor) -> Tensor:
    """Steps until half is left. ``rate`` is the mean logarithm of the factors; at 0 and above the
    half-life is infinite."""
    return torch.where(rate < 0, math.log(2) / -rate, torch.where(rate.isnan(), rate, torch.inf))


def horizon(factors: Tensor, stopped: Tensor) -> Tensor:
    """Steps back until the product of the factors is HORIZON, from the last step with a gradient.

    Infinite where the product stays larger within T. NaN without any factor.

    Args:
        stopped: bool; a reset or an edge of the window lets no row's gradient come back to the
            step.
    """

    def by_lag(x: Tensor) -> Tensor:
        return torch.cat([x[:, :1].flip(2), x[:, 1:]], 1)

    known = by_lag(~factors.isnan())
    begun = known.int().cummax(2).values > 0
    logs = by_lag(factors).log().nan_to_num(nan=0.0, neginf=-torch.inf)
    logs = torch.where(begun & by_lag(stopped), -torch.inf, logs)
    far = logs.cumsum(2) <= math.log(HORIZON) * (1 - 1e-9)
    first, last = begun.int().argmax(2), far.int().argmax(2)
    steps = torch.where(far.any(2), (last - first + 1).double(), torch.inf)
    return torch.where(known.any(2), steps, torch.nan)


# -------------------------------------------------------------------------------------- in words


class Verdict(NamedTuple):
    """A word for the gradient of one layer and direction, and the numbers that it rests on."""

    word: str  # one of WORST_FIRST
    evidence: str
    layer: int
    direction: int


# "dead" and "saturated" are "vanishing" with a known cause.
WORST_FIRST = ("non-finite", "exploding", "dead", "saturated", "vanishing", "healthy", "unknown")


def worst(verdicts: Sequence[Sequence[Verdict]]) -> Verdict:
    """The worst verdict; the first of several."""
    return min(
        (verdict for layer in verdicts for verdict in layer),
        key=lambda verdict: WORST_FIRST.index(verdict.word),
    )


class NonFinite(NamedTuple):
    """The place where inf or NaN begins, in the order of computation."""

    layer: int
    direction: int
    step: int
    what: str  # "state", in forward, or "gradient", in backward


def first_nonfinite(state: Tensor, grad: Tensor) -> NonFinite | None:
    """The place where inf or NaN begins; None where all is finite.

    A state comes before any gradient: the lowest layer with such a state, and there the first step
    of the direction. If all states are finite: the highest layer with such a gradient, and there
    the step that backward came to first.

    Args:
        state, grad: the numbers of non-finite states and gradients, [L, D, T].
    """
    for what, counts in (("state", state), ("gradient", grad)):
        found = counts > 0  # a layer without gradient has NaN, which is not above 0
        if not found.any():
            continue
        layers = found.any(2).any(1).nonzero().flatten().tolist()
        layer = layers[0] if what == "state" else layers[-1]
        direction = int(found[layer].any(1).int().argmax())
        steps = found[layer, direction].nonzero().flatten().tolist()
        earliest = (what == "state") == (direction == 0)
        return NonFinite(layer, direction, steps[0] if earliest else steps[-1], what)
    return None


def judge(
    rate: Tensor,
    gain: Tensor,
    entries: Tensor,
    nonfinite_state: Tensor,
    nonfinite_grad: Tensor,
    cell: Cell,
) -> list[list[Verdict]]:
    """The verdicts on all layers and directions; rate is [L, D], the other tensors [L, D, T]."""
    L, D, _ = gain.shape
    bad = first_nonfinite(nonfinite_state, nonfinite_grad)

    def verdict(i: int, d: int) -> Verdict:
        here = gain[i, d][entries[i, d] > 0]
        states, grads = (int(x[i, d].nansum()) for x in (nonfinite_state, nonfinite_grad))
        mean, idle = here.mean().item(), (here < DEAD).double().mean().item()
        numbers = rate[i, d].item(), len(here), mean, idle, states, grads
        return Verdict(*judge_one(*numbers, bad, cell), i, d)

    return [[verdict(i, d) for d in range(D)] for i in range(L)]


def judge_one(
    rate: float,
    steps: int,
    mean: float,
    idle: float,
    states: int,
    grads: int,
    bad: NonFinite | None,
    cell: Cell,
) -> tuple[str, str]:
    """The word for a layer and direction, and the evidence in words.

    Args:
        rate: mean logarithm of the factors.
        steps: the number of steps that any row has.
        mean: of the gain, over these steps.
        idle: the part of these steps whose gain is below DEAD.
        states, grads: how many are not finite.
    """
    if states or grads:
        what = f"{states} states and {grads} gradients are inf or NaN"
        return "non-finite", f"{what}; the first is {in_words(bad)}" if bad else what
    if not steps:
        return "unknown", "no gradient came to this layer"
    if math.isnan(rate):
        return "unknown", "no step sends a gradient back that can be measured"
    growth = rate * max(steps - 1, 1)
    text = f"gradient times {power(growth)} over {steps} steps"
    if growth >= math.log(GROWTH):
        return "exploding", text
    if growth > -math.log(GROWTH):
        return "healthy", text
    if cell.gated:
        return "vanishing", f"{text} (gates closed: mean {cell.gain_name} = {mean:.2g})"
    # A gradient can come back undiminished through one unit. So few active units, or flat ones, are
    # called a cause only where the gradient vanishes.
    if cell.idles and idle >= 0.5:
        cause = f"fewer than {DEAD:.0%} of the units are active at {idle:.0%} of the steps"
        return "dead", f"{text}: {cause}"
    if not cell.idles and mean < SATURATED * cell.steepest:
        return "saturated", f"{text}: mean |f'| is {mean:.2g}, of {cell.steepest:g} at most"
    return "vanishing", text


def in_words(bad: NonFinite) -> str:
    way = "" if bad.direction == 0 else ", reverse"
    return f"the {bad.what} of layer {bad.layer}{way} at step {bad.step}"


def power(log: float) -> str:
    """e^log in digits, also where it is too large or too small for a float."""
    if math.isinf(log):
        return "0" if log < 0 else "inf"
    tens = log / math.log(10)
    return f"{10**tens:.3g}" if -4 < tens < 4 else f"10^{tens:.0f}"


# ---------------------------------------------------------------------------------------- advice


class Cure(NamedTuple):
    """A remedy, in arguments of the module."""

    text: str
    settings: Mapping = {}  # a network with these has the remedy; "any": every value but None
    needs: Mapping = {}  # settings that the remedy was measured with, or cannot be without


_LAYER_NORM, _ANY_CLIP = {"norm": "layer"}, {"clip_state_grad": "any"}
_TANH = {"nonlinearity": "tanh"}
# The most promising first, by the accuracy after training in docs/gradient_flow.md. A test compares
# the remedies for a vanishing gradient with docs/cures.csv.
_IDENTITY = Cure(
    'nonlinearity="relu" with init="identity"', {"nonlinearity": "relu", "init": "identity"}
)
_ORTHOGONAL = Cure('init="orthogonal"', {"init": "orthogonal"}, _TANH)
_GLOROT = Cure('init="glorot"', {"init": "glorot"}, _TANH)
_CLIP = Cure("clip_state_grad=1.0", _ANY_CLIP)
_AFTER_OVERFLOW = (
    Cure("look at the data and the loss at the step named"),
    Cure("a smaller learning rate"),
    Cure("clip_state_grad=1.0, if the gradient grew until it overflowed", _ANY_CLIP),
)
_CURES = {  # of a cell without gates
    "non-finite": (
        *_AFTER_OVERFLOW,
        Cure('norm="layer", which keeps the pre-activations in range', _LAYER_NORM),
    ),
    "dead": (
        _IDENTITY,
        _ORTHOGONAL,
        _GLOROT,
        Cure('norm="layer", which centres the pre-activations', _LAYER_NORM),
    ),
    "saturated": (
        Cure('norm="layer", which keeps the pre-activations where f is steep', _LAYER_NORM),
        Cure("inputs scaled to mean 0 and deviation 1"),
        _ORTHOGONAL,
        _GLOROT,
    ),
    "exploding": (
        _CLIP,
        Cure('init="orthogonal"', {"init": "orthogonal"}),
        Cure('norm="layer"', _LAYER_NORM),
    ),
    "vanishing": (_IDENTITY, _ORTHOGONAL, _GLOROT, Cure('norm="layer"', _LAYER_NORM, _TANH)),
}
_CURES_OF_GATES = {
    "non-finite": _AFTER_OVERFLOW,
    "exploding": (_CLIP,),
    "vanishing": (
        Cure(
            "chrono_steps=T, where T is the number of steps to remember",
            {"chrono_steps": "any"},
            {"bias": True, "forget_bias": None},
        ),
    ),
}


def cell_of(network: Mapping) -> Cell:
    """The cell of a module with these arguments."""
    return CELLS[network["cell"]]


def advice(word: str, network: Mapping) -> tuple[str, ...]:
    """Remedies for a verdict, without those that the network already has.

    Args:
        network: arguments of the RNN, by name.
    """
    found = []
    cures = _CURES_OF_GATES if cell_of(network).gated else _CURES
    for cure in cures.get(word, ()):
        used = [
            network.get(name) not in (None, False) if value == "any" else network.get(name) == value
            for name, value in cure.settings.items()
        ]
        if used and all(used):
            continue
        missing = [n for n, value in cure.needs.items() if network.get(n, value) != value]
        first = ", ".join(f"{name}={_written(cure.needs[name])}" for name in missing)
        found.append(f"{first} with {cure.text}" if first else cure.text)
    return tuple(found)


def _written(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)
