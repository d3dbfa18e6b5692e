"""Means of which a mask leaves samples or tokens out."""

from __future__ import annotations

from ._backend import on_backend, ops
from ._checks import check_array, invalid
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
        ValueError: a mask of another shape.

    Example:
        >>> import numpy as np, selfalign
        >>> values = np.array([[1.0, 3.0], [5.0, 7.0]])
        >>> float(selfalign.masks.masked_mean(values, np.array([True, False])))
        2.0
    """
    return mean_over_mask(values, mask)


def mean_over_mask(values: Tensor, mask: Mask) -> Scalar:
    """`masked_mean`, for tensors of the backend.

    Example:
        >>> import numpy as np, selfalign
        >>> float(selfalign.masks.mean_over_mask(np.array([[1.0, 3.0]]), None))
        2.0
    """
    if mask is None:
        return ops.mean(values)
    check_mask(mask, tuple(values.shape))
    shape = tuple(mask.shape)
    weights = ops.cast(mask, "float32")
    if len(shape) < len(values.shape):
        values = ops.mean(values, axis=1)
    total = ops.sum(weights)
    return ops.sum(values * weights) / ops.where(total == 0, 1.0, total)


def check_mask(mask: Mask, shape: tuple[int, ...]) -> None:
    """A mask for values of `shape`, [B, N] or [B]: raises otherwise.

    Raises:
        ValueError: a mask of another shape.
        TypeError: no tensor.

    Example:
        >>> import numpy as np, selfalign
        >>> selfalign.masks.check_mask(np.ones(2), (2, 3))
    """
    if mask is None:
        return
    check_array("mask", mask)
    if tuple(mask.shape) not in (shape, shape[:1]):
        raise invalid(
            "mask must have the shape [B] (samples) or [B, N] (tokens)",
            f"{tuple(mask.shape)}, for distances of shape {shape}",
            "With a distance that does not tell tokens apart, such as the token-axis cosine, only "
            "a mask over samples has a meaning.",
        )
