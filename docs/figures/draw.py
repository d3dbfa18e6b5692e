"""Draws the figures of the site from docs/figures/runs.csv and the study's results, and the method's: light and dark.

python docs/figures/draw.py            into docs/figures/
python docs/figures/draw.py --out DIR
"""

import argparse
import csv
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from sklearn.datasets import load_digits

sys.path.insert(0, str(Path(__file__).parents[2] / "studies"))
import report
from records import Results

HERE = Path(__file__).parent
STUDY = {group: HERE.parents[1] / "studies" / "results" / f"fashion-mnist-{group}.csv" for group in ("core", "ablations")}
INK = {"light": "#2b2b2b", "dark": "#e2e4e9"}
FAINT = {"light": "#b9c0c6", "dark": "#5b6270"}
RED, BLUE, GREY = "#d1495b", "#3f88c5", "#8a8a8a"
ARMS = {"none": GREY, "default": RED, "paper recipe": BLUE}  # of the study
RUNS = {
    "expect_healthy": {"healthy": ("weight 0.5", RED), "schedule": ("0.5 * Warmup(100) * Stop(400)", BLUE)},
    "expect_l2": {"l2": ("L2, weight 30, rate 0.02", RED), "fast": ("cosine, weight 0.5, rate 0.02", BLUE),
                  "healthy": ("cosine, weight 0.5, rate 0.002", GREY)},
    "expect_direction": {"direction": ("direction declared wrong", RED), "healthy": ("right", GREY)},
    "expect_frozen": {"frozen": ("update() never called", RED), "healthy": ("called", GREY)},
}  # fmt: skip
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


def method(ink: str, faint: str) -> Figure:
    """One sample at two noise levels, two networks, and the arrow from the teacher's layer to the student's."""
    figure, axis = pyplot.subplots(figsize=(6.4, 3.45))
    axis.set(xlim=(0, 15.2), ylim=(0, 8.2), aspect="equal")
    axis.axis("off")
    image = load_digits().images[3] / 8 - 1  # [8, 8], from -1 to 1
    noise = np.random.default_rng(3).standard_normal(image.shape)
    rows = {"student": (5.0, 0.5, 3, r"$x_t$", r"$t = 0.5$"), "teacher": (0.9, 0.35, 8, r"$x_{t'}$", r"$t' = t - k = 0.35$")}
    blocks = {}
    for name, (y, t, layer, sample, time) in rows.items():
        axis.imshow((1 - t) * image + t * noise, cmap="gray", extent=(0.2, 2.4, y, y + 2.2), vmin=-1.6, vmax=1.6, zorder=2)
        axis.text(1.3, y - 0.12, f"{sample},  {time}", ha="center", va="top", color=ink, fontsize=9)
        axis.annotate("", (3.3, y + 1.1), (2.5, y + 1.1), arrowprops={"arrowstyle": "->", "color": ink})
        for n in range(1, 13):
            x, tapped, unused = 3.4 + 0.72 * (n - 1), n == layer, name == "teacher" and n > layer
            color = {"student": RED, "teacher": BLUE}[name] if tapped else faint
            style = {"fill": False, "linestyle": ":"} if unused else {"facecolor": color}
            axis.add_patch(Rectangle((x, y + 0.1), 0.56, 2.0, edgecolor=color, linewidth=1, **style))
            axis.text(x + 0.28, y + 1.1, str(n), ha="center", va="center", fontsize=8, color="white" if tapped else ink)
            if tapped:
                blocks[name] = x + 0.28, y
    axis.text(12.2, 6.1, "prediction:\ndenoising loss", va="center", color=ink, fontsize=9)
    axis.text(12.2, 2.0, "not run", va="center", color=ink, fontsize=9)
    axis.text(3.4, 7.25, "student: trained", color=ink, fontsize=10, va="bottom")
    axis.text(3.4, 0.8, "teacher: EMA of the student, no gradient", color=ink, fontsize=10, va="top")
    (student, low), (teacher, high) = blocks["student"], (blocks["teacher"][0], blocks["teacher"][1] + 2.1)
    projector = (student - 0.95, 3.75)
    axis.add_patch(Rectangle(projector, 1.9, 0.62, facecolor="none", edgecolor=RED))
    axis.text(student, 4.06, "projector", ha="center", va="center", color=ink, fontsize=9)
    axis.add_patch(FancyArrowPatch((student, low + 0.1), (student, 4.4), arrowstyle="->", mutation_scale=11, color=RED))
    axis.add_patch(FancyArrowPatch((student + 0.98, 4.06), (teacher, high), arrowstyle="<->", mutation_scale=12, color=ink,
                                   connectionstyle="angle,angleA=0,angleB=90,rad=0"))  # fmt: skip
    axis.text(teacher + 0.15, 4.06, "1 - cosine, per token", va="center", color=ink, fontsize=9)
    return figure


