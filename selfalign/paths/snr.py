"""The signal-to-noise ratio of a path."""

from __future__ import annotations

import math

from .._backend import dtype_of, extremes, is_floating, on_backend, ops, widened
from .._checks import check_array, invalid
from ..typing import Tensor, Times

TINY = 1e-19  # its inverse squared still fits into float32


class SignalToNoise:
    """What every path knows of its signal-to-noise ratio; the base of `Path`.

    Example:
        >>> import selfalign
        >>> float(selfalign.paths.Linear().snr(0.5))
        1.0
    """

    def coefficients(self, t: Times) -> tuple[Tensor, Tensor]:
        """alpha(t) and sigma(t), of the shape of `t`."""
        raise NotImplementedError

    def _check_values(self, t: Tensor) -> None:
        """Times of any shape: of the path's kind and inside it."""
        raise NotImplementedError

    @on_backend
    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2 at times `t` (any shape).

        It is infinite at the clean end and 0 at pure noise.

        Example:
            >>> import selfalign
            >>> float(selfalign.paths.Linear().snr(0.2))
            16.0
        """
        t = _tensor("t", t)
        self._check_values(t)
        alpha, sigma = self.coefficients(t)
        return ops.where(sigma > 0, ops.square(alpha / ops.maximum(sigma, TINY)), math.inf)

    @on_backend
    def time_at_snr(self, snr: Tensor) -> Tensor:
        """The inverse of `snr`: the time at which the path has this ratio (any shape).

        Example:
            >>> import selfalign
            >>> round(float(selfalign.paths.Linear().time_at_snr(16.0)), 6)
            0.2
        """
        snr = _tensor("snr", snr)
        found = extremes(snr) if is_floating(snr) or "int" in dtype_of(snr) else (-1.0, -1.0)
        if found is not None and not found[0] >= 0:
            raise invalid(
                "snr must hold numbers of at least 0",
                f"values from {found[0]:g}, dtype {dtype_of(snr)}",
                "It is alpha^2 / sigma^2, not in decibels.",
            )
        return self._time_at(ops.sqrt(widened(snr)))

    def _time_at(self, ratio: Tensor) -> Tensor:
        """The time at which alpha / sigma is `ratio`."""
        raise invalid(
            "time_at_snr needs a path with an inverse",
            self,
            "Use a continuous path, or search in snr(t).",
        )


def _tensor(name: str, value: Tensor) -> Tensor:
    """A number as a tensor; anything but numbers and arrays is refused."""
    if type(value) in (int, float):
        return ops.convert_to_tensor(value)
    check_array(name, value)
    return value
