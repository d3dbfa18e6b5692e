"""The time gap: how much less noise the teacher looks at than the student."""

from __future__ import annotations

from typing import Any

from ._backend import dtype_of, on_backend, ops, widened
from ._checks import check_draws, check_number, check_time, invalid
from .paths import Path


@on_backend
def teacher_time(path: Path, t: Any, u: Any, max_gap: float = 0.2, random_gap: bool = True) -> Any:
    """The teacher's time: `t` moved toward the data by u * max_gap of the path, never past its clean end.

    On a discrete path of T steps the gap is an integer, uniform in {0, ..., round(T max_gap) - 1}.

    Args:
        path: the noise path; it knows the direction of time.
        t: the student's times [B].
        u: draws uniform in [0, 1), [B]; not used, and may be None, when `random_gap` is False.
        max_gap: share of the path's time axis in [0, 1]. 0: the teacher sees the student's own noise level.
        random_gap: draw the gap from [0, max_gap) for each sample; False: every gap is `max_gap` itself.

    Returns:
        Times [B] in the dtype of `t`, with snr(teacher) >= snr(student) for every sample.

    Raises:
        ValueError: `max_gap` outside [0, 1], `t` or `u` of another shape or out of range.
        TypeError: continuous times on a discrete path or the reverse; tensors of another framework.

    Example:
        >>> import numpy as np, selfalign
        >>> path = selfalign.paths.Linear()
        >>> t = selfalign.time_gap.teacher_time(path, np.array([0.75, 0.125]), np.array([0.5, 0.5]), max_gap=0.5)
        >>> [float(x) for x in t]
        [0.5, 0.0]

    Reference: Jiang et al., SRA, 2025, arXiv 2505.02831, section 3. The authors' DiT code clamps at step 1, which makes the
    teacher noisier than a student at step 0; here it never is.
    """
    check_time(path, t)
    largest = gap_range(path, max_gap)
    if random_gap:
        check_draws(u, t)
    start = ops.cast(t, "int32") if path.discrete else widened(t)  # a gap may not fit into an 8-bit t
    moved = path.toward_data(start, _gap(path, start, u, largest, random_gap))
    return ops.cast(moved, dtype_of(t))


def gap_range(path: Path, max_gap: float) -> float:
    """`max_gap` in the path's own unit; whole steps on a discrete path. Raises ValueError outside [0, 1], or below a step.

    Example:
        >>> import selfalign
        >>> selfalign.time_gap.gap_range(selfalign.paths.Discrete(), 0.2)
        200
    """
    check_number("max_gap", max_gap, 0, 1, "It is a share of the path's time axis, 0.2 in the paper.")
    span = max_gap * path.span
    if not path.discrete:
        return span
    if max_gap > 0 and round(span) < 1:
        raise invalid("max_gap must cover at least one step of a discrete path", f"{max_gap} of {path.span} steps",
                      "Enlarge it, or pass 0 for no gap.")  # fmt: skip
    return round(span)


def _gap(path: Path, t: Any, u: Any, largest: float, random_gap: bool) -> Any:
    if not random_gap:
        return ops.full_like(t, largest)
    gap = widened(u) * largest
    if not path.discrete:
        return gap
    return ops.cast(ops.minimum(ops.floor(gap), float(max(largest - 1, 0))), "int32")  # u * largest may round up to largest
