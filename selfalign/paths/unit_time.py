"""Paths of continuous time in [0, 1], running either way: linear and cosine."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import ClassVar

from .._backend import ops, widened
from .._checks import check_choice, set_frozen
from ..typing import Tensor, Times
from .conventions import Convention, with_rounding
from .path import Path


class UnitTime(Path):
    """Base of the paths of continuous time in [0, 1].

    Example:
        >>> import selfalign
        >>> isinstance(selfalign.paths.Cosine(), selfalign.paths.UnitTime)
        True
    """

    bounds = (0.0, 1.0)  # a constant: asked for in each step
    noise_at: float = 1.0

    def __post_init__(self) -> None:
        check_choice("noise_at", self.noise_at, (0.0, 1.0))
        set_frozen(self, noise_at=float(self.noise_at))

    @property
    def clean_at(self) -> float:
        return 1.0 - self.noise_at

    def reversed(self) -> UnitTime:
        """The same path with its time running the other way.

        Example:
            >>> import selfalign
            >>> selfalign.paths.Linear().reversed()
            Linear(noise_at=0.0)
        """
        other = copy.copy(self)
        set_frozen(other, noise_at=self.clean_at)
        return other

    def _noisiness(self, t: Times) -> Times:
        t = widened(t)
        return t if self.noise_at else 1.0 - t

    def rates(self, t: Times) -> tuple[Tensor, Tensor]:
        sign = 1.0 if self.noise_at else -1.0
        d_alpha, d_sigma = self._derivatives(self._noisiness(t))
        return sign * d_alpha, sign * d_sigma

    def _derivatives(self, r: Times) -> tuple[Tensor, Tensor]:
        """Derivatives of alpha and sigma where noise is at time 1."""
        raise NotImplementedError

    def toward_data(self, t: Times, gap: Tensor) -> Times:
        if self.noise_at:
            return ops.maximum(t - gap, 0.0)
        return ops.minimum(t + gap, 1.0)

    def time_conventions(self) -> tuple[tuple[Convention, ...], ...]:
        """As it is, in thousandths, and both reversed."""
        return with_rounding(
            lambda t: t,
            lambda t: 1000 * t,
            lambda t: 1 - t,
            lambda t: 1000 - 1000 * t,
        )


@dataclasses.dataclass(frozen=True)
class Linear(UnitTime):
    """The linear path of flow matching: alpha = 1 - t, sigma = t, velocity = noise - x0.

    Args:
        noise_at: the time of noise, 1 (SiT, the default) or 0 (many flow-matching code bases, where
            x_0 is the noise).

    Example:
        >>> import selfalign
        >>> selfalign.paths.Linear(noise_at=0).clean_at
        1.0

    Reference: Lipman et al., "Flow Matching", 2022, arXiv 2210.02747; Ma et al., "SiT", 2024, arXiv
    2401.08740.
    """

    name: ClassVar[str] = "linear"
    noise_at: float = 1.0

    def coefficients(self, t: Times) -> tuple[Tensor, Tensor]:
        r = self._noisiness(t)
        return 1.0 - r, r

    def _derivatives(self, r: Times) -> tuple[Tensor, Tensor]:
        return -ops.ones_like(r), ops.ones_like(r)

    def _time_at(self, ratio: Tensor) -> Tensor:
        return self._noisiness(1.0 / (1.0 + ratio))  # the reversal is its own inverse


@dataclasses.dataclass(frozen=True)
class Cosine(UnitTime):
    """The variance-preserving cosine path (GVP in SiT).

    alpha = cos(pi t / 2), sigma = sin(pi t / 2), t in [0, 1].

    Args:
        noise_at: the time of noise, 1 (SiT, the default) or 0.

    Example:
        >>> import selfalign
        >>> round(float(selfalign.paths.Cosine().snr(0.5)), 6)
        1.0

    Reference: Ma et al., "SiT", 2024, arXiv 2401.08740.
    """

    name: ClassVar[str] = "cosine"
    noise_at: float = 1.0

    def coefficients(self, t: Times) -> tuple[Tensor, Tensor]:
        angle = self._noisiness(t) * (math.pi / 2)
        return ops.cos(angle), ops.sin(angle)

    def _derivatives(self, r: Times) -> tuple[Tensor, Tensor]:
        angle = r * (math.pi / 2)
        return -(math.pi / 2) * ops.sin(angle), (math.pi / 2) * ops.cos(angle)

    def _time_at(self, ratio: Tensor) -> Tensor:
        return self._noisiness((2 / math.pi) * ops.arctan2(ops.ones_like(ratio), ratio))
