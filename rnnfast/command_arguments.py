"""Types of command line arguments, for argparse. An error says which value was given and which is
wanted."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    value = _integer(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"given {value}, wanted 1 or more")
    return value


def point(text: str) -> tuple[int, ...]:
    sizes = tuple(int(part) if part.isdecimal() else 0 for part in text.split(","))
    if len(sizes) != 3 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"given {text!r}, wanted T,B,H, each 1 or more")
    return sizes


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 600:
        raise argparse.ArgumentTypeError(f"given {text!r}, wanted more than 0, up to 600")
    return value


def seed(text: str) -> int:
    value = _integer(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"given {value}, wanted 0 to 2^63 - 1")
    return value


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"given {text!r}, wanted a whole number") from None
