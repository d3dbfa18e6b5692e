"""The floating-point arrays of a pytree, by their paths: what an EMA averages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from selfalign.adapting import Tensor, Tree


def path_of(path: Any) -> str:
    """A leaf's path as one string, such as blocks/0/kernel."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def is_floating(leaf: object) -> bool:
    """Whether a leaf is an array of floating-point numbers."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not hasattr(leaf, "shape"):
        return False
    return bool(jnp.issubdtype(dtype, jnp.floating))


def floating(tree: Tree) -> dict[str, Tensor]:
    """The floating-point arrays of a pytree, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_of(path): leaf for path, leaf in leaves if is_floating(leaf)}


def replaced(tree: Tree, leaves: Mapping[str, Tensor]) -> Tree:
    """`tree` with other arrays at the paths in `leaves`."""

    def choose(path: Any, leaf: Any) -> Any:
        return leaves.get(path_of(path), leaf)

    return jax.tree_util.tree_map_with_path(choose, tree)
