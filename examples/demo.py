"""What SRA does to a small SiT, measured in minutes on a CPU: with and without it, several seeds.

    python examples/demo.py                 a table, and the picture runs/demo/demo.png
    python examples/demo.py --seeds 6 7 8   other seeds
    python examples/demo.py --short         seconds: a few steps of a tiny model

Model and training are those of torch_sit.py, on scikit-learn's digits. Within a seed both arms have
the same first weights, batches, dropped labels, noise and times; all that differs is SRA. The words
under the table are computed from its numbers.
"""

import argparse
import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import common
import matplotlib
import measures
import numpy as np
import side_by_side
import torch
import torch_sit
import verdicts
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from rich import box
from rich.console import Console
from rich.table import Table

from selfalign import diagnostics
from selfalign.adapters.torch import features

ARMS = {"without SRA": ["--no-sra"], "with SRA": []}
COLORS = {"without SRA": "#8a8a8a", "with SRA": "#d1495b"}

# Chosen on the seeds 100 and 101; 0, 1 and 2 had been looked at with other settings, so the demo
# shows 3, 4 and 5. Of the learning rates 1e-3, 2e-3 and 4e-3 the middle one stayed; the largest was
# a little better in the arm without SRA. Layers and weight are the library's own advice (0.25 and
# 0.7 of the depth; 0.5): layers 2 -> 5, 1 -> 5, 1 -> 4 and weights 0.2 and 1 differed by little
# more than the two seeds did. In nearly all pairs of runs the probe was higher with SRA at the
# student's block, and so was the denoising loss; a weight of 0.2 made both differences smaller. The
# probe is read at t = 0.5, since at 0.25 it was near its ceiling in both arms.
MODEL = "--width 64 --depth 8 --batch-size 64 --lr 2e-3"
SHORT = "--width 32 --depth 4 --batch-size 32 --student-layer 1 --teacher-layer 3"
PROBE_TIME = 0.5  # noise level of the linear probe, where 0 is data and 1 is noise
MAP_TIME = 0.25  # noise level of the maps
MAPPED = 4  # images whose features are shown

# --------------------------------------------------------------------------------------------------
# One arm, one seed


class Job(NamedTuple):
    """One training."""

    arm: str
    seed: int

    def __str__(self) -> str:
        return f"seed {self.seed}, {self.arm:>11}"


class Result(NamedTuple):
    """What one arm of one seed leaves behind; NumPy arrays, since it travels between processes."""

    denoising: list[float]  # training loss by step
    alignment: list[float]  # SRA's unweighted distance, 1 - cosine, by step
    held_out: float  # denoising loss of the EMA model on held-out images
    probes: list[float]  # accuracy of a linear probe after each block of the EMA model
    samples: np.ndarray  # [n, C, H, W]; sample i is of class i % classes
    # colours [blocks, MAPPED, h, w, 3]: the first principal components of the EMA model's tokens
    maps: np.ndarray


Results = dict[Job, Result]


def train_arm(
    report: side_by_side.Report, arguments: list[str], images: int, sampling_steps: int
) -> Result:
    """Train one arm and measure its EMA model. Runs in a process of its own."""
    run = make_run(arguments)
    losses = torch.zeros(run.settings.steps, 2)
    for step, both in enumerate(torch_sit.train(run)):
        losses[step] = torch.stack(both)
        if run.step % 10 == 0:
            report(run.step, "")
    report(run.step, "measuring")
    denoising, alignment = losses.T.tolist()
    samples, _ = measures.samples(run.ema, run.data, images, sampling_steps)
    return Result(
        denoising=denoising,
        alignment=[term / run.settings.weight for term in alignment],
        held_out=measures.held_out_loss(run.ema, run.data),
        probes=measures.probe(run.ema, run.data, [PROBE_TIME])[PROBE_TIME],
        samples=samples.cpu().numpy(),
        maps=feature_maps(run),
    )


def make_run(arguments: list[str]) -> torch_sit.Run:
    settings = common.parse(torch_sit.PARSER, ["--patch", "2", *arguments])
    return torch_sit.Run(common.load_data(settings), settings)


