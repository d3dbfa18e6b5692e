"""The training runs behind docs/expect.md: healthy ones, and some with a mistake in them. Minutes on 2 CPU cores.

    python docs/figures/runs.py              all of them, into docs/figures/runs.csv
    python docs/figures/runs.py --steps 20   a look, into the folder given by --out

Model, data and draws are those of examples/torch_sit.py; within a step all runs see the same images, noise and times.
"""

import argparse
import csv
import statistics
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

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
COLUMNS = ("denoising", "alignment", "weight", "distance", "cosine", "student_norm", "teacher_norm", "drift")

# name: settings of the loss, learning rate, whether the teacher is updated
RUNS = {
    "healthy": ({}, 2e-3, True),
    "schedule": ({"weight": 0.5 * Warmup(100) * Stop(400)}, 2e-3, True),
    "l2": ({"distance": "l2", "weight": 30.0}, 2e-2, True),
    "fast": ({}, 2e-2, True),  # the same learning rate with the default distance and weight
    "direction": ({"path": selfalign.paths.Linear(noise_at=0)}, 2e-3, True),
    "frozen": ({}, 2e-3, False),
}


def run(name: str, steps: int) -> list[list[str]]:
    """Rows of one run: its name, the last step of each mean, and the means of COLUMNS."""
    settings, lr, updated = RUNS[name]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = common.digits()
    images, labels = torch_sit.tensors(data.images, data.labels, "cpu")
    model = torch_sit.SiT(size=8, channels=1, classes=10, patch=2, width=64, depth=8, heads=4)
    loss = selfalign.SRALoss(**{"student_layer": 0.25, "teacher_layer": 0.7, "decay": DecayWarmup(0.999)} | settings)
    # the mistakes are meant: without the checks they go through in silence
    align = SelfAlignment(model, loss, log_metrics=True, check_condition=False)
    optimizer = torch.optim.AdamW([*model.parameters(), *align.projector.parameters()], lr=lr, weight_decay=0.0)
    draws = torch.Generator().manual_seed(1)
    path = torch_sit.PATH  # the loop's own: 1 is noise
    rows, recent = [], []
    for step in range(steps):
        chosen = torch.randint(len(images), (64,), generator=draws)
        x0 = images[chosen]
        y, noise, t = torch_sit.draw(x0, labels[chosen], model.null_class, 0.1, draws)
        denoising = F.mse_loss(model(path.add_noise(x0, noise, t), t, y), path.velocity(x0, noise, t))
        alignment = align(x0, noise, t)
        (denoising + alignment).backward()
        optimizer.step()
        optimizer.zero_grad()
        if updated:
            align.update()
        weight = loss.weight_at(step)
        metrics = (align.metrics[column].item() for column in COLUMNS[3:7])
        apart = diagnostics.drift(*(dict(side.named_parameters()) for side in (align.teacher, model)))
        recent.append([denoising.item(), alignment.item(), weight, *metrics, apart.item()])
        if step % EVERY == EVERY - 1:
            rows.append([name, step + 1, *(f"{statistics.fmean(values):.5g}" for values in zip(*recent, strict=True))])
            recent = []
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--runs", nargs="*", default=list(RUNS))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "update\\(\\) must follow")  # the run named "frozen" does just that
    with ProcessPoolExecutor(2) as pool:
        results = list(pool.map(run, options.runs, [options.steps] * len(options.runs)))
    with (options.out / "runs.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["run", "step", *COLUMNS])
        writer.writerows(row for rows in results for row in rows)
