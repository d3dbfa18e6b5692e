"""What SRA and its settings do to a small SiT: arms and seeds side by side, resumable run by run.

    python studies/study.py core --data fashion-mnist        SRA, the paper's recipe, and two others
    python studies/study.py ablations --data fashion-mnist   gaps, decays, weights, layers
    python studies/study.py cheaper                          terms that cost less, on the digits
    python studies/study.py core --data FOLDER               other images: FOLDER/CLASS/NAME.png
    python studies/report.py fashion-mnist                   tables, and the paper's claims

All arms of a seed have the same first weights, batches, dropped labels, noise and times. All are
measured by one EMA of the model, apart from the teacher, so that a teacher's decay does not flatter
its arm. A run that has ended is kept in the CSV file of its group, beside the command, versions and
hardware. Started anew, the study goes on with the runs that are missing.
"""

import argparse
import functools
import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import selfalign
from selfalign import schedules
from selfalign.adapters.torch import EMATeacher, SelfAlignment

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import common
import measures
import records
import side_by_side
import torch_sit

RESULTS = Path(__file__).parent / "results"
TIMES = (0.1, 0.3, 0.5, 0.7)  # of the probes; 0 is data
Arguments = tuple[str, ...]  # of torch_sit.py's command line

# --------------------------------------------------------------------------------------------------
# How long and how large


class Length(NamedTuple):
    """Of a run."""

    steps: int
    losses_every: int  # steps from one held-out loss to the next


class Size(NamedTuple):
    """How long and how large the runs are, and how much is measured."""

    arguments: str  # of torch_sit.py
    lengths: dict[str, Length]  # by group
    measured_every: int  # steps from one checkpoint, where all is measured, to the next
    samples: int  # judged
    held_out: int = 1000  # images
    judge_images: int = 20_000
    judge_epochs: int = 4
    probed: int = 1000  # images that a probe is fitted to
    sampling_steps: int = 16


SIZES = {
    "digits": Size(
        "--width 64 --depth 8 --patch 2 --batch-size 64 --lr 2e-3",
        {"core": Length(600, 50), "ablations": Length(600, 50), "cheaper": Length(600, 50)},
        measured_every=200,
        samples=360,
        judge_images=2000,
        judge_epochs=20,
        probed=2000,
    ),
    "fashion-mnist": Size(
        "--width 64 --depth 8 --patch 4 --batch-size 32 --lr 2e-3",
        {"core": Length(1800, 150), "ablations": Length(600, 600), "cheaper": Length(600, 300)},
        measured_every=600,
        samples=500,
        held_out=300,
        sampling_steps=10,
    ),
    "folder": Size(
        "--width 384 --depth 12 --heads 6 --patch 2 --batch-size 256 --lr 5e-4 --image-size 32",
        {"core": Length(4000, 250), "ablations": Length(2000, 500), "cheaper": Length(2000, 500)},
        measured_every=1000,
        samples=2000,
    ),
}

# --------------------------------------------------------------------------------------------------
# The arms

FASTER = schedules.DecayWarmup(0.999)  # a short run's EMA
DEFAULT_SETTINGS: dict[str, Any] = {
    "student_layer": 0.25,
    "teacher_layer": 0.7,
    "path": torch_sit.PATH,
    "decay": FASTER,
}


def sra(**settings: Any) -> selfalign.SRALoss:
    """SRA with other settings than the default arm's."""
    return selfalign.SRALoss(**DEFAULT_SETTINGS | settings)


class SRAWithoutProjector(selfalign.SRALoss):
    """The student's tokens are compared as they are."""

    @property
    def head(self) -> selfalign.heads.Head:
        return selfalign.heads.NONE


class Arm(NamedTuple):
    """One way to train."""

    loss: selfalign.Objective | None  # None: without a term
    teacher: EMATeacher | None = None
    every: int = 1  # a term in every n-th step only
    half_of_the_tokens: bool = False  # the teacher computes half of them, others in each step


