"""Launch plans that are timed once for each size and device. A file keeps the fastest.

Off unless RNNFAST_AUTOTUNE is set; then estimates decide.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TypeVar

ENABLED = os.environ.get("RNNFAST_AUTOTUNE", "") not in ("", "0")

Choice = TypeVar("Choice", bound=Hashable)


def folder() -> Path:
    """The folder of the results: RNNFAST_CACHE, or rnnfast in the user's cache."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("RNNFAST_CACHE") or Path(caches, "rnnfast"))


class Tuned:
    """The fastest plans on one device, with one build of the kernels."""

    def __init__(self, device: str, build: str) -> None:
        self.file = folder() / f"{re.sub(r'[^A-Za-z0-9]+', '-', device)}.json"
        self.build = build
        self.found = self._read()

    def best(self, size: str, choices: list[Choice], seconds: Callable[[Choice], float]) -> Choice:
        """The fastest choice. It calls ``seconds`` for a size that is not in the file."""
        known = {str(choice): choice for choice in choices}
        if self.found.get(size) not in known:
            times = {name: seconds(choice) for name, choice in known.items()}
            self.found[size] = min(times, key=times.get)
            self._write()
        return known[self.found[size]]

    def _read(self) -> dict[str, str]:
        try:
            kept = json.loads(self.file.read_text())
            return dict(kept["plans"]) if kept["build"] == self.build else {}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError) as error:
            self._warn("read", error)
            return {}

    def _write(self) -> None:
        """Writes the file, with the plans that other processes have added in the meantime."""
        self.found = self._read() | self.found
        text = json.dumps({"build": self.build, "plans": self.found}, indent=1, sort_keys=True)
        new = self.file.with_name(f"{self.file.name}.{os.getpid()}")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            new.write_text(text + "\n")
            new.replace(self.file)
        except OSError as error:
            self._warn("written", error)

    def _warn(self, done: str, error: Exception) -> None:
        warnings.warn(
            f"RNNFAST_AUTOTUNE: {self.file} cannot be {done}, so sizes are measured again: {error}",
            stacklevel=2,
        )
