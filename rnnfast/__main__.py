"""The command line: ``rnnfast {info,demo,probe,validate,bench}``, or ``python -m rnnfast``."""

from __future__ import annotations

import argparse
import inspect
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import arguments
from ._version import __version__
from .backends import BACKENDS
from .modules import RNN
from .modules.settings import CHOICES
from .report import info

# What `pip install rnnfast[demo]` brings, by the names under which it is imported.
DEMO_IMPORTS = {"matplotlib", "rich", "sklearn", "tqdm"}
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
    as_script = Path(sys.argv[0]).stem == "rnnfast"  # which pip makes
    found = argparse.ArgumentParser(prog="rnnfast" if as_script else "python -m rnnfast")
    found.add_argument("--version", action="version", version=f"rnnfast {__version__}")
    commands = found.add_subparsers(title="commands", metavar="COMMAND", required=True)

    text = "versions, device, which backends are usable and why not"
    command = commands.add_parser("info", help=text, description=text)
    command.add_argument(
        "--full",
        action="store_true",
        help="add what torch.utils.collect_env finds about the machine: takes seconds",
    )
    command.set_defaults(run=_info)

    text = "why an RNN forgets, and what helps: six networks on handwritten digits"
    command = commands.add_parser("demo", help=text, description=text)
    _add_out(command, "rnnfast-demo")
    command.add_argument(
        "--epochs",
        type=arguments.positive,
        metavar="N",
        help="passes over the digits, for every delay",
    )
    command.add_argument(
        "--seed", type=arguments.seed, default=0, metavar="N", help="of weights, batches and noise"
    )
    size = command.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="thirty epochs, in the place of eight")
    size.add_argument(
        "--quick", action="store_true", help="a few steps, to see that everything works"
    )
    command.set_defaults(run=_demo)

    text = "how far back the RNNs of a model feel their past, and what to change"
    command = commands.add_parser("probe", help=text, description=text)
    command.add_argument(
        "source",
        metavar="SOURCE",
        help="module:factory, a function without arguments that returns a model (looked for in "
        "this folder, too); or a checkpoint, with the flags of its RNN",
    )
    command.add_argument(
        "--data",
        metavar="MODULE:FUNCTION",
        help="a function that returns what the model is called with: a tensor, or a tuple of "
        "arguments (default: normal noise into every RNN)",
    )
    command.add_argument(
        "--steps", type=arguments.positive, metavar="N", help="of the noise (default: 250)"
    )
    command.add_argument(
        "--batch", type=arguments.positive, metavar="N", help="samples of the noise (default: 32)"
    )
    command.add_argument(
        "--seed", type=arguments.seed, default=0, metavar="N", help="of weights, noise and vectors"
    )
    _add_out(command, "rnnfast-probe")
    group = command.add_argument_group("checkpoint", "which RNN it is of, as rnnfast.RNN takes it")
    for flag, kind in (
        ("--input-size", arguments.positive),
        ("--hidden-size", arguments.positive),
        ("--num-layers", arguments.positive),
        ("--num-heads", arguments.positive),
        ("--norm-eps", float),
    ):
        group.add_argument(flag, type=kind, metavar="N", default=argparse.SUPPRESS)
    for flag, choices in (
        ("--nonlinearity", ["tanh", "relu", "sigmoid"]),
        ("--norm", CHOICES["norm"][1:]),
    ):
        group.add_argument(flag, choices=choices, default=argparse.SUPPRESS)
    for flag in ("--bidirectional", "--batch-first", "--residual"):
        group.add_argument(flag, action="store_true", default=argparse.SUPPRESS)
    group.add_argument("--no-bias", dest="bias", action="store_false", default=argparse.SUPPRESS)
    group.add_argument("--key", default="", help="which entry of the file is the state_dict")
    group.add_argument("--prefix", default="", help="of the RNN's names in the state_dict")
    command.set_defaults(run=_probe)

    text = "the kernels against float64, on this machine; exit status 1 when an error is too large"
    command = commands.add_parser("validate", help=text, description=text)
    command.add_argument(
        "--backend",
        nargs="+",
        choices=list(BACKENDS),
        default=[],
        metavar="NAME",
        help=f"of {', '.join(BACKENDS)} (default: those that serve, but the reference)",
    )
    command.add_argument(
        "--dtype",
        nargs="+",
        default=[],
        metavar="NAME",
        help="of float32, float64, bfloat16, float16 and, on a GPU, tf32 (default: all)",
    )
    command.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: cuda where there is one"
    )
    _add_out(command, "rnnfast-validate")
    size = command.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="fewer sizes: about a minute")
    size.add_argument(
        "--full", action="store_true", help="every size, and tensors of 2^31 elements"
    )
    command.set_defaults(run=_validate)

    text = "rnnfast.RNN beside torch.nn.RNN and other peers, in one run"
    command = commands.add_parser("bench", help=text, description=text)
    _add_bench(command)
    command.set_defaults(run=_bench)
    return found


def _add_bench(command: argparse.ArgumentParser) -> None:
    _add_out(command, "rnnfast-bench")
    size = command.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_true", help="a few workloads (on a CPU small ones), each briefly"
    )
    size.add_argument(
        "--points",
        type=arguments.point,
        nargs="+",
        metavar="T,B,H",
        help="these only, I = H (no picture)",
    )
    size.add_argument(
        "--compare",
        type=Path,
        nargs=2,
        metavar=("OLD", "NEW"),
        help="measure nothing: what got slower from one CSV file to another",
    )
    command.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: cuda where there is one"
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
    group = command.add_argument_group("what the layers of --points are")
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
        help="where the picture and the figures go (default: %(default)s)",
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
    if problem := _unwritable(options.out):  # before two minutes of training, not after
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
    """Why nothing can be written there, or ""; the folder is made."""
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
