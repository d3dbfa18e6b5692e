"""What an objective is: tokens of the student, a target, a head, a distance and a weight.

An objective holds frozen settings and pure arithmetic. The weights of its head, random draws,
devices and models belong to a training loop or to an adapter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NoReturn

from . import distances, layers, masks, normalise, schedules
from ._backend import on_backend, ops
from ._checks import check_number, incomplete, invalid, set_frozen
from .configured import Configured
from .distances import check_features, check_same_shape
from .heads import NONE, Head, check_params
from .metrics import measured
from .schedules import Schedule
from .sources import Nothing, Source
from .typing import (
    Distance,
    Layer,
    Mask,
    Metrics,
    Parameters,
    Scalar,
    Step,
    Tensor,
    Tokens,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective(Configured):
    """Base of the objectives. One of your own gives `kind`, `source` and `compare`.

    The term is `weight * compare(head(student tokens), target)`.

    Args:
        student_layer: after block n, counted from 1, or a fraction of the depth such as 0.25.
        weight: weight of the term, a number or a schedule of the step.
        name: tells two objectives of one model apart; default: the kind.

    Attributes:
        kind: the objective's name, such as "sra".
        source: where the target comes from, one of `selfalign.sources`.
        head: the network on the student's side, one of `selfalign.heads`; default: none.

    Raises:
        ValueError: a setting outside its range, or a name that does not exist.
        TypeError: a setting of the wrong type.

    Example: a whole objective is in docs/extending.md.
    """

    source: ClassVar[Source]
    head: ClassVar[Head] = NONE

    student_layer: Layer
    weight: Schedule | float | Any = 0.5
    name: str | None = None

    def __post_init__(self) -> None:
        student = layers.check_layer("student_layer", self.student_layer)
        set_frozen(self, student_layer=student, weight=schedules.resolve(self.weight))
        named = self.name is None or (isinstance(self.name, str) and self.name.isidentifier())
        if not named:
            raise invalid(
                "An objective's name must be one word of letters, digits and underscores",
                repr(self.name),
                'Pass for instance name="deep".',
            )

    # What a kind of objective says

    def __getattr__(self, name: str) -> NoReturn:
        if name == "source":
            raise incomplete(type(self), "source", "one of selfalign.sources")
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def compare(self, student: Tokens, target: Tokens | None, mask: Mask = None) -> Scalar:
        """The unweighted term, a scalar: smaller is better. On `keras.ops`, without checks.

        Args:
            student: [B, N, D], projected.
            target: [B, N, D]; None where the source is `Nothing`.
            mask: booleans or weights over samples [B] or tokens [B, N].
        """
        raise incomplete(type(self), "compare", "a method (student, target, mask) -> scalar")

    # What all of them do

    def layers(self, depth: int) -> tuple[int, ...]:
        """Layer numbers, from 1, in a model of `depth` blocks: the student's, then the target's.

        Raises ValueError where they do not fit the depth.

        Example:
            >>> import selfalign
            >>> selfalign.LayerSyncLoss(student_layer=0.25, teacher_layer=0.7).layers(depth=12)
            (3, 8)
        """
        target = getattr(self.source, "layer", None)
        if target is None:
            return (layers.resolve_layer("student_layer", self.student_layer, depth),)
        return layers.resolve_layers(self.student_layer, target, depth, self._same_layer_allowed())

    def _same_layer_allowed(self) -> bool:
        return False

    def weight_at(self, step: Step = None) -> Scalar:
        """The term's weight at an optimizer step: a float for a Python int, else a tensor.

        Raises:
            ValueError: no step, where the weight is a schedule.

        Example:
            >>> import selfalign
            >>> weight = selfalign.schedules.Stop(10)
            >>> selfalign.SRALoss(student_layer=8, teacher_layer=20, weight=weight).weight_at(3)
            1.0
        """
        if isinstance(self.weight, schedules.Constant):
            return float(self.weight.constant)
        if step is None:
            raise invalid(
                "A weight that is a schedule needs the step",
                "step=None",
                "Pass step= the optimizer steps done.",
            )
        value: Scalar = self.weight(step)  # type: ignore[operator]  # numbers have become schedules
        return value

    @on_backend
    def __call__(
        self,
        student_tokens: Tokens,
        target_tokens: Tokens | None,
        *,
        step: Step = None,
        mask: Mask = None,
    ) -> Scalar:
        """The weighted term, a float32 scalar. No gradient reaches the target.

        Args:
            student_tokens: [B, N, D], already projected; any floating dtype.
            target_tokens: [B, N, D], as they are; None for an objective without a target.
            step: optimizer steps done; needed where `weight` is a schedule.
            mask: booleans or weights over samples [B] or tokens [B, N].

        Returns:
            A scalar; NaN or infinite where a feature is (`metrics` tells on which side).

        Raises:
            ValueError: tokens not of one shape [B, N, D], empty, a mask of another shape or with
                weights that are negative or not finite, a schedule without a step, a target that is
                missing or not wanted.
            TypeError: integer tokens, or tensors of another framework than Keras's backend.

        Example:
            >>> import numpy as np, selfalign
            >>> loss = selfalign.SRALoss(student_layer=8, teacher_layer=20)
            >>> float(loss(np.ones((2, 4, 8)), np.ones((2, 4, 8))))
            0.0
        """
        check_features("student", student_tokens)
        self._check_beside(student_tokens, target_tokens, mask)
        return self.weigh(self.compare(student_tokens, target_tokens, mask), step)

    @on_backend
    def metrics(self, student_tokens: Tokens, target_tokens: Tokens | None) -> Metrics:
        """What to log: scalars without gradient that stay on the device (no host sync).

        Args:
            student_tokens: [B, N, D], already projected; all of them count.
            target_tokens: [B, N, D], or None.

        Returns:
            "distance" (unweighted), "student_norm" and "teacher_norm" (mean token norm: growth
            under L1 or L2 is a warning), "student_finite" and "teacher_finite" (booleans: which
            side is at fault), and of a target "cosine" (mean over features, in [-1, 1]).

        Example:
            >>> import numpy as np, selfalign
            >>> loss = selfalign.SRALoss(student_layer=8, teacher_layer=20)
            >>> tokens = np.ones((1, 2, 4), "float32")
            >>> info = loss.metrics(tokens, tokens)
            >>> float(info["cosine"]), float(info["teacher_norm"]), bool(info["student_finite"])
            (1.0, 2.0, True)
        """
        check_features("student", student_tokens)
        self._check_beside(student_tokens, target_tokens, None)
        return measured(self, student_tokens, target_tokens)

    @on_backend
    def evaluate(
        self,
        head: Parameters | Callable[[Tokens], Tokens],
        student_tokens: Tokens,
        target_tokens: Tokens | None,
        mask: Mask = None,
        logged: bool = False,
    ) -> tuple[Scalar, Metrics]:
        """The unweighted term and what to log, from tokens that are not projected yet.

        For adapters, which weigh the term with `weigh`. Arguments as for the loss itself, and the
        head: its parameters, which must fit the tokens, or a module that holds and applies them.
        Without `logged` the metrics are empty.

        Example:
            >>> import numpy as np, selfalign
            >>> loss = selfalign.LayerSyncLoss(student_layer=8, teacher_layer=16)
            >>> distance, metrics = loss.evaluate({}, np.ones((2, 4, 8)), np.ones((2, 4, 8)))
            >>> float(distance), metrics
            (0.0, {})
        """
        if isinstance(head, Mapping) or not callable(head):
            check_features("student", student_tokens)
            check_params(self.head, head, student_tokens)
            projected = self.head.apply(head, student_tokens)
        else:
            projected = head(student_tokens)
        self._check_beside(projected, target_tokens, mask)
        metrics = measured(self, projected, target_tokens) if logged else {}
        return self.compare(projected, target_tokens, mask), metrics

    def weigh(self, distance: Scalar, step: Step = None) -> Scalar:
        """The term: `distance` times the weight at `step`, in float32.

        Example: `loss.weigh(distance, step)`.
        """
        return ops.cast(self.weight_at(step) * distance, "float32")

    def _check_beside(self, student: Tokens, target: Tokens | None, mask: Mask) -> None:
        """What is given beside the student's tokens: a target of their shape, a mask that fits."""
        wanted = not isinstance(self.source, Nothing)
        if wanted and target is not None:
            check_features("target", target)
            if tuple(student.shape) != tuple(target.shape):
                check_same_shape(student, target)
        elif wanted:
            raise invalid(
                f"The objective {self.kind!r} needs a target",
                "target tokens None",
                "Pass the target's tokens [B, N, D].",
            )
        elif target is not None:
            raise invalid(
                f"The objective {self.kind!r} has no target",
                f"target tokens, a {type(target).__name__}",
                "Pass None in their place.",
            )
        if mask is not None:
            masks.check_mask(mask, tuple(student.shape)[:2])


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenObjective(Objective):
    """Base of the objectives whose target consists of tokens: a mean of distances between tokens.

    Args:
        distance: "cosine" (over features), "smooth_l1", "l1", "l2", "token_axis_cosine", or a
            callable (student, target) -> [B, N], or [B] where it does not tell tokens apart.
        beta: where smooth L1 turns from a parabola into a line; only for "smooth_l1".
        normalise: of the target: "none", "standardise" (each feature, over batch and tokens) or
            "centre" (each place, over the batch); see `selfalign.normalise`.

    Example: see `SRALoss`, `LayerSyncLoss` and `REPALoss`, which derive from it.
    """

    distance: str | Distance = "cosine"
    beta: float = 0.05
    normalise: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        set_frozen(self, distance=distances.checked(self.distance))
        normalise.check_normalisation(self.normalise)
        set_frozen(self, beta=check_number("beta", self.beta, 1e-12, fix="The paper takes 0.05."))

    def compare(self, student: Tokens, target: Tokens | None, mask: Mask = None) -> Scalar:
        """The mean distance between the student's tokens and the target's, see `Objective`."""
        student = ops.cast(student, "float32")
        target = ops.cast(ops.stop_gradient(target), "float32")
        change = normalise.NORMALISATIONS[self.normalise]
        if change is not None:
            target = change(target, mask)
        values = self._distances(student, target)
        return ops.mean(values) if mask is None else masks.mean_over_mask(values, mask)

    def _distances(self, student: Tokens, target: Tokens) -> Tensor:
        if not callable(self.distance):
            options = {"beta": self.beta} if self.distance == "smooth_l1" else {}
            return distances.DISTANCES[self.distance](student, target, **options)
        values = self.distance(student, target)
        expected = tuple(student.shape)[:2]
        if tuple(values.shape) not in (expected, expected[:1]):
            raise invalid(
                "A distance must return one value per token, [B, N], or per sample, [B]",
                f"shape {tuple(values.shape)}",
                f"Reduce over the last axis only: {expected} is expected.",
            )
        return ops.cast(values, "float32")
