"""What the study found: tables, and the paper's claims beside what was seen.

    python studies/report.py fashion-mnist                  print them
    python studies/report.py fashion-mnist --write          write docs/study.md
    python studies/report.py digits --group cheaper         a table alone

All of it comes from the CSV files, the verdicts included. `make figures` draws the figures.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from records import Of, Results
from verdicts import decided, mean_sd, pairs

HERE = Path(__file__).parent

GROUPS = ("core", "ablations", "cheaper")
STUDENT = 2  # blocks of the default arm: 0.25 and 0.7 of 8
TEACHER = 6
EMA = "probe of the EMA"
MODEL = "probe of the model"


class Metric(NamedTuple):
    """A column: where it is in the records, and which way is better."""

    name: str
    metric: str
    better: int  # 1: more, -1: less
    where: str = ""

    def of(self, arm: str) -> Of:
        return Of(arm, self.metric, self.where)


LOSS = Metric("held-out loss ↓", "held-out loss", -1)
FRECHET = Metric("Frechet distance ↓", "Frechet distance", -1)
METRICS = (
    Metric(f"probe, block {STUDENT} ↑", EMA, 1, f"block {STUDENT} t 0.5"),
    Metric(f"probe, block {TEACHER} ↑", EMA, 1, f"block {TEACHER} t 0.5"),
    LOSS,
    FRECHET,
    Metric("KID ↓", "KID", -1),
    Metric("coverage ↑", "coverage", 1),
    Metric("judge's accuracy ↑", "judge's accuracy", 1),
    Metric("KID, another encoder ↓", "KID, another encoder", -1),
)

# what the paper reports: FID of SiT-B/2 after 400K steps
PAPER = {
    "none": 33.02,
    "default": 29.10,
    "no projector": 34.23,
    "same layer, 2 -> 2": 37.08,
    "teacher = student": 35.71,
    "gap 0": 31.07,
    "gap up to 0.1": 29.38,
    "gap up to 0.3": 29.15,
}
# an arm, and another that the paper puts behind it
ORDER = (
    ("default", "none"),
    ("default", "no projector"),
    ("default", "same layer, 2 -> 2"),
    ("default", "teacher = student"),
    ("default", "gap 0"),
    ("default", "gap up to 0.1"),
    ("default", "gap up to 0.3"),
    ("none", "no projector"),
    ("none", "same layer, 2 -> 2"),
    ("none", "teacher = student"),
)
NAMES = {"none": "without SRA", "default": "the default", "paper recipe": "the paper's recipe"}
MARKS = {1: " ▲", 0: "", -1: " ▼"}
WORDS = {1: "reproduced", 0: "not decidable at this size", -1: "not reproduced: the opposite"}


def name_of(arm: str) -> str:
    return NAMES.get(arm, arm).replace("->", "→")


# --------------------------------------------------------------------------------------------------
# The tables


def row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown; the first column has no heading."""
    rule = "| --- " * (len(heading) + 1) + "|"
    return "\n".join([row(["", *heading]), rule, *(row(cells) for cells in rows)])


def by_arm(results: Results, arms: Sequence[str], step: int) -> str:
    """Mean and standard deviation over the seeds, marked where they decide a difference."""
    metrics = measured(results, step)
    timed = all(ratios(results, arm) for arm in arms if arm != "none")
    lines = []
    for arm in arms:
        cells = [name_of(arm), *(arm_cell(results, arm, m, step) for m in metrics)]
        lines.append([*cells, time_cell(results, arm)] if timed else cells)
    real = [real_cell(results, arms[0], m, step) for m in metrics]
    if any(real):
        lines.append(["real images", *real, ""] if timed else ["real images", *real])
    heading = [m.name for m in metrics]
    return table([*heading, "time of a step"] if timed else heading, lines)


def measured(results: Results, step: int, points: int = 1) -> list[Metric]:
    """What there is at a step, and at so many steps in all."""
    at_step = [m for m in METRICS if results.at(step, m.of("none"))]
    return [m for m in at_step if len(results.values[m.of("none")]) >= points]


