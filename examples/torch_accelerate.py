"""torch_sit.py's SiT with Self-Representation Alignment (SRA) through Hugging Face accelerate.

    python examples/torch_accelerate.py                                    scikit-learn's digits, one process
    python examples/torch_accelerate.py --mixed-precision bf16             or fp16, with a GradScaler, on GPUs
    python examples/torch_accelerate.py --accumulate 4                     four backwards for each optimizer step
    accelerate launch --num-processes 2 examples/torch_accelerate.py       several GPUs; with --cpu, several CPU processes
    python examples/torch_accelerate.py --resume                           continue from the last checkpoint, bit for bit

--batch-size is that of an optimizer step, over all processes and micro-batches together. What SRA adds to the training is
marked with "# SRA"; all the rest is accelerate as usual. Model and sampling are torch_sit.py's, images and command line are
in common.py.

Reference: Jiang et al., "No Other Representation Component Is Needed: Diffusion Transformers Can Provide Representation
Guidance by Themselves", 2025, arXiv 2505.02831; Gugger et al., "Accelerate", 2022, github.com/huggingface/accelerate.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import common
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from rich.progress import track
from torch_sit import PATH, SiT, draw, sample, tensors

import selfalign
from selfalign.adapters.torch import SelfAlignment

# ------------------------------------------------------------------------------------------------------------- the training


class Run(common.Run):
    """What one process holds."""

    def __init__(self, data: common.Data, settings: argparse.Namespace, accelerator: Accelerator) -> None:
        super().__init__(data, settings)
        self.accelerator, self.device = accelerator, accelerator.device
        parts = accelerator.num_processes * settings.accumulate
        if min(settings.batch_size, len(data.images)) % parts:
            raise ValueError(f"A batch is divided evenly. Received: --batch-size {settings.batch_size} for {parts} parts, "
                             "processes times --accumulate. Choose a multiple.")  # fmt: skip
        self.images, self.labels = tensors(data.images, data.labels, self.device)
        torch.manual_seed(settings.seed)
        model = SiT(**common.shape(data, settings)).to(self.device)
        self.null_class = model.null_class
        loss = selfalign.SRALoss(student_layer=settings.student_layer, teacher_layer=settings.teacher_layer, path=PATH,
                                 max_gap=settings.max_gap, weight=settings.weight,
                                 decay=selfalign.schedules.DecayWarmup(settings.decay))  # SRA  # fmt: skip
        # SRA: built on the bare model, before prepare(). The projector needs no prepare(): it runs in SRA's term only, under
        # the autocast that the model ran in, and its gradients are averaged over the processes by the object itself
        self.align = SelfAlignment(model, loss)  # SRA; with --no-sra it keeps the EMA and nothing else
        self.parameters = [*model.parameters(), *self.align.projector.parameters()]  # SRA: the projector
        optimizer = torch.optim.AdamW(self.parameters, lr=settings.lr, weight_decay=0.0)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        accelerator.register_for_checkpointing(self.align)  # SRA: so that save_state and load_state carry it

    def training_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        rank, world, micro_batches = self.accelerator.process_index, self.accelerator.num_processes, self.settings.accumulate
        mine = torch.tensor(self.chosen()[rank::world], device=self.device)
        x0, y = self.images[mine], self.labels[mine]  # [B, C, H, W], [B] of this process
        # a function of seed, step and process: nothing to save, and the same noise however the batch is divided
        seed = np.random.default_rng((self.settings.seed, self.step, rank)).integers(2**63)
        draws = torch.Generator(self.device).manual_seed(int(seed))
        y, noise, t = draw(x0, y, self.null_class, self.settings.label_dropout, draws)
        parts = zip(*(tensor.chunk(micro_batches) for tensor in (x0, y, noise, t)), strict=True)
        losses = torch.stack([self.micro_step(*part) for part in parts])  # [micro-batches, 2]
        self.step += 1
        return tuple(losses.mean(dim=0))

    def micro_step(self, x0: torch.Tensor, y: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """A backward, and in the last one of a batch the optimizer step. Returns the denoising loss and SRA's term [2]."""
        with self.accelerator.accumulate(self.model):
            prediction = self.model(PATH.add_noise(x0, noise, t), t, y)  # [B, C, H, W]
            denoising = F.mse_loss(prediction, PATH.velocity(x0, noise, t))
            alignment = self.align(x0, noise, t) if self.settings.sra else torch.zeros_like(denoising)  # SRA: in each
            self.accelerator.backward(denoising + alignment)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.parameters, self.settings.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.accelerator.sync_gradients:
                self.align.update()  # SRA: after optimizer steps only; one that the GradScaler skips is skipped here, too
        return torch.stack([denoising, alignment]).detach()

    def sample(self, noise: np.ndarray, labels: np.ndarray) -> np.ndarray:
        steps, guidance = self.settings.sampling_steps, self.settings.guidance
        x = sample(self.align.teacher, *tensors(noise, labels, self.device), steps, guidance)
        return x.permute(0, 2, 3, 1).cpu().numpy()

    def fixed(self) -> dict[str, object]:
        return super().fixed() | {"processes": self.accelerator.num_processes}  # another number of them draws other noise

    def save(self, file: Path) -> None:  # accelerate writes a folder, and every process has a part in it
        partial = file.with_suffix(".partial")
        self.accelerator.save_state(partial)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            (partial / "run.json").write_text(json.dumps({"step": self.step, "settings": self.fixed()}, indent=1))
            shutil.rmtree(file, ignore_errors=True)
            os.replace(partial, file)

    def read(self, file: Path) -> None:
        run = json.loads((file / "run.json").read_text())
        self.check_fixed(run["settings"])
        self.accelerator.load_state(file)
        self.step = run["step"]


# ----------------------------------------------------------------------------------------------------------- the processes


def main(settings: argparse.Namespace) -> None:
    """What every process runs. The first one also draws and shows the progress."""
    accelerator = Accelerator(mixed_precision=settings.mixed_precision, gradient_accumulation_steps=settings.accumulate)
    checkpoint = settings.out / "checkpoint"
    run = common.start(settings, checkpoint, lambda data, settings: Run(data, settings, accelerator))
    for _ in track(range(run.step, settings.steps), "training", disable=not accelerator.is_main_process):
        denoising, alignment = run.training_step()
        if run.step % settings.save_every == 0 or run.step == settings.steps:
            run.save(checkpoint)
            accelerator.print(f"step {run.step}: denoising {float(denoising):.3f}, SRA {float(alignment):.3f}")
    if accelerator.is_main_process:
        common.finish(run, checkpoint)
    accelerator.end_training()


PARSER = common.command_line(__doc__, "torch_accelerate")
PARSER.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"], default="no")
PARSER.add_argument("--accumulate", type=int, default=1, help="micro-batches for each optimizer step")
PARSER.add_argument("--clip", type=float, default=1.0, help="greatest norm of the gradients, the projector's included")

if __name__ == "__main__":
    main(common.parse(PARSER))
