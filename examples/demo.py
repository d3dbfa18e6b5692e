"""What SRA does to a small SiT, measured in minutes on a CPU: the same training with and without it, over several seeds.

    python examples/demo.py                 a table, and the picture runs/demo/demo.png
    python examples/demo.py --seeds 6 7 8   other seeds
    python examples/demo.py --short         seconds: a few steps of a tiny model, to see that everything runs

Model and training are those of torch_sit.py, on scikit-learn's digits. Within a seed both arms have the same first weights,
batches, dropped labels, noise and times; all that differs is SRA. The words in the table are computed from its numbers.
"""

import argparse
import contextlib
import itertools
import multiprocessing
import os
import queue
import statistics
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import common
import matplotlib
import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
import torch_sit
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

ARMS = {"without SRA": ["--no-sra"], "with SRA": []}
COLORS = {"without SRA": "#8a8a8a", "with SRA": "#d1495b"}

# Chosen on the seeds 100 and 101; 0, 1 and 2 had been looked at with other settings, so the demo shows 3, 4 and 5. Of the
# learning rates 1e-3, 2e-3 and 4e-3 the middle one stayed; the largest was a little better in the arm without SRA. Layers and
# weight are the library's own advice (0.25 and 0.7 of the depth; 0.5): layers 2 -> 5, 1 -> 5, 1 -> 4 and weights 0.2 and 1
# differed by little more than the two seeds did. In nearly all pairs of runs the probe was higher with SRA at the student's
# block, and so was the denoising loss; a weight of 0.2 made both differences smaller. The probe is read at t = 0.5, since at
# 0.25 it was near its ceiling in both arms.
MODEL = ["--width", "64", "--depth", "8", "--batch-size", "64", "--lr", "2e-3"]
SHORT = ["--width", "32", "--depth", "4", "--batch-size", "32", "--student-layer", "1", "--teacher-layer", "3"]
PROBE_TIME = 0.5  # the noise level of the linear probe, on an axis where 0 is data and 1 is noise

# ---------------------------------------------------------------------------------------------------------- one arm, one seed


class Job(NamedTuple):
    """One training."""

    arm: str
    seed: int


class Result(NamedTuple):
    """What one arm of one seed leaves behind."""

    denoising: list[float]  # training loss by step
    alignment: list[float]  # SRA's unweighted distance, 1 - cosine, by step
    held_out: float  # denoising loss of the EMA model on held-out images
    probes: list[float]  # accuracy of a linear probe after each block of the EMA model
    samples: Any  # [n, C, H, W]; sample i is of class i % classes; a NumPy array between the processes


def train_arm(job: Job, arguments: list[str], images: int, sampling_steps: int, messages: Any) -> Result:
    """Train one arm and measure its EMA model. Runs in a process of its own, on one thread: a core per arm."""
    torch.set_num_threads(1)
    run = start(arguments)
    losses = torch.zeros(run.settings.steps, 2)
    for step in range(run.settings.steps):
        losses[step] = torch.stack(run.training_step())
        if step % 10 == 9:
            messages.put((job, step + 1, ""))
    messages.put((job, run.step, "measuring"))
    denoising, alignment = losses.T.tolist()
    alignment = [term / run.settings.weight for term in alignment]
    y = torch.arange(images) % len(run.data.classes)
    noise = torch.randn((images, *run.tensors.images.shape[1:]), generator=torch.Generator().manual_seed(1))
    samples = torch_sit.sample(run.ema, noise.to(run.device), y.to(run.device), sampling_steps).clamp(-1, 1)
    return Result(denoising, alignment, held_out_loss(run), probe_accuracies(run), samples.cpu().numpy())


def start(arguments: list[str]) -> torch_sit.Run:
    settings = common.parse(torch_sit.PARSER, ["--patch", "2", *arguments])
    return torch_sit.Run(common.load_data(settings), settings)


@torch.no_grad()
def held_out_loss(run: torch_sit.Run) -> float:
    """The EMA model's denoising loss on the held-out images: the same noise and the same 10 times for every arm and seed."""
    x0, y = run.tensors.held_out_images, run.tensors.held_out_labels
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(2)).to(x0.device)
    losses = []
    for level in torch.linspace(0.05, 0.95, 10):
        t = torch.full((len(x0),), float(level), device=x0.device)
        prediction = run.ema(torch_sit.PATH.add_noise(x0, noise, t), t, y)
        losses.append(F.mse_loss(prediction, torch_sit.PATH.velocity(x0, noise, t)).item())
    return statistics.fmean(losses)


