"""Names for the types that the library speaks of. They tell a reader what a parameter is.

A tensor belongs to one of several frameworks, none of which the core imports. So these are names,
not checks: a type checker takes `Tensor` for anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

Tensor: TypeAlias = Any
"""An array of the framework in use: a torch.Tensor, a jax.Array, a NumPy array."""

Tokens: TypeAlias = Tensor
"""Features [B, N, D], floating point."""

Times: TypeAlias = Tensor
"""Times [B], one for each sample, on a noise path."""

Draws: TypeAlias = Tensor
"""Numbers uniform in [0, 1)."""

Mask: TypeAlias = Tensor | None
"""Booleans or weights, over samples [B] or tokens [B, N]; None leaves nothing out."""

Scalar: TypeAlias = Any
"""A number, or a tensor without axes."""

Step: TypeAlias = Any
"""The number of optimizer steps done: an int, or an integer tensor without axes."""

Tree: TypeAlias = Any
"""A nest of dicts, lists and tuples of arrays; in JAX, any pytree."""

Parameters: TypeAlias = Mapping[str, Tensor]
"""The parameters of a head, by their names."""

Metrics: TypeAlias = dict[str, Tensor]
"""Scalars to log, by their names."""

Settings: TypeAlias = dict[str, Any]
"""Plain values, by the names of settings: what a JSON file can hold."""

Layer: TypeAlias = int | float
"""A block's number, counted from 1, or a fraction of the depth inside (0, 1)."""

Distance: TypeAlias = Callable[[Tokens, Tokens], Tensor]
"""(student, target) -> distances [B, N], or [B] where it does not tell tokens apart."""
