"""Where a JAX model is tapped: arrays by their paths in what a forward captured, and stacked blocks cut at a layer."""

from __future__ import annotations

from typing import Any

import jax

from selfalign._checks import check_number, invalid


def path_of(path: Any) -> str:
    """A leaf's path, as one string, such as blocks/0/kernel."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def tap(captured: Any, where: str | int) -> jax.Array:
    """One block's output out of what a model's forward captured.

    Args:
        captured: a list or tuple of all blocks' outputs, or a nest with named places: a dict, the state that `nnx.capture`
            returns, Linen's "intermediates". The one-element tuples of sow are seen through.
        where: the block's number, counted from 1, in a list; else a path such as "blocks/7/__call__".

    Raises:
        ValueError: nothing is captured there, or more than one array; the message lists what was captured.
        TypeError: `where` is neither an int nor a str.

    Example:
        >>> import jax.numpy as jnp
        >>> from selfalign.adapters import jax as sra
        >>> sra.tap({"block_0": {"__call__": (jnp.ones((2, 5, 8)),)}}, "block_0/__call__").shape
        (2, 5, 8)
    """
    if not isinstance(where, (str, int)) or isinstance(where, bool):
        raise TypeError(f"where must be a block's number or a path. Received: {where!r:.60}. Pass an int from 1, or a str.")
    parts = [str(where - 1)] if isinstance(where, int) else where.strip("/").split("/")
    leaves = [(path_of(path).split("/"), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(captured)]
    found = [leaf for path, leaf in leaves if path[: len(parts)] == parts]
    if len(found) != 1 or (isinstance(where, int) and not isinstance(captured, (list, tuple))):
        listed = ", ".join(f"{'/'.join(path)} {tuple(getattr(leaf, 'shape', ()))}" for path, leaf in leaves) or "nothing"
        raise invalid("A tap must name one captured array, by its path, or by its number from 1 in a list",
                      f"{where!r}, which names {len(found)}", f"Captured: {listed}.")  # fmt: skip
    return found[0]


def split_blocks(stacked: Any, layer: int) -> tuple[Any, Any]:
    """The parameters of the blocks up to `layer` and of those after it, in a model that scans over its blocks.

    XLA can neither drop the later blocks of a scan nor hand out what is carried on the way. So the teacher scans over the first
    blocks alone, which costs what it must, and the student over both parts, with its features in between.

    Args:
        stacked: the blocks' parameters, each array with the depth as its first axis; other leaves go to both parts.
        layer: number of blocks in the first part, a Python int.

    Raises:
        ValueError: arrays of different depths, or fewer blocks than `layer`.
        TypeError: `layer` is no Python int.

    Example:
        >>> import jax.numpy as jnp
        >>> from selfalign.adapters import jax as sra
        >>> first, rest = sra.split_blocks({"kernel": jnp.ones((12, 8, 8)), "bias": jnp.ones((12, 8))}, 4)
        >>> first["kernel"].shape, rest["bias"].shape
        ((4, 8, 8), (8, 8))
    """
    depths = {path_of(path): x.shape[:1] for path, x in jax.tree_util.tree_leaves_with_path(stacked) if hasattr(x, "shape")}
    if len({*depths.values()}) != 1 or () in depths.values():
        raise invalid("Stacked blocks must have the depth as the first axis of every array",
                      ", ".join(f"{path} {depth}" for path, depth in depths.items()) or "no arrays",
                      "Pass the scanned blocks' parameters only.")  # fmt: skip
    ((depth,),) = {*depths.values()}
    check_number("layer", layer, 1, depth, "It is a block's number, counted from 1.", integer=True)
    parts = slice(None, layer), slice(layer, None)
    first, rest = (jax.tree.map(lambda x, p=part: x[p] if hasattr(x, "shape") else x, stacked) for part in parts)
    return first, rest
