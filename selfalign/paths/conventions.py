"""Ways in which a model is told the time."""

from __future__ import annotations

from collections.abc import Callable

from .._backend import ops
from ..typing import Tensor, Times

Convention = Callable[[Times], Tensor]


def with_rounding(*ways: Convention) -> tuple[tuple[Convention, ...], ...]:
    """Time conventions, and the same rounded to whole steps."""
    rounded = tuple(_rounded(way) for way in ways)
    return ways, rounded


def _rounded(way: Convention) -> Convention:
    return lambda t: ops.round(way(t))