def probe_accuracies(run: torch_sit.Run, model: nn.Module | None = None, time: float = PROBE_TIME) -> list[float]:
    """How well a linear classifier reads the class from the mean token after each block; held-out accuracy.

    Of the EMA model, if no other is given.
    """
    data, copies = run.tensors, (1, 4)  # held-out images are few: each under four draws of noise, for a steadier number
    train, held_out = (
        features(run, x.repeat(n, 1, 1, 1), model or run.ema, time)
        for x, n in zip((data.images, data.held_out_images), copies, strict=True)
    )
    labels, held_out_labels = (y.repeat(n).cpu() for y, n in zip((data.labels, data.held_out_labels), copies, strict=True))
    probes = []
    for x, x_held_out in zip(train, held_out, strict=True):
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
        probes.append(probe.fit(x, labels).score(x_held_out, held_out_labels))
    return probes


@torch.no_grad()
def features(run: torch_sit.Run, x0: torch.Tensor, model: nn.Module, time: float) -> list[np.ndarray]:
    """A model's mean token [n, D] after each block, of images at one noise level."""
    tokens: list[np.ndarray] = []
    keep = lambda block, inputs, output: tokens.append(output.mean(1).cpu().numpy())  # noqa: E731
    hooks = [block.register_forward_hook(keep) for block in model.get_submodule("blocks").children()]
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(3)).to(x0.device)
    t = torch.full((len(x0),), time, device=x0.device)
    nothing = torch.full((len(x0),), run.model.null_class, device=x0.device)  # told the class, it would only repeat it
    model(torch_sit.PATH.add_noise(x0, noise, t), t, nothing)
    for hook in hooks:
        hook.remove()
    return tokens


def train_all(jobs: dict[Job, list[str]], images: int, sampling_steps: int) -> dict[Job, Result]:
    """All arms of all seeds, as many at a time as there are cores."""
    spawn = multiprocessing.get_context("spawn")
    workers = min(len(jobs), os.cpu_count() or 1)
    with spawn.Manager() as manager, ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        messages = manager.Queue()
        rest = images, sampling_steps, messages
        futures = {job: pool.submit(train_arm, job, arguments, *rest) for job, arguments in jobs.items()}
        show_progress(futures, common.parse(torch_sit.PARSER, next(iter(jobs.values()))).steps, messages)
        return {job: future.result() for job, future in futures.items()}


def show_progress(futures: dict[Job, Future[Result]], steps: int, messages: Any) -> None:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps {task.fields[state]}")
    with Progress(*columns) as progress:
        bars = {job: progress.add_task(f"seed {job.seed}, {job.arm:>11}", total=steps, state="") for job in futures}
        while not all(future.done() for future in futures.values()):
            with contextlib.suppress(queue.Empty):
                job, step, state = messages.get(timeout=0.2)
                progress.update(bars[job], completed=step, state=state)
            for future in futures.values():
                if future.done():
                    future.result()  # raises what the training raised
        for bar in bars.values():
            progress.update(bar, completed=steps, state="done")


