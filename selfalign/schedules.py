"""Schedules of the training step: for the weight of the term, and for the decay of the EMA.

A step is the number of optimizer steps done: 0 in the first. It may be a Python int or an integer tensor (traced, too).
Weight schedules multiply: `0.5 * Warmup(1000) * Stop(250_000)`.
"""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any, ClassVar

from ._backend import ops, scope
from ._checks import build, check_number, invalid, keep


class Schedule:
    """Base of the schedules: a function of the step with plain settings. Multiply schedules and numbers freely.

    Example:
        >>> import selfalign
        >>> (0.5 * selfalign.schedules.Stop(10)).settings()["name"]
        'product'
    """

    name: ClassVar[str]

    def __call__(self, step: Any) -> Any:
        """The value at `step`: a Python float for a Python int, a float32 tensor for a tensor."""
        if isinstance(step, numbers.Integral):
            return float(self.value(int(step), _Numbers))
        with scope(step):
            return ops.cast(self.value(ops.cast(step, "int32"), ops), "float32")

    def value(self, step: Any, xp: Any) -> Any:
        """The formula, with minimum, maximum and where from `xp`, for Python numbers and tensors alike."""
        raise NotImplementedError

    def __mul__(self, other: Schedule | float) -> Product:
        return Product((self, other))  # type: ignore[arg-type]

    __rmul__ = __mul__

    def settings(self) -> dict[str, Any]:
        """The schedule as a plain dict that `resolve` takes back."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {"name": self.name} | fields


class _Numbers:
    """The three functions of keras.ops that schedules use, for Python numbers: no tensor, no Keras needed."""

    minimum, maximum = min, max

    @staticmethod
    def where(condition: bool, x: float, y: float) -> float:
        return x if condition else y


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
        keep(self, constant=check_number("weight", self.constant, 0, fix="Weights and decays are never negative."))

    def value(self, step: Any, xp: Any) -> Any:
        return 0 * step + self.constant


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
        keep(self, steps=check_number("steps", self.steps, 1))

    def value(self, step: Any, xp: Any) -> Any:
        return xp.minimum(step / self.steps, 1.0)


@dataclasses.dataclass(frozen=True)
class Stop(Schedule):
    """A factor of 1 before step `step` and 0 from there on (HASTE's schedule).

    The term stays in the graph at weight 0. To save the teacher's cost too, stop calling it.

    Example:
        >>> import selfalign
        >>> selfalign.schedules.Stop(250_000)(249_999), selfalign.schedules.Stop(250_000)(250_000)
        (1.0, 0.0)

    Reference: Wang et al., "REPA Works Until It Doesn't", 2025 (HASTE).
    """

    name: ClassVar[str] = "stop"
    step: int

    def __post_init__(self) -> None:
        keep(self, step=check_number("step", self.step, 0))

    def value(self, step: Any, xp: Any) -> Any:
        return xp.where(step < self.step, 1.0, 0.0)


@dataclasses.dataclass(frozen=True)
class PaperDecay(Schedule):
    """The paper's factor: 1 up to epoch `last_flat_epoch`, then 10^(-(epoch - last_flat_epoch) / epochs_per_decade).

    Args:
        steps_per_epoch: optimizer steps per epoch; epoch = step // steps_per_epoch. ImageNet at batch 256: 5004.
        last_flat_epoch: 149 at 256 px, 99 at 512 px.
        epochs_per_decade: 1000 at 256 px, 800 at 512 px.

    Example:
        >>> import selfalign
        >>> weight = 0.2 * selfalign.schedules.PaperDecay(steps_per_epoch=5004)
        >>> round(weight(149 * 5004), 5), round(weight(150 * 5004), 5), round(weight(800 * 5004), 5)
        (0.2, 0.19954, 0.04467)

    Reference: Jiang et al., SRA, 2025, arXiv 2505.02831, and its public code.
    """

    name: ClassVar[str] = "paper_decay"
    steps_per_epoch: int = 5004
    last_flat_epoch: int = 149
    epochs_per_decade: int = 1000

    def __post_init__(self) -> None:
        for name, low in (("steps_per_epoch", 1), ("last_flat_epoch", 0), ("epochs_per_decade", 1)):
            keep(self, **{name: check_number(name, getattr(self, name), low)})

    def value(self, step: Any, xp: Any) -> Any:
        past = xp.maximum(step // self.steps_per_epoch - self.last_flat_epoch, 0)
        return 10.0 ** (-past / self.epochs_per_decade)


@dataclasses.dataclass(frozen=True)
class DecayWarmup(Schedule):
    """An EMA decay that starts low: min(decay, (1 + step) / (10 + step)).

    For short runs: at 0.9999 without a warm-up the teacher is still half the random start after 6,931 steps.

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
        keep(self, decay=check_number("decay", self.decay, 0, 1))

    def value(self, step: Any, xp: Any) -> Any:
        return xp.minimum((1 + step) / (10 + step), self.decay)


@dataclasses.dataclass(frozen=True)
class Every(Schedule):
    """An EMA decay that moves the average in every `steps`-th step only: there decay^steps, 1 in between.

    An approximation: weights between these steps are left out. The average is (steps - 1) / 2 training steps ahead of the EMA
    of every step when it moves and as much behind before it moves again, of the 1 / (1 - decay) steps that both look back.
    The PyTorch and JAX adapters do no work in the steps between.

    Args:
        steps: optimizer steps from one update to the next; the first update comes after `steps` of them.
        decay: of a single step, a number or a schedule.

    Example:
        >>> import selfalign
        >>> decay = selfalign.schedules.Every(2, 0.9)
        >>> decay(0), round(decay(1), 4), decay(2)
        (1.0, 0.81, 1.0)
    """

    name: ClassVar[str] = "every"
    steps: int
    decay: Any = 0.9999

    def __post_init__(self) -> None:
        keep(self, steps=check_number("steps", self.steps, 1, integer=True), decay=resolve(self.decay))
        if isinstance(self.decay, Constant):
            check_number("decay", self.decay.constant, 0, 1)
        elif not isinstance(self.decay, Schedule):
            raise invalid("decay must be a number or an object of selfalign.schedules", repr(self.decay),
                          "Raise it to the power of steps inside a function of the step instead.")  # fmt: skip

    def value(self, step: Any, xp: Any) -> Any:
        return xp.where((step + 1) % self.steps == 0, self.decay.value(step, xp) ** self.steps, 1.0)

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, "steps": self.steps, "decay": self.decay.settings()}


