"""The influence of past steps on a network's last state: a gradient of no particular loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..convert import OURS, TWINS, sharing, strange_parameters
from ..extras import need
from ..gradient_flow import reading, text
from ..gradient_flow.flow import FIELDS, GradientFlow
from ..gradient_flow.reading import NonFinite, Verdict
from ..modules.stack import Hx, Stack

if TYPE_CHECKING:
    from ..drawing import Picture


def probe(
    rnn: nn.Module,
    x: Tensor | PackedSequence,
    hx: Hx | None = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
    seed: int = 0,
) -> GradientProbe:
    """Sends a random unit vector v back from each sample's last state of the top layer, h_end, and
    measures v^T dh_end/dh_t at every step of every layer, in the kernel that training runs.

    Each direction of a bidirectional RNN has vectors of its own, at its own last state: step
    lengths - 1 forward, step 0 in reverse. Clipping, the window of truncated BPTT and dropout are
    off. A reset ends a sample's way back.

    ``rnn`` does not change: neither its gradients, nor its record, running statistics and mode.
    Batch norm follows the mode. No hook runs, and no global random generator is used.

    Args:
        rnn: an RNN, LSTM or GRU of rnnfast or of torch.nn.
        x, hx, lengths, reset: the arguments of its call.
        seed: of the vectors.

    Raises:
        TypeError: ``rnn`` is neither; ``x`` is no tensor.
        ValueError: no sample has a step; and every error that the call of ``rnn`` raises.
    """
    whole = _as_rnnfast(rnn)
    with torch.inference_mode(False), torch.enable_grad():
        x, start = _leaf(x)
        hx = _copied(hx)
        twin = _measuring(whole)
        # twin(x) would run the hooks, and twin.forward may be one that somebody put into the
        # instance, which calls the other module.
        h_n = type(twin).forward(twin, x, hx, lengths=lengths, reset=reset)[1]
        h_n = h_n if isinstance(h_n, Tensor) else h_n[0]
        flows = []
        for grad in _unit_vectors(h_n, 2 if whole.bidirectional else 1, seed):
            torch.autograd.grad(h_n, start, grad, retain_graph=True)
            flows.append(twin.gradient_flow)
    fields = {n: torch.stack([f.fields()[n][:, d] for d, f in enumerate(flows)], 1) for n in FIELDS}
    if not (fields["entries"] > 0).any():
        raise ValueError(
            "no sample has a step to begin at: the batch is empty, or all lengths are 0"
        )
    network = whole._network()
    return GradientProbe(replace(flows[0], **fields, network=network))


def _as_rnnfast(rnn: nn.Module) -> Stack:
    if isinstance(rnn, OURS):
        return rnn
    if type(rnn) not in TWINS:
        hint = ", not a subclass of it" if isinstance(rnn, tuple(TWINS)) else ""
        raise TypeError(
            f"rnn: given {type(rnn).__name__}, wanted an RNN, LSTM or GRU of rnnfast or "
            f"torch.nn{hint}"
        )
    strange = strange_parameters(rnn)
    if strange:
        raise ValueError(f"rnn: {strange}")
    return sharing(TWINS[type(rnn)], rnn)


def _measuring(rnn: Stack) -> Stack:
    """A module with the parameters of ``rnn``, and with its own record and running statistics."""
    state = {
        "track_gradient_flow": "sample",
        "clip_state_grad": None,
        "bptt_window": None,
        "dropout": 0.0,
        "_buffers": {name: b if b is None else b.clone() for name, b in rnn._buffers.items()},
        "_records": [],
    }
    twin = type(rnn).__new__(type(rnn))  # copy.copy refuses a parametrized one
    twin.__setstate__(vars(rnn) | state)
    return twin


def _copied(hx: Hx | None) -> Hx | None:
    if hx is None or isinstance(hx, Tensor):
        return hx if hx is None else hx.detach().clone()
    return tuple(s.detach().clone() for s in hx)


def _leaf(x: Tensor | PackedSequence) -> tuple[Tensor | PackedSequence, Tensor]:
    """A copy of x, and the tensor in it that autograd goes back to. So autograd passes all layers,
    also those with frozen weights."""
    data = x.data if isinstance(x, PackedSequence) else x
    if not isinstance(data, Tensor):
        raise TypeError(f"x: given {type(x).__name__}, wanted a tensor or a PackedSequence")
    if not data.is_floating_point():
        raise TypeError(f"x: given {data.dtype}, wanted a floating-point dtype")
    data = data.detach().clone().requires_grad_()
    return (PackedSequence(data, *x[1:]) if isinstance(x, PackedSequence) else data), data


def _unit_vectors(h_n: Tensor, D: int, seed: int) -> list[Tensor]:
    """For each direction a gradient of h_n, [L * D, B, H] or unbatched [L * D, H]: a vector of norm
    1 for every sample in that direction of the top layer, and 0 elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(h_n[-D:].shape, generator=generator, dtype=torch.float64, device="cpu")
    v = (v / torch.linalg.vector_norm(v, dim=-1, keepdim=True)).to(h_n)
    found = [torch.zeros_like(h_n) for _ in range(D)]
    for d, grad in enumerate(found):
        grad[d - D] = v[d]
    return found


