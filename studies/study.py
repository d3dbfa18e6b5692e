"""What SRA and its settings do to a small SiT: arms and seeds side by side, resumable run by run.

    python studies/study.py core --data fashion-mnist         with and without SRA, the paper's recipe, one layer, no projector
    python studies/study.py ablations --data fashion-mnist    gaps, decays, weights, distances, layers
    python studies/study.py cheaper                           terms that cost less, on the digits
    python studies/study.py core --data FOLDER                CIFAR-10 or other images, on a GPU: FOLDER/CLASS/NAME.png or .jpg
    python studies/report.py fashion-mnist                    tables, and the paper's claims beside what was found

All arms of a seed have the same first weights, batches, dropped labels, noise and times. All are measured by one EMA of the
model, apart from the teacher, so that a teacher's decay does not flatter its arm. A run that has ended is kept in the CSV file
of its group, beside the command, versions and hardware; started anew, the study goes on with the runs that are missing.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import selfalign
from selfalign import schedules
from selfalign.adapters.torch import SelfAlignment

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import common
import measures
import records
import side_by_side
import torch_sit

RESULTS = Path(__file__).parent / "results"
STUDENT, TEACHER = 0.25, 0.7  # layers of the default arm
FASTER = schedules.DecayWarmup(0.999)  # a short run's EMA
TIMES = (0.1, 0.3, 0.5, 0.7)  # of the probes; 0 is data
Settings = dict[str, Any]


class Size(NamedTuple):
    """How long and how large."""

    arguments: str  # of torch_sit.py
    steps: dict[str, tuple[int, int]]  # of a run, by group; and from one held-out loss to the next
    every: int  # steps from one checkpoint, where all is measured, to the next
    samples: int  # judged
    held_out: int = 1000  # images
    judge: tuple[int, int] = (20_000, 4)  # images, epochs
    probed: int = 1000  # images that a probe is fitted to
    sampling_steps: int = 16


SIZES = {
    "digits": Size("--width 64 --depth 8 --patch 2 --batch-size 64 --lr 2e-3",
                   dict.fromkeys(("core", "ablations", "cheaper"), (600, 50)), 200, 360, judge=(2000, 20), probed=2000),
    "fashion-mnist": Size("--width 64 --depth 8 --patch 4 --batch-size 32 --lr 2e-3",
                          {"core": (1800, 150), "ablations": (600, 600), "cheaper": (600, 300)}, 600, 500, held_out=300,
                          sampling_steps=10),
    "folder": Size("--width 384 --depth 12 --heads 6 --patch 2 --batch-size 256 --lr 5e-4 --image-size 32",
                   {"core": (4000, 250), "ablations": (2000, 500), "cheaper": (2000, 500)}, 1000, 2000),
}  # fmt: skip

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
        "same layer, 2 -> 2": Arm(loss={"teacher_layer": STUDENT, "allow_same_layer": True}),
        "no projector": Arm(prepare=without_projector),
    },
    "ablations": {
        **{f"weight {weight}": Arm(loss={"weight": weight}) for weight in (0.1, 0.2, 0.8)},
        "teacher = student": Arm(loss={"decay": 0.0}),
        **{f"decay {decay}, warm-up": Arm(loss={"decay": schedules.DecayWarmup(decay)}) for decay in (0.99, 0.9999)},
        **{f"decay {decay}": Arm(loss={"decay": decay}) for decay in (0.99, 0.999, 0.9999)},
        "gap 0": Arm(loss={"max_gap": 0.0}),
        **{f"gap up to {gap}": Arm(loss={"max_gap": gap}) for gap in (0.1, 0.3)},
        "cosine over tokens": Arm(loss={"distance": "official-2026-07"}),
        **{f"layers {m} -> {n}": Arm(loss={"student_layer": m, "teacher_layer": n})
           for m, n in ((2, 4), (2, 8), (4, 6), (4, 8), (6, 8))},
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
        fractions = {"student_layer": STUDENT, "teacher_layer": TEACHER, "path": torch_sit.PATH, "decay": FASTER}
        options = self.arm.attach | options
        if options.get("teacher") == "model":
            options["teacher"] = self.model
        self.align = SelfAlignment(self.model, selfalign.SRALoss(**fractions | self.arm.loss), log_metrics=True, **options)

    @property
    def ema(self) -> nn.Module:
        return self.average.module

    def training_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.tensor(self.chosen(), device=self.device)
        x0, y = self.tensors.images[chosen], self.tensors.labels[chosen]
        y, noise, t = torch_sit.draw(x0, y, self.model.null_class, self.settings.label_dropout, self.draws)
        aligned = self.align is not None and self.step % self.arm.every == 0
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            prediction = self.model(torch_sit.PATH.add_noise(x0, noise, t), t, y)
            denoising = F.mse_loss(prediction, torch_sit.PATH.velocity(x0, noise, t))
            total = denoising + self.align(x0, noise, t) if aligned else denoising
        total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.align:
            self.align.update()
        self.average.update_parameters(self.model)
        self.step += 1
        cosine = self.align.metrics["cosine"] if aligned else torch.tensor(float("nan"), device=self.device)
        return denoising.detach(), cosine


@functools.cache
def load(arguments: tuple[str, ...]) -> common.Data:
    return common.load_data(common.parse(torch_sit.PARSER, list(arguments)))


def train(report: side_by_side.Report, group: str, name: str, seed: int, size: Size,
          arguments: tuple[str, ...]) -> list[records.Row]:  # fmt: skip
    """All that is measured of one run."""
    settings = common.parse(torch_sit.PARSER, [*arguments, "--no-sra", "--seed", str(seed)])
    run, judge = Run(load(arguments), settings, GROUPS[group][name]), _judge(arguments, *size.judge)
    few, losses = _few(run.tensors, size), []
    rows: list[records.Row] = []
    for step in range(1, settings.steps + 1):
        losses.append(torch.stack(run.training_step()))
        if step % size.steps[group][1] == 0:
            report(step, "")
            rows += _curves(run, torch.stack(losses).T.tolist(), few)
            losses.clear()
        if step % size.every == 0 or step == settings.steps:
            report(step, "measuring")
            images, y = measures.samples(run.ema, run.tensors, size.samples, size.sampling_steps)
            rows += checkpoint(run, few, judge, images, y)
    if group == "core":
        rows += at_the_end(run, few, judge, images)
    if run.align and group != "ablations":
        plain = Run(load(arguments), settings, NONE)
        seconds = measures.time_steps({"plain": plain, name: run}, turns=4)
        rows.append((settings.steps, "time of a step", "", seconds[name] / seconds["plain"]))
    return rows


def _few(data: common.Data, size: Size) -> common.Data:
    held_out = data.held_out_images[: size.held_out], data.held_out_labels[: size.held_out]
    return common.Data(data.images[: size.probed], data.labels[: size.probed], *held_out, data.classes)


def _curves(run: Run, recent: list[list[float]], few: common.Data) -> list[records.Row]:
    cosines = [value for value in recent[1] if value == value]
    found = {"training loss": statistics.fmean(recent[0]), "held-out loss": measures.held_out_loss(run.ema, few)}
    found |= {"cosine": statistics.fmean(cosines)} if cosines else {}
    return [(run.step, metric, "", value) for metric, value in found.items()]


def checkpoint(run: Run, few: common.Data, judge: measures.Judge, images: torch.Tensor, y: torch.Tensor) -> list[records.Row]:
    """A probe of the EMA, and what a judge says of its class-conditional samples."""
    found = judge.opinion(images, y)
    return [*_probed(run, "EMA", few, (0.5,)), *((run.step, metric, "", value) for metric, value in found.items())]


def at_the_end(run: Run, few: common.Data, judge: measures.Judge, images: torch.Tensor) -> list[records.Row]:
    """What is measured once: the EMA's probe at other times, the model's, signs of copying, and the real images' own scores."""
    rows = [*_probed(run, "EMA", few, [time for time in TIMES if time != 0.5]), *_probed(run, "model", few, (0.5,))]
    real, labels = run.tensors.held_out_images[: len(images)], run.tensors.held_out_labels[: len(images)]
    found = {f"real: {metric}": value for metric, value in judge.opinion(real, labels).items()}
    encoder = measures.encoder(run.device)
    for prefix, x in (("", images), ("real: ", real)):
        found[f"{prefix}nearest image"] = judge.nearest(x)
        if encoder:
            features = (measures.encode(encoder, each) for each in (judge.data.images[: len(x)], x))
            found[f"{prefix}KID, another encoder"] = measures.kernel_distance(*features)
    return [*rows, *((run.step, metric, "", value) for metric, value in found.items())]


