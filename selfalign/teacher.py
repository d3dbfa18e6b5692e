"""The teacher: an exponential moving average (EMA) of the student, one step behind it."""

from __future__ import annotations

import numbers
import sys
from typing import Any

from ._backend import converted, dtype_of, is_floating, on_backend, ops, widened
from ._checks import check_number, check_same, check_values


@on_backend
def ema_update(teacher: Any, student: Any, decay: Any) -> Any:
    """One EMA step over a nested structure: teacher <- decay * teacher + (1 - decay) * student.

    Computed so that equal weights stay equal to the last bit, and decay 0 gives the student exactly.

    Args:
        teacher: dicts, lists and tuples of arrays, at any depth; the EMA before the step.
        student: the same structure and shapes, after the optimizer's step; any floating dtype.
        decay: weight of the old value, a number or scalar in [0, 1]. 0.9999 halves the old weights in 6,931 steps.

    Returns:
        The new teacher, without gradient. Leaves in half precision come back in float32, because 1 - 0.9999 is below the
        resolution of bfloat16 and such an EMA would never move. Integer, boolean and complex leaves are the teacher's own.

    Raises:
        ValueError: structures or shapes that differ (the message names the first path), or `decay` outside [0, 1].
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
    old, new = tree.flatten_with_path(teacher), tree.flatten_with_path(student)
    check_same(*({"/".join(map(str, path)): leaf for path, leaf in side} for side in (old, new)))
    return tree.pack_sequence_as(teacher, [_ema_leaf(a, b, decay) for (_, a), (_, b) in zip(old, new, strict=True)])


def _ema_leaf(teacher: Any, student: Any, decay: Any) -> Any:
    if not is_floating(teacher):
        return teacher
    old, new = (ops.stop_gradient(_tensor(leaf)) for leaf in (teacher, student))
    old = widened(old)
    # 1 - decay before the cast: in float32 it would be 1.00017e-4 for 0.9999
    new, kept, moved = (ops.cast(x, dtype_of(old)) for x in (new, decay, 1.0 - decay))
    # from the nearer end: exact at both, and where the two are equal
    if isinstance(decay, (int, float)):
        return old + moved * (new - old) if decay > 0.5 else new + kept * (old - new)
    return ops.where(kept > 0.5, old + moved * (new - old), new + kept * (old - new))


def _tensor(leaf: Any) -> Any:
    return ops.convert_to_tensor(leaf) if isinstance(leaf, numbers.Number) else converted(leaf)


def _check_decay(decay: Any) -> None:
    fix = "It is the weight of the old value, 0.9999 in the paper."
    if getattr(decay, "shape", None) == ():
        check_values("decay", decay, 0, 1, fix)
    else:
        check_number("decay", decay, 0, 1, fix)
