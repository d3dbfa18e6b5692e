"""The exponential moving average (EMA) of a model's parameters, one step behind the model."""

from __future__ import annotations

import numbers
import sys
from typing import Any

from ._backend import converted, dtype_of, extremes, is_floating, on_backend, ops, widened
from ._checks import check_number, check_same, invalid
from .typing import Scalar, Tensor, Tree


@on_backend
def ema_update(teacher: Tree, student: Tree, decay: Scalar) -> Tree:
    """One EMA step over a nest of arrays: teacher <- decay * teacher + (1 - decay) * student.

    Computed so that equal weights stay equal to the last bit, and decay 0 gives the student
    exactly.

    Args:
        teacher: dicts, lists and tuples of arrays, at any depth; the EMA before the step.
        student: the same structure and shapes, after the optimizer's step; any floating dtype.
        decay: weight of the old value, a number or scalar in [0, 1]. 0.9999 halves the old weights
            in 6,931 steps.

    Returns:
        The new teacher, without gradient. Leaves in half precision come back in float32, because
        1 - 0.9999 is below the resolution of bfloat16 and such an EMA would never move. Integer,
        boolean and complex leaves are the teacher's own.

    Raises:
        ValueError: structures or shapes that differ (the message names the first path), or `decay`
            outside [0, 1].
        TypeError: tensors of another framework.

    Example:
        >>> import numpy as np, selfalign
        >>> teacher = selfalign.ema_update({"w": np.zeros(2)}, {"w": np.ones(2)}, decay=0.75)
        >>> [float(x) for x in teacher["w"]]
        [0.25, 0.25]

    Reference: Jiang et al., SRA, 2025, arXiv 2505.02831: decay 0.9999, no warm-up.
    """
    _check_decay(decay)
    tree = sys.modules["keras"].tree
    old = tree.flatten_with_path(teacher)
    new = tree.flatten_with_path(student)
    check_same(_by_path(old), _by_path(new))
    pairs = zip(old, new, strict=True)
    moved = [_ema_leaf(mine, theirs, decay) for (_, mine), (_, theirs) in pairs]
    return tree.pack_sequence_as(teacher, moved)


def _by_path(leaves: list[tuple[Any, Tensor]]) -> dict[str, Tensor]:
    return {"/".join(map(str, path)): leaf for path, leaf in leaves}


def _ema_leaf(teacher: Tensor, student: Tensor, decay: Scalar) -> Tensor:
    if not is_floating(teacher):
        return teacher
    old = widened(ops.stop_gradient(_tensor(teacher)))
    dtype = dtype_of(old)
    new = ops.cast(ops.stop_gradient(_tensor(student)), dtype)
    kept = ops.cast(decay, dtype)
    # 1 - decay before the cast: in float32 it would be 1.00017e-4 for 0.9999
    moved = ops.cast(1.0 - decay, dtype)
    # from the nearer end: exact at both, and where the two are equal
    if not isinstance(decay, (int, float)):
        return ops.where(kept > 0.5, old + moved * (new - old), new + kept * (old - new))
    if decay > 0.5:
        return old + moved * (new - old)
    return new + kept * (old - new)


def _tensor(leaf: Tensor) -> Tensor:
    return ops.convert_to_tensor(leaf) if isinstance(leaf, numbers.Number) else converted(leaf)


def _check_decay(decay: Scalar) -> None:
    fix = "It is the weight of the old value, 0.9999 in the paper."
    if getattr(decay, "shape", None) != () or dtype_of(decay) == "bool":
        check_number("decay", decay, 0, 1, fix)
        return
    found = extremes(decay)
    if found is not None and not 0 <= found[0] <= 1:
        raise invalid("decay must be in [0, 1]", found[0], fix)
