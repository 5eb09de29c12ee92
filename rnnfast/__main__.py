"""The command line: ``rnnfast {info,demo,probe,validate,bench}``, or ``python -m rnnfast``."""

from __future__ import annotations

import argparse
import inspect
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

from . import command_arguments as arguments
from ._version import __version__
from .argument_types import Nonlinearity
from .backends import BACKENDS
from .modules import RNN
from .modules.settings import CHOICES
from .report import info

# The modules that the packages of an extra install.
DEMO_IMPORTS = {"matplotlib", "rich", "sklearn", "tqdm"}  # rnnfast[demo]
PROBE_IMPORTS = {"matplotlib", "rich"}  # rnnfast[cli,plots]
VALIDATE_IMPORTS = {"matplotlib", "rich", "tqdm"}  # rnnfast[cli,plots]
BENCH_IMPORTS = {"matplotlib", "numpy", "rich", "tqdm"}  # rnnfast[cli,plots]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns the exit status: 2 for bad input or a missing extra."""
    options = parser().parse_args(argv)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        return _fail("interrupted", status=130)


def parser() -> argparse.ArgumentParser:
    as_script = Path(sys.argv[0]).stem == "rnnfast"  # the script that pip installs
    found = argparse.ArgumentParser(prog="rnnfast" if as_script else "python -m rnnfast")
    found.add_argument("--version", action="version", version=f"rnnfast {__version__}")
    commands = found.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, text: str, add_options: Callable, run: Callable) -> None:
        command = commands.add_parser(name, help=text, description=text)
        add_options(command)
        command.set_defaults(run=run)

    add("info", "versions, device, the usable backends, and why others are not", _add_info, _info)
    text = "why an RNN forgets, and what helps: six networks on handwritten digits"
    add("demo", text, _add_demo, _demo)
    add("probe", "how long the RNNs of a model remember, and what to change", _add_probe, _probe)
    text = "the kernels against float64, on this machine; exit status 1 when an error is too large"
    add("validate", text, _add_validate, _validate)
    add("bench", "rnnfast.RNN beside torch.nn.RNN and other peers, in one run", _add_bench, _bench)
    return found


def _add_info(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--full",
        action="store_true",
        help="add the report of torch.utils.collect_env on the machine: takes seconds",
    )


def _add_demo(command: argparse.ArgumentParser) -> None:
    _add_out(command, "rnnfast-demo")
    command.add_argument(
        "--epochs",
        type=arguments.positive,
        metavar="N",
        help="passes over the digits, for every delay",
    )
    command.add_argument(
        "--seed",
        type=arguments.seed,
        default=0,
        metavar="N",
        help="the seed of weights, batches and noise",
    )
    size = command.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="thirty epochs instead of eight")
    size.add_argument(
        "--quick", action="store_true", help="a few steps, to see that everything works"
    )


def _add_probe(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "source",
        metavar="SOURCE",
        help="module:factory, a function without arguments that returns a model (its module may be "
        "in this folder); or a checkpoint, with the flags of its module",
    )
    command.add_argument(
        "--data",
        metavar="MODULE:FUNCTION",
        help="a function that returns the input of the model: a tensor, or a tuple of arguments "
        "(default: normal noise into every RNN, LSTM and GRU)",
    )
    command.add_argument(
        "--steps", type=arguments.positive, metavar="N", help="steps of the noise (default: 250)"
    )
    command.add_argument(
        "--batch", type=arguments.positive, metavar="N", help="samples of the noise (default: 32)"
    )
    command.add_argument(
        "--seed",
        type=arguments.seed,
        default=0,
        metavar="N",
        help="the seed of weights, noise and vectors",
    )
    _add_out(command, "rnnfast-probe")
    group = command.add_argument_group("checkpoint", "the arguments of its module, as in rnnfast")
    for flag, kind in (
        ("--input-size", arguments.positive),
        ("--hidden-size", arguments.positive),
        ("--num-layers", arguments.positive),
        ("--num-heads", arguments.positive),
        ("--norm-eps", float),
    ):
        group.add_argument(flag, type=kind, metavar="N", default=argparse.SUPPRESS)
    for flag, choices in (
        ("--nonlinearity", get_args(Nonlinearity)),
        ("--norm", CHOICES["norm"][1:]),
    ):
        group.add_argument(flag, choices=choices, default=argparse.SUPPRESS)
    for flag in ("--bidirectional", "--batch-first", "--residual"):
        group.add_argument(flag, action="store_true", default=argparse.SUPPRESS)
    group.add_argument("--no-bias", dest="bias", action="store_false", default=argparse.SUPPRESS)
    group.add_argument("--key", default="", help="the entry of the file that is the state_dict")
    group.add_argument(
        "--prefix", default="", help="the prefix of the RNN's names in the state_dict"
    )


