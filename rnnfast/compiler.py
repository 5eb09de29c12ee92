"""The words between this package and what traces it: torch.compile, export, jit and fx."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import fx, nn

Answer = TypeVar("Answer", bound=Callable)

# Checks of sizes here are Python's, as those of torch.nn are, about which torch is silent, too.
warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=r"rnnfast\.")


def constant(answer: Answer) -> Answer:
    """torch.compile takes what this function answers for a constant: it cannot look at a device.
    (By the mark that torch.compiler.assume_constant_result sets, which takes a second to import.)
    """
    answer._dynamo_marked_constant = True
    return answer


def eager(reason: str) -> Callable[[Answer], Answer]:
    """torch.compile breaks its graph around this function; where it may not, and in torch.export,
    the error says ``reason``. (As torch.compiler.disable, which takes a second to import, does.)
    """

    def mark(function: Answer) -> Answer:
        @functools.wraps(function)
        def call(*args, **kwargs):
            if torch.compiler.is_dynamo_compiling():  # this frame, behind the break
                return torch.compiler.disable(function)(*args, **kwargs)
            if torch.compiler.is_exporting():
                raise RuntimeError(f"torch.export: {reason}")
            return function(*args, **kwargs)

        call._torchdynamo_disable = True
        call._torchdynamo_disable_msg = reason
        return call

    return mark


def makes_program() -> bool:
    """Whether torch.export or torch.jit.trace records this call, to be run at other sizes and
    differentiated later."""
    return torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None


def as_leaf(module: nn.Module, *args: Any, **kwargs: Any) -> fx.Proxy | None:
    """A call of ``module`` as one node of the graph that torch.fx makes, as it does with all of
    torch.nn; None where no argument is traced by torch.fx.

    Raises:
        TraceError: the graph is of ``module`` itself.
    """
    traced = [x for x in (*args, *kwargs.values()) if isinstance(x, fx.Proxy)]
    if not traced:
        return None
    tracer = traced[0].tracer
    if tracer.root is module:
        raise fx.proxy.TraceError(
            f"torch.fx: {type(module).__name__} cannot be traced into, only be a leaf: trace a "
            "module that holds it"
        )
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)