@dataclasses.dataclass(frozen=True)
class Product(Schedule):
    """The product of other schedules; what `*` makes.

    Example:
        >>> import selfalign
        >>> (selfalign.schedules.Warmup(10) * 2)(5)
        1.0
    """

    name: ClassVar[str] = "product"
    factors: tuple[Schedule, ...]

    def __post_init__(self) -> None:
        factors = tuple(resolve(factor) for factor in self.factors)
        own = [factor for factor in factors if not isinstance(factor, Schedule)]
        if own:
            raise invalid("Factors must be numbers or objects of selfalign.schedules", repr(own[0]),
                          "Multiply inside a function of the step instead.")  # fmt: skip
        keep(self, factors=factors)

    def value(self, step: Any, xp: Any) -> Any:
        product = 1.0
        for factor in self.factors:
            product = product * factor.value(step, xp)
        return product

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, "factors": [factor.settings() for factor in self.factors]}


KINDS: dict[str, Any] = {kind.name: kind for kind in (Constant, Warmup, Stop, PaperDecay, DecayWarmup, Every, Product)}


def resolve(schedule: Any) -> Any:
    """A schedule from a number, its settings, or itself; a callable of your own is taken as it is.

    Example:
        >>> import selfalign
        >>> selfalign.schedules.resolve(0.5)
        Constant(constant=0.5)
        >>> selfalign.schedules.resolve({"name": "warmup", "steps": 10})
        Warmup(steps=10)
    """
    if isinstance(schedule, dict):
        return build("schedule", KINDS, schedule)
    if callable(schedule):
        return schedule
    if isinstance(schedule, numbers.Real) and not isinstance(schedule, bool):
        return Constant(schedule)  # type: ignore[arg-type]
    raise invalid("A schedule must be a number or a function of the step", repr(schedule),
                  "Pass a number, an object of selfalign.schedules, or a callable.")  # fmt: skip
