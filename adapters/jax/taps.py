"""Where a JAX model is tapped: an array by its path in what a forward captured."""

from __future__ import annotations

from typing import Any

import jax

from selfalign.adapting import Tree, invalid

from .trees import path_of

Leaves = list[tuple[list[str], Any]]
"""The captured arrays, each with the parts of its path."""


def tap(captured: Tree, where: str | int) -> jax.Array:
    """One block's output out of what a model's forward captured.

    Args:
        captured: a list or tuple of all blocks' outputs, or a nest with named places: a dict, the
            state that `nnx.capture` returns, Linen's "intermediates". The one-element tuples of sow
            are seen through.
        where: the block's number, counted from 1, in a list; else a path such as
            "blocks/7/__call__".

    Returns:
        The array there.

    Raises:
        ValueError: nothing is captured there, or more than one array; the message lists what was
            captured.
        TypeError: `where` is neither an int nor a str.

    Example:
        >>> import jax.numpy as jnp
        >>> from selfalign.adapters import jax as sra
        >>> sra.tap({"block_0": {"__call__": (jnp.ones((2, 5, 8)),)}}, "block_0/__call__").shape
        (2, 5, 8)
    """
    if not isinstance(where, (str, int)) or isinstance(where, bool):
        raise TypeError(
            f"where must be a block's number or a path. Received: {where!r:.60}. "
            "Pass an int from 1, or a str."
        )
    leaves = [
        (path_of(path).split("/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(captured)
    ]
    wanted = [str(where - 1)] if isinstance(where, int) else where.strip("/").split("/")
    found = [leaf for path, leaf in leaves if path[: len(wanted)] == wanted]
    number_outside_a_list = isinstance(where, int) and not isinstance(captured, (list, tuple))
    if len(found) != 1 or number_outside_a_list:
        raise invalid(
            "A tap must name one captured array, by its path, or by its number from 1 in a list",
            f"{where!r}, which names {len(found)}",
            f"Captured: {_listed(leaves)}.",
        )
    return found[0]


def _listed(leaves: Leaves) -> str:
    shapes = [f"{'/'.join(path)} {tuple(getattr(leaf, 'shape', ()))}" for path, leaf in leaves]
    return ", ".join(shapes) or "nothing"
