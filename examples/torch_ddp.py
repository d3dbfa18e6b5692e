"""torch_sit.py's SiT with Self-Representation Alignment (SRA) in several processes, by DDP.

    torchrun --nproc-per-node 2 examples/torch_ddp.py                    the digits, two processes
    torchrun --nproc-per-node gpu examples/torch_ddp.py --data FOLDER    one process per GPU
    torchrun --nproc-per-node 2 examples/torch_ddp.py --resume           from the last checkpoint

--batch-size is that of all processes together. What SRA adds to the training is marked with
"# SRA"; all the rest is DistributedDataParallel as usual, on GPUs or in CPU processes. Model and
sampling are torch_sit.py's; data, command line and picture are in common.py.

Reference: Jiang et al., "No Other Representation Component Is Needed: Diffusion Transformers Can
Provide Representation Guidance by Themselves", 2025, arXiv 2505.02831; Li et al., "PyTorch
Distributed", 2020, arXiv 2006.15704.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch_sit import PATH, SiT, draw, sample, tensors

import selfalign
from selfalign.adapters.torch import SelfAlignment

# --------------------------------------------------------------------------------------------------
# The training


class Run:
    """The parts of a training, in one process.

    All processes hold the same model, EMA and optimizer; only images and random numbers differ.
    """

    def __init__(
        self, data: common.Images, settings: argparse.Namespace, device: torch.device
    ) -> None:
        self.settings = settings
        self.step = 0
        self.device = device
        self.rank = distributed.get_rank()
        self.world = distributed.get_world_size()
        if min(settings.batch_size, len(data.images)) % self.world:
            raise ValueError(
                "All processes take equal parts of a batch. "
                f"Received: --batch-size {settings.batch_size} for {self.world} processes. "
                "Choose a multiple."
            )
        self.images, self.labels = tensors(data.images, data.labels, device)
        torch.manual_seed(settings.seed)
        self.model = SiT(**common.model_sizes(data, settings)).to(device)
        loss = selfalign.SRALoss(  # SRA
            student_layer=settings.student_layer,
            teacher_layer=settings.teacher_layer,
            path=PATH,
            max_gap=settings.max_gap,
            weight=settings.weight,
            decay=selfalign.schedules.DecayWarmup(settings.decay),
        )
        # SRA: built on the bare model, before DDP wraps it. Nothing else is to be done for several
        # processes. The first term gives all of them the first one's projector, and makes the
        # teacher the model, which DDP has made the same everywhere. The projector stands outside
        # DDP: the object averages its gradients over the processes in every backward. So all make
        # the same optimizer steps and have the same EMA. The gaps differ from process to process,
        # as they should.
        self.align = SelfAlignment(self.model, loss)  # SRA; with --no-sra it keeps the EMA only
        # every parameter takes part in the prediction, so DDP need not look for unused ones
        self.parallel = DistributedDataParallel(self.model, find_unused_parameters=False)
        parameters = [*self.model.parameters()]
        parameters += self.align.projector.parameters()  # SRA
        self.optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)

    def generator(self, step: int) -> torch.Generator:
        """A function of seed, step and process: a checkpoint need not hold every process's."""
        seed = np.random.default_rng((self.settings.seed, step, self.rank)).integers(2**63)
        return torch.Generator(self.device).manual_seed(int(seed))

    def fixed_settings(self) -> dict[str, Any]:
        """Another number of processes draws other noise."""
        return common.fixed_settings(self.settings, processes=self.world)

    def parts(self) -> dict[str, nn.Module | torch.optim.Optimizer | SelfAlignment]:
        """All that has a state dict; the bare model, so that no name begins with "module."."""
        return {"model": self.model, "optimizer": self.optimizer, "align": self.align}

    def save(self, file: Path) -> None:
        """By the first process, since all hold the same."""
        state = {name: part.state_dict() for name, part in self.parts().items()}
        state |= {"step": self.step, "settings": self.fixed_settings()}
        partial = file.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, file)  # at once: whatever happens, `file` is a whole checkpoint

    def load(self, file: Path) -> None:
        """On every process."""
        common.check_exists(file)
        state = torch.load(file, weights_only=True, map_location=self.device)
        common.check_settings(state["settings"], self.fixed_settings())
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.step = state["step"]


def train(run: Run, checkpoint: Path) -> None:
    """Train from `run.step` to the last step. The first process also saves and prints."""
    settings = run.settings
    steps = range(run.step, settings.steps)
    for step in track(steps, "training", disable=run.rank > 0):
        indices = common.batch_indices(len(run.images), step, settings)
        mine = torch.tensor(indices[run.rank :: run.world])
        x0 = run.images[mine]  # [B, C, H, W] of this process
        labels = run.labels[mine]  # [B]
        draws = run.generator(step)
        y, noise, t = draw(x0, labels, run.model.null_class, settings.label_dropout, draws)

        prediction = run.parallel(PATH.add_noise(x0, noise, t), t, y)  # [B, C, H, W]
        denoising = F.mse_loss(prediction, PATH.velocity(x0, noise, t))
        alignment = run.align(x0, noise, t) if settings.sra else torch.zeros_like(denoising)  # SRA
        (denoising + alignment).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.align.update()  # SRA: on every process

        run.step = step + 1
        saving = run.step % settings.save_every == 0 or run.step == settings.steps
        if saving and run.rank == 0:
            run.save(checkpoint)
            losses = f"denoising {denoising.item():.3f}, SRA {alignment.item():.3f}"
            print(f"step {run.step}: {losses}")  # of this process's part of the batch


# --------------------------------------------------------------------------------------------------
# The processes


def main(settings: argparse.Namespace, device: torch.device) -> None:
    """What every process runs."""
    checkpoint = settings.out / "checkpoint.pt"
    picture = settings.out / "samples.png"
    with common.errors_as_sentences():
        data = common.load_data(settings)
        run = Run(data, settings, device)
        if settings.resume:
            run.load(checkpoint)
    settings.out.mkdir(parents=True, exist_ok=True)
    train(run, checkpoint)
    if run.rank == 0:
        noise, y = tensors(*common.sampling_inputs(data), device)
        x = sample(run.align.teacher, noise, y, settings.sampling_steps, settings.guidance)
        common.draw_samples(x.permute(0, 2, 3, 1).cpu().numpy(), data.classes, picture)
        print(f"Checkpoint: {checkpoint}\nSamples:    {picture}")


def join_processes() -> torch.device:
    """Meet the other processes that torchrun has started. Returns this one's device."""
    if "LOCAL_RANK" not in os.environ:
        raise SystemExit(
            "error: torchrun starts the processes. Received: plain python. "
            "See --help for the command."
        )
    if not torch.cuda.is_available():
        distributed.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    distributed.init_process_group("nccl", device_id=device)
    return device


PARSER = common.command_line(__doc__, "torch_ddp")

if __name__ == "__main__":
    SETTINGS = common.parse(PARSER)
    DEVICE = join_processes()
    try:
        main(SETTINGS, DEVICE)
    finally:
        distributed.destroy_process_group()
