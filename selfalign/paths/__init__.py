"""Noise paths: how a clean sample turns into noise, and which end of time is which.

A path says x_t = alpha(t) x0 + sigma(t) noise. Its direction of time is declared, never guessed:
`noise_at` is the time of (nearly) pure noise, `clean_at` the time of data. Times are vectors [B],
one per sample.
"""

from __future__ import annotations

from .._checks import from_settings
from ..typing import Settings
from .discrete import Discrete
from .edm import EDM
from .path import Path
from .unit_time import Cosine, Linear, UnitTime

__all__ = ["EDM", "PATHS", "Cosine", "Discrete", "Linear", "Path", "UnitTime", "resolve"]

PATHS: dict[str, type[Path]] = {path.name: path for path in (Linear, Cosine, Discrete, EDM)}


def resolve(path: Path | str | Settings) -> Path:
    """A path from its name ("linear", "cosine", "discrete", "edm"), its settings, or itself.

    Example:
        >>> import selfalign
        >>> selfalign.paths.resolve("cosine")
        Cosine(noise_at=1.0)
        >>> selfalign.paths.resolve({"name": "linear", "noise_at": 0}).noise_at
        0.0
    """
    if isinstance(path, Path):
        return path
    return from_settings("path", PATHS, path if isinstance(path, dict) else {"name": path})