def time_steps(jobs: dict[Job, list[str]], count: int) -> dict[str, float]:
    """Median seconds per training step of each arm, taken in turns so that whatever else the machine does hits both alike."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    runs = {job.arm: start(arguments) for job, arguments in jobs.items()}
    seconds: dict[str, list[float]] = {arm: [] for arm in runs}
    for turn in range(count + 3):
        for arm, run in runs.items():
            began = time.perf_counter()
            torch.stack(run.training_step()).tolist()  # reading the losses waits for a GPU
            if turn >= 3:  # the first steps are slower: memory is allocated, checks are made
                seconds[arm].append(time.perf_counter() - began)
    torch.set_num_threads(threads)
    return {arm: statistics.median(values) for arm, values in seconds.items()}


# ---------------------------------------------------------------------------------------------------------------- the judge


class Judge(nn.Module):
    """A small convolutional classifier of the real images. Its features and its opinion judge the samples of both arms."""

    def __init__(self, data: common.Data, epochs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        _, channels, size, _ = data.images.shape
        self.data = data
        self.body = nn.Sequential(nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
                                  nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * (size // 2) ** 2, 32), nn.Tanh())  # fmt: skip
        self.head = nn.Linear(32, len(data.classes))
        self.to(data.images.device)
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3)
        for _ in range(epochs):
            for chosen in torch.randperm(len(data.images)).split(64):
                F.cross_entropy(self.head(self.body(data.images[chosen])), data.labels[chosen]).backward()
                optimizer.step()
                optimizer.zero_grad()

    @torch.no_grad()
    def accuracy(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        return (self.head(self.body(images)).argmax(1) == labels).float().mean().item()

    @torch.no_grad()
    def frechet(self, images: torch.Tensor) -> float:
        """Frechet distance between Gaussians fitted to the features of `images` and of all real training images."""
        (mean, covariance), (real_mean, real_covariance) = map(self._gaussian, (images, self.data.images))
        root = scipy.linalg.sqrtm(covariance @ real_covariance).real
        return float(np.sum((mean - real_mean) ** 2) + np.trace(covariance + real_covariance - 2 * root))

    def _gaussian(self, images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        features = self.body(images).double().cpu().numpy()  # [n, 32]
        return features.mean(0), np.cov(features, rowvar=False)

    def nearest(self, images: torch.Tensor) -> float:
        """Median distance of an image to the nearest real training image, in pixel space: small where memory speaks."""
        return torch.cdist(images.flatten(1), self.data.images.flatten(1)).min(1).values.median().item()


# ---------------------------------------------------------------------------------------------------- numbers, table, words


class Metric(NamedTuple):
    """A row of the table: values[arm][seed]."""

    name: str
    values: dict[str, list[float]]
    better: str  # "lower", "higher" or "" where neither is
    real: float | None = None  # the same, of real images nobody trained on

    @property
    def differences(self) -> list[float]:
        """With minus without SRA, seed by seed: the two arms of a seed share everything else."""
        return [b - a for a, b in zip(*(self.values[arm] for arm in ARMS), strict=True)]

    def verdict(self) -> str:
        """What the numbers say of SRA. With few seeds and many rows chance looks like an effect, so a word is given only where
        all seeds agree, and the mean difference exceeds each arm's spread and twice its own."""
        d = self.differences
        if len(d) < 2:
            return "one seed has no spread, so this decides nothing"
        spread = max(2 * statistics.stdev(d), *(statistics.stdev(values) for values in self.values.values()))
        if not (min(d) > 0 or max(d) < 0) or abs(statistics.fmean(d)) <= spread:
            return "within the seeds' spread"
        higher = d[0] > 0
        if not self.better:
            return "higher with SRA" if higher else "lower with SRA"
        return "better with SRA" if higher == (self.better == "higher") else "worse with SRA"


def measure(results: dict[Job, Result], judge: Judge, layers: tuple[int, int]) -> list[Metric]:
    data, samples = judge.data, next(iter(results.values())).samples
    labels = torch.arange(len(samples), device=samples.device) % len(data.classes)  # [n]

    def by_arm(value: Callable[[Result], float]) -> dict[str, list[float]]:
        return {arm: [value(result) for job, result in results.items() if job.arm == arm] for arm in ARMS}

    student, teacher = layers
    real, real_labels = data.held_out_images[: len(labels)], data.held_out_labels[: len(labels)]
    return [
        Metric(f"Linear probe, block {student} (student's)", by_arm(lambda r: r.probes[student - 1]), "higher"),
        Metric(f"Linear probe, block {teacher} (teacher's)", by_arm(lambda r: r.probes[teacher - 1]), "higher"),
        Metric("Held-out denoising loss", by_arm(lambda r: r.held_out), "lower"),
        Metric("Frechet distance (judge features)", by_arm(lambda r: judge.frechet(r.samples)), "lower", judge.frechet(real)),
        Metric("Judge's accuracy on samples", by_arm(lambda r: judge.accuracy(r.samples, labels)), "higher",
               judge.accuracy(real, real_labels)),
        Metric("Distance to nearest training image", by_arm(lambda r: judge.nearest(r.samples)), "", judge.nearest(real)),
    ]  # fmt: skip