def mapped_images(data: measures.Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """The images of the maps and their noise: one held-out image of each of the first classes."""
    labels = data.held_out_labels
    chosen = [int((labels == label).nonzero()[0]) for label in range(MAPPED)]
    x0 = data.held_out_images[chosen]
    return x0, measures.noise_like(x0, 4)


def feature_maps(run: torch_sit.Run) -> np.ndarray:
    x0, noise = mapped_images(run.data)
    y = torch.full((MAPPED,), run.model.null_class, device=run.device)
    blocks = features(run.ema, x0, noise, y, times=[MAP_TIME], mean=False)[MAP_TIME]
    grid = (run.model.side, run.model.side)
    return np.stack([diagnostics.pca_maps(tokens, grid=grid) for tokens in blocks])


# --------------------------------------------------------------------------------------------------
# Numbers, table, words


class Metric(NamedTuple):
    """A row of the table: values[arm][seed]."""

    name: str
    values: dict[str, list[float]]
    better: str  # "lower", "higher" or "" where neither is
    real: float | None = None  # the same, of real images nobody trained on

    @property
    def differences(self) -> list[float]:
        """With minus without SRA, seed by seed."""
        return verdicts.pairs(*(self.values[arm] for arm in ARMS))

    def verdict(self) -> str:
        """What the numbers say of SRA."""
        if len(self.differences) < 2:
            return "one seed has no spread, so this decides nothing"
        sign = verdicts.decided(*(self.values[arm] for arm in ARMS))
        if not sign:
            return "within the seeds' spread"
        if not self.better:
            return "higher with SRA" if sign > 0 else "lower with SRA"
        is_better = (sign > 0) == (self.better == "higher")
        return "better with SRA" if is_better else "worse with SRA"


def measure(results: Results, judge: measures.Judge, layers: tuple[int, int]) -> list[Metric]:
    data = judge.data
    device = data.images.device
    samples = {job: torch.tensor(result.samples).to(device) for job, result in results.items()}
    count = len(next(iter(samples.values())))
    labels = torch.arange(count, device=device) % len(data.classes)  # [n]
    real = data.held_out_images[:count]
    real_labels = data.held_out_labels[:count]

    def by_arm(value: Callable[[Job], float]) -> dict[str, list[float]]:
        return {arm: [value(job) for job in results if job.arm == arm] for arm in ARMS}

    def probes(block: int) -> dict[str, list[float]]:
        return by_arm(lambda job: results[job].probes[block - 1])

    student, teacher = layers
    held_out = by_arm(lambda job: results[job].held_out)
    frechet = by_arm(lambda job: judge.frechet(samples[job]))
    accuracy = by_arm(lambda job: judge.accuracy(samples[job], labels))
    nearest = by_arm(lambda job: judge.nearest(samples[job]))
    real_accuracy = judge.accuracy(real, real_labels)
    return [
        Metric(f"Linear probe, block {student} (student's)", probes(student), "higher"),
        Metric(f"Linear probe, block {teacher} (teacher's)", probes(teacher), "higher"),
        Metric("Held-out denoising loss", held_out, "lower"),
        Metric("Frechet distance (judge features)", frechet, "lower", judge.frechet(real)),
        Metric("Judge's accuracy on samples", accuracy, "higher", real_accuracy),
        Metric("Distance to nearest training image", nearest, "", judge.nearest(real)),
    ]


ARROWS = {"lower": " ↓", "higher": " ↑", "": ""}


def print_table(
    metrics: list[Metric], seconds: dict[str, float], seeds: list[int], console: Console
) -> None:
    names = ", ".join(map(str, seeds))
    title = f"Mean ± sd over the seeds {names}; real: the same of unseen real images"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for column in (*ARMS, "difference", "real"):
        table.add_column(column, justify="right", no_wrap=True)
    for metric in metrics:
        cells = [verdicts.mean_sd(metric.values[arm]) for arm in ARMS]
        cells.append(verdicts.mean_sd(metric.differences, "+"))
        cells.append(f"{metric.real:.3f}" if metric.real else "")
        table.add_row(metric.name + ARROWS[metric.better], *cells)
    plain, aligned = (seconds[arm] for arm in ARMS)
    times = [f"{1000 * plain:.1f} ms", f"{1000 * aligned:.1f} ms", f"x {aligned / plain:.2f}", ""]
    table.add_row("Time per training step ↓", *times)
    console.print(table)


CAN_SHOW = (
    "A run this small can show how the representation moves: the probe reads how much a block "
    "knows of a class it is not told. At the student's block part of a gain is by construction, "
    "since SRA pulls it toward a later one. It cannot show what becomes of a large model's "
    "samples, which the paper measures after 400,000 steps on ImageNet: this training ends early, "
    "and if it went on, a thousand tiny images would soon be known by heart."
)


def closing_words(metrics: list[Metric]) -> str:
    """A sentence per metric, and what a run of this size can show, also where SRA loses."""
    lines = [f"* {metric.name}: {metric.verdict()}." for metric in metrics]
    nearest = metrics[-1]
    distances = [*itertools.chain(*nearest.values.values())]
    closeness = statistics.fmean(distances) / (nearest.real or 1.0)
    copies = "no sign of copying"
    if closeness < 0.7:
        copies = "a sign of copying, which flatters the scores of generation"
    samples = (
        f"Samples lie {closeness:.2f} times as far from the nearest training image as unseen real "
        f"images do: {copies}."
    )
    return "\n".join([*lines, "", f"{samples} {CAN_SHOW}"])


# --------------------------------------------------------------------------------------------------
# The picture


def draw(results: Results, data: measures.Tensors, layers: tuple[int, int], file: Path) -> None:
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(13, 11.2), layout="constrained")
    heights = (1.25, 1, 0.62)
    parts = figure.subfigures(3, 1, squeeze=False, height_ratios=heights, hspace=0.04)
    top, middle, bottom = parts[:, 0]
    seed = next(iter(results)).seed
    top.suptitle(
        f"Samples by class, seed {seed}: each sample starts from the same noise in both arms",
        fontsize=12,
    )
    for axis, arm in zip(top.subplots(1, 2), ARMS, strict=True):
        draw_samples(axis, results[Job(arm, seed)].samples, arm)
    loss_axis, cosine_axis, probe_axis = middle.subplots(1, 3, width_ratios=(1, 1, 1.35))
    draw_losses(loss_axis, results)
    draw_cosine(cosine_axis, results)
    draw_probes(probe_axis, results, layers)
    for axis in (loss_axis, cosine_axis, probe_axis):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
        axis.set_axisbelow(True)
    draw_maps(bottom, {arm: results[Job(arm, seed)].maps for arm in ARMS}, data, layers)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def draw_samples(
    axis: Axes, samples: np.ndarray, arm: str, classes: int = 10, columns: int = 14
) -> None:
    _, channels, height, width = samples.shape
    by_class = samples.reshape(-1, classes, channels, height, width)[:columns, :, 0]
    white_edge = ((0, 0), (0, 0), (0, 1), (0, 1))
    tiles = np.pad(by_class, white_edge, constant_values=1.0)  # [columns, classes, H + 1, W + 1]
    side = height + 1
    mosaic = tiles.transpose(1, 2, 0, 3).reshape(classes * side, -1)
    axis.imshow(mosaic, cmap="gray", vmin=-1, vmax=1)
    middles = [side * (row + 0.5) - 1 for row in range(classes)]
    axis.set_yticks(middles, [str(row) for row in range(classes)])
    axis.set_xticks([])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title(arm, color=COLORS[arm], fontweight="bold")


