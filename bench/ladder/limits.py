"""The limits of the kernels in a long call: forward and all gradients of one layer, I = H, float32,
part by part, beside torch's products.

    .venv/bin/python -m bench.ladder.limits                  # the listed sizes with H >= 128
    .venv/bin/python -m bench.ladder.limits 256,32,256       # T,B,H of your own

The time of a part is the difference of two calls, with the part and without it. Each is the least
of several, in turns. Times are processor time over the number of threads, so other work on the
machine does not count. A waiting thread spins: with more than one thread use an idle machine, or
OMP_WAIT_POLICY=passive, which leaves the waiting out. "tanh" is the time beyond ReLU's. "packing"
is the time of a call of one step beyond its step.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable, Sequence

import torch

import rnnfast
from rnnfast.backends import cpu
from rnnfast.bench import points
from rnnfast.bench.timing import SETTLE_S, Gemm, HostClock
from rnnfast.bench.workload import Workload
from rnnfast.recurrence.groups import (
    Kept,
    Options,
    OutputGradients,
    Rows,
    Saved,
    States,
    Wanted,
    Weights,
)

Call = Callable[[], object]
SIZES = [size for size in points.LISTED if size[2] >= 128]
ROUNDS = 8
WHOLE = "the whole call"
LARGE = "torch: 2048^3"
SAME = "torch: (T B, H) x (H, H)"
# {part: (call with it, call without it, number of its products)}.
PARTS = {
    "projection": ("x", "p", 1),
    "time loop": ("p", None, 1),
    "its tanh": ("p", "p, relu", 0),
    "packing before the loop": ("p, T = 1", "p, a step", 0),
    "BPTT": ("bptt", None, 1),
    "packing before BPTT": ("bptt, T = 1", "bptt, a step", 0),
    "dW_hh": ("dw_hh", "bptt", 1),
    "dW_ih, db": ("dw", "dw_hh", 1),
    "dx": ("all", "dw", 1),
    "module, autograd": (WHOLE, "x + all", 0),
    WHOLE: (WHOLE, None, 6),
    SAME: (SAME, None, 1),
}


def calls(T: int, B: int, H: int) -> dict[str, Call]:
    """Calls of the backend that compute more and more, and the whole call."""
    x, g, _, weights = Workload(T, B, H).data()
    w_ih, w_hh, b_ih, b_hh = weights.values()
    rnn = rnnfast.RNN(H, H, backend="cpu")
    leaves = [x.clone().requires_grad_(), *rnn.parameters()]
    layers = {True: Weights(w_ih, b_ih, b_hh, w_hh), False: Weights(None, None, None, w_hh)}

    def forward(x: torch.Tensor, projects: bool, nonlinearity: str = "tanh") -> Call:
        options = Options(f"rnn_{nonlinearity}")
        return lambda: cpu.forward(x, layers[projects], States(), Rows(), options)

    y = forward(x, True)()[0]

    def backward(y: torch.Tensor, projects: bool, dx: bool, dw: bool) -> Call:
        kept = Kept(x, y, layers[projects], States(), Rows(), Saved())
        given = OutputGradients(g[: len(y)], States())
        return lambda: cpu.backward(given, kept, None, Wanted(dx, dw), Options())

    def whole() -> object:
        y, h_n = rnn(leaves[0])
        return y, h_n, *torch.autograd.grad(y, leaves, g)

    rows, out = x.view(T * B, H), torch.empty(T * B, H)
    return {
        "p": forward(x, False),
        "p, relu": forward(x, False, "relu"),
        "p, T = 1": forward(x[:1], False),
        "x": forward(x, True),
        "bptt": backward(y, False, True, False),
        "bptt, T = 1": backward(y[:1], False, True, False),
        "dw_hh": backward(y, False, False, True),
        "dw": backward(y, True, False, True),
        "all": backward(y, True, True, True),
        WHOLE: whole,
        SAME: lambda: torch.mm(rows, w_ih.T, out=out),
    }


def least(candidates: dict[str, Call]) -> dict[str, float]:
    times = dict.fromkeys(candidates, float("inf"))
    for _ in range(ROUNDS):
        for name, call in candidates.items():
            time.sleep(SETTLE_S)
            call()
            begin = time.process_time()
            call()
            spent = (time.process_time() - begin) / torch.get_num_threads()
            times[name] = min(times[name], spent)
    return times


def page_faults(call: Call, times: int = 10) -> float:
    """Pages that the system hands out, zeroed, in each call."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        call()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / times


def table(T: int, B: int, H: int, threads: int) -> list[str]:
    torch.set_num_threads(threads)
    gemm, candidates = Gemm("cpu", "float32", HostClock()), calls(T, B, H)
    times = least(candidates | {LARGE: gemm._multiply})
    for loop in ("p", "bptt"):
        times[f"{loop}, a step"] = (times[loop] - times[f"{loop}, T = 1"]) / max(T - 1, 1)
    times["x + all"] = times["x"] + times["all"]
    peak = gemm.gflop / times[LARGE]
    lines = [
        f"({T}, {B}, {H}), threads: {threads}; {LARGE} at {peak:.0f} GFLOP/s; "
        f"{page_faults(candidates[WHOLE]):.0f} page faults a call",
        "",
        "| part | ms | of the whole | GFLOP/s | of 2048^3 |",
        "|---|---|---|---|---|",
    ]
    for part, (longer, shorter, products) in PARTS.items():
        spent = times[longer] - (times[shorter] if shorter else 0)
        row = [part, f"{spent * 1e3:.2f}", f"{spent / times[WHOLE]:.0%}", "", ""]
        if products and spent > 0:  # otherwise it is lost in noise
            rate = products * 2e-9 * T * B * H * H / spent
            row[3:] = [f"{rate:.0f}", f"{rate / peak:.0%}"]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("sizes", nargs="*", metavar="T,B,H", default=SIZES, type=size)
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    given = parser.parse_args(arguments)
    for shape in given.sizes:
        for threads in given.threads:
            print(*table(*shape, threads), "", sep="\n", flush=True)


def size(text: str) -> tuple[int, ...]:
    T, B, H = map(int, text.split(","))
    return T, B, H


if __name__ == "__main__":
    main()
