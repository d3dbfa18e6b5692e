"""Similarity of two sets of features of the same samples: between layers, noise levels, models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .._backend import on_backend, ops
from .._checks import check_function, check_number, invalid
from ..typing import Scalar, Tensor
from ._arrays import TINY, Features, check_rows, matrix, rows, scaled


@on_backend
def cka(x: Tensor, y: Tensor) -> Scalar:
    """Linear centered kernel alignment (CKA) of two sets of features.

        |Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F),  of centered X and Y

    On the device and without host sync. With n not far above the widths it is large for unrelated
    features, too: compare at one n, and prefer many samples. Under torch.autocast the products are
    taken in half precision: call it outside.

    Args:
        x: features [n, D] or tokens [B, N, D]; all tokens of all samples are rows.
        y: features of the same samples in the same order; the width may differ.

    Returns:
        A float32 scalar in [0, 1], without gradient: 1 where x and y differ by a rotation, a shift
        and a scale, 0 where nothing linear connects them or a side is constant.

    Raises:
        ValueError: empty features, or sides of different numbers of samples.
        TypeError: no tensors, or of another framework than Keras's backend.

    Example:
        >>> import numpy as np
        >>> from selfalign import diagnostics
        >>> x = np.random.default_rng(0).normal(size=(50, 4))
        >>> round(float(diagnostics.cka(x, 3 * x[:, ::-1] + 1)), 4)
        1.0

    Reference: Kornblith et al., "Similarity of Neural Network Representations Revisited", 2019,
    arXiv 1905.00414.
    """
    check_rows("x", x)
    check_rows("y", y)
    if tuple(x.shape)[:-1] != tuple(y.shape)[:-1]:
        raise _unequal(tuple(x.shape), tuple(y.shape))
    x = scaled(matrix(x, center=True))
    y = scaled(matrix(y, center=True))
    norms = ops.sqrt(_inner(x, x) * _inner(y, y))
    return ops.minimum(_inner(x, y) / ops.maximum(norms, TINY), 1.0)


def _inner(x: Tensor, y: Tensor) -> Scalar:
    """<X X^T, Y Y^T> = |Y^T X|^2, by the smaller of the two matrices."""
    n = x.shape[0]
    if x.shape[1] * y.shape[1] <= n * n:
        product = ops.matmul(ops.transpose(y), x)
        return ops.sum(ops.square(product))
    of_x = ops.matmul(x, ops.transpose(x))
    of_y = ops.matmul(y, ops.transpose(y))
    return ops.sum(of_x * of_y)


def _unequal(x: tuple[int, ...], y: tuple[int, ...]) -> ValueError:
    return invalid(
        "x and y must be features of the same samples",
        f"x {x}, y {y}",
        "Compute both on one batch, in one order.",
    )


def cknna(x: Features, y: Features, k: int = 10) -> float:
    """CKA over the pairs of samples that are near neighbours on both sides (CKNNA).

        CKNNA   = A(K, L) / sqrt(A(K, K) A(L, L))
        A(K, L) = sum_ij m_ij (K_ij - mean_l K_il) (L_ij - mean_l L_il)
        m_ij    = 1 where i != j, and j is among the k nearest of i in both; 0 elsewhere

    K and L hold the cosines between samples. Local where CKA is global, so that two layers agree
    when their neighbourhoods do.

    Args:
        x: features [n, D].
        y: features of the same samples in the same order; the width may differ.
        k: neighbours of each sample, below n.

    Returns:
        A float in [-1, 1]: 1 for equal features, near 0 for unrelated ones.

    Raises:
        ValueError: features that are not [n, D] or not finite, sides of different numbers of
            samples, or `k` outside [1, n).
        TypeError: `k` is no integer.

    Example:
        >>> import numpy as np
        >>> from selfalign import diagnostics
        >>> x = np.random.default_rng(0).normal(size=(50, 4))
        >>> round(diagnostics.cknna(x, 3 * x), 4)
        1.0

    Reference: Huh et al., "The Platonic Representation Hypothesis", 2024, arXiv 2405.07987.
    """
    x = rows("x", x)
    y = rows("y", y)
    if len(x) != len(y):
        raise _unequal(x.shape, y.shape)
    fix = "It counts neighbours among the other samples; 10 in the paper."
    check_number("k", k, 1, len(x) - 1, fix, integer=True)
    kernel, near = _neighbourhood(x, k)
    other, other_near = _neighbourhood(y, k)
    norms = np.sum(kernel**2, where=near) * np.sum(other**2, where=other_near)
    if norms <= 0:
        return 0.0
    aligned = np.sum(kernel * other, where=near & other_near)
    return float(aligned / np.sqrt(norms))


def _neighbourhood(x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The centered kernel [n, n], and whether sample j is among the k nearest of sample i."""
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), TINY)
    kernel = x @ x.T
    similar = kernel.copy()
    np.fill_diagonal(similar, -np.inf)  # no sample is its own neighbour
    nearest = np.argsort(-similar, axis=1, kind="stable")[:, :k]
    near = np.zeros(kernel.shape, bool)
    np.put_along_axis(near, nearest, True, axis=1)
    return kernel - kernel.mean(1, keepdims=True), near


def compare(
    left: Sequence[Features],
    right: Sequence[Features],
    measure: Callable[[Features, Features], Any] = cka,
) -> np.ndarray:
    """A table of similarities: measure(left[i], right[j]) for all pairs.

    Layers with layers: `compare(features[0.5], features[0.5])`; layers between two noise levels:
    `compare(features[0.5], features[0.1], cknna)`.

    Args:
        left: features [n, D] of each layer (or time, or model).
        right: features of the same samples.
        measure: `cka`, `cknna`, or a function of two sets of features.

    Returns:
        Similarities [len(left), len(right)], NumPy.

    Raises:
        ValueError, TypeError: as in the measure.

    Example:
        >>> import numpy as np
        >>> from selfalign import diagnostics
        >>> layers = list(np.random.default_rng(0).normal(size=(3, 50, 4)))
        >>> diagnostics.compare(layers, layers).round(2).diagonal().tolist()
        [1.0, 1.0, 1.0]
    """
    check_function("measure", measure)
    for name, side in (("left", left), ("right", right)):
        if isinstance(side, str) or not hasattr(side, "__len__") or not len(side):
            raise TypeError(
                f"{name} must be a list of features, not empty. Received: {type(side).__name__} "
                f"{side!r:.60}. Pass those of each layer."
            )
    return np.array([[float(measure(x, y)) for y in right] for x in left])
