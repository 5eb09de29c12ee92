"""The layers of the code: no module imports from above, and no backend imports another."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import rnnfast

PACKAGE = Path(rnnfast.__file__).parent

KERNELS = {"rnnfast._C", "rnnfast.triton_kernels"}
# From the top down. A module imports from the layers below its own, and within its own part.
LAYERS = [
    {"rnnfast.__main__"},
    {"rnnfast.demo"},
    {"rnnfast"},
    {"rnnfast.bench", "rnnfast.validate", "rnnfast.diagnose"},
    {"rnnfast.report"},
    {"rnnfast.convert"},
    {"rnnfast.modules"},
    {"rnnfast.functional", "rnnfast.deploy"},
    {"rnnfast.ops"},
    {"rnnfast.backends", "rnnfast.gradient_flow", "rnnfast.testing"},
    KERNELS,
    {"rnnfast.graph"},
    {"rnnfast.recurrence"},
    {"rnnfast.cells"},
    {"rnnfast.values"},
    {
        "rnnfast._version",
        "rnnfast.command_arguments",
        "rnnfast.watch",
        "rnnfast.argument_types",
        "rnnfast.tracing",
        "rnnfast.cores",
        "rnnfast.drawing",
        "rnnfast.extras",
        "rnnfast.tuning",
    },
]


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path) -> set[str]:
    """Every rnnfast module that ``path`` imports, inside functions and for annotations, too."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    known, found = modules(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*up, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.add(full if full in known or full == "rnnfast._C" else base)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return {f for f in found if f.split(".")[0] == "rnnfast"}


def type_checking_only(path: Path) -> set[str]:
    """The names that ``path`` imports from its own package for annotations alone."""
    return {
        alias.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for line in node.body
        if isinstance(line, ast.ImportFrom) and line.level == 1 and line.module is None
        for alias in line.names
    }


def unit(module: str) -> str:
    """The part of the package that a module belongs to: ``rnnfast.cells`` for
    ``rnnfast.cells.rnn``."""
    return ".".join(module.split(".")[:2])


def layer(module: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if unit(module) in names)


def test_the_contributing_page_lists_the_layers():
    page = Path(__file__).parents[2] / "CONTRIBUTING.md"
    entries = re.findall(r"^\d+\. (`rnnfast.*(?:\n .*)*)", page.read_text(), re.M)
    assert [set(re.findall(r"`([^`]+)`", entry)) for entry in entries] == LAYERS


@pytest.mark.parametrize("name", modules())
def test_every_module_has_a_layer(name):
    assert any(unit(name) in names for names in LAYERS)


@pytest.mark.parametrize("name", modules())
def test_nothing_imports_from_above(name):
    for other in imports(name, modules()[name]):
        if unit(other) != unit(name):
            assert layer(other) > layer(name), f"{name} imports {other}"


def test_leaves_import_nothing_of_ours():
    for name, path in modules().items():
        if unit(name) in LAYERS[-1]:
            assert not imports(name, path), name


def test_backends_do_not_know_each_other():
    """A backend imports its own parts (cuda: cuda_plan), and the estimates, which import none."""
    for name, path in modules().items():
        if name.startswith("rnnfast.backends."):
            backend, _, _ = name.partition("_")
            inside = {other for other in imports(name, path) if unit(other) == unit(name)}
            others = {m for m in inside if m.partition("_")[0] != backend}
            assert others <= {"rnnfast.backends", "rnnfast.backends.estimates"}, name
            if "rnnfast.backends" in others:  # the package's own table, for a type annotation
                assert type_checking_only(path) <= {"Problem"}, name
    estimates = "rnnfast.backends.estimates"
    assert imports(estimates, modules()[estimates]) == {"rnnfast.recurrence.precision"}


def test_only_backends_know_the_kernels():
    for name, path in modules().items():
        if unit(name) != "rnnfast.backends":
            kernels = {unit(other) for other in imports(name, path)} & KERNELS
            assert not kernels or unit(name) == "rnnfast.triton_kernels", name


def test_the_reader_of_imports_reads_them():
    """The tests above would pass if it found nothing."""
    found = modules()
    assert imports("rnnfast.backends", found["rnnfast.backends"]) == {
        "rnnfast.cells.rnn",
        "rnnfast.tracing",
        "rnnfast.backends.cpu",
        "rnnfast.backends.cuda",
        "rnnfast.backends.reference",
        "rnnfast.backends.torch_native",
        "rnnfast.backends.triton",
    }
    assert "rnnfast._C" in imports("rnnfast.backends.cpu", found["rnnfast.backends.cpu"])
    assert imports("rnnfast.functional", found["rnnfast.functional"]) == {
        "rnnfast.cells",
        "rnnfast.recurrence.groups",
        "rnnfast.recurrence.precision",
        "rnnfast.ops",
        "rnnfast.backends",
        "rnnfast.argument_types",
        "rnnfast.tracing",
        "rnnfast.values",
    }
    assert "rnnfast" in imports("rnnfast.demo.training", found["rnnfast.demo.training"])
    inside_a_function = imports("rnnfast.__main__", found["rnnfast.__main__"])
    assert {"rnnfast.demo", "rnnfast.bench.command"} <= inside_a_function
    for_annotations = imports("rnnfast.diagnose.picture", found["rnnfast.diagnose.picture"])
    assert "rnnfast.diagnose.probe" in for_annotations
