"""Noise paths: how a clean sample turns into noise, and which end of time is which.

A path says x_t = alpha(t) x0 + sigma(t) noise. Its direction of time is declared, never guessed: `noise_at` is the time
of (nearly) pure noise, `clean_at` the time of data. Times are vectors [B], one per sample.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, ClassVar

from ._backend import constant, dtype_of, is_floating, on_backend, ops, widened
from ._checks import build, check_array, check_choice, check_kind, check_number, check_time, invalid, keep

_TINY = 1e-19  # its inverse squared still fits into float32


class Path:
    """Base of the noise paths. A path of your own gives `coefficients`, `rates`, `toward_data` and the attributes below.

    Attributes:
        name: the name under which `SRALoss` takes the path and its settings are saved.
        discrete: whether times are integer steps.
        noise_at: the time of noise.
        clean_at: the time of data.
        bounds: (lowest, highest) time allowed.
        span: the length of the time axis that a gap is a share of, in the unit of `toward_data`.

    Example:
        >>> import selfalign
        >>> path = selfalign.paths.Linear()  # one of those that derive from it
        >>> path.noise_at, path.clean_at, path.bounds
        (1.0, 0.0, (0.0, 1.0))
    """

    name: ClassVar[str]
    discrete: ClassVar[bool] = False
    noise_at: Any
    clean_at: Any = 0.0
    span: Any = 1.0

    @property
    def bounds(self) -> tuple[float, float]:
        return min(self.clean_at, self.noise_at), max(self.clean_at, self.noise_at)

    def coefficients(self, t: Any) -> tuple[Any, Any]:
        """alpha(t) and sigma(t), of the shape of `t`."""
        raise NotImplementedError

    def rates(self, t: Any) -> tuple[Any, Any]:
        """The weights of x0 and noise in the velocity target, of the shape of `t`."""
        raise NotImplementedError

    def toward_data(self, t: Any, gap: Any) -> Any:
        """`t` moved by `gap` toward the data and never past `clean_at`. No checks: see `SRALoss.teacher_time`."""
        raise NotImplementedError

    @on_backend
    def add_noise(self, x0: Any, noise: Any, t: Any) -> Any:
        """The noisy sample, x_t = alpha(t) x0 + sigma(t) noise.

        Args:
            x0: clean samples [B, ...], floating point.
            noise: standard normal noise of the shape of `x0`.
            t: times [B] on this path.

        Returns:
            x_t in the shape and dtype of `x0`; computed in float32 at least.

        Raises:
            ValueError: shapes that differ, an empty batch, `t` not of shape [B] or outside the path.
            TypeError: `t` of the wrong kind (integer steps or continuous), or tensors of another framework.

        Example:
            >>> import numpy as np, selfalign
            >>> x_t = selfalign.paths.Linear().add_noise(np.zeros((2, 3)), np.ones((2, 3)), np.array([0.25, 1.0]))
            >>> float(x_t[0, 0]), float(x_t[1, 0])
            (0.25, 1.0)

        Reference: Ma et al., "SiT", 2024, arXiv 2401.08740, section 2.
        """
        return self._mix(self.coefficients, x0, noise, t)

    @on_backend
    def velocity(self, x0: Any, noise: Any, t: Any) -> Any:
        """The velocity target: dx_t/dt on continuous paths, the v-prediction alpha noise - sigma x0 on discrete ones.

        Args, errors and result as in `add_noise`. It points along the path's own time: toward noise where noise is at
        the larger t, toward data where time runs the other way.

        Example:
            >>> import numpy as np, selfalign
            >>> v = selfalign.paths.Linear().velocity(np.ones((1, 2)), np.zeros((1, 2)), np.array([0.3]))
            >>> float(v[0, 0])
            -1.0

        Reference: Salimans and Ho, "Progressive Distillation", 2022, arXiv 2202.00512 (v-prediction).
        """
        return self._mix(self.rates, x0, noise, t)

    def target(self, x0: Any, noise: Any, t: Any, prediction: str = "velocity") -> Any:
        """What the model is trained to predict: "velocity", "noise" or "data"; each of the shape of `x0`.

        Example:
            >>> import numpy as np, selfalign
            >>> selfalign.paths.Discrete().target(np.zeros(3), np.ones(3), None, "noise")
            array([1., 1., 1.])
        """
        check_choice("prediction", prediction, ("velocity", "noise", "data"))
        return self.velocity(x0, noise, t) if prediction == "velocity" else {"noise": noise, "data": x0}[prediction]

    @on_backend
    def snr(self, t: Any) -> Any:
        """Signal-to-noise ratio alpha^2 / sigma^2 at times `t` (any shape): infinite at the clean end, 0 at pure noise.

        Example:
            >>> import selfalign
            >>> float(selfalign.paths.Linear().snr(0.2))
            16.0
        """
        t = ops.convert_to_tensor(t)
        check_kind(self, t)
        alpha, sigma = self.coefficients(t)
        return ops.where(sigma > 0, ops.square(alpha / ops.maximum(sigma, _TINY)), math.inf)

    @on_backend
    def time_at_snr(self, snr: Any) -> Any:
        """The inverse of `snr`: the time at which the path has this signal-to-noise ratio (any shape).

        Example:
            >>> import selfalign
            >>> round(float(selfalign.paths.Linear().time_at_snr(16.0)), 6)
            0.2
        """
        return self._time_at(ops.sqrt(widened(ops.convert_to_tensor(snr))))

    def _time_at(self, ratio: Any) -> Any:
        """The time at which alpha / sigma is `ratio`."""
        raise invalid("time_at_snr needs a path with an inverse", self, "Use a continuous path, or search in snr(t).")

    def _mix(self, weights: Any, x0: Any, noise: Any, t: Any) -> Any:
        for name, value in (("x0", x0), ("noise", noise)):
            check_array(name, value)
        shape = tuple(x0.shape)
        if shape != tuple(noise.shape) or not shape:
            raise invalid("x0 and noise must have the same shape [B, ...]", f"x0 {shape}, noise {tuple(noise.shape)}",
                          "Draw the noise like x0.")  # fmt: skip
        check_time(self, t, batch=shape[0])
        if not is_floating(x0):
            raise TypeError(f"x0 must be floating point. Received: dtype {dtype_of(x0)}. Scale images to floats first.")
        a, b = (ops.reshape(w, (-1,) + (1,) * (len(shape) - 1)) for w in weights(t))
        return ops.cast(a * widened(x0) + b * widened(noise), dtype_of(x0))

    def settings(self) -> dict[str, Any]:
        """The path as a plain dict that `selfalign.paths.resolve` takes back."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        changed = {f.name: getattr(self, f.name) for f in fields if getattr(self, f.name) != f.default}
        return {"name": self.name} | {k: list(v) if isinstance(v, tuple) else v for k, v in changed.items()}


