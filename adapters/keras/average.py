"""The EMA teacher of a backbone, one step behind it.

Keras's train steps carry what is assigned to variables inside `compute_loss`, but end with the
optimizer. So the EMA of one step is taken when the next begins. In between it is pending.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TypeAlias

import keras
from keras import ops

from selfalign.adapting import EMATeacher, Step, Tensor, check_same, ema_update, invalid

from .counting import StepCounter

Pairs: TypeAlias = list[tuple[keras.Variable, keras.Variable]]


class PendingAverage:
    """A second backbone, `average`, that moves after the first.

    Args:
        backbone: the student.
        given: another instance of it, or None, and one is built. It becomes the student as it is.
        source: says how the EMA decays.

    Raises:
        ValueError: a structure that is not the backbone's, or a backbone that cannot be rebuilt.
    """

    def __init__(
        self, backbone: keras.Model, given: keras.Model | None, source: EMATeacher
    ) -> None:
        self.backbone = backbone
        self.average = rebuilt(backbone) if given is None else given
        self.source = source
        check_same(_by_place(self.average), _by_place(backbone))
        self.average.trainable = False
        self.restart()

    def check(self) -> None:
        """The backbone still has the average's structure: raises ValueError otherwise."""
        if [v.shape for v in self.average.weights] != [v.shape for v in self.backbone.weights]:
            raise invalid(
                "The backbone must keep the weights that it had when SelfAligned was made",
                f"{len(self.backbone.weights)} weights instead of {len(self.average.weights)}, or "
                "others",
                "Call enable_lora() or quantize() first, then make SelfAligned.",
            )

    def restart(self) -> None:
        """The average becomes the backbone as it is."""
        copy_weights(self.backbone, self.average)

    def take_step(self, counter: StepCounter) -> None:
        """Take the step that is pending, if one is."""
        pending = counter.pending()
        step = ops.maximum(counter.steps.value - 1, 0)
        if keras.backend.backend() == "torch":
            self._move_in_place(pending, step)
        else:
            for variable, value in self._moved(step):
                variable.assign(ops.where(pending, value, variable.value))
        counter.mark_averaged()

    def _move_in_place(self, pending: Tensor, step: Step) -> None:
        """The same as `_moved`, in one pass over the memory instead of five."""
        weight = ops.where(pending, 1.0 - self.source.decay_at(step), 0.0)
        averaged, copied = self._pairs()
        with no_gradient():
            for mine, theirs in averaged:
                mine.value.lerp_(theirs.value, ops.cast(weight, mine.dtype))
            for mine, theirs in copied:
                mine.assign(ops.where(pending, theirs.value, mine.value))

    def _pairs(self) -> tuple[Pairs, Pairs]:
        """The average's variables beside the backbone's: those that are trained, and the others."""
        trained = {id(variable) for variable in self.backbone.trainable_weights}
        pairs = list(zip(self.average.weights, self.backbone.weights, strict=True))
        return (
            [pair for pair in pairs if id(pair[1]) in trained],
            [pair for pair in pairs if id(pair[1]) not in trained],
        )

    def _moved(self, step: Step) -> Iterator[tuple[keras.Variable, Tensor]]:
        """The average's variables, and their values after optimizer step number `step`, from 0.

        Variables that are not trained are copied.
        """
        averaged, copied = self._pairs()
        old = [mine.value for mine, _ in averaged]
        new = [theirs.value for _, theirs in averaged]
        moved = ema_update(old, new, self.source.decay_at(step))
        for (mine, _), value in zip(averaged, moved, strict=True):
            yield mine, value
        for mine, theirs in copied:
            yield mine, theirs.value

    def finished(self, counter: StepCounter) -> keras.Model:
        """A new backbone with the averages after the last optimizer step."""
        made = rebuilt(self.backbone)
        copy_weights(self.average, made)
        if bool(counter.pending()):
            moved = {id(mine): value for mine, value in self._moved(int(counter.now()) - 1)}
            for variable, mine in zip(made.weights, self.average.weights, strict=True):
                # a copy, not the student's own buffer: JAX donates that
                variable.assign(ops.copy(moved[id(mine)]))
        return made


def no_gradient() -> AbstractContextManager[None]:
    """PyTorch's, on its backend."""
    import torch

    return torch.no_grad()


def _by_place(backbone: keras.Model) -> dict[str, Tensor]:
    """Weights by their place: names that Keras counts up differ between two instances."""
    return {f"weight {place}": weight.value for place, weight in enumerate(backbone.weights)}


def rebuilt(backbone: keras.Model) -> keras.Model:
    """A second backbone from the first one's configuration, built, with weights of its own."""
    try:
        second = type(backbone).from_config(backbone.get_config())
        if not second.built:
            second.build_from_config(backbone.get_build_config() or {})
    except (NotImplementedError, TypeError, ValueError) as error:
        raise invalid(
            "The teacher is a second backbone, built from the first one's configuration",
            f"{type(backbone).__name__}, which gives none: {error}",
            "Give it get_config(), or pass teacher=, a second instance that is built.",
        ) from error
    return second


def copy_weights(source: keras.Model, target: keras.Model) -> None:
    """Make one backbone's weights those of another."""
    for mine, theirs in zip(target.weights, source.weights, strict=True):
        mine.assign(ops.copy(theirs.value))  # not the same buffer: JAX donates both
