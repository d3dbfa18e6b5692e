"""Distances between student and target: in float32, 0 when aligned, never negative."""

from __future__ import annotations

from collections.abc import Callable

from ._backend import on_backend, ops
from ._checks import check_array, check_choice, check_number, invalid
from ._tokens import check_features as check_features
from ._tokens import cosine_of
from .masks import masked_mean as masked_mean
from .typing import Distance, Tensor, Tokens


def check_tokens(student: Tokens, target: Tokens) -> None:
    """Student and target tokens: both [B, N, D], of one shape; see `check_features`.

    Example:
        >>> import numpy as np, selfalign
        >>> selfalign.distances.check_tokens(np.ones((2, 3, 4)), np.ones((2, 3, 4)))
    """
    check_features("student", student)
    check_features("target", target)
    check_same_shape(student, target)


def check_same_shape(student: Tokens, target: Tokens) -> None:
    """Tokens of one shape on both sides: raises ValueError otherwise.

    Example:
        >>> import numpy as np, selfalign
        >>> selfalign.distances.check_same_shape(np.ones((2, 3, 4)), np.ones((2, 3, 4)))
    """
    check_array("The student's tokens", student)
    check_array("The target's tokens", target)
    if tuple(student.shape) != tuple(target.shape):
        raise invalid(
            "Student and target tokens must have the same shape [B, N, D]",
            f"student {tuple(student.shape)}, target {tuple(target.shape)}",
            "Align the same tokens of the same batch, and give the head the target's width.",
        )


def _both_ways(student: Tokens, target: Tokens, axis: int) -> Tensor:
    """`cosine_of`, with a gradient in proportion on both sides."""
    values = cosine_of(student, ops.stop_gradient(target), axis)
    back = cosine_of(target, ops.stop_gradient(student), axis)
    return values + (back - ops.stop_gradient(back))


def _smooth_l1(student: Tokens, target: Tokens, beta: float) -> Tensor:
    d = ops.abs(student - target)
    parabola = ops.square(ops.minimum(d, beta)) / (2 * beta)  # what is not taken fits, too
    return ops.mean(ops.where(d < beta, parabola, d - beta / 2), axis=-1)


def _l1(student: Tokens, target: Tokens) -> Tensor:
    d = student - target
    # |d|; frameworks differ in the gradient of abs at 0
    return ops.mean(d * ops.stop_gradient(ops.sign(d)), axis=-1)


def _l2(student: Tokens, target: Tokens) -> Tensor:
    return ops.mean(ops.square(student - target), axis=-1)


def _float32(student: Tokens, target: Tokens) -> tuple[Tokens, Tokens]:
    check_tokens(student, target)
    return ops.cast(student, "float32"), ops.cast(target, "float32")


@on_backend
def cosine(student: Tokens, target: Tokens) -> Tensor:
    """Cosine distance over the features of each token, 1 - cos(student_i, target_i).

    Args:
        student: tokens [B, N, D].
        target: tokens [B, N, D].

    Returns:
        Distances [B, N] in [0, 2], float32; unchanged when a token of either side is scaled, also
        where its squares do not fit into float32. A token of norm zero (below 8e-34) has no
        direction: it is at 0 from another zero token and at 0.5 from every other. The gradient
        grows as 1 / norm; a token shorter than a fiftieth of the usual gets that of the usual norm.

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
    return _both_ways(*_float32(student, target), axis=-1)


def cosine_distances(student: Tokens, target: Tokens) -> Tensor:
    """`cosine`, for tokens that are checked.

    Example:
        >>> import keras, selfalign
        >>> tokens = keras.ops.ones((1, 2, 3))
        >>> float(selfalign.distances.cosine_distances(tokens, tokens)[0, 0])
        0.0
    """
    return cosine_of(ops.cast(student, "float32"), ops.cast(target, "float32"), axis=-1)


@on_backend
def token_axis_cosine(student: Tokens, target: Tokens) -> Tensor:
    """Cosine distance over the tokens of each feature, [B, D]: what the authors' code computes.

    Not a distance between tokens: a default argument made it so. It is here to reproduce their
    runs, as the recipe "official-2026-07" does. Args, errors and range as in `cosine`.

    Example:
        >>> import numpy as np, selfalign
        >>> tokens = np.ones((2, 3, 4))
        >>> selfalign.distances.token_axis_cosine(tokens, tokens).shape == (2, 4)
        True
    """
    return _both_ways(*_float32(student, target), axis=1)


@on_backend
def smooth_l1(student: Tokens, target: Tokens, beta: float = 0.05) -> Tensor:
    """Smooth L1: d^2 / (2 beta) where d < beta, else d - beta / 2; the mean over features.

    Args:
        student: tokens [B, N, D]; d = |student - target|.
        target: tokens [B, N, D].
        beta: where the parabola ends, in units of the features; larger than 0.

    Returns:
        Distances [B, N], float32.

    Raises:
        ValueError, TypeError: as in `cosine`, or `beta` not above 0.

    Example:
        >>> import numpy as np, selfalign
        >>> x, y = np.full((1, 1, 2), 0.1), np.zeros((1, 1, 2))
        >>> round(float(selfalign.distances.smooth_l1(x, y)[0, 0]), 6)
        0.075

    Reference: the paper's distance, Jiang et al., SRA, 2025, arXiv 2505.02831. It grows with the
    features' norm, which users of large models report as divergence: prefer `cosine`.
    """
    check_number("beta", beta, 1e-12, fix="The paper takes 0.05.")
    return _smooth_l1(*_float32(student, target), beta)


@on_backend
def l1(student: Tokens, target: Tokens) -> Tensor:
    """Mean absolute difference over the features of each token, [B, N].

    Args and errors as in `cosine`.

    Example:
        >>> import numpy as np, selfalign
        >>> float(selfalign.distances.l1(np.full((1, 1, 2), 0.5), np.zeros((1, 1, 2)))[0, 0])
        0.5
    """
    return _l1(*_float32(student, target))


@on_backend
def l2(student: Tokens, target: Tokens) -> Tensor:
    """Mean squared difference over the features of each token, [B, N].

    Args and errors as in `cosine`.

    Example:
        >>> import numpy as np, selfalign
        >>> float(selfalign.distances.l2(np.full((1, 1, 2), 0.5), np.zeros((1, 1, 2)))[0, 0])
        0.25
    """
    return _l2(*_float32(student, target))


# The arithmetic behind the names, for tokens that are checked and in float32.
DISTANCES: dict[str, Callable[..., Tensor]] = {
    "cosine": cosine_of,
    "smooth_l1": _smooth_l1,
    "l1": _l1,
    "l2": _l2,
    "token_axis_cosine": lambda student, target: ops.mean(
        cosine_of(student, target, axis=1), axis=1
    ),
}


# A function of this module, passed as a distance, means its name.
_NAMES = {function: name for name, function in list(globals().items()) if name in DISTANCES}


def checked(distance: str | Distance) -> str | Distance:
    """A name in `DISTANCES`, or a function of the user's.

    Raises:
        ValueError: another name.

    Example:
        >>> import selfalign
        >>> selfalign.distances.checked(selfalign.distances.cosine)
        'cosine'
    """
    if callable(distance):
        return _NAMES.get(distance, distance) if hasattr(distance, "__name__") else distance
    check_choice("distance", distance, tuple(DISTANCES))
    return distance
