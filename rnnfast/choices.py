"""The names that arguments take, for type checkers."""

from __future__ import annotations

from typing import Literal

Nonlinearity = Literal["tanh", "relu", "sigmoid"]
Norm = Literal["layer", "batch"]
Init = Literal["torch", "orthogonal", "identity", "glorot", "he"]
Backend = Literal["auto", "cpu", "cuda", "triton", "torch", "reference"]
