"""``python -m bench.gpu_check.workload NAME``: one small forward and backward pass on the GPU.

A workload for ncu and compute-sanitizer: few steps, and sizes that no kernel divides evenly.
"""

from __future__ import annotations

import argparse
import sys

T, B, IN, H = 6, 5, 24, 72
KINDS = {
    "plain": {},
    "norm": {"norm": "layer", "num_heads": 2, "track_gradient_flow": True},
    "stacked": {"num_layers": 2, "bidirectional": True},
}
# CUDA kernels that the plan would not choose for this size.
FORCED = {f"cuda-{kernel}": kernel for kernel in ("streaming", "cluster4")}
OTHERS = {"torch-plain": ("torch", {}), "reference-norm": ("reference", KINDS["norm"])}


def workloads() -> dict[str, tuple[str, dict]]:
    """{name: (backend, options of rnnfast.RNN)} for every backend that runs on a GPU."""
    from rnnfast.backends import BACKENDS

    own = [name for name in BACKENDS if name not in ("cpu", "torch", "reference")]
    found = {f"{name}-{kind}": (name, KINDS[kind]) for name in own for kind in KINDS}
    found |= {name: ("cuda", KINDS["norm"]) for name in FORCED}
    return found | OTHERS


def run(name: str, device: str = "cuda") -> None:
    """Runs once to load everything, then again for the profiler, which begins there."""
    import torch

    import rnnfast
    from rnnfast.backends import cuda_plan

    if name in FORCED:
        cuda_plan.WANTED = cuda_plan.NAMES[FORCED[name]], 0
    backend, options = workloads()[name]
    torch.manual_seed(0)
    rnn = rnnfast.RNN(IN, H, backend=backend, device=device, **options)
    x = torch.randn(T, B, IN, device=device, requires_grad=True)
    for profiled in (False, True):
        if device == "cuda":
            torch.cuda.synchronize()
            if profiled:
                torch.cuda.profiler.start()
        y, h_n = rnn(x)
        (y.square().sum() + h_n.sum()).backward()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    if not all(p.grad.isfinite().all() for p in rnn.parameters()):
        raise SystemExit(f"{name}: a gradient is not finite")
    print(f"{name}: forward and backward done")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check.workload")
    parser.add_argument("name", choices=workloads())
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    arguments = parser.parse_args()
    sys.exit(run(arguments.name, arguments.device))
