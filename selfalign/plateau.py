"""Plateau: a factor for the term's weight that falls when the cosine of both sides stalls.

A schedule of the step knows no features. This one has a state, which the loop carries along like an
optimizer's.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from ._backend import on_backend, ops
from ._checks import check_array, check_number, invalid, set_frozen
from .typing import Scalar


class PlateauState(NamedTuple):
    """What `Plateau` remembers: five scalars, a pytree in JAX.

    Plain numbers at first, tensors after the first step.

    Attributes:
        steps: steps seen.
        smoothed: the smoothed cosine.
        best: the best smoothed cosine since the warm-up, or since the factor last fell.
        waited: steps since `best` was set.
        factor: what to multiply the term with; never rises.

    Example: see `Plateau`.
    """

    steps: Scalar = 0
    smoothed: Scalar = 0.0
    best: Scalar = -1.0
    waited: Scalar = 0
    factor: Scalar = 1.0


@dataclasses.dataclass(frozen=True)
class Plateau:
    """A rule that lowers the term's weight once the alignment stalls.

        smoothed <- smoothed + max(1 - smoothing, 1 / steps) * (cosine - smoothed)
        factor   <- shrink * factor, after `patience` steps without smoothed > best + min_gain

    A pure function (state, cosine) -> (state, factor), without host sync, also under jit, scan and
    torch.compile. The factor is that of the next term:

        state, factor = plateau(state, loss.metrics(student, teacher)["cosine"])
        term = factor * loss(student, teacher, step=step)

    At factor 0 the term stays in the graph. To save the teacher's cost, look at the factor now and
    then (a host sync), and stop calling the term once it is 0.

    Args:
        patience: steps without a gain before the factor falls.
        min_gain: what counts as a gain of the smoothed cosine.
        smoothing: weight of the old value in the running mean; 0.99 looks back over about 100
            steps.
        warmup: steps at the start that count for nothing but the mean: early on, teacher and
            student are still alike.
        shrink: what the factor is multiplied with; 0 stops the term, 0.5 halves it at each plateau.

    Raises:
        ValueError: a setting outside its range.
        TypeError: a setting that is no number.

    Example:
        >>> import selfalign
        >>> plateau = selfalign.plateau.Plateau(patience=2, warmup=1)
        >>> state = plateau.init()
        >>> for cosine in (0.1, 0.5, 0.5, 0.1, 0.1):
        ...     state, factor = plateau(state, cosine)
        >>> int(state.waited), float(factor)
        (0, 0.0)

    Reference: stopping the alignment is HASTE's idea (Wang et al., "REPA Works Until It Doesn't",
    2025); the rule is that of learning rates that fall on a plateau.
    """

    patience: int = 2000
    min_gain: float = 1e-3
    smoothing: float = 0.99
    warmup: int = 1000
    shrink: float = 0.0

    def __post_init__(self) -> None:
        fix = "It is the old value's weight."
        set_frozen(
            self,
            patience=check_number("patience", self.patience, 1, integer=True),
            warmup=check_number("warmup", self.warmup, 0, integer=True),
            min_gain=check_number("min_gain", self.min_gain, 0),
            shrink=check_number("shrink", self.shrink, 0, 1),
            smoothing=check_number("smoothing", self.smoothing, 0, 0.999999, fix=fix),
        )

    def init(self) -> PlateauState:
        """The state before the first step, of plain numbers: they follow the cosine to its device.

        Example:
            >>> import selfalign
            >>> selfalign.plateau.Plateau().init().factor
            1.0
        """
        return PlateauState()

    @on_backend
    def __call__(self, state: PlateauState, cosine: Scalar) -> tuple[PlateauState, Scalar]:
        """The next state, and the factor for the next term: a float32 scalar in [0, 1].

        Args:
            state: from `init` or from the last call.
            cosine: mean cosine similarity of this step, a scalar; the same on all processes. A step
                in which it is not finite is left out.

        Raises:
            ValueError: a cosine that is no scalar.
            TypeError: tensors of another framework than Keras's backend.

        Example:
            >>> import selfalign
            >>> plateau = selfalign.plateau.Plateau()
            >>> state, factor = plateau(plateau.init(), 0.25)
            >>> float(state.smoothed), float(factor)
            (0.25, 1.0)
        """
        _check_state(state)
        _check_cosine(cosine)
        cosine = ops.stop_gradient(ops.cast(cosine, "float32"))
        old = PlateauState(*map(ops.cast, state, _DTYPES))
        new = self._step(old, cosine)
        seen = ops.isfinite(cosine)
        pairs = zip(new, old, strict=True)
        state = PlateauState(*(ops.where(seen, after, before) for after, before in pairs))
        return state, state.factor

    def _step(self, old: PlateauState, cosine: Scalar) -> PlateauState:
        """The next state, of a cosine that is finite."""
        steps = old.steps + 1
        # at first the plain mean: an average that starts at 0 would seem to gain for a long time
        rate = ops.maximum(1.0 - self.smoothing, 1.0 / ops.cast(steps, "float32"))
        smoothed = old.smoothed + rate * (cosine - old.smoothed)
        warm = steps <= self.warmup
        gained = ops.logical_or(warm, smoothed > old.best + self.min_gain)
        waited = ops.where(gained, 0, old.waited + 1)
        stalled = waited >= self.patience
        return PlateauState(
            steps,
            smoothed,
            ops.where(ops.logical_or(gained, stalled), smoothed, old.best),
            ops.where(stalled, 0, waited),
            ops.where(stalled, self.shrink * old.factor, old.factor),
        )


def _check_state(state: PlateauState) -> None:
    if not isinstance(state, (tuple, list)) or len(state) != len(PlateauState._fields):
        raise TypeError(
            f"state must be a PlateauState. Received: {state!r:.60}. Take it from init(), or from "
            "the last call."
        )


def _check_cosine(cosine: Scalar) -> None:
    if isinstance(cosine, (int, float)) and not isinstance(cosine, bool):
        return
    check_array("cosine", cosine)
    if tuple(cosine.shape) != ():
        raise invalid(
            "cosine must be a scalar",
            f"shape {tuple(cosine.shape)}",
            "Take its mean over the batch.",
        )


_DTYPES = ("int32", "float32", "float32", "int32", "float32")  # of the state