class HalfOfTheTokens:
    """The places that the teacher computes; the student's tokens are compared there."""

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.generator = torch.Generator().manual_seed(seed)
        self.places = torch.arange(count)

    def draw(self) -> None:
        """Other places, before each term."""
        order = torch.randperm(self.count, generator=self.generator)
        self.places = order[: self.count // 2]

    def before_first_block(
        self, block: nn.Module, args: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        """A hook on the teacher."""
        tokens, *rest = args
        return (tokens[:, self.places], *rest)

    def select(self, tokens: torch.Tensor) -> torch.Tensor:
        """Of the student's tokens those places; the teacher has these alone."""
        return tokens[:, self.places] if tokens.shape[1] == self.count else tokens


NONE = Arm(None)
DEFAULT = Arm(sra())
LAYER_SYNC = selfalign.LayerSyncLoss(
    student_layer=0.25, teacher_layer=0.7, weight=0.5, projector=True
)
GROUPS: dict[str, dict[str, Arm]] = {
    "core": {
        "none": NONE,
        "default": DEFAULT,
        "paper recipe": Arm(sra(distance="smooth_l1", weight=0.2, decay=0.9999)),
        "same layer, 2 -> 2": Arm(sra(teacher_layer=0.25, allow_same_layer=True)),
        "no projector": Arm(SRAWithoutProjector(**DEFAULT_SETTINGS)),
    },
    "ablations": {
        "weight 0.1": Arm(sra(weight=0.1)),
        "weight 0.2": Arm(sra(weight=0.2)),
        "weight 0.8": Arm(sra(weight=0.8)),
        "teacher = student": Arm(sra(decay=0.0)),
        "decay 0.99, warm-up": Arm(sra(decay=schedules.DecayWarmup(0.99))),
        "decay 0.9999, warm-up": Arm(sra(decay=schedules.DecayWarmup(0.9999))),
        "decay 0.99": Arm(sra(decay=0.99)),
        "decay 0.999": Arm(sra(decay=0.999)),
        "decay 0.9999": Arm(sra(decay=0.9999)),
        "gap 0": Arm(sra(max_gap=0.0)),
        "gap up to 0.1": Arm(sra(max_gap=0.1)),
        "gap up to 0.3": Arm(sra(max_gap=0.3)),
        "cosine over tokens": Arm(sra(distance="token_axis_cosine")),
        "layers 2 -> 4": Arm(sra(student_layer=2, teacher_layer=4)),
        "layers 2 -> 8": Arm(sra(student_layer=2, teacher_layer=8)),
        "layers 4 -> 6": Arm(sra(student_layer=4, teacher_layer=6)),
        "layers 4 -> 8": Arm(sra(student_layer=4, teacher_layer=8)),
        "layers 6 -> 8": Arm(sra(student_layer=6, teacher_layer=8)),
    },
    "cheaper": {
        "none": NONE,
        "default": DEFAULT,
        "half of the batch": Arm(sra(), teacher=EMATeacher(batch_fraction=0.5)),
        "every 2nd step": Arm(sra(), every=2),
        "every 4th step": Arm(sra(), every=4),
        "half of the tokens": Arm(sra(), half_of_the_tokens=True),
        "teacher in bfloat16": Arm(sra(), teacher=EMATeacher(dtype=torch.bfloat16)),
        "EMA every 10th step": Arm(sra(decay=schedules.Every(10, FASTER))),
        "LayerSync with projector": Arm(LAYER_SYNC),
    },
}

# --------------------------------------------------------------------------------------------------
# One run


class Run(torch_sit.Run):
    """The example's run without SRA, and an arm's term beside it."""

    def __init__(self, data: common.Images, settings: argparse.Namespace, arm: Arm) -> None:
        super().__init__(data, settings)
        self.arm = arm
        self.half: HalfOfTheTokens | None = None
        if arm.loss is not None:
            self.align = self.attach(arm)
            parameters = [*self.model.parameters(), *self.align.projector.parameters()]
            self.optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)

    def attach(self, arm: Arm) -> SelfAlignment:
        if not arm.half_of_the_tokens:
            return SelfAlignment(self.model, arm.loss, teacher=arm.teacher, log_metrics=True)
        self.half = HalfOfTheTokens(self.model.side**2, self.settings.seed + 2)
        select = self.half.select
        # without checks: that the teacher sees less than the student is meant
        align = SelfAlignment(self.model, arm.loss, select=select, checks="off", log_metrics=True)
        align.teacher.blocks[0].register_forward_pre_hook(self.half.before_first_block)
        return align

    @property
    def ema(self) -> nn.Module:
        """Of all arms the same average, whatever the teacher's decay."""
        return self.average.module

    def training_step(self) -> torch_sit.Losses:
        """One optimizer step. Returns the denoising loss and the term's cosine, NaN without one."""
        indices = common.batch_indices(len(self.data.images), self.step, self.settings)
        x0 = self.data.images[torch.tensor(indices)]
        labels = self.data.labels[torch.tensor(indices)]
        dropout = self.settings.label_dropout
        y, noise, t = torch_sit.draw(x0, labels, self.model.null_class, dropout, self.draws)
        align = self.align if self.step % self.arm.every == 0 else None
        cosine = torch.tensor(math.nan, device=self.device)
        if self.half:
            self.half.draw()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            prediction = self.model(torch_sit.PATH.add_noise(x0, noise, t), t, y)
            denoising = F.mse_loss(prediction, torch_sit.PATH.velocity(x0, noise, t))
            total = denoising
            if align:
                total = denoising + align(x0, noise, t)
                cosine = align.metrics["cosine"]
        total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.align:
            self.align.update()
        self.average.update_parameters(self.model)
        self.step += 1
        return denoising.detach(), cosine


@functools.cache
def load(arguments: Arguments) -> common.Images:
    return common.load_data(common.parse(torch_sit.PARSER, list(arguments)))


def train(
    report: side_by_side.Report,
    group: str,
    name: str,
    seed: int,
    size: Size,
    arguments: Arguments,
) -> list[records.Row]:
    """All that is measured of one run."""
    settings = common.parse(torch_sit.PARSER, [*arguments, "--no-sra", "--seed", str(seed)])
    run = Run(load(arguments), settings, GROUPS[group][name])
    judge = make_judge(arguments, size.judge_images, size.judge_epochs)
    few = few_images(run.data, size)
    recent: list[torch.Tensor] = []
    rows: list[records.Row] = []
    for step in range(1, settings.steps + 1):
        recent.append(torch.stack(run.training_step()))
        if step % size.lengths[group].losses_every == 0:
            report(step, "")
            rows += curves(run, torch.stack(recent), few)
            recent.clear()
        if step % size.measured_every == 0 or step == settings.steps:
            report(step, "measuring")
            images, y = measures.samples(run.ema, run.data, size.samples, size.sampling_steps)
            rows += at_a_checkpoint(run, few, judge, images, y)
    if group == "core":
        rows += at_the_end(run, few, judge, images)
    if run.align and group != "ablations":
        plain = Run(load(arguments), settings, NONE)
        steps = {"plain": plain.training_step, "aligned": run.training_step}
        seconds = measures.time_steps(steps, turns=4)
        ratio = seconds["aligned"] / seconds["plain"]
        rows.append((settings.steps, "time of a step", "", ratio))
    return rows


def few_images(data: measures.Tensors, size: Size) -> measures.Tensors:
    """The part of the data that is measured with."""
    return common.Data(
        data.images[: size.probed],
        data.labels[: size.probed],
        data.held_out_images[: size.held_out],
        data.held_out_labels[: size.held_out],
        data.classes,
    )


@functools.cache
def make_judge(arguments: Arguments, images: int, epochs: int) -> measures.Judge:
    """One per process: trained alike in each, whatever the run."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = torch_sit.on_device(load(arguments), device)
    few = data._replace(images=data.images[:images], labels=data.labels[:images])
    return measures.Judge(few, epochs)


# --------------------------------------------------------------------------------------------------
# What is measured


def rows_of(step: int, found: dict[str, float]) -> list[records.Row]:
    return [(step, metric, "", value) for metric, value in found.items()]


def curves(run: Run, recent: torch.Tensor, few: measures.Tensors) -> list[records.Row]:
    """Losses, and the cosine of student and teacher, over the last steps [steps, 2]."""
    losses, all_cosines = recent.T.tolist()
    cosines = [cosine for cosine in all_cosines if not math.isnan(cosine)]
    found = {
        "training loss": statistics.fmean(losses),
        "held-out loss": measures.held_out_loss(run.ema, few),
    }
    if cosines:
        found["cosine"] = statistics.fmean(cosines)
    return rows_of(run.step, found)


def at_a_checkpoint(
    run: Run,
    few: measures.Tensors,
    judge: measures.Judge,
    images: torch.Tensor,
    y: torch.Tensor,
) -> list[records.Row]:
    """A probe of the EMA, and what a judge says of its class-conditional samples."""
    return [*probed(run, "EMA", few, [0.5]), *rows_of(run.step, judge.opinion(images, y))]


def at_the_end(
    run: Run, few: measures.Tensors, judge: measures.Judge, images: torch.Tensor
) -> list[records.Row]:
    """What is measured once: probes at other times and of the model, and copying.

    Beside it the same of real images.
    """
    other_times = [time for time in TIMES if time != 0.5]
    rows = [*probed(run, "EMA", few, other_times), *probed(run, "model", few, [0.5])]
    real = run.data.held_out_images[: len(images)]
    labels = run.data.held_out_labels[: len(images)]
    opinion = judge.opinion(real, labels)
    found = {f"real: {metric}": value for metric, value in opinion.items()}
    encoder = measures.encoder(run.device)
    for prefix, x in (("", images), ("real: ", real)):
        found[f"{prefix}nearest image"] = judge.nearest(x)
        if encoder:
            trained = measures.encode(encoder, judge.data.images[: len(x)])
            distance = measures.kernel_distance(trained, measures.encode(encoder, x))
            found[f"{prefix}KID, another encoder"] = distance
    return [*rows, *rows_of(run.step, found)]


def probed(run: Run, of: str, few: measures.Tensors, times: Sequence[float]) -> list[records.Row]:
    """The probe's accuracy after each block, of the "EMA" or of the "model"."""
    model = run.model if of == "model" else run.ema
    rows: list[records.Row] = []
    for time, accuracies in measures.probe(model, few, times).items():
        for block, value in enumerate(accuracies, 1):
            rows.append((run.step, f"probe of the {of}", f"block {block} t {time}", value))
    return rows


# --------------------------------------------------------------------------------------------------
# All the runs


def run_missing(
    group: str, file: Path, seeds: list[int], size: Size, arguments: Arguments, workers: int
) -> None:
    """Run what the file does not have yet, and keep it there."""
    done = {(arm, seed) for arm, seed, *_ in records.read(file)}
    all_runs = [(name, seed) for name in GROUPS[group] for seed in seeds]
    missing = {f"{name}, seed {seed}": (name, seed) for name, seed in all_runs}
    jobs = {
        job: (group, name, seed, size, arguments)
        for job, (name, seed) in missing.items()
        if (name, seed) not in done
    }

    def keep(job: str, rows: list[records.Row]) -> None:
        name, seed = missing[job]
        records.keep(file, name, seed, rows)

    if jobs:
        steps = common.parse(torch_sit.PARSER, list(arguments)).steps
        side_by_side.train_all(train, jobs, steps, workers, keep)


def describe(group: str, file: Path, size: Size, arguments: Arguments) -> None:
    """Beside the results: what they come from. Runs of other lengths or sizes are refused."""
    training = " ".join(arguments)
    about = file.with_suffix(".json")
    if file.exists():
        begun = json.loads(about.read_text())["training"]
        if begun != training:
            raise ValueError(
                "A study goes on with the settings it began with. "
                f"Received: {training}, for {file}, whose runs are of {begun}. "
                "Repeat those, or give another folder with --results."
            )
    found = {
        "command": " ".join(["python studies/study.py", *sys.argv[1:]]),
        "training": training,
        "selfalign": selfalign.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": machine(),
        "arms": [*GROUPS[group]],
        "measured": measured(size),
    }
    about.write_text(json.dumps(found, indent=1) + "\n")


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {os.cpu_count()} cores"


def measured(size: Size) -> dict[str, Any]:
    """How much is measured, as the files' descriptions have it."""
    return {
        "every": size.measured_every,
        "samples": size.samples,
        "held_out": size.held_out,
        "judge": [size.judge_images, size.judge_epochs],
        "probed": size.probed,
        "sampling_steps": size.sampling_steps,
    }


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=common.Formatter)
    add = parser.add_argument
    add("group", choices=GROUPS)
    add("--data", default="digits", help="digits, fashion-mnist, or a folder of images")
    add(
        "--data-dir",
        default="/usr/share/datasets/fashion-mnist",
        help="where Fashion-MNIST's .gz files lie",
    )
    add("--seeds", type=int, nargs="+", default=[10, 11, 12])
    add("--steps", type=int, help="optimizer steps of a run (default: by data and group)")
    workers = 1 if torch.cuda.is_available() else os.cpu_count()
    add("--workers", type=int, default=workers, help="runs at a time")
    add("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    return parser


def main() -> None:
    settings = command_line().parse_args()
    group = settings.group
    size = SIZES.get(settings.data, SIZES["folder"])
    steps = settings.steps or size.lengths[group].steps
    training = ("--data", settings.data, *size.arguments.split(), "--steps", str(steps))
    arguments = (*training, "--data-dir", settings.data_dir)
    file = settings.results / f"{Path(settings.data).name}-{group}.csv"
    settings.results.mkdir(parents=True, exist_ok=True)
    with common.errors_as_sentences():
        load(arguments)
        describe(group, file, size, training)
    run_missing(group, file, settings.seeds, size, arguments, settings.workers)


if __name__ == "__main__":
    main()