class _UnitTime(Path):
    """Continuous time in [0, 1], running either way."""

    noise_at: float = 1.0

    def __post_init__(self) -> None:
        check_choice("noise_at", self.noise_at, (0.0, 1.0))
        keep(self, noise_at=float(self.noise_at))

    @property
    def clean_at(self) -> float:
        return 1.0 - self.noise_at

    def _noisiness(self, t: Any) -> Any:
        t = widened(t)
        return t if self.noise_at else 1.0 - t

    def rates(self, t: Any) -> tuple[Any, Any]:
        sign = 1.0 if self.noise_at else -1.0
        d_alpha, d_sigma = self._derivatives(self._noisiness(t))
        return sign * d_alpha, sign * d_sigma

    def _derivatives(self, r: Any) -> tuple[Any, Any]:
        raise NotImplementedError

    def toward_data(self, t: Any, gap: Any) -> Any:
        return ops.maximum(t - gap, 0.0) if self.noise_at else ops.minimum(t + gap, 1.0)


@dataclasses.dataclass(frozen=True)
class Linear(_UnitTime):
    """The linear path of flow matching: alpha = 1 - t, sigma = t, velocity = noise - x0; t in [0, 1].

    Args:
        noise_at: the time of noise, 1 (SiT, the default) or 0 (many flow-matching code bases, where x_0 is the noise).

    Example:
        >>> import selfalign
        >>> selfalign.paths.Linear(noise_at=0).clean_at
        1.0

    Reference: Lipman et al., "Flow Matching", 2022, arXiv 2210.02747; Ma et al., "SiT", 2024, arXiv 2401.08740.
    """

    name: ClassVar[str] = "linear"
    noise_at: float = 1.0

    def coefficients(self, t: Any) -> tuple[Any, Any]:
        r = self._noisiness(t)
        return 1.0 - r, r

    def _derivatives(self, r: Any) -> tuple[Any, Any]:
        return -ops.ones_like(r), ops.ones_like(r)

    def _time_at(self, ratio: Any) -> Any:
        return self._noisiness(1.0 / (1.0 + ratio))  # the reversal is its own inverse


