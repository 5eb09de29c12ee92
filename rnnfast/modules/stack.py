"""A stack of layers: directions, dropout, residual connections, and packed input.

A call goes through ``_run``, which checks it, and ``_layers``, which computes it. :func:`run_layer`
is the only place that calls :mod:`rnnfast.ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..backends import Problem, cpu, cuda, rows_for_choice, select, torch_native
from ..functional import check_lengths, check_reset
from ..ops import layer
from ..recurrence import precision
from ..recurrence.clipping import in_transform
from ..recurrence.groups import Options, Rows, States, Weights
from ..recurrence.tensors import sum_of_biases, without_padding
from ..tracing import as_leaf, makes_program
from ..values import has_values
from . import wavefront
from .base import Recurrent
from .dropout import dropped
from .packing import Packing, run_packed

# Arguments that nn.RNN lacks and a backend may not have.
EXTRAS = (
    "return_cell_states",
    "residual",
    "norm",
    "num_heads",
    "reset",
    "bptt_window",
    "clip_state_grad",
    "track_gradient_flow",
)


NOT_CHOSEN = None, "", None


class Call(NamedTuple):
    """The arguments that all layers of a call share."""

    rows: Rows
    options: Options
    backend: str


def run_layer(
    x: Tensor, weights: Weights, states: States, call: Call, buffer: Tensor | None = None
) -> tuple[Tensor, States, Tensor | None]:
    """y [T, B, D * H] of one layer, its states after the last step, and with
    ``call.options.all_cells`` c of all steps. Backward fills ``buffer`` with its record."""
    rows, options, backend = call
    return layer(x, weights, states, rows, buffer, options, backend)


Hx = Tensor | tuple[Tensor, Tensor]  # one state, or h and c


class Stack(Recurrent):
    """Runs all layers of a call.

    A module with one state takes and returns it as a tensor, [L * D, B, H]: hx and h_n. A module
    with several states overrides the methods of the section on states.
    """

    return_cell_states = False  # whether _run returns c of all steps, too

    def _run(
        self,
        input: Tensor | PackedSequence,
        hx: Hx | None,
        lengths: Tensor | Sequence[int] | None,
        reset: Tensor | None,
        forward: Callable,
    ) -> tuple[Any, ...]:
        """The body of ``forward``, the method of the drop-in's class. torch.fx compares it with
        that of the instance's class."""
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError("lengths: a PackedSequence has its own")
            return run_packed(self, input, hx, reset)
        if not (isinstance(input, Tensor) and (hx is None or self._is_state(hx))):
            traced = as_leaf(self, forward, hx=hx, input=input, lengths=lengths, reset=reset)
            if traced is not None:
                return traced
        self._check_axes(input, hx)
        batched = input.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        if not batched:
            if lengths is not None:
                raise ValueError("lengths: unbatched input has one length, that of its first axis")
            input = input.unsqueeze(batch_dim)
            hx = None if hx is None else self._with_batch(hx)
        self._check(input, hx, None)
        u = input.transpose(0, 1) if self.batch_first else input
        T, B = u.shape[:2]
        if T == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        lengths = check_lengths(lengths, T, B, input.device)
        if reset is not None:
            reset = self._reset_in_time(reset, u, batched)
        output, h_n, *cells = self._layers(u, hx, lengths, reset)
        if self.batch_first:
            output, *cells = (y.transpose(0, 1) for y in (output, *cells))
        if batched:
            return output, h_n, *cells
        output, *cells = (y.squeeze(batch_dim) for y in (output, *cells))
        return output, self._without_batch(h_n), *cells

    def _reset_in_time(self, reset: Tensor, u: Tensor, batched: bool) -> Tensor:
        """``reset``, shaped like the input, as [T, B]; u is [T, B, I]."""
        T, B = u.shape[:2]
        if not batched:
            return check_reset(reset, (T,), "[T]", u.device).unsqueeze(1)
        if self.batch_first:
            return check_reset(reset, (B, T), "[B, T]", u.device).T
        return check_reset(reset, (T, B), "[T, B]", u.device)

    # ------------------------------------------------------------------------------------- checks

    def _check(self, input: Tensor, hx: Hx | None, batch_sizes: Tensor | None) -> None:
        """nn.RNN's checks, in its order, before anything runs."""
        weight = self._weight("weight_ih_l0")
        dims = 3 if batch_sizes is None else 2
        fits = input.dim() == dims and input.shape[-1] == self.input_size
        if not fits or input.dtype != weight.dtype:
            self.check_input(input, batch_sizes)  # which lists all weights, and takes a while
        if hx is not None:
            self._check_states(input, hx, batch_sizes)
        if weight.device != input.device:
            raise RuntimeError(
                "Input and parameter tensors are not at the same device, found input tensor at "
                f"{input.device} and parameter tensor at {weight.device}"
            )

    # ----------------------------------------------------- states: hx, h_n, and those of each layer

    def _is_state(self, hx: object) -> bool:
        """Whether it is no proxy of a tracer."""
        return isinstance(hx, Tensor)

    def _check_axes(self, input: Tensor, hx: Hx | None) -> None:
        """
        Raises:
            ValueError, RuntimeError: input or hx is neither batched nor unbatched, or one of each.
        """
        raise NotImplementedError

    def _check_states(self, input: Tensor, hx: Hx, batch_sizes: Tensor | None) -> None:
        self.check_hidden_size(hx, self.get_expected_hidden_size(input, batch_sizes))
        self._check_state(input, hx)

    def _check_state(self, input: Tensor, state: Tensor) -> None:
        if state.dtype != input.dtype and not torch._C._is_any_autocast_enabled():
            raise RuntimeError(f"hx: given {state.dtype}, wanted {input.dtype} as input has")
        if state.device != input.device:
            raise RuntimeError(
                "Input and hidden tensors are not at the same device, found input tensor at "
                f"{input.device} and hidden tensor at {state.device}"
            )

    def _with_batch(self, hx: Hx) -> Hx:
        return hx.unsqueeze(1)

    def _without_batch(self, h_n: Hx) -> Hx:
        return h_n.squeeze(1)

    def _zeros(self, like: Tensor, batch: int) -> Hx:
        D = 2 if self.bidirectional else 1
        return like.new_zeros(self.num_layers * D, batch, self.hidden_size)

    def _states_before(self, index: int, hx: Hx | None) -> States:
        """The states of a layer before the first step."""
        if hx is None:
            return States()
        D = 2 if self.bidirectional else 1
        return States(hx[index * D : (index + 1) * D])

    def _joined(self, states: list[States]) -> Hx:
        """h_n, from the states of each layer after the last step."""
        return torch.cat([h for h, _ in states]) if len(states) > 1 else states[0].h

    # -------------------------------------------------------------------------- choice of backend

    def _problem(
        self, input: Tensor, reset: Tensor | None = None, rows: int | None = None
    ) -> Problem:
        """The facts on which the choice of a backend for this call depends.

        Args:
            rows: the size of the batch; None reads it from the shape of input.
        """
        device = input.device.type
        dtype = precision.autocast_dtype(device) or input.dtype
        used = (
            self.return_cell_states,
            self.residual,
            self.norm,
            self.num_heads > 1,
            reset is not None,
            self.bptt_window,
            self.clip_state_grad,
            self.track_gradient_flow,
        )
        extras = tuple(name for name, value in zip(EXTRAS, used) if value) if any(used) else ()
        if rows is None:
            rows = 1 if input.dim() == 2 else input.shape[0 if self.batch_first else 1]
        groups = (2 if self.bidirectional else 1) * self.num_heads
        size = self.hidden_size // self.num_heads, groups, rows_for_choice(rows), input.device.index
        return Problem(device, dtype, self._cell(), False, extras, *size, bool(self.proj_size))

    def _backend(self, problem: Problem) -> str:
        """The backend of this call. Inside a transform of torch.func the eager formula takes the
        place of torch's stack."""
        chosen = select(self.backend, problem)
        return "reference" if chosen == "torch" and in_transform() else chosen

    def _choice(self, u: Tensor, reset: Tensor | None, rows: int) -> tuple[Options, str, Problem]:
        """The settings of the recurrence, the backend of this call, and the facts it depends on. On
        the CPU these facts are few, and the choice is remembered: a small call has microseconds."""
        options = Options(
            self._cell(),
            2 if self.bidirectional else 1,
            self.num_heads,
            self.norm_eps,
            self.bptt_window,
            self.clip_state_grad,
            self.track_gradient_flow == "sample",
        )
        key = None
        if u.is_cpu and not torch.compiler.is_compiling():
            facts = u.dtype, reset is None, precision.autocast_dtype("cpu"), cpu._C is None
            settings = self.backend, self.norm, self.residual, self.track_gradient_flow
            settings += (self.return_cell_states,)
            key = options, *settings, *facts
            remembered, choice, problem = self.__dict__.get("_chosen", NOT_CHOSEN)
            if remembered == key:
                return options, choice, problem
        problem = self._problem(u, reset, rows)
        choice = self._backend(problem)
        if key is not None and choice == "cpu":
            self.__dict__["_chosen"] = key, choice, problem
        return options, choice, problem

    def _torch_options(self) -> tuple:
        return (
            list(map(self._weight, self._flat_weights_names)),
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            bool(self.bidirectional),
        )

    # ------------------------------------------------------------------------------------- layers

    def _layers(
        self,
        u: Tensor,
        hx: Hx | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        packing: Packing | None = None,
    ) -> tuple[Any, ...]:
        """u [T, B, I] -> output [T, B, D * H], h_n [L * D, B, H], and with return_cell_states c
        like output; reset is [T, B]. The results are time first in memory, as nn.RNN's are."""
        T, B = u.shape[:2]
        options, backend, problem = self._choice(u, reset, B)
        if backend == "torch" and lengths is not None and not has_values(lengths):
            # torch's kernels would sort lengths that have no values; a program refuses to.
            backend = "torch" if makes_program() else "reference"
        if backend == "torch":
            hx = self._zeros(u, B) if hx is None else hx
            return torch_native.layers(self._cell(), u, hx, lengths, self._torch_options())
        call = Call(Rows(lengths, reset), options, backend)
        steps = self._stretch(backend, T, problem)
        if steps:
            return self._side_by_side(u, hx, call, steps)
        return self._one_by_one(u, hx, call, packing)

    def _one_by_one(
        self, u: Tensor, hx: Hx | None, call: Call, packing: Packing | None
    ) -> tuple[Any, ...]:
        last = []
        for index in range(self.num_layers):
            x = u
            if self.return_cell_states and index + 1 == self.num_layers:
                call = call._replace(options=call.options._replace(all_cells=True))
            weights = self._layer_weights(index)
            norm = None, None
            if self.norm == "batch":
                x, weights = self._batch_norm(index, x, call.rows.lengths, weights)
            elif self.norm == "layer":
                norm = self._norm_weights(index)
            h_0 = self._states_before(index, hx)
            if torch._C._is_any_autocast_enabled():
                x, *cast = precision.autocast(x.device.type, x, *weights, *h_0)
                weights, h_0 = cast[:4], cast[4:]
            weights = Weights(*weights, *norm)
            buffer = self._buffer(index, x) if self.track_gradient_flow else None
            y, states, cells = run_layer(x, weights, States(*h_0), call, buffer)
            last.append(states)
            if index + 1 < self.num_layers:
                if self.dropout and self.training:
                    y = dropped(y, self.dropout, packing)
                u = y + u if self.residual and y.shape == u.shape else y
        return (y, self._joined(last)) if cells is None else (y, self._joined(last), cells)

    def _batch_norm(
        self, index: int, x: Tensor, lengths: Tensor | None, weights: Sequence[Tensor | None]
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Batch-normalizes x W_ih^T and returns it as p, with the weights that the layer still
        needs: w_hh alone."""
        w_ih, b_ih, b_hh, w_hh = weights
        u = F.linear(without_padding(x, lengths), w_ih)
        parts = []
        for d, part in enumerate(u.split(self.hidden_size, -1)):
            running = tuple(
                self._buffers[self._norm_names(index, kind)[d]]
                for kind in ("running_mean", "running_var", "num_batches_tracked")
            )
            weight, bias = (
                precision.widened(self._weight(self._norm_names(index, kind)[d]))
                for kind in ("weight", "bias")
            )
            norm = self._modules[f"batch_norm_l{index}{'_reverse' if d else ''}"]
            parts.append(norm.normalize(part, lengths, weight, bias, running))
        p = torch.cat(parts, -1)
        return (p if b_ih is None else p + sum_of_biases(b_ih, b_hh)), (None, None, None, w_hh)

    # ----------------------------------------------------------- layers side by side (wavefront.py)

    def _stretch(self, backend: str, T: int, problem: Problem) -> int:
        """How many steps a layer computes before the next layer begins; 0: all of them."""
        if not wavefront.ENABLED or backend != "cuda" or self.bidirectional:
            return 0
        one_by_one = (
            self.norm == "batch"  # its statistics are of all steps
            or (self.dropout and self.training)  # nn.RNN draws one mask for all steps
            or self.track_gradient_flow  # a record is of a whole sequence
            or torch.compiler.is_compiling()
            or torch._C._get_tracing_state() is not None  # a number of stretches is no constant
            or in_transform()
            # Checkpointing computes again in the middle of backward, on the stream of any layer.
            or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        )
        if one_by_one:
            return 0
        step, room = cuda.overlap_capacity(problem)
        return wavefront.steps_of_stretch(T, self.num_layers, self.bptt_window, step, room)

    def _side_by_side(
        self, x: Tensor, hx: Tensor | None, call: Call, steps: int
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`_one_by_one`, in stretches of ``steps`` time steps."""
        weights = []
        for index in range(self.num_layers):
            norm = self._norm_weights(index) if self.norm else (None, None)
            own = precision.autocast(x.device.type, *self._layer_weights(index))
            # Views, so that gradients come to the parameters on the caller's stream.
            weights.append(_views(Weights(*own, *norm)))
        (lengths, reset), window = call.rows, call.options.bptt_window
        starts = range(0, x.shape[0], steps)
        left = {t: None if lengths is None else (lengths - t).clamp(0, steps) for t in starts}

        def compute(
            index: int, u: Tensor, h_0: Tensor | None, span: slice
        ) -> tuple[Tensor, Tensor]:
            if span.start == 0:  # views again, so that the layer's stream adds up its stretches
                weights[index] = _views(weights[index])
            rows = Rows(left[span.start], None if reset is None else reset[span])
            if window and span.start:  # an edge, except in rows that have ended
                cut = h_0.detach()
                goes_on = None if rows.lengths is None else rows.lengths[:, None] > 0
                h_0 = cut if goes_on is None else torch.where(goes_on, cut, h_0)
            (cast,) = precision.autocast(u.device.type, u)
            y, (h_n, _), _ = run_layer(cast, weights[index], States(h_0), call._replace(rows=rows))
            through = self.residual and index + 1 < len(weights) and y.shape == u.shape
            return (y + u if through else y), h_n

        (hx,) = precision.autocast(x.device.type, hx)
        states = [None] * len(weights) if hx is None else list(hx.split(1))
        reads = [*(w for own in weights for w in own), *left.values(), reset]
        stretches, states = wavefront.wavefront(x, states, steps, compute, reads)
        return torch.cat(stretches), torch.cat(states)


def _views(weights: Weights) -> Weights:
    return Weights(*(None if w is None else w.view_as(w) for w in weights))
