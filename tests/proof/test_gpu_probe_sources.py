"""The CUDA sources of the GPU probe: they compile cleanly for sm_90, and the machine code of what
is timed holds what the figure claims to time. Skipped, with the reason, where nvcc is missing."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from bench.gpu_probe import runner
from bench.gpu_probe.plan import PROGRAMS, PROTOTYPES

STRICT = ("-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror", "-Xptxas", "-v")

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")


@pytest.fixture(scope="session")
def binaries(tmp_path_factory) -> dict[str, tuple[Path, str]]:
    """{program: (binary, what ptxas said)}, compiled with every warning an error."""
    folder = tmp_path_factory.mktemp("probes")
    jobs = {}
    for program in PROGRAMS:
        binary, source = folder / program, runner.SOURCES / f"{program}.cu"
        command = ["nvcc", *runner.NVCC_FLAGS, *STRICT, "-o", str(binary), str(source)]
        jobs[program] = binary, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    built = {p: (binary, job.communicate(timeout=300)[1]) for p, (binary, job) in jobs.items()}
    for program, (_, job) in jobs.items():
        assert job.returncode == 0, built[program][1]
    return built


@pytest.fixture(scope="session")
def machine_code(binaries) -> dict[str, dict[str, list[tuple[int, str]]]]:
    """{program: {kernel: [(address, instruction)]}} from the disassembler."""
    return {program: _disassemble(binary) for program, (binary, _) in binaries.items()}


@pytest.mark.parametrize("program", PROGRAMS)
def test_compiles_without_a_warning_stack_or_spill(program, binaries):
    _, log = binaries[program]
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", log)
    assert len(frames) == log.count("Compiling entry function") > 0
    assert set(frames) == {("0", "0", "0")}


def test_prototype_configurations_are_those_of_the_plan():
    source = (runner.SOURCES / "prototype.cu").read_text()
    found = re.findall(r"\{(\d+), (\d+), (\d+), measure_either<", source)
    assert [tuple(map(int, c)) for c in found] == list(PROTOTYPES)


@pytest.mark.parametrize(
    ("program", "arguments", "words"),
    [
        ("st_async_latency", ["3"], "argument cluster: given 3, wanted one of 2, 4, 8, 16"),
        ("dsmem_ingress", [], "argument cluster: given nothing, wanted one of 2, 4, 8, 16"),
        ("prototype", ["up", "64", "1", "8"], "argument pass: given up"),
        ("prototype", ["forward", "64", "16", "8"], "no kernel for H 64, C 16, N 8"),
    ],
)
def test_probe_names_an_unusable_argument(program, arguments, words, binaries):
    done = subprocess.run(
        [binaries[program][0], *arguments], capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 1
    assert words in done.stderr
    assert done.stdout == ""


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has an NVIDIA GPU")
def test_probe_without_a_gpu_says_so(binaries):
    outcome = runner.run([str(binaries["launch"][0])], limit_s=20)
    assert outcome.figures == []
    (failure,) = outcome.failures
    assert "exit status 1" in failure
    assert "CUDA" in failure


# --- machine code --------------------------------------------------------------------------------

POLLS = r"SYNCS\.PHASECHK|LDG\.E(\.128)?\.STRONG\.GPU"
GAVE_UP = "LDG.E.STRONG.SYS"  # the load of device_gave_up
FENCES = r"MEMBAR|ERRBAR|CCTL\.IVALL"


def test_every_polling_loop_can_give_up(machine_code):
    """The innermost loop around a poll (one outside any loop polls once) looks at the flag, too."""
    polls = 0
    for program, kernels in machine_code.items():
        for kernel, code in kernels.items():
            for address, instruction in code:
                if not re.match(POLLS, instruction):
                    continue
                around = [b for b in _loops(code) if b[0][0] <= address <= b[-1][0]]
                if around:
                    innermost = min(around, key=len)
                    assert any(i.startswith(GAVE_UP) for _, i in innermost), f"{program} {kernel}"
                    polls += 1
    assert polls > 40  # ping-pong, exchange, grid, and the two sketched kernels


@pytest.mark.parametrize(("words", "width"), [(1, "STAS "), (2, "STAS.64"), (4, "STAS.128")])
def test_st_async_is_timed_at_the_width_it_names(words, width, machine_code):
    pattern = rf"(ping_pongI|exchangeILi\d+E)Li{words}E"
    for program in ("st_async_latency", "dsmem_ingress"):
        for kernel, code in _kernels(machine_code[program], pattern):
            stores = [i for _, i in code if i.startswith("STAS")]
            assert stores, kernel
            assert all(i.startswith(width) for i in stores), kernel


def test_the_two_waits_differ_by_the_acquire(machine_code):
    kernels = machine_code["st_async_latency"]
    for kernel, code in _kernels(kernels, "ping_pong"):
        loop = max(_loops_with(code, "SYNCS.PHASECHK"), key=len)
        wanted = "AcquireE1" in kernel
        assert any(i.startswith("CCTL.IVALL") for _, i in loop) == wanted, kernel


def test_exchange_and_sketched_kernels_have_no_fence_in_the_time_loop(machine_code):
    seen = 0
    for program, pattern in (("dsmem_ingress", "exchange"), ("prototype", "rnn_(fwd|bwd)")):
        for kernel, code in _kernels(machine_code[program], pattern):
            for loop in _loops_with(code, "STAS"):
                assert not [i for _, i in loop if re.match(FENCES, i)], kernel
                seen += 1
    assert seen >= 12 + 2 * 9


def test_counter_form_pays_its_fence_and_data_as_flag_does_not(machine_code):
    kernels = machine_code["grid_barrier"]
    (counter,) = [c for _, c in _kernels(kernels, "counter_barrier")]
    assert any(i.startswith("MEMBAR") for loop in _loops_with(counter, "REDG") for _, i in loop)
    gathers = [c for _, c in _kernels(kernels, "gather_step")]
    assert len(gathers) == 3
    for code in gathers:
        for loop in _loops_with(code, "LDG.E.128.STRONG.GPU"):
            assert not [i for _, i in loop if re.match(FENCES, i)]


@pytest.mark.parametrize(
    ("operand", "instruction"),
    [(0, "HMMA.16816.F32.BF16"), (1, "HMMA.16816.F32 "), (2, "HMMA.1688.F32.TF32")],
)
def test_rate_loop_is_all_mma(operand, instruction, machine_code):
    """Thirty-two a pass (or a multiple, unrolled), and no load of a fragment among them."""
    kernels = _kernels(machine_code["tensor_core"], rf"mma_rateI.*OperandE{operand}")
    assert len(kernels) == 4
    for kernel, code in kernels:
        loop = max(_loops_with(code, "HMMA"), key=len)
        count = sum(i.startswith(instruction) for _, i in loop)
        assert count == sum(i.startswith("HMMA") for _, i in loop), kernel
        assert count % 32 == 0
        assert not [i for _, i in loop if re.match(r"LD[GSL]\b", i)], kernel


@pytest.mark.parametrize(("words", "width"), [(1, "LDS "), (2, "LDS.64"), (4, "LDS.128")])
def test_shared_loads_are_timed_at_the_width_they_name(words, width, machine_code):
    ((kernel, code),) = _kernels(machine_code["tensor_core"], rf"load_loopILi{words}E")
    loops = _loops_with(code, "LDS")
    assert loops, kernel
    for loop in loops:
        loads = [i for _, i in loop if i.startswith("LDS")]
        assert all(i.startswith(width) for i in loads), kernel
        assert len(loads) % 8 == 0
        # Each loaded word is combined once: fewer loads than that means merged loads.
        assert sum(i.startswith("LOP3") for _, i in loop) <= words * len(loads), kernel


def test_weights_of_the_sketched_kernels_stay_in_registers(machine_code):
    """No wide load in the time loop, and few: x, dy and h come from memory there, not W_hh."""
    for kernel, code in _kernels(machine_code["prototype"], "rnn_(fwd|bwd)"):
        loop = max(_loops_with(code, "HMMA"), key=len)
        products = sum(i.startswith("HMMA") for _, i in loop)
        loads = sum(i.startswith("LDG.E.U16") for _, i in loop)
        assert products >= 8, kernel
        assert not [i for _, i in loop if re.match(r"LDG\.E(\.64|\.128)? ", i)], kernel
        assert loads <= 24, kernel


def _disassembler() -> str:
    found = shutil.which("cuobjdump")
    if found:
        return found
    triton = pytest.importorskip("triton", reason="no cuobjdump: neither on the PATH nor triton's")
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def _disassemble(binary: Path) -> dict[str, list[tuple[int, str]]]:
    text = subprocess.run(
        [_disassembler(), "-sass", binary], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    kernels = {}
    for part in text.split("Function : ")[1:]:
        code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\S.*?)\s*;\s*/\*", part)
        kernels[part.split()[0]] = [(int(address, 16), text + " ") for address, text in code]
    return kernels


def _kernels(kernels: dict, pattern: str) -> list[tuple[str, list]]:
    return [(name, code) for name, code in kernels.items() if re.search(pattern, name)]


def _loops(code: list[tuple[int, str]]) -> list[list[tuple[int, str]]]:
    """The code between the target of a backward branch and the last branch back to it."""
    ends = {}
    for address, instruction in code:
        target = re.match(r"BRA\b.*?(0x[0-9a-f]+)", instruction)
        if target and int(target[1], 16) < address:
            ends[int(target[1], 16)] = address
    return [[(a, i) for a, i in code if begin <= a <= end] for begin, end in ends.items()]


def _loops_with(code: list[tuple[int, str]], instruction: str) -> list[list[tuple[int, str]]]:
    return [loop for loop in _loops(code) if any(i.startswith(instruction) for _, i in loop)]
