"""The study's results as they are kept: one CSV file per data set and group of arms, one line per number."""

import csv
from pathlib import Path

Row = tuple[int, str, str, float]  # step, metric, where (a block and a time), value
COLUMNS = ("arm", "seed", "step", "metric", "where", "value")


def read(file: Path) -> list[tuple[str, int, int, str, str, float]]:
    """Arm, seed, step, metric, where, value; nothing where there is no file."""
    if not file.exists():
        return []
    with file.open() as lines:
        rows = list(csv.reader(lines))[1:]
    return [(arm, int(seed), int(step), metric, where, float(value)) for arm, seed, step, metric, where, value in rows]


def keep(file: Path, arm: str, seed: int, rows: list[Row]) -> None:
    """At once: a run is in the file as a whole, or not at all."""
    lines = [[arm, str(seed), str(step), metric, where, f"{value:.5g}"] for step, metric, where, value in rows]
    heading = [COLUMNS] * (not file.exists())
    with file.open("a", newline="") as out:
        csv.writer(out, lineterminator="\n").writerows([*heading, *lines])


class Results:
    """What was measured, by arm and metric: lists over the seeds."""

    def __init__(self, *files: Path) -> None:
        self.values: dict[tuple[str, str, str], dict[int, dict[int, float]]] = {}  # {of what: {step: {seed: value}}}
        for file in files:
            for arm, seed, step, metric, where, value in read(file):
                self.values.setdefault((arm, metric, where), {}).setdefault(step, {})[seed] = value

    def __contains__(self, arm: str) -> bool:
        return any(arm == name for name, *_ in self.values)

    def by_seed(self, step: int, arm: str, metric: str, where: str = "") -> dict[int, float]:
        """Empty where it was not measured then."""
        return self.values.get((arm, metric, where), {}).get(step, {})

    def at(self, step: int, arm: str, metric: str, where: str = "") -> list[float]:
        """By seed, in order."""
        return [value for _, value in sorted(self.by_seed(step, arm, metric, where).items())]

    def both(self, step: int, arm: str, other: str, metric: str, where: str = "") -> tuple[list[float], list[float]]:
        """Of two arms, over the seeds that both have."""
        return self.paired(step, (arm, metric, where), (other, metric, where))

    def paired(self, step: int, a: tuple[str, str, str], b: tuple[str, str, str]) -> tuple[list[float], list[float]]:
        """Of two (arm, metric, where), over the seeds that both have."""
        left, right = self.by_seed(step, *a), self.by_seed(step, *b)
        shared = sorted(left.keys() & right.keys())
        return [left[seed] for seed in shared], [right[seed] for seed in shared]

    def curve(self, arm: str, seed: int, metric: str, where: str = "") -> tuple[list[int], list[float]]:
        """Steps and values of one run."""
        steps = sorted(step for step, found in self.values.get((arm, metric, where), {}).items() if seed in found)
        return steps, [self.values[arm, metric, where][step][seed] for step in steps]

    def seeds(self, arm: str) -> list[int]:
        """Those that have been run."""
        steps = (by_step for (name, *_), by_step in self.values.items() if name == arm)
        return sorted({seed for by_step in steps for by_seed in by_step.values() for seed in by_seed})

    def blocks(self, step: int, arm: str, metric: str, time: float) -> list[list[float]]:
        """A probe's accuracies: those over the seeds for each block, from the first on."""
        found: list[list[float]] = []
        while accuracies := self.at(step, arm, metric, f"block {len(found) + 1} t {time}"):
            found.append(accuracies)
        return found
