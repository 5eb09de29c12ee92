"""Points one after another, each with every provider that passes the gate."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from tqdm import tqdm

from . import gate, points
from .points import BOTH, FORWARD, Point
from .providers import Layer, Provider, make_problem
from .report import Measured
from .timing import Gemm, take_turns

FORWARD_PART = 0.3  # of a point's time


def measure(
    todo: Sequence[Point],
    providers: Sequence[Provider],
    seconds: float,
    rounds: int,
    failures: list[str],
) -> list[Measured]:
    """Appends to ``failures`` who was not timed at which point, and why; the rest goes on."""
    found, gemm = [], Gemm()
    rates = [gemm.gflops()]
    for point in tqdm(todo, desc="benchmark", unit="point", disable=None):
        prepared = {p.name: prepare(p, point, failures) for p in providers}
        layers = {name: layer for name, layer in prepared.items() if layer}
        if not layers:
            continue
        calls = {
            FORWARD: {name: layer.forward for name, layer in layers.items()},
            BOTH: {name: layer.both for name, layer in layers.items()},
        }
        parts = {FORWARD: FORWARD_PART * seconds, BOTH: (1 - FORWARD_PART) * seconds}
        samples = {what: take_turns(calls[what], parts[what], rounds) for what in calls}
        saved = {name: layer.saved_bytes() for name, layer in layers.items()}
        rates.append(gemm.gflops())
        around = statistics.median(rates[-2] + rates[-1])
        found.append(Measured(point, samples, saved, torch.get_num_threads(), around))
    return found


def prepare(provider: Provider, point: Point, failures: list[str]) -> Layer | None:
    """The layer at this point, called once, if the provider has shown that it is right."""
    try:
        problem = gate.gate_problem(point)
        wrong = gate.complaints(provider.build(problem), problem)
        if not wrong:
            layer = provider.build(make_problem(*point[:3]))
            layer.forward(), layer.both()
            return layer
        why = "wrong results, so no time. " + "; ".join(wrong)
    except Exception as error:  # whatever it is: it is told, and ends in exit status 1
        why = str(error) or type(error).__name__
    failures.append(f"{provider.name} at {point}: {why}")
    return None


def thread_scaling(
    provider: Provider, seconds: float, rounds: int, failures: list[str]
) -> list[Measured]:
    """The same layer on one thread and on two, in turns; nothing if it cannot be timed."""
    point = Point(*points.SCALING_POINT, "threads")
    layer = prepare(provider, point, failures)
    if not layer:
        return []
    threads = torch.get_num_threads()

    def on(n: int) -> Callable[[], object]:
        def call() -> None:
            torch.set_num_threads(n)
            layer.both()

        return call

    samples = take_turns({"1": on(1), "2": on(2)}, seconds, rounds)
    torch.set_num_threads(threads)
    return [Measured(point, {BOTH: {provider.name: samples[str(n)]}}, {}, n, None) for n in (1, 2)]
