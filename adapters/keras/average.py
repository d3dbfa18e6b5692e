"""The EMA teacher of a backbone, one step behind it.

Keras's train steps carry what is assigned to variables inside `compute_loss`, but end with the
optimizer. So the EMA of one step is taken when the next begins. In between it is pending.
"""

from __future__ import annotations

from collections.abc import Iterator

import keras
from keras import ops

from selfalign.adapting import EMATeacher, Step, Tensor, check_same, ema_update, invalid

from .counting import StepCounter


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
        for variable, value in self._moved(ops.maximum(counter.steps.value - 1, 0)):
            variable.assign(ops.where(pending, value, variable.value))
        counter.mark_averaged()

    def _moved(self, step: Step) -> Iterator[tuple[keras.Variable, Tensor]]:
        """The average's variables, and their values after optimizer step number `step`, from 0.

        Variables that are not trained are copied.
        """
        trained = {id(variable) for variable in self.backbone.trainable_weights}
        pairs = list(zip(self.average.weights, self.backbone.weights, strict=True))
        averaged = [pair for pair in pairs if id(pair[1]) in trained]
        old = [mine.value for mine, _ in averaged]
        new = [theirs.value for _, theirs in averaged]
        moved = ema_update(old, new, self.source.decay_at(step))
        for (mine, _), value in zip(averaged, moved, strict=True):
            yield mine, value
        for mine, theirs in pairs:
            if id(theirs) not in trained:
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
