"""README.md and docs/speed.md hold the figures of bench/results. The code of all pages runs."""

from __future__ import annotations

import csv
import importlib.util
import re
import shlex
import warnings
from pathlib import Path

import pytest

from bench import readme
from rnnfast.__main__ import parser

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES += sorted(page for folder in ("docs", "bench") for page in (ROOT / folder).rglob("*.md"))
# "```python needs NAME" opens code that runs where that package is installed.
BLOCK = re.compile(r"^```python(?: needs ([\w.]+))?\n(.*?)^```$", re.M | re.S)
FENCE = re.compile(r"^ *```py", re.M)
WITH_CODE = [page for page in PAGES if FENCE.search(page.read_text())]


@pytest.mark.parametrize("name", readme.PAGES)
def test_the_figures_of_a_page_are_those_of_the_results(name):
    text = (ROOT / name).read_text()
    made = readme.with_figures(name, text, ROOT / "bench" / "results")
    assert made == text, "python -m bench.readme"


def test_the_readme_shows_the_worst_ratio_of_all_sizes():
    """No choice of sizes hides it."""
    by_cell: dict[str, list[float]] = {}
    with (ROOT / "bench" / "results" / "cpu.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if (
                row["provider"].startswith("rnnfast")
                and row["what"] == "forward+backward"
                and row["precision"] == "float32"
                and row["layers"] == row["directions"] == "1"
                and row["packed"] == "False"
                and not row["norm"]
                and row["kind"] in ("listed", "drawn", "sweep", "gated")
            ):
                ratios = by_cell.setdefault(row.get("cell", "rnn_tanh"), [])
                ratios.append(float(row["over_torch"]))
    (line,) = re.findall(r"^\| slowest size \|.*$", (ROOT / "README.md").read_text(), re.M)
    for ratios in by_cell.values():
        assert f": {min(ratios):.2f}x (" in line


def test_a_page_without_a_place_for_figures_is_refused():
    with pytest.raises(ValueError, match="lacks the lines"):
        readme.with_figures("README.md", "# rnnfast", ROOT / "bench" / "results")


def test_the_readme_is_short():
    assert (ROOT / "README.md").read_text().count("\n") <= 110


def test_the_folders_of_the_contributing_page_exist():
    table, _, _ = (ROOT / "CONTRIBUTING.md").read_text().partition("Imports only point down")
    cells = re.findall(r"^\| (`.*?`) \|", table, re.M)
    names = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    assert len(names) > 20
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_links_between_pages_lead_somewhere():
    """To a file, and to a heading of it where the link names one."""
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if "://" in target:
                continue
            name, _, anchor = target.partition("#")
            found = (page.parent / name) if name else page
            assert found.exists(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", found.read_text(), re.M)
                anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
                assert anchor in anchors, f"{page.name}: {target}"


def test_pages_have_code():
    assert {"README.md", "gradient_flow.md"} <= {page.name for page in WITH_CODE}


@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # in torch.compile itself
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    """From its first line to its last, as a reader copies it."""
    text = page.read_text()
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == len(FENCE.findall(text)), "code that nothing runs"
    monkeypatch.chdir(tmp_path)
    scope, missing = {"__name__": "__main__"}, set()
    for block in blocks:
        package, code = block.groups()
        if package and importlib.util.find_spec(package) is None:
            missing.add(package)
            continue
        line = text.count("\n", 0, block.start(2))
        with warnings.catch_warnings():
            if package:  # which warns of torch, or of itself
                warnings.simplefilter("ignore")
            exec(compile("\n" * line + code, str(page), "exec"), scope)
    if missing:
        pytest.skip(f"all but the code that needs {', '.join(missing)} ran")


def test_the_commands_of_the_pages_are_commands():
    found = []
    for page in PAGES:
        found += re.findall(r"python -m rnnfast +([a-z][^`#\n]*)", page.read_text())
    assert len(found) > 5
    for arguments in found:
        parser().parse_args(shlex.split(arguments))
