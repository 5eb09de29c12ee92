"""``python -m rnnfast probe``: each RNN, LSTM and GRU of a model in words, a table and a
picture."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pickle
import sys
from collections.abc import Callable, Mapping
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .. import watch as calls
from ..cells import CELLS
from ..convert import OURS, TWINS
from ..modules.stack import Stack
from .picture import draw_probes
from .probe import GradientProbe, probe

STEPS, BATCH = 250, 32  # the size of the random input
LEGEND = (
    "half-life, horizon: steps until half, until a thousandth of a step's influence on the state "
    "is left. Try: arguments of rnnfast's RNN, LSTM and GRU, which take the place of torch's."
)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)


class BadInput(ValueError):
    """The input cannot be probed. The message says why, in one line."""


class Checkpoint(NamedTuple):
    """How to read a checkpoint; see the command's help."""

    flags: Mapping[str, object] = {}  # arguments of its RNN
    prefix: str = ""  # of the RNN's names in the state_dict
    key: str = ""  # the entry of the file that is the state_dict

    def given(self) -> str:
        """The options of the command that say so."""
        names = [*self.flags, *(n for n in ("prefix", "key") if getattr(self, n))]
        return ", ".join("--" + ("no-" * (n == "bias") + n).replace("_", "-") for n in names)


def run(
    source: str,
    out: Path,
    *,
    data: str | None = None,
    steps: int | None = None,
    batch: int | None = None,
    seed: int = 0,
    checkpoint: Checkpoint,
) -> dict:
    """Probes, prints, and writes ``probe.png`` and ``probe.json`` into the folder ``out``.

    Args:
        source: "module:factory", or the path of a checkpoint.
        data: "module:function", which returns the model's input; None for normal noise, ``steps``
            by ``batch``, into every RNN.

    Returns:
        The content of probe.json.

    Raises:
        BadInput: there is no such model, checkpoint or data, or it cannot be probed.
    """
    model = _model(source, checkpoint, seed)
    rnns = _rnns(model, source)
    if data is None:
        size = steps or STEPS, batch or BATCH
        called = {name: ((_noise(rnn, *size),), {}) for name, rnn in rnns.items()}
    elif steps or batch:
        raise BadInput("--steps, --batch: for random input, and --data brings its own")
    else:
        called = _calls(model, rnns, _function(data, "--data")(), data)
    console, found = Console(), {}
    for name, (args, options) in called.items():
        found[name] = _probe(name, rnns[name], args, options, seed)
        console.print(f"\n{name or 'model'}: {rnns[name]}", style="bold", markup=False)
        console.print(found[name])
    for name in (name for name in rnns if name not in called):
        console.print(f"\n{name}: not called, so not probed", markup=False)
    console.print(f"\n{LEGEND}", markup=False, highlight=False)
    draw_probes(found).savefig(out / "probe.png")
    result = {
        "source": source,
        "data": data,
        "seed": seed,
        "torch": torch.__version__,
        "rnns": [
            {"name": name, "module": str(rnns[name]), **found[name].to_dict()} for name in found
        ],
    }
    (out / "probe.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    console.print(
        f"Wrote {out / 'probe.png'} and {out / 'probe.json'}", highlight=False, soft_wrap=True
    )
    return result


def _probe(name: str, rnn: nn.Module, args: tuple, options: dict, seed: int) -> GradientProbe:
    try:
        return probe(rnn, *args, **options, seed=seed)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadInput(f"{name or 'model'}: {error}") from error


# --------------------------------------------------------------------------------------- the model


def _model(source: str, checkpoint: Checkpoint, seed: int) -> nn.Module:
    """The model, with the seed set that its input is drawn from."""
    if Path(source).suffix in (".pt", ".pth") or Path(source).is_file():
        model: nn.Module = _from_checkpoint(Path(source), checkpoint)
        torch.manual_seed(seed)
        return model
    if given := checkpoint.given():
        raise BadInput(f"{given}: for a checkpoint, and {source} is none")
    factory = _function(source, "SOURCE")
    torch.manual_seed(seed)  # after the import, which may draw numbers
    model = factory()
    if not isinstance(model, nn.Module):
        raise BadInput(f"{source}: it returned {_a(model)}, wanted a torch.nn.Module")
    return model


def _function(spec: str, what: str) -> Callable[[], object]:
    """The function that "module:name" names. It takes no arguments."""
    module, _, name = spec.partition(":")
    if not module or not name:
        given = f"{what}: given {spec!r}, wanted module:function"
        raise BadInput(given + (" or a checkpoint (*.pt, *.pth)" if what == "SOURCE" else ""))
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = attrgetter(name)(importlib.import_module(module))
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise  # the user's module imports it
        raise BadInput(
            f"{what}: there is no module {error.name}, here or among those installed"
        ) from None
    except AttributeError:
        raise BadInput(f"{what}: module {module} has no {name}") from None
    if not callable(found) or isinstance(found, nn.Module):
        raise BadInput(f"{what}: {spec} is {_a(found)}, wanted a function without arguments")
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise BadInput(f"{what}: {spec} cannot be called without arguments: {error}") from None
    return found


def _rnns(model: nn.Module, source: str) -> dict[str, nn.Module]:
    """The RNNs, LSTMs and GRUs that can be probed, by name."""
    modules = dict(model.named_modules())
    found = {n: m for n, m in modules.items() if type(m) in TWINS or isinstance(m, OURS)}
    if found:
        return found
    others = {n: m for n, m in modules.items() if isinstance(m, RECURRENT)}
    kinds = {type(m).__name__: n for n, m in reversed(list((others or modules).items()))}
    listed = ", ".join(f"{kind} ({name or 'the model itself'})" for kind, name in kinds.items())
    hint = "; rnnfast has no cell module or subclass of torch's" if others else ""
    raise BadInput(f"{source}: no RNN, LSTM or GRU in it, but {listed}{hint}")


