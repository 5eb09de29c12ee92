"""``python -m rnnfast probe``: every RNN of a model probed, in words, a table and a picture."""

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

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.modules.rnn import RNN as TorchRNN  # torch.nn.RNN may be set to rnnfast.RNN
from torch.nn.utils.rnn import PackedSequence

from .. import calls
from ..modules import RNN
from .picture import draw_probes
from .probe import GradientProbe, probe

STEPS, BATCH = 250, 32  # of the random input
LEGEND = (
    "half-life, horizon: steps until half, until a thousandth is left of what a step has moved. "
    "What to try are arguments of rnnfast.RNN, which takes the place of torch.nn.RNN."
)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)


class BadInput(ValueError):
    """What was given cannot be probed; the message says why, in one line."""


def run(
    source: str,
    out: Path,
    *,
    data: str | None = None,
    steps: int | None = None,
    batch: int | None = None,
    seed: int = 0,
    flags: Mapping[str, object],
    prefix: str = "",
    key: str = "",
) -> dict:
    """Probes, prints, and writes ``probe.png`` and ``probe.json`` into the folder ``out``.

    Args:
        source: "module:factory", or the path of a checkpoint.
        data: "module:function" for what the model is called with; None for normal noise,
            ``steps`` by ``batch``, into every RNN.
        flags: arguments of the RNN that the checkpoint is of.
        prefix, key: where in the checkpoint its state_dict is; see the command's help.

    Returns:
        What probe.json holds.

    Raises:
        BadInput: the model, checkpoint or data is not there, or is none.
    """
    if Path(source).suffix in (".pt", ".pth") or Path(source).is_file():
        model: nn.Module = _from_checkpoint(Path(source), flags, prefix, key)
        torch.manual_seed(seed)
    elif flags or prefix or key:
        names = [*flags, *(n for n, x in (("prefix", prefix), ("key", key)) if x)]
        given = ", ".join("--" + ("no-" * (n == "bias") + n).replace("_", "-") for n in names)
        raise BadInput(f"{given}: for a checkpoint, and {source} is none")
    else:
        factory = _function(source, "SOURCE")
        torch.manual_seed(seed)  # after the import, which may be the first or not
        model = factory()
        if not isinstance(model, nn.Module):
            raise BadInput(f"{source}: it returned {_a(model)}, wanted a torch.nn.Module")
    rnns = _rnns(model, source)
    if data is None:
        size = steps or STEPS, batch or BATCH
        called = {name: ((_noise(rnn, *size),), {}) for name, rnn in rnns.items()}
    elif steps or batch:
        raise BadInput("--steps, --batch: of random input, and --data brings its own")
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


def _function(spec: str, what: str) -> Callable[[], object]:
    """The function without arguments that "module:name" stands for."""
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
            raise  # one that the user's module wants
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
        raise BadInput(f"{what}: {spec} is to be called without arguments: {error}") from None
    return found


def _rnns(model: nn.Module, source: str) -> dict[str, nn.Module]:
    """Those that can be probed, by name."""
    modules = dict(model.named_modules())
    found = {n: m for n, m in modules.items() if type(m) is TorchRNN or isinstance(m, RNN)}
    if found:
        return found
    others = {n: m for n, m in modules.items() if isinstance(m, RECURRENT)}
    kinds = {type(m).__name__: n for n, m in reversed(list((others or modules).items()))}
    listed = ", ".join(f"{kind} ({name or 'the model itself'})" for kind, name in kinds.items())
    hint = "; served is torch.nn.RNN itself: no LSTM, GRU, cell or subclass yet" if others else ""
    raise BadInput(f"{source}: no torch.nn.RNN or rnnfast.RNN in it, but {listed}{hint}")


def _from_checkpoint(path: Path, flags: Mapping, prefix: str, key: str) -> RNN:
    state = _state_dict(path, prefix, key)
    if not {"input_size", "hidden_size"} <= flags.keys():
        raise BadInput(f"{path}: which RNN it is of: --input-size and --hidden-size, at least")
    try:
        wanted = RNN(**flags, device="meta").state_dict()
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
        w = state.get("weight_hh_l0", torch.empty(1, 1))
        gates = w.shape[0] // max(w.shape[-1], 1)
        if gates in (3, 4) and not flags.get("num_heads"):
            problems.append(f"{gates} gates look like {'GRU' if gates == 3 else 'LSTM'}, not RNN")
        raise BadInput(f"{path} does not fit the flags: {'; '.join(problems)}")
    dtype = state["weight_ih_l0"].dtype
    if not dtype.is_floating_point:
        raise BadInput(f"{path}: weight_ih_l0 is {dtype}, wanted a floating-point dtype")
    rnn = RNN(**flags, dtype=dtype)
    rnn.load_state_dict(state)
    return rnn


def _state_dict(path: Path, prefix: str, key: str) -> dict[str, Tensor]:
    """The tensors of the RNN, by its own names for them."""
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
    """Standard normal; drawn on the CPU, so that a seed says what."""
    x = torch.randn(steps, batch, rnn.input_size, device="cpu").to(next(rnn.parameters()))
    return x.transpose(0, 1) if rnn.batch_first else x


def _calls(
    model: nn.Module, rnns: dict[str, nn.Module], given: object, data: str
) -> dict[str, tuple[tuple, dict]]:
    """What each RNN is called with when the model is called with ``given``; of several calls, the
    one with most in it."""
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
        raise BadInput(f"--data: called with what {data} returns, the model calls no RNN of its")
    return {name: seen[name] for name in rnns if name in seen}


def _is_packed(x: object) -> bool:
    return isinstance(x, PackedSequence)  # which is a tuple


def _size(args: tuple) -> int:
    x = args[0]
    return (x.data if _is_packed(x) else x).numel()
