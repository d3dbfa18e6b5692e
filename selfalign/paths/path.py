"""What a noise path is: how a clean sample turns into noise, and which end of time is which."""

from __future__ import annotations

from typing import Any, ClassVar

from .._backend import dtype_of, extremes, on_backend, ops, widened
from .._checks import changed_fields, check_array, check_choice, check_switch, invalid
from ..typing import Draws, Settings, Tensor, Times
from .conventions import Convention, with_rounding
from .snr import SignalToNoise


class Path(SignalToNoise):
    """Base of the noise paths: x_t = alpha(t) x0 + sigma(t) noise.

    A path of your own gives `coefficients`, `rates`, `toward_data` and the attributes below.

    Attributes:
        name: the name under which `SRALoss` takes the path and its settings are saved.
        discrete: whether times are integer steps.
        noise_at: the time of noise.
        clean_at: the time of data.
        bounds: (lowest, highest) time allowed.
        span: the length of the time axis, in the unit of `toward_data`; a gap is a fraction of it.

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

    # What a kind of path says

    def coefficients(self, t: Times) -> tuple[Tensor, Tensor]:
        """alpha(t) and sigma(t), of the shape of `t`."""
        raise NotImplementedError

    def rates(self, t: Times) -> tuple[Tensor, Tensor]:
        """The weights of x0 and noise in the velocity target, of the shape of `t`."""
        raise NotImplementedError

    def toward_data(self, t: Times, gap: Tensor) -> Times:
        """`t` moved by `gap` toward the data and never past `clean_at`. No checks."""
        raise NotImplementedError

    def gap(self, u: Draws, largest: float) -> Tensor:
        """Gaps from draws `u` in [0, 1): uniform in [0, largest), in the unit of `toward_data`."""
        return widened(u) * largest

    def times_from(self, u: Draws) -> Times:
        """`draw_times`, for tensors of the backend: uniform over the path."""
        low, high = self.bounds
        return low + (high - low) * u

    def time_conventions(self) -> tuple[tuple[Convention, ...], ...]:
        """The usual ways in which a model is told the time, as functions of the path's own time.

        Groups of them: a later group is asked only where none of an earlier one fits.
        """
        return with_rounding(lambda t: t)

    def reversed(self) -> Path | None:
        """The same path with its time running the other way, where there is such a one."""
        return None

    # What all paths do

    @on_backend
    def draw_times(self, u: Draws) -> Times:
        """Times for training from draws `u` [B] in [0, 1): uniform; on EDM's path as in EDM.

        Example:
            >>> import numpy as np, selfalign
            >>> float(selfalign.paths.Linear().draw_times(np.array([0.25]))[0])
            0.25
        """
        _check_draws(u, None)
        return self.times_from(u)

    @on_backend
    def add_noise(self, x0: Tensor, noise: Tensor, t: Times) -> Tensor:
        """The noisy sample, x_t = alpha(t) x0 + sigma(t) noise.

        Args:
            x0: clean samples [B, ...], floating point.
            noise: standard normal noise of the shape of `x0`.
            t: times [B] on this path.

        Returns:
            x_t in the shape and dtype of `x0`; computed in float32 at least.

        Raises:
            ValueError: shapes that differ, an empty batch, `t` not of shape [B] or outside the
                path.
            TypeError: `t` of the wrong kind (integer steps or continuous), or tensors of another
                framework.

        Example:
            >>> import numpy as np, selfalign
            >>> x0, noise, t = np.zeros((2, 3)), np.ones((2, 3)), np.array([0.25, 1.0])
            >>> x_t = selfalign.paths.Linear().add_noise(x0, noise, t)
            >>> float(x_t[0, 0]), float(x_t[1, 0])
            (0.25, 1.0)

        Reference: Ma et al., "SiT", 2024, arXiv 2401.08740, section 2.
        """
        self._check_sample(x0, noise, t)
        return _mix(self.coefficients(t), x0, noise)

    @on_backend
    def noised(self, x0: Tensor, noise: Tensor, t: Times) -> Tensor:
        """`add_noise` without its checks, for adapters that have made them.

        Example:
            >>> import keras, selfalign
            >>> x0, noise, t = keras.ops.zeros((1, 2)), keras.ops.ones((1, 2)), keras.ops.ones(1)
            >>> float(selfalign.paths.Linear().noised(x0, noise, t)[0, 0])
            1.0
        """
        return _mix(self.coefficients(t), x0, noise)

    @on_backend
    def add_less_noise(
        self,
        x0: Tensor,
        noise: Tensor,
        t: Times,
        u: Draws | None,
        largest: float,
        random_gap: bool = True,
    ) -> tuple[Tensor, Times]:
        """What a teacher sees, for adapters: the sample at its own, less noisy time.

        The noisy sample [B, ...] and the teacher's times [B]; u and random_gap as in
        `selfalign.teacher_time`, `largest` from `gap_range`. Raises what these raise.

        Example:
            >>> import numpy as np, selfalign
            >>> path, x0, noise = selfalign.paths.Linear(), np.zeros((1, 2)), np.ones((1, 2))
            >>> x, t = path.add_less_noise(x0, noise, np.array([0.75]), np.array([0.5]), 0.5)
            >>> float(x[0, 0]), float(t[0])
            (0.5, 0.5)
        """
        self._check_sample(x0, noise, t)
        moved = self.moved(t, u, largest, random_gap)
        return _mix(self.coefficients(moved), x0, noise), moved

    @on_backend
    def velocity(self, x0: Tensor, noise: Tensor, t: Times) -> Tensor:
        """The velocity target: dx_t/dt; on discrete paths v-prediction, alpha noise - sigma x0.

        Args, errors and result as in `add_noise`. It points along the path's own time: toward noise
        where noise is at the larger t, else toward data.

        Example:
            >>> import numpy as np, selfalign
            >>> x0, noise, t = np.ones((1, 2)), np.zeros((1, 2)), np.array([0.3])
            >>> float(selfalign.paths.Linear().velocity(x0, noise, t)[0, 0])
            -1.0

        Reference: Salimans and Ho, "Progressive Distillation", 2022, arXiv 2202.00512.
        """
        self._check_sample(x0, noise, t)
        return _mix(self.rates(t), x0, noise)

    def target(self, x0: Tensor, noise: Tensor, t: Times, prediction: str = "velocity") -> Tensor:
        """What the model is trained to predict: "velocity", "noise" or "data"; like `x0`.

        Example: `path.target(x0, noise, t, "noise")` is the noise.
        """
        check_choice("prediction", prediction, ("velocity", "noise", "data"))
        self._check_sample(x0, noise, t)
        if prediction == "velocity":
            return self.velocity(x0, noise, t)
        return noise if prediction == "noise" else x0

    def settings(self) -> Settings:
        """The path as a plain dict that `selfalign.paths.resolve` takes back."""
        return {"name": self.name} | changed_fields(self)

    def moved(self, t: Times, u: Draws | None, largest: float, random_gap: bool) -> Times:
        """Times `t`, which are checked, moved toward the data; see `selfalign.teacher_time`."""
        # a gap may not fit into an 8-bit t
        start = ops.cast(t, "int32") if self.discrete else widened(t)
        if not isinstance(random_gap, bool):
            random_gap = check_switch("random_gap", random_gap)
        if random_gap:
            _check_draws(u, t)
            gap = self.gap(u, largest)
        else:
            gap = ops.full_like(start, largest)
        return ops.cast(self.toward_data(start, gap), dtype_of(t))

    # Checks

    def check_times(self, t: Times, batch: int | None = None) -> None:
        """Times of one sample each, [B], of the path's kind and inside it: raises otherwise.

        Values are read only where that is free: traced times and times on a GPU pass.
        """
        shape = tuple(getattr(t, "shape", ()))
        received = f"shape {shape}"
        if len(shape) != 1 or (batch is not None and shape != (batch,)):
            expected = "[B]" if batch is None else f"[B] = ({batch},)"
            rule = f"t must hold one time per sample, shape {expected}"
            raise invalid(rule, received, "Pass a vector of times.")
        if shape == (0,):
            raise invalid(
                "t must not be empty", received, "Skip empty batches in the training loop."
            )
        self._check_values(t)

    def _check_values(self, t: Tensor) -> None:
        """Times of any shape: of the path's kind and inside it."""
        dtype = dtype_of(t)
        if not dtype.startswith(("int", "uint") if self.discrete else ("float", "bfloat")):
            kind = "integer steps" if self.discrete else "floating-point times"
            raise TypeError(
                f"The {self.name} path takes {kind}. Received: t of dtype {dtype}. Check which "
                "path the model is trained with, and the scale of its time."
            )
        found = extremes(t)
        low, high = self.bounds
        if found is not None and not (low <= found[0] and found[1] <= high):
            raise invalid(
                f"t must lie in [{low:g}, {high:g}]",
                f"values from {found[0]:g} to {found[1]:g}",
                f"The {self.name} path counts time in [{low:g}, {high:g}]: check the model's time "
                "scale.",
            )

    def _check_sample(self, x0: Tensor, noise: Tensor, t: Times) -> None:
        if not (hasattr(x0, "shape") and hasattr(noise, "shape")):
            check_array("x0", x0)
            check_array("noise", noise)
        shape = tuple(x0.shape)
        if shape != tuple(noise.shape) or not shape:
            raise invalid(
                "x0 and noise must have the same shape [B, ...]",
                f"x0 {shape}, noise {tuple(noise.shape)}",
                "Draw the noise like x0.",
            )
        self.check_times(t, batch=shape[0])
        for name, given in (("x0", x0), ("noise", noise)):
            dtype = dtype_of(given)
            if "float" not in dtype:
                raise TypeError(
                    f"{name} must be floating point. Received: dtype {dtype}. Scale images to "
                    "floats first."
                )


