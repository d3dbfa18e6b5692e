"""Arms measured in turns, so that a machine that slows down slows all of them down."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

from rich.console import Console
from rich.progress import track
from rich.table import Table


class Size(NamedTuple):
    """Of the papers' models."""

    width: int
    depth: int
    heads: int


SIZES = {
    "S": Size(384, 12, 6),
    "B": Size(768, 12, 12),
    "L": Size(1024, 24, 16),
    "XL": Size(1152, 28, 16),
}
Step = Callable[[], object]
Seconds = dict[str, list[float]]  # of each arm in each round


def measure(arms: dict[str, Step], rounds: int, warm_up: int = 3) -> Seconds:
    """Seconds of each arm in each round; every round runs all arms, and the order turns."""
    for step in arms.values():
        for _ in range(warm_up):
            step()
    seconds: Seconds = {name: [] for name in arms}
    names = list(arms)
    for index in track(range(rounds), "measuring", transient=True):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            arms[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


class Ratio(NamedTuple):
    """Of one arm's times to another's, round by round."""

    median: float
    low: float  # quartiles
    high: float


def ratio(seconds: list[float], base: list[float]) -> Ratio:
    ratios = [mine / other for mine, other in zip(seconds, base, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return Ratio(statistics.median(ratios), low, high)


def show(console: Console, title: str, seconds: Seconds, against: dict[str, str]) -> None:
    """Medians, and the ratio to another arm with its quartiles."""
    headings = ("arm", "median ms", "against", "ratio", "quartiles")
    table = Table(*headings, title=title, title_justify="left")
    for name, values in seconds.items():
        other = against[name]
        found = ratio(values, seconds[other])
        median = f"{1e3 * statistics.median(values):.2f}"
        quartiles = f"{found.low:.3f} - {found.high:.3f}"
        table.add_row(name, median, other, f"{found.median:.3f}", quartiles)
    console.print(table)


def show_against(console: Console, title: str, seconds: Seconds, base: str) -> None:
    """All arms against one."""
    show(console, title, seconds, dict.fromkeys(seconds, base))
