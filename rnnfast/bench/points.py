"""The sizes to measure and the ratios to reach. Pure data: nothing runs here."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

from .workload import Workload

# Targets: the time of torch.nn.RNN over ours, for forward+backward on 2 threads. At all other sizes
# we must not be slower; two runs of the same code differ, hence 0.97.
NEVER_SLOWER = 0.97
LISTED = {
    (128, 1, 64): 35.0,
    (128, 16, 64): 5.0,
    (512, 32, 128): 3.0,
    (256, 32, 256): 1.8,
    (128, 64, 512): 1.2,
    (64, 64, 1024): 1.15,
    (784, 1, 17): NEVER_SLOWER,
    (300, 7, 100): NEVER_SLOWER,
    (50, 256, 64): NEVER_SLOWER,
    (20, 3, 2048): NEVER_SLOWER,
    (1000, 128, 32): NEVER_SLOWER,
    (5, 4, 8): NEVER_SLOWER,
    (1, 1, 1): 1 / 1.5,  # almost all of this time is the call itself
}
# LSTM: GATED_LARGE_H is where oneDNN's kernel is bound by its products, too.
GATED_SIZES = (
    *((128, 1, 64), (128, 16, 64), (512, 32, 128), (256, 32, 256), (128, 64, 512), (64, 64, 1024)),
    *((50, 256, 64), (20, 3, 2048), (20, 8, 32), (1, 1, 1)),
)
GATED_LARGE_H = 512
OVER_LSTM, OVER_GRU = 1.0, 2.0  # GRU from 16 units on
OVER_LSTM_OR_GEMM = 1.5, 0.8  # at H = 128 to 512 the one or the other
OVER_PACKED_LSTM = 3.0
OVER_JAX = 1.0  # the target: not slower than jax.lax.scan
AIM_OVER_JAX = 1.2  # the aim
GEMM_SHARE = 0.85  # of the rate of a large GEMM, from these sizes on:
GEMM_SHARE_H, GEMM_SHARE_B = 256, 32
SCALING_POINT, SCALING = (128, 64, 512), 1.7  # one thread against two
SCARCE_POINT = (50, 16, 64)  # timed with more threads than cores, and beside busy processes

# Targets on a GPU, over cuDNN at its best setting for the precision.
OVER_CUDNN, OVER_CUDNN_PERSISTENT = 5.0, 2.0

SWEEP_H, SWEEP_B = (16, 32, 64, 128, 256, 512, 1024), (1, 8, 64)  # of the picture
GPU_SWEEP_H, GPU_SWEEP_B = (64, 128, 256, 512, 768, 1024, 2048), (1, 16, 64, 256)
GPU_PRECISIONS = ("float16", "bfloat16", "tf32", "float32")
SHORT_LOOP = 16  # steps that torch.compile unrolls in under a minute


def target(work: Workload, how: str) -> float | None:
    """The target for ``time of nn.RNN / time of rnnfast``, by the algorithm of nn.RNN."""
    if work.device == "cuda":
        inside = how == "cuDNN persistent" and work.precision == "float16"
        return OVER_CUDNN_PERSISTENT if inside else OVER_CUDNN
    if work.cell == "gru" and work.H >= 16:
        return OVER_GRU
    if work.cell == "lstm":
        if work.packed:
            return OVER_PACKED_LSTM
        return OVER_LSTM if work.H <= GATED_LARGE_H else NEVER_SLOWER
    return LISTED.get(work.size, NEVER_SLOWER) if work.plain else NEVER_SLOWER


def drawn(count: int, seed: int = 0) -> list[Workload]:
    """Log-uniform sizes, the same in every run, without those that take nn.RNN long."""
    generator = random.Random(seed)
    points: list[Workload] = []
    while len(points) < count:
        T, B, H = (round(math.exp(generator.uniform(0, math.log(n)))) for n in (1000, 256, 1024))
        if (
            T * (1 + B * H * H / 4e5) <= 2000
        ):  # a small step costs a call; a large one costs by the FLOP
            points.append(Workload(T, B, H, "drawn"))
    return points


def sweep(Hs: Sequence[int] = SWEEP_H, Bs: Sequence[int] = SWEEP_B) -> list[Workload]:
    """Sizes for the pictures: T = 100, or less for a large layer."""
    return [
        Workload(min(100, max(10, 2_000_000 // (B * H))), B, H, "sweep") for B in Bs for H in Hs
    ]


def variants(T: int, B: int, H: int, device: str = "cpu") -> list[Workload]:
    """Other precisions and stacks, at one size."""
    base = Workload(T, B, H, "variant", device=device)
    narrow = "bfloat16" if device == "cuda" else "float32"
    base = replace(base, precision=narrow)
    changes = [{"layers": 2}, {"directions": 2}, {"packed": True}, {"norm": "layer"}]
    if device == "cpu":
        changes = [{"precision": p} for p in ("float64", "bfloat16", "float16")] + changes
    return [replace(base, **change) for change in changes]


def quick(device: str) -> list[Workload]:
    if device == "cuda":
        sizes = [*((512, 16, H) for H in (256, 512, 1024)), (512, 64, 512)]
        plain = [
            Workload(*size, "sweep", precision=p, device=device)
            for p in GPU_PRECISIONS
            for size in sizes
        ]
        return [*plain, *variants(256, 16, 512, device)]
    small = [Workload(1, 1, 1, "listed"), Workload(5, 4, 8, "listed"), *sweep((16, 64), (1, 8))]
    return [*small, *variants(30, 4, 32), *gated([(5, 4, 8), (30, 4, 32)], packed=(30, 4, 32))]


def gated(sizes: Sequence[tuple[int, int, int]], packed: tuple[int, int, int]) -> list[Workload]:
    """LSTM and GRU at these sizes, and packed at one."""
    return [
        work
        for cell in ("lstm", "gru")
        for work in (
            *(Workload(*size, "gated", cell=cell) for size in sizes),
            Workload(*packed, "gated", packed=True, cell=cell),
        )
    ]


def everything(device: str) -> list[Workload]:
    if device == "cuda":
        sizes = [
            Workload(512, B, H, "sweep", device=device) for B in GPU_SWEEP_B for H in GPU_SWEEP_H
        ]
        plain = [replace(work, precision=p) for p in GPU_PRECISIONS for work in sizes]
        short = variants(SHORT_LOOP, 16, 512, device)[-1]
        return [*plain, *variants(512, 16, 512, device), short]
    listed = [Workload(*size, "listed") for size in LISTED]
    short = Workload(SHORT_LOOP, 32, 128, "variant", norm="layer")
    cells = gated(GATED_SIZES, packed=(128, 32, 128))
    return [*listed, *drawn(20), *sweep(), *variants(128, 32, 128), short, *cells]
