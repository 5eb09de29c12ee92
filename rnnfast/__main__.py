"""The command line: ``python -m rnnfast {info,demo}``."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .report import info

# What `pip install rnnfast[demo]` brings, by the names under which it is imported.
DEMO_IMPORTS = {"matplotlib", "rich", "sklearn", "tqdm"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns the exit status: 2 for bad input or a missing extra."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        return _fail("interrupted", status=130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rnnfast")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    text = "versions, device, which backends are usable and why not"
    command = commands.add_parser("info", help=text, description=text)
    command.set_defaults(run=_info)

    text = "why an RNN forgets, and what helps: six networks on handwritten digits"
    command = commands.add_parser("demo", help=text, description=text)
    command.add_argument(
        "--out",
        type=Path,
        default=Path("rnnfast-demo"),
        metavar="FOLDER",
        help="where the picture and the figures go (default: %(default)s)",
    )
    command.add_argument(
        "--epochs", type=_positive, metavar="N", help="passes over the digits, for every delay"
    )
    command.add_argument(
        "--seed", type=_seed, default=0, metavar="N", help="of weights, batches and noise"
    )
    size = command.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="thirty epochs, in the place of eight")
    size.add_argument(
        "--quick", action="store_true", help="a few steps, to see that everything works"
    )
    command.set_defaults(run=_demo)
    return parser


def _info(options: argparse.Namespace) -> int:
    print(info())
    return 0


def _demo(options: argparse.Namespace) -> int:
    try:
        from . import demo
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in DEMO_IMPORTS:
            raise
        return _fail(f"the demo needs {error.name}: pip install rnnfast[demo]")
    try:  # before two minutes of training, not after
        options.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=options.out).close()
    except OSError as error:
        return _fail(f"--out: cannot write to {options.out}: {error.strerror}")
    names = ("epochs", "seed", "full", "quick")
    demo.run(options.out, **{name: getattr(options, name) for name in names})
    return 0


def _positive(text: str) -> int:
    value = _integer(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"given {value}, wanted 1 or more")
    return value


def _seed(text: str) -> int:
    value = _integer(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"given {value}, wanted 0 to 2^63 - 1")
    return value


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"given {text!r}, wanted a whole number") from None


def _fail(message: str, status: int = 2) -> int:
    print(f"rnnfast: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
