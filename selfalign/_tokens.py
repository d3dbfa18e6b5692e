"""Tokens: what they must be, and their directions and lengths, whatever their magnitude.

float32 reaches from 1e-38 to 1e38, but the squares of its numbers do not fit into it. And the
gradient of a direction grows as 1 / length: one short token among others would outweigh them all.
"""

from __future__ import annotations

from typing import NamedTuple

from ._backend import dtype_of, extremes, ops
from ._checks import check_array, invalid
from .typing import Tensor, Tokens

# Values whose largest is outside these two are scaled by a power of two, which is exact. Squares,
# and the cubes of inverse lengths in gradients, stay in range.
_SMALL, _LARGE = 2.0**-42, 2.0**32
_ENLARGED, _REDUCED = 2.0**84, 2.0**-74
_TINY = 2.0**-110  # values below it, 8e-34, count as zero: float32 soon has no digits for them

_UNIT = 2.0**10  # of lengths that are compared: a token of many features of 1e38 must fit
_SHORT = 0.02  # of the usual length


def check_features(side: str, tokens: Tokens) -> None:
    """Tokens of one side, "student" or "target": [B, N, D], floating point, not empty.

    Raises:
        ValueError: another shape.
        TypeError: no tensor, or no floating-point numbers.

    Example:
        >>> import numpy as np, selfalign
        >>> selfalign.distances.check_features("student", np.ones((2, 3, 4)))
    """
    if not hasattr(tokens, "shape"):
        check_array(f"The {side}'s tokens", tokens)
    shape = tuple(tokens.shape)
    if len(shape) != 3:
        raise invalid(
            "Tokens must have the shape [B, N, D]",
            f"{side} tokens of shape {shape}",
            "Flatten the token grid, or select the features in the adapter.",
        )
    if 0 in shape:
        raise invalid(
            "Tokens must not be empty",
            f"{side} tokens of shape {shape}",
            "Skip empty batches in the training loop.",
        )
    dtype = dtype_of(tokens)
    if "float" not in dtype:
        raise TypeError(
            f"Tokens must be floating point. Received: {side} tokens of dtype {dtype}. "
            "Pass a block's features, not indices."
        )


def scale(values: Tensor, axis: int | tuple[int, ...]) -> Tensor:
    """Powers of two by which the squares of `values` fit into float32; 1 for ordinary values.

    One for all values along `axis`, which is kept.
    """
    # not ops.max: on torch it ends a compiled graph
    largest = ops.amax(abs(ops.stop_gradient(values)), axis=axis, keepdims=True)
    large = ops.cast(largest > _LARGE, "float32")
    small = ops.cast((largest < _SMALL) & (largest >= _TINY), "float32")
    return (1.0 - large - small) + _REDUCED * large + _ENLARGED * small


class Directions(NamedTuple):
    """Tokens without their lengths.

    Attributes:
        tokens: of length 1; 0 where there is no direction.
        factor: what the tokens were scaled by first.
        inverse: what they were multiplied with then; 1 where there is no direction.
        absent: 1.0 where there is no direction, else 0.0.
        ordinary: whether it is known that all lengths are, in range and beside each other.
    """

    tokens: Tokens
    factor: Tensor | float
    inverse: Tensor
    absent: Tensor | float
    ordinary: bool


def directions(tokens: Tokens, axis: int) -> Directions:
    """The tokens' directions along `axis`.

    Where looking is free and all lengths are ordinary, what makes no difference then is left out.
    """
    squared = _ordinary_squares(tokens, axis)
    if squared is not None:
        inverse = ops.rsqrt(squared)
        return Directions(tokens * inverse, 1.0, inverse, 0.0, True)
    factor = scale(tokens, axis)
    scaled = tokens * factor
    squared = ops.sum(ops.square(scaled), axis=axis, keepdims=True)
    absent = ops.cast(squared == 0, "float32")
    inverse = ops.rsqrt(squared + absent)
    return Directions(scaled * inverse, factor, inverse, absent, False)


def _ordinary_squares(tokens: Tokens, axis: int) -> Tensor | None:
    """The squared lengths, where all are known to be in range, and none to be short."""
    found = extremes(tokens)
    if found is None or not (found[0] > -_LARGE and found[1] < _LARGE):
        return None
    squared = ops.sum(ops.square(tokens), axis=axis, keepdims=True)
    least, most = extremes(squared) or (0.0, 0.0)
    ordinary = least > _SMALL**2 and least > _SHORT**2 * most
    return squared if ordinary else None


def in_proportion(values: Tensor, of: Directions) -> Tensor:
    """`values` as they are, with a gradient in which short tokens count no more than others.

    The usual length is one that three quarters of a sample's tokens do not exceed, in the sample
    where it is largest: neither padding nor a few tokens of extreme length move it. A token below
    a fiftieth of it gets the gradient of a token of that direction and of the usual length.

    Args:
        values: one for each token, functions of its direction.
        of: the directions.
    """
    if of.ordinary:
        return values
    lengths = 1.0 / ops.stop_gradient(of.inverse) / (_UNIT * of.factor)
    present = lengths * (1.0 - of.absent)
    usual = _usual_length(ops.reshape(present, ops.shape(values)))
    none = ops.cast(usual == 0, "float32")
    short = present < _SHORT * usual
    share = ops.where(short, lengths / (usual + none), ops.ones_like(lengths))
    known = ops.stop_gradient(values)
    return known + ops.reshape(share, ops.shape(values)) * (values - known)


def _usual_length(lengths: Tensor) -> Tensor:
    """The usual one of lengths [B, N], a scalar; 0 where all are.

    A sort over all of them could not be split over the samples, as sharded arrays are.
    """
    ordered = ops.sort(lengths, axis=-1)
    usual = ordered[:, 3 * ordered.shape[1] // 4]
    usual = usual + ops.cast(usual == 0, "float32") * ordered[:, -1]  # most are padding
    return ops.amax(usual)


def cosine_of(student: Tokens, target: Tokens, axis: int = -1) -> Tensor:
    """The cosine distance along `axis`; the gradient is in proportion on the student's side."""
    mine = directions(student, axis)
    # Half the squared distance of unit vectors is 1 - cos, but exactly 0 for equal inputs and
    # never below 0.
    difference = mine.tokens - directions(target, axis).tokens
    return in_proportion(0.5 * ops.sum(ops.square(difference), axis=axis), mine)


def length(tokens: Tokens) -> Tensor:
    """The length of each token, over its features."""
    factor = scale(tokens, axis=-1)
    squared = ops.sum(ops.square(tokens * factor), axis=-1, keepdims=True)
    return (ops.sqrt(squared) / factor)[..., 0]
