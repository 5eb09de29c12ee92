"""From torch.nn.RNN to rnnfast.RNN and back, inside a model, with the weights shared."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.rnn import RNN as TorchRNN  # torch.nn.RNN may be set to rnnfast.RNN

from .backends import torch_native
from .modules import RNN

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def replace(model: nn.Module, *, report: Callable[[str], object] | None = print) -> nn.Module:
    """Swaps every nn.RNN in ``model`` for an rnnfast.RNN that holds the same Parameter objects.

    Optimizers, checkpoints and hooks go on working. The model is changed in place and returned;
    where ``model`` is itself an nn.RNN, its twin is returned.

    Args:
        report: called with one line for each module that was swapped or, as in a parametrized one,
            could not be; None for silence.
    """

    def twin(old: nn.Module) -> nn.Module | str | None:
        if type(old) is TorchRNN:
            return strange_parameters(old) or _twin(RNN, old)
        if isinstance(old, TorchRNN):
            return f"{type(old).__name__} is a subclass of nn.RNN"
        return None

    return _swap(model, twin, report)


def to_torch(model: nn.Module, *, report: Callable[[str], object] | None = print) -> nn.Module:
    """The way back, for ONNX and other routes that know nn.RNN: the weights are shared again.

    Raises:
        ValueError: an rnnfast.RNN does what nn.RNN cannot (sigmoid, residual, a norm and so on);
            nothing was changed.
    """
    for name, module in model.named_modules():
        if type(module) is RNN:
            if module.nonlinearity not in torch_native.KERNELS:
                raise ValueError(f"{name or 'model'}: nn.RNN has no {module.nonlinearity}")
            beyond = module._problem(torch.empty(1, 1, 1)).beyond
            if beyond:
                raise ValueError(f"{name or 'model'}: nn.RNN has no {', '.join(beyond)}")

    def twin(old: nn.Module) -> nn.Module | str | None:
        if type(old) is RNN:
            return strange_parameters(old) or _twin(TorchRNN, old)
        if isinstance(old, RNN):
            return f"{type(old).__name__} is a subclass of rnnfast.RNN"
        return None

    return _swap(model, twin, report)


def _twin(kind: type[nn.Module], old: nn.RNNBase) -> nn.Module:
    """A ``kind`` with the parameters, mode and hooks of ``old``."""
    new = sharing(kind, old)
    for hooks in HOOKS:  # the very dictionaries: the handles that remove hooks know them
        setattr(new, hooks, getattr(old, hooks))
    for hook in new._load_state_dict_pre_hooks.values():
        if hook.with_module:
            hook.module = weakref.ref(new)
    return new


def sharing(kind: type[nn.Module], old: nn.RNNBase) -> nn.Module:
    """A ``kind`` with the parameters and mode of ``old``, which does not know of it."""
    new = kind(
        old.input_size,
        old.hidden_size,
        old.num_layers,
        old.nonlinearity,
        bias=old.bias,
        batch_first=old.batch_first,
        bidirectional=old.bidirectional,
        device="meta",  # draws nothing from the generator, takes no memory
    )
    new.dropout = old.dropout
    for name in old._flat_weights_names:
        setattr(new, name, getattr(old, name))
    new._init_flat_weights()
    new.train(old.training)
    return new


def strange_parameters(old: nn.RNNBase) -> str:
    """What ``old`` holds and a twin cannot, or "": pruning and the legacy weight_norm put a plain
    tensor in the place of a parameter."""
    names = {name for name, _ in old.named_parameters(remove_duplicate=False)}
    names |= {name for name, _ in (*old.named_buffers(), *old.named_children())}
    wrong = sorted(names ^ set(old._flat_weights_names))
    return f"pruning, weight_norm or the like changed {', '.join(wrong)}" if wrong else ""


def _swap(
    model: nn.Module,
    twin: Callable[[nn.Module], nn.Module | str | None],
    report: Callable[[str], object] | None,
) -> nn.Module:
    """A module that stands in several places gets one twin."""
    say = report or (lambda line: None)
    twins: dict[nn.Module, nn.Module] = {}
    for name, old in list(model.named_modules()):
        new = twin(old)
        if isinstance(new, str):
            say(f"kept {name or 'model'}: {new}")
        elif new is not None:
            say(f"swapped {name or 'model'}: {old} -> {new}")
            twins[old] = new
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() skips second names
            if child in twins:
                setattr(parent, name, twins[child])
    return twins.get(model, model)
