"""Canned figures for the dry run: the output of each probe, with made-up values.

``python -m bench.gpu_probe.canned NAME`` stands in for the process of the measurement NAME.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator

from .plan import BASELINE_BATCH, BASELINE_HIDDEN, PRECISIONS, Measurement, measurements

WIDTHS = ("b32", "v2.b32", "v4.b32")


def figures(m: Measurement) -> Iterator[dict]:
    """Everything that measurement ``m`` prints on a GPU that supports it."""

    def figure(name: str, unit: str, value: float = 1.0, **params: object) -> dict:
        spread = {"low": value, "high": value}
        return {"figure": name, "params": params, "value": value, **spread, "unit": unit}

    if m.program != "peers":
        yield figure("sm_clock", "MHz", 1980)
    match m.program, m.arguments:
        case "st_async_latency", (cluster,):
            for width, wait in itertools.product(WIDTHS, ("default", "acquire.cluster")):
                params = {"cluster": int(cluster), "width": width, "wait": wait}
                yield figure("st_async_hop", "cycles", 200, **params)
        case "dsmem_ingress", (cluster,):
            for width, clusters in itertools.product(WIDTHS, ("one", "all")):
                params = {"cluster": int(cluster), "width": width, "clusters": clusters}
                for i in range(8):
                    yield figure("exchange_step", "cycles", 400 << i, **params, bytes=512 << i)
                yield figure("dsmem_ingress", "B/clk/SM", 20, **params)
                yield figure("dsmem_ingress_remote", "B/clk/SM", 15, **params)
        case "active_clusters", ():
            for cluster in (1, 2, 4, 8, 12, 16):
                for how in ("occupancy query", "observed"):
                    value = 132 // cluster
                    yield figure("active_clusters", "clusters", value, cluster=cluster, how=how)
                yield figure("sms_used", "SMs", 132, cluster=cluster)
        case "grid_barrier", ():
            for form in ("release, acquire", "relaxed"):
                yield figure("l2_hop", "cycles", 1000, form=form)
            for blocks in (32, 64, 96, 128, 132):
                yield figure("grid_step", "cycles", 1300, blocks=blocks, form="counter")
                for size in (16, 64, 256):
                    params = {"blocks": blocks, "form": "data as flag", "bytes_per_block": size}
                    yield figure("grid_step", "cycles", 800, **params)
        case "tensor_core", ():
            for operand in ("bf16", "fp16", "tf32", "movmatrix"):
                yield figure("wrong_fragment_values", "values", 0, operand=operand)
            yield figure("tf32_operand", "for 1 + 0.75 * 2^-10", rounding="truncated")
            yield figure("mma_sum", "ulp for 0.75 ulp added to 1", 0, rounding="truncated")
            for operand in ("bf16", "fp16", "tf32"):
                for warps, chains in itertools.product((1, 4, 8, 16), (1, 2, 4, 8)):
                    params = {"operand": operand, "chains": chains, "warps": warps}
                    yield figure("mma_interval", "cycles", 6.26, **params)
            for width in ("32 bits", "64 bits", "128 bits"):
                for warps in (4, 8, 16, 32):
                    yield figure("shared_load", "B/clk/SM", 128, width=width, warps=warps)
        case "launch", ():
            yield figure("copy", "TB/s", 4.3, how="device to device, read + written")
            for what in (
                "the host's time to issue one",
                "one after the other in a stream",
                "one, and wait for it",
            ):
                yield figure("launch", "us", 2, what=what)
            yield figure("graph_node", "us", 1.3, nodes=1000)
        case "prototype", (way, hidden, cluster, columns):
            params = {"pass": way, "H": int(hidden), "C": int(cluster), "N": int(columns)}
            for of in ("every row, 4 steps", "64 rows, one cluster", "64 rows, all clusters"):
                yield figure("prototype_error", "largest abs", 0.002, **params, of=of)
            yield figure("prototype_clusters", "clusters", 132 // int(cluster), **params)
            for clusters in ("one", "all"):
                for name in ("prototype_step", "prototype_step_with_launch"):
                    yield figure(name, "us", 0.5, **params, clusters=clusters)
        case "peers", ("gemm",):
            for precision in PRECISIONS:
                yield figure("gemm", "TFLOP/s", 100, precision=precision)
        case "peers", ("rnn", "--precision", precision):
            for cell, hidden, batch, way, name in itertools.product(
                ("RNN", "LSTM"),
                BASELINE_HIDDEN,
                BASELINE_BATCH,
                ("forward", "forward+backward"),
                ("torch_step", "torch_step_queued"),
            ):
                params = {"cell": cell, "precision": precision, "H": hidden, "B": batch}
                yield figure(name, "us", 1.5, **params, **{"pass": way})
        case _:
            raise KeyError(f"no canned figures for {m.name}")


if __name__ == "__main__":
    for line in figures({m.name: m for m in measurements()}[sys.argv[1]]):
        print(json.dumps(line))
