"""One step's forwards: noise is drawn, the student runs, and each objective gets its target."""

from __future__ import annotations

from typing import Any, NamedTuple

from keras import ops

from selfalign.adapting import Draws, EMATeacher, Scalar, Tensor, Times, Tokens, paths

from .batches import Batch
from .drawing import Drawing
from .forwards import Forwards
from .options import Options


class Outcome(NamedTuple):
    """What the forwards of a step give.

    Attributes:
        prediction: the backbone's, in float32.
        target: what it should have predicted.
        tokens: the student's, of each objective.
        target_tokens: of each objective that has a target.
        added: scalars that the backbone adds to the loss: its regularizers, and its `add_loss`.
    """

    prediction: Tensor
    target: Tensor
    tokens: dict[str, Tokens]
    target_tokens: dict[str, Tokens]
    added: list[Scalar]


class Step:
    """Runs the student on noisy samples, and its teacher on less noisy ones.

    Args:
        path: of the noise.
        drawing: draws noise, times and gaps in training.
        held_out: the same in validation.
        forwards: of the backbone and its average.
        source: of the objectives that have an EMA teacher; None where there is none.
        options: the user's.
    """

    def __init__(
        self,
        path: paths.Path,
        drawing: Drawing,
        held_out: Drawing,
        forwards: Forwards,
        source: EMATeacher | None,
        options: Options,
    ) -> None:
        self.path = path
        self.drawing = drawing
        self.held_out = held_out
        self.forwards = forwards
        self.source = source
        self.options = options

    def run(self, batch: Batch, training: bool) -> Outcome:
        """Both forwards. In training labels are dropped, on both sides alike."""
        x0 = batch.x0
        drawing = self.drawing if training else self.held_out
        condition = drawing.dropped(batch.condition) if training else batch.condition
        noise = drawing.noise(x0)
        t = drawing.times(ops.shape(x0)[0])
        x_t = self.path.add_noise(x0, noise, t)
        taught = {}
        if self.source is not None:  # first: the memory it takes is free again for the student
            u = drawing.gaps(t)
            taught = self._taught(self.source, x0, noise, t, u, condition)
        output = self.forwards.student(self._arranged(x_t, t, condition), training)
        return Outcome(
            prediction=ops.cast(output.prediction, "float32"),
            target=self.path.target(x0, noise, t, self.options.prediction),
            tokens=output.tokens,
            target_tokens={**batch.targets, **output.targets, **taught},
            added=output.added,
        )

    def _taught(
        self,
        source: EMATeacher,
        x0: Tensor,
        noise: Tensor,
        t: Times,
        u: Draws,
        condition: list[Tensor],
    ) -> dict[str, Tokens]:
        """The EMA teacher's tokens, of the same samples with less noise."""
        x_teacher, t_teacher = self.path.add_less_noise(
            x0, noise, t, u, source.largest_gap, source.random_gap
        )
        return self.forwards.teacher(self._arranged(x_teacher, t_teacher, condition))

    def _arranged(self, x: Tensor, t: Times, condition: list[Tensor]) -> Any:
        """The backbone's inputs."""
        arrange = self.options.arrange
        return [x, t, *condition] if arrange is None else arrange(x, t, *condition)