def _probed(run: Run, of: str, few: common.Data, times: Sequence[float]) -> list[records.Row]:
    accuracies = measures.probe(run.model if of == "model" else run.ema, few, times)
    return [(run.step, f"probe of the {of}", f"block {n} t {time}", value)
            for time, values in accuracies.items() for n, value in enumerate(values, 1)]  # fmt: skip


@functools.cache
def _judge(arguments: tuple[str, ...], images: int, epochs: int) -> measures.Judge:
    """One per process: trained alike in each, whatever the run."""
    data, device = load(arguments), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    held_out = torch_sit.tensors(data.held_out_images, data.held_out_labels, device)
    few = torch_sit.tensors(data.images[:images], data.labels[:images], device)
    return measures.Judge(common.Data(*few, *held_out, data.classes), epochs)


# ------------------------------------------------------------------------------------------------------------- all the runs


def run_missing(group: str, file: Path, seeds: list[int], size: Size, arguments: tuple[str, ...], workers: int) -> None:
    done = {(arm, seed) for arm, seed, *_ in records.read(file)}
    jobs = {f"{name}, seed {seed}": (group, name, seed, size, arguments)
            for name in GROUPS[group] for seed in seeds if (name, seed) not in done}  # fmt: skip
    if jobs:
        steps = common.parse(torch_sit.PARSER, list(arguments)).steps
        side_by_side.train_all(train, jobs, steps, workers, lambda job, rows: records.keep(file, *jobs[job][1:3], rows))


