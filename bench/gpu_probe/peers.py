"""Times torch on this GPU: large matrix products (question 6), and nn.RNN and nn.LSTM on cuDNN
(question 7). Prints one figure a line, like the compiled probes."""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch

from .plan import BASELINE_BATCH, BASELINE_HIDDEN, PRECISIONS

DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "tf32": torch.float32,
}


def emit(figure: str, params: dict, samples: list[float], unit: str) -> None:
    record = {
        "figure": figure,
        "params": params,
        "value": statistics.median(samples),
        "low": min(samples),
        "high": max(samples),
        "unit": unit,
    }
    print(json.dumps(record), flush=True)


def allow_tf32(allowed: bool) -> None:
    """Sets torch's switches for matrix products and for cuDNN's RNNs alike."""
    if hasattr(torch.backends.cudnn, "rnn"):
        value = "tf32" if allowed else "ieee"
        torch.backends.cudnn.rnn.fp32_precision = value
        torch.backends.cuda.matmul.fp32_precision = value
    else:  # before torch 2.9
        torch.backends.cudnn.allow_tf32 = allowed
        torch.backends.cuda.matmul.allow_tf32 = allowed


def seconds(work: Callable[[], object], device: str) -> tuple[list[float], list[float]]:
    """Times of single calls after warm-up, by CUDA events (by the clock on a CPU): as called, and
    queued.

    Queued: the host issues the calls while the GPU sleeps, so the GPU does not wait between them.
    This is the kernels' time, unless a call launches more kernels than the queue holds.
    """
    budget, least, most = 0.04, 3, 20

    def several(count: int, queued: bool = False) -> list[float]:
        if device == "cpu":
            marks = [time.perf_counter()]
            for _ in range(count):
                work()
                marks.append(time.perf_counter())
            return [b - a for a, b in itertools.pairwise(marks)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        if queued:
            torch.cuda._sleep(30_000_000)  # cycles: about 15 ms
        events[0].record()
        for event in events[1:]:
            work()
            event.record()
        events[-1].synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]

    several(2)
    once = several(1)[0]
    count = max(least, min(most, int(budget / max(once, 1e-9))))
    return several(count), several(count, queued=True)


def warm_up(device: str) -> None:
    """Raises the clock: an idle GPU runs at a sixth of it."""
    a = torch.randn(1024, 1024, device=device)
    begin = time.perf_counter()
    while device == "cuda" and time.perf_counter() - begin < 0.3:
        (a @ a).sum().item()


def measure_gemm(device: str, size: int) -> None:
    for precision in PRECISIONS:
        allow_tf32(precision == "tf32")
        a, b = (torch.randn(size, size, device=device, dtype=DTYPES[precision]) for _ in "ab")
        called, _ = seconds(functools.partial(torch.matmul, a, b), device)
        rates = [2 * size**3 / s / 1e12 for s in called]
        emit("gemm", {"precision": precision}, rates, "TFLOP/s")


def measure_rnn(
    device: str, precision: str, steps: int, hidden: tuple[int, ...], batch: tuple[int, ...]
) -> None:
    """Training mode, gradients for input and weights, random data, no h_0 given."""
    allow_tf32(precision == "tf32")
    for cell in ("RNN", "LSTM"):
        for H in hidden:
            for B in batch:
                params = {"cell": cell, "precision": precision, "H": H, "B": B}
                try:
                    _measure_rnn_case(params, device, steps)
                except RuntimeError as error:  # cuDNN refuses some types; the others continue
                    print(json.dumps({"failed": f"{params}: {error}"[:500]}), flush=True)


def _measure_rnn_case(params: dict, device: str, steps: int) -> None:
    H, B, dtype = params["H"], params["B"], DTYPES[params["precision"]]
    rnn = getattr(torch.nn, params["cell"])(H, H, device=device, dtype=dtype)
    x = torch.randn(steps, B, H, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(steps, B, H, device=device, dtype=dtype)
    wanted = [x, *rnn.parameters()]

    def both() -> None:
        torch.autograd.grad(rnn(x)[0], wanted, dy)

    for name, work in (("forward", lambda: rnn(x)), ("forward+backward", both)):
        called, queued = seconds(work, device)
        for figure, times in (("torch_step", called), ("torch_step_queued", queued)):
            emit(figure, {**params, "pass": name}, [s / steps * 1e6 for s in times], "us")


def versions() -> dict[str, str]:
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    return {
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA of torch": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_probe.peers", description=__doc__)
    parser.add_argument("what", choices=("versions", "gemm", "rnn"))
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of rnn")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", type=int, default=8192, help="of gemm")
    parser.add_argument("--steps", type=int, default=512, help="T of rnn")
    parser.add_argument("--hidden", type=int, nargs="+", default=BASELINE_HIDDEN)
    parser.add_argument("--batch", type=int, nargs="+", default=BASELINE_BATCH)
    args = parser.parse_args()
    if args.what == "versions":
        print(json.dumps(versions()))
        return
    torch.manual_seed(0)
    warm_up(args.device)
    if args.what == "gemm":
        measure_gemm(args.device, args.size)
    else:
        measure_rnn(args.device, args.precision, args.steps, tuple(args.hidden), tuple(args.batch))


if __name__ == "__main__":
    main()