def arm_cell(results: Results, arm: str, m: Metric, step: int) -> str:
    values = results.at(step, m.of(arm))
    if not values:
        return ""
    if arm == "none":
        return mean_sd(values)
    sign = decided(*results.pairs(step, m.of("none"), m.of(arm))) * m.better
    return mean_sd(values) + MARKS[sign]


def time_cell(results: Results, arm: str) -> str:
    if arm == "none":
        return "x 1"
    times = ratios(results, arm)
    return f"x {statistics.fmean(times):.2f}" if times else ""


def ratios(results: Results, arm: str) -> list[float]:
    """How much longer a step takes than one without SRA, by seed."""
    by_step = results.values.get(Of(arm, "time of a step"), {})
    return [ratio for by_seed in by_step.values() for ratio in by_seed.values()]


def real_cell(results: Results, arm: str, m: Metric, step: int) -> str:
    values = results.at(step, Of(arm, f"real: {m.metric}"))
    return f"{statistics.fmean(values):.3f}" if values else ""


# --------------------------------------------------------------------------------------------------
# The claims


def claim(sign: int) -> str:
    return f"**{WORDS[sign]}**"


def differs(results: Results, step: int, a: Of, b: Of, better: int = 1) -> tuple[int, str]:
    """Whether b is better than a: the sign, and the difference with its spread."""
    first, second = results.pairs(step, a, b)
    if not first:
        return 0, "not measured"
    return decided(first, second) * better, mean_sd(pairs(first, second), "+")


def by_depth_and_noise(results: Results, step: int) -> str:
    """Claim 1."""
    lines = []
    for arm in ("none", "default"):
        lines += by_depth(results, step, arm)
        lines += by_noise(results, step, arm)
    return table(["probe's accuracy", ""], lines)


def probe_at(arm: str, block: int, time: float = 0.5, metric: str = EMA) -> Of:
    return Of(arm, metric, f"block {block} t {time}")


def best_block(results: Results, step: int, arm: str) -> tuple[int, int]:
    """The block where the probe is best, and the last one."""
    accuracies = results.blocks(step, arm, EMA, 0.5)
    means = [statistics.fmean(over_seeds) for over_seeds in accuracies]
    return int(np.argmax(means)) + 1, len(means)


def by_depth(results: Results, step: int, arm: str) -> list[list[str]]:
    best, last = best_block(results, step, arm)
    rises, gain = differs(results, step, probe_at(arm, 1), probe_at(arm, best))
    falls, loss = 0, "none: the last is best"
    if best < last:
        falls, loss = differs(results, step, probe_at(arm, best), probe_at(arm, last), -1)
    name = NAMES[arm]
    return [
        [f"better with depth ({name})", f"block 1 to block {best}: {gain}", claim(rises)],
        [f"then worse ({name})", f"block {best} to block {last}: {loss}", claim(falls)],
    ]


def by_noise(results: Results, step: int, arm: str) -> list[list[str]]:
    best, _ = best_block(results, step, arm)
    probes = [of for of in results.values if (of.arm, of.metric) == (arm, EMA)]
    times = sorted({float(of.where.split()[3]) for of in probes})
    lines = []
    for less, more in itertools.pairwise(times):
        sign, change = differs(results, step, probe_at(arm, best, more), probe_at(arm, best, less))
        what = f"block {best}, t = {more:g} to {less:g}: {change}"
        lines.append([f"better with less noise ({NAMES[arm]})", what, claim(sign)])
    return lines


def at_equal_steps(results: Results, step: int, arms: Sequence[str]) -> str:
    """Claim 2."""
    heading: list[str] = []
    for arm in arms:
        heading += [f"{NAMES[arm]} - {NAMES['none']}", ""]
    lines = []
    for m in measured(results, step):
        cells = [m.name]
        for arm in arms:
            sign, change = differs(results, step, m.of("none"), m.of(arm), m.better)
            cells += [change, claim(sign)]
        lines.append(cells)
    return table(heading, lines)