def _add_validate(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--backend",
        nargs="+",
        choices=list(BACKENDS),
        default=[],
        metavar="NAME",
        help=f"some of {', '.join(BACKENDS)} (default: all that are usable, but the reference)",
    )
    command.add_argument(
        "--dtype",
        nargs="+",
        default=[],
        metavar="NAME",
        help="some of float32, float64, bfloat16, float16 and, on a GPU, tf32 (default: all)",
    )
    command.add_argument(
        "--cell",
        nargs="+",
        choices=["RNN", "LSTM", "GRU"],
        default=["RNN", "LSTM", "GRU"],
        metavar="NAME",
        help="some of RNN, LSTM, GRU (default: all)",
    )
    command.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: cuda where there is a GPU"
    )
    _add_out(command, "rnnfast-validate")
    size = command.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="fewer sizes: about two minutes")
    size.add_argument(
        "--full", action="store_true", help="every size, and tensors of 2^31 elements"
    )


def _add_bench(command: argparse.ArgumentParser) -> None:
    _add_out(command, "rnnfast-bench")
    size = command.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_true", help="a few workloads, small ones on a CPU, each briefly"
    )
    size.add_argument(
        "--points",
        type=arguments.point,
        nargs="+",
        metavar="T,B,H",
        help="these sizes alone, I = H (no picture)",
    )
    size.add_argument(
        "--compare",
        type=Path,
        nargs=2,
        metavar=("OLD", "NEW"),
        help="measure nothing: print what is slower in the second CSV file than in the first",
    )
    command.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: cuda where there is a GPU"
    )
    command.add_argument(
        "--providers",
        nargs="+",
        metavar="NAME",
        help="default: all but rnnfast-torch and rnnfast-reference",
    )
    command.add_argument(
        "--seconds-per-workload",
        type=arguments.seconds,
        metavar="S",
        help="default 2.5, with --quick 0.1",
    )
    command.add_argument(
        "--threads", type=arguments.positive, default=2, metavar="N", help="default: 2"
    )
    command.add_argument(
        "--probe", type=Path, metavar="JSON", help="a result of make gpu-probe, for the floors"
    )
    group = command.add_argument_group("the layers of --points")
    precisions = ("float32", "tf32", "float64", "bfloat16", "float16")
    group.add_argument("--precisions", nargs="+", choices=precisions)
    group.add_argument("--layers", type=arguments.positive, default=1, metavar="N")
    group.add_argument("--bidirectional", action="store_true")
    group.add_argument("--norm", choices=["layer"])
    group.add_argument("--packed", action="store_true", help="rows of T / 2 to T steps")


def _add_out(command: argparse.ArgumentParser, folder: str) -> None:
    command.add_argument(
        "--out",
        type=Path,
        default=Path(folder),
        metavar="FOLDER",
        help="the folder of the picture and the figures (default: %(default)s)",
    )


def _info(options: argparse.Namespace) -> int:
    print(info(options.full))
    return 0


def _demo(options: argparse.Namespace) -> int:
    try:
        from . import demo
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in DEMO_IMPORTS:
            raise
        return _fail(f"the demo needs {error.name}: pip install rnnfast[demo]")
    if problem := _unwritable(options.out):  # two minutes of training would be lost
        return _fail(problem)
    names = ("epochs", "seed", "full", "quick")
    demo.run(options.out, **{name: getattr(options, name) for name in names})
    return 0


def _probe(options: argparse.Namespace) -> int:
    try:
        from .diagnose import command
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in PROBE_IMPORTS:
            raise
        return _fail(f"the probe needs {error.name}: pip install rnnfast[cli,plots]")
    if problem := _unwritable(options.out):
        return _fail(problem)
    known = inspect.signature(RNN).parameters
    flags = {name: value for name, value in vars(options).items() if name in known}
    try:
        command.run(
            options.source,
            options.out,
            data=options.data,
            steps=options.steps,
            batch=options.batch,
            seed=options.seed,
            checkpoint=command.Checkpoint(flags, options.prefix, options.key),
        )
    except command.BadInput as error:
        return _fail(" ".join(str(error).split()))
    return 0


def _validate(options: argparse.Namespace) -> int:
    try:
        from .validate import command
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in VALIDATE_IMPORTS:
            raise
        return _fail(f"validate needs {error.name}: pip install rnnfast[cli,plots]")
    if problem := _unwritable(options.out):
        return _fail(problem)
    try:
        result = command.run(
            options.out,
            backends=options.backend,
            cells=options.cell,
            dtypes=options.dtype,
            device=options.device,
            size="quick" if options.quick else "full" if options.full else "default",
        )
    except command.BadInput as error:
        return _fail(str(error))
    return 0 if result["passed"] else 1


def _bench(options: argparse.Namespace) -> int:
    try:
        from .bench import command
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in BENCH_IMPORTS:
            raise
        return _fail(f"the benchmark needs {error.name}: pip install rnnfast[cli,plots]")
    try:
        if options.compare:
            return command.compared(*options.compare)
        if problem := _unwritable(options.out):
            return _fail(problem)
        return command.run(options)
    except command.BadInput as error:
        return _fail(str(error))


def _unwritable(folder: Path) -> str:
    """Makes the folder. The reason why nothing can be written there, or ""."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return f"--out: cannot write to {folder}: {error.strerror}"
    return ""


def _fail(message: str, status: int = 2) -> int:
    print(f"rnnfast: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
