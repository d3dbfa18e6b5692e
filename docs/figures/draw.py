"""Draws the figures of the site, light and dark.

python docs/figures/draw.py            into docs/figures/
python docs/figures/draw.py --out DIR

The curves come from docs/figures/runs.csv and the study's results.
"""

import argparse
import csv
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from sklearn.datasets import load_digits

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "studies"))
import report
from records import Of, Results

HERE = Path(__file__).parent
STUDY = {
    group: ROOT / "studies" / "results" / f"fashion-mnist-{group}.csv"
    for group in ("core", "ablations")
}
INK = {"light": "#2b2b2b", "dark": "#e2e4e9"}
FAINT = {"light": "#b9c0c6", "dark": "#5b6270"}
RED, BLUE, GREY = "#d1495b", "#3f88c5", "#8a8a8a"
ARMS = {"none": GREY, "default": RED, "paper recipe": BLUE}  # of the study
TIMES = {0.1: "-", 0.3: "--", 0.5: "-.", 0.7: ":"}  # noise levels, as line styles
RUNS = {
    "expect_healthy": {
        "healthy": ("weight 0.5", RED),
        "schedule": ("0.5 * Warmup(100) * Stop(400)", BLUE),
    },
    "expect_l2": {
        "l2": ("L2, weight 30, rate 0.02", RED),
        "fast": ("cosine, weight 0.5, rate 0.02", BLUE),
        "healthy": ("cosine, weight 0.5, rate 0.002", GREY),
    },
    "expect_direction": {
        "direction": ("direction declared wrong", RED),
        "healthy": ("right", GREY),
    },
    "expect_frozen": {"frozen": ("update() never called", RED), "healthy": ("called", GREY)},
}
PANELS = {
    "expect_healthy": ("denoising", "weight", "cosine", "student_norm", "teacher_norm", "drift"),
    "expect_l2": ("denoising", "alignment", "teacher_norm"),
    "expect_direction": ("denoising", "alignment", "cosine"),
    "expect_frozen": ("cosine", "teacher_norm", "drift"),
}
TITLES = {
    "denoising": "denoising loss",
    "alignment": "weighted term",
    "weight": "weight of the term",
    "cosine": "cosine",
    "student_norm": "norm of student tokens, projected",
    "teacher_norm": "norm of teacher tokens",
    "drift": "distance of teacher from model",
}


class Scheme(NamedTuple):
    """Colours of text and of what stands behind it."""

    ink: str
    faint: str


# The method


class Side(NamedTuple):
    """One of the two networks in the method's figure.

    Attributes:
        y: where its row begins.
        t: its noise level.
        layer: the block whose tokens are compared.
        caption: what stands below its sample.
        color: of the tapped block.
    """

    y: float
    t: float
    layer: int
    caption: str
    color: str


STUDENT = Side(5.0, 0.5, 3, r"$x_t$,  $t = 0.5$", RED)
TEACHER = Side(0.9, 0.35, 8, r"$x_{t'}$,  $t' = t - k = 0.35$", BLUE)
DEPTH = 12
PROJECTOR = 3.75  # where its box begins


def method(scheme: Scheme) -> Figure:
    """One sample at two noise levels, two networks, and the arrow between their layers."""
    figure, axis = pyplot.subplots(figsize=(6.4, 3.45))
    axis.set(xlim=(0, 15.2), ylim=(0, 8.2), aspect="equal")
    axis.axis("off")
    for side in (STUDENT, TEACHER):
        draw_sample(axis, side, scheme)
        for n in range(1, DEPTH + 1):
            draw_block(axis, side, n, scheme)
    small = {"color": scheme.ink, "fontsize": 9}
    large = {"color": scheme.ink, "fontsize": 10}
    axis.text(12.2, 6.1, "prediction:\ndenoising loss", va="center", **small)
    axis.text(12.2, 2.0, "not run", va="center", **small)
    axis.text(3.4, 7.25, "student: trained", va="bottom", **large)
    axis.text(3.4, 0.8, "teacher: EMA of the student, no gradient", va="top", **large)
    draw_comparison(axis, scheme)
    return figure


def draw_sample(axis: Axes, side: Side, scheme: Scheme) -> None:
    """The noisy image, and an arrow into the network."""
    image = load_digits().images[3] / 8 - 1  # [8, 8], from -1 to 1
    noise = np.random.default_rng(3).standard_normal(image.shape)
    x_t = (1 - side.t) * image + side.t * noise
    extent = (0.2, 2.4, side.y, side.y + 2.2)
    axis.imshow(x_t, cmap="gray", extent=extent, vmin=-1.6, vmax=1.6, zorder=2)
    below = {"ha": "center", "va": "top", "color": scheme.ink, "fontsize": 9}
    axis.text(1.3, side.y - 0.12, side.caption, **below)
    arrow = {"arrowstyle": "->", "color": scheme.ink}
    axis.annotate("", (3.3, side.y + 1.1), (2.5, side.y + 1.1), arrowprops=arrow)


