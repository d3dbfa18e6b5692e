"""Schedules of the training step: for the weight of the term, and for the decay of the EMA.

A step is the number of optimizer steps done: 0 in the first. It may be a Python int or an integer
tensor (traced, too). Weight schedules multiply: `0.5 * Warmup(1000) * Stop(250_000)`.
"""

from __future__ import annotations

import dataclasses
import inspect
import numbers
from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

from ._backend import ops, scope
from ._checks import (
    check_decay,
    check_list,
    check_number,
    check_step,
    check_steps,
    from_settings,
    invalid,
    set_frozen,
)
from ._formulas import PythonNumbers
from .typing import Scalar, Settings, Step

Function: TypeAlias = Callable[[Step], Scalar]
"""A schedule of the user's own: any function of the step."""

Functions: TypeAlias = Any
"""What formulas are written in: keras.ops for tensors, `PythonNumbers` for Python numbers."""


class Schedule:
    """Base of the schedules: a function of the step with plain settings.

    Schedules and numbers can be multiplied.

    Example: `0.5 * selfalign.schedules.Warmup(10) * selfalign.schedules.Stop(100)`.
    """

    name: ClassVar[str]

    def __call__(self, step: Step) -> Scalar:
        """The value at `step`: a Python float for a Python int, a float32 tensor for a tensor."""
        if isinstance(step, (numbers.Number, str)) or not hasattr(step, "shape"):
            return float(self.value(check_steps("step", step, 0), PythonNumbers))
        with scope(step):
            check_step(step)
            return ops.cast(self.value(ops.cast(step, "int32"), ops), "float32")

    def value(self, step: Step, xp: Functions) -> Scalar:
        """The formula, with minimum, maximum, where and cast from `xp`."""
        raise NotImplementedError

    def __mul__(self, other: Schedule | float) -> Product:
        return Product((self, other))

    __rmul__ = __mul__

    def settings(self) -> Settings:
        """The schedule as a plain dict that `resolve` takes back."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]  # each kind is a dataclass
        return {"name": self.name} | {field.name: getattr(self, field.name) for field in fields}


@dataclasses.dataclass(frozen=True)
class Constant(Schedule):
    """The same value at every step.

    Example:
        >>> import selfalign
        >>> selfalign.schedules.Constant(0.5)(10)
        0.5
    """

    name: ClassVar[str] = "constant"
    constant: float

    def __post_init__(self) -> None:
        fix = "Weights and decays are never negative."
        set_frozen(self, constant=check_number("weight", self.constant, 0, fix=fix))

    def value(self, step: Step, xp: Functions) -> Scalar:
        return xp.cast(0 * step, "float32") + self.constant


@dataclasses.dataclass(frozen=True)
class Warmup(Schedule):
    """A factor that rises linearly from 0 at step 0 to 1 at step `steps`.

    Example:
        >>> import selfalign
        >>> weight = 0.5 * selfalign.schedules.Warmup(100)
        >>> weight(50), weight(200)
        (0.25, 0.5)
    """

    name: ClassVar[str] = "warmup"
    steps: int

    def __post_init__(self) -> None:
        set_frozen(self, steps=check_steps("steps", self.steps, 1))

    def value(self, step: Step, xp: Functions) -> Scalar:
        return xp.minimum(step / self.steps, 1.0)


@dataclasses.dataclass(frozen=True)
class Stop(Schedule):
    """A factor of 1 before step `step`, and of 0 from there on (HASTE's schedule).

    The term stays in the graph at weight 0. To save the teacher's cost too, stop calling it.

    Example:
        >>> import selfalign
        >>> stop = selfalign.schedules.Stop(250_000)
        >>> stop(249_999), stop(250_000)
        (1.0, 0.0)

    Reference: Wang et al., "REPA Works Until It Doesn't", 2025 (HASTE).
    """

    name: ClassVar[str] = "stop"
    step: int

    def __post_init__(self) -> None:
        set_frozen(self, step=check_steps("step", self.step, 0))

    def value(self, step: Step, xp: Functions) -> Scalar:
        return xp.where(step < self.step, 1.0, 0.0)


@dataclasses.dataclass(frozen=True)
class PaperDecay(Schedule):
    """The paper's factor: flat, then one decade less every `epochs_per_decade` epochs.

        10 ^ (-max(epoch - last_flat_epoch, 0) / epochs_per_decade)

    Args:
        steps_per_epoch: optimizer steps per epoch; epoch = step // steps_per_epoch. ImageNet at
            batch 256: 5004.
        last_flat_epoch: 149 at 256 px, 99 at 512 px.
        epochs_per_decade: 1000 at 256 px, 800 at 512 px.

    Example:
        >>> import selfalign
        >>> weight = 0.2 * selfalign.schedules.PaperDecay(steps_per_epoch=5004)
        >>> [round(weight(epoch * 5004), 5) for epoch in (149, 150, 800)]
        [0.2, 0.19954, 0.04467]

    Reference: Jiang et al., SRA, 2025, arXiv 2505.02831, and its public code.
    """

    name: ClassVar[str] = "paper_decay"
    steps_per_epoch: int = 5004
    last_flat_epoch: int = 149
    epochs_per_decade: int = 1000

    def __post_init__(self) -> None:
        for name, low in (("steps_per_epoch", 1), ("last_flat_epoch", 0), ("epochs_per_decade", 1)):
            set_frozen(self, **{name: check_steps(name, getattr(self, name), low)})

    def value(self, step: Step, xp: Functions) -> Scalar:
        epoch = step // self.steps_per_epoch
        past = xp.maximum(epoch - self.last_flat_epoch, 0)
        return 10.0 ** (-past / self.epochs_per_decade)


@dataclasses.dataclass(frozen=True)
class DecayWarmup(Schedule):
    """An EMA decay that starts low: min(decay, (1 + step) / (10 + step)).

    For short runs: at 0.9999 the teacher is still half the random start after 6,931 steps.

    Example:
        >>> import selfalign
        >>> decay = selfalign.schedules.DecayWarmup(0.999)
        >>> decay(0), round(decay(90), 2), decay(100_000)
        (0.1, 0.91, 0.999)

    Reference: the warm-up of TensorFlow's ExponentialMovingAverage.
    """

    name: ClassVar[str] = "decay_warmup"
    decay: float = 0.9999

    def __post_init__(self) -> None:
        set_frozen(self, decay=check_number("decay", self.decay, 0, 1))

    def value(self, step: Step, xp: Functions) -> Scalar:
        return xp.minimum((1 + step) / (10 + step), self.decay)


@dataclasses.dataclass(frozen=True)
class Every(Schedule):
    """An EMA decay that moves the average in every `steps`-th step only.

    It is decay^steps there, and 1 in between, where the PyTorch and JAX adapters do no work. An
    approximation: the average is (steps - 1) / 2 training steps ahead of the EMA of every step when
    it moves, and as much behind before it moves again. Both look back over 1 / (1 - decay) steps.

    Args:
        steps: optimizer steps from one update to the next.
        decay: of a single step, a number or a schedule.

    Example:
        >>> import selfalign
        >>> decay = selfalign.schedules.Every(2, 0.9)
        >>> decay(0), round(decay(1), 4), decay(2)
        (1.0, 0.81, 1.0)
    """

    name: ClassVar[str] = "every"
    steps: int
    decay: Any = 0.9999  # a schedule, or a number that becomes one

    def __post_init__(self) -> None:
        set_frozen(self, steps=check_steps("steps", self.steps, 1))
        check_decay(self.decay)
        decay = resolve(self.decay)
        check_decay(decay)
        if not isinstance(decay, Schedule):
            raise invalid(
                "decay must be a number or an object of selfalign.schedules",
                repr(decay),
                "Raise it to the power of steps inside a function of the step instead.",
            )
        set_frozen(self, decay=decay)

    def value(self, step: Step, xp: Functions) -> Scalar:
        moved = self.decay.value(step, xp) ** self.steps
        return xp.where((step + 1) % self.steps == 0, moved, 1.0)

    def settings(self) -> Settings:
        return {"name": self.name, "steps": self.steps, "decay": self.decay.settings()}


@dataclasses.dataclass(frozen=True)
class Product(Schedule):
    """The product of other schedules; what `*` makes.

    Example: `0.5 * selfalign.schedules.Warmup(10)`.
    """

    name: ClassVar[str] = "product"
    factors: tuple[Any, ...]  # schedules, or numbers that become schedules

    def __post_init__(self) -> None:
        check_list("factors", self.factors, "Multiply schedules instead: 0.5 * Warmup(1000).")
        factors = tuple(resolve(factor) for factor in self.factors)
        for factor in factors:
            if not isinstance(factor, Schedule):
                raise invalid(
                    "Factors must be numbers or objects of selfalign.schedules",
                    repr(factor),
                    "Multiply inside a function of the step instead.",
                )
        set_frozen(self, factors=factors)

    def value(self, step: Step, xp: Functions) -> Scalar:
        product = 1.0
        for factor in self.factors:
            product = product * xp.cast(factor.value(step, xp), "float32")
        return product

    def settings(self) -> Settings:
        return {"name": self.name, "factors": [factor.settings() for factor in self.factors]}


SCHEDULES: dict[str, type[Schedule]] = {
    kind.name: kind for kind in (Constant, Warmup, Stop, PaperDecay, DecayWarmup, Every, Product)
}


def resolve(schedule: Function | float | Settings) -> Function:
    """A schedule from a number, its settings, or itself; a function of the user's as it is.

    Raises:
        ValueError: something else, or settings that describe no schedule.

    Example:
        >>> import selfalign
        >>> selfalign.schedules.resolve(0.5)
        Constant(constant=0.5)
        >>> selfalign.schedules.resolve({"name": "warmup", "steps": 10})
        Warmup(steps=10)
    """
    if isinstance(schedule, dict):
        return from_settings("schedule", SCHEDULES, schedule)
    if callable(schedule) and not inspect.isclass(schedule):
        return schedule
    if isinstance(schedule, numbers.Real) and not isinstance(schedule, bool):
        return Constant(schedule)
    raise invalid(
        "A schedule must be a number or a function of the step",
        repr(schedule),
        "Pass a number, an object of selfalign.schedules, or a callable.",
    )
