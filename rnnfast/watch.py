"""A call of a model that watches its parts."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn


def watch(
    model: nn.Module,
    parts: Mapping[str, nn.Module],
    see: Callable[[str, nn.Module, tuple, dict], None],
    args: tuple,
    named: Mapping[str, object],
) -> None:
    """Calls ``model(*args, **named)`` once, and ``see(name, part, args, named)`` before each call
    of a part. ``see`` finds the part in its own mode; the call itself is in eval mode, without
    gradients and without torch.compile. Afterwards the modes of all modules and the generators of
    random numbers are as before.

    Args:
        parts: modules of the model, by name.

    Raises:
        Exception: any that the model raises.
    """
    modes = {module: module.training for module in model.modules()}
    gpus = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    compiles = "torch._dynamo" in sys.modules  # loading it takes a second

    def look(name: str, part: nn.Module, args: tuple, named: dict) -> None:
        called = part.training
        part.training = modes.get(part, called)  # nn.DataParallel calls replicas
        see(name, part, args, named)
        part.training = called

    hooks = [
        part.register_forward_pre_hook(partial(look, name), with_kwargs=True)
        for name, part in parts.items()
    ]
    try:
        with (
            torch.compiler.set_stance("force_eager") if compiles else contextlib.nullcontext(),
            torch.random.fork_rng(sorted(gpus)),
            torch.no_grad(),
        ):
            model.eval()(*args, **named)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
