"""Whether an EMA of the user's moves at all."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .sharding import local

_STEPS = 20


class Standing:
    """Warns, once, where an EMA is after some steps what it was, and the model is not.

    An EMA that is updated, and waits by its own rule, counts its steps: that is seen, too.

    Args:
        given: the user's EMA.
        student: the model.
        averages: gives the tensors of the EMA.
    """

    def __init__(
        self, given: Any, student: nn.Module, averages: Callable[[], Iterable[torch.Tensor]]
    ) -> None:
        self.given = given
        self.student = student
        self.averages = averages
        self.calls = 0
        self.over = False

    def note(self) -> None:
        """After each optimizer step. Looks at values twice in a run, and then no more."""
        if self.over:
            return
        self.calls += 1
        if self.calls == 1:
            self.then = self._state()
            self.model_then = _sums(self.student.parameters())
        elif self.calls == _STEPS:
            self._compare()

    def _compare(self) -> None:
        if _sums(self.student.parameters()) == self.model_then:
            self.calls = 0  # the model stands still: look later
            return
        self.over = True
        if self._state() == self.then:
            warnings.warn(
                "teacher= must be an EMA that is kept up to date. Received: an EMA that is what it "
                f"was {_STEPS} steps ago, beside a model that is not. Call its own update after "
                "optimizer.step(), or leave teacher= out: SelfAlignment keeps one then. If yours "
                "starts later, nothing is wrong."
            )

    def _state(self) -> list[Any]:
        """The averages' values and writes, and the counters of the object around them."""
        averages = list(self.averages())
        writes = [0 if a.is_inference() else a._version for a in averages]
        around = {**vars(self.given), **vars(self.given).get("_buffers", {})}
        counters = [_number(value) for value in around.values()]
        return [_sums(averages), writes, counters]


def _number(value: Any) -> float | None:
    """A counter's value; None of anything else."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return float(value)
    return float(value) if isinstance(value, (int, float)) else None


def _sums(tensors: Iterable[torch.Tensor]) -> list[float]:
    """One number of each tensor, which changes with it."""
    return [float(local(tensor.detach()).double().sum()) for tensor in tensors]
