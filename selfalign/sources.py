"""Where an objective's target comes from: what an adapter must provide, and nothing of how.

    EMATeacher   a later layer of the model's average, which sees the sample with less noise (SRA)
    LaterLayer   a later layer of the same forward (LayerSync)
    Given        tokens that the caller passes, such as a frozen encoder's (REPA)
    Nothing      no target: the student's tokens alone make the term (Dispersive)

An adapter looks at the kind of a source. It runs a teacher, taps a second layer, takes the caller's
tokens, or does none of these.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from . import layers, paths, schedules, time_gap
from ._checks import check_decay, check_number, check_switch, set_frozen
from .schedules import Schedule
from .typing import Draws, Layer, Scalar, Step, Times


class Source:
    """Base of the sources.

    Example:
        >>> import selfalign
        >>> selfalign.sources.Given(width=768).target_width(384)
        768
    """

    def target_width(self, width: int) -> int:
        """The target's feature width, where the student's tokens have `width`."""
        return width


@dataclasses.dataclass(frozen=True, kw_only=True)
class EMATeacher(Source):
    """A layer of the model's exponential moving average, on the same sample with less noise.

    Args:
        layer: the teacher's layer, from 1, or a fraction of the depth.
        path: the noise path.
        max_gap: the teacher is ahead by a gap from [0, max_gap), a fraction of the time axis.
        random_gap: False makes every gap `max_gap` itself.
        decay: weight of the average's old value, a number or a schedule of the step.

    Attributes:
        largest_gap: `max_gap` in the path's own unit.

    Raises:
        ValueError: a setting outside its range.
        TypeError: a setting of the wrong type.

    Example:
        >>> import selfalign
        >>> selfalign.sources.EMATeacher(layer=20, decay=0.999).decay_at(3)
        0.999

    Reference: Jiang et al., SRA, 2025, arXiv 2505.02831.
    """

    layer: Layer
    largest_gap: ClassVar[float]  # of the object, but no setting

    path: paths.Path | str = "linear"
    max_gap: float = 0.2
    random_gap: bool = True
    decay: Schedule | float = 0.9999

    def __post_init__(self) -> None:
        path = paths.resolve(self.path)
        old_value = "It is the weight of the old value, 0.9999 in the paper."
        check_decay(self.decay, old_value)
        set_frozen(
            self,
            layer=layers.check_layer("teacher_layer", self.layer),
            path=path,
            random_gap=check_switch("random_gap", self.random_gap),
            decay=schedules.resolve(self.decay),
        )
        check_decay(self.decay, old_value)
        largest = time_gap.gap_range(path, self.max_gap)
        set_frozen(self, max_gap=float(self.max_gap), largest_gap=largest)

    def teacher_time(self, t: Times, u: Draws | None) -> Times:
        """The teacher's times [B], see `selfalign.time_gap.teacher_time`.

        Example:
            >>> import numpy as np, selfalign
            >>> source = selfalign.sources.EMATeacher(layer=20, max_gap=0.5)
            >>> float(source.teacher_time(np.array([0.75]), np.array([0.5]))[0])
            0.5
        """
        path = paths.resolve(self.path)
        return time_gap.teacher_time(path, t, u, self.max_gap, self.random_gap)

    def decay_at(self, step: Step) -> Scalar:
        """The decay at an optimizer step: a float for a Python int (or a constant decay).

        As a tensor, 1 - 0.9999 is exact to 2e-4 only. A constant keeps all its digits, at traced
        steps, too.

        Example:
            >>> import selfalign
            >>> selfalign.sources.EMATeacher(layer=20).decay_at(3)
            0.9999
        """
        if isinstance(self.decay, schedules.Constant):
            return self.decay.constant
        return schedules.resolve(self.decay)(step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaterLayer(Source):
    """A later layer of the student's own forward, without gradient.

    Args:
        layer: the target's layer, from 1, or a fraction of the depth.

    Example:
        >>> import selfalign
        >>> selfalign.sources.LaterLayer(layer=16).layer
        16
    """

    layer: Layer

    def __post_init__(self) -> None:
        set_frozen(self, layer=layers.check_layer("teacher_layer", self.layer))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given(Source):
    """Tokens [B, N, width] that the caller passes with each batch.

    Args:
        width: of the tokens.

    Example:
        >>> import selfalign
        >>> selfalign.sources.Given(width=768).width
        768
    """

    width: int

    def __post_init__(self) -> None:
        fix = "It is the width of the tokens that the target consists of, 768 for DINOv2-B."
        set_frozen(self, width=check_number("width", self.width, 1, fix=fix, integer=True))

    def target_width(self, width: int) -> int:
        """The width of the caller's tokens."""
        return self.width


@dataclasses.dataclass(frozen=True)
class Nothing(Source):
    """No target. The objective is called with None in its place.

    Example:
        >>> import selfalign
        >>> selfalign.sources.Nothing()
        Nothing()
    """
