"""The measurements, their processes, and the expected figures. Pure data: nothing runs here."""

from __future__ import annotations

from dataclasses import dataclass

QUESTIONS = {
    1: "How long from st.async to the return of the waiting try_wait?",
    2: "What does an all-to-all exchange through distributed shared memory cost?",
    3: "How many clusters are resident at once?",
    4: "What does it cost to agree through L2?",
    5: "How fast are mma.sync and shared memory, and how do the fragments lie?",
    6: "What do copies, matrix products, launches and graph nodes cost?",
    7: "What do torch.nn.RNN and nn.LSTM on cuDNN take?",
    8: "Are the two sketched kernels right, and how fast?",
}

PROGRAMS = (  # cuda/<name>.cu
    "st_async_latency",
    "dsmem_ingress",
    "active_clusters",
    "grid_barrier",
    "tensor_core",
    "launch",
    "prototype",
)

CLUSTERS = (2, 4, 8, 16)
PRECISIONS = ("fp16", "bf16", "fp32", "tf32")
BASELINE_HIDDEN = (64, 128, 256, 512, 768, 1024, 2048)
BASELINE_BATCH = (1, 16, 64, 256)
PROTOTYPES = (  # (H, cluster size, columns): the compiled rows of the design's register budget
    (64, 1, 8),
    (128, 1, 8),
    (256, 1, 8),
    (256, 2, 8),
    (512, 4, 8),
    (512, 8, 8),
    (512, 8, 16),
    (512, 16, 8),
    (768, 8, 8),
    (768, 12, 8),
    (1024, 16, 8),
    (1024, 16, 16),
)


@dataclass(frozen=True)
class Measurement:
    """One process: ``program`` is a compiled probe, or "peers" for the one that uses torch."""

    question: int
    program: str
    arguments: tuple[str, ...] = ()
    limit_s: float = 15

    @property
    def name(self) -> str:
        return " ".join((self.program, *self.arguments))


def measurements() -> list[Measurement]:
    """All measurements, the least known first, because the last ones may run out of time."""
    plan = [Measurement(1, "st_async_latency", (str(c),)) for c in CLUSTERS]
    plan += [Measurement(2, "dsmem_ingress", (str(c),)) for c in CLUSTERS]
    plan += [Measurement(3, "active_clusters"), Measurement(4, "grid_barrier")]
    plan += [Measurement(5, "tensor_core")]
    plan += [
        Measurement(8, "prototype", (way, *map(str, shape)))
        for way in ("forward", "backward")
        for shape in PROTOTYPES
    ]
    plan += [Measurement(6, "launch"), Measurement(6, "peers", ("gemm",), 40)]
    plan += [Measurement(7, "peers", ("rnn", "--precision", p), 60) for p in PRECISIONS]
    return plan


@dataclass(frozen=True)
class Table:
    """How the figures of one name are laid out: the parameters in ``across`` become columns."""

    figure: str
    title: str
    across: tuple[str, ...] = ()


TABLES = {
    1: (Table("st_async_hop", "one hop, one thread to one thread", ("width",)),),
    2: (
        Table("dsmem_ingress", "ingress, from the step at 64 KB less that at 16 KB", ("width",)),
        Table("dsmem_ingress_remote", "the same without what a block sends itself", ("width",)),
        Table("exchange_step", "one step in which each block takes in so many bytes", ("bytes",)),
    ),
    3: (
        Table("active_clusters", "clusters of 256 threads, 200 KB of shared memory", ("how",)),
        Table("sms_used", "SMs on which they ran"),
    ),
    4: (
        Table("l2_hop", "one hop, one SM to another"),
        Table("grid_step", "one step of the whole grid", ("bytes_per_block",)),
    ),
    5: (
        Table("wrong_fragment_values", "values not where the layout puts them"),
        Table("tf32_operand", "low bits of a tf32 operand"),
        Table("mma_sum", "rounding of the accumulation"),
        Table("mma_interval", "between two mma.sync on a sub-partition", ("chains",)),
        Table("shared_load", "shared-memory loads", ("warps",)),
    ),
    6: (
        Table("copy", "copy of 4 GB"),
        Table("gemm", "matrix product of 8192 x 8192 x 8192"),
        Table("launch", "launch of an empty kernel"),
        Table("graph_node", "graph of empty kernels in a row"),
    ),
    7: (
        Table("torch_step", "one time step of T = 512, I = H, as called", ("pass", "B")),
        Table("torch_step_queued", "the same, the host far ahead of the GPU", ("pass", "B")),
    ),
    8: (
        Table("prototype_error", "error against float64", ("of",)),
        Table("prototype_clusters", "clusters resident at once, one block an SM"),
        Table("prototype_step", "one time step, from two lengths", ("clusters",)),
        Table("prototype_step_with_launch", "the same with launch and prologue", ("clusters",)),
    ),
}

# Expectations before any measurement: (figure, parameters that must agree, expectation). The first
# that agrees is shown. pub: published by others, est: estimated.
ESTIMATES: tuple[tuple[str, dict[str, object], str], ...] = (
    ("st_async_hop", {"wait": "acquire.cluster"}, "about 200 est, and a CCTL.IVALL"),
    ("st_async_hop", {}, "about 200 est"),
    ("dsmem_ingress", {}, "14 to 32 est"),
    ("dsmem_ingress_remote", {}, "ring copy 13 to 16 pub"),
    ("active_clusters", {"cluster": 2}, "66 est"),
    ("active_clusters", {"cluster": 4}, "32 to 33 est"),
    ("active_clusters", {"cluster": 8}, "15 pub"),
    ("active_clusters", {"cluster": 16}, "7 est"),
    ("l2_hop", {"form": "release, acquire"}, "564 ns (1117) pub"),
    ("l2_hop", {"form": "relaxed"}, "about 750 est"),
    ("grid_step", {"form": "counter"}, "1290 est; grid.sync 2157 pub"),
    ("grid_step", {"form": "data as flag"}, "750 est, and bytes / 35"),
    ("wrong_fragment_values", {}, "0"),
    ("tf32_operand", {}, "truncated est"),
    ("mma_interval", {"operand": "tf32"}, "interval 6.3 est"),
    ("mma_interval", {}, "interval 6.26, latency 24 to 25 pub"),
    ("shared_load", {}, "128 est"),
    ("copy", {}, "4.3 pub"),
    ("gemm", {"precision": "bf16"}, "788 pub; peak 990"),
    ("gemm", {"precision": "tf32"}, "peak 495"),
    ("gemm", {"precision": "fp32"}, "peak 67"),
    ("graph_node", {}, "1.24 to 1.40 pub"),
    ("prototype_error", {}, "0.002 forward, 0.003 backward, emulated"),
    *(
        ("prototype_step", {"pass": "forward", "H": h, "C": c, "N": n}, f"{us} est")
        for h, c, n, us in (
            (64, 1, 8, 0.25),
            (128, 1, 8, 0.33),
            (256, 1, 8, 0.52),
            (512, 4, 8, 0.57),
            (512, 8, 8, 0.42),
            (768, 12, 8, 0.48),
            (1024, 16, 8, 0.57),
            (1024, 16, 16, 0.92),
        )
    ),
    ("prototype_step", {"pass": "backward"}, "1.1 to 1.3 x forward est"),
)


def estimate(figure: str, params: dict[str, object]) -> str:
    """The expectation for a figure, or "" if there is none."""
    for name, wanted, text in ESTIMATES:
        if name == figure and all(params.get(k) == v for k, v in wanted.items()):
            return text
    return ""
