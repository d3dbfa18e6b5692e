"""What SelfAligned finds in a Keras model: the Keras side of `selfalign check`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import keras

from selfalign import SRALoss
from selfalign.adapters.keras import SelfAligned
from selfalign.adapters.keras.blocks import block_names, is_functional, numbered

from .output import Report


def check(
    model: keras.Model, loss: SRALoss, blocks: str | None, width: int | None, report: Report
) -> None:
    """Fill `report`: the numbered layers, the two that are tapped, and the width.

    Errors are SelfAligned's own.
    """
    report["trained_parameters"] = _count(model.trainable_weights)
    report["frozen_parameters"] = _count(model.non_trainable_weights)
    if is_functional(model):
        report["block_lists"] = [_listed(*item) for item in numbered(model).items()]
        found = block_names(model, blocks)
        student, teacher = loss.layers(len(found))
        path: Any = loss.path
        report |= {"depth": len(found), "student_layer": student, "teacher_layer": teacher}
        report |= {"student": found[student - 1], "teacher": found[teacher - 1]}
        report["noise_path"] = path.name
    report["width"] = SelfAligned(model, loss, blocks=blocks, width=width).width
    report["training_steps"] = "none: of Keras models the layers are shown, and fit runs the steps"


def _count(weights: Iterable[Any]) -> int:
    return sum(math.prod(weight.shape) for weight in weights)


def _listed(kind: str, names: list[str]) -> dict[str, Any]:
    return {"block_list": kind, "blocks": len(names), "first": names[0], "last": names[-1]}
