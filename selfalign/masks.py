"""Means of which a mask leaves samples or tokens out."""

from __future__ import annotations

import math

from ._backend import dtype_of, extremes, is_floating, on_backend, ops
from ._checks import check_array, invalid
from ._tokens import scale
from .typing import Mask, Scalar, Tensor


@on_backend
def masked_mean(values: Tensor, mask: Mask = None) -> Scalar:
    """Mean of the distances `values` [B, N], weighted by a mask over samples [B] or tokens [B, N].

    Args:
        values: distances [B, N], or [B] of a distance that does not tell tokens apart.
        mask: None, or booleans or weights [B] or, for values [B, N], of their shape; 0 leaves a
            token out. A token that is left out must still be finite: a NaN stays visible. Where
            everything is left out the mean is 0.

    Returns:
        A scalar in the dtype of `values`.

    Raises:
        ValueError: a mask of another shape, or weights that are negative or not finite.
        TypeError: a mask that is no tensor of booleans or numbers.

    Example:
        >>> import numpy as np, selfalign
        >>> values = np.array([[1.0, 3.0], [5.0, 7.0]])
        >>> float(selfalign.masks.masked_mean(values, np.array([True, False])))
        2.0
    """
    check_array("values", values)
    if not is_floating(values) or len(values.shape) not in (1, 2) or 0 in values.shape:
        raise invalid(
            "values must be floating point, of the shape [B, N] or [B], and not empty",
            f"shape {tuple(values.shape)} of dtype {dtype_of(values)}",
            "Reduce over the features first.",
        )
    check_mask(mask, tuple(values.shape))
    return mean_over_mask(values, mask)


def mean_over_mask(values: Tensor, mask: Mask) -> Scalar:
    """`masked_mean`, for tensors of the backend; of the mask only the shape is checked.

    Example:
        >>> import numpy as np, selfalign
        >>> float(selfalign.masks.mean_over_mask(np.array([[1.0, 3.0]]), None))
        2.0
    """
    if mask is None:
        return ops.mean(values)
    _check_shape(mask, tuple(values.shape))
    weights = weights_of(mask)
    if len(mask.shape) < len(values.shape):
        values = ops.mean(values, axis=1)
    total = ops.sum(weights)
    return ops.sum(values * weights) / ops.where(total == 0, 1.0, total)


def weights_of(mask: Tensor) -> Tensor:
    """The weights that a mask stands for, up to a common factor, in float32.

    Where a weight is negative all of them are NaN, so that it stays visible where nobody can look.

    Example:
        >>> import keras, selfalign
        >>> [float(x) for x in selfalign.masks.weights_of(keras.ops.array([True, False]))]
        [1.0, 0.0]
    """
    weights = ops.cast(mask, "float32")
    if dtype_of(mask) == "bool":
        return weights
    weights = weights * scale(weights, axis=tuple(range(len(mask.shape))))
    return weights + 0.0 * ops.sqrt(ops.stop_gradient(ops.min(weights)))


def check_mask(mask: Mask, shape: tuple[int, ...]) -> None:
    """A mask for values of `shape`, [B, N] or [B]: raises otherwise.

    Weights are read only where that is free: traced ones and those on a GPU pass.

    Raises:
        ValueError: a mask of another shape, or weights that are negative or not finite.
        TypeError: no tensor, or one that holds no numbers.

    Example:
        >>> import numpy as np, selfalign
        >>> selfalign.masks.check_mask(np.ones(2), (2, 3))
    """
    if mask is None:
        return
    check_array("mask", mask)
    _check_shape(mask, shape)
    dtype = dtype_of(mask)
    if dtype == "bool":
        return
    if not dtype.startswith(("float", "bfloat", "int", "uint")):
        raise TypeError(
            f"mask must hold booleans or weights. Received: dtype {dtype}. Pass booleans, or real "
            "numbers of at least 0."
        )
    check_weights(extremes(mask))


def check_weights(found: tuple[float, float] | None) -> None:
    """Weights from the smallest to the largest that was found: raises unless they are weights.

    Example:
        >>> import selfalign
        >>> selfalign.masks.check_weights((0.0, 1.0))
    """
    if found is not None and not (found[0] >= 0 and found[1] < math.inf):
        raise invalid(
            "mask must hold booleans, or finite weights of at least 0",
            f"values from {found[0]:g} to {found[1]:g}",
            "Pass 0 where a sample or token is to be left out.",
        )


def _check_shape(mask: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(mask.shape) not in (shape, shape[:1]):
        raise invalid(
            "mask must have the shape [B] (samples) or [B, N] (tokens)",
            f"{tuple(mask.shape)}, for distances of shape {shape}",
            "Give one value for each sample of the batch, or for each of its tokens. With a "
            "distance that does not tell tokens apart, such as the token-axis cosine, only a mask "
            "over samples has a meaning.",
        )
