"""Shared by the commands for a machine with a GPU: its facts, a process under a limit, arguments.

Nothing here imports torch, so that a broken driver costs one process and not the command.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
LEAST_S = 3  # with less time left nothing begins
KEPT = 200_000  # bytes of a process's output


@dataclass
class Ended:
    """The output of a process, and ``why`` it failed, or ""."""

    out: str = ""
    err: str = ""
    why: str = ""
    seconds: float = 0.0

    @property
    def timed_out(self) -> bool:
        return self.why.startswith("killed")


class _Tail(threading.Thread):
    """Reads a stream to its end and keeps the last bytes, so that a flood takes no memory."""

    def __init__(self, stream: IO[bytes], keep: int) -> None:
        super().__init__(daemon=True)
        self.stream, self.keep, self.last, self.size = stream, keep, bytearray(), 0
        self.start()

    def run(self) -> None:
        with self.stream:
            while block := self.stream.read1(1 << 16):
                self.size += len(block)
                self.last += block
                if len(self.last) > 2 * self.keep:
                    del self.last[: -self.keep]

    def text(self) -> str:
        self.join(5)  # a process that left the group may hold the stream for ever
        lost = self.size - self.keep
        head = f"[{lost} bytes before this were left out]\n" if lost > 0 else ""
        return head + self.last[-self.keep :].decode(errors="replace")


def run(
    command: Sequence[str],
    limit_s: float,
    *,
    merge: bool = False,
    keep: int = KEPT,
    env: Mapping[str, str] | None = None,
) -> Ended:
    """Runs a process in ROOT, in its own process group, and ends the group with it.

    Args:
        merge: stderr goes to ``out``, in order.
        keep: the last bytes kept of each stream.
        env: added to the environment.
    """
    begin = time.monotonic()
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | dict(env or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if merge else subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        return Ended(why=f"{command[0]} does not start: {error.strerror}")
    tails = [_Tail(s, keep) for s in (process.stdout, process.stderr) if s]
    try:
        status, why = process.wait(limit_s), ""
    except subprocess.TimeoutExpired:
        status, why = 0, f"killed at its limit of {limit_s:.0f} s"
    finally:  # also if the user interrupts, because the group gets no signal
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:  # the kernel driver holds it, so we leave it behind
        why += " and did not die"
    if status:
        why = f"exit status {status}" if status > 0 else f"ended by {signal.Signals(-status).name}"
    texts = [*(tail.text() for tail in tails), ""]
    return Ended(texts[0], texts[1], why, time.monotonic() - begin)


def machine(versions: Sequence[str], nvcc: str = "nvcc") -> dict[str, str]:
    """The facts that figures depend on. Reads only. A part that does not answer is left out.

    Args:
        versions: a command that prints more facts, as one line of JSON.
    """
    fields = ("name", "driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
    smi = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    facts = dict(zip(("gpu", *fields[1:]), first_line(smi).split(", ")))
    release = re.search(r"release ([\d.]+)", run([nvcc, "--version"], 60).out)
    facts["nvcc"] = release[1] if release else ""
    found = first_line(versions)
    facts = (json.loads(found) if found else {"torch": "does not work here"}) | facts
    return {k: v for k, v in facts.items() if v}


def sources() -> str:
    """A hash of the sources that are built and run."""
    names = "csrc", "rnnfast", "triton_kernels", "setup.py"
    files = [f for name in names for f in (ROOT / name, *(ROOT / name).rglob("*")) if f.is_file()]
    code = [f for f in sorted(files) if f.suffix in (".py", ".h", ".cuh", ".cu", ".cpp")]
    return hashlib.sha256(b"".join(f.read_bytes() for f in code)).hexdigest()[:12]


def architecture() -> str:
    """The first GPU as nvcc names it, such as sm_90; "" if nvidia-smi does not say."""
    found = first_line(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    capability = re.fullmatch(r"(\d+)\.(\d+)", found.strip())
    return f"sm_{capability[1]}{capability[2]}" if capability else ""


def first_line(command: Sequence[str]) -> str:
    """The first line of the output; "" if the command fails."""
    done = run(command, 60)
    return "" if done.why else done.out.partition("\n")[0]


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def add_arguments(parser: argparse.ArgumentParser, budget_s: float, what: str) -> None:
    """--out, --budget and --dry-run."""
    text = f"for {what} (default bench/results)"
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help=text)
    text = f"seconds for all (default {budget_s})"
    parser.add_argument("--budget", type=_budget, default=budget_s, metavar="S", help=text)
    parser.add_argument("--dry-run", action="store_true", help="needs no GPU; marked as such")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the process with status 2 if the folder is missing, or a GPU that the command needs."""
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"argument --out: {args.out} is not a folder")
    if not (args.dry_run or shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists()):
        parser.error("no NVIDIA GPU here (--dry-run needs none)")


def _budget(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not LEAST_S <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"given {text!r}, wanted {LEAST_S} to 3600 seconds")
    return seconds


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
