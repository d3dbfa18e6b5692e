"""torch_sit.py's SiT with Self-Representation Alignment (SRA) through Hugging Face accelerate.

    python examples/torch_accelerate.py                           the digits, one process
    python examples/torch_accelerate.py --mixed-precision bf16    or fp16 with a GradScaler, on GPUs
    python examples/torch_accelerate.py --accumulate 4            backwards per optimizer step
    python examples/torch_accelerate.py --resume                  from the last checkpoint
    accelerate launch --num-processes 2 examples/torch_accelerate.py          several GPUs
    accelerate launch --cpu --num-processes 2 examples/torch_accelerate.py    or CPU processes

--batch-size is that of an optimizer step, over all processes and micro-batches together. What SRA
adds to the training is marked with "# SRA"; all the rest is accelerate as usual. Model and sampling
are torch_sit.py's; data, command line and picture are in common.py.

Reference: Jiang et al., "No Other Representation Component Is Needed: Diffusion Transformers Can
Provide Representation Guidance by Themselves", 2025, arXiv 2505.02831; Gugger et al., "Accelerate",
2022, github.com/huggingface/accelerate.
"""

import argparse
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from rich.progress import track
from torch_sit import PATH, SiT, draw, sample, tensors

import selfalign
from selfalign.adapters.torch import SelfAlignment

# --------------------------------------------------------------------------------------------------
# The training


class Run:
    """The parts of a training, in one process."""

    def __init__(
        self, data: common.Images, settings: argparse.Namespace, accelerator: Accelerator
    ) -> None:
        self.settings = settings
        self.step = 0
        self.accelerator = accelerator
        parts = accelerator.num_processes * settings.accumulate
        if min(settings.batch_size, len(data.images)) % parts:
            raise ValueError(
                "A batch is divided evenly. "
                f"Received: --batch-size {settings.batch_size} for {parts} parts, "
                "processes times --accumulate. Choose a multiple."
            )
        self.images, self.labels = tensors(data.images, data.labels, accelerator.device)
        torch.manual_seed(settings.seed)
        model = SiT(**common.model_sizes(data, settings)).to(accelerator.device)
        self.null_class = model.null_class
        loss = selfalign.SRALoss(  # SRA
            student_layer=settings.student_layer,
            teacher_layer=settings.teacher_layer,
            path=PATH,
            max_gap=settings.max_gap,
            weight=settings.weight,
            decay=selfalign.schedules.DecayWarmup(settings.decay),
        )
        # SRA: built on the bare model, before prepare(). The projector needs no prepare(): it runs
        # in SRA's term only, under the autocast that the model ran in, and the object averages its
        # gradients over the processes.
        self.align = SelfAlignment(model, loss)  # SRA; with --no-sra it keeps the EMA only
        self.parameters = [*model.parameters()]
        self.parameters += self.align.projector.parameters()  # SRA
        optimizer = torch.optim.AdamW(self.parameters, lr=settings.lr, weight_decay=0.0)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        accelerator.register_for_checkpointing(self.align)  # SRA: saved and loaded with the rest

    def micro_batches(self, step: int) -> Iterator[tuple[torch.Tensor, ...]]:
        """Images, labels, noise and times of this process, in `--accumulate` parts."""
        settings = self.settings
        rank = self.accelerator.process_index
        indices = common.batch_indices(len(self.images), step, settings)
        mine = torch.tensor(indices[rank :: self.accelerator.num_processes])
        x0 = self.images[mine]  # [B, C, H, W]
        labels = self.labels[mine]  # [B]
        # a function of seed, step and process: nothing to save, and the same noise however the
        # batch is divided
        seed = np.random.default_rng((settings.seed, step, rank)).integers(2**63)
        draws = torch.Generator(self.accelerator.device).manual_seed(int(seed))
        y, noise, t = draw(x0, labels, self.null_class, settings.label_dropout, draws)
        parts = (tensor.chunk(settings.accumulate) for tensor in (x0, y, noise, t))
        return zip(*parts, strict=True)

    def fixed_settings(self) -> dict[str, Any]:
        """Another number of processes draws other noise."""
        return common.fixed_settings(self.settings, processes=self.accelerator.num_processes)

    def save(self, folder: Path) -> None:
        """By every process: accelerate writes a folder, and each has a part in it."""
        partial = folder.with_suffix(".partial")
        self.accelerator.save_state(partial)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            run = {"step": self.step, "settings": self.fixed_settings()}
            (partial / "run.json").write_text(json.dumps(run, indent=1))
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(partial, folder)

    def load(self, folder: Path) -> None:
        common.check_exists(folder)
        run = json.loads((folder / "run.json").read_text())
        common.check_settings(run["settings"], self.fixed_settings())
        self.accelerator.load_state(folder)
        self.step = run["step"]


def train(run: Run, checkpoint: Path) -> None:
    """Train from `run.step` to the last step, with a checkpoint now and then."""
    settings = run.settings
    accelerator = run.accelerator
    steps = range(run.step, settings.steps)
    for step in track(steps, "training", disable=not accelerator.is_main_process):
        losses = []
        for x0, y, noise, t in run.micro_batches(step):
            with accelerator.accumulate(run.model):
                prediction = run.model(PATH.add_noise(x0, noise, t), t, y)  # [B, C, H, W]
                denoising = F.mse_loss(prediction, PATH.velocity(x0, noise, t))
                alignment = torch.zeros_like(denoising)
                if settings.sra:
                    alignment = run.align(x0, noise, t)  # SRA: for each micro-batch
                accelerator.backward(denoising + alignment)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(run.parameters, settings.clip)
                run.optimizer.step()
                run.optimizer.zero_grad()
                if accelerator.sync_gradients:
                    # SRA: after optimizer steps only. One that the GradScaler skips is skipped here
                    run.align.update()  # SRA
            losses.append(torch.stack([denoising, alignment]).detach())

        run.step = step + 1
        if run.step % settings.save_every == 0 or run.step == settings.steps:
            run.save(checkpoint)
            denoising, alignment = torch.stack(losses).mean(dim=0)
            text = f"denoising {denoising.item():.3f}, SRA {alignment.item():.3f}"
            accelerator.print(f"step {run.step}: {text}")


def main(settings: argparse.Namespace) -> None:
    """What every process runs."""
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision, gradient_accumulation_steps=settings.accumulate
    )
    checkpoint = settings.out / "checkpoint"
    picture = settings.out / "samples.png"
    with common.errors_as_sentences():
        data = common.load_data(settings)
        run = Run(data, settings, accelerator)
        if settings.resume:
            run.load(checkpoint)
    settings.out.mkdir(parents=True, exist_ok=True)
    train(run, checkpoint)
    if accelerator.is_main_process:
        noise, y = tensors(*common.sampling_inputs(data), accelerator.device)
        x = sample(run.align.teacher, noise, y, settings.sampling_steps, settings.guidance)
        common.draw_samples(x.permute(0, 2, 3, 1).cpu().numpy(), data.classes, picture)
        print(f"Checkpoint: {checkpoint}\nSamples:    {picture}")
    accelerator.end_training()


PARSER = common.command_line(__doc__, "torch_accelerate")
PARSER.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"], default="no")
PARSER.add_argument("--accumulate", type=int, default=1, help="micro-batches per optimizer step")
PARSER.add_argument("--clip", type=float, default=1.0, help="largest norm of all gradients")

if __name__ == "__main__":
    main(common.parse(PARSER))
