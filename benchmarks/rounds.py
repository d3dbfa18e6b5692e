"""Arms measured in turns, so that a machine that slows down slows all of them down; shown as ratios with quartiles."""

import statistics
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import track
from rich.table import Table

SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}  # width, depth, heads
Step = Callable[[], object]


def measure(arms: dict[str, Step], rounds: int, warm_up: int = 3) -> dict[str, list[float]]:
    """Seconds of each arm in each round; every round runs all arms, and the order turns."""
    for step in arms.values():
        for _ in range(warm_up):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for index in track(range(rounds), "measuring", transient=True):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            start = time.perf_counter()
            arms[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def show(console: Console, title: str, seconds: dict[str, list[float]], against: dict[str, str]) -> None:
    """Medians, and the ratio round by round with its quartiles."""
    table = Table("arm", "median ms", "against", "ratio", "quartiles", title=title, title_justify="left")
    for name, values in seconds.items():
        other = against[name]
        ratios = [mine / theirs for mine, theirs in zip(values, seconds[other], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        cells = [f"{1e3 * statistics.median(values):.2f}", other, f"{statistics.median(ratios):.3f}", f"{low:.3f} - {high:.3f}"]
        table.add_row(name, *cells)
    console.print(table)
