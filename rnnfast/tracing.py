"""Marks and questions for the tools that trace this package: torch.compile, export, jit and fx."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
from torch import fx, nn

Answer = TypeVar("Answer", bound=Callable)

# The checks of sizes run in Python. torch.jit warns of each, and is silent about those of torch.nn.
warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=r"rnnfast\.")


def constant(answer: Answer) -> Answer:
    """Marks a function whose result torch.compile takes for a constant: it cannot look at a device.
    (torch.compiler.assume_constant_result sets the same mark, and takes a second to import.)"""
    answer._dynamo_marked_constant = True
    return answer


def eager(reason: str) -> Callable[[Answer], Answer]:
    """Marks a function around which torch.compile breaks its graph. Where it must not, and in
    torch.export, the error says ``reason``. (torch.compiler.disable does the same, and takes a
    second to import.)"""

    def mark(function: Answer) -> Answer:
        @functools.wraps(function)
        def call(*args, **kwargs):
            if torch.compiler.is_dynamo_compiling():  # this frame, after the break
                return torch.compiler.disable(function)(*args, **kwargs)
            if torch.compiler.is_exporting():
                raise RuntimeError(f"torch.export: {reason}")
            return function(*args, **kwargs)

        call._torchdynamo_disable = True
        call._torchdynamo_disable_msg = reason
        return call

    return mark


def makes_program() -> bool:
    """Whether torch.export or torch.jit.trace records this call. Its program may later run at other
    sizes, and be differentiated."""
    return torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None


def as_leaf(module: nn.Module, forward: Callable, **inputs: Any) -> fx.Proxy | None:
    """A call of ``module`` as one node of the graph of torch.fx, like a call of any module of
    torch.nn; None where torch.fx traces none of ``inputs``.

    Raises:
        TraceError: no node can stand for this call: torch.fx traces ``module`` itself, or a
            subclass that calls ``forward`` in its own.
    """
    traced = [x for x in inputs.values() if isinstance(x, fx.Proxy)]
    if not traced:
        return None
    tracer, name = traced[0].tracer, type(module).__name__
    if tracer.root is module or type(module).forward is not forward:
        raise fx.proxy.TraceError(
            f"torch.fx: it cannot trace into {name}. Trace a module that holds it, with a Tracer "
            f"whose is_leaf_module is True for {name}"
        )
    given = {key: x for key, x in inputs.items() if x is not None}
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (), given)


def cannot_script(name: str, instead: str = "") -> Callable[..., NoReturn]:
    """A hook that refuses: torch.jit.script calls it before it compiles."""

    def refuse(*_) -> NoReturn:
        raise RuntimeError(
            f"torch.jit.script: it cannot compile {name}. torch.jit.trace and torch.export can "
            f"record it{instead}"
        )

    return refuse
