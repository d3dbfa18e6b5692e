"""Health: scalars of features, weights and times for a training loop to log.

They stay on the device, without host sync.
"""

from __future__ import annotations

import numbers
import sys

from .._backend import is_floating, on_backend, ops
from .._checks import check_kind, check_number, check_same
from ..paths import Path
from ..typing import Scalar, Tensor, Times, Tokens, Tree
from ._arrays import TINY, check_rows, matrix, scaled


def _rows(tokens: Tokens, center: bool = False) -> Tensor:
    check_rows("tokens", tokens)
    return matrix(tokens, center)


@on_backend
def feature_norm(tokens: Tokens) -> Scalar:
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
    squared = ops.sum(ops.square(_rows(tokens)), axis=-1)
    return ops.mean(ops.sqrt(squared))


@on_backend
def effective_rank(tokens: Tokens, center: bool = False) -> Scalar:
    """How many dimensions the features fill, by the entropy of their singular values s.

        exp(-sum_k p_k log p_k),  p_k = s_k / sum(s)

    Args:
        tokens: [B, N, D] or [n, D]; all tokens of all samples are rows.
        center: subtract the mean first. Without it, features with a large mean in common have a
            rank near 1.

    Returns:
        A scalar in [1, min(n, D)]; 1 where all features are zero. On a GPU, PyTorch's singular
        values wait for the device: log it rarely, or take `participation_ratio`.

    Raises:
        ValueError, TypeError: as in `feature_norm`.

    Example:
        >>> import numpy as np
        >>> from selfalign import diagnostics
        >>> round(float(diagnostics.effective_rank(np.eye(6))), 4)
        6.0

    Reference: Roy and Vetterli, "The effective rank: a measure of effective dimensionality",
    EUSIPCO 2007.
    """
    values = ops.linalg.svd(_rows(tokens, center), full_matrices=False, compute_uv=False)
    fractions = values / ops.maximum(ops.sum(values), TINY)
    return ops.exp(-ops.sum(fractions * ops.log(ops.maximum(fractions, TINY))))


@on_backend
def participation_ratio(tokens: Tokens, center: bool = False) -> Scalar:
    """How many dimensions carry the features' variance, by their singular values s.

        (sum_k s_k^2)^2 / sum_k s_k^4

    From one matrix product, without a decomposition: never a host sync. Larger directions weigh
    more than in `effective_rank`. Under torch.autocast the product is taken in half precision: call
    it outside.

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

    Reference: Gao and Ganguli, "On simplicity and complexity in the brave new world of large-scale
    neuroscience", 2015, arXiv 1503.08779.
    """
    rows = scaled(_rows(tokens, center))
    n, width = rows.shape
    turned = ops.transpose(rows)
    # of the two matrices with these singular values the smaller one
    gram = ops.matmul(turned, rows) if width <= n else ops.matmul(rows, turned)
    variance = ops.sum(ops.square(rows))
    return ops.square(variance) / ops.maximum(ops.sum(ops.square(gram)), TINY)


@on_backend
def drift(teacher: Tree, student: Tree) -> Scalar:
    """How far the EMA is from the student: |teacher - student| / |student|.

    All floating-point leaves count as one vector.

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
    teachers = _leaves(teacher)
    students = _leaves(student)
    check_same(teachers, students)
    apart = 0.0
    size = 0.0
    for path, leaf in students.items():
        if isinstance(leaf, numbers.Integral) or not is_floating(leaf):
            continue
        mine = ops.cast(leaf, "float32")
        theirs = ops.cast(teachers[path], "float32")
        apart = apart + _squared(ops.subtract(theirs, mine))
        size = size + _squared(mine)
    return ops.sqrt(apart / ops.maximum(size, TINY))


def _leaves(tree: Tree) -> dict[str, Tensor]:
    """The leaves of a nest by their paths."""
    leaves = sys.modules["keras"].tree.flatten_with_path(tree)
    return {"/".join(map(str, path)): leaf for path, leaf in leaves}


def _squared(leaf: Tensor) -> Scalar:
    return ops.sum(ops.square(ops.stop_gradient(leaf)))


@on_backend
def snr_decibels(path: Path, t: Times, limit: float = 60.0) -> Scalar:
    """Mean signal-to-noise ratio in decibels, mean_b 10 log10(alpha^2 / sigma^2).

    Log it for both sides: the teacher's is the larger one, whatever the direction of time.

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
        >>> t_teacher = loss.teacher_time(t, np.array([0.5, 0.5]))
        >>> round(float(diagnostics.snr_decibels(loss.path, t)), 2)
        -4.77
        >>> round(float(diagnostics.snr_decibels(loss.path, t_teacher)), 2)
        4.77
    """
    check_kind("path", path, Path, "Pass for instance selfalign.paths.Linear().")
    check_number("limit", limit, 1e-3, 300, "It is in decibels, 60 by default.")
    ratio = ops.cast(path.snr(t), "float32")
    floor = 10.0 ** (-limit / 10)
    ceiling = 10.0 ** (limit / 10)
    return 10.0 * ops.mean(ops.log10(ops.clip(ratio, floor, ceiling)))
