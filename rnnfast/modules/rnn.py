"""The drop-in for torch.nn.RNN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import Unpack

from ..backends import Problem, check_nonlinearity, cuda, select, told_rows, torch_native
from ..choices import Backend, Init, NoMore, Nonlinearity, Norm, TrackGradientFlow
from ..compiler import as_leaf, cannot_script, eager, makes_program
from ..functional import check_lengths, check_options, check_reset
from ..gradient_flow import GradientFlow, NoGradientFlow, read
from ..ops import layer
from ..recurrence import precision, record
from ..recurrence.groups import Options, Rows, States
from ..recurrence.groups import Weights as LayerWeights
from ..recurrence.loop import in_transform
from ..recurrence.tensors import without_padding
from ..values import has_values
from . import wavefront
from .batch_norm import BatchNorm
from .init import reset
from .packing import Packing, dropped
from .settings import CHECKS, CHOICES, MODES, check_bool, check_choice, warn_of_idle_residual
from .weights import Weights

PLAIN = {  # what extra_repr leaves out
    "norm": None,
    "norm_eps": 1e-5,
    "init": "torch",
    "residual": False,
    "num_heads": 1,
    "track_gradient_flow": False,
    "clip_state_grad": None,
    "bptt_window": None,
    "backend": "auto",
}
ROOM = 4096  # points of a direction, [T] or [T, B], that a new record has room for


class RNN(Weights):
    """Elman RNN with fused forward and backpropagation through time; takes the place of nn.RNN.

    Arguments, parameter names, shapes, state_dict, initial values under a seed, error types,
    PackedSequence, unbatched input and dropout between layers are those of
    :class:`torch.nn.RNN`. It is an ``nn.RNNBase`` and no ``nn.RNN``, because torch.compile breaks
    the graph at every nn.RNN.

        h_t = f(n_t),  n_t = a_t = x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh    (Elman 1990)

    and with norm="layer", mean and variance over the units of each head (Ba et al. 2016):

        n_t = norm_weight * (a_t - mean(a_t)) / sqrt(var(a_t) + norm_eps) + norm_bias

    Args:
        nonlinearity: "tanh", "relu", or "sigmoid" (which nn.RNN has not).
        norm: "layer" adds the parameters norm_weight_l0 and norm_bias_l0 [H]. "batch" normalizes
            x_t W_ih^T over the valid points of the batch, before the biases (Laurent et al. 2015),
            and adds those and, as nn.BatchNorm1d, running statistics (momentum 0.1), which
            torch.optim.swa_utils.update_bn finds; nn.SyncBatchNorm is refused. bias=False leaves
            norm_bias out.
        norm_eps: what is added to the variance.
        init: "torch", "orthogonal", "identity", "glorot" or "he"; see :mod:`rnnfast.modules.init`.
        residual: add to the input of layer l + 1 the input of layer l where their widths agree;
            h_n is taken before the sum. Warns where no layer before the last has such an input.
        num_heads: as many independent recurrences of H / num_heads units side by side:
            weight_hh_l0 is [H, H / num_heads], the rows of a head acting on its own units.
        track_gradient_flow: True measures the gradient at every time step as backward passes
            (:attr:`gradient_flow`), "sample" for each row of the batch.
        clip_state_grad: scale dL/dh_t of each row and head down to this norm, 1e-30 or more, at
            every step of backward (of the scaled loss, under a GradScaler). One that is inf or NaN
            stays.
        bptt_window: truncated BPTT: no gradient crosses between steps t - 1 and t for
            t = k, 2 k, ...
        backend: "auto", "cpu", "cuda", "triton", "torch" or "reference". A named one serves or
            raises; :func:`rnnfast.explain` says what "auto" takes and why.

    An argument that is set later is checked then. The parameters were made for num_layers, bias,
    bidirectional, num_heads and norm, which cannot be set; input_size and hidden_size follow the
    weights.

    Raises:
        TypeError, ValueError: as nn.RNN does, in its order.
    """

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
        if unknown:
            name = next(iter(unknown))
            raise TypeError(f"RNN.__init__() got an unexpected keyword argument '{name}'")
        for name, value in zip(CHOICES, (norm, init, track_gradient_flow, backend), strict=True):
            check_choice(name, value)
        check_bool("residual", residual)
        self.nonlinearity = nonlinearity
        self.norm = norm
        self.norm_eps = norm_eps
        self.init = init
        self.residual = residual
        self.num_heads = num_heads
        self.track_gradient_flow = track_gradient_flow
        self.clip_state_grad = clip_state_grad
        self.bptt_window = bptt_window
        self.backend = backend
        self._complete = False  # the base resets the parameters before all of them are there
        super().__init__(
            "RNN_TANH",  # the base knows no sigmoid
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )
        self.mode = MODES[nonlinearity]
        check_options(
            hidden_size, num_heads, norm == "layer", norm_eps, bptt_window, clip_state_grad
        )
        if residual:
            warn_of_idle_residual(self, stacklevel=2)
        self._add_parameters({"device": device, "dtype": dtype})
        self._complete = True
        self.reset_parameters()
        self._records = self._new_records()

    def __setattr__(self, name: str, value: object) -> None:
        """
        Raises:
            TypeError, ValueError: an argument of the constructor cannot have that value, or cannot
                be set later.
        """
        if isinstance(value, nn.Module):
            self._check_child(name, value)
        checked = name in CHECKS and self.__dict__.get("_complete", False)
        if checked:
            before = getattr(self, name)
            CHECKS[name](self, name, value)
        # Not nn.RNNBase's, which looks for each name in its list of the weights.
        super(nn.RNNBase, self).__setattr__(name, value)
        if checked and value != before:
            self._follow(name)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        self._check_child(name, module)
        super().add_module(name, module)

    def _check_child(self, name: str, module: nn.Module | None) -> None:
        """
        Raises:
            TypeError: it would take the place of a batch norm, as a SyncBatchNorm does.
        """
        if not isinstance(self.__dict__.get("_modules", {}).get(name), BatchNorm):
            return
        if module is None or not any(isinstance(part, BatchNorm) for part in module.modules()):
            raise TypeError(
                f"{name}: given {type(module).__name__}, wanted the batch norm of rnnfast.RNN that "
                'norm="batch" computes with: it has no statistics over several processes and takes '
                "no other norm"
            )

    def _follow(self, name: str) -> None:
        """Brings up to date whatever else says what an argument does that was set."""
        if name == "nonlinearity":
            self.__dict__["mode"] = MODES[self.nonlinearity]
        elif name == "mode":
            nonlinearity = next(f for f, mode in MODES.items() if mode == self.mode)
            self.__dict__["nonlinearity"] = nonlinearity
        elif name == "track_gradient_flow" and self.track_gradient_flow:
            self._records = self._new_records()  # of the batch, or of its rows
        elif name == "norm_eps":
            for module in self.modules():
                if isinstance(module, BatchNorm):
                    module.eps = self.norm_eps

    def _new_records(self) -> list[list[Tensor]]:
        """One list per layer of buffers (:mod:`rnnfast.recurrence.record`); the last of each
        device is in use."""
        layers = self.num_layers if self.track_gradient_flow else 0
        device = self._device()
        if device is None:
            return [[] for _ in range(layers)]
        room = record.numbers(2 if self.bidirectional else 1, ROOM, 1)
        return [[record.make(room, device)] for _ in range(layers)]

    def _add_parameters(self, factory: dict) -> None:
        """What nn.RNN does not have, and weight_hh of several heads."""
        H = self.hidden_size
        for names in self._all_weights:
            suffix = names[0].removeprefix("weight_ih")
            if self.num_heads > 1:
                weight = torch.empty(H, H // self.num_heads, **factory)
                setattr(self, names[1], nn.Parameter(weight))
            if self.norm is None:
                continue
            setattr(self, f"norm_weight{suffix}", nn.Parameter(torch.empty(H, **factory)))
            if self.bias:
                setattr(self, f"norm_bias{suffix}", nn.Parameter(torch.empty(H, **factory)))
            if self.norm == "batch":
                for name in ("mean", "var"):
                    self.register_buffer(f"norm_running_{name}{suffix}", torch.empty(H, **factory))
                batches = torch.empty((), dtype=torch.int64, device=factory["device"])
                self.register_buffer(f"norm_num_batches_tracked{suffix}", batches)
                norm = BatchNorm(H, self.norm_eps, self._buffers, suffix)
                setattr(self, f"batch_norm{suffix}", norm)

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
            reset: bool, shaped like the first two axes of input ([T] unbatched; [T, B], in the
                order of the samples, where it is packed): the step is the first of a new segment.
                Nothing crosses between it and the step before, neither state nor gradient, in
                either direction; at the first step it drops hx.
            lengths: [B] in 0..T, for padded input: a list, an array or a tensor of any integer
                dtype. Steps from lengths[b] on leave the state as it is, put out 0 and take no
                gradient; the reverse direction begins at lengths[b] - 1. A tensor on a GPU, and one
                where torch.compile, torch.export or torch.jit.trace records the call, is clamped,
                not checked.

        Returns:
            output, like input with D * H features, and h_n, like hx. Both lie in memory as
            nn.RNN's do: output is dense in the order [T, B, D * H], with batch_first, too. As with
            cuDNN, backward reads output: PyTorch refuses backward after a write into it
            (``output += x``).

        Raises:
            RuntimeError, ValueError: as nn.RNN does; ValueError, TypeError for lengths and reset.
        """
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError("lengths: a PackedSequence has its own")
            return self._forward_packed(input, hx, reset)
        if not (isinstance(input, Tensor) and (hx is None or isinstance(hx, Tensor))):
            traced = as_leaf(self, RNN.forward, hx=hx, input=input, lengths=lengths, reset=reset)
            if traced is not None:
                return traced
        if input.dim() not in (2, 3):
            raise ValueError(
                f"RNN: Expected input to be 2D or 3D, got {input.dim()}D tensor instead"
            )
        batched = input.dim() == 3
        if hx is not None and hx.dim() != input.dim():
            kind, d = ("batched", 3) if batched else ("unbatched", 2)
            raise RuntimeError(
                f"For {kind} {d}-D input, hx should also be {d}-D but got {hx.dim()}-D tensor"
            )
        batch_dim = 0 if self.batch_first else 1
        if not batched:
            if lengths is not None:
                raise ValueError("lengths: unbatched input has one length, that of its first axis")
            input = input.unsqueeze(batch_dim)
            hx = None if hx is None else hx.unsqueeze(1)
        self._check(input, hx, None)
        T, B = input.shape[1 - batch_dim], input.shape[batch_dim]
        if T == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        lengths = check_lengths(lengths, T, B, input.device)
        if reset is not None:
            shape, what = ((B, T), "[B, T]") if self.batch_first else ((T, B), "[T, B]")
            shape, what = (shape, what) if batched else ((T,), "[T]")
            reset = check_reset(reset, shape, what, input.device)
            reset = reset.unsqueeze(1) if not batched else reset.T if self.batch_first else reset
        output, h_n = self._layers(input, hx, lengths, reset, self.batch_first)
        return (output, h_n) if batched else (output.squeeze(batch_dim), h_n.squeeze(1))

    @eager(
        "the sizes of a PackedSequence depend on the values of its lengths; rnnfast.RNN takes "
        "padded input with lengths= into a graph"
    )
    def _forward_packed(
        self, packed: PackedSequence, hx: Tensor | None, reset: Tensor | None
    ) -> tuple[PackedSequence, Tensor]:
        data, batch_sizes, sorted_indices, unsorted_indices = packed
        self._check(data, hx, batch_sizes)
        T, B = batch_sizes.numel(), int(batch_sizes[0])
        reset = check_reset(reset, (T, B), "[T, B]", data.device)
        if self._backend(data, reset, B) == "torch":
            hx = hx if hx is None else self.permute_hidden(hx, sorted_indices)
            hx = self._zeros(data, batch_sizes[0]) if hx is None else hx  # B would stay, in a trace
            output, h_n = torch_native.packed_layers(
                f"rnn_{self.nonlinearity}", data, hx, batch_sizes, self._torch_options()
            )
        else:
            padded, lengths = torch._VF._pad_packed_sequence(data, batch_sizes, False, 0.0, T)
            if self.track_gradient_flow == "sample" and sorted_indices is not None:
                # The record is of the samples in their own order.
                in_order = lengths[unsorted_indices.cpu()].to(data.device)
                packing = Packing(batch_sizes, data.shape[0], unsorted_indices)
                inputs = padded[:, unsorted_indices], hx, in_order, reset, False
                output, h_n = self._layers(*inputs, packing)
                output, h_n = output[:, sorted_indices], h_n[:, sorted_indices]
            else:
                if sorted_indices is not None:
                    hx = hx if hx is None else self.permute_hidden(hx, sorted_indices)
                    reset = reset if reset is None else reset[:, sorted_indices]
                packing = Packing(batch_sizes, data.shape[0])
                inputs = padded, hx, lengths.to(data.device), reset, False
                output, h_n = self._layers(*inputs, packing)
            output, _ = torch._VF._pack_padded_sequence(output, lengths, False)
        output = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        return output, self.permute_hidden(h_n, unsorted_indices)

    def _check(self, input: Tensor, hx: Tensor | None, batch_sizes: Tensor | None) -> None:
        """nn.RNN's checks, in its order, before anything runs."""
        self.check_input(input, batch_sizes)
        if hx is not None:
            self.check_hidden_size(hx, self.get_expected_hidden_size(input, batch_sizes))
            if hx.dtype != input.dtype and not torch._C._is_any_autocast_enabled():
                raise RuntimeError(f"hx: given {hx.dtype}, wanted {input.dtype} as input has")
            if hx.device != input.device:
                raise RuntimeError(
                    "Input and hidden tensors are not at the same device, found input tensor at "
                    f"{input.device} and hidden tensor at {hx.device}"
                )
        weight = self._weight("weight_ih_l0")
        if weight.device != input.device:
            raise RuntimeError(
                "Input and parameter tensors are not at the same device, found input tensor at "
                f"{input.device} and parameter tensor at {weight.device}"
            )

    def _problem(
        self, input: Tensor, reset: Tensor | None = None, rows: int | None = None
    ) -> Problem:
        """rows: the size of the batch, where input does not tell."""
        device = input.device.type
        dtype = precision.autocast_dtype(device) or input.dtype
        beyond = {
            "residual": self.residual,
            "norm": self.norm,
            "num_heads": self.num_heads > 1,
            "reset": reset is not None,
            "bptt_window": self.bptt_window,
            "clip_state_grad": self.clip_state_grad,
            "track_gradient_flow": self.track_gradient_flow,
        }
        names = tuple(name for name, used in beyond.items() if used)
        if rows is None:
            rows = 1 if input.dim() == 2 else input.shape[0 if self.batch_first else 1]
        groups = (2 if self.bidirectional else 1) * self.num_heads
        size = self.hidden_size // self.num_heads, groups, told_rows(rows), input.device.index
        return Problem(device, dtype, f"rnn_{self.nonlinearity}", False, names, *size)

    def _backend(self, input: Tensor, reset: Tensor | None, rows: int | None = None) -> str:
        """The backend of this call; in a transform the eager formula, not torch's stack."""
        chosen = select(self.backend, self._problem(input, reset, rows))
        return "reference" if chosen == "torch" and in_transform() else chosen

    def _layers(
        self,
        u: Tensor,
        hx: Tensor | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        batch_first: bool,
        packing: Packing | None = None,
    ) -> tuple[Tensor, Tensor]:
        """u [T, B, I], or [B, T, I] with batch_first -> output so ordered, h_n [L * D, B, H];
        reset [T, B]. As nn.RNN's, all results are time first in memory."""
        u = u.transpose(0, 1) if batch_first else u
        T, B = u.shape[:2]
        backend = self._backend(u, reset, B)
        if backend == "torch" and lengths is not None and not has_values(lengths):
            # Shapes alone: torch's kernels would sort the lengths on the host. A program refuses.
            backend = "torch" if makes_program() else "reference"
        if backend == "torch":
            hx = self._zeros(u, B) if hx is None else hx
            y, h_n = torch_native.layers(
                f"rnn_{self.nonlinearity}", u, hx, lengths, self._torch_options()
            )
            return (y.transpose(0, 1) if batch_first else y), h_n
        D = 2 if self.bidirectional else 1
        h_n = []
        options = Options(
            f"rnn_{self.nonlinearity}",
            self.num_heads,
            self.norm_eps,
            self.bptt_window,
            self.clip_state_grad,
            self.track_gradient_flow == "sample",
        )
        steps = self._stretch(backend, T, self._problem(u, reset, B))
        if steps:
            weights = []
            for index in range(self.num_layers):
                norm = self._norm_weights(index) if self.norm else (None, None)
                own = precision.autocast(u.device.type, *self._layer_weights(index))
                weights.append(LayerWeights(*own, *norm))
            (hx,) = precision.autocast(u.device.type, hx)
            inputs = (u, hx, weights, Rows(lengths, reset))
            stretches, h_n = wavefront.layers(*inputs, self.residual, options, backend, steps)
            y = torch.cat(stretches)
            return (y.transpose(0, 1) if batch_first else y), h_n
        for index in range(self.num_layers):
            x = u
            h_0 = None if hx is None else hx[index * D : (index + 1) * D]
            weights = self._layer_weights(index)
            norm = None, None
            if self.norm == "batch":
                x, *weights = self._batch_norm(index, x, lengths, weights)
            elif self.norm == "layer":
                norm = self._norm_weights(index)
            *inputs, h_0 = precision.autocast(u.device.type, x, *weights, h_0)
            buffer = self._buffer(index, x) if self.track_gradient_flow else None
            x, *own = inputs
            given = LayerWeights(*own, *norm), States(h_0), Rows(lengths, reset)
            y, (h, _) = layer(x, *given, buffer, options, backend)
            h_n.append(h)
            if index + 1 < self.num_layers:
                if self.dropout and self.training:
                    y = dropped(y, self.dropout, packing)
                u = y + u if self.residual and y.shape == u.shape else y
        y = y.transpose(0, 1) if batch_first else y
        return y, torch.cat(h_n) if len(h_n) > 1 else h_n[0]

    def _stretch(self, backend: str, T: int, problem: Problem) -> int:
        """How many steps a layer takes at a time, so that the next can begin; 0 for all."""
        if not wavefront.ENABLED or backend != "cuda" or self.bidirectional:
            return 0
        one_by_one = (
            self.norm == "batch"  # of all steps at once
            or (self.dropout and self.training)  # whose mask would be another
            or self.track_gradient_flow  # a record is of a whole sequence
            or torch.compiler.is_compiling()
            or torch._C._get_tracing_state() is not None  # a number of stretches is no constant
            or in_transform()
            # Checkpointing computes again in the middle of backward, on whichever lane that is.
            or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        )
        if one_by_one:
            return 0
        step, room = cuda.step_beside_others(problem)
        return wavefront.steps_of_stretch(T, self.num_layers, self.bptt_window, step, room)

    def _layer_weights(self, index: int) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """w_ih, b_ih, b_hh and w_hh of all directions, as autograd.layer takes them."""
        if not self.bidirectional:
            w_ih, w_hh, *biases = map(self._weight, self._all_weights[index])
            return w_ih, *(biases or (None, None)), w_hh
        pairs = zip(self._all_weights[2 * index], self._all_weights[2 * index + 1])
        w_ih, w_hh, *biases = ([self._weight(a), self._weight(b)] for a, b in pairs)
        return (
            torch.cat(w_ih),
            *(map(torch.cat, biases) if biases else (None, None)),
            torch.stack(w_hh),
        )

    def _norm_weights(self, index: int) -> tuple[Tensor, Tensor | None]:
        """norm_weight and norm_bias of all directions, as a norm reads them."""
        found = []
        for kind in ("weight", "bias"):
            each = [self._weight(name) for name in self._norm_names(index, kind)]
            whole = None if each[0] is None else each[0] if len(each) == 1 else torch.cat(each)
            found.append(precision.widened(whole))
        return found[0], found[1]

    def _norm_names(self, index: int, kind: str) -> list[str]:
        suffixes = ["", "_reverse"] if self.bidirectional else [""]
        return [f"norm_{kind}_l{index}{suffix}" for suffix in suffixes]

    def _batch_norm(
        self, index: int, x: Tensor, lengths: Tensor | None, weights: Sequence[Tensor | None]
    ) -> tuple[Tensor, None, None, None, Tensor]:
        """The input projection, normalized, in the place of x and the weights it is made of."""
        w_ih, b_ih, b_hh, w_hh = weights
        u = F.linear(without_padding(x, lengths), w_ih)
        ps = []
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
            ps.append(norm.normalize(part, lengths, weight, bias, running))
        p = torch.cat(ps, -1)
        return (p if b_ih is None else p + (b_ih + b_hh)), None, None, None, w_hh

    def _buffer(self, index: int, x: Tensor) -> Tensor | None:
        """Where backward through this layer puts its record; None where there will be none.

        Raises:
            RuntimeError: a compiler or tracer records this, and there is not room enough.
        """
        program = makes_program()  # whose passes may have gradients, and other sizes
        if not (torch.is_grad_enabled() or program):
            return None
        T, B, _ = x.shape
        N = B if self.track_gradient_flow == "sample" else 1
        size = record.numbers(2 if self.bidirectional else 1, T, N)
        # Replicas of nn.DataParallel share the lists.
        made = [buffer for buffer in self._records[index] if buffer.device == x.device]
        if made and (program or made[-1].numel() >= size):
            return made[-1]
        if program or torch.compiler.is_compiling():
            raise RuntimeError(
                "track_gradient_flow: a compiled graph cannot make room for the record of so "
                "many steps; call the module once on such an input before it is compiled, "
                "exported or traced"
            )
        # Beside those before: what they hold stays, and graphs still to come back write there.
        buffer = record.make(max([size, *(2 * b.numel() for b in made)]), x.device)
        self._records[index].append(buffer)
        return buffer

    def _network(self) -> dict:
        """What a record is of, by the names of the arguments."""
        return {name: getattr(self, name) for name in ("nonlinearity", *PLAIN)}

    def _read_records(self) -> GradientFlow:
        if not self.track_gradient_flow:
            raise NoGradientFlow(
                "gradient_flow: this RNN does not record it; make it with track_gradient_flow=True "
                '(or "sample")'
            )
        if torch._C._len_torch_dispatch_stack() and detect_fake_mode() is not None:
            raise NoGradientFlow("gradient_flow: a record cannot be read under FakeTensorMode")
        found = read(self._records, self.track_gradient_flow == "sample", self._network())
        if found is None:
            raise NoGradientFlow(
                "gradient_flow: no backward pass has come through this RNN yet; call it, and "
                "backward() on a loss made of its results"
            )
        return found

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        if name == "gradient_flow":  # the property has raised, which Python does not pass on
            return self._read_records()
        return super().__getattr__(name)

    def __dir__(self) -> list[str]:
        """Without gradient_flow where there is none: torch.jit and others read all that is here."""
        names = super().__dir__()
        there = hasattr(self, "gradient_flow")
        return names if there else [name for name in names if name != "gradient_flow"]

    @property
    def gradient_flow(self) -> GradientFlow:
        """What the last backward pass through this module measured, at every time step.

        Raises:
            AttributeError, RuntimeError: one error that is both: it was not asked to, or no
                backward pass has come through yet.
        """
        return self._read_records()

    def _torch_options(self) -> tuple:
        return (
            list(map(self._weight, self._flat_weights_names)),
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            bool(self.bidirectional),
        )

    def _zeros(self, like: Tensor, batch: int) -> Tensor:
        D = 2 if self.bidirectional else 1
        return like.new_zeros(self.num_layers * D, batch, self.hidden_size)

    def reset_parameters(self) -> None:
        """Draws new values for all weights and biases, as ``init`` says; a norm starts from the
        beginning. A weight that is pruned or parametrized gets new values below its mask or
        parametrization. The parameters and buffers of a subclass stay as they are."""
        if self._complete:
            reset(self)

    __prepare_scriptable__ = cannot_script(
        "rnnfast.RNN", "; rnnfast.to_torch(model) puts nn.RNN in its place, which scripts"
    )

    def extra_repr(self) -> str:
        s = super().extra_repr()
        if self.nonlinearity != "tanh":
            s += f", nonlinearity={self.nonlinearity!r}"
        for name, plain in PLAIN.items():
            value = getattr(self, name)
            if value != plain:
                s += f", {name}={value!r}"
        return s

    def flatten_parameters(self) -> None:
        """Packs the parameters for cuDNN, where that can serve; otherwise does nothing."""
        if f"rnn_{self.nonlinearity}" in torch_native.KERNELS and self.num_heads == 1:
            super().flatten_parameters()

    def _apply(self, fn, recurse: bool = True) -> RNN:
        super()._apply(fn, recurse)
        device = self._device()
        here = ([buffer.device for buffer in made] for made in self._records)
        if device is not None and any(device not in devices for devices in here):
            self._records = self._new_records()
        return self

    # A record is of passes through this module, not through a copy, and numbered in this process.

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_records": []}

    def __setstate__(self, state: dict) -> None:
        nn.Module.__setstate__(self, state)
        self._records = self._new_records()
