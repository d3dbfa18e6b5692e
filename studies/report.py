"""What the study found: tables, and the paper's claims beside what was seen.

    python studies/report.py fashion-mnist                    print them
    python studies/report.py fashion-mnist --write            write docs/study.md; the figures: make figures
    python studies/report.py digits --group cheaper           a table alone

All of it comes from the CSV files, the verdicts included.
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
from records import Results
from verdicts import decided, mean_sd, pairs

HERE = Path(__file__).parent

GROUPS = ("core", "ablations", "cheaper")
STUDENT, TEACHER = 2, 6  # blocks of the default arm: 0.25 and 0.7 of 8
EMA, MODEL = "probe of the EMA", "probe of the model"


class Metric(NamedTuple):
    """A column: where it is in the records, and which way is better."""

    name: str
    metric: str
    better: int  # 1: more, -1: less
    where: str = ""


METRICS = (
    Metric(f"probe, block {STUDENT} ↑", EMA, 1, f"block {STUDENT} t 0.5"),
    Metric(f"probe, block {TEACHER} ↑", EMA, 1, f"block {TEACHER} t 0.5"),
    Metric("held-out loss ↓", "held-out loss", -1),
    Metric("Frechet distance ↓", "Frechet distance", -1),
    Metric("KID ↓", "KID", -1),
    Metric("coverage ↑", "coverage", 1),
    Metric("judge's accuracy ↑", "judge's accuracy", 1),
    Metric("KID, another encoder ↓", "KID, another encoder", -1),
)
LOSS, FRECHET = METRICS[2], METRICS[3]

# what the paper reports (FID of SiT-B/2 after 400K steps): arm, and the arm that it is better than
PAPER = {"none": 33.02, "default": 29.10, "no projector": 34.23, "same layer, 2 -> 2": 37.08, "teacher = student": 35.71,
         "gap 0": 31.07, "gap up to 0.1": 29.38, "gap up to 0.3": 29.15}  # fmt: skip
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

# ---------------------------------------------------------------------------------------------------------------- the tables


def row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join([row(["", *heading]), "| --- " * (len(heading) + 1) + "|", *(row(cells) for cells in rows)])


def by_arm(results: Results, arms: Sequence[str], step: int) -> str:
    """Mean and standard deviation over the seeds, marked where the seeds decide a difference from "none"."""
    shown, lines = measured(results, step), []
    timed = all(_ratios(results, arm) for arm in arms if arm != "none")
    for arm in arms:
        cells = [_cell(results, arm, m, step) for m in shown]
        lines.append([NAMES.get(arm, arm.replace("->", "→")), *cells, *([_time(results, arm)] if timed else [])])
    if any(real := [_real(results, arms, m, step) for m in shown]):
        lines.append(["real images", *real, *([""] if timed else [])])
    return table([*(m.name for m in shown), *(["time of a step"] if timed else [])], lines)


def measured(results: Results, step: int, points: int = 1) -> list[Metric]:
    """What there is at a step, and at so many steps in all."""
    there = [m for m in METRICS if results.at(step, "none", m.metric, m.where)]
    return [m for m in there if len(results.values["none", m.metric, m.where]) >= points]


def _cell(results: Results, arm: str, m: Metric, step: int) -> str:
    values = results.at(step, arm, m.metric, m.where)
    if not values:
        return ""
    sign = decided(*results.both(step, "none", arm, m.metric, m.where)) * m.better if arm != "none" else 0
    return mean_sd(values) + MARKS[sign]


def _time(results: Results, arm: str) -> str:
    return "x 1" if arm == "none" else f"x {statistics.fmean(times):.2f}" if (times := _ratios(results, arm)) else ""


def _ratios(results: Results, arm: str) -> list[float]:
    """How much longer a step takes than one without SRA, by seed."""
    return [by for steps in results.values.get((arm, "time of a step", ""), {}).values() for by in steps.values()]


def _real(results: Results, arms: Sequence[str], m: Metric, step: int) -> str:
    values = results.at(step, arms[0], f"real: {m.metric}")
    return f"{statistics.fmean(values):.3f}" if values else ""


# ---------------------------------------------------------------------------------------------------------------- the claims


def claim(sign: int) -> str:
    return f"**{WORDS[sign]}**"


def differs(results: Results, step: int, a: tuple[str, str, str], b: tuple[str, str, str], better: int = 1) -> tuple[int, str]:
    """Whether b is better than a, (arm, metric, where) each: the sign, and the difference with its spread."""
    first, second = results.paired(step, a, b)
    if not first:
        return 0, "not measured"
    return decided(first, second) * better, mean_sd(pairs(first, second), "+")


def by_depth_and_noise(results: Results, step: int) -> str:
    """Claim 1."""
    lines = []
    for arm in ("none", "default"):
        blocks = [statistics.fmean(accuracies) for accuracies in results.blocks(step, arm, EMA, 0.5)]
        best, last = int(np.argmax(blocks)) + 1, len(blocks)
        at = lambda n, time=0.5, arm=arm: (arm, EMA, f"block {n} t {time}")  # noqa: E731
        rises, gain = differs(results, step, at(1), at(best))
        falls, loss = differs(results, step, at(best), at(last), -1) if best < last else (0, "none: the last is best")
        lines.append([f"better with depth ({NAMES[arm]})", f"block 1 to block {best}: {gain}", claim(rises)])
        lines.append([f"then worse ({NAMES[arm]})", f"block {best} to block {last}: {loss}", claim(falls)])
        times = sorted({float(where.split()[3]) for name, metric, where in results.values if (name, metric) == (arm, EMA)})
        for less, more in itertools.pairwise(times):
            sign, change = differs(results, step, at(best, more), at(best, less))
            what = f"block {best}, t = {more:g} to {less:g}: {change}"
            lines.append([f"better with less noise ({NAMES[arm]})", what, claim(sign)])
    return table(["probe's accuracy", ""], lines)


def at_equal_steps(results: Results, step: int, arms: Sequence[str]) -> str:
    """Claim 2."""
    lines = []
    for m in measured(results, step):
        cells = (differs(results, step, ("none", m.metric, m.where), (arm, m.metric, m.where), m.better) for arm in arms)
        lines.append([m.name, *(cell for sign, change in cells for cell in (change, claim(sign)))])
    return table([cell for arm in arms for cell in (f"{NAMES[arm]} - {NAMES['none']}", "")], lines)


def at_equal_time(results: Results, step: int, arms: Sequence[str]) -> str:
    """What a budget in hours gives: a slower arm is read at the step which it reaches when "none" has done all of its own.

    Interpolated over the logarithm of the step, on which such curves are nearly straight.
    """
    reached = {arm: step / statistics.fmean(_ratios(results, arm)) for arm in arms}
    lines = []
    for m in measured(results, step, points=2):
        base = results.by_seed(step, "none", m.metric, m.where)
        cells = [m.name, mean_sd([*base.values()])]
        for arm in arms:
            seeds = sorted(base.keys() & set(results.seeds(arm)))
            curves = [results.curve(arm, seed, m.metric, m.where) for seed in seeds]
            found = [float(np.interp(np.log(reached[arm]), np.log(steps), values)) for steps, values in curves]
            cells.append(mean_sd(found) + MARKS[decided([base[seed] for seed in seeds], found) * m.better])
        lines.append(cells)
    return table([NAMES["none"], *(f"{NAMES[arm]}, {reached[arm]:.0f} steps" for arm in arms)], lines)


def in_the_papers_order(final: Results, early: Results, last: int, step: int) -> str:
    """Claim 3: where the paper's FIDs put one arm before another, by the Frechet distance here."""
    lines = []
    for better, worse in ORDER:
        results, when = (final, last) if worse in final else (early, step)
        if not results.at(when, worse, FRECHET.metric):
            continue
        cells = [f"{PAPER[better]:.2f} < {PAPER[worse]:.2f}"]
        for m in (FRECHET, LOSS):
            sign, change = differs(results, when, (worse, m.metric, ""), (better, m.metric, ""), m.better)
            cells += [change, claim(sign)]
        lines.append([f"{NAMES.get(better, better)} before {NAMES.get(worse, worse)}".replace("->", "→"), str(when), *cells])
    return table(["after steps", "paper's FID", "Frechet distance", "", "held-out loss", ""], lines)