def _module_of(state: Mapping[str, Tensor], hidden_size: object) -> type[Stack]:
    """The module with so many gates: W_hh has a row for each gate of each unit. RNN where none
    has."""
    rows = len(state["weight_hh_l0"]) if "weight_hh_l0" in state else 0
    for made in OURS:
        gates = CELLS[made(1, 1, device="meta")._cell()].gates
        if rows == len(gates) * hidden_size:
            return made
    return OURS[0]


def _from_checkpoint(path: Path, checkpoint: Checkpoint) -> Stack:
    state, flags = _state_dict(path, checkpoint.prefix, checkpoint.key), checkpoint.flags
    if not {"input_size", "hidden_size"} <= flags.keys():
        raise BadInput(f"{path}: its RNN needs --input-size and --hidden-size, at least")
    module = _module_of(state, flags["hidden_size"])
    try:
        wanted = module(**flags, device="meta").state_dict()
    except (TypeError, ValueError) as error:
        raise BadInput(str(error)) from None
    problems = []
    for what, names in (
        ("missing", wanted.keys() - state.keys()),
        ("unexpected", state.keys() - wanted.keys()),
    ):
        if names:
            problems.append(f"{what}: {', '.join(sorted(names))}")
    for name in sorted(wanted.keys() & state.keys()):
        shape, flagged = tuple(state[name].shape), tuple(wanted[name].shape)
        if shape != flagged:
            problems.append(f"{name}: {shape} in the file, {flagged} by the flags")
    if problems:
        raise BadInput(f"{path} does not fit the flags: {'; '.join(problems)}")
    dtype = state["weight_ih_l0"].dtype
    if not dtype.is_floating_point:
        raise BadInput(f"{path}: weight_ih_l0 is {dtype}, wanted a floating-point dtype")
    rnn = module(**flags, dtype=dtype)
    rnn.load_state_dict(state)
    return rnn


def _state_dict(path: Path, prefix: str, key: str) -> dict[str, Tensor]:
    """The tensors of the RNN, by the RNN's own names."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise BadInput(
            f"{path}: torch.load(weights_only=True) cannot read it; "
            "save the state_dict() of the model"
        ) from error
    for part in key.split(".") if key else ():
        if not isinstance(found, Mapping) or part not in found:
            raise BadInput(f"{path}: --key: no {part!r} in it{_holds(found)}")
        found = found[part]
    tensors = {}
    if isinstance(found, Mapping):
        tensors = {n: x for n, x in found.items() if isinstance(x, Tensor)}
    if not tensors:
        hint = "; --key says which is the state_dict" if isinstance(found, Mapping) else ""
        raise BadInput(f"{path}: {_a(found)} without tensors{_holds(found)}{hint}")
    start = f"{prefix.rstrip('.')}." if prefix else ""
    state = {n.removeprefix(start): x for n, x in tensors.items() if n.startswith(start)}
    first = "weight_ih_l0"
    if first not in state:
        others = [n.removesuffix(first).rstrip(".") for n in tensors if n.endswith(f".{first}")]
        hint = f", but there is one under --prefix {' or '.join(others)}" if others else ""
        raise BadInput(f"{path}: no {start}{first} in it{hint}{'' if others else _holds(found)}")
    return state


def _holds(x: object) -> str:
    return f"; it holds {', '.join(map(str, list(x)[:8]))}" if isinstance(x, Mapping) and x else ""


def _a(x: object) -> str:
    return f"a {type(x).__name__}"


# --------------------------------------------------------------------------------------- its input


def _noise(rnn: nn.RNNBase, steps: int, batch: int) -> Tensor:
    """Standard normal, drawn on the CPU, so that a seed gives the same numbers on any device."""
    x = torch.randn(steps, batch, rnn.input_size, device="cpu").to(next(rnn.parameters()))
    return x.transpose(0, 1) if rnn.batch_first else x


def _calls(
    model: nn.Module, rnns: dict[str, nn.Module], given: object, data: str
) -> dict[str, tuple[tuple, dict]]:
    """The arguments of each RNN when the model is called with ``given``. Where an RNN is called
    more than once, the call with the largest input counts."""
    seen: dict[str, tuple[tuple, dict]] = {}

    def keep(name: str, rnn: nn.Module, args: tuple, options: dict) -> None:
        if "input" in options:
            args, options = (options["input"],), {n: x for n, x in options.items() if n != "input"}
        if name not in seen or _size(args) > _size(seen[name][0]):
            seen[name] = args, options

    args = given if isinstance(given, tuple) and not _is_packed(given) else (given,)
    try:
        calls.watch(model, rnns, keep, args, {})
    except Exception as error:
        what = ", ".join(f"{tuple(x.shape)}" if isinstance(x, Tensor) else _a(x) for x in args)
        raise BadInput(
            f"--data: the model, called with {what} from {data}, raises "
            f"{type(error).__name__}: {error}"
        ) from error
    if not seen:
        raise BadInput(f"--data: called with what {data} returns, the model calls none of its RNNs")
    return {name: seen[name] for name in rnns if name in seen}


def _is_packed(x: object) -> bool:
    return isinstance(x, PackedSequence)  # a PackedSequence is a tuple, too


def _size(args: tuple) -> int:
    x = args[0]
    return (x.data if _is_packed(x) else x).numel()
