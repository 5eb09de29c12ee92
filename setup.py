"""Package map and the compiled extension `rnnfast._C`; everything else is in pyproject.toml.

The extension uses C++ and pybind11, not torch. If nvcc is found, it includes the GPU kernels.
Objects stay in build/native. ninja rebuilds an object if a source, a header or a flag changes;
without ninja, every build compiles everything.

Without a working compiler the installation continues. setup.py prints the reason and keeps it in
rnnfast/_build.json, and `import rnnfast` warns. RNNFAST_REQUIRE_EXTENSION=1 makes it an error. The
build uses CXX, CPPFLAGS, CXXFLAGS and LDFLAGS.

RNNFAST_SIMD_LEVELS selects the levels of the CPU kernels: all (the default), native (only the best
of this machine, a third of the time), or names such as portable,avx2.

RNNFAST_CUDA=1 makes it an error if nvcc is missing or fails; 0 leaves the GPU kernels out. NVCC
names the compiler. RNNFAST_CUDA_ARCHS lists the architectures. The default is
sm_80,sm_90,sm_100,sm_120,compute_90, and without sm_100 and sm_120 if nvcc is older than 12.8.
compute_90 is PTX, which drivers compile for other GPUs; native means the GPUs of this machine.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
PACKAGES = {"rnnfast": "rnnfast", "rnnfast.triton_kernels": "triton_kernels"}
TRITON_PACKAGES = ["rnnfast.triton_kernels", "rnnfast.triton_kernels.cells"]

COMMON = shlex.split("-O3 -std=c++20 -fvisibility=hidden -ffp-contract=fast -fPIC -Wall -Wextra")
# Sources that are compiled once for each level; the extension picks one when it runs. Never
# -march=native (a wheel runs on other machines), never -fopenmp (the threads belong to torch's
# libgomp).
SIMD_SOURCES = ("csrc/cpu/loops.cpp", "csrc/cpu/lstm.cpp", "csrc/cpu/gru.cpp", "csrc/cpu/rnn.cpp")
SIMD = {"portable": []}  # the best level comes last
SIMD_X86_64 = {
    "avx2": shlex.split("-mavx2 -mfma -mf16c"),
    "avx512": shlex.split(
        "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512"
    ),
}
# The GPU kernels, compiled once for each mode and family. {family: (name in C++, sources, oldest
# architecture)}.
CUDA_MEASURE = "csrc/cuda/record/measure.cu"
CUDA_RESIDENT = (
    "csrc/cuda/resident/backward.cu",
    "csrc/cuda/resident/forward.cu",
)  # slower to compile, so first
CUDA_FAMILIES = {
    "cluster": ("kCluster", CUDA_RESIDENT, 90),
    "single_block": ("kSingleBlock", CUDA_RESIDENT, 0),
    "streaming": ("kStreaming", ("csrc/cuda/streaming/kernels.cu",), 0),
}
CUDA_MODES = {
    "bfloat16": ("Half<BFloat16>", "kBFloat16"),
    "float16": ("Half<Float16>", "kFloat16"),
    "tf32": ("Tf32", "kTf32"),
    "exact": ("Exact", "kExact"),
}
CUDA_ARCHS = "sm_80,sm_90,compute_90"
# Adds Blackwell, if nvcc knows it. From PTX the driver would compile the kernels at the first call,
# which takes about 17 s.
CUDA_ARCHS_FROM_12_8 = "sm_80,sm_90,sm_100,sm_120,compute_90"
CUDA_COMMON = shlex.split("-O3 -std=c++20 -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra")
LAUNCHERS = {"ccache", "sccache", "distcc"}  # start compilers; nvcc does not know them
LOAD = "import sys; sys.path.insert(0, sys.argv[1]); import _C"


class Unavailable(Exception):
    """Why the extension cannot be built here."""


@dataclass(frozen=True)
class Step:
    """One command and the file it makes."""

    rule: str  # compile or link
    inputs: list[str]
    output: str
    command: list[str]


@dataclass(frozen=True)
class Compiler:
    command: list[str]
    version: str  # first line of --version
    target: str  # x86_64-linux-gnu, arm64-apple-darwin24, ...

    @classmethod
    def find(cls) -> Compiler:
        if os.name == "nt":
            raise Unavailable("the extension builds with GCC or Clang on Linux and macOS only")
        command = shlex.split(os.environ.get("CXX", ""))
        if not command:
            names = ("c++", "g++", "clang++")
            command = [name for name in names if shutil.which(name)][:1]
        if not command:
            raise Unavailable(f"no C++ compiler: none of {', '.join(names)} is on the PATH")
        version = run([*command, "--version"], "the C++ compiler does not run")
        target = run([*command, "-dumpmachine"], "this C++ compiler is neither GCC nor Clang")
        return cls(command, version.partition("\n")[0], target.strip())

    def simd(self) -> dict[str, list[str]]:
        """{level that this compiler can build: its flags}, the best level last."""
        x86_64 = self.target.startswith(("x86_64", "amd64"))
        return SIMD | SIMD_X86_64 if x86_64 else SIMD

    def levels(self) -> list[str]:
        """The levels to build: RNNFAST_SIMD_LEVELS."""
        known = list(self.simd())
        wanted = os.environ.get("RNNFAST_SIMD_LEVELS") or "all"
        if wanted == "all":
            return known
        if wanted == "native":
            return [level for level in known if self.native(level)][-1:]
        names = wanted.replace(" ", "").split(",")
        if not set(names) <= set(known):
            raise Unavailable(
                f"RNNFAST_SIMD_LEVELS is '{wanted}'; known for {self.target}: all, native, or some "
                f"of {','.join(known)}"
            )
        return [level for level in known if level in names]

    def native(self, level: str) -> bool:
        """Whether this machine's processor has every extension that the level is compiled for."""
        macros = [*self.command, "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
        try:
            defined = run(macros, "the compiler does not know this processor")
        except Unavailable:
            return level == "portable"
        extensions = [f for f in self.simd()[level] if f.startswith("-m") and "prefer" not in f]
        return all(f"__{f.removeprefix('-m').upper()}__" in defined for f in extensions)


@dataclass(frozen=True)
class Nvcc:
    command: list[str]
    version: str  # the last line but one of --version
    archs: list[str]
    libraries: list[str]  # folders

    @classmethod
    def find(cls, compiler: Compiler) -> Nvcc:
        command = shlex.split(os.environ.get("NVCC", "")) or ["nvcc"]
        if not shutil.which(command[0]):
            raise Unavailable(f"no CUDA compiler: {command[0]} is not on the PATH")
        version = run([*command, "--version"], "nvcc does not run").strip().splitlines()
        usual = CUDA_ARCHS_FROM_12_8 if release(version) >= (12, 8) else CUDA_ARCHS
        archs = (os.environ.get("RNNFAST_CUDA_ARCHS") or usual).replace(" ", "").split(",")
        for arch in archs:
            if not re.fullmatch(r"native|(sm|compute)_\d+[af]?", arch):
                raise Unavailable(
                    f"RNNFAST_CUDA_ARCHS: given {arch!r}, wanted sm_90, compute_90 and the like, "
                    "or native"
                )
        command += host_flags(compiler)
        said = run([*command, "-dryrun", CUDA_MEASURE], "nvcc does not run")
        libraries = re.findall(r'-L([^" ]+)', said)
        if not any(Path(folder, "libcudart_static.a").exists() for folder in libraries):
            raise Unavailable("nvcc has no libcudart_static.a")
        return cls(command, version[-2].strip(), archs, libraries)

    def define(self) -> str:
        return "-DRNNFAST_NVCC=" + re.sub(r"\W+", "_", self.version)

    def gencode(self, oldest: int = 0) -> list[str]:
        """Flags for all architectures from ``oldest`` on, or for all if there is none."""
        if "native" in self.archs:  # the GPUs of this machine
            return ["-arch=native"]
        flags = []
        new = [arch for arch in self.archs if int(re.search(r"\d+", arch)[0]) >= oldest]
        for arch in new or self.archs:
            virtual = arch.replace("sm_", "compute_")
            flags += ["-gencode", f"arch={virtual},code={arch}"]
        return flags


def release(version: list[str]) -> tuple[int, ...]:
    """The release of nvcc from the lines of --version; () if they name none."""
    found = re.search(r"release (\d+)\.(\d+)", "\n".join(version))
    return tuple(map(int, found.groups())) if found else ()


def host_flags(compiler: Compiler) -> list[str]:
    """nvcc's flags for the host's compiler: the program, then its arguments."""
    words = compiler.command
    if Path(words[0]).name in LAUNCHERS and len(words) > 1:
        words = words[1:]
    return ["-ccbin", words[0], *(f"-Xcompiler={word}" for word in words[1:])]


def run(command: list[str], complaint: str, show: bool = False) -> str:
    """The output of `command`. Raises Unavailable with its errors. show: print each line as it
    comes."""
    output = ""
    try:
        with subprocess.Popen(
            command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as done:
            for line in done.stdout:
                output += line
                if show:
                    print(line, end="", flush=True)
    except OSError as error:
        raise Unavailable(f"{complaint}: {error}") from error
    if done.returncode:
        if not show:
            print(output, flush=True)
        lines = output.strip().splitlines()
        said = [line for line in lines if "error" in line.lower()][:8] or lines[-3:]
        ended = f"`{shlex.join(command)}` ended with {done.returncode}"
        raise Unavailable("\n".join([f"{complaint}: {ended}", *said]))
    return output


def compile_step(compiler: Compiler, source: str, output: str, flags: list[str]) -> Step:
    user = [*user_flags("CPPFLAGS"), *user_flags("CXXFLAGS")]
    language = ["-x", "c++"] if source.endswith(".cu") else []
    files = ["-MMD", "-MF", f"{output}.d", *language, "-c", source, "-o", output]
    command = [*compiler.command, *COMMON, "-Icsrc", *user, *flags, *files]
    return Step("compile", [source], output, command)


def level_flags(compiler: Compiler, level: str) -> list[str]:
    return [*compiler.simd()[level], f"-DRNNFAST_SIMD_{level.upper()}"]


def kernel_flags(mode: str, family: str) -> list[str]:
    (kind, value), (of_family, *_) = CUDA_MODES[mode], CUDA_FAMILIES[family]
    return [
        f"-DRNNFAST_MODE={mode}",
        f"-DRNNFAST_MODE_TYPE={kind}",
        f"-DRNNFAST_MODE_VALUE=Mode::{value}",
        f"-DRNNFAST_FAMILY={family}",
        f"-DRNNFAST_FAMILY_VALUE=Family::{of_family}",
    ]


def cuda_objects() -> Iterator[tuple[str, str, str, str]]:
    """Name, source, mode and family of each object that has kernels of the recurrence."""
    for family, (_, sources, _) in CUDA_FAMILIES.items():
        for source, mode in itertools.product(sources, CUDA_MODES):
            yield ".".join(dict.fromkeys((family, Path(source).stem, mode))), source, mode, family


def cuda_steps(nvcc: Nvcc, compiler: Compiler, folder: str) -> list[Step]:
    steps = []

    def add(source: str, name: str, oldest: int, flags: list[str]) -> None:
        output = f"{folder}/{name}.o"
        files = ["-MMD", "-MF", f"{output}.d", "-c", source, "-o", output]
        # The version, so that another nvcc at the same path compiles again.
        all_flags = [*CUDA_COMMON, *nvcc.gencode(oldest), *flags, nvcc.define(), "-Icsrc"]
        steps.append(Step("compile", [source], output, [*nvcc.command, *all_flags, *files]))

    for name, source, mode, family in cuda_objects():
        _, _, oldest = CUDA_FAMILIES[family]
        add(source, name, oldest, kernel_flags(mode, family))
    add(CUDA_MEASURE, "cuda_measure", 0, [])
    steps.append(compile_step(compiler, "csrc/cuda/host/launch.cpp", f"{folder}/cuda_launch.o", []))
    return steps


def extension_steps(
    compiler: Compiler, folder: str, module: str, nvcc: Nvcc | None = None
) -> list[Step]:
    steps = [] if nvcc is None else cuda_steps(nvcc, compiler, folder)
    steps.append(compile_step(compiler, "csrc/cuda/host/plan.cpp", f"{folder}/cuda_plan.o", []))
    for source in ["csrc/bindings.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))]:
        output = f"{folder}/{Path(source).stem}"
        if source in SIMD_SOURCES:
            for level in compiler.levels():
                flags = level_flags(compiler, level)
                steps.append(compile_step(compiler, source, f"{output}.{level}.o", flags))
        else:  # only the bindings see Python and pybind11
            flags = python_includes() if source == "csrc/bindings.cpp" else []
            if nvcc is not None and flags:
                flags.append(f'-DRNNFAST_CUDA="{",".join(nvcc.archs)}"')
            if source == "csrc/cpu/dispatch.cpp":
                flags = [f"-DRNNFAST_BUILT_{level.upper()}" for level in compiler.levels()]
            steps.append(compile_step(compiler, source, f"{output}.o", flags))
    objects = [step.output for step in steps]
    libraries = [] if nvcc is None else [f"-L{folder}" for folder in nvcc.libraries]
    if nvcc is not None:
        libraries += shlex.split("-lcudart_static -lrt -lpthread -ldl")
    link = [*compiler.command, *objects, *link_flags(compiler), *libraries, "-o", module]
    return [*steps, Step("link", objects, module, link)]


def user_flags(variable: str) -> list[str]:
    return shlex.split(os.environ.get(variable, ""))


def python_includes() -> list[str]:
    try:
        import pybind11
    except ImportError as error:
        raise Unavailable("pybind11 is not installed") from error
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").exists():
        raise Unavailable(f"no Python.h in {include}: install Python's development files")
    return ["-isystem", include, "-isystem", pybind11.get_include()]


def link_flags(compiler: Compiler) -> list[str]:
    macos = "darwin" in compiler.target
    shared = "-bundle -undefined dynamic_lookup" if macos else "-shared -pthread -ldl"
    return [*shared.split(), *user_flags("LDFLAGS")]


def find_ninja() -> str | None:
    """This environment's ninja, activated or not, before another on the PATH, because another
    version of ninja compiles everything again."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    return shutil.which("ninja", path=path)


def make(steps: list[Step], folder: str) -> None:
    """Runs the steps that are out of date, in parallel. Without ninja it runs all, one by one."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    ninja = find_ninja()
    if ninja is None:
        for done, step in enumerate(steps, 1):
            print(f"[{done}/{len(steps)}] {step.rule} {step.output}", flush=True)
            run(step.command, "the C++ sources do not build", show=True)
    else:
        script = Path(folder, "build.ninja")
        script.write_text(ninja_script(steps, folder))
        run([ninja, "-f", str(script)], "the C++ sources do not build", show=True)


def load(folder: str) -> None:
    run([sys.executable, "-c", LOAD, folder], "the extension was built and does not load")


def ninja_script(steps: list[Step], folder: str) -> str:
    """Writes commands in full, because ninja rebuilds if a command changes."""
    lines = [
        f"builddir = {folder}",
        "rule compile",
        "  command = $command",
        "  description = compile $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $command",
        "  description = link $out",
    ]
    for step in steps:
        command = shlex.join(step.command).replace("$", "$$")
        lines += [
            f"build {step.output}: {step.rule} {' '.join(step.inputs)}",
            f"  command = {command}",
        ]
    return "\n".join([*lines, ""])


class BuildExtension(build_ext):
    """Compiles into build/native, then copies the module and the report into the package."""

    def run(self) -> None:
        (extension,) = self.extensions
        module = Path(self.get_ext_filename(extension.name))  # rnnfast/_C.<abi>.so
        folders = [Path(self.build_lib), *([ROOT] if self.inplace else [])]
        try:
            built, report = self.build(module.name)
        except Unavailable as error:
            if os.environ.get("RNNFAST_REQUIRE_EXTENSION", "0") not in ("", "0"):
                raise CompileError(f"RNNFAST_REQUIRE_EXTENSION is set, and {error}") from error
            built, report = None, {"extension": False, "reason": str(error)}
            warn(str(error))
        for folder in folders:
            package = folder / module.parent
            package.mkdir(parents=True, exist_ok=True)
            replace(package / module.name, built and built.read_bytes())
            replace(package / "_build.json", (json.dumps(report, indent=1) + "\n").encode())

    def build(self, file_name: str) -> tuple[Path, dict]:
        compiler = Compiler.find()
        folder = f"build/native/{sys.implementation.cache_tag}-{compiler.target}"  # under ROOT
        cuda = self.build_cuda(compiler, folder, file_name)
        report = {
            "extension": True,
            "reason": None,
            "cuda": cuda,
            "compiler": compiler.version,
            "target": compiler.target,
            "flags": shlex.join([*COMMON, *user_flags("CPPFLAGS"), *user_flags("CXXFLAGS")]),
            "simd": compiler.levels(),
        }
        return ROOT / folder / file_name, report

    def build_cuda(self, compiler: Compiler, folder: str, file_name: str) -> dict:
        """Builds the extension with the GPU kernels, or without them if they cannot be built.
        Returns what was compiled, or why not."""
        wanted, module = os.environ.get("RNNFAST_CUDA", ""), f"{folder}/{file_name}"
        try:
            if wanted == "0":
                raise Unavailable("RNNFAST_CUDA=0 was set when it was built")
            nvcc = Nvcc.find(compiler)
            make(extension_steps(compiler, folder, module, nvcc), folder)
            load(folder)
            return {"compiler": nvcc.version, "archs": nvcc.archs, "reason": None}
        except Unavailable as error:
            if wanted == "1":
                raise Unavailable(f"RNNFAST_CUDA is set, and {error}") from error
            reason = str(error)
        make(extension_steps(compiler, folder, module), folder)
        load(folder)
        print(f"rnnfast is being built without its CUDA kernels: {reason}", flush=True)
        return {"compiler": None, "archs": [], "reason": reason}

    def get_source_files(self) -> list[str]:
        return []  # MANIFEST.in grafts csrc, headers included

    def get_output_mapping(self) -> dict[str, str]:
        """{file in build_lib: its path in the sources}, for an editable installation."""
        if not self.inplace:
            return {}
        return {file: str(ROOT / Path(file).relative_to(self.build_lib)) for file in self.made()}

    def get_outputs(self) -> list[str]:
        return self.made()

    def made(self) -> list[str]:
        module = Path(self.build_lib, self.get_ext_filename(self.extensions[0].name))
        return [str(f) for f in (module, module.with_name("_build.json")) if f.exists()]


def replace(path: Path, content: bytes | None) -> None:
    """Replaces the file at once, because a running process may have mapped it. None removes it."""
    if content is None:
        path.unlink(missing_ok=True)
        return
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_bytes(content)
    new.replace(path)


def warn(reason: str) -> None:
    lines = [
        "*" * 92,
        "rnnfast is being installed WITHOUT its compiled kernels: the cpu backend will be missing.",
        reason,
        "RNNFAST_REQUIRE_EXTENSION=1 makes this an error. pip keeps the wheel made without them:",
        "once this is mended, install with --no-cache-dir --force-reinstall --no-deps.",
        "*" * 92,
    ]
    print("\n".join(lines), file=sys.stderr, flush=True)


if __name__ == "__main__":
    setup(
        packages=[*find_packages(include=["rnnfast", "rnnfast.*"]), *TRITON_PACKAGES],
        package_dir=PACKAGES,
        ext_modules=[Extension("rnnfast._C", sources=[])],
        cmdclass={"build_ext": BuildExtension},
        zip_safe=False,
    )
