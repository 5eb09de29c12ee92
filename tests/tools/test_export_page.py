"""docs/export.md: its code runs as it stands, its links lead somewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.proof

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "export.md").read_text()
BLOCKS = re.findall(r"^```python[^\n]*\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def test_the_page_has_code():
    """The test below would pass on none."""
    assert len(BLOCKS) >= 7
    assert sum("onnxruntime" in block for block in BLOCKS) == 1


def test_all_code_of_the_page_runs_in_its_order(tmp_path):
    there = all(importlib.util.find_spec(name) for name in ("onnxscript", "onnxruntime"))
    blocks = [block for block in BLOCKS if there or "onnxruntime" not in block]
    file = tmp_path / "page.py"  # torch.jit.script reads the source of a class
    file.write_text("\n".join(blocks))
    done = subprocess.run(
        [sys.executable, file],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_links_within_the_page_have_a_heading():
    headings = re.findall(r"^## (.*)$", TEXT, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
    links = re.findall(r"\]\(#([^)]*)\)", TEXT)
    assert links
    assert set(links) <= anchors
