"""The discrete diffusion of DDPM and DiT: T integer steps."""

from __future__ import annotations

import dataclasses
import itertools
import math
import numbers
from typing import Any, ClassVar

from .._backend import constant, ops, widened
from .._checks import invalid, set_frozen
from ..typing import Draws, Tensor, Times
from .conventions import Convention, with_rounding
from .path import Path


def _ddpm_alphas_cumprod(
    steps: int = 1000, first: float = 1e-4, last: float = 0.02
) -> tuple[float, ...]:
    betas = (first + (last - first) * i / (steps - 1) for i in range(steps))
    return tuple(itertools.accumulate((1.0 - beta for beta in betas), lambda a, b: a * b))


def _numbers(given: Any) -> tuple[float, ...]:
    """The numbers in a sequence or an array of one axis; none where it is something else."""
    items = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(items, (list, tuple)):
        return ()
    real = all(isinstance(a, numbers.Real) and not isinstance(a, bool) for a in items)
    return tuple(float(a) for a in items) if real else ()


@dataclasses.dataclass(frozen=True)
class Discrete(Path):
    """A discrete diffusion of T integer steps, 0 the cleanest.

    alpha = sqrt(abar_t), sigma = sqrt(1 - abar_t).

    Args:
        alphas_cumprod: abar, T numbers that fall from (nearly) 1 toward 0. Default: DiT's and
            DDPM's 1000 steps with betas rising linearly from 1e-4 to 0.02.

    Raises:
        ValueError: fewer than two steps, or numbers that do not fall strictly inside [0, 1].

    Example:
        >>> import selfalign
        >>> path = selfalign.paths.Discrete()
        >>> path.noise_at, round(path.alphas_cumprod[100], 8)
        (999, 0.89514159)

    Reference: Ho et al., "DDPM", 2020, arXiv 2006.11239; Peebles and Xie, "DiT", 2022, arXiv
    2212.09748.
    """

    name: ClassVar[str] = "discrete"
    discrete: ClassVar[bool] = True
    _alphas: ClassVar[tuple[float, ...]]  # of the object, but no settings
    _sigmas: ClassVar[tuple[float, ...]]

    alphas_cumprod: tuple[float, ...] = _ddpm_alphas_cumprod()

    def __post_init__(self) -> None:
        values = _numbers(self.alphas_cumprod)
        falls = all(1.0 >= a > b >= 0.0 for a, b in itertools.pairwise(values))
        if len(values) < 2 or not falls:
            raise invalid(
                "alphas_cumprod must be at least two numbers that fall strictly inside [0, 1]",
                f"{len(values)} numbers, {values[:3]} ... {values[-1:]}"
                if values
                else f"{self.alphas_cumprod!r:.60}",
                "Pass the cumulative product of 1 - beta, step 0 first.",
            )
        # roots in float64: 1 - abar loses four digits of sigma in float32 at the clean end
        alphas = tuple(math.sqrt(a) for a in values)
        sigmas = tuple(math.sqrt(1.0 - a) for a in values)
        set_frozen(self, alphas_cumprod=values, _alphas=alphas, _sigmas=sigmas)

    @property
    def clean_at(self) -> int:
        return 0

    @property
    def span(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def noise_at(self) -> int:
        return len(self.alphas_cumprod) - 1

    def coefficients(self, t: Times) -> tuple[Tensor, Tensor]:
        return ops.take(constant(self._alphas), t), ops.take(constant(self._sigmas), t)

    def rates(self, t: Times) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.coefficients(t)
        return -sigma, alpha

    def toward_data(self, t: Times, gap: Tensor) -> Times:
        return ops.maximum(t - gap, 0)

    def gap(self, u: Draws, largest: float) -> Tensor:
        """Whole steps, uniform in {0, ..., largest - 1}."""
        last = float(max(largest - 1, 0))  # u * largest may round up to largest
        return ops.cast(ops.minimum(ops.floor(widened(u) * largest), last), "int32")

    def times_from(self, u: Draws) -> Times:
        """Steps uniform in {0, ..., T - 1}."""
        return self.gap(u, self.span)

    def time_conventions(self) -> tuple[tuple[Convention, ...], ...]:
        """As it is, and as a fraction of the steps, either way."""
        count = self.span
        return with_rounding(lambda t: t, lambda t: t / count, lambda t: 1 - t / count)