def steps_to_the_baselines_end(results: Results, step: int, arms: Sequence[str]) -> str:
    """Claim 4: the first step at which an arm is as good as "none" at its end, interpolated; as a share of all steps."""
    lines = []
    for m in measured(results, step, points=2):
        cells = [m.name]
        for arm in arms:
            seeds = [seed for seed in results.seeds(arm) if results.curve(arm, seed, m.metric, m.where)[0]]
            shares = [_reached(results, arm, seed, m, step) for seed in seeds]
            cells.append(", ".join("not reached" if share is None else f"{share:.2f}" for share in shares))
        lines.append(cells)
    return table([NAMES[arm] for arm in arms], lines)


def _reached(results: Results, arm: str, seed: int, m: Metric, step: int) -> float | None:
    goal = m.better * results.by_seed(step, "none", m.metric, m.where)[seed]
    steps, values = results.curve(arm, seed, m.metric, m.where)
    for (before, low), (after, high) in itertools.pairwise(zip(steps, (m.better * value for value in values), strict=True)):
        if low < goal <= high:
            return float(before * (after / before) ** ((goal - low) / (high - low))) / step
    return steps[0] / step if m.better * values[0] >= goal else None


def teachers_probe(results: Results, step: int) -> str:
    """Claim 5."""
    lines = []
    for n in (STUDENT, TEACHER):
        sides = (("default", metric, f"block {n} t 0.5") for metric in (MODEL, EMA))
        sign, change = differs(results, step, *sides)
        lines.append([f"the EMA above the model, block {n}, t = 0.5", change, claim(sign)])
    for arm in ("default", "none"):
        sides = ((arm, MODEL, f"block {STUDENT} t 0.5"), (arm, EMA, f"block {TEACHER} t 0.3"))
        sign, change = differs(results, step, *sides)
        lines.append([f"what the teacher sees (EMA, block {TEACHER}, t = 0.3) above what the student does (block {STUDENT}, "
                      f"t = 0.5), {NAMES[arm]}", change, claim(sign)])  # fmt: skip
    return table(["probe's accuracy", ""], lines)


