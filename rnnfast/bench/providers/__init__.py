"""The peers that compute a workload. A new provider is a file here with ``name``, ``unavailable()``
and ``build()``, and an entry in PROVIDERS."""

from __future__ import annotations

from typing import Protocol

from ...backends import BACKENDS
from ..workload import Data, Workload
from .compiled_loop import CompiledLoop
from .flash_rnn import FlashRNN
from .jax_scan import JaxScan
from .layer import Layer
from .loop import Loop
from .onnx_runtime import OnnxRuntime
from .open_vino import OpenVINO
from .rnnfast_rnn import RnnfastRNN
from .torch_rnn import TorchRNN


class Provider(Protocol):
    name: str

    def unavailable(self, work: Workload) -> str: ...  # why it cannot be measured; "" if it can

    def build(self, work: Workload, data: Data) -> Layer: ...  # data: of work's dtype, device


OURS = [RnnfastRNN(name) for name in BACKENDS if name not in ("torch", "reference")]
# torch's kernels inside our op, and the eager loop. Timed if they are named.
BY_NAME = [RnnfastRNN(name) for name in ("torch", "reference")]
PROVIDERS: tuple[Provider, ...] = (
    TorchRNN(),
    *OURS,
    *BY_NAME,
    JaxScan(),
    OnnxRuntime(),
    OpenVINO(),
    Loop(),
    CompiledLoop(),
    FlashRNN(),
)
