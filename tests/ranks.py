"""Two processes of torch.distributed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta

import torch

PATIENCE = 120  # seconds


def spawn(run: Callable, *arguments: object) -> None:
    """Calls run(rank, *arguments) in either process, and fails where one does or waits too long."""
    ranks = torch.multiprocessing.spawn(run, arguments, nprocs=2, join=False)
    try:
        deadline = time.monotonic() + PATIENCE
        while not ranks.join(timeout=5):
            assert time.monotonic() < deadline, "the ranks wait for one another"
    finally:
        for process in ranks.processes:
            process.kill()


def meet(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=PATIENCE),
    )


def leave() -> None:
    """Ends the process, as the last call of its function."""
    torch.distributed.barrier()  # neither rank closes its connections while the other one uses them
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads can abort a process that ends in the usual way