def draw_losses(axis: Axes, results: Results) -> None:
    for arm in ARMS:
        losses = [result.denoising for job, result in results.items() if job.arm == arm]
        draw_band(axis, *running_mean(losses), arm)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.set(title="Denoising loss in training", xlabel="step")
    axis.legend(frameon=False)


def draw_cosine(axis: Axes, results: Results) -> None:
    arm = "with SRA"
    distances = [result.alignment for job, result in results.items() if job.arm == arm]
    steps, distance = running_mean(distances)
    draw_band(axis, steps, 1 - distance, arm)
    axis.set(title="Cosine of student and teacher", xlabel="step", ylim=(0, 1))


def running_mean(curves: list[list[float]], window: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and means over the `window` steps before them, for each seed: [seeds, steps]."""
    values = np.array(curves)
    count = values.shape[1]
    window = min(window, count // 2)
    windows = np.lib.stride_tricks.sliding_window_view(values, window, axis=1)
    return np.arange(window, count + 1), windows.mean(-1)


def draw_band(axis: Axes, steps: np.ndarray, values: np.ndarray, arm: str) -> None:
    """The seeds' mean as a line, their range as a band."""
    color = COLORS[arm]
    axis.plot(steps, values.mean(0), color=color, label=arm, linewidth=1.8)
    axis.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0)


def draw_probes(axis: Axes, results: Results, layers: tuple[int, int]) -> None:
    for shift, arm in zip((-0.2, 0.2), ARMS, strict=True):
        probes = [result.probes for job, result in results.items() if job.arm == arm]
        accuracies = np.array(probes)  # [seeds, depth]
        blocks = np.arange(1, accuracies.shape[1] + 1)
        axis.bar(blocks + shift, accuracies.mean(0), 0.38, color=COLORS[arm], label=arm)
        for row in accuracies:
            axis.plot(blocks + shift, row, ".", color="black", markersize=3)
    student, teacher = layers
    names = {student: "\nstudent", teacher: "\nteacher"}
    axis.set_xticks(blocks, [f"{block}{names.get(block, '')}" for block in blocks])
    title = "Linear probe accuracy by block (dots: seeds)"
    axis.set(title=title, xlabel="after block", ylim=(0, 1))
    axis.legend(frameon=False, loc="upper left", ncols=2)


