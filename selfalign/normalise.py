"""Normalisation of targets: what all tokens have in common is taken out before they are compared.

In a small model most of the similarity between two layers is what the position alone tells. A
target that is normalised asks the student for the rest.
"""

from __future__ import annotations

from collections.abc import Callable

from ._backend import on_backend, ops, widened
from ._checks import check_choice, invalid
from ._tokens import scale
from .distances import check_features
from .masks import check_mask, weights_of
from .typing import Mask, Tensor, Tokens

_EPSILON = 1e-6  # added to a standard deviation; a feature that never changes becomes 0


@on_backend
def standardise(target: Tokens, mask: Mask = None) -> Tokens:
    """Each feature with mean 0 and standard deviation 1 over the batch and its tokens.

    Args:
        target: tokens [B, N, D]; at least two of them.
        mask: samples [B] or tokens [B, N] that count, as booleans or weights; None: all.

    Returns:
        Tokens [B, N, D], float32 at least.

    Raises:
        ValueError: a single token, which has no deviation; tokens or a mask of another shape.

    Example:
        >>> import numpy as np, selfalign
        >>> target = np.array([[[1.0], [3.0]]], "float32")
        >>> [round(float(x), 4) for x in selfalign.normalise.standardise(target)[0, :, 0]]
        [-1.0, 1.0]
    """
    check_features("target", target)
    check_mask(mask, tuple(target.shape)[:2])
    return _standardise(target, mask)


def _standardise(target: Tokens, mask: Mask) -> Tokens:
    shape = tuple(target.shape)
    if shape[:2] == (1, 1):
        raise invalid(
            'normalise="standardise" needs at least two tokens',
            f"target tokens of shape {shape}",
            'Pass normalise="none".',
        )
    target = widened(target)
    target = target * _scale(target, mask, axes=(0, 1))
    centred = target - _mean(target, mask, axes=(0, 1))
    squares = ops.square(_counted(centred, mask))
    deviation = ops.sqrt(_mean(squares, mask, axes=(0, 1)))
    return centred / (deviation + _EPSILON)


@on_backend
def centre(target: Tokens, mask: Mask = None) -> Tokens:
    """Each place's mean over the batch subtracted: what the position alone tells is gone.

    Args:
        target: tokens [B, N, D] of at least two samples.
        mask: samples [B] or tokens [B, N] that count, as booleans or weights; None: all.

    Returns:
        Tokens [B, N, D], float32 at least.

    Raises:
        ValueError: a batch of one sample, which would become 0; tokens or a mask of another shape.

    Example:
        >>> import numpy as np, selfalign
        >>> target = np.array([[[1.0]], [[3.0]]], "float32")
        >>> [float(x) for x in selfalign.normalise.centre(target)[:, 0, 0]]
        [-1.0, 1.0]
    """
    check_features("target", target)
    check_mask(mask, tuple(target.shape)[:2])
    return _centre(target, mask)


def _centre(target: Tokens, mask: Mask) -> Tokens:
    shape = tuple(target.shape)
    if shape[0] == 1:
        raise invalid(
            'normalise="centre" needs a batch of at least two samples',
            f"target tokens of shape {shape}",
            'Enlarge the batch, or pass normalise="none".',
        )
    target = widened(target)
    factor = _scale(target, mask, axes=(0,))
    return target - _mean(target * factor, mask, axes=(0,)) / factor


def _scale(values: Tensor, mask: Mask, axes: tuple[int, ...]) -> Tensor:
    """Factors of at most 1 by which squares of the values that count fit into float32."""
    factor = ops.minimum(scale(_counted(values, mask), axes), 1.0)
    return ops.cast(factor, values.dtype)


def _mean(values: Tensor, mask: Mask, axes: tuple[int, ...]) -> Tensor:
    """The mean over `axes`, which are kept; weighted by the mask."""
    if mask is None:
        return ops.mean(values, axis=axes, keepdims=True)
    weights = _weights(values, mask)
    total = ops.sum(weights, axis=axes, keepdims=True)
    weighted = ops.sum(_counted(values, mask) * weights, axis=axes, keepdims=True)
    return weighted / ops.where(total == 0, 1.0, total)


def _weights(values: Tensor, mask: Tensor) -> Tensor:
    """The weights of the mask [B, N, 1]."""
    weights = ops.cast(weights_of(mask), values.dtype)
    missing = 3 - len(mask.shape)
    weights = ops.reshape(weights, (*ops.shape(mask), *[1] * missing))
    return weights * ops.ones_like(values[..., :1])


def _counted(values: Tensor, mask: Mask) -> Tensor:
    """0 in place of the values that the mask leaves out, however large they are."""
    if mask is None:
        return values
    return ops.where(_weights(values, mask) == 0, ops.zeros_like(values), values)


# What the names mean, for tokens of the backend.
NORMALISATIONS: dict[str, Callable[[Tokens, Mask], Tokens] | None] = {
    "none": None,
    "standardise": _standardise,
    "centre": _centre,
}


def check_normalisation(name: str) -> None:
    """`name` is a key of `NORMALISATIONS`: raises ValueError otherwise.

    Example:
        >>> import selfalign
        >>> selfalign.normalise.check_normalisation("centre")
    """
    check_choice("normalise", name, tuple(NORMALISATIONS))
