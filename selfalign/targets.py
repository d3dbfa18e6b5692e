"""Target selection: which layer of the student is pulled toward which layer of the teacher.

Layers are counted from 1: layer n is the residual stream right after block n.
"""

from __future__ import annotations

import math
import numbers
import operator
import re
from typing import Any

from ._checks import check_number, invalid

_DEPTHS = {"S": 12, "B": 12, "L": 24, "XL": 28}
_LAYERS = {
    "SiT": {"S": (3, 8), "B": (3, 8), "L": (6, 16), "XL": (8, 20)},
    "DiT": {"S": (3, 7), "B": (3, 7), "L": (6, 14), "XL": (8, 16)},
}


def preset_layers(name: str) -> tuple[int, int]:
    """The paper's (student, teacher) layers of a model such as "SiT-XL/2" or "DiT-B/4"; the patch size does not matter.

    The paper has no S: it gets the layers of B, which is as deep (12 blocks).

    Raises:
        ValueError: an unknown name.

    Example:
        >>> import selfalign
        >>> selfalign.targets.preset_layers("SiT-XL/2")
        (8, 20)

    Reference: Jiang et al., SRA, 2025, arXiv 2505.02831.
    """
    return _LAYERS[family_of(name)][parse_preset(name)[1]]


def family_of(name: str) -> str:
    """ "SiT" or "DiT", from a model's name.

    Example:
        >>> import selfalign
        >>> selfalign.targets.family_of("DiT-XL/2")
        'DiT'
    """
    return parse_preset(name)[0]


def parse_preset(name: str) -> tuple[str, str]:
    """(family, size) of a model's name.

    Example:
        >>> import selfalign
        >>> selfalign.targets.parse_preset("DiT-B/4")
        ('DiT', 'B')
    """
    match = re.fullmatch(r"(SiT|DiT)-(XL|S|B|L)/[1-9]\d*", name) if isinstance(name, str) else None
    if match is None:
        raise invalid('A preset is named like "SiT-XL/2": SiT or DiT, then S, B, L or XL, then the patch size', repr(name),
                      "For another model pass student_layer and teacher_layer, for instance 0.25 and 0.7.")  # fmt: skip
    return match[1], match[2]


def check_layer(name: str, layer: Any) -> int | float:
    """A layer as given: a number from 1, or a fraction of the depth inside (0, 1). Raises ValueError or TypeError otherwise.

    Example:
        >>> import selfalign
        >>> selfalign.targets.check_layer("student_layer", 8), selfalign.targets.check_layer("student_layer", 0.25)
        (8, 0.25)
    """
    if isinstance(layer, numbers.Integral) and not isinstance(layer, bool):
        return int(check_number(name, operator.index(layer), 1, fix="Layers are counted from 1: layer n is after block n."))
    if isinstance(layer, numbers.Real) and not isinstance(layer, bool):
        if not 0.0 < float(layer) < 1.0:
            raise invalid(f"{name} as a fraction of the depth must lie inside (0, 1)", layer,
                          "Pass an int for a layer's number, counted from 1.")  # fmt: skip
        return float(layer)
    raise TypeError(f"{name} must be an int (a layer counted from 1) or a float (a fraction of the depth). "
                    f"Received: {layer!r}. Pass for instance 8, or 0.25.")  # fmt: skip


def resolve_layers(student_layer: Any, teacher_layer: Any, depth: int, allow_same_layer: bool = False) -> tuple[int, int]:
    """The numbers, counted from 1, of the student's and the teacher's layer in a model of `depth` blocks.

    A fraction f becomes round(f * depth), halves up, at least 1.

    Args:
        student_layer: an int from 1, or a fraction inside (0, 1).
        teacher_layer: the same; after the student's.
        depth: number of blocks.
        allow_same_layer: permit student = teacher (the paper's ablation: worse than no alignment).

    Raises:
        ValueError: layer 0, beyond the depth, fraction outside (0, 1), or student not before teacher.

    Example:
        >>> import selfalign
        >>> selfalign.targets.resolve_layers(0.25, 0.7, depth=28)
        (7, 20)
    """
    check_number("depth", depth, 1, fix="It is the number of blocks.", integer=True)
    student, teacher = (_resolve(n, layer, depth) for n, layer in
                        (("student_layer", student_layer), ("teacher_layer", teacher_layer)))  # fmt: skip
    check_order(student, teacher, allow_same_layer)
    return student, teacher


def check_order(student: float, teacher: float, allow_same_layer: bool) -> None:
    """The student's layer comes before the teacher's: raises ValueError otherwise.

    Example:
        >>> import selfalign
        >>> selfalign.targets.check_order(3, 8, allow_same_layer=False)
    """
    if student > teacher or (student == teacher and not allow_same_layer):
        raise invalid("student_layer must come before teacher_layer", f"student {student}, teacher {teacher}",
                      "Swap them; for the paper's same-layer ablation pass allow_same_layer=True.")  # fmt: skip


def _resolve(name: str, layer: Any, depth: int) -> int:
    layer = check_layer(name, layer)
    if isinstance(layer, float):
        return max(1, min(depth, math.floor(layer * depth + 0.5)))
    if layer > depth:
        raise invalid(f"{name} must be at most the model's depth", f"layer {layer} of {depth} blocks",
                      "Choose a layer from 1 to the depth, or a fraction such as 0.25.")  # fmt: skip
    return layer
