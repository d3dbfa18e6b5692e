"""The time gap: how much less noise the teacher looks at than the student."""

from __future__ import annotations

from ._backend import on_backend
from ._checks import check_kind, check_number, check_switch, invalid
from .paths import Path
from .typing import Draws, Times


@on_backend
def teacher_time(
    path: Path, t: Times, u: Draws | None, max_gap: float = 0.2, random_gap: bool = True
) -> Times:
    """The teacher's time: `t` moved toward the data by u * max_gap of the path.

    It never moves past the path's clean end. On a discrete path of T steps the gap is an integer,
    uniform in {0, ..., round(T max_gap) - 1}.

    Args:
        path: the noise path; it knows the direction of time.
        t: the student's times [B].
        u: draws uniform in [0, 1), [B]; not used, and may be None, when `random_gap` is False.
        max_gap: fraction of the path's time axis in [0, 1]. 0: the teacher sees the student's own
            noise level.
        random_gap: draw the gap from [0, max_gap) for each sample; False: every gap is `max_gap`
            itself.

    Returns:
        Times [B] in the dtype of `t`, with snr(teacher) >= snr(student) for every sample.

    Raises:
        ValueError: `max_gap` outside [0, 1], `t` or `u` of another shape or out of range.
        TypeError: continuous times on a discrete path or the reverse; tensors of another framework.

    Example:
        >>> import numpy as np, selfalign
        >>> path, t, u = selfalign.paths.Linear(), np.array([0.75, 0.125]), np.array([0.5, 0.5])
        >>> [float(x) for x in selfalign.teacher_time(path, t, u, max_gap=0.5)]
        [0.5, 0.0]

    Reference: Jiang et al., SRA, 2025, arXiv 2505.02831, section 3. The authors' DiT code clamps at
    step 1, which makes the teacher noisier than a student at step 0; here it never is.
    """
    random_gap = check_switch("random_gap", random_gap)
    largest = gap_range(path, max_gap)
    path.check_times(t)
    return path.moved(t, u, largest, random_gap)


def gap_range(path: Path, max_gap: float) -> float:
    """`max_gap` in the path's own unit; whole steps on a discrete path.

    Raises:
        ValueError: outside [0, 1], or below one step.

    Example:
        >>> import selfalign
        >>> selfalign.time_gap.gap_range(selfalign.paths.Discrete(), 0.2)
        200
    """
    check_kind("path", path, Path, "Pass for instance selfalign.paths.Linear().")
    fix = "It is a fraction of the path's time axis, 0.2 in the paper."
    check_number("max_gap", max_gap, 0, 1, fix)
    span: float = max_gap * path.span
    if not path.discrete:
        return span
    if max_gap > 0 and round(span) < 1:
        raise invalid(
            "max_gap must cover at least one step of a discrete path",
            f"{max_gap} of {path.span} steps",
            "Enlarge it, or pass 0 for no gap.",
        )
    return round(span)
