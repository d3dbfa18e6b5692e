"""The study's results as they are kept: one CSV file per data set and group of arms.

A line holds one number: of an arm and a seed, at a step, of a metric.
"""

import csv
from pathlib import Path
from typing import NamedTuple

Row = tuple[int, str, str, float]  # step, metric, where (a block and a time), value
COLUMNS = ("arm", "seed", "step", "metric", "where", "value")


class Record(NamedTuple):
    """A line of a file."""

    arm: str
    seed: int
    step: int
    metric: str
    where: str
    value: float


def read(file: Path) -> list[Record]:
    """All lines; none where there is no file."""
    if not file.exists():
        return []
    with file.open() as lines:
        _, *rows = csv.reader(lines)
    return [
        Record(arm, int(seed), int(step), metric, where, float(value))
        for arm, seed, step, metric, where, value in rows
    ]


def keep(file: Path, arm: str, seed: int, rows: list[Row]) -> None:
    """At once: a run is in the file as a whole, or not at all."""
    lines: list[tuple[object, ...]] = [
        (arm, seed, step, metric, where, f"{value:.5g}") for step, metric, where, value in rows
    ]
    if not file.exists():
        lines.insert(0, COLUMNS)
    with file.open("a", newline="") as out:
        csv.writer(out, lineterminator="\n").writerows(lines)


class Of(NamedTuple):
    """What was measured of an arm: a metric, and of a probe the block and the time."""

    arm: str
    metric: str
    where: str = ""


class Results:
    """What was measured: lists over the seeds."""

    def __init__(self, *files: Path) -> None:
        self.values: dict[Of, dict[int, dict[int, float]]] = {}  # {of what: {step: {seed: value}}}
        for record in (record for file in files for record in read(file)):
            by_step = self.values.setdefault(Of(record.arm, record.metric, record.where), {})
            by_step.setdefault(record.step, {})[record.seed] = record.value

    def __contains__(self, arm: str) -> bool:
        return any(arm == of.arm for of in self.values)

    def by_seed(self, step: int, of: Of) -> dict[int, float]:
        """Empty where it was not measured then."""
        return self.values.get(of, {}).get(step, {})

    def at(self, step: int, of: Of) -> list[float]:
        """By seed, in order."""
        return [value for _, value in sorted(self.by_seed(step, of).items())]

    def pairs(self, step: int, a: Of, b: Of) -> tuple[list[float], list[float]]:
        """Of two, over the seeds that both have."""
        left = self.by_seed(step, a)
        right = self.by_seed(step, b)
        seeds = sorted(left.keys() & right.keys())
        return [left[seed] for seed in seeds], [right[seed] for seed in seeds]

    def curve(self, seed: int, of: Of) -> tuple[list[int], list[float]]:
        """Steps and values of one run."""
        by_step = self.values.get(of, {})
        steps = sorted(step for step, by_seed in by_step.items() if seed in by_seed)
        return steps, [by_step[step][seed] for step in steps]

    def seeds(self, arm: str) -> list[int]:
        """Those that have been run."""
        found: set[int] = set()
        for of, by_step in self.values.items():
            if of.arm == arm:
                found.update(*by_step.values())
        return sorted(found)

    def blocks(self, step: int, arm: str, metric: str, time: float) -> list[list[float]]:
        """A probe's accuracies: for each block, from the first on, those over the seeds."""
        found: list[list[float]] = []
        while accuracies := self.at(step, Of(arm, metric, f"block {len(found) + 1} t {time}")):
            found.append(accuracies)
        return found
