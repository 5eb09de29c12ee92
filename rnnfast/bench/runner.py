"""Runs the workloads one after another, each with every provider that passes the gate."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from ..recurrence import precision
from .floors import Chip
from .gate import Gate, shortened
from .points import SCALING_POINT
from .providers import Provider
from .providers.layer import Layer
from .rows import Row, rows
from .timing import Clock, CudaClock, Gemm, HostClock, in_blocks, speed_up, take_turns
from .workload import BOTH, FORWARD, GRAPH, STEP, Data, Workload

SHARES = {FORWARD: 1, BOTH: 2, STEP: 1, GRAPH: 1}  # shares of a workload's time
SWEPT = (FORWARD, BOTH)  # for the pictures and the targets


@dataclass
class Runner:
    """``failures``: providers that were not timed, at which work, and why. ``left_out``: why a
    provider cannot run. ``notes``: what could not be captured. A failure stops nothing else."""

    providers: Sequence[Provider]
    seconds: float  # for each workload
    rounds: int
    chip: Chip | None = None
    failures: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    scaling: dict[str, float] = field(default_factory=dict)  # by provider: one thread / two
    _gemms: dict[tuple[str, str], Gemm] = field(default_factory=dict)
    _rates: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def measure(self, todo: Sequence[Workload]) -> list[Row]:
        found: list[Row] = []
        for work in tqdm(todo, desc="benchmark", unit="workload", disable=None):
            try:
                with precision.tf32(work.precision == "tf32"):
                    self._know_machine(work)
                    found += self._measure(work)
            except Exception as error:  # out of memory, an error of the GPU: the run goes on
                self.failures.append(f"{work}: {first_line(error)}")
            if work.device == "cuda":
                torch.cuda.empty_cache()
        return found

    def _know_machine(self, work: Workload) -> None:
        key = (work.device, work.precision)
        if key not in self._gemms:
            clock: Clock = CudaClock() if work.device == "cuda" else HostClock()
            yardstick = work.precision if work.device == "cuda" else "float32"
            self._gemms[key] = Gemm(work.device, yardstick, clock)
            self._rates[key] = self._gemms[key].gflops()

    def _measure(self, work: Workload) -> list[Row]:
        layers = self.prepare(work)
        if not layers:
            return []
        key = (work.device, work.precision)
        clock = self._gemms[key].clock
        ways = self._ways(work, layers)
        total = sum(SHARES[what] for what in ways)
        alone = {name for name, layer in layers.items() if layer.own_block}
        samples = {
            what: in_blocks(calls, alone, self.seconds * SHARES[what] / total, self.rounds, clock)
            for what, calls in ways.items()
        }
        before, self._rates[key] = self._rates[key], self._gemms[key].gflops()
        rate = statistics.median(before + self._rates[key])
        return rows(work, samples, layers, rate, self.chip)

    def _ways(self, work: Workload, layers: dict[str, Layer]) -> dict[str, dict[str, Callable]]:
        kinds = SWEPT if work.kind in ("sweep", "drawn") else (FORWARD, BOTH, STEP)
        ways = {
            what: {name: layer.calls[what] for name, layer in layers.items() if what in layer.calls}
            for what in kinds
        }
        if work.device == "cuda":
            ways[GRAPH] = self._captured(work, layers)
        return {what: calls for what, calls in ways.items() if calls}

    def _captured(self, work: Workload, layers: dict[str, Layer]) -> dict[str, Callable]:
        found = {}
        for name, layer in layers.items():
            try:
                found[name] = captured(layer.calls[BOTH])
            except (RuntimeError, KeyError) as error:
                self.notes.append(f"{name} at {work}: no CUDA graph: {first_line(error)}")
        return found

    def prepare(self, work: Workload) -> dict[str, Layer]:
        """{provider: its layer}, for the providers that passed the gate. Every call of a layer has
        run once."""
        able = []
        for provider in self.providers:
            if why := provider.unavailable(work):
                self.left_out.setdefault(f"{provider.name}: {why}", str(work))
            else:
                able.append(provider)
        if not able:
            return {}
        gate = Gate(shortened(work))
        data = work.data().to(work.device, work.dtype)
        found = {provider.name: self._build(provider, work, gate, data) for provider in able}
        return {name: layer for name, layer in found.items() if layer}

    def _build(self, provider: Provider, work: Workload, gate: Gate, data: Data) -> Layer | None:
        try:
            wrong = gate.complaints(provider.build(shortened(work), gate.data))
            if not wrong:
                layer = provider.build(work, data)
                for call in layer.calls.values():
                    call()
                return layer
            why = "wrong results, so no time. " + "; ".join(wrong)
        except Exception as error:  # any error: we report it, and the exit status is 1
            why = first_line(error)
        self.failures.append(f"{provider.name} at {work}: {why}")
        return None

    def thread_scaling(self) -> list[Row]:
        """Times a layer on one thread and on two, in turns. Does nothing if it cannot be timed."""
        work = Workload(*SCALING_POINT, "threads")
        threads = torch.get_num_threads()
        found: list[Row] = []
        for name, layer in self.prepare(work).items():
            if BOTH not in layer.calls:
                continue
            calls = {n: _on(n, layer.calls[BOTH]) for n in (1, 2)}
            samples = take_turns(calls, self.seconds, self.rounds)
            self.scaling[name] = speed_up(samples[1], samples[2]).median
            for n, seconds in samples.items():
                found += rows(work, {BOTH: {name: seconds}}, {name: layer}, None, None, threads=n)
        torch.set_num_threads(threads)
        return found


def _on(threads: int, call: Callable[[], object]) -> Callable[[], None]:
    def on_threads() -> None:
        torch.set_num_threads(threads)
        call()

    return on_threads


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """The call as a CUDA graph, warmed up on a side stream, as a capture needs."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay(kept: object = kept) -> None:  # the outputs must live as long as the graph
        graph.replay()

    return replay


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