# ------------------------------------------------------------------------------------------------------------------ the page


def files(data: str, folder: Path) -> dict[str, Path]:
    found = {group: folder / f"{data}-{group}.csv" for group in GROUPS}
    return {group: file for group, file in found.items() if file.exists()}


def made_by(file: Path) -> str:
    about = described(file)
    return (f"`{about['command']}`: {about['training']}. PyTorch {about['torch']}, Python {about['python']}, "
            f"{about['machine']}. All numbers: `studies/results/{file.name}`")  # fmt: skip


def described(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.with_suffix(".json").read_text()))


def arms_of(file: Path) -> list[str]:
    return list(described(file)["arms"])


def missing(results: Results, arms: Iterable[str]) -> str:
    """What a reader would otherwise take for left out."""
    lacking = [arm.replace("->", "→") for arm in arms if len(results.seeds(arm)) < len(results.seeds("none"))]
    return f"Not run for all seeds yet: {', '.join(lacking)}." if lacking else ""


def last_step(results: Results) -> int:
    return max(step for (_, metric, _), steps in results.values.items() if metric == "held-out loss" for step in steps)


def group_table(found: dict[str, Path], group: str) -> str:
    """One group's arms at their end; the ablations beside the core's first two at that step."""
    step, arms = last_step(Results(found[group])), arms_of(found[group])
    if group == "ablations":
        arms = ["none", "default", *arms]
    results = Results(*(found[name] for name in {"ablations": ("core", "ablations")}.get(group, (group,))))
    return by_arm(results, [arm for arm in arms if arm in results], step)


def sections(data: str, folder: Path) -> dict[str, str]:
    """All that is computed, in Markdown."""
    found = files(data, folder)
    core, both = Results(found["core"]), Results(*(found[group] for group in ("core", "ablations") if group in found))
    last = last_step(core)
    step = last_step(Results(found["ablations"])) if "ablations" in found else last
    arms = [arm for arm in ("default", "paper recipe") if arm in core]
    timed = [arm for arm in arms if _ratios(core, arm)]
    known = [arm for group in ("core", "ablations") if group in found for arm in arms_of(found[group])]
    return {
        "made by": "\n".join(f"- {made_by(found[group])}" for group in ("core", "ablations") if group in found),
        "depth": str(len(core.blocks(last, "none", EMA, 0.5))),
        "samples": str(described(found["core"]).get("measured", {}).get("samples", "")),
        "seeds": ", ".join(map(str, core.seeds("none"))),
        "missing": missing(both, known),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="fashion-mnist, digits, or the name of the folder of images")
    parser.add_argument("--group", choices=GROUPS, help="the table of this group alone")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the CSV files")
    parser.add_argument("--write", action="store_true", help="into docs/study.md")
    settings = parser.parse_args()
    found = files(settings.data, settings.results)
    group = settings.group or "core"
    if group not in found:
        parser.error(f"A report needs results. Received: {settings.data}, and no file {settings.data}-{group}.csv in "
                     f"{settings.results}. Run first: python studies/study.py {group} --data {settings.data}")  # fmt: skip
    if settings.write and settings.data != "fashion-mnist":
        parser.error(f"docs/study.md is about Fashion-MNIST. Received: --write, and {settings.data}. Print it instead.")
    if settings.group:
        print(group_table(found, settings.group))
    elif settings.write:
        (HERE.parent / "docs" / "study.md").write_text(page(settings.results))
    else:
        found = sections(settings.data, settings.results)
        print("\n\n".join(f"{name}:\n{section}" for name, section in found.items() if section))


if __name__ == "__main__":
    main()