def _mix(weights: tuple[Tensor, Tensor], x0: Tensor, noise: Tensor) -> Tensor:
    """The weighted sum of sample and noise, in the dtype of `x0`."""
    over_axes = (slice(None), *[None] * (len(x0.shape) - 1))  # [B] -> [B, 1, ...]
    a = weights[0][over_axes]
    b = weights[1][over_axes]
    return ops.cast(a * widened(x0) + b * widened(noise), dtype_of(x0))


def _check_draws(u: Draws | None, t: Times | None) -> None:
    """Uniform draws in [0, 1), one for each time in `t`; of any shape where that is None."""
    if u is None or not hasattr(u, "shape") or (t is not None and u.shape != t.shape):
        received: Any = tuple(u.shape) if u is not None and hasattr(u, "shape") else f"{u!r:.60}"
        raise invalid(
            "u must hold one draw per sample, of t's shape",
            f"u {received}, t {tuple(getattr(t, 'shape', ()))}",
            "Draw u like t: uniform in [0, 1).",
        )
    dtype = dtype_of(u)
    if "float" not in dtype:
        raise TypeError(
            f"u must be floating point. Received: dtype {dtype}. Draw u uniform in [0, 1)."
        )
    found = extremes(u)
    if found is not None and not (found[0] >= 0.0 and found[1] <= 1.0):
        raise invalid(
            "u must lie in [0, 1]",
            f"values from {found[0]:g} to {found[1]:g}",
            "Draw u uniform in [0, 1): the loss scales it to the gap.",
        )
