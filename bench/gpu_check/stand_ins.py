"""The dry run: small processes that do everything a step may do."""

from __future__ import annotations

from .driver import Step

HANGS = """
import subprocess, sys
print("last test begun", flush=True)
subprocess.run([sys.executable, "-c", "import time; time.sleep(600)"])
"""
FAILS = """
import os
print(f"FAILED tests/gpu/test_x.py::test_y - AssertionError: {os.__file__}")
raise SystemExit("\\x1b[31m1 failed\\x1b[0m, 3 passed in 0.1 s")
"""
WRITES = """
import pathlib, sys
pathlib.Path(sys.argv[1], "small.csv").write_text("a,b\\n")
pathlib.Path(sys.argv[1], "large.ncu-rep").write_bytes(bytes(6_000_000))
print("two files")
"""
FLOODS = "for i in range(100_000): print('line', i)"
FORBIDDEN = "print('==ERROR== ERR_NVGPUCTRPERM'); raise SystemExit(1)"


def _python(name: str, code: str, limit_s: float = 30, **options) -> Step:
    return Step(name, ("python", "-c", code, "{out}"), limit_s, **options)


STAND_INS = (
    _python("hangs", HANGS, 3),
    _python("succeeds", "print('all is well')"),
    _python("fails", FAILS),
    _python("crashes", "import os; print('so far', flush=True); os.abort()"),
    _python("floods", FLOODS),
    _python("writes", WRITES),
    _python("forbidden", FORBIDDEN, excuse=("ERR_NVGPUCTRPERM", "no permission")),
    Step("missing", ("no-such-program",), 30),
)
