"""What SelfAligned finds in a Keras model: the Keras side of `selfalign check`."""

from __future__ import annotations

import math
from typing import Any

import keras

from selfalign.loss import SRALoss

from ._keras_taps import block_names, is_functional, numbered
from .keras import SelfAligned


def check(model: keras.Model, loss: SRALoss, blocks: str | None, width: int | None, report: dict[str, Any]) -> None:
    """Fill `report`: the kinds of numbered layers, the two that are tapped, and the width. Errors are SelfAligned's own."""
    report["trained_parameters"] = sum(math.prod(weight.shape) for weight in model.trainable_weights)
    report["frozen_parameters"] = sum(math.prod(weight.shape) for weight in model.non_trainable_weights)
    if is_functional(model):
        report["block_lists"] = [{"block_list": kind, "blocks": len(names), "first": names[0], "last": names[-1]}
                                 for kind, names in numbered(model).items()]  # fmt: skip
        found = block_names(model, blocks)
        student, teacher = loss.layers(len(found))
        report |= {"depth": len(found), "student_layer": student, "teacher_layer": teacher}
        report |= {"student": found[student - 1], "teacher": found[teacher - 1], "noise_path": loss.path.name}
    report["width"] = SelfAligned(model, loss, blocks=blocks, width=width).width
    report["training_steps"] = "none: of Keras models the layers are shown, and fit runs the steps"
