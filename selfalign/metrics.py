"""What an objective logs of the tokens that it compares."""

from __future__ import annotations

from typing import Protocol

from ._backend import ops
from ._tokens import length
from .distances import cosine_distances
from .typing import Mask, Metrics, Scalar, Tokens


class Comparing(Protocol):
    """What is needed of an objective here.

    Example:
        >>> import selfalign
        >>> callable(selfalign.SRALoss.compare)
        True
    """

    def compare(self, student: Tokens, target: Tokens | None, mask: Mask = None) -> Scalar:
        """The unweighted term."""


def measured(objective: Comparing, student: Tokens, target: Tokens | None) -> Metrics:
    """The metrics of `Objective.metrics`, of tokens that are projected and checked.

    Example:
        >>> import keras, selfalign
        >>> loss = selfalign.LayerSyncLoss(student_layer=8, teacher_layer=16)
        >>> tokens = keras.ops.ones((1, 2, 4))
        >>> float(selfalign.metrics.measured(loss, tokens, tokens)["cosine"])
        1.0
    """
    student = ops.stop_gradient(student)
    if target is None:
        return {"distance": objective.compare(student, None)} | _health("student", student)
    target = ops.stop_gradient(target)
    return {
        "distance": objective.compare(student, target),
        "cosine": 1.0 - ops.mean(cosine_distances(student, target)),
        **_health("student", student),
        **_health("teacher", target),
    }


def _health(side: str, tokens: Tokens) -> Metrics:
    norms = length(ops.cast(tokens, "float32"))
    return {f"{side}_norm": ops.mean(norms), f"{side}_finite": ops.all(ops.isfinite(tokens))}
