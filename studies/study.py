"""What SRA and its settings do to a small SiT: arms and seeds side by side, resumable run by run.

    python studies/study.py cheaper                      terms that cost less, on the digits
    python studies/study.py core --data fashion-mnist    with and without SRA, the paper's recipe, one layer, no projector
    python studies/study.py cheaper --table              what has been run so far, as a table

All arms of a seed have the same first weights, batches, dropped labels, noise and times. All are measured by one EMA of the
model, apart from the teacher, so that a teacher's decay does not flatter its arm. A run that has ended is kept in the CSV file
of its group, beside the command, versions and hardware; started anew, the study goes on with the runs that are missing.
"""

import argparse
import csv
import json
import multiprocessing
import os
import platform
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import nn

import selfalign
from selfalign import schedules
from selfalign.adapters.torch import SelfAlignment

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import common
import demo
import torch_sit

RESULTS = Path(__file__).parent / "results"
SIZES = {  # arguments of torch_sit.py
    "digits": ["--width", "64", "--depth", "8", "--patch", "2", "--batch-size", "64", "--lr", "2e-3", "--steps", "600"],
    "fashion-mnist": ["--width", "128", "--depth", "8", "--patch", "4", "--batch-size", "64", "--steps", "1600"],
}
FASTER = schedules.DecayWarmup(0.999)  # a short run's EMA
Settings = dict[str, Any]

# ----------------------------------------------------------------------------------------------------------------- the arms


class Arm(NamedTuple):
    """What differs from the default arm."""

    loss: Settings = {}  # noqa: RUF012  (never written to)
    attach: Settings = {}  # noqa: RUF012
    every: int = 1  # a term in every n-th step only
    prepare: Callable[["Run"], None] = lambda run: None


def without_projector(run: "Run") -> None:
    run.align.projector.requires_grad_(False)
    run.align.projector = nn.Identity()


