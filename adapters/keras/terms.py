"""The objectives' terms of one step, and what is logged of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from selfalign.adapting import Mask, Metrics, Nothing, Objective, Scalar, Step, Tensor, Tokens

from .heads import Head, values
from .weights import weighed

_METRICS = ("alignment", "cosine", "student_norm", "teacher_norm")
_METRICS_WITHOUT_TARGET = ("alignment", "student_norm")


class Aligned(NamedTuple):
    """What the objectives give in one step.

    Attributes:
        term: the sum of their weighted terms.
        metrics: all that they measure, and "alignment", the term.
    """

    term: Scalar
    metrics: Metrics


class Terms:
    """Adds up the terms of the objectives.

    Args:
        objectives: by name.
        listed: whether the user passed a list, so that metrics bear the objectives' names.
    """

    def __init__(self, objectives: Mapping[str, Objective], listed: bool) -> None:
        self.objectives = objectives
        self.listed = listed

    def logged(self) -> list[str]:
        """The names of the metrics that `fit` logs."""
        names = ["alignment"]
        for name, objective in self.objectives.items():
            without = isinstance(objective.source, Nothing)
            metrics = _METRICS_WITHOUT_TARGET if without else _METRICS
            names += [self._label(name, metric) for metric in metrics]
        return list(dict.fromkeys(names))

    def _label(self, name: str, metric: str) -> str:
        return f"{name}/{metric}" if self.listed else metric

    def evaluate(
        self,
        heads: Mapping[str, Head],
        tokens: Mapping[str, Tokens],
        targets: Mapping[str, Tokens],
        mask: Mask,
        weights: Tensor | None,
        step: Step,
        factor: Scalar,
    ) -> Aligned:
        """The terms' sum and the metrics.

        Args:
            heads: the variables of each objective's head.
            tokens: the student's, of each objective.
            targets: of each objective that has a target.
            mask: over samples [B] or tokens [B, N], or None.
            weights: of samples [B], or None.
            step: optimizer steps done.
            factor: of all terms.
        """
        mask, norm = weighed(mask, weights)
        factor = factor if norm is None else factor * norm
        total: Scalar = None
        metrics: Metrics = {}
        for name, objective in self.objectives.items():
            head = values(heads[name], tokens[name])
            distance, measured = objective.evaluate(
                head, tokens[name], targets.get(name), mask, logged=True
            )
            term = factor * objective.weigh(distance, step)
            total = term if total is None else total + term
            measured = {"alignment": term, **measured}
            metrics |= {self._label(name, metric): value for metric, value in measured.items()}
        metrics["alignment"] = total
        return Aligned(total, metrics)
