"""From torch's recurrent modules to rnnfast's and back, inside a model, with shared weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TypedDict, TypeVar, overload

import torch
from torch import nn
from torch.nn.modules import rnn as torch_rnn  # torch.nn.RNN may be set to rnnfast.RNN
from typing_extensions import Unpack

from .argument_types import Backend, Norm, TrackGradientFlow
from .backends import torch_native
from .modules import GRU, LSTM, RNN
from .modules.init import start_norms

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T", bound=nn.RNNBase)
Report = Callable[[str], object]

# One by one: mypy takes no tuple for names of types.
TorchRNN = torch_rnn.RNN
TorchLSTM = torch_rnn.LSTM
TorchGRU = torch_rnn.GRU
TWINS: dict[type[nn.RNNBase], type[nn.RNNBase]] = {
    TorchRNN: RNN,
    TorchLSTM: LSTM,
    TorchGRU: GRU,
}  # of each class of torch
OURS = tuple(TWINS.values())
SCRIPTED = {"RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"}
HINTS = {  # for arguments that replace does not take
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
    """The arguments of rnnfast's modules that :func:`replace` accepts."""

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
def replace(
    model: TorchLSTM, *, report: Report | None = print, **options: Unpack[Options]
) -> LSTM: ...


@overload
def replace(
    model: TorchGRU, *, report: Report | None = print, **options: Unpack[Options]
) -> GRU: ...


@overload
def replace(model: M, *, report: Report | None = print, **options: Unpack[Options]) -> M: ...


def replace(model, *, report=print, **options):
    """Swaps every nn.RNN, nn.LSTM and nn.GRU in ``model`` for rnnfast's, with the same Parameter
    objects.

    Optimizers, checkpoints and hooks go on working. The model is changed in place and returned. If
    ``model`` is itself such a module, its twin is returned.

    Args:
        report: called with one line for each swapped module, one for each recurrent module that
            stays, with the reason, and one for a model without any; None for silence.
        options: norm, norm_eps, residual, track_gradient_flow, clip_state_grad, bptt_window and
            backend of every new module. norm and norm_eps are for models whose recurrent modules
            are all nn.RNN. A norm has parameters of its own; an optimizer that was made before does
            not know them.

    Raises:
        TypeError, ValueError: ``model`` is no module; an option is none of these, or has a value
            that the new module refuses. The model is unchanged.
    """
    for name in options.keys() - Options.__annotations__.keys():
        known, hint = ", ".join(Options.__annotations__), HINTS.get(name, "")
        raise TypeError(f"options: given {name}, wanted some of {known}{hint}")
    RNN(2, 2, 2, device="meta", **options)  # raises before anything is changed
    _check_module(model)
    for name, module in model.named_modules():
        of_rnn = [option for option in ("norm", "norm_eps") if option in options]
        if of_rnn and why_kept(module) == "" and type(module) is not TorchRNN:
            raise ValueError(
                f"{of_rnn[0]}: {name or 'model'} is an nn.{type(module).__name__}, and that option "
                "is for nn.RNN alone"
            )

    def twin(old: nn.Module) -> nn.Module | str | None:
        why = why_kept(old)
        if why and options and isinstance(old, OURS):
            why += ", and keeps its own options"
        return sharing(TWINS[type(old)], old, options) if why == "" else why

    return _swap(model, twin, report, "nn.RNN, nn.LSTM or nn.GRU")


def why_kept(old: nn.Module) -> str | None:
    """The reason why :func:`replace` leaves a recurrent module as it is; "" for a module that it
    swaps, None for one that is not recurrent."""
    kind = type(old).__name__
    if type(old) in TWINS:
        return strange_parameters(old)
    for theirs, ours in TWINS.items():
        if isinstance(old, ours):
            return f"it is an rnnfast.{ours.__name__} already"
        if isinstance(old, theirs):
            return f"{kind} is a subclass of nn.{theirs.__name__}"
    if isinstance(old, nn.RNNBase):
        return f"{kind} is no nn.RNN, nn.LSTM or nn.GRU"
    if isinstance(old, nn.RNNCellBase):
        return "a cell computes one step in a call, and rnnfast's modules a whole sequence"
    if isinstance(old, torch.jit.ScriptModule) and old.original_name in SCRIPTED:
        return f"it is {old.original_name} in TorchScript; replace it before torch.jit"
    return None


@overload
def to_torch(model: RNN, *, report: Report | None = print) -> TorchRNN: ...


@overload
def to_torch(model: LSTM[bool], *, report: Report | None = print) -> TorchLSTM: ...


@overload
def to_torch(model: GRU, *, report: Report | None = print) -> TorchGRU: ...


@overload
def to_torch(model: M, *, report: Report | None = print) -> M: ...


def to_torch(model, *, report=print):
    """Swaps every rnnfast.RNN, LSTM and GRU in ``model`` for torch's module, which holds the same
    Parameter objects, for tools that know torch's modules alone.

    Args:
        report: as in :func:`replace`.

    Raises:
        ValueError: a module has an option that torch's does not have (sigmoid, residual, a norm and
            so on). The model is unchanged.
        TypeError: ``model`` is no module.
    """
    _check_module(model)
    for name, module in model.named_modules():
        if type(module) in OURS:
            where, kind = name or "model", type(module).__name__
            if module._cell() not in torch_native.KERNELS:
                raise ValueError(f"{where}: nn.{kind} has no {module.nonlinearity}")
            extras = module._problem(torch.empty(1, 1, 1)).extras
            if extras:
                raise ValueError(f"{where}: nn.{kind} has no {', '.join(extras)}")
    of_torch = {ours: theirs for theirs, ours in TWINS.items()}

    def twin(old: nn.Module) -> nn.Module | str | None:
        if type(old) in of_torch:
            return strange_parameters(old) or sharing(of_torch[type(old)], old)
        for ours in OURS:
            if isinstance(old, ours):
                return f"{type(old).__name__} is a subclass of rnnfast.{ours.__name__}"
        return None

    return _swap(model, twin, report, "rnnfast.RNN, LSTM or GRU")


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
    special = {}
    if isinstance(old, (TorchRNN, RNN)):
        special["nonlinearity"] = old.nonlinearity
    elif old.proj_size:
        special["proj_size"] = old.proj_size
    new = kind(
        old.input_size,
        old.hidden_size,
        old.num_layers,
        **special,
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


def _leave_meta(rnn: nn.RNNBase, device: torch.device, shared: Sequence[str]) -> None:
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