@dataclasses.dataclass(frozen=True)
class Cosine(_UnitTime):
    """The variance-preserving cosine path (GVP in SiT): alpha = cos(pi t / 2), sigma = sin(pi t / 2); t in [0, 1].

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

    def coefficients(self, t: Any) -> tuple[Any, Any]:
        angle = self._noisiness(t) * (math.pi / 2)
        return ops.cos(angle), ops.sin(angle)

    def _derivatives(self, r: Any) -> tuple[Any, Any]:
        angle = r * (math.pi / 2)
        return -(math.pi / 2) * ops.sin(angle), (math.pi / 2) * ops.cos(angle)

    def _time_at(self, ratio: Any) -> Any:
        return self._noisiness((2 / math.pi) * ops.arctan2(ops.ones_like(ratio), ratio))


def _ddpm_alphas_cumprod(steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> tuple[float, ...]:
    betas = (first + (last - first) * i / (steps - 1) for i in range(steps))
    return tuple(itertools.accumulate((1.0 - beta for beta in betas), lambda a, b: a * b))


@dataclasses.dataclass(frozen=True)
class Discrete(Path):
    """A discrete diffusion of T integer steps, 0 the cleanest: alpha = sqrt(abar_t), sigma = sqrt(1 - abar_t).

    Args:
        alphas_cumprod: abar, T numbers that fall from (nearly) 1 toward 0. Default: DiT's and DDPM's 1000 steps with
            betas rising linearly from 1e-4 to 0.02.

    Raises:
        ValueError: fewer than two steps, or numbers that do not fall strictly inside [0, 1].

    Example:
        >>> import selfalign
        >>> path = selfalign.paths.Discrete()
        >>> path.noise_at, round(path.alphas_cumprod[100], 8)
        (999, 0.89514159)

    Reference: Ho et al., "DDPM", 2020, arXiv 2006.11239; Peebles and Xie, "DiT", 2022, arXiv 2212.09748.
    """

    name: ClassVar[str] = "discrete"
    discrete: ClassVar[bool] = True
    alphas_cumprod: tuple[float, ...] = _ddpm_alphas_cumprod()
    _tables: ClassVar[tuple[tuple[float, ...], tuple[float, ...]]]  # of alpha and sigma; of the object, but no setting

    def __post_init__(self) -> None:
        values = tuple(float(a) for a in self.alphas_cumprod)
        falls = all(1.0 >= a > b >= 0.0 for a, b in itertools.pairwise(values))
        if len(values) < 2 or not falls:
            raise invalid("alphas_cumprod must be at least two numbers that fall strictly inside [0, 1]",
                          f"{len(values)} numbers, {values[:3]} ... {values[-1:]}",
                          "Pass the cumulative product of 1 - beta, step 0 first.")  # fmt: skip
        # roots in float64: 1 - abar loses four digits of sigma in float32 at the clean end
        tables = tuple(map(math.sqrt, values)), tuple(math.sqrt(1.0 - a) for a in values)
        keep(self, alphas_cumprod=values, _tables=tables)

    @property
    def clean_at(self) -> int:
        return 0

    @property
    def span(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def noise_at(self) -> int:
        return len(self.alphas_cumprod) - 1

    def coefficients(self, t: Any) -> tuple[Any, Any]:
        alpha, sigma = map(constant, self._tables)
        return ops.take(alpha, t), ops.take(sigma, t)

    def rates(self, t: Any) -> tuple[Any, Any]:
        alpha, sigma = self.coefficients(t)
        return -sigma, alpha

    def toward_data(self, t: Any, gap: Any) -> Any:
        return ops.maximum(t - gap, 0)


@dataclasses.dataclass(frozen=True)
class EDM(Path):
    """EDM's variance-exploding path, whose time is the noise level itself: x = x0 + sigma noise, t = sigma > 0.

    A gap is a share of ln(sigma_max / sigma_min), the axis on which EDM's network sees noise: moving by `gap` toward the
    data divides sigma by e^gap.

    Args:
        sigma_min: the clean end; no gap moves past it. A student below it keeps its own sigma.
        sigma_max: the noisy end.

    Example:
        >>> import selfalign
        >>> float(selfalign.paths.EDM().snr(0.5))
        4.0

    Reference: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022, arXiv 2206.00364.
    """

    name: ClassVar[str] = "edm"
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        low = check_number("sigma_min", self.sigma_min, 1e-30)
        high = check_number("sigma_max", self.sigma_max, low * 1.001, fix="sigma_max must exceed sigma_min.")
        keep(self, sigma_min=low, sigma_max=high)

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

    def coefficients(self, t: Any) -> tuple[Any, Any]:
        t = widened(t)
        return ops.ones_like(t), t

    def rates(self, t: Any) -> tuple[Any, Any]:
        t = widened(t)
        return ops.zeros_like(t), ops.ones_like(t)

    def toward_data(self, t: Any, gap: Any) -> Any:
        return ops.minimum(t, ops.maximum(t * ops.exp(-gap), self.sigma_min))

    def _time_at(self, ratio: Any) -> Any:
        return 1.0 / ops.maximum(ratio, _TINY)


KINDS: dict[str, Any] = {path.name: path for path in (Linear, Cosine, Discrete, EDM)}


def resolve(path: Any) -> Path:
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
    return build("path", KINDS, path if isinstance(path, dict) else {"name": path})
