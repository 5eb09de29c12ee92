"""From torch.nn.RNN to rnnfast.RNN and back, inside a model, with the weights shared."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TypedDict, TypeVar, overload

import torch
from torch import nn
from torch.nn.modules.rnn import RNN as TorchRNN  # torch.nn.RNN may be set to rnnfast.RNN
from typing_extensions import Unpack

from .argument_types import Backend, Norm, TrackGradientFlow
from .backends import torch_native
from .modules import RNN
from .modules.init import start_norms

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T", bound=nn.RNNBase)
Report = Callable[[str], object]

SCRIPTED = {"RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"}
HINTS = {  # for arguments of rnnfast.RNN
    "init": "; the weights stay: set rnn.init and call rnn.reset_parameters() to draw others",
    "num_heads": "; the weights stay, and heads have a W_hh of another shape",
}
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


class Options(TypedDict, total=False):
    """The arguments of rnnfast.RNN that :func:`replace` accepts."""

    norm: Norm | None
    norm_eps: float
    residual: bool
    track_gradient_flow: TrackGradientFlow
    clip_state_grad: float | None
    bptt_window: int | None
    backend: Backend


@overload
def replace(
    model: TorchRNN, *, report: Report | None = print, **options: Unpack[Options]
) -> RNN: ...


@overload
def replace(model: M, *, report: Report | None = print, **options: Unpack[Options]) -> M: ...


def replace(model, *, report=print, **options):
    """Swaps every nn.RNN in ``model`` for an rnnfast.RNN that holds the same Parameter objects.

    Optimizers, checkpoints and hooks go on working. The model is changed in place and returned. If
    ``model`` is itself an nn.RNN, its twin is returned.

    Args:
        report: called with one line for each swapped module, one for each recurrent module that
            stays, with the reason, and one for a model without any; None for silence.
        options: norm, norm_eps, residual, track_gradient_flow, clip_state_grad, bptt_window and
            backend of every new rnnfast.RNN. A norm has parameters of its own; an optimizer that
            was made before does not know them.

    Raises:
        TypeError, ValueError: ``model`` is no module; an option is none of these, or has a value
            that rnnfast.RNN refuses. The model is unchanged.
    """
    for name in options.keys() - Options.__annotations__.keys():
        known, hint = ", ".join(Options.__annotations__), HINTS.get(name, "")
        raise TypeError(f"options: given {name}, wanted some of {known}{hint}")
    RNN(2, 2, 2, device="meta", **options)  # raises before anything is changed

    def twin(old: nn.Module) -> nn.Module | str | None:
        why = why_kept(old)
        if why and options and isinstance(old, RNN):
            why += ", and keeps its own options"
        return sharing(RNN, old, options) if why == "" else why

    return _swap(model, twin, report, "torch.nn.RNN")


def why_kept(old: nn.Module) -> str | None:
    """The reason why :func:`replace` leaves a recurrent module as it is; "" for a module that it
    swaps, None for one that is not recurrent."""
    kind = type(old).__name__
    if type(old) is TorchRNN:
        return strange_parameters(old)
    if isinstance(old, RNN):
        return "it is an rnnfast.RNN already"
    if isinstance(old, TorchRNN):
        return f"{kind} is a subclass of nn.RNN"
    for known in (nn.LSTM, nn.GRU):
        if isinstance(old, known):
            return f"rnnfast has no {known.__name__} yet, only RNN"
    if isinstance(old, nn.RNNBase):
        return f"{kind} is no nn.RNN"
    if isinstance(old, nn.RNNCellBase):
        return "a cell computes one step in a call, and rnnfast.RNN a whole sequence"
    if isinstance(old, torch.jit.ScriptModule) and old.original_name in SCRIPTED:
        return f"it is {old.original_name} in TorchScript; replace it before torch.jit"
    return None


@overload
def to_torch(model: RNN, *, report: Report | None = print) -> TorchRNN: ...


@overload
def to_torch(model: M, *, report: Report | None = print) -> M: ...


def to_torch(model, *, report=print):
    """Swaps every rnnfast.RNN in ``model`` for an nn.RNN that holds the same Parameter objects, for
    ONNX and other tools that know nn.RNN alone.

    Args:
        report: as in :func:`replace`.

    Raises:
        ValueError: an rnnfast.RNN has an option that nn.RNN does not have (sigmoid, residual, a
            norm and so on). The model is unchanged.
        TypeError: ``model`` is no module.
    """
    _check_module(model)
    for name, module in model.named_modules():
        if type(module) is RNN:
            if module._cell() not in torch_native.KERNELS:
                raise ValueError(f"{name or 'model'}: nn.RNN has no {module.nonlinearity}")
            extras = module._problem(torch.empty(1, 1, 1)).extras
            if extras:
                raise ValueError(f"{name or 'model'}: nn.RNN has no {', '.join(extras)}")

    def twin(old: nn.Module) -> nn.Module | str | None:
        if type(old) is RNN:
            return strange_parameters(old) or sharing(TorchRNN, old)
        if isinstance(old, RNN):
            return f"{type(old).__name__} is a subclass of rnnfast.RNN"
        return None

    return _swap(model, twin, report, "rnnfast.RNN")


def _adopt_hooks(new: nn.Module, old: nn.Module) -> None:
    for hooks in HOOKS:  # the same dictionaries, because the handles that remove hooks hold them
        setattr(new, hooks, getattr(old, hooks))
    for hook in new._load_state_dict_pre_hooks.values():
        if hook.with_module:
            hook.module = weakref.ref(new)


def sharing(kind: type[T], old: nn.RNNBase, options: Options | None = None) -> T:
    """A new module of class ``kind`` with the parameters and mode of ``old``, which stays as it
    is."""
    own, options = old._flat_weights_names, options or {}
    new = kind(
        old.input_size,
        old.hidden_size,
        old.num_layers,
        old.nonlinearity,
        bias=old.bias,
        batch_first=old.batch_first,
        bidirectional=old.bidirectional,
        device="meta",  # draws nothing from the generator, takes no memory
        dtype=old.weight_ih_l0.dtype,
        **options,
    )
    new.dropout = old.dropout
    for name in own:
        setattr(new, name, getattr(old, name))
    if options:
        _leave_meta(new, old.weight_ih_l0.device, own)
    new._init_flat_weights()
    new.train(old.training)
    return new


def _leave_meta(rnn: RNN, device: torch.device, shared: Sequence[str]) -> None:
    """Makes the tensors that the old module did not have, on ``device``: the parameters and buffers
    of a norm, and the record.

    Args:
        shared: names of the parameters of the old module.
    """
    for name, x in list(rnn.named_parameters()):
        if name not in shared:
            setattr(rnn, name, nn.Parameter(torch.empty_like(x, device=device)))
    for name, x in list(rnn.named_buffers()):
        setattr(rnn, name, torch.empty_like(x, device=device))
    start_norms(rnn)
    rnn._records = rnn._new_records()


def strange_parameters(old: nn.RNNBase) -> str:
    """A complaint about parameters of ``old`` that a twin cannot have; "" where there are none.
    Pruning and the legacy weight_norm put a plain tensor in the place of a parameter."""
    names = {name for name, _ in old.named_parameters(remove_duplicate=False)}
    names |= {name for name, _ in (*old.named_buffers(), *old.named_children())}
    wrong = sorted(names ^ set(old._flat_weights_names))
    return f"pruning, weight_norm or the like changed {', '.join(wrong)}" if wrong else ""


def _swap(
    model: nn.Module,
    twin: Callable[[nn.Module], nn.Module | str | None],
    report: Report | None,
    wanted: str,
) -> nn.Module:
    """Puts ``twin(module)`` in the place of each module, and returns the model.

    Args:
        twin: returns the new module, a reason to keep the old one, or None. A module in several
            places has one twin.
        wanted: the class that is swapped, for the report on a model without any.
    """
    _check_module(model)
    lines: list[str] = []
    twins: dict[nn.Module, nn.Module] = {}
    for name, old in list(model.named_modules()):
        new = twin(old)
        if isinstance(new, str):
            lines.append(f"kept {name or 'model'}: {new}")
        elif new is not None:
            lines.append(f"swapped {name or 'model'}: {old} -> {new}")
            twins[old] = new
    for old, new in twins.items():
        _adopt_hooks(new, old)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() skips second names
            if child in twins:
                setattr(parent, name, twins[child])
    for line in lines or [f"nothing swapped: {type(model).__name__} holds no {wanted}"]:
        if report is not None:
            report(line)
    return twins.get(model, model)


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: given {type(model).__name__}, wanted a torch.nn.Module")
