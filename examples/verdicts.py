"""What numbers of several seeds say: means with their spread, and whether two arms differ."""

import statistics
from collections.abc import Iterable, Sequence


def mean_sd(values: Sequence[float], sign: str = "", digits: int = 3) -> str:
    """Mean and standard deviation over the seeds; of one seed the value alone."""
    mean = f"{statistics.fmean(values):{sign}.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{digits}f}"


def pairs(a: Iterable[float], b: Iterable[float]) -> list[float]:
    """b minus a, seed by seed: the two arms of a seed have everything else in common."""
    return [y - x for x, y in zip(a, b, strict=True)]


def decided(a: Sequence[float], b: Sequence[float]) -> int:
    """1 where b is larger than a, -1 where it is smaller, 0 where the seeds do not decide it.

    With few seeds and many numbers chance looks like an effect. So all seeds must agree, and the
    mean difference must exceed each arm's own spread, and twice that of the differences.
    """
    differences = pairs(a, b)
    if len(differences) < 2:
        return 0
    all_agree = min(differences) > 0 or max(differences) < 0
    mean = statistics.fmean(differences)
    spread = max(2 * statistics.stdev(differences), statistics.stdev(a), statistics.stdev(b))
    if not all_agree or abs(mean) <= spread:
        return 0
    return 1 if mean > 0 else -1
