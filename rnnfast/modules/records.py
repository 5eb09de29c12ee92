"""The record of backward in a module: its buffers, and the property that reads them."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode

from ..gradient_flow import GradientFlow, read
from ..recurrence import record
from ..tracing import makes_program
from .weights import WeightLookup

ROOM = 4096  # points of a direction, [T] or [T, B], that a new record has room for


class NoGradientFlow(AttributeError, RuntimeError):
    """There is no record to read. hasattr and getattr's default take it for a missing attribute."""


class Recording(WeightLookup):
    """A module whose backward fills a record of the gradient at every time step."""

    _defaults: ClassVar[dict[str, object]]  # arguments of the module, and their default values

    def _new_records(self) -> list[list[Tensor]]:
        """For each layer a list of buffers (:mod:`rnnfast.recurrence.record`). The last buffer on
        a device is in use."""
        layers = self.num_layers if self.track_gradient_flow else 0
        device = self._device()
        if device is None:
            return [[] for _ in range(layers)]
        room = record.numbers(2 if self.bidirectional else 1, ROOM, 1)
        return [[record.make(room, device)] for _ in range(layers)]

    def _buffer(self, index: int, x: Tensor) -> Tensor | None:
        """The buffer that backward through layer ``index`` fills; None without a backward.

        Raises:
            RuntimeError: a compiler or tracer records this call, and the buffer is too small.
        """
        program = makes_program()  # its later calls may have gradients, and other sizes
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
        # The older buffers stay: backward of an earlier call may still write there.
        buffer = record.make(max([size, *(2 * b.numel() for b in made)]), x.device)
        self._records[index].append(buffer)
        return buffer

    def _network(self) -> dict:
        """The arguments of the module, which advice on its gradient depends on."""
        return {"cell": self._cell(), **{name: getattr(self, name) for name in self._defaults}}

    @property
    def gradient_flow(self) -> GradientFlow:
        """The record of the last backward pass through this module, at every time step.

        Raises:
            AttributeError, RuntimeError: one error that is both: track_gradient_flow is False, or
                no backward pass has come through yet.
        """
        return self._read_records()

    def _read_records(self) -> GradientFlow:
        if not self.track_gradient_flow:
            raise NoGradientFlow(
                f"gradient_flow: this {type(self).__name__} does not record it; make it with "
                'track_gradient_flow=True (or "sample")'
            )
        if torch._C._len_torch_dispatch_stack() and detect_fake_mode() is not None:
            raise NoGradientFlow("gradient_flow: a record cannot be read under FakeTensorMode")
        found = read(self._records, self.track_gradient_flow == "sample", self._network())
        if found is None:
            raise NoGradientFlow(
                f"gradient_flow: no backward pass has come through this {type(self).__name__} yet; "
                "call it, and backward() on a loss made of its results"
            )
        return found

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        # Python calls this after the property raised an AttributeError, and drops that error.
        if name == "gradient_flow":
            return self._read_records()
        return super().__getattr__(name)

    def __dir__(self) -> list[str]:
        """Leaves gradient_flow out while there is no record: torch.jit and others read every name
        in this list."""
        names = super().__dir__()
        there = hasattr(self, "gradient_flow")
        return names if there else [name for name in names if name != "gradient_flow"]

    def _apply(self, fn, recurse: bool = True) -> Recording:
        super()._apply(fn, recurse)
        device = self._device()
        here = ([buffer.device for buffer in made] for made in self._records)
        if device is not None and any(device not in devices for devices in here):
            self._records = self._new_records()
        return self

    # A copy begins with an empty record: passes through this module are none of its own, and their
    # numbers mean something in this process alone.

    def __getstate__(self) -> dict:
        state = self.__dict__ | {"_records": []}
        state.pop("_chosen", None)  # stack.py: of this process
        return state

    def __setstate__(self, state: dict) -> None:
        nn.Module.__setstate__(self, state)
        self._records = self._new_records()
