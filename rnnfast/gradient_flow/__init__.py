"""What backward measured of the gradient on its way back through time, and what it says.

The pieces: flow (the record, :class:`GradientFlow`), reading (half-life, horizon, verdict, from
numbers alone) and picture; on top of them probe (a gradient of no particular loss) and monitor
(over a training).
"""

from .flow import GradientFlow, read

__all__ = ["GradientFlow", "read"]