def left_of(n: int) -> float:
    """Where block n begins."""
    return 3.4 + 0.72 * (n - 1)


def draw_block(axis: Axes, side: Side, n: int, scheme: Scheme) -> None:
    """Block n of a network: the tapped one in colour, those that do not run dotted."""
    tapped = n == side.layer
    color = side.color if tapped else scheme.faint
    style: dict[str, Any] = {"facecolor": color}
    if side is TEACHER and n > side.layer:
        style = {"fill": False, "linestyle": ":"}
    corner = (left_of(n), side.y + 0.1)
    axis.add_patch(Rectangle(corner, 0.56, 2.0, edgecolor=color, linewidth=1, **style))
    middle = {"ha": "center", "va": "center", "fontsize": 8}
    ink = "white" if tapped else scheme.ink
    axis.text(left_of(n) + 0.28, side.y + 1.1, str(n), color=ink, **middle)


def draw_comparison(axis: Axes, scheme: Scheme) -> None:
    """From the student's layer through the projector, and to the teacher's."""
    student = left_of(STUDENT.layer) + 0.28
    teacher = left_of(TEACHER.layer) + 0.28
    low = STUDENT.y
    high = TEACHER.y + 2.1
    box = (student - 0.95, PROJECTOR)
    axis.add_patch(Rectangle(box, 1.9, 0.62, facecolor="none", edgecolor=RED))
    words = {"va": "center", "color": scheme.ink, "fontsize": 9}
    axis.text(student, 4.06, "projector", ha="center", **words)
    head = {"arrowstyle": "->", "mutation_scale": 11, "color": RED}
    axis.add_patch(FancyArrowPatch((student, low + 0.1), (student, 4.4), **head))
    both = {"arrowstyle": "<->", "mutation_scale": 12, "color": scheme.ink}
    bend = "angle,angleA=0,angleB=90,rad=0"
    ends = (student + 0.98, 4.06), (teacher, high)
    axis.add_patch(FancyArrowPatch(*ends, connectionstyle=bend, **both))
    axis.text(teacher + 0.15, 4.06, "1 - cosine, per token", **words)


# Curves of runs


