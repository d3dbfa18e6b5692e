"""Counts optimizer steps, each of one or several micro-batches."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from selfalign.adapting import Tensor


class StepCounter:
    """Counts in variables of a model, which saves them.

    Args:
        model: gets the variables; its optimizer says how many micro-batches make a step.

    Attributes:
        steps: optimizer steps done.
        micro_batches: micro-batches done of the step that has begun.
        averaged: optimizer steps that an EMA has taken.
    """

    def __init__(self, model: keras.Model) -> None:
        self.model = model
        options = {"shape": (), "initializer": "zeros", "dtype": "int32", "trainable": False}
        self.steps = model.add_weight(name="steps", **options)
        self.micro_batches = model.add_weight(name="micro_batches", **options)
        self.averaged = model.add_weight(name="averaged", **options)

    def pending(self) -> Tensor:
        """Whether an optimizer step is done that the EMA has not taken."""
        return self.averaged.value < self.steps.value

    def mark_averaged(self) -> None:
        """The EMA has taken all steps that are done."""
        self.averaged.assign(ops.copy(self.steps.value))  # not one buffer: JAX donates both

    def count(self) -> None:
        """Count one micro-batch."""
        micro_batches = self.micro_batches.value + 1
        done = micro_batches >= self._accumulated()
        self.steps.assign(self.steps.value + ops.cast(done, "int32"))
        self.micro_batches.assign(ops.where(done, 0, micro_batches))

    def at_start(self) -> bool:
        """Whether nothing has been counted."""
        return int(self.steps) == 0 and int(self.micro_batches) == 0

    def _accumulated(self) -> int:
        """Micro-batches in an optimizer step."""
        optimizer: Any = self.model.optimizer
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # mixed_float16 wraps it
        return getattr(optimizer, "gradient_accumulation_steps", None) or 1
