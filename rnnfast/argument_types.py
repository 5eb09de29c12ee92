"""The values that arguments may have, for type checkers."""

from __future__ import annotations

from typing import Literal, TypedDict

Nonlinearity = Literal["tanh", "relu", "sigmoid", "softplus"]
Norm = Literal["layer", "batch"]
Init = Literal["torch", "orthogonal", "identity", "glorot", "he"]
GatedInit = Literal["torch", "orthogonal", "glorot"]
TrackGradientFlow = bool | Literal["sample"]
Backend = Literal["auto", "cpu", "cuda", "triton", "torch", "reference"]


class NoMore(TypedDict):
    """No keyword arguments: a type checker reports any, and the constructor refuses it by name."""
