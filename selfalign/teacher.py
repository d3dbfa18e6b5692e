"""The teacher: an exponential moving average (EMA) of the student, one step behind it."""

from __future__ import annotations

import sys
from typing import Any

from ._backend import converted, dtype_of, is_floating, on_backend, ops, widened
from ._checks import check_number, check_values, invalid


@on_backend
def ema_update(teacher: Any, student: Any, decay: Any) -> Any:
    """One EMA step over a nested structure: teacher <- decay * teacher + (1 - decay) * student.

    Computed as teacher + (1 - decay) (student - teacher), so that equal weights stay equal to the last bit.

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
    if isinstance(decay, (int, float)):
        check_number("decay", decay, 0, 1, "It is the weight of the old value, 0.9999 in the paper.")
    else:
        check_values("decay", decay, 0, 1, "It is the weight of the old value, 0.9999 in the paper.")
    tree = sys.modules["keras"].tree
    old, new = tree.flatten_with_path(teacher), tree.flatten_with_path(student)
    _check_same(dict(old), dict(new))
    return tree.pack_sequence_as(teacher, [_ema_leaf(a, b, decay) for (_, a), (_, b) in zip(old, new, strict=True)])


def _ema_leaf(teacher: Any, student: Any, decay: Any) -> Any:
    if not is_floating(teacher):
        return teacher
    teacher, student = (ops.stop_gradient(converted(leaf)) for leaf in (teacher, student))
    teacher = widened(teacher)
    return teacher + ops.cast(1.0 - decay, dtype_of(teacher)) * (ops.cast(student, dtype_of(teacher)) - teacher)


def _check_same(teacher: dict[Any, Any], student: dict[Any, Any]) -> None:
    for path in [*teacher, *student]:
        sides = [tuple(getattr(side[path], "shape", ())) if path in side else "missing" for side in (teacher, student)]
        if sides[0] != sides[1]:
            raise invalid("Teacher and student must have the same structure and shapes",
                          f"at {'/'.join(map(str, path))!r}: teacher {sides[0]}, student {sides[1]}",
                          "Build the teacher as a copy of the student's parameters.")  # fmt: skip
