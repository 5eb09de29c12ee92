"""Compiles the probes and runs each measurement in its own process, under its own time limit."""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from .. import gpu

SOURCES = Path(__file__).parent / "cuda"
FIGURES = 10_000_000  # bytes of figures from one process
NVCC_FLAGS = ("-std=c++20", "-O3", "-gencode=arch=compute_90,code=sm_90")


@dataclass
class Outcome:
    """The output of one process. ``failures`` is empty if everything went well."""

    figures: list[dict] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


def build(
    programs: Sequence[str], into: Path, nvcc: str = "nvcc", limit_s: float = 120
) -> dict[str, str]:
    """Compiles ``programs`` side by side; returns {program: why it could not be compiled}."""
    into.mkdir(parents=True, exist_ok=True)
    newest = max(p.stat().st_mtime for p in SOURCES.rglob("*") if p.is_file())

    def compile_one(program: str) -> str:
        binary = into / program
        if binary.exists() and binary.stat().st_mtime > newest:
            return ""
        command = [nvcc, *NVCC_FLAGS, "-o", str(binary), str(SOURCES / f"{program}.cu")]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
        except subprocess.TimeoutExpired:
            return f"did not compile within {limit_s:.0f} s"
        return "" if done.returncode == 0 else f"does not compile: {_last_lines(done.stderr)}"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return {p: why for p, why in zip(programs, pool.map(compile_one, programs)) if why}


def run(command: Sequence[str], limit_s: float) -> Outcome:
    """Runs one process that prints figures; keeps those printed before a crash or the limit."""
    done = gpu.run(command, limit_s, keep=FIGURES)
    outcome = Outcome(seconds=done.seconds)
    if done.why:
        said = "" if done.timed_out else f": {_last_lines(done.err)}"
        outcome.failures.append(done.why + said)
    for line in done.out.splitlines():
        try:
            kind, content = parse_line(line)
        except ValueError as error:
            outcome.failures.append(f"{error}: {line[:200]}")
            continue
        if kind == "figure":
            outcome.figures.append(content)
        else:
            outcome.failures.append(content)
    if not outcome.figures and not outcome.failures:
        outcome.failures.append("printed no figure")
    return outcome


def parse_line(line: str) -> tuple[str, dict | str]:
    """("figure", the figure) or ("failed", what failed); ValueError when it is neither."""
    try:
        data = json.loads(line)
    except json.JSONDecodeError:
        raise ValueError("not JSON") from None
    if not isinstance(data, dict):
        raise ValueError("not an object")
    if "failed" in data:
        return "failed", str(data["failed"])
    wrong = {"figure", "params", "value", "unit"} - data.keys()
    if wrong:
        raise ValueError(f"no {', '.join(sorted(wrong))}")
    numbers = [data[k] for k in ("value", "low", "high") if k in data]
    if not all(type(n) in (int, float) and math.isfinite(n) for n in numbers):
        raise ValueError("not a finite number")
    return "figure", data


def _last_lines(text: str) -> str:
    return " / ".join(text.strip().splitlines()[-3:]) or "no message"
