"""SRA: an EMA of the model, which sees the same sample with less noise, is the teacher."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from .. import heads, layers
from .._checks import check_switch, set_frozen
from ..heads import Head
from ..objective import TokenObjective
from ..paths import Path
from ..schedules import Schedule
from ..sources import EMATeacher
from ..typing import Draws, Layer, Scalar, Step, Times


@dataclasses.dataclass(frozen=True, kw_only=True)
class SRALoss(TokenObjective):
    """Self-Representation Alignment as a loss for whatever training loop you have.

        weight * mean_i distance( stop_gradient(teacher_i), project(student_i) )

    The teacher is an EMA of the student that sees the same sample, noise and condition with a
    little less noise. The object holds settings only (it is immutable and hashable). Weights, draws
    and devices belong to your loop or to an adapter.

    Args:
        student_layer: after block n of the student, counted from 1, or a fraction of the depth such
            as 0.25.
        teacher_layer: the same for the teacher; later than the student's.
        path: "linear", "cosine", "discrete", "edm", or an object of `selfalign.paths`; carries the
            direction of time.
        max_gap: the teacher is ahead by a gap drawn from [0, max_gap), as a fraction of the path's
            time axis.
        random_gap: False makes every gap `max_gap` itself.
        distance: "cosine" (over features), "smooth_l1", "l1", "l2", "token_axis_cosine", or a
            callable (student, teacher) -> [B, N].
        beta: where smooth L1 turns from a parabola into a line; only for "smooth_l1".
        normalise: of the target: "none", "standardise" (each feature, over batch and tokens) or
            "centre" (each place, over the batch).
        weight: weight of the term, a number or a schedule of the step.
        decay: the EMA teacher's weight of its old value, a number or a schedule of the step.
        allow_same_layer: permit student_layer = teacher_layer, for the paper's ablation.
        name: tells two objectives of one model apart; default "sra".

    Raises:
        ValueError: a setting outside its range, or a name that does not exist.
        TypeError: a setting of the wrong type.

    Example:
        >>> import numpy as np, selfalign
        >>> loss = selfalign.SRALoss(student_layer=8, teacher_layer=20, weight=0.5)
        >>> student, teacher = np.array([[[1.0, 0.0]]]), np.array([[[0.0, 1.0]]])  # [B, N, D]
        >>> float(loss(student, teacher))  # the student's tokens are already projected
        0.5

    Reference: Jiang et al., "No Other Representation Component Is Needed: Diffusion Transformers
    Can Provide Representation Guidance by Themselves", 2025, arXiv 2505.02831.
    """

    kind: ClassVar[str] = "sra"
    source: ClassVar[EMATeacher]
    head: ClassVar[Head] = heads.PROJECTOR

    teacher_layer: Layer
    path: Path | str = "linear"
    max_gap: float = 0.2
    random_gap: bool = True
    decay: Schedule | float = 0.9999
    allow_same_layer: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        source = EMATeacher(
            layer=self.teacher_layer,
            path=self.path,
            max_gap=self.max_gap,
            random_gap=self.random_gap,
            decay=self.decay,
        )
        same = check_switch("allow_same_layer", self.allow_same_layer)
        layers.check_order_where_known(self.student_layer, source.layer, same)
        set_frozen(
            self,
            allow_same_layer=same,
            random_gap=source.random_gap,
            source=source,
            teacher_layer=source.layer,
            path=source.path,
            max_gap=source.max_gap,
            decay=source.decay,
        )

    def _same_layer_allowed(self) -> bool:
        return self.allow_same_layer

    def teacher_time(self, t: Times, u: Draws | None) -> Times:
        """The teacher's times [B] for the student's times `t` [B] and draws `u` [B] in [0, 1).

        Toward the data and never past it; see `selfalign.time_gap.teacher_time` for errors and
        source.

        Example:
            >>> import numpy as np, selfalign
            >>> loss = selfalign.SRALoss(student_layer=8, teacher_layer=20, max_gap=0.5)
            >>> float(loss.teacher_time(np.array([0.75]), np.array([0.5]))[0])
            0.5
        """
        return self.source.teacher_time(t, u)

    def decay_at(self, step: Step) -> Scalar:
        """The EMA's decay at an optimizer step: a float for a Python int (or a constant decay).

        Example:
            >>> import selfalign
            >>> selfalign.SRALoss(student_layer=8, teacher_layer=20).decay_at(3)
            0.9999
        """
        return self.source.decay_at(step)
