"""The training runs behind docs/expect.md: healthy ones, and some with a mistake in them.

    python docs/figures/runs.py              all of them, into docs/figures/runs.csv
    python docs/figures/runs.py --steps 20   a look, into the folder given by --out

Minutes on 2 CPU cores. Model, data and draws are those of examples/torch_sit.py; within a step all
runs see the same images, noise and times.
"""

import argparse
import csv
import statistics
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "examples"))

import common
import torch
import torch.nn.functional as F
import torch_sit

import selfalign
from selfalign import diagnostics
from selfalign.adapters.torch import SelfAlignment
from selfalign.schedules import DecayWarmup, Stop, Warmup

EVERY = 10  # steps that a row of the table is the mean of
LOGGED = ("distance", "cosine", "student_norm", "teacher_norm")
COLUMNS = ("denoising", "alignment", "weight", *LOGGED, "drift")


class Arm(NamedTuple):
    """What a run does.

    Attributes:
        settings: of the loss.
        rate: learning rate.
        updated: whether the teacher is updated.
    """

    settings: dict[str, object]
    rate: float = 2e-3
    updated: bool = True


RUNS = {
    "healthy": Arm({}),
    "schedule": Arm({"weight": 0.5 * Warmup(100) * Stop(400)}),
    "l2": Arm({"distance": "l2", "weight": 30.0}, rate=2e-2),
    "fast": Arm({}, rate=2e-2),  # the same learning rate with the default distance and weight
    "direction": Arm({"path": selfalign.paths.Linear(noise_at=0)}),
    "frozen": Arm({}, updated=False),
}


def run(name: str, steps: int) -> list[list[str]]:
    """Rows of one run: its name, the last step of each mean, and the means of COLUMNS."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    training = Training(RUNS[name])
    rows = []
    recent: list[list[float]] = []
    for step in range(steps):
        recent.append(training.step(step))
        if step % EVERY == EVERY - 1:
            means = [f"{statistics.fmean(values):.5g}" for values in zip(*recent, strict=True)]
            rows.append([name, str(step + 1), *means])
            recent = []
    return rows


class Training:
    """The small SiT on the digits, with SRA."""

    def __init__(self, arm: Arm) -> None:
        self.arm = arm
        data = common.digits()
        self.images, self.labels = torch_sit.tensors(data.images, data.labels, "cpu")
        self.model = torch_sit.SiT(
            size=8, channels=1, classes=10, patch=2, width=64, depth=8, heads=4
        )
        settings = {"student_layer": 0.25, "teacher_layer": 0.7, "decay": DecayWarmup(0.999)}
        self.loss = selfalign.SRALoss(**settings | arm.settings)
        # the mistakes are meant: without the checks they go through in silence
        self.align = SelfAlignment(self.model, self.loss, log_metrics=True, checks="off")
        parameters = [*self.model.parameters(), *self.align.projector.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=arm.rate, weight_decay=0.0)
        self.draws = torch.Generator().manual_seed(1)

    def step(self, step: int) -> list[float]:
        """One training step; what COLUMNS say of it."""
        path = torch_sit.PATH  # the loop's own: 1 is noise
        chosen = torch.randint(len(self.images), (64,), generator=self.draws)
        x0 = self.images[chosen]
        null_class = self.model.null_class
        y, noise, t = torch_sit.draw(x0, self.labels[chosen], null_class, 0.1, self.draws)
        prediction = self.model(path.add_noise(x0, noise, t), t, y)
        denoising = F.mse_loss(prediction, path.velocity(x0, noise, t))
        alignment = self.align(x0, noise, t)
        (denoising + alignment).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.arm.updated:
            self.align.update()
        metrics = [self.align.metrics[column].item() for column in LOGGED]
        weight = self.loss.weight_at(step)
        return [denoising.item(), alignment.item(), weight, *metrics, self.drift()]

    def drift(self) -> float:
        """The distance of the teacher from the model."""
        teacher = dict(self.align.teacher.named_parameters())
        return diagnostics.drift(teacher, dict(self.model.named_parameters())).item()


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--runs", nargs="*", default=list(RUNS))
    options = parser.parse_args()
    # the run named "frozen" does just that
    warnings.filterwarnings("ignore", "update\\(\\) must follow")
    with ProcessPoolExecutor(2) as pool:
        results = list(pool.map(run, options.runs, [options.steps] * len(options.runs)))
    with (options.out / "runs.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["run", "step", *COLUMNS])
        writer.writerows(row for rows in results for row in rows)


if __name__ == "__main__":
    main()