def mean_sd(values: list[float], sign: str = "") -> str:
    mean = f"{statistics.fmean(values):{sign}.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def print_table(metrics: list[Metric], seconds: dict[str, float], seeds: list[int], console: Console) -> None:
    title = f"Mean ± sd over the seeds {', '.join(map(str, seeds))}; real: the same of unseen real images"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for column in (*ARMS, "difference", "real"):
        table.add_column(column, justify="right", no_wrap=True)
    arrows = {"lower": " ↓", "higher": " ↑", "": ""}
    for m in metrics:
        cells = (mean_sd(m.values[arm]) for arm in ARMS)
        table.add_row(m.name + arrows[m.better], *cells, mean_sd(m.differences, "+"), f"{m.real:.3f}" if m.real else "")
    plain, aligned = (1000 * seconds[arm] for arm in ARMS)
    table.add_row("Time per training step ↓", f"{plain:.1f} ms", f"{aligned:.1f} ms", f"x {aligned / plain:.2f}", "")
    console.print(table)


def closing_words(metrics: list[Metric]) -> str:
    """A sentence per metric, and what a run of this size can show; the words come from the numbers, also where SRA loses."""
    lines = [f"* {m.name}: {m.verdict()}." for m in metrics]
    nearest = metrics[-1]
    closeness = statistics.fmean(itertools.chain(*nearest.values.values())) / (nearest.real or 1.0)
    copies = "a sign of copying, which flatters the scores of generation" if closeness < 0.7 else "no sign of copying"
    return "\n".join([*lines, "", f"Samples lie {closeness:.2f} times as far from the nearest training image as unseen real "
                      f"images do: {copies}. {CAN_SHOW}"])  # fmt: skip


CAN_SHOW = (
    "A run this small can show how the representation moves: the probe reads how much a block knows of a class it is not told. "
    "At the student's block part of a gain is by construction, since SRA pulls it toward a later one. It cannot show what "
    "becomes of a large model's samples, which the paper measures after 400,000 steps on ImageNet: this training ends early, "
    "and if it went on, a thousand tiny images would soon be known by heart."
)


# -------------------------------------------------------------------------------------------------------------- the picture


def draw(results: dict[Job, Result], metrics: list[Metric], layers: tuple[int, int], file: Path) -> None:
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(13, 8.6), layout="constrained")
    (top,), (bottom,) = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.25, 1), hspace=0.04)
    seed = next(iter(results)).seed
    top.suptitle(f"Samples by class, seed {seed}: each sample starts from the same noise in both arms", fontsize=12)
    for axis, arm in zip(top.subplots(1, 2), ARMS, strict=True):
        draw_samples(axis, next(r.samples for job, r in results.items() if job == Job(arm, seed)), arm)
    loss_axis, cosine_axis, probe_axis = bottom.subplots(1, 3, width_ratios=(1, 1, 1.35))
    draw_losses(loss_axis, results)
    draw_cosine(cosine_axis, results)
    draw_probes(probe_axis, results, layers)
    for axis in (loss_axis, cosine_axis, probe_axis):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
        axis.set_axisbelow(True)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def draw_samples(axis: Any, samples: torch.Tensor, arm: str, classes: int = 10, columns: int = 14) -> None:
    rows = samples.cpu().unflatten(0, (-1, classes))[:columns].transpose(0, 1)  # [classes, columns, C, H, W]
    tiles = F.pad(rows[:, :, 0], (0, 1, 0, 1), value=1.0)  # [classes, columns, H + 1, W + 1]
    mosaic = tiles.transpose(1, 2).flatten(2).flatten(0, 1)  # [classes * (H + 1), columns * (W + 1)]
    axis.imshow(mosaic.numpy(), cmap="gray", vmin=-1, vmax=1)
    side = tiles.shape[-1]
    axis.set_yticks([side * (row + 0.5) - 1 for row in range(classes)], [str(row) for row in range(classes)])
    axis.set_xticks([])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title(arm, color=COLORS[arm], fontweight="bold")