def curves(name: str, scheme: Scheme) -> Figure:
    """One panel for each quantity, one line for each run."""
    results = read()
    panels = PANELS[name]
    runs = RUNS[name]
    rows = -(-len(panels) // 2)
    size = (5.6, 1.95 * rows + 0.3 * len(runs))
    figure, axes = pyplot.subplots(rows, 2, figsize=size, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, column in zip(axes.flat, panels, strict=False):
        for run, (label, color) in runs.items():
            steps = results[run]["step"]
            axis.plot(steps, results[run][column], color=color, linewidth=1.3, label=label)
        if name == "expect_l2" and column != "denoising":
            axis.set_yscale("log")
        dress(axis, TITLES[column], "step", scheme)
    return legend(figure, axes[0, 0], scheme)


def read() -> dict[str, dict[str, list[float]]]:
    """{run: {column: values}}."""
    results: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with (HERE / "runs.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            run = row.pop("run")
            for column, value in row.items():
                results[run][column].append(float(value))
    return results


def dress(axis: Axes, title: str, xlabel: str, scheme: Scheme) -> None:
    """Title, grid and colours of a panel."""
    axis.set_title(title, fontsize=8.5, color=scheme.ink)
    axis.set_xlabel(xlabel, fontsize=8, color=scheme.ink)
    axis.set_facecolor("none")
    axis.tick_params(colors=scheme.ink, labelsize=7.5, which="both")
    axis.grid(color=scheme.faint, linewidth=0.4)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(scheme.faint)


def legend(figure: Figure, axis: Axes, scheme: Scheme) -> Figure:
    """The axis's labels, below everything."""
    handles, labels = axis.get_legend_handles_labels()
    text = {"fontsize": 8, "labelcolor": scheme.ink}
    figure.legend(handles, labels, loc="lower left", ncols=1, frameon=False, **text)
    bottom = (0.1 + 0.19 * len(labels)) / figure.get_figheight()
    figure.tight_layout(rect=(0, bottom, 1, 1))
    return figure


# The study


def study_curves(scheme: Scheme) -> Figure:
    """What the arms differ by over the steps, and what the blocks know at the end."""
    results = Results(STUDY["core"])
    figure, axes = pyplot.subplots(2, 2, figsize=(5.6, 4.6))
    draw_differences(axes[0, 0], results, report.LOSS, scheme)
    draw_differences(axes[0, 1], results, report.FRECHET, scheme)
    draw_probes(axes[1, 0], results, scheme)
    draw_probes_by_time(axes[1, 1], results, scheme)
    return legend(figure, axes[0, 0], scheme)


def draw_differences(axis: Axes, results: Results, m: Any, scheme: Scheme) -> None:
    """A measure over the steps, minus that without SRA: the mean, and the seeds' range."""
    for arm, color in ARMS.items():
        mine = Of(arm, m.metric)
        without = Of("none", m.metric)
        steps, _ = results.curve(results.seeds(arm)[0], mine)
        pairs = [results.pairs(step, mine, without) for step in steps]
        values = np.array([np.subtract(*pair) for pair in pairs])  # [steps, seeds]
        label = report.NAMES.get(arm, arm)
        axis.plot(steps, values.mean(1), color=color, linewidth=1.3, label=label)
        span = values.min(1), values.max(1)
        axis.fill_between(steps, *span, color=color, alpha=0.2, linewidth=0)
    dress(axis, f"{m.name}, minus without SRA", "step", scheme)


def draw_probes(axis: Axes, results: Results, scheme: Scheme) -> None:
    """What the blocks know at the end: the mean, and a dot for each seed."""
    last = report.last_step(results)
    for arm, color in ARMS.items():
        blocks = np.array(results.blocks(last, arm, report.EMA, 0.5))  # [depth, seeds]
        numbers = np.arange(1, len(blocks) + 1)
        axis.plot(numbers, blocks.mean(1), color=color, linewidth=1.3)
        axis.plot(numbers, blocks, ".", color=color, markersize=2.5)
    dress(axis, "probe, t = 0.5 (dots: seeds)", "block", scheme)


def draw_probes_by_time(axis: Axes, results: Results, scheme: Scheme) -> None:
    """What the blocks know at four noise levels, without SRA and with the default."""
    last = report.last_step(results)
    beside = {"xytext": (3, 0), "textcoords": "offset points", "va": "center", "fontsize": 7}
    for time, style in TIMES.items():
        for arm, color in [*ARMS.items()][:2]:
            blocks = np.array(results.blocks(last, arm, report.EMA, time)).mean(1)
            numbers = range(1, len(blocks) + 1)
            axis.plot(numbers, blocks, color=color, linewidth=1.2, linestyle=style)
        end = (len(blocks), blocks[-1])
        axis.annotate(f"t = {time}", end, color=scheme.ink, **beside)
    dress(axis, "probe by noise level", "block", scheme)


def study_ablations(scheme: Scheme) -> Figure:
    """What each arm differs by from the one without SRA: dots for seeds, a line at their mean."""
    results = Results(*STUDY.values())
    ablations = STUDY["ablations"]
    step = report.last_step(Results(ablations))
    arms = ["default", *(arm for arm in report.arms_of(ablations) if arm in results)]
    metrics = report.LOSS, report.FRECHET, report.METRICS[0]
    size = (6.4, 0.6 + 0.2 * len(arms))
    figure, axes = pyplot.subplots(1, len(metrics), figsize=size, sharey=True)
    for axis, m in zip(axes, metrics, strict=True):
        axis.axvline(0, color=scheme.ink, linewidth=0.8)
        for place, arm in enumerate(arms):
            base, values = results.pairs(step, m.of("none"), m.of(arm))
            color = RED if arm == "default" else BLUE
            draw_seeds(axis, np.subtract(values, base), place, color)
        axis.locator_params(axis="x", nbins=4)
        dress(axis, m.name, "minus without SRA", scheme)
    names = [report.NAMES.get(arm, arm).replace("->", "→") for arm in arms]
    axes[0].set_yticks(range(len(arms)), names)
    axes[0].invert_yaxis()
    figure.tight_layout()
    return figure


def draw_seeds(axis: Axes, differences: np.ndarray, place: int, color: str) -> None:
    """One row: a dot for each seed, and a line at their mean."""
    row = np.full(len(differences), place)
    axis.plot(differences, row, ".", color=color, markersize=4)
    line = [differences.mean()] * 2
    axis.plot(line, [place - 0.3, place + 0.3], color=color, linewidth=1.3)


# All of them


def figures(scheme: Scheme) -> dict[str, Figure]:
    """The figures by their names."""
    drawn = {"method": method(scheme)}
    for name in RUNS:
        drawn[name] = curves(name, scheme)
    drawn["study_curves"] = study_curves(scheme)
    drawn["study_ablations"] = study_ablations(scheme)
    return drawn


def draw(out: Path) -> None:
    """Write the figures into a folder."""
    settings: dict[str, Any] = {
        "svg.hashsalt": "selfalign",
        "svg.fonttype": "path",
        "font.family": "DejaVu Sans",
    }
    with matplotlib.rc_context(settings):
        for name in INK:
            for title, figure in figures(Scheme(INK[name], FAINT[name])).items():
                file = out / f"{title}_{name}.svg"
                figure.savefig(file, transparent=True, bbox_inches="tight", metadata={"Date": None})
                pyplot.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE)
    draw(parser.parse_args().out)
