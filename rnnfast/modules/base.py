"""The part that all modules share: arguments, their checks, and parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..backends import torch_native
from .batch_norm import BatchNorm
from .init import reset
from .records import Recording
from .settings import (
    CHECKS,
    DEFAULTS,
    Check,
    Settings,
    check_recurrence,
    check_settings,
    warn_of_idle_residual,
)


def refuse_unknown(kind: str, unknown: Mapping[str, object]) -> None:
    """
    Raises:
        TypeError: the constructor of ``kind`` has got a keyword argument that it does not have, in
            the words of Python.
    """
    if unknown:
        name = next(iter(unknown))
        raise TypeError(f"{kind}.__init__() got an unexpected keyword argument '{name}'")


class Recurrent(Recording):
    """An nn.RNNBase with the arguments of :class:`Settings`, which are checked whenever one is set.

    A module with a cell of its own sets the attributes of that cell before it calls ``__init__``,
    and defines :meth:`_cell`.
    """

    _defaults: ClassVar[dict[str, object]] = DEFAULTS  # those that are not default are printed
    _checks: ClassVar[dict[str, Check]] = CHECKS

    def __init__(self, mode: str, arguments: tuple, settings: Settings, factory: dict) -> None:
        """
        Args:
            mode: nn.RNNBase's word for the cell.
            arguments: input_size, hidden_size, num_layers, bias, batch_first, dropout and
                bidirectional.
            factory: device and dtype.
        """
        check_settings(settings)
        for name, value in settings._asdict().items():
            setattr(self, name, value)
        self._complete = False  # nn.RNNBase resets the parameters before all of them are there
        # nn.RNNBase does not know RNN_SIGMOID and RNN_SOFTPLUS. All modes of an RNN have the same
        # parameters.
        known = "RNN_TANH" if mode.startswith("RNN_") else mode
        super().__init__(known, *arguments, **factory)
        self.mode = mode
        check_recurrence(self, self.hidden_size)
        if self.residual:
            warn_of_idle_residual(self, stacklevel=3)
        self._add_parameters(factory)
        self._complete = True
        self.reset_parameters()
        self._records = self._new_records()

    def _cell(self) -> str:
        """The name of the cell that computes a step: a key of rnnfast.cells.CELLS."""
        raise NotImplementedError

    # --------------------------------------------------------------------------------- arguments

    def __setattr__(self, name: str, value: object) -> None:
        """
        Raises:
            TypeError, ValueError: an argument of the constructor cannot have that value, or cannot
                be set later.
        """
        if isinstance(value, nn.Module):
            self._check_child(name, value)
        checked = name in self._checks and self.__dict__.get("_complete", False)
        if checked:
            before = getattr(self, name)
            self._checks[name](self, name, value)
        # nn.RNNBase's own __setattr__ looks for each name in its list of the weights.
        super(nn.RNNBase, self).__setattr__(name, value)
        if checked and value != before:
            self._follow(name)

    def _follow(self, name: str) -> None:
        """Changes what depends on the argument that was set."""
        if name == "track_gradient_flow" and self.track_gradient_flow:
            self._records = self._new_records()  # rows together and rows apart have other shapes
        elif name == "norm_eps":
            for module in self.modules():
                if isinstance(module, BatchNorm):
                    module.eps = self.norm_eps

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

    def extra_repr(self) -> str:
        s = super().extra_repr()
        for name, default in self._defaults.items():
            value = getattr(self, name)
            if value != default:
                s += f", {name}={value!r}"
        return s

    # -------------------------------------------------------------------------------- parameters

    def _add_parameters(self, factory: dict) -> None:
        """Adds the parameters and buffers that nn.RNNBase does not have, and weight_hh of several
        heads."""
        H, rows = self.hidden_size, self._weight("weight_ih_l0").shape[0]
        for names in self._all_weights:
            suffix = names[0].removeprefix("weight_ih")
            if self.num_heads > 1:
                weight = torch.empty(rows, H // self.num_heads, **factory)
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

    def reset_parameters(self) -> None:
        """Draws new values for all weights and biases, as ``init`` says; a norm starts from the
        beginning. A weight that is pruned or parametrized gets new values below its mask or
        parametrization. The parameters and buffers of a subclass stay as they are."""
        if self._complete:
            reset(self)

    def _start_gates(self, parameters: dict[str, Tensor]) -> None:
        """Sets the biases of gates that an argument asks for, once ``init`` has drawn all."""

    def flatten_parameters(self) -> None:
        """Packs the parameters for cuDNN, where it has such a cell; otherwise does nothing."""
        if self._cell() in torch_native.KERNELS and self.num_heads == 1:
            super().flatten_parameters()
