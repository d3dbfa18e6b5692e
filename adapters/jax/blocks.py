"""Blocks that a model scans over: their stacked parameters, cut at a layer."""

from __future__ import annotations

from typing import Any

import jax

from selfalign.adapting import Tree, check_number, invalid

from .trees import path_of


def split_blocks(stacked: Tree, layer: int) -> tuple[Tree, Tree]:
    """The parameters of the blocks up to `layer`, and of those after it, of a scanned model.

    XLA can neither drop the later blocks of a scan nor hand out what is carried on the way. So the
    teacher scans over the first blocks alone, which costs what it must. The student scans over both
    parts, with its features in between.

    Args:
        stacked: the blocks' parameters, each array with the depth as its first axis; other leaves
            go to both parts.
        layer: number of blocks in the first part, a Python int.

    Returns:
        The first part and the second, of the structure of `stacked`.

    Raises:
        ValueError: arrays of different depths, or fewer blocks than `layer`.
        TypeError: `layer` is no Python int.

    Example:
        >>> import jax.numpy as jnp
        >>> from selfalign.adapters import jax as sra
        >>> stacked = {"kernel": jnp.ones((12, 8, 8)), "bias": jnp.ones((12, 8))}
        >>> first, rest = sra.split_blocks(stacked, 4)
        >>> first["kernel"].shape, rest["bias"].shape
        ((4, 8, 8), (8, 8))
    """
    depth = _depth(stacked)
    check_number("layer", layer, 1, depth, "It is a block's number, counted from 1.", integer=True)
    return _cut(stacked, slice(None, layer)), _cut(stacked, slice(layer, None))


def _depth(stacked: Tree) -> int:
    leaves = jax.tree_util.tree_leaves_with_path(stacked)
    depths = {path_of(path): leaf.shape[:1] for path, leaf in leaves if hasattr(leaf, "shape")}
    different = set(depths.values())
    if len(different) != 1 or () in different:
        listed = ", ".join(f"{path} {depth}" for path, depth in depths.items())
        raise invalid(
            "Stacked blocks must have the depth as the first axis of every array",
            listed or "no arrays",
            "Pass the scanned blocks' parameters only.",
        )
    (depth,) = different.pop()
    return int(depth)


def _cut(stacked: Tree, part: slice) -> Tree:
    def cut(leaf: Any) -> Any:
        return leaf[part] if hasattr(leaf, "shape") else leaf

    return jax.tree.map(cut, stacked)
