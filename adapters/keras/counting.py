"""Counts the steps that the optimizer has taken."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from selfalign.adapting import Step, Tensor

_UNKNOWN = -1


class StepCounter:
    """Follows the optimizer's own count, which leaves out the steps that loss scaling skips.

    An optimizer may begin anew at 0, while the steps of the model go on.

    Args:
        model: gets the variables, and saves them.

    Attributes:
        steps: optimizer steps done when it was last looked.
        seen: what the optimizer's count was then; -1 where it is to be taken as it is.
        averaged: optimizer steps that an EMA has taken.
    """

    def __init__(self, model: keras.Model) -> None:
        self.optimizer: Any = None
        self.traced: Tensor | None = None  # the count in a step that JAX traces
        options = {"shape": (), "dtype": "int32", "trainable": False}
        self.steps = model.add_weight(name="steps", initializer="zeros", **options)
        self.averaged = model.add_weight(name="averaged", initializer="zeros", **options)
        unknown = keras.initializers.Constant(_UNKNOWN)
        self.seen = model.add_weight(name="seen", initializer=unknown, **options)

    def follow(self, optimizer: Any) -> None:
        """Count the steps of this optimizer from now on."""
        if optimizer is not self.optimizer:
            self.settle()
            self.optimizer = optimizer

    def settle(self) -> None:
        """Count what is done, and begin at whatever the optimizer's count is then."""
        self.look()
        self.forget()

    def forget(self) -> None:
        """Take the optimizer's count as it is: it may have been read from a file."""
        self.seen.assign(_UNKNOWN)

    def look(self) -> Step:
        """Add the steps that the optimizer has taken since the last look; the steps done."""
        done = self._count()
        steps = self._steps(done)
        self.steps.assign(steps)
        self.seen.assign(done)
        return steps

    def now(self) -> Step:
        """Optimizer steps done."""
        return self._steps(self._count())

    def pending(self) -> Tensor:
        """Whether an optimizer step is done that the EMA has not taken."""
        return self.averaged.value < self.now()

    def mark_averaged(self) -> None:
        """The EMA has taken all steps that are done."""
        self.averaged.assign(ops.copy(self.steps.value))  # not one buffer: JAX donates both

    def _steps(self, done: Tensor) -> Tensor:
        seen = self.seen.value
        return self.steps.value + ops.where(seen == _UNKNOWN, 0, done - seen)

    def _count(self) -> Tensor:
        if self.traced is not None:
            return self.traced
        return count_of(self.optimizer)


def count_of(optimizer: Any) -> Tensor:
    """The steps that an optimizer has taken, each of one or several micro-batches."""
    if optimizer is None:
        return ops.convert_to_tensor(0, "int32")
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # mixed_float16 wraps it
    return ops.cast(optimizer.iterations, "int32")
