"""Distances between student and teacher tokens: per token, in float32, 0 when aligned, never negative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ._backend import on_backend, ops
from ._checks import check_array, check_number, check_tokens, invalid

_EPSILON = 1e-12  # floor of a squared norm: features shorter than 1e-6 count as zero


def _unit(tokens: Any, axis: int) -> Any:
    return tokens * ops.rsqrt(ops.maximum(ops.sum(ops.square(tokens), axis=axis, keepdims=True), _EPSILON))


def _cosine(student: Any, teacher: Any, axis: int) -> Any:
    # Half the squared distance of unit vectors is 1 - cos, but exactly 0 for equal inputs and never below 0.
    return 0.5 * ops.sum(ops.square(_unit(student, axis) - _unit(teacher, axis)), axis=axis)


def _float32(student: Any, teacher: Any) -> tuple[Any, Any]:
    check_tokens(student, teacher)
    return ops.cast(student, "float32"), ops.cast(teacher, "float32")


@on_backend
def cosine(student: Any, teacher: Any) -> Any:
    """Cosine distance over the features of each token, 1 - cos(student_i, teacher_i).

    Args:
        student: tokens [B, N, D].
        teacher: tokens [B, N, D].

    Returns:
        Distances [B, N] in [0, 2], float32; unchanged when a token of either side is scaled. A token of norm zero has no
        direction: it is at 0 from another zero token and at 0.5 from every other.

    Raises:
        ValueError: tokens not of one shape [B, N, D], or empty.
        TypeError: integer tokens, or tensors of another framework.

    Example:
        >>> import numpy as np, selfalign
        >>> x, y = np.array([[[1.0, 0.0]]]), np.array([[[0.0, 5.0]]])
        >>> float(selfalign.distances.cosine(x, y)[0, 0])
        1.0

    Reference: the authors' later advice for SRA (arXiv 2505.02831); REPA, arXiv 2410.06940.
    """
    return _cosine(*_float32(student, teacher), axis=-1)


@on_backend
def token_axis_cosine(student: Any, teacher: Any) -> Any:
    """Cosine distance over the tokens of each feature, [B, D]: what the authors' code computes (a default argument).

    Not a distance between tokens: it is here to reproduce their runs, under the recipe name "official-2026-07" only.
    Args, errors and range as in `cosine`.

    Example:
        >>> import numpy as np, selfalign
        >>> selfalign.distances.token_axis_cosine(np.ones((2, 3, 4)), np.ones((2, 3, 4))).shape == (2, 4)
        True
    """
    return _cosine(*_float32(student, teacher), axis=1)


@on_backend
def smooth_l1(student: Any, teacher: Any, beta: float = 0.05) -> Any:
    """Smooth L1: d^2 / (2 beta) where d < beta, else d - beta / 2, with d = |student - teacher|; mean over features.

    Args:
        student: tokens [B, N, D].
        teacher: tokens [B, N, D].
        beta: where the parabola ends, in units of the features; larger than 0.

    Returns:
        Distances [B, N], float32.

    Raises:
        ValueError, TypeError: as in `cosine`, or `beta` not above 0.

    Example:
        >>> import numpy as np, selfalign
        >>> round(float(selfalign.distances.smooth_l1(np.full((1, 1, 2), 0.1), np.zeros((1, 1, 2)))[0, 0]), 6)
        0.075

    Reference: the paper's distance, Jiang et al., SRA, 2025, arXiv 2505.02831. It grows with the features' norm, which users
    of large models report as divergence: prefer `cosine`.
    """
    check_number("beta", beta, 1e-12, fix="The paper takes 0.05.")
    student, teacher = _float32(student, teacher)
    d = ops.abs(student - teacher)
    return ops.mean(ops.where(d < beta, ops.square(d) / (2 * beta), d - beta / 2), axis=-1)


@on_backend
def l1(student: Any, teacher: Any) -> Any:
    """Mean absolute difference over the features of each token, [B, N]. Args and errors as in `cosine`.

    Example:
        >>> import numpy as np, selfalign
        >>> float(selfalign.distances.l1(np.full((1, 1, 2), 0.5), np.zeros((1, 1, 2)))[0, 0])
        0.5
    """
    student, teacher = _float32(student, teacher)
    d = student - teacher
    return ops.mean(d * ops.stop_gradient(ops.sign(d)), axis=-1)  # |d|; frameworks differ in the gradient of abs at 0


@on_backend
def l2(student: Any, teacher: Any) -> Any:
    """Mean squared difference over the features of each token, [B, N]. Args and errors as in `cosine`.

    Example:
        >>> import numpy as np, selfalign
        >>> float(selfalign.distances.l2(np.full((1, 1, 2), 0.5), np.zeros((1, 1, 2)))[0, 0])
        0.25
    """
    student, teacher = _float32(student, teacher)
    return ops.mean(ops.square(student - teacher), axis=-1)


NAMES: dict[str, Callable[..., Any]] = {
    "cosine": cosine,
    "smooth_l1": smooth_l1,
    "l1": l1,
    "l2": l2,
    "official-2026-07": token_axis_cosine,
}


@on_backend
def masked_mean(values: Any, mask: Any = None) -> Any:
    """Mean of the distances `values` [B, N], weighted by a mask over samples [B] or tokens [B, N].

    Args:
        values: distances [B, N], or [B, D] from `token_axis_cosine` (sample masks only).
        mask: None, or booleans or weights [B] or [B, N]; 0 leaves a token out. A token that is left out must still be finite:
            a NaN stays visible. Where everything is left out the mean is 0.

    Returns:
        A scalar in the dtype of `values`.

    Raises:
        ValueError: a mask of another shape.

    Example:
        >>> import numpy as np, selfalign
        >>> float(selfalign.distances.masked_mean(np.array([[1.0, 3.0], [5.0, 7.0]]), np.array([True, False])))
        2.0
    """
    if mask is None:
        return ops.mean(values)
    check_array("mask", mask)
    shape = tuple(mask.shape)
    if shape not in (tuple(values.shape), tuple(values.shape)[:1]):
        raise invalid("mask must have the shape [B] (samples) or [B, N] (tokens)",
                      f"{shape}, for distances of shape {tuple(values.shape)}",
                      "With the token-axis cosine only a mask over samples has a meaning.")  # fmt: skip
    mask = ops.cast(mask, "float32")
    if len(shape) == 1:
        values = ops.mean(values, axis=1)
    total = ops.sum(mask)
    return ops.sum(values * mask) / ops.where(total == 0, 1.0, total)
