"""Which layers are aligned: a layer's number, or a fraction of the depth.

Layers are counted from 1: layer n is the residual stream right after block n.
"""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

from ._checks import check_number, check_switch, invalid
from .presets import preset_layers as preset_layers
from .typing import Layer


def check_layer(name: str, layer: Any) -> Layer:
    """A layer as given: a number from 1, or a fraction of the depth inside (0, 1).

    Raises:
        ValueError: layer 0, or a fraction outside (0, 1).
        TypeError: no number.

    Example:
        >>> import selfalign
        >>> selfalign.layers.check_layer("student_layer", 8)
        8
        >>> selfalign.layers.check_layer("student_layer", 0.25)
        0.25
    """
    if isinstance(layer, numbers.Integral) and not isinstance(layer, bool):
        fix = "Layers are counted from 1: layer n is after block n."
        return int(check_number(name, operator.index(layer), 1, fix=fix))
    if isinstance(layer, numbers.Real) and not isinstance(layer, bool):
        if not 0.0 < float(layer) < 1.0:
            raise invalid(
                f"{name} as a fraction of the depth must lie inside (0, 1)",
                layer,
                "Pass an int for a layer's number, counted from 1.",
            )
        return float(layer)
    raise TypeError(
        f"{name} must be an int (a layer counted from 1) or a float (a fraction of the depth). "
        f"Received: {layer!r}. Pass for instance 8, or 0.25."
    )


def check_order(student: Layer, teacher: Layer, allow_same_layer: bool = False) -> None:
    """The student's layer comes before the teacher's: raises ValueError otherwise.

    Example:
        >>> import selfalign
        >>> selfalign.layers.check_order(3, 8)
    """
    student = check_layer("student_layer", student)
    teacher = check_layer("teacher_layer", teacher)
    allow_same_layer = check_switch("allow_same_layer", allow_same_layer)
    if student > teacher or (student == teacher and not allow_same_layer):
        fix = "Swap them." if student > teacher else "Choose a later layer for the teacher."
        ablation = "For the paper's same-layer ablation pass SRALoss(allow_same_layer=True)."
        raise invalid(
            "student_layer must come before teacher_layer",
            f"student {student}, teacher {teacher}",
            f"{fix} {ablation}" if student == teacher else fix,
        )


def check_order_where_known(student: Layer, teacher: Layer, allow_same_layer: bool) -> None:
    """`check_order`, unless one is a number and the other a fraction: then the depth decides.

    Example:
        >>> import selfalign
        >>> selfalign.layers.check_order_where_known(3, 0.1, allow_same_layer=False)
    """
    student = check_layer("student_layer", student)
    teacher = check_layer("teacher_layer", teacher)
    allow_same_layer = check_switch("allow_same_layer", allow_same_layer)
    if type(student) is type(teacher):
        check_order(student, teacher, allow_same_layer)


def resolve_layers(
    student_layer: Any, teacher_layer: Any, depth: int, allow_same_layer: bool = False
) -> tuple[int, int]:
    """The student's and the teacher's layer numbers, from 1, in a model of `depth` blocks.

    A fraction f becomes round(f * depth), halves up, at least 1.

    Args:
        student_layer: an int from 1, or a fraction inside (0, 1).
        teacher_layer: the same; after the student's.
        depth: number of blocks.
        allow_same_layer: permit student = teacher (the paper's ablation: worse than no alignment).

    Raises:
        ValueError: layer 0, beyond the depth, fraction outside (0, 1), or student not before
            teacher.

    Example:
        >>> import selfalign
        >>> selfalign.layers.resolve_layers(0.25, 0.7, depth=28)
        (7, 20)
    """
    student = resolve_layer("student_layer", student_layer, depth)
    teacher = resolve_layer("teacher_layer", teacher_layer, depth)
    check_order(student, teacher, allow_same_layer)
    return student, teacher


def resolve_layer(name: str, layer: Any, depth: int) -> int:
    """One layer's number in a model of `depth` blocks; see `resolve_layers`.

    Example:
        >>> import selfalign
        >>> selfalign.layers.resolve_layer("student_layer", 0.25, depth=12)
        3
    """
    check_number("depth", depth, 1, fix="It is the number of blocks.", integer=True)
    layer = check_layer(name, layer)
    if isinstance(layer, float):
        return max(1, min(depth, math.floor(layer * depth + 0.5)))
    if layer > depth:
        raise invalid(
            f"{name} must be at most the model's depth",
            f"layer {layer} of {depth} blocks",
            "Choose a layer from 1 to the depth, or a fraction such as 0.25.",
        )
    return layer
