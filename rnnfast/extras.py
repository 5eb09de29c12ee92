"""Optional packages."""

from __future__ import annotations

from importlib import import_module


def need(package: str, extra: str, what: str) -> None:
    """
    Raises:
        ModuleNotFoundError: ``what`` needs ``package``, which is not installed; the message names
            the extra of rnnfast that installs it.
    """
    try:
        import_module(package)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        message = f"{what} needs {package}: pip install rnnfast[{extra}]"
        raise ModuleNotFoundError(message, name=package) from error
