"""README.md holds the figures of bench/results, and none other. The code of all pages runs."""

from __future__ import annotations

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


def test_the_figures_of_the_readme_are_those_of_the_results():
    text = (ROOT / "README.md").read_text()
    assert readme.with_figures(text, ROOT / "bench" / "results") == text, "python -m bench.readme"


def test_a_readme_without_a_place_for_figures_is_refused():
    with pytest.raises(ValueError, match="lacks the lines"):
        readme.with_figures("# rnnfast", ROOT / "bench" / "results")


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
