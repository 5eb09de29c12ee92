"""What torch.compile is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Answer = TypeVar("Answer", bound=Callable)


def constant(answer: Answer) -> Answer:
    """torch.compile takes what this function answers for a constant: it cannot look at a device.
    (By the mark that torch.compiler.assume_constant_result sets, which takes a second to import.)
    """
    answer._dynamo_marked_constant = True
    return answer