def curves(name: str, ink: str, faint: str) -> Figure:
    """One panel for each quantity, one line for each run."""
    results, panels = read(), PANELS[name]
    rows = -(-len(panels) // 2)
    figure, axes = pyplot.subplots(rows, 2, figsize=(5.6, 1.95 * rows + 0.3 * len(RUNS[name])), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, column in zip(axes.flat, panels, strict=False):
        for run, (label, color) in RUNS[name].items():
            axis.plot(results[run]["step"], results[run][column], color=color, linewidth=1.3, label=label)
        if name == "expect_l2" and column != "denoising":
            axis.set_yscale("log")
        dress(axis, TITLES[column], "step", ink, faint)
    return legend(figure, axes[0, 0], ink)


def dress(axis: Any, title: str, xlabel: str, ink: str, faint: str) -> None:
    axis.set_title(title, fontsize=8.5, color=ink)
    axis.set_xlabel(xlabel, fontsize=8, color=ink)
    axis.set_facecolor("none")
    axis.tick_params(colors=ink, labelsize=7.5, which="both")
    axis.grid(color=faint, linewidth=0.4)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(faint)


def legend(figure: Figure, axis: Any, ink: str) -> Figure:
    """The axis's labels, below everything."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower left", ncols=1, fontsize=8, frameon=False, labelcolor=ink)
    figure.tight_layout(rect=(0, (0.1 + 0.19 * len(labels)) / figure.get_figheight(), 1, 1))
    return figure


def study_curves(ink: str, faint: str) -> Figure:
    """What the arms differ by over the steps (mean, and the seeds' range), and what the blocks know at the end."""
    results = Results(STUDY["core"])
    last = report.last_step(results)
    figure, axes = pyplot.subplots(2, 2, figsize=(5.6, 4.6))
    for axis, m in zip(axes[0], (report.LOSS, report.FRECHET), strict=True):
        for arm, color in ARMS.items():
            steps = results.curve(arm, results.seeds(arm)[0], m.metric)[0]
            values = np.array([np.subtract(*results.both(step, arm, "none", m.metric)) for step in steps])  # [steps, seeds]
            axis.plot(steps, values.mean(1), color=color, linewidth=1.3, label=report.NAMES.get(arm, arm))
            axis.fill_between(steps, values.min(1), values.max(1), color=color, alpha=0.2, linewidth=0)
        dress(axis, f"{m.name}, minus without SRA", "step", ink, faint)
    for arm, color in ARMS.items():
        blocks = np.array(results.blocks(last, arm, report.EMA, 0.5))  # [depth, seeds]
        numbers = np.arange(1, len(blocks) + 1)
        axes[1, 0].plot(numbers, blocks.mean(1), color=color, linewidth=1.3)
        axes[1, 0].plot(numbers, blocks, ".", color=color, markersize=2.5)
    dress(axes[1, 0], "probe, t = 0.5 (dots: seeds)", "block", ink, faint)
    for time, style in ((0.1, "-"), (0.3, "--"), (0.5, "-."), (0.7, ":")):
        for arm, color in [*ARMS.items()][:2]:
            blocks = np.array(results.blocks(last, arm, report.EMA, time)).mean(1)
            axes[1, 1].plot(range(1, len(blocks) + 1), blocks, color=color, linewidth=1.2, linestyle=style)
        axes[1, 1].annotate(f"t = {time}", (len(blocks), blocks[-1]), fontsize=7, color=ink, xytext=(3, 0), va="center",
                            textcoords="offset points")  # fmt: skip
    dress(axes[1, 1], "probe by noise level", "block", ink, faint)
    return legend(figure, axes[0, 0], ink)


def study_ablations(ink: str, faint: str) -> Figure:
    """What each arm differs by from the one without SRA: a dot for each seed, a line at their mean."""
    results = Results(*STUDY.values())
    step = report.last_step(Results(STUDY["ablations"]))
    arms = ["default", *(arm for arm in report.arms_of(STUDY["ablations"]) if arm in results)]
    metrics = report.LOSS, report.FRECHET, report.METRICS[0]
    figure, axes = pyplot.subplots(1, len(metrics), figsize=(6.4, 0.6 + 0.2 * len(arms)), sharey=True)
    for axis, m in zip(axes, metrics, strict=True):
        axis.axvline(0, color=ink, linewidth=0.8)
        for place, arm in enumerate(arms):
            base, values = results.both(step, "none", arm, m.metric, m.where)
            differences = np.subtract(values, base)
            color = RED if arm == "default" else BLUE
            axis.plot(differences, np.full(len(differences), place), ".", color=color, markersize=4)
            axis.plot([differences.mean()] * 2, [place - 0.3, place + 0.3], color=color, linewidth=1.3)
        axis.locator_params(axis="x", nbins=4)
        dress(axis, m.name, "minus without SRA", ink, faint)
    axes[0].set_yticks(range(len(arms)), [report.NAMES.get(arm, arm).replace("->", "→") for arm in arms])
    axes[0].invert_yaxis()
    figure.tight_layout()
    return figure


def read() -> dict[str, dict[str, list[float]]]:
    """{run: {column: values}}."""
    results: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with (HERE / "runs.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            run = row.pop("run")
            for column, value in row.items():
                results[run][column].append(float(value))
    return results


def draw(out: Path) -> None:
    settings: dict[str, Any] = {"svg.hashsalt": "selfalign", "svg.fonttype": "path", "font.family": "DejaVu Sans"}
    with matplotlib.rc_context(settings):
        for scheme, ink in INK.items():
            figures = {"method": method(ink, FAINT[scheme])}
            figures |= {name: curves(name, ink, FAINT[scheme]) for name in RUNS}
            figures |= {drawn.__name__: drawn(ink, FAINT[scheme]) for drawn in (study_curves, study_ablations)}
            for name, figure in figures.items():
                file = out / f"{name}_{scheme}.svg"
                figure.savefig(file, transparent=True, bbox_inches="tight", metadata={"Date": None})
                pyplot.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE)
    draw(parser.parse_args().out)