def half_of_the_tokens(run: "Run") -> None:
    """A teacher that computes half of the tokens, others in each step; the student's are compared at the same places."""
    count, kept = run.model.side**2, torch.empty(0)

    def select(tokens: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        if tokens.shape[1] == count:  # the student's
            kept = torch.randperm(count, generator=run.places)[: count // 2]
            return tokens[:, kept]
        return tokens

    run.attach(select=select)
    run.align.teacher.blocks[0].register_forward_pre_hook(lambda block, args: (args[0][:, kept], *args[1:]))


DEFAULT, NONE = Arm(), Arm(every=0)
PAPER = Arm(loss={"distance": "smooth_l1", "weight": 0.2, "decay": 0.9999})
GROUPS: dict[str, dict[str, Arm]] = {
    "core": {
        "none": NONE,
        "default": DEFAULT,
        "paper recipe": PAPER,
        "same layer, 2 -> 2": Arm(loss={"teacher_layer": 0.25, "allow_same_layer": True}),
        "no projector": Arm(prepare=without_projector),
    },
    "cheaper": {
        "none": NONE,
        "default": DEFAULT,
        "batch_share=0.5": Arm(attach={"batch_share": 0.5}),
        "every 2nd step": Arm(every=2),
        "every 4th step": Arm(every=4),
        "half of the tokens": Arm(prepare=half_of_the_tokens),
        "teacher_dtype=bfloat16": Arm(attach={"teacher_dtype": torch.bfloat16}),
        "EMA every 10th step": Arm(loss={"decay": schedules.Every(10, FASTER)}),
        "teacher=model": Arm(loss={"max_gap": 0.0}, attach={"teacher": "model"}),
    },
    "ablations": {
        **{f"gap {gap}": Arm(loss={"max_gap": gap, "random_gap": False}) for gap in (0.0, 0.1, 0.2)},
        **{f"gap up to {gap}": Arm(loss={"max_gap": gap}) for gap in (0.1, 0.3)},
        **{f"decay {decay}": Arm(loss={"decay": decay}) for decay in (0.0, 0.99, 0.999, 0.9999)},
        **{f"decay {decay}, warm-up": Arm(loss={"decay": schedules.DecayWarmup(decay)}) for decay in (0.99, 0.9999)},
        **{f"weight {weight}": Arm(loss={"weight": weight}) for weight in (0.1, 0.2, 0.8)},
        "cosine over tokens": Arm(loss={"distance": "official-2026-07"}),
        **{f"layers {m} -> {n}": Arm(loss={"student_layer": m, "teacher_layer": n})
           for m, n in ((2, 4), (2, 8), (4, 6), (4, 8), (6, 8))},
    },
}  # fmt: skip

# ------------------------------------------------------------------------------------------------------------------ one run


class Run(torch_sit.Run):
    """The example's run without SRA, and an arm's term beside it."""

    def __init__(self, data: common.Data, settings: argparse.Namespace, arm: Arm) -> None:
        super().__init__(data, settings)
        self.arm = arm
        self.places = torch.Generator().manual_seed(settings.seed + 2)
        if arm.every:
            self.attach()
            arm.prepare(self)
            trained = [p for p in self.align.projector.parameters() if p.requires_grad]
            parameters = [*self.model.parameters(), *trained]
            self.optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)

    def attach(self, **options: Any) -> None:
        if self.align:
            self.align.detach()
        fractions = {"student_layer": 0.25, "teacher_layer": 0.7, "path": torch_sit.PATH, "decay": FASTER}
        options = self.arm.attach | options
        if options.get("teacher") == "model":
            options["teacher"] = self.model
        self.align = SelfAlignment(self.model, selfalign.SRALoss(**fractions | self.arm.loss), log_metrics=True, **options)

    @property
    def ema(self) -> nn.Module:
        return self.average.module

    def training_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.tensor(self.chosen())
        x0, y = self.tensors.images[chosen], self.tensors.labels[chosen]
        y, noise, t = torch_sit.draw(x0, y, self.model.null_class, self.settings.label_dropout, self.draws)
        prediction = self.model(torch_sit.PATH.add_noise(x0, noise, t), t, y)
        denoising = F.mse_loss(prediction, torch_sit.PATH.velocity(x0, noise, t))
        aligned = self.align is not None and self.step % self.arm.every == 0
        (denoising + self.align(x0, noise, t) if aligned else denoising).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.align:
            self.align.update()
        self.average.update_parameters(self.model)
        self.step += 1
        return denoising.detach(), self.align.metrics["cosine"] if aligned else torch.tensor(float("nan"))


Row = tuple[str, str, float]  # metric, where (a block, a time, a step), value


def train(group: str, name: str, seed: int, arguments: list[str]) -> list[Row]:
    """All that is measured of one run; on one thread, a core per run."""
    torch.set_num_threads(1)
    settings = common.parse(torch_sit.PARSER, [*arguments, "--no-sra", "--seed", str(seed)])
    run = Run(subset(common.load_data(settings)), settings, GROUPS[group][name])
    rows: list[Row] = []
    losses = []
    for step in range(1, settings.steps + 1):
        losses.append(torch.stack(run.training_step()).tolist())
        if step % (settings.steps // 12) == 0:
            recent = list(zip(*losses, strict=True))
            cosines = [value for value in recent[1] if value == value]
            rows += [("training loss", str(step), statistics.fmean(recent[0]))]
            rows += [("cosine", str(step), statistics.fmean(cosines))] if cosines else []
            rows += [("held-out loss", str(step), demo.held_out_loss(run))]
            losses.clear()
    for time in (0.25, 0.5, 0.75):
        for block, accuracy in enumerate(demo.probe_accuracies(run, time=time), 1):
            rows.append(("probe of the EMA", f"block {block} t {time}", accuracy))
    for block, accuracy in enumerate(demo.probe_accuracies(run, run.model), 1):
        rows.append(("probe of the model", f"block {block} t 0.5", accuracy))
    return rows + generation(run)


def subset(data: common.Data, images: int = 6000, held_out: int = 1000) -> common.Data:
    """As many as a probe can be fitted to in seconds, and a test set."""
    few = (data.images[:images], data.labels[:images], data.held_out_images[:held_out], data.held_out_labels[:held_out])
    return common.Data(*few, data.classes)


def generation(run: Run, count: int = 360) -> list[Row]:
    """Of class-conditional samples, the same noise for all: a judge's Frechet distance and accuracy, and real images' own."""
    judge = demo.Judge(run.tensors, epochs=20 if len(run.tensors.images) < 2000 else 5)
    y = torch.arange(count) % len(run.data.classes)
    noise = torch.randn((count, *run.tensors.images.shape[1:]), generator=torch.Generator().manual_seed(1))
    samples = torch_sit.sample(run.ema, noise, y, 16).clamp(-1, 1)
    real, labels = run.tensors.held_out_images[:count], run.tensors.held_out_labels[:count]
    return [(f"{prefix}{metric}", "", value) for prefix, images, classes in (("", samples, y), ("real: ", real, labels))
            for metric, value in (("Frechet distance", judge.frechet(images)), ("nearest image", judge.nearest(images)),
                                  ("judge's accuracy", judge.accuracy(images, classes)))]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- all the runs


def finished(file: Path) -> set[tuple[str, int]]:
    return {(arm, seed) for arm, seed, *_ in read(file)}


def read(file: Path) -> list[tuple[str, int, str, str, float]]:
    if not file.exists():
        return []
    with file.open() as lines:
        return [
            (arm, int(seed), metric, where, float(value)) for arm, seed, metric, where, value in list(csv.reader(lines))[1:]
        ]


def keep(file: Path, arm: str, seed: int, rows: list[Row]) -> None:
    """At once: a run is in the file as a whole, or not at all."""
    lines = [[arm, str(seed), metric, where, f"{value:.5g}"] for metric, where, value in rows]
    heading = [["arm", "seed", "metric", "where", "value"]] * (not file.exists())
    with file.open("a", newline="") as out:
        csv.writer(out, lineterminator="\n").writerows([*heading, *lines])


def run_missing(group: str, file: Path, seeds: list[int], arguments: list[str], workers: int) -> None:
    done = finished(file)
    jobs = [(name, seed) for seed in seeds for name in GROUPS[group] if (name, seed) not in done]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(train, group, name, seed, arguments): (name, seed) for name, seed in jobs}
        for future in track(as_completed(futures), f"{group}: {len(jobs)} runs", total=len(jobs)):
            keep(file, *futures[future], future.result())


def describe(file: Path, arguments: list[str]) -> None:
    """Beside the results: what they come from."""
    found = {"command": " ".join(["python studies/study.py", *sys.argv[1:]]), "training": " ".join(arguments),
             "selfalign": selfalign.__version__, "torch": torch.__version__, "python": platform.python_version(),
             "machine": f"{platform.machine()}, {os.cpu_count()} cores"}  # fmt: skip
    file.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


# ----------------------------------------------------------------------------------------------------------------- the table


def table(group: str, file: Path) -> str:
    """Mean and standard deviation over the seeds of the final metrics, by arm."""
    rows = read(file)
    last = str(max(int(where) for _, _, metric, where, _ in rows if metric == "held-out loss"))
    depth = max(int(where.split()[1]) for _, _, metric, where, _ in rows if metric.startswith("probe"))
    layers = selfalign.SRALoss(student_layer=0.25, teacher_layer=0.7).layers(depth)
    columns = {
        f"probe, block {layers[0]}": ("probe of the EMA", f"block {layers[0]} t 0.5"),
        f"probe, block {layers[1]}": ("probe of the EMA", f"block {layers[1]} t 0.5"),
        "held-out loss": ("held-out loss", last),
        "Frechet distance": ("Frechet distance", ""),
        "judge's accuracy": ("judge's accuracy", ""),
    }
    values = {(arm, seed, metric, where): value for arm, seed, metric, where, value in rows}
    seeds = sorted({seed for _, seed, *_ in rows})
    lines = ["| | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for arm in GROUPS[group]:
        found = ([values[arm, seed, *key] for seed in seeds if (arm, seed, *key) in values] for key in columns.values())
        lines.append(f"| {arm} | " + " | ".join(demo.mean_sd(cell) if cell else "" for cell in found) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=common.Formatter)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--data", choices=SIZES, default="digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--steps", type=int, help="optimizer steps of a run (default: 600 on the digits, else 1,600)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time, each on one core")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--table", action="store_true", help="run nothing")
    settings = parser.parse_args()
    file = settings.results / f"{settings.data}-{settings.group}.csv"
    if settings.table and not file.exists():
        parser.error(f"A table needs results. Received: --table, and no file {file}. Run the study without --table first.")
    if not settings.table:
        arguments = ["--data", settings.data, *SIZES[settings.data]]
        arguments += ["--steps", str(settings.steps)] if settings.steps else []
        settings.results.mkdir(parents=True, exist_ok=True)
        describe(file, arguments)
        run_missing(settings.group, file, settings.seeds, arguments, settings.workers)
    Console().print(table(settings.group, file), soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
