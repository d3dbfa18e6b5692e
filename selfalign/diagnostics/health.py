"""Health: scalars of features, weights and times that a training loop can log, on the device and without host sync."""

from __future__ import annotations

import numbers
import sys
from typing import Any

from .._backend import is_floating, on_backend, ops
from .._checks import check_same
from ._arrays import TINY, check_rows, matrix, scaled


def _rows(tokens: Any, center: bool = False) -> Any:
    check_rows("tokens", tokens)
    return matrix(tokens, center)


@on_backend
def feature_norm(tokens: Any) -> Any:
    """Mean norm of the tokens, mean_i |tokens_i|: its growth under L1 or L2 is a warning.

    Args:
        tokens: [B, N, D] or [n, D].

    Returns:
        A float32 scalar, without gradient.

    Raises:
        ValueError: empty features, or without a width.
        TypeError: no tensor, or one of another framework than Keras's backend.

    Example:
        >>> import numpy as np
        >>> from selfalign import diagnostics
        >>> float(diagnostics.feature_norm(np.full((2, 3, 4), 0.5)))
        1.0
    """
    return ops.mean(ops.sqrt(ops.sum(ops.square(_rows(tokens)), axis=-1)))


@on_backend
def effective_rank(tokens: Any, center: bool = False) -> Any:
    """How many dimensions the features fill: exp(-sum_k p_k log p_k), p_k = s_k / sum(s), of the singular values s.

    Args:
        tokens: [B, N, D] or [n, D]; all tokens of all samples are rows.
        center: subtract the mean first. Features that share a large mean have a rank near 1 without.

    Returns:
        A scalar in [1, min(n, D)]; 1 where all features are zero. On a GPU, PyTorch's singular values wait for the device:
        log it rarely, or take `participation_ratio`.

    Raises:
        ValueError, TypeError: as in `feature_norm`.

    Example:
        >>> import numpy as np
        >>> from selfalign import diagnostics
        >>> round(float(diagnostics.effective_rank(np.eye(6))), 4)
        6.0

    Reference: Roy and Vetterli, "The effective rank: a measure of effective dimensionality", 2007, EUSIPCO.
    """
    values = ops.linalg.svd(_rows(tokens, center), full_matrices=False, compute_uv=False)
    shares = values / ops.maximum(ops.sum(values), TINY)
    return ops.exp(-ops.sum(shares * ops.log(ops.maximum(shares, TINY))))


@on_backend
def participation_ratio(tokens: Any, center: bool = False) -> Any:
    """How many dimensions carry the features' variance: (sum_k s_k^2)^2 / sum_k s_k^4, of the singular values s.

    From one matrix product, without a decomposition: never a host sync. Larger directions weigh more than in
    `effective_rank`. Under torch.autocast the product is taken in half precision: call it outside.

    Args:
        tokens: [B, N, D] or [n, D]; all tokens of all samples are rows.
        center: subtract the mean first.

    Returns:
        A scalar in [1, min(n, D)]; 0 where all features are zero.

    Raises:
        ValueError, TypeError: as in `feature_norm`.

    Example:
        >>> import numpy as np
        >>> from selfalign import diagnostics
        >>> float(diagnostics.participation_ratio(np.eye(6)))
        6.0

    Reference: Gao and Ganguli, "On simplicity and complexity in the brave new world of large-scale neuroscience", 2015,
    arXiv 1503.08779.
    """
    rows = scaled(_rows(tokens, center))
    n, width = rows.shape
    gram = ops.matmul(ops.transpose(rows), rows) if width <= n else ops.matmul(rows, ops.transpose(rows))
    return ops.square(ops.sum(ops.square(rows))) / ops.maximum(ops.sum(ops.square(gram)), TINY)


@on_backend
def drift(teacher: Any, student: Any) -> Any:
    """How far the EMA is from the student: |teacher - student| / |student|, over all floating-point leaves as one vector.

    Args:
        teacher: dicts, lists and tuples of arrays, as in `selfalign.ema_update`.
        student: the same structure and shapes.

    Returns:
        A float32 scalar; 0 where they are equal.

    Raises:
        ValueError: structures or shapes that differ (the message names the first path).
        TypeError: tensors of another framework than Keras's backend.

    Example:
        >>> import numpy as np
        >>> from selfalign import diagnostics
        >>> float(diagnostics.drift({"w": np.full(4, 1.5)}, {"w": np.ones(4)}))
        0.5
    """
    tree = sys.modules["keras"].tree
    sides = [{"/".join(map(str, path)): leaf for path, leaf in tree.flatten_with_path(side)} for side in (teacher, student)]
    check_same(*sides)
    pairs = [(sides[0][path], leaf) for path, leaf in sides[1].items()
             if not isinstance(leaf, numbers.Integral) and is_floating(leaf)]  # fmt: skip
    apart = sum(_squared(ops.subtract(*(ops.cast(leaf, "float32") for leaf in pair))) for pair in pairs)
    size = sum(_squared(ops.cast(leaf, "float32")) for _, leaf in pairs)
    return ops.sqrt(apart / ops.maximum(size, TINY))


def _squared(leaf: Any) -> Any:
    return ops.sum(ops.square(ops.stop_gradient(leaf)))


@on_backend
def snr_decibels(path: Any, t: Any, limit: float = 60.0) -> Any:
    """Mean signal-to-noise ratio in decibels, mean_b 10 log10(alpha^2 / sigma^2): log it for both sides.

    The teacher's is the larger one, whatever the direction of time.

    Args:
        path: an object of `selfalign.paths`.
        t: times [B] on it: the student's, or the teacher's from `loss.teacher_time(t, u)`.
        limit: decibels at which the ends are cut; clean samples would make the mean infinite.

    Returns:
        A float32 scalar in [-limit, limit].

    Raises:
        ValueError, TypeError: times outside the path or of the wrong kind.

    Example:
        >>> import numpy as np, selfalign
        >>> from selfalign import diagnostics
        >>> loss = selfalign.SRALoss(student_layer=1, teacher_layer=2, max_gap=0.5)
        >>> t = np.array([0.5, 0.75])
        >>> round(float(diagnostics.snr_decibels(loss.path, t)), 2)
        -4.77
        >>> round(float(diagnostics.snr_decibels(loss.path, loss.teacher_time(t, np.array([0.5, 0.5])))), 2)
        4.77
    """
    ratio = ops.cast(path.snr(t), "float32")
    floor, ceiling = 10.0 ** (-limit / 10), 10.0 ** (limit / 10)
    return 10.0 * ops.mean(ops.log10(ops.clip(ratio, floor, ceiling)))
