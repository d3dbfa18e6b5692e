"""Similarity of two sets of features of the same samples: between layers, noise levels, models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .._backend import on_backend, ops
from .._checks import check_number, invalid
from ._arrays import TINY, check_rows, matrix, rows, scaled


@on_backend
def cka(x: Any, y: Any) -> Any:
    """Linear centered kernel alignment, |Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F), of centered X and Y.

    On the device and without host sync. With n not far above the widths it is large for unrelated features, too: compare at
    one n, and prefer many samples. Under torch.autocast the products are taken in half precision: call it outside.

    Args:
        x: features [n, D] or tokens [B, N, D]; all tokens of all samples are rows.
        y: features of the same samples in the same order; the width may differ.

    Returns:
        A float32 scalar in [0, 1], without gradient: 1 where x and y differ by a rotation, a shift and
        a scale, 0 where nothing linear connects them or a side is constant.

    Raises:
        ValueError: empty features, or sides of different numbers of samples.
        TypeError: no tensors, or of another framework than Keras's backend.

    Example:
        >>> import numpy as np
        >>> from selfalign import diagnostics
        >>> x = np.random.default_rng(0).normal(size=(50, 4))
        >>> round(float(diagnostics.cka(x, 3 * x[:, ::-1] + 1)), 4)
        1.0

    Reference: Kornblith et al., "Similarity of Neural Network Representations Revisited", 2019, arXiv 1905.00414.
    """
    check_rows("x", x)
    check_rows("y", y)
    if tuple(x.shape)[:-1] != tuple(y.shape)[:-1]:
        raise _unequal(tuple(x.shape), tuple(y.shape))
    x, y = scaled(matrix(x, center=True)), scaled(matrix(y, center=True))
    norms = ops.sqrt(_inner(x, x) * _inner(y, y))
    return ops.minimum(_inner(x, y) / ops.maximum(norms, TINY), 1.0)


def _inner(x: Any, y: Any) -> Any:
    """<X X^T, Y Y^T> = |Y^T X|^2, by the smaller of the two matrices."""
    n = x.shape[0]
    if x.shape[1] * y.shape[1] <= n * n:
        return ops.sum(ops.square(ops.matmul(ops.transpose(y), x)))
    return ops.sum(ops.matmul(x, ops.transpose(x)) * ops.matmul(y, ops.transpose(y)))


def _unequal(x: tuple[int, ...], y: tuple[int, ...]) -> ValueError:
    return invalid("x and y must be features of the same samples", f"x {x}, y {y}", "Compute both on one batch, in one order.")


def cknna(x: Any, y: Any, k: int = 10) -> float:
    """Centered kernel nearest-neighbour alignment: CKA over the pairs that are near neighbours on both sides.

        A(K, L) = sum_ij m_ij (K_ij - mean_l K_il) (L_ij - mean_l L_il)
        m_ij = 1 where i != j, and j is among the k nearest of i in both;  CKNNA = A(K, L) / sqrt(A(K, K) A(L, L))

    K and L hold the cosines between samples. Local where CKA is global, so that two layers agree when their neighbourhoods do.

    Args:
        x: features [n, D].
        y: features of the same samples in the same order; the width may differ.
        k: neighbours of each sample, below n.

    Returns:
        A float in [-1, 1]: 1 for equal features, near 0 for unrelated ones.

    Raises:
        ValueError: features that are not [n, D] or not finite, sides of different numbers of samples, or `k` outside [1, n).
        TypeError: `k` is no integer.

    Example:
        >>> import numpy as np
        >>> from selfalign import diagnostics
        >>> x = np.random.default_rng(0).normal(size=(50, 4))
        >>> round(diagnostics.cknna(x, 3 * x), 4)
        1.0

    Reference: Huh et al., "The Platonic Representation Hypothesis", 2024, arXiv 2405.07987.
    """
    x, y = rows("x", x), rows("y", y)
    if len(x) != len(y):
        raise _unequal(x.shape, y.shape)
    check_number("k", k, 1, len(x) - 1, "It counts neighbours among the other samples; 10 in the paper.", integer=True)
    (kernel, near), (other, other_near) = (_neighbourhood(side, k) for side in (x, y))
    norms = np.sum(kernel**2, where=near) * np.sum(other**2, where=other_near)
    return float(np.sum(kernel * other, where=near & other_near) / np.sqrt(norms)) if norms > 0 else 0.0


def _neighbourhood(x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The centered kernel [n, n], and who is among whose k nearest."""
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), TINY)
    kernel = x @ x.T
    apart = kernel.copy()
    np.fill_diagonal(apart, -np.inf)
    near = np.zeros(kernel.shape, bool)
    np.put_along_axis(near, np.argsort(-apart, axis=1, kind="stable")[:, :k], True, axis=1)
    return kernel - kernel.mean(1, keepdims=True), near


def compare(left: Sequence[Any], right: Sequence[Any], measure: Callable[[Any, Any], Any] = cka) -> np.ndarray:
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
    return np.array([[float(measure(x, y)) for y in right] for x in left])
