"""The installation in words, and the reasons for a module's choice of backend."""

from __future__ import annotations

import datetime
import inspect
import json
import platform
import subprocess
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import backends, convert
from . import watch as calls
from ._version import __version__
from .backends import cpu, cuda_plan
from .cells import CELLS
from .convert import OURS, TWINS

BUILD_REPORT = Path(__file__).with_name("_build.json")  # written by setup.py
WITHOUT_KERNELS = (
    "On the CPU torch's own kernels are used instead, which are up to tens of times slower for "
    "small models; options that nn.RNN does not have run as a loop in Python. Once the reason is "
    "mended, reinstall rnnfast with pip install --no-cache-dir --force-reinstall --no-deps"
)


def warn_of_missing_kernels() -> None:
    """Warns at import, because pip hides setup.py's own warning unless the installation fails."""
    if cpu._C is None:
        warnings.warn(
            f"rnnfast has no compiled kernels: {_why_missing()}. {WITHOUT_KERNELS}. To silence "
            "this: PYTHONWARNINGS='ignore:rnnfast has no compiled kernels'",
            RuntimeWarning,
            stacklevel=3,  # the line that imports rnnfast
        )


class Report(str):
    """Lines of text. Its repr is the lines themselves, for a notebook and Python's own prompt."""

    def __repr__(self) -> str:
        return str(self)


def info(full: bool = False) -> Report:
    """Versions, the compiled extension, and the backends that can compute here; for bug reports.

    Args:
        full: adds the report of torch.utils.collect_env on the machine, its compilers, drivers and
            packages, which takes seconds.
    """
    lines = [
        f"rnnfast {__version__}",
        f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}",
        f"extension: {_extension()}",
        f"CUDA kernels{_cuda()}",
        f"threads: {torch.get_num_threads()} of torch, on {cpu.cores()} cores",
    ]
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        lines.append(f"on {device}, float32:")
        lines += [f"  {name}: {_usable(name, device)}" for name in backends.BACKENDS]
    if full:
        from torch.utils.collect_env import get_pretty_env_info

        lines += ["", get_pretty_env_info()]
    else:
        lines.append("more about this machine: rnnfast.info(full=True), or info --full")
    return Report("\n".join(lines))


def _usable(name: str, device: str) -> str:
    """Why a backend computes no cell there, or which cells it does not compute."""
    reasons = {}
    for cell in CELLS:
        problem = backends.Problem(device, torch.float32, cell, projected=False)
        reasons[cell.removeprefix("rnn_")] = backends.BACKENDS[name].unavailable(problem)
    refused = [cell for cell, why in reasons.items() if why]
    if len(refused) == len(reasons):
        return reasons[refused[0]]
    return f"usable, without {', '.join(refused)}" if refused else "usable"


