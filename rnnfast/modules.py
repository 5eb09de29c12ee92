"""The drop-in for torch.nn.RNN."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import precision
from .autograd import in_transform, layer
from .backends import BACKENDS, Problem, check_nonlinearity, select, torch_native
from .functional import check_lengths
from .init import INITS

MODES = {"tanh": "RNN_TANH", "relu": "RNN_RELU", "sigmoid": "RNN_SIGMOID"}


class RNN(nn.RNNBase):
    """Elman RNN with fused forward and backpropagation through time; takes the place of nn.RNN.

    Arguments, parameter names, shapes, state_dict, initial values under a seed, error types,
    PackedSequence, unbatched input and dropout between layers are those of
    :class:`torch.nn.RNN`. It is an ``nn.RNNBase`` and no ``nn.RNN``, because torch.compile breaks
    the graph at every nn.RNN.

        h_t = f(x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh)             (Elman 1990)

    Args:
        nonlinearity: "tanh", "relu", or "sigmoid" (which nn.RNN has not).
        init: "torch", "orthogonal", "identity", "glorot" or "he"; see :mod:`rnnfast.init`.
        residual: add to the input of layer l + 1 the input of layer l where their widths agree;
            h_n is taken before the sum.
        backend: "auto", "cpu", "torch" or "reference". A named one serves or raises;
            :func:`rnnfast.explain` says what "auto" takes and why.

    Raises:
        TypeError, ValueError: as nn.RNN does, in its order.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device=None,
        dtype=None,
        *,
        init: str = "torch",
        residual: bool = False,
        backend: str = "auto",
        **unknown,
    ) -> None:
        if "proj_size" in unknown:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        check_nonlinearity(nonlinearity)
        if unknown:
            name = next(iter(unknown))
            raise TypeError(f"RNN.__init__() got an unexpected keyword argument '{name}'")
        if init not in list(INITS):
            raise ValueError(f"init: given {init!r}, wanted one of {list(INITS)}")
        if not isinstance(residual, bool):
            raise TypeError(f"residual should be of type bool, got: {type(residual).__name__}")
        if backend not in ["auto", *BACKENDS]:
            raise ValueError(f"backend: given {backend!r}, wanted one of {['auto', *BACKENDS]}")
        self.nonlinearity = nonlinearity
        self.init = init
        self.residual = residual
        self.backend = backend
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

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Runs all layers.

        Args:
            input: [T, B, I], [B, T, I] with batch_first, [T, I] unbatched, or packed.
            hx: [L * D, B, H], or [L * D, H] unbatched; never batch-first; None for zeros.
            lengths: [B] in 0..T, a list or an int64 tensor, for padded input: steps from lengths[b]
                on leave the state as it is, put out 0 and take no gradient; the reverse direction
                begins at lengths[b] - 1. On a GPU, and in torch.compile, they are clamped, not
                checked.

        Returns:
            output, like input with D * H features, and h_n, like hx.

        Raises:
            RuntimeError, ValueError: as nn.RNN does; ValueError for lengths.
        """
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError("lengths: a PackedSequence has its own")
            return self._forward_packed(input, hx)
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
        output, h_n = self._layers(input, hx, lengths, self.batch_first)
        return (output, h_n) if batched else (output.squeeze(batch_dim), h_n.squeeze(1))

    def _forward_packed(
        self, packed: PackedSequence, hx: Tensor | None
    ) -> tuple[PackedSequence, Tensor]:
        data, batch_sizes, sorted_indices, unsorted_indices = packed
        self._check(data, hx, batch_sizes)
        if hx is not None:
            hx = self.permute_hidden(hx, sorted_indices)
        if self._backend(data) == "torch":
            hx = self._zeros(data, int(batch_sizes[0])) if hx is None else hx
            output, h_n = torch_native.packed_layers(
                self.nonlinearity, data, hx, batch_sizes, self._torch_options()
            )
        else:
            T = batch_sizes.numel()
            padded, lengths = torch._VF._pad_packed_sequence(data, batch_sizes, False, 0.0, T)
            output, h_n = self._layers(padded, hx, lengths.to(data.device), False)
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

    def _problem(self, input: Tensor) -> Problem:
        device = input.device.type
        dtype = precision.autocast_dtype(device) or input.dtype
        return Problem(device, dtype, self.nonlinearity, projected=False, residual=self.residual)

    def _backend(self, input: Tensor) -> str:
        """The backend of this call; in a transform the eager formula, not torch's stack."""
        chosen = select(self.backend, self._problem(input))
        return "reference" if chosen == "torch" and in_transform() else chosen

    def _layers(
        self, u: Tensor, hx: Tensor | None, lengths: Tensor | None, batch_first: bool
    ) -> tuple[Tensor, Tensor]:
        """u [T, B, I], or [B, T, I] with batch_first -> output so ordered, h_n [L * D, B, H]."""
        backend = self._backend(u)
        if backend == "torch":
            x = u.transpose(0, 1) if batch_first else u
            hx = self._zeros(x, x.shape[1]) if hx is None else hx
            y, h_n = torch_native.layers(self.nonlinearity, x, hx, lengths, self._torch_options())
            return (y.transpose(0, 1) if batch_first else y), h_n
        D = 2 if self.bidirectional else 1
        h_n = []
        for index in range(self.num_layers):
            x = u.transpose(0, 1) if batch_first else u
            h_0 = None if hx is None else hx[index * D : (index + 1) * D]
            inputs = precision.autocast(u.device.type, x, *self._layer_weights(index), h_0)
            y, h = layer(*inputs, lengths, self.nonlinearity, backend)
            y = y.transpose(0, 1) if batch_first else y
            h_n.append(h)
            if index + 1 < self.num_layers:
                if self.dropout:
                    y = F.dropout(y, self.dropout, self.training)
                u = y + u if self.residual and y.shape == u.shape else y
        return y, torch.cat(h_n) if len(h_n) > 1 else h_n[0]

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

    def _weight(self, name: str) -> Tensor | None:
        """As getattr, which takes ten times as long to find a parameter; what is parametrized,
        pruned or replicated is no parameter."""
        weight = self._parameters.get(name)
        return getattr(self, name, None) if weight is None else weight

    def _torch_options(self) -> tuple:
        return (
            self._flat_weights,
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
        """Draws all parameters anew, as ``init`` says."""
        INITS[self.init](dict(self.named_parameters()), self.hidden_size, self.nonlinearity)

    def extra_repr(self) -> str:
        s = super().extra_repr()
        if self.nonlinearity != "tanh":
            s += f", nonlinearity={self.nonlinearity!r}"
        for name, plain in (("init", "torch"), ("residual", False), ("backend", "auto")):
            value = getattr(self, name)
            if value != plain:
                s += f", {name}={value!r}"
        return s

    # nn.RNNBase keeps a list of the weights, and weak references to them, beside the parameters.
    # Here the parameters are looked up at each call: no way of changing one can be missed.

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [self._weight(name) for name in self._flat_weights_names]

    def _init_flat_weights(self) -> None:
        self.flatten_parameters()

    def _update_flat_weights(self) -> None:
        pass

    def _replicate_for_data_parallel(self) -> RNN:
        return nn.Module._replicate_for_data_parallel(self)

    def flatten_parameters(self) -> None:
        """Packs the parameters for cuDNN, where that can serve; otherwise does nothing."""
        if self.nonlinearity in torch_native.KERNELS:
            super().flatten_parameters()

    def __getstate__(self) -> dict:
        return self.__dict__.copy()

    def __setstate__(self, state: dict) -> None:
        nn.Module.__setstate__(self, state)
