"""Frozen leaves: the teacher has none of its own, the student's stand in their place."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from selfalign.adapting import Tensor, Tree, invalid

from .trees import floating, is_nnx_module, path_of

Trained: TypeAlias = Tree | Callable[[str, Any], bool]
"""Booleans at the places of the leaves, or above them; (path, leaf) -> bool; an NNX filter."""


def trained_paths(params: Tree, trained: Trained) -> set[str]:
    """The paths of the leaves that are trained.

    Raises:
        ValueError: booleans of another structure.
        TypeError: something else than booleans or a function.
    """
    nnx: Any = sys.modules.get("flax.nnx")
    if nnx is not None and (is_nnx_module(params) or isinstance(params, nnx.State)):
        state = params if isinstance(params, nnx.State) else nnx.state(params)
        return set(floating(nnx.filter_state(state, trained)))
    if callable(trained) and jax.tree_util.all_leaves([trained]):  # a module of booleans is none
        return {path for path, leaf in floating(params).items() if trained(path, leaf)}
    return _marked_paths(params, trained)


def _is_bool(leaf: object) -> bool:
    return isinstance(leaf, bool)


def _spread(mark: Any, below: Tree) -> Tree:
    return jax.tree.map(lambda _: mark, below)


def _marked_paths(params: Tree, marks: Tree) -> set[str]:
    try:
        spread = jax.tree.map(_spread, marks, params)
    except (ValueError, TypeError) as error:
        raise invalid(
            "trained= must be booleans at the places of the parameters, or above them",
            str(error).splitlines()[0][:200],
            "Pass a tree of their structure, or a function (path, leaf) -> bool.",
        ) from error
    found = jax.tree_util.tree_leaves_with_path(spread)
    for path, mark in found:
        if not _is_bool(mark):
            raise TypeError(
                "trained= must be booleans, or a function (path, leaf) -> bool. "
                f"Received: {mark!r:.60} at {path_of(path)!r}. True stands for what is trained."
            )
    return {path_of(path) for path, mark in found if mark}


def placeholder(leaf: Tensor) -> jax.Array:
    """What stands in the teacher for a frozen leaf: one number, of its dtype.

    It has one axis more than the leaf, so that it is taken for nothing else. An empty array would
    be one that orbax cannot save.
    """
    return jnp.zeros((1,) * (leaf.ndim + 1), leaf.dtype)


def is_placeholder(mine: Tensor, theirs: Tensor) -> bool:
    """Whether the teacher's leaf stands for the student's."""
    return tuple(mine.shape) == (1,) * (theirs.ndim + 1)
