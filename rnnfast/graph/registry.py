"""The package's ops in torch's registry, which takes a name once in a process.

The package may be imported again in the same process, after its modules left sys.modules: an op
then calls the functions of the newest import. The registry's own objects stay those of the first,
because graphs that were traced before hold on to them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.library import Library


class Ops:
    """A torch.library.Library of one namespace, shared by all imports of the package."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        # torch.ops outlives the modules of this package.
        home = getattr(torch.ops, namespace)
        if not hasattr(home, "_registered"):
            home._registered = Library(namespace, "DEF"), {}, {}
        self._library, self._schemas, self._bodies = home._registered

    def define(self, schema: str) -> None:
        """
        Raises:
            ImportError: another import has defined the op with another schema.
        """
        name = schema.partition("(")[0]
        if name not in self._schemas:
            self._library.define(schema)
            self._schemas[name] = schema
        elif self._schemas[name] != schema:
            raise ImportError(
                f"{self._namespace}::{name}: another version of the package has registered it in "
                "this process; start a new process"
            )

    def impl(self, name: str, body: Callable, key: str, *, with_keyset: bool = False) -> None:
        """As Library.impl."""
        if self._is_first(name, key, body):
            found = self._newest(name, key)
            self._library.impl(name, found, key, with_keyset=with_keyset)

    def register_fake(self, name: str, body: Callable) -> None:
        """As torch.library.register_fake."""
        if self._is_first(name, "fake", body):
            full = f"{self._namespace}::{name}"
            torch.library.register_fake(full, self._newest(name, "fake"), lib=self._library)

    def _is_first(self, name: str, key: str, body: Callable) -> bool:
        """Puts ``body`` in its place; whether the place is new."""
        new = (name, key) not in self._bodies
        self._bodies[name, key] = body
        return new

    def _newest(self, name: str, key: str) -> Callable:
        bodies = self._bodies
        return lambda *inputs, **named: bodies[name, key](*inputs, **named)