def curves(results: dict[Job, Result], arm: str, field: str, window: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and a running mean over `window` steps for each seed [seeds, steps]."""
    values = np.array([getattr(result, field) for job, result in results.items() if job.arm == arm])
    window = min(window, values.shape[1] // 2)
    smooth = np.lib.stride_tricks.sliding_window_view(values, window, axis=1).mean(-1)
    return np.arange(window, values.shape[1] + 1), smooth


def draw_band(axis: Any, steps: np.ndarray, values: np.ndarray, arm: str) -> None:
    axis.plot(steps, values.mean(0), color=COLORS[arm], label=arm, linewidth=1.8)
    axis.fill_between(steps, values.min(0), values.max(0), color=COLORS[arm], alpha=0.2, linewidth=0)


def draw_losses(axis: Any, results: dict[Job, Result]) -> None:
    for arm in ARMS:
        draw_band(axis, *curves(results, arm, "denoising"), arm)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.set(title="Denoising loss in training", xlabel="step")
    axis.legend(frameon=False)


def draw_cosine(axis: Any, results: dict[Job, Result]) -> None:
    steps, distance = curves(results, "with SRA", "alignment")
    draw_band(axis, steps, 1 - distance, "with SRA")
    axis.set(title="Cosine of student and teacher", xlabel="step", ylim=(0, 1))


def draw_probes(axis: Any, results: dict[Job, Result], layers: tuple[int, int]) -> None:
    for shift, arm in zip((-0.2, 0.2), ARMS, strict=True):
        accuracies = np.array([result.probes for job, result in results.items() if job.arm == arm])  # [seeds, depth]
        blocks = np.arange(1, accuracies.shape[1] + 1)
        axis.bar(blocks + shift, accuracies.mean(0), 0.38, color=COLORS[arm], label=arm)
        for row in accuracies:
            axis.plot(blocks + shift, row, ".", color="black", markersize=3)
    names = {layers[0]: "\nstudent", layers[1]: "\nteacher"}
    axis.set_xticks(blocks, [f"{block}{names.get(block, '')}" for block in blocks])
    axis.set(title="Linear probe accuracy by block (dots: seeds)", xlabel="after block", ylim=(0, 1))
    axis.legend(frameon=False, loc="upper left", ncols=2)


# --------------------------------------------------------------------------------------------------------- the command line


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=common.Formatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 4, 5], help="one training of each arm per seed")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of each training")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of demo.png")
    parser.add_argument("--short", action="store_true", help="seconds: to see that everything runs; the numbers mean nothing")
    if parser.parse_args().short:
        parser.set_defaults(steps=20, seeds=[0, 1])
    settings = parser.parse_args()
    if settings.steps < 4 or len(set(settings.seeds)) < len(settings.seeds):
        parser.error(f"Four steps are the least, and seeds must differ. Received: {settings.steps}, {settings.seeds}.")
    return settings


def main() -> None:
    settings, console, began = parse(), Console(), time.perf_counter()
    model = [*(SHORT if settings.short else MODEL), "--steps", str(settings.steps)]
    jobs = {Job(arm, seed): [*model, "--seed", str(seed), *ARMS[arm]] for seed in settings.seeds for arm in ARMS}
    results = train_all(jobs, *((40, 4) if settings.short else (360, 16)))
    console.print("Judging the samples and timing the steps ...")
    first = start(jobs[Job("with SRA", settings.seeds[0])])
    device = first.device
    judge = Judge(first.tensors, epochs=2 if settings.short else 20)
    results = {job: result._replace(samples=torch.tensor(result.samples).to(device)) for job, result in results.items()}
    assert first.align  # the arm with SRA
    layers = first.align.loss.layers(len(first.model.blocks))
    metrics = measure(results, judge, layers)
    seconds = time_steps({job: jobs[job] for job in list(jobs)[:2]}, 5 if settings.short else 30)
    settings.out.mkdir(parents=True, exist_ok=True)
    draw(results, metrics, layers, settings.out / "demo.png")
    print_table(metrics, seconds, settings.seeds, console)
    console.print(closing_words(metrics), highlight=False)
    console.print(f"\nPicture: {settings.out / 'demo.png'} ({time.perf_counter() - began:.0f} s in all)", soft_wrap=True)


if __name__ == "__main__":
    main()