def describe(group: str, file: Path, size: Size, arguments: tuple[str, ...]) -> None:
    """Beside the results: what they come from. Runs of other lengths or sizes are no part of them."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, {os.cpu_count()} cores"
    measured = {name: value for name, value in size._asdict().items() if name not in ("arguments", "steps")}
    found = {"command": " ".join(["python studies/study.py", *sys.argv[1:]]), "training": " ".join(arguments),
             "selfalign": selfalign.__version__, "torch": torch.__version__, "python": platform.python_version(),
             "machine": device, "arms": [*GROUPS[group]], "measured": measured}  # fmt: skip
    about = file.with_suffix(".json")
    if file.exists() and (begun := json.loads(about.read_text())["training"]) != found["training"]:
        raise ValueError(f"A study goes on with the settings it began with. Received: {found['training']}, for {file}, "
                         f"whose runs are of {begun}. Repeat those, or give another folder with --results.")  # fmt: skip
    about.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=common.Formatter)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--data", default="digits", help="digits, fashion-mnist, or a folder of images")
    parser.add_argument("--data-dir", default="/usr/share/datasets/fashion-mnist", help="where Fashion-MNIST's .gz files lie")
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--steps", type=int, help="optimizer steps of a run (default: by data and group)")
    workers = 1 if torch.cuda.is_available() else os.cpu_count()
    parser.add_argument("--workers", type=int, default=workers, help="runs at a time")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    settings = parser.parse_args()
    size = SIZES.get(settings.data, SIZES["folder"])
    steps = settings.steps or size.steps[settings.group][0]
    arguments = ("--data", settings.data, *size.arguments.split(), "--steps", str(steps))
    file = settings.results / f"{Path(settings.data).name}-{settings.group}.csv"
    settings.results.mkdir(parents=True, exist_ok=True)
    try:
        load((*arguments, "--data-dir", settings.data_dir))
        describe(settings.group, file, size, arguments)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    run_missing(settings.group, file, settings.seeds, size, (*arguments, "--data-dir", settings.data_dir), settings.workers)


if __name__ == "__main__":
    main()
