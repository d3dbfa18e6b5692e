"""What a step draws: noise, times, gaps, and the labels that are dropped."""

from __future__ import annotations

import keras
from keras import ops

from selfalign.adapting import Draws, Tensor, Times, paths

from .options import Options

_HELD_OUT = 1_618_033  # any number: validation is to see the same noise in every run


class FixedDraws(keras.random.SeedGenerator):
    """A seed generator that can begin anew."""

    def __init__(self) -> None:
        super().__init__(_HELD_OUT)

    def restart(self) -> None:
        """Go back to the first draw."""
        self.state.assign([_HELD_OUT, 0])


class Drawing:
    """Draws of one seed generator, which is the model's and is saved with it.

    Args:
        generator: advances with each draw.
        path: says how times are drawn, unless the user does.
        options: the user's.
    """

    def __init__(
        self, generator: keras.random.SeedGenerator, path: paths.Path, options: Options
    ) -> None:
        self.generator = generator
        self.path = path
        self.draw_time = options.draw_time
        self.label_dropout = options.label_dropout
        self.null_label = options.null_label

    def noise(self, x0: Tensor) -> Tensor:
        """Standard normal noise of the shape of `x0`."""
        return keras.random.normal(ops.shape(x0), seed=self.generator)

    def times(self, count: int) -> Times:
        """Times [B]: the path's, or the user's."""
        if self.draw_time is not None:
            return self.draw_time(count, self.generator)
        return self.path.draw_times(keras.random.uniform((count,), seed=self.generator))

    def gaps(self, t: Times) -> Draws:
        """Draws [B] in [0, 1) for the teacher's gaps."""
        return keras.random.uniform(ops.shape(t), seed=self.generator)

    def dropped(self, condition: list[Tensor]) -> list[Tensor]:
        """The condition, some of its labels replaced; the labels are its first part."""
        if not self.label_dropout or not condition:
            return condition
        labels, *rest = condition
        drawn = keras.random.uniform(ops.shape(labels), seed=self.generator)
        null = ops.cast(self.null_label, labels.dtype)
        return [ops.where(drawn < self.label_dropout, null, labels), *rest]