def at_equal_time(results: Results, step: int, arms: Sequence[str]) -> str:
    """What a budget in hours gives.

    A slower arm is read at the step which it reaches when "none" has done all of its own:
    interpolated over the logarithm of the step, on which such curves are nearly straight.
    """
    reached = {arm: step / statistics.fmean(ratios(results, arm)) for arm in arms}
    lines = []
    for m in measured(results, step, points=2):
        base = results.by_seed(step, m.of("none"))
        cells = [m.name, mean_sd([*base.values()])]
        for arm in arms:
            seeds = sorted(base.keys() & set(results.seeds(arm)))
            curves = [results.curve(seed, m.of(arm)) for seed in seeds]
            found = [value_at(reached[arm], steps, values) for steps, values in curves]
            sign = decided([base[seed] for seed in seeds], found) * m.better
            cells.append(mean_sd(found) + MARKS[sign])
        lines.append(cells)
    heading = [f"{NAMES[arm]}, {reached[arm]:.0f} steps" for arm in arms]
    return table([NAMES["none"], *heading], lines)


def value_at(step: float, steps: list[int], values: list[float]) -> float:
    return float(np.interp(np.log(step), np.log(steps), values))


def in_the_papers_order(final: Results, early: Results, last: int, step: int) -> str:
    """Claim 3: where the paper's FIDs put one arm before another, by the distances here."""
    lines = []
    for better, worse in ORDER:
        results, when = (final, last) if worse in final else (early, step)
        if not results.at(when, FRECHET.of(worse)):
            continue
        cells = [f"{PAPER[better]:.2f} < {PAPER[worse]:.2f}"]
        for m in (FRECHET, LOSS):
            sign, change = differs(results, when, m.of(worse), m.of(better), m.better)
            cells += [change, claim(sign)]
        lines.append([f"{name_of(better)} before {name_of(worse)}", str(when), *cells])
    heading = ["after steps", "paper's FID", "Frechet distance", "", "held-out loss", ""]
    return table(heading, lines)


def steps_to_the_baselines_end(results: Results, step: int, arms: Sequence[str]) -> str:
    """Claim 4: when an arm is as good as "none" at its end, as a fraction of all steps."""
    lines = []
    for m in measured(results, step, points=2):
        cells = [m.name]
        for arm in arms:
            seeds = [seed for seed in results.seeds(arm) if results.curve(seed, m.of(arm))[0]]
            fractions = [reached_after(results, arm, seed, m, step) for seed in seeds]
            cells.append(", ".join(map(fraction_cell, fractions)))
        lines.append(cells)
    return table([NAMES[arm] for arm in arms], lines)


def fraction_cell(fraction: float | None) -> str:
    return "not reached" if fraction is None else f"{fraction:.2f}"


def reached_after(results: Results, arm: str, seed: int, m: Metric, step: int) -> float | None:
    """The first step, as a fraction of all, at which a run is as good as "none" at its end.

    Interpolated over the logarithm of the step.
    """
    goal = m.better * results.by_seed(step, m.of("none"))[seed]
    steps, values = results.curve(seed, m.of(arm))
    points = [(at, m.better * value) for at, value in zip(steps, values, strict=True)]
    for (before, low), (after, high) in itertools.pairwise(points):
        if low < goal <= high:
            part = (goal - low) / (high - low)
            return float(before * (after / before) ** part) / step
    first, value = points[0]
    return first / step if value >= goal else None


def teachers_probe(results: Results, step: int) -> str:
    """Claim 5."""
    lines = []
    for block in (STUDENT, TEACHER):
        model = probe_at("default", block, metric=MODEL)
        sign, change = differs(results, step, model, probe_at("default", block))
        lines.append([f"the EMA above the model, block {block}, t = 0.5", change, claim(sign)])
    for arm in ("default", "none"):
        seen_by_student = probe_at(arm, STUDENT, metric=MODEL)
        seen_by_teacher = probe_at(arm, TEACHER, 0.3)
        sign, change = differs(results, step, seen_by_student, seen_by_teacher)
        what = (
            f"what the teacher sees (EMA, block {TEACHER}, t = 0.3) above what the student does "
            f"(block {STUDENT}, t = 0.5), {NAMES[arm]}"
        )
        lines.append([what, change, claim(sign)])
    return table(["probe's accuracy", ""], lines)


# --------------------------------------------------------------------------------------------------
# The page


def files(data: str, folder: Path) -> dict[str, Path]:
    """The CSV files that there are, by group."""
    found = {group: folder / f"{data}-{group}.csv" for group in GROUPS}
    return {group: file for group, file in found.items() if file.exists()}