def explain(model: nn.Module, /, *args: Any, **named: Any) -> Report:
    """Names the backend that computes each recurrent module in ``model(*args, **named)``, and says
    why each other backend does not. torch computes its own modules. For one that
    :func:`rnnfast.replace` swaps, the report names the backend that it would have afterwards.

    A recurrent module alone is not called. Any other model is called once, in eval mode and without
    gradients, to see the arguments of its recurrent modules.

    Args:
        args, named: the arguments of the model.

    Raises:
        TypeError: ``model`` is no module; an RNN takes no such arguments.
        ValueError, RuntimeError: an RNN takes no input of that shape.
        BackendError: an RNN names a backend that cannot compute this call.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: given {type(model).__name__}, wanted a torch.nn.Module")
    model = getattr(model, "_orig_mod", model)  # the argument of torch.compile
    found = {name: m for name, m in model.named_modules() if convert.why_kept(m) is not None}
    if model in found.values():
        return Report("\n".join(_of_module(model, args, named)))
    if not found:
        return Report(f"{type(model).__name__} holds no recurrent module")
    ours = {n: m for n, m in found.items() if isinstance(m, OURS) or not convert.why_kept(m)}
    seen: dict[str, list[list[str]]] = {name: [] for name in ours}

    def see(name: str, module: nn.Module, args: tuple, named: dict) -> None:
        lines = _of_module(module, args, named)
        if lines not in seen[name]:
            seen[name].append(lines)

    if ours:
        calls.watch(model, ours, see, args, named)
    lines = []
    for name, module in found.items():
        texts = seen[name] if name in ours else [_of_module(module, (), {})]
        lines.append(f"{name}: {module}" + ("" if texts else ", which this call does not reach"))
        lines += [f"  {line}" for text in texts for line in text]
    return Report("\n".join(lines))


def _of_module(module: nn.Module, args: tuple, named: Mapping[str, Any]) -> list[str]:
    """The lines about one recurrent module and its arguments."""
    if isinstance(module, OURS):
        return _of_rnn(module, *args, **named)
    kind, why = type(module).__name__, convert.why_kept(module)
    if why:
        return [f"torch's own kernels compute {kind}: {why}"]
    lines = _of_rnn(convert.sharing(TWINS[type(module)], module), *args, **named)
    return [f"torch's own kernels compute nn.{kind}; after rnnfast.replace(model):"] + [
        f"  {line}" for line in lines
    ]


def _of_rnn(rnn: nn.RNNBase, *args: Any, **named: Any) -> list[str]:
    base = next(ours for ours in OURS if isinstance(rnn, ours))
    own = type(rnn).forward is not base.forward  # a subclass: its first argument is the input
    given = {"input": next(iter((*args, *named.values())), None)}
    if not own:
        given = inspect.signature(base.forward).bind(rnn, *args, **named).arguments
    input, reset = given["input"], given.get("reset")
    if not isinstance(input, (Tensor, PackedSequence)):
        kind = type(input).__name__
        raise TypeError(f"input: given {kind}, wanted a tensor or a PackedSequence")
    x = input.data if isinstance(input, PackedSequence) else input
    if x is input and x.dim() not in (2, 3) and not own:
        raise ValueError(f"input: given {x.dim()} axes, wanted [T, B, I], or [T, I] unbatched")
    if x.shape[-1] != rnn.input_size and not own:
        raise RuntimeError(f"input: given {x.shape[-1]} features, wanted {rnn.input_size}")
    rows = int(input.batch_sizes[0]) if isinstance(input, PackedSequence) else None
    problem = rnn._problem(x, reset, rows)
    chosen = backends.select(rnn.backend, problem)
    if rnn.backend == "auto":
        asked, otherwise = "auto", f"{chosen} comes first"
        reasons = {name: backends.passed_over(name, problem) for name in backends.BACKENDS}
    else:
        asked, otherwise = "asked for by name", f"{chosen} is asked for"
        reasons = backends.refusals(problem)
    cell = problem.cell.removeprefix("rnn_")
    lines = [f"{chosen} ({asked}), for {cell} in {problem.dtype} on {problem.device}"]
    if chosen in ("cuda", "triton"):
        lines.append(f"  {backends.BACKENDS[chosen].plan(problem)}")
    steps = rnn._stretch(chosen, _steps(rnn, input), problem)
    if steps:
        lines.append(f"  layers side by side, {steps} steps at a time (RNNFAST_OVERLAP)")
    lines += [f"  not {n}: {why or otherwise}" for n, why in reasons.items() if n != chosen]
    lines.append(
        "  second derivatives, forward mode and torch.func transforms: the eager formula, whatever "
        "the backend"
    )
    return lines


def _steps(rnn: nn.RNNBase, input: Tensor | PackedSequence) -> int:
    if isinstance(input, PackedSequence):
        return input.batch_sizes.numel()
    return input.shape[1 if rnn.batch_first and input.dim() == 3 else 0]


def cpu_name() -> str:
    """The name of the processor from Linux, or from Python where Linux does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine(device: str = "cpu") -> dict[str, str]:
    """The facts that a measured figure depends on: processor or GPU, versions, commit, date.

    Args:
        device: a device type, "cpu" or "cuda".
    """
    facts = {"processor": cpu_name(), "simd": cpu._C.simd_level() if cpu._C else ""}
    if device != "cpu":
        facts = {"processor": torch.cuda.get_device_name(), "simd": ""}
    return facts | {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rnnfast": __version__,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def _commit() -> str:
    """The commit of the checkout that this package is in; "" outside a checkout, or without git."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return ""
    commit = _git(root, "rev-parse", "--short=10", "HEAD")
    changed = _git(root, "status", "--porcelain", "--", ".", ":!bench/results")
    return f"{commit}+changes" if changed else commit


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()


def _extension() -> str:
    if cpu._C is None:
        return f"missing ({_why_missing()}). {WITHOUT_KERNELS}"
    return f"rnnfast._C with SIMD level {cpu._C.simd_level()} of {', '.join(cpu._C.simd_levels())}"


def _cuda() -> str:
    kernels = cuda_plan.KERNELS
    if kernels is None:
        return f": none ({_build().get('cuda', {}).get('reason') or 'the extension is missing'})"
    archs = getattr(kernels, "cuda_archs", "the emulation").replace(",", ", ")
    return f" for {archs}: {', '.join(kernels.cuda_kernels())}"


def _why_missing() -> str:
    """The reason why the extension was not built, from the build's report, or why it does not
    load."""
    report = _build()
    if reason := report.get("reason"):
        return reason
    others = sorted(file.name for file in BUILD_REPORT.parent.glob("_C.*"))
    if report and others and cpu.WHY_MISSING.startswith("No module named"):
        return f"{cpu.WHY_MISSING}: Python {platform.python_version()} loads no {others[0]}"
    return cpu.WHY_MISSING if report else f"{cpu.WHY_MISSING}: these sources were never built"


def _build() -> dict:
    """The report that setup.py wrote; {} without one."""
    return json.loads(BUILD_REPORT.read_text()) if BUILD_REPORT.exists() else {}
