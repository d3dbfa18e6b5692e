"""The floating-point arrays of a pytree, by their paths: what an EMA averages.

A whole `nnx.Module` is walked as the graph that it is, so that a weight that two places share is
one array, also in what is made from it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
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
    found: dict[str, Tensor] = {}

    def note(path: str, leaf: Any) -> Any:
        if is_floating(leaf):
            found[path] = leaf
        return leaf

    map_with_path(note, tree)
    return found


def replaced(tree: Tree, leaves: Mapping[str, Tensor]) -> Tree:
    """`tree` with other arrays at the paths in `leaves`."""
    return map_with_path(lambda path, leaf: leaves.get(path, leaf), tree)


def map_with_path(function: Callable[[str, Any], Any], tree: Tree) -> Tree:
    """A tree of function(path, leaf). What is tied in NNX modules is one leaf, and stays tied."""

    def mapped(path: Any, node: Any) -> Any:
        if not is_nnx_module(node):
            return function(path_of(path), node)
        nnx = sys.modules["flax.nnx"]
        graph, state = nnx.split(node)

        def inner(below: Any, leaf: Any) -> Any:
            return function(path_of((*path, *below)), leaf)

        return nnx.merge(graph, jax.tree_util.tree_map_with_path(inner, state))

    return jax.tree_util.tree_map_with_path(mapped, tree, is_leaf=is_nnx_module)


def is_nnx_module(node: object) -> bool:
    """Whether this is a module of Flax NNX, without an import of it."""
    nnx: Any = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(node, nnx.Module)