def made_by(file: Path) -> str:
    about = description(file)
    return (
        f"`{about['command']}`: {about['training']}. PyTorch {about['torch']}, "
        f"Python {about['python']}, {about['machine']}. "
        f"All numbers: `studies/results/{file.name}`"
    )


def description(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.with_suffix(".json").read_text()))


def arms_of(file: Path) -> list[str]:
    return list(description(file)["arms"])


def missing(results: Results, arms: Iterable[str]) -> str:
    """What a reader would otherwise take for left out."""
    all_seeds = len(results.seeds("none"))
    lacking = [arm.replace("->", "→") for arm in arms if len(results.seeds(arm)) < all_seeds]
    return f"Not run for all seeds yet: {', '.join(lacking)}." if lacking else ""


def last_step(results: Results) -> int:
    losses = [by_step for of, by_step in results.values.items() if of.metric == LOSS.metric]
    return max(step for by_step in losses for step in by_step)


def group_table(found: dict[str, Path], group: str) -> str:
    """One group's arms at their end; the ablations beside the core's first two at that step."""
    step = last_step(Results(found[group]))
    arms = arms_of(found[group])
    results = Results(found[group])
    if group == "ablations":
        arms = ["none", "default", *arms]
        results = Results(found["core"], found["ablations"])
    return by_arm(results, [arm for arm in arms if arm in results], step)


def sections(data: str, folder: Path) -> dict[str, str]:
    """All that is computed, in Markdown."""
    found = files(data, folder)
    two_groups = [found[group] for group in ("core", "ablations") if group in found]
    core = Results(found["core"])
    both = Results(*two_groups)
    last = last_step(core)
    step = last_step(Results(found["ablations"])) if "ablations" in found else last
    arms = [arm for arm in ("default", "paper recipe") if arm in core]
    timed = [arm for arm in arms if ratios(core, arm)]
    all_arms = [arm for file in two_groups for arm in arms_of(file)]
    return {
        "made by": "\n".join(f"- {made_by(file)}" for file in two_groups),
        "depth": str(len(core.blocks(last, "none", EMA, 0.5))),
        "samples": str(description(found["core"]).get("measured", {}).get("samples", "")),
        "seeds": ", ".join(map(str, core.seeds("none"))),
        "missing": missing(both, all_arms),
        "last": str(last),
        "step": str(step),
        "core": group_table(found, "core"),
        "equal time": at_equal_time(core, last, timed) if timed else "",
        "ablations": group_table(found, "ablations") if "ablations" in found else "",
        "claim 1": by_depth_and_noise(core, last),
        "claim 2": at_equal_steps(core, last, arms),
        "claim 3": in_the_papers_order(core, both, last, step),
        "claim 4": steps_to_the_baselines_end(core, last, arms),
        "claim 5": teachers_probe(core, last),
    }


def page(folder: Path) -> str:
    """docs/study.md."""
    text = (HERE / "report.md").read_text()
    for name, section in sections("fashion-mnist", folder).items():
        text = text.replace("{" + name + "}", section)
    return text


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data", help="fashion-mnist, digits, or the name of the folder of images")
    add("--group", choices=GROUPS, help="the table of this group alone")
    add("--results", type=Path, default=HERE / "results", help="folder of the CSV files")
    add("--write", action="store_true", help="into docs/study.md")
    return parser


def main() -> None:
    parser = command_line()
    settings = parser.parse_args()
    found = files(settings.data, settings.results)
    group = settings.group or "core"
    if group not in found:
        parser.error(
            f"A report needs results. Received: {settings.data}, "
            f"and no file {settings.data}-{group}.csv in {settings.results}. "
            f"Run first: python studies/study.py {group} --data {settings.data}"
        )
    if settings.write and settings.data != "fashion-mnist":
        parser.error(
            "docs/study.md is about Fashion-MNIST. "
            f"Received: --write, and {settings.data}. Print it instead."
        )
    if settings.group:
        print(group_table(found, settings.group))
    elif settings.write:
        (HERE.parent / "docs" / "study.md").write_text(page(settings.results))
    else:
        computed = sections(settings.data, settings.results)
        print("\n\n".join(f"{name}:\n{section}" for name, section in computed.items() if section))


if __name__ == "__main__":
    main()
