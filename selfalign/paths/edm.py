"""EDM's path, whose time is the noise level."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from .._backend import ops, widened
from .._checks import check_number, set_frozen
from ..typing import Draws, Tensor, Times
from .conventions import Convention, with_rounding
from .path import Path
from .snr import TINY

_LOG_MEAN, _LOG_DEVIATION = -1.2, 1.2  # of sigma in EDM's training


@dataclasses.dataclass(frozen=True)
class EDM(Path):
    """EDM's variance-exploding path: x = x0 + sigma noise, t = sigma > 0.

    A gap is a fraction of ln(sigma_max / sigma_min), the axis on which EDM's network sees noise:
    moving by `gap` toward the data divides sigma by e^gap.

    Args:
        sigma_min: the clean end; no gap moves past it. A student below it keeps its own sigma.
        sigma_max: the noisy end.

    Example:
        >>> import selfalign
        >>> float(selfalign.paths.EDM().snr(0.5))
        4.0

    Reference: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models",
    2022, arXiv 2206.00364.
    """

    name: ClassVar[str] = "edm"
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        low = check_number("sigma_min", self.sigma_min, 1e-30)
        fix = "sigma_max must exceed sigma_min."
        high = check_number("sigma_max", self.sigma_max, low * 1.001, fix=fix)
        set_frozen(self, sigma_min=low, sigma_max=high)

    @property
    def bounds(self) -> tuple[float, float]:
        return 0.0, 3e38  # training draws sigma from a distribution without ends

    @property
    def clean_at(self) -> float:
        return self.sigma_min

    @property
    def noise_at(self) -> float:
        return self.sigma_max

    @property
    def span(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def coefficients(self, t: Times) -> tuple[Tensor, Tensor]:
        t = widened(t)
        return ops.ones_like(t), t

    def rates(self, t: Times) -> tuple[Tensor, Tensor]:
        t = widened(t)
        return ops.zeros_like(t), ops.ones_like(t)

    def toward_data(self, t: Times, gap: Tensor) -> Times:
        return ops.minimum(t, ops.maximum(t * ops.exp(-gap), self.sigma_min))

    def times_from(self, u: Draws) -> Times:
        """Noise levels whose logarithm is normal with mean -1.2 and deviation 1.2, as in EDM."""
        normal = math.sqrt(2.0) * ops.erfinv(2.0 * u - 1.0)
        drawn = ops.exp(_LOG_MEAN + _LOG_DEVIATION * normal)
        return ops.minimum(ops.maximum(drawn, self.sigma_min), self.sigma_max)

    def time_conventions(self) -> tuple[tuple[Convention, ...], ...]:
        """The noise level, and EDM's conditioning on it, ln(sigma) / 4."""
        return with_rounding(lambda t: t, lambda t: ops.log(t) / 4)

    def _time_at(self, ratio: Tensor) -> Tensor:
        return 1.0 / ops.maximum(ratio, TINY)
