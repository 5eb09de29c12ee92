"""How many threads a call on the CPU takes: those that help it, on cores that there are."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import rnnfast
from rnnfast import cores
from rnnfast.backends import cpu

pytestmark = pytest.mark.skipif(cpu._C is None, reason="the extension rnnfast._C is not built")


@pytest.fixture
def machine():
    """Sets how many cores there are."""
    cpu._bind_threads()  # of the quota that there is
    yield cpu._C.set_cores
    cpu._C.set_cores(0)
    cpu._C.set_quota(cores.quota())


@pytest.fixture
def torch_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def planned(T: int, B: int, H: int, threads: int, D: int = 1) -> tuple[int, int, int]:
    """Tasks, parts of each, threads."""
    return cpu._C.rnn_plan("rnn_tanh", "float32", T, B, H, D, 1, threads)


@pytest.mark.parametrize("there", [1, 2, 3, 8])
@pytest.mark.parametrize("wanted", [1, 2, 16, 64])
@pytest.mark.parametrize("size", [(1, 1, 1), (50, 16, 64), (20, 3, 2048), (128, 64, 512)])
def test_a_call_takes_no_more_threads_than_cores(size, wanted, there, machine):
    machine(there)
    assert planned(*size, wanted)[2] <= min(wanted, there)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity masks here")
def test_a_process_on_one_core_takes_one_thread(machine):
    """However many the machine has, and whenever the mask was set."""
    machine(0)
    before = os.sched_getaffinity(0)
    cpu._C.set_quota(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert cpu._C.usable_threads(16)[0] == 1
        assert planned(128, 64, 512, 16) == (1, 1, 1)
    finally:
        os.sched_setaffinity(0, before)
    assert cpu._C.usable_threads(16)[0] == min(16, len(before))


def test_a_quota_limits_the_threads(machine):
    machine(64)
    cpu._C.set_quota(3)
    assert cpu._C.usable_threads(16)[0] == 3
    assert planned(128, 64, 512, 16)[2] == 3
    cpu._C.set_quota(0)
    assert cpu._C.usable_threads(16)[0] == 16


def test_a_pool_of_more_threads_than_cores_is_left_alone(machine):
    """Threads and the size of the pool that they come from; 0: new ones."""
    if not any(cpu.openmp()):
        pytest.skip("this torch runs without libgomp")
    machine(4)
    assert cpu._C.usable_threads(4) == (4, 4)
    assert cpu._C.usable_threads(5) == (4, 0)


@pytest.mark.parametrize(
    ("size", "most"),
    [((5, 4, 8), 1), ((128, 1, 64), 1), ((10, 16, 64), 6), ((50, 16, 64), 8), ((128, 1, 256), 4)],
)
def test_a_small_problem_takes_no_more_threads_than_help_it(size, most, machine):
    """On a machine of 64 cores."""
    machine(64)
    assert planned(*size, 64)[2] <= most


@pytest.mark.parametrize("threads", [2, 4, 16, 64])
@pytest.mark.parametrize("size", [(128, 256, 1024), (20, 3, 4096)])
def test_a_large_problem_takes_all_threads(size, threads, machine):
    machine(64)
    assert planned(*size, threads)[2] == threads


@pytest.mark.parametrize("wanted", [2, 5, 24, 64])
def test_threads_that_wait_for_one_another_have_a_vector_of_units_each(wanted, machine):
    machine(64)
    for B in (1, 2, 3, 7, 40):
        for H in (1, 16, 100, 333):
            tasks, parts, threads = planned(1000, B, H, wanted)
            assert parts <= max(1, -(-H // 4))  # a vector has four at least
            assert threads <= min(wanted, tasks * parts)


# Crews, slices, both; a pool of torch's, and threads of their own.
@pytest.mark.parametrize("there", [64, 5])
@pytest.mark.parametrize("size", [(600, 1, 256), (300, 40, 64), (100, 6, 200)])
def test_any_number_of_threads_gives_the_same_bits(size, there, machine, torch_threads):
    T, B, H = size
    rnn = rnnfast.RNN(H, H, backend="cpu")
    x = torch.randn(T, B, H, requires_grad=True)
    results, taken = [], set()
    machine(there)
    for threads in (1, 2, 3, 7, 16):
        torch_threads(threads)
        taken.add(planned(*size, threads)[2])
        y, h_n = rnn(x)
        found = torch.autograd.grad(y.square().sum() + h_n.sum(), [x, *rnn.parameters()])
        results.append((y, h_n, *found))
    assert len(taken) > 2
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


BOUND = """
import os
from rnnfast.backends import cpu
print(len(os.sched_getaffinity(0)), cpu.cores(), *cpu._C.usable_threads(2))
"""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity masks here")
def test_threads_that_openmp_binds_to_a_core_each_are_all_taken():
    """OMP_PROC_BIND leaves the thread that calls one core; the others have the rest."""
    there = len(os.sched_getaffinity(0))
    if there < 2 or not any(cpu.openmp()) or cores.quota() == 1:
        pytest.skip("needs libgomp and two cores")
    bound = os.environ | {"OMP_PROC_BIND": "true", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", BOUND], env=bound, capture_output=True, text=True, check=True
    )
    own, found, count, pool = map(int, done.stdout.split())
    assert own == 1
    assert found == min(there, cores.quota() or there)
    assert (count, pool) == (2, 2)


MANY = """
import os, threading, torch, rnnfast
torch.set_num_threads(32)
rnn, x, most = rnnfast.RNN(256, 256, backend="cpu"), torch.randn(200, 16, 256), 0
with torch.no_grad():
    rnn(x)
    before, done = len(os.listdir("/proc/self/task")), threading.Event()
    def work():
        for _ in range(5): rnn(x)
        done.set()
    worker = threading.Thread(target=work)
    worker.start()
    while not done.is_set():
        most = max(most, len(os.listdir("/proc/self/task")))
    worker.join()
print(most - before, len(os.sched_getaffinity(0)))
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc")
def test_the_system_sees_no_more_threads_than_cores():
    """A call in a thread of its own, which the count includes, while torch has 32 threads."""
    done = subprocess.run([sys.executable, "-c", MANY], capture_output=True, text=True, check=True)
    added, there = map(int, done.stdout.split())
    assert 1 <= added <= there


FILES = {
    "no cgroups": ({}, 0),
    "version 2, no limit": ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, 0),
    "version 2": ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "200000 100000"}, 2),
    "version 2, rounded up": (
        {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "150000 100000\n"},
        2,
    ),
    "version 2, less than a core": (
        {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "1000 100000"},
        1,
    ),
    "version 2, the least of all above": (
        {
            "proc/self/cgroup": "0::/pods/mine:1/box\n",
            "sys/fs/cgroup/pods/mine:1/box/cpu.max": "max 100000",
            "sys/fs/cgroup/pods/mine:1/cpu.max": "400000 100000",
            "sys/fs/cgroup/pods/cpu.max": "900000 100000",
        },
        4,
    ),
    "version 1": (
        {
            "proc/self/cgroup": "5:cpuset:/a\n4:cpu,cpuacct:/docker/17\n1:name=systemd:/\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "300000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
        3,
    ),
    "version 1, no limit": (
        {
            "proc/self/cgroup": "1:cpu:/\n0::/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        0,
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_the_quota_is_that_of_the_cgroups(name, tmp_path):
    files, expected = FILES[name]
    for path, text in files.items():
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert cores.quota(tmp_path) == expected