def draw_maps(
    figure: SubFigure,
    maps: dict[str, np.ndarray],
    data: measures.Tensors,
    layers: tuple[int, int],
) -> None:
    """A row for each arm: noisy images, and their tokens after two blocks as colours."""
    figure.suptitle(
        f"What a block sees where, at t = {MAP_TIME}: the first three principal components of its "
        "tokens as red, green and blue",
        fontsize=12,
    )
    noisy = noisy_images(data)
    axes = figure.subplots(len(ARMS), 4 * MAPPED, width_ratios=[1, 1, 1, 0.3] * MAPPED)
    for line, arm in zip(axes, ARMS, strict=True):
        for axis in line:
            axis.set(xticks=[], yticks=[], frame_on=False)
        name = {"color": COLORS[arm], "fontweight": "bold", "rotation": 0}
        line[0].set_ylabel(arm, ha="right", va="center", **name)
        for n in range(MAPPED):
            pictures = {"input": noisy[n]}
            pictures |= {f"block {layer}": maps[arm][layer - 1][n] for layer in layers}
            for axis, (title, picture) in zip(line[4 * n :], pictures.items(), strict=False):
                axis.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                if arm == next(iter(ARMS)):
                    axis.set_title(title, fontsize=9)


def noisy_images(data: measures.Tensors) -> np.ndarray:  # [MAPPED, H, W, C]
    x0, noise = mapped_images(data)
    t = torch.full((MAPPED,), MAP_TIME, device=x0.device)
    x = torch_sit.PATH.add_noise(x0, noise, t)
    return np.clip(x.movedim(1, -1).cpu().numpy() / 2 + 0.5, 0, 1)


# --------------------------------------------------------------------------------------------------
# The command line


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=common.Formatter)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[3, 4, 5], help="a training of each arm per seed")
    add("--steps", type=int, default=600, help="optimizer steps of each training")
    add("--out", type=Path, default=Path("runs/demo"), help="folder of demo.png")
    add("--short", action="store_true", help="seconds, to see that it runs; no meaning in numbers")
    if parser.parse_args().short:
        parser.set_defaults(steps=20, seeds=[0, 1])
    settings = parser.parse_args()
    if settings.steps < 4 or len(set(settings.seeds)) < len(settings.seeds):
        parser.error(
            "Four steps are the least, and seeds must differ. "
            f"Received: {settings.steps}, {settings.seeds}."
        )
    return settings


def train_all(arms: dict[Job, list[str]], settings: argparse.Namespace) -> Results:
    """All trainings, side by side; the results in the order of the jobs."""
    images, sampling_steps = (40, 4) if settings.short else (360, 16)
    jobs = {job: (arguments, images, sampling_steps) for job, arguments in arms.items()}
    workers = min(len(jobs), os.cpu_count() or 1)
    found: Results = {}
    side_by_side.train_all(train_arm, jobs, settings.steps, workers, found.__setitem__)
    return {job: found[job] for job in jobs}


def time_arms(runs: dict[str, torch_sit.Run], turns: int) -> dict[str, float]:
    """Seconds per step of each arm."""
    steps = {}
    for arm, run in runs.items():
        run.settings.steps = 10**6  # it ends when all turns have been taken
        steps[arm] = functools.partial(next, torch_sit.train(run))
    return measures.time_steps(steps, turns)


def main() -> None:
    settings = parse()
    console = Console()
    began = time.perf_counter()
    model = (SHORT if settings.short else MODEL).split()
    model += ["--steps", str(settings.steps)]
    arms = {
        Job(arm, seed): [*model, "--seed", str(seed), *more]
        for seed in settings.seeds
        for arm, more in ARMS.items()
    }
    results = train_all(arms, settings)

    console.print("Judging the samples and timing the steps ...")
    torch.set_num_threads(1)
    first_seed = settings.seeds[0]
    runs = {arm: make_run(arms[Job(arm, first_seed)]) for arm in ARMS}
    aligned = runs["with SRA"]
    assert aligned.align is not None
    layers = aligned.align.loss.layers(len(aligned.model.blocks))
    judge = measures.Judge(aligned.data, epochs=2 if settings.short else 20)
    metrics = measure(results, judge, layers)
    seconds = time_arms(runs, turns=2 if settings.short else 8)

    picture = settings.out / "demo.png"
    settings.out.mkdir(parents=True, exist_ok=True)
    draw(results, aligned.data, layers, picture)
    print_table(metrics, seconds, settings.seeds, console)
    console.print(closing_words(metrics), highlight=False)
    took = time.perf_counter() - began
    console.print(f"\nPicture: {picture} ({took:.0f} s in all)", soft_wrap=True)


if __name__ == "__main__":
    main()