@dataclass(frozen=True, eq=False, repr=False)
class GradientProbe:
    """The gradient that came back, by layer, direction and lag. Lag k is k steps before the last
    step of the sample, in the order of the direction. Tensors are float64, [L, D, T] unless said
    otherwise."""

    flow: GradientFlow  # in real time, each sample apart; direction d is of the vectors in d

    @cached_property
    def samples(self) -> Tensor:
        """[D, T] the number of samples with so many steps and no reset on the way."""
        return self._there.sum(-1)

    @cached_property
    def norm(self) -> Tensor:
        """Root mean square over these samples of ||v^T dh_end/dh_t||, with h_end in the top layer
        and h_t in this one; in an LSTM of ||v^T dh_end/dc_t||. Below the top layer it contains the
        gradient that comes down from the layer above at every step."""
        squares = torch.where(self._there, self._by_lag(self.flow.memory.norm).square(), 0)
        return (squares.sum(-1) / self.samples).sqrt()

    @cached_property
    def out_of_range(self) -> Tensor:
        """Bool: the norm is below 1e-30, in float16 1e-4, and no measurement."""
        return self.norm < self.flow.smallest

    @cached_property
    def log_growth(self) -> Tensor:
        """Mean over samples of log(factor): the layer's own step from lag k - 1 to k multiplies the
        norm of the gradient by that factor. NaN at lag 0 and out of range.

        A sample whose gradient becomes 0 is left out from there on. If no other sample is left,
        the value is -inf.
        """
        logs = self._logs
        mean = _finite(logs).nanmean(-1)
        mean = torch.where(self.out_of_range, torch.nan, mean)
        return torch.where(mean.isnan() & (logs == -torch.inf).any(-1), -torch.inf, mean)

    @cached_property
    def lyapunov(self) -> Tensor:
        """[L, D] mean of these logarithms over lags and samples: an estimate of the largest
        Lyapunov exponent, per step. -inf where the gradient of all samples becomes 0 at one
        step."""
        inside = torch.where(self.out_of_range.unsqueeze(-1), torch.nan, self._logs)
        stopped = (self.log_growth == -torch.inf).any(2)
        return torch.where(stopped, -torch.inf, _finite(inside).nanmean((2, 3)))

    @cached_property
    def half_life(self) -> Tensor:
        """[L, D] steps until half of the gradient is left, ln 2 / -lyapunov; infinite where it does
        not decay."""
        return reading.half_life(self.lyapunov)

    @cached_property
    def horizon(self) -> Tensor:
        """[L, D] the first lag at which the product of the mean factors, exp(log_growth), is 1/1000
        or less; infinite where the product stays larger within T."""
        factors = self.log_growth.exp()
        in_time = torch.cat([factors[:, :1].flip(2), factors[:, 1:]], 1)
        return reading.horizon(in_time, torch.zeros_like(in_time, dtype=torch.bool))

    @cached_property
    def verdicts(self) -> list[list[Verdict]]:
        """The verdict on each layer and direction, over all samples, as in :class:`GradientFlow`;
        growth is exp(lyapunov) over all steps."""
        whole = self.flow.pooled()
        return reading.judge(
            self.lyapunov,
            whole.gain,
            whole.entries,
            whole.nonfinite_state,
            whole.nonfinite_grad,
            self.flow.cell,
        )

    @property
    def verdict(self) -> Verdict:
        """The worst of the verdicts; among equals, that of the layer nearest to the input."""
        return reading.worst(self.verdicts)

    @property
    def advice(self) -> tuple[str, ...]:
        """Remedies for the verdict; empty where it is healthy."""
        return reading.advice(self.verdict.word, self.flow.network)

    @property
    def first_nonfinite(self) -> NonFinite | None:
        """The place where inf or NaN began, in real time, as in :class:`GradientFlow`; None where
        all is finite."""
        return self.flow.first_nonfinite

    # ------------------------------------------------------------------------- text and a picture

    @cached_property
    def summary(self) -> str:
        """The verdict in a sentence for readers who know nothing of gradients."""
        worst, steps = self.verdict, self._longest
        where = f"layer {text.name_of(worst.layer, worst.direction)}"
        if worst.word == "non-finite":
            return f"{worst.evidence}: no other number here means anything."
        if worst.word == "dead":
            return (
                f"Hardly any unit of {where} is active: the others put out 0 for any input, and no "
                "learning signal passes through them."
            )
        if worst.word == "saturated":
            return (
                f"The units of {where} are at the flat ends of {self.flow.network['nonlinearity']}:"
                " hardly any learning signal passes through them."
            )
        if worst.word == "unknown":
            return f"Nothing can be said: {worst.evidence}."
        if worst.word == "vanishing":
            return self._forgetting(where)
        growth = reading.power(self.lyapunov[worst.layer, worst.direction].item() * steps)
        moves = (
            f"The input of {self._subject(worst)} at a step moves its state {_steps(steps)} later "
            f"{'' if growth == '1' else f'{growth} times '}as much as at once"
        )
        if worst.word == "exploding":
            return f"{moves}: a small change of a weight changes all later states."
        return f"{moves}: nothing here keeps it from learning to remember for so long."

    def _forgetting(self, where: str) -> str:
        """The summary of a vanishing gradient. A network remembers as long as its best layer."""
        rates = self.lyapunov.nan_to_num(nan=-torch.inf)
        best = divmod(int(rates.argmax()), rates.shape[1])
        half_life, horizon = self.half_life[best].item(), self.horizon[best].item()
        life = f"half-life {_steps(half_life)}" if math.isfinite(half_life) else "without decay"
        if self.verdicts[best[0]][best[1]].word != "vanishing":
            worst = self.half_life[self.verdict.layer, self.verdict.direction].item()
            return (
                f"{where.capitalize()} forgets its input: half of it is gone after "
                f"{_steps(worst)}, half of the rest after as many more. "
                f"Layer {text.name_of(*best)} keeps it ({life})."
            )
        if self.lyapunov.numel() > 1:
            life += ", the longest of its layers"
        after = _steps(horizon) if math.isfinite(horizon) else f"over {_steps(self._longest)}"
        return (
            f"The input of {self._subject(self.verdicts[best[0]][best[1]])} at a step moves its "
            f"state {after} later a thousand times less than at once ({life}): it will hardly "
            "learn to remember longer than that."
        )

    def _subject(self, verdict: Verdict) -> str:
        if self.lyapunov.numel() == 1:
            return "this network"
        return f"layer {text.name_of(verdict.layer, verdict.direction)}"

    @cached_property
    def notes(self) -> list[str]:
        """Limits of the numbers: steps out of range, and resets."""
        found = []
        for (i, d), outside in _by_layer(self.out_of_range):
            if outside.any():
                found.append(
                    f"layer {text.name_of(i, d)} is out of range from lag "
                    f"{int(outside.int().argmax())} on: the norm is below {self.flow.smallest:g}"
                )
        reached = self._there.sum(1)  # [D, B]
        for d, stopped in enumerate(reached < self._lengths):
            if stopped.any():
                way = "the way back in reverse" if d else "the way back"
                found.append(
                    f"a reset ends {way} of {int(stopped.sum())} of {self._samples} samples, "
                    f"the first after {_steps(int(reached[d][stopped].min()) - 1)}"
                )
        return found

    def __repr__(self) -> str:
        return text.as_text(self._title(), self._rows(), self._remarks(), self.flow.cell.gain_name)

    def __rich__(self):
        return text.as_table(self._title(), self._rows(), self._remarks(), self.flow.cell.gain_name)

    def _remarks(self) -> list[str]:
        return [self.summary, *self.notes, *text.to_try(self.advice)]

    def _rows(self) -> list[tuple[str, ...]]:
        gain = self.flow.pooled().gain
        return text.rows_of(self.verdicts, self.half_life, self.horizon, gain, self._longest)

    def _title(self) -> str:
        plural = "s" if self._samples > 1 else ""
        return f"Gradient probe over {_steps(self._longest + 1)}, {self._samples} sample{plural}"

    def plot(self) -> Picture:
        """A matplotlib.figure.Figure: for each layer and direction the norm over the lag, with
        half-life and horizon. A notebook shows it; savefig(path) writes a file.

        Raises:
            ModuleNotFoundError: matplotlib is not installed (``pip install rnnfast[plots]``).
        """
        need("matplotlib", "plots", "plot()")
        from .picture import draw_probes

        return draw_probes({"": self})

    def to_dict(self) -> dict:
        """All numbers and words but ``flow`` as JSON takes them: lists for tensors, None for NaN,
        "inf" and "-inf"."""
        return text.plain(
            {
                "network": dict(self.flow.network),
                "summary": self.summary,
                "notes": self.notes,
                "half_life": self.half_life,
                "horizon": self.horizon,
                "lyapunov": self.lyapunov,
                "verdicts": [[v._asdict() for v in layer] for layer in self.verdicts],
                "advice": self.advice,
                "first_nonfinite": self.first_nonfinite and self.first_nonfinite._asdict(),
                "norm": self.norm,
                "log_growth": self.log_growth,
                "out_of_range": self.out_of_range,
                "samples": self.samples,
            }
        )

    # ------------------------------------------------------------------------------- lags and time

    @cached_property
    def _lengths(self) -> Tensor:  # [B]
        return (self.flow.entries[0, 0] > 0).sum(0)

    @property
    def _samples(self) -> int:
        """The number of samples with a step."""
        return int((self._lengths > 0).sum())

    @property
    def _longest(self) -> int:
        """The largest lag that any sample has."""
        return int(self._lengths.max()) - 1

    def _by_lag(self, x: Tensor) -> Tensor:
        """x [L, D, T, B], from real time to lags. Behind a sample's first step the values mean
        nothing."""
        lags = torch.arange(x.shape[2], device=x.device).unsqueeze(1)
        steps = (self._lengths - 1 - lags).clamp(min=0)  # [T, B]
        forward = x[:, 0].gather(1, steps.expand(x.shape[0], -1, -1)).unsqueeze(1)
        return torch.cat([forward, x[:, 1:]], 1)

    @cached_property
    def _there(self) -> Tensor:
        """[D, T, B] whether the sample has the lag, in the segment of its last step."""
        carried = self._by_lag(self.flow.carried[-1:])[0] > 0
        carried[:, 0] = True
        lags = torch.arange(carried.shape[1], device=carried.device).unsqueeze(1)
        return carried.cummin(1).values & (lags < self._lengths)

    @cached_property
    def _logs(self) -> Tensor:
        """[L, D, T, B] logarithm of the factor from each lag to the next; NaN without a factor."""
        norm = self._by_lag(self.flow.memory.sent)
        before = torch.cat([torch.zeros_like(norm[:, :, :1]), norm[:, :, :-1]], 2)
        known = self._there & (before >= self.flow.smallest)
        return torch.where(known, self._by_lag(self.flow.factors), torch.nan).log()


def _finite(logs: Tensor) -> Tensor:
    return torch.where(logs == -torch.inf, torch.nan, logs)


def _by_layer(x: Tensor) -> list[tuple[tuple[int, int], Tensor]]:
    """The pairs ((layer, direction), x[layer, direction])."""
    return [((i, d), x[i, d]) for i in range(x.shape[0]) for d in range(x.shape[1])]


def _steps(n: float) -> str:
    number = text.number_of_steps(n)
    return f"{number} step{'' if number == '1' else 's'}"
