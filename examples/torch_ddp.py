"""torch_sit.py's SiT with Self-Representation Alignment (SRA) on several GPUs, or CPU processes: DistributedDataParallel.

    torchrun --nproc-per-node 2 examples/torch_ddp.py                  scikit-learn's digits, two processes
    torchrun --nproc-per-node gpu examples/torch_ddp.py --data FOLDER  one process per GPU; your own images
    torchrun --nproc-per-node 2 examples/torch_ddp.py --resume         continue from the last checkpoint, bit for bit

--batch-size is that of all processes together. What SRA adds to the training is marked with "# SRA"; all the rest is data
parallelism as usual. Model and sampling are torch_sit.py's, images and command line are in common.py.

Reference: Jiang et al., "No Other Representation Component Is Needed: Diffusion Transformers Can Provide Representation
Guidance by Themselves", 2025, arXiv 2505.02831; Li et al., "PyTorch Distributed", 2020, arXiv 2006.15704.
"""

import argparse
import os
from pathlib import Path

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

# ------------------------------------------------------------------------------------------------------------- the training


class Run(common.Run):
    """What one process holds. All hold the same model, EMA and optimizer; only images and random numbers differ."""

    suffix = ".pt"

    def __init__(self, data: common.Data, settings: argparse.Namespace, device: torch.device) -> None:
        super().__init__(data, settings)
        self.device, self.rank, self.world = device, distributed.get_rank(), distributed.get_world_size()
        if min(settings.batch_size, len(data.images)) % self.world:
            raise ValueError("All processes take equal shares of a batch. Received: --batch-size "
                             f"{settings.batch_size} for {self.world} processes. Choose a multiple.")  # fmt: skip
        self.images, self.labels = tensors(data.images, data.labels, device)
        torch.manual_seed(settings.seed)
        self.model = SiT(**common.shape(data, settings)).to(device)
        loss = selfalign.SRALoss(student_layer=settings.student_layer, teacher_layer=settings.teacher_layer, path=PATH,
                                 max_gap=settings.max_gap, weight=settings.weight,
                                 decay=selfalign.schedules.DecayWarmup(settings.decay))  # SRA  # fmt: skip
        # SRA: built on the bare model, before DDP wraps it. Nothing else is to be done for several processes: the first term
        # gives all of them the first one's projector, and makes the teacher the model, which DDP has made the same everywhere.
        # The projector stands outside DDP; the object itself averages its gradients over the processes in every backward. So
        # all make the same optimizer steps, and with them the same EMA. The gaps differ from process to process, as they should
        self.align = SelfAlignment(self.model, loss)  # SRA; with --no-sra it keeps the EMA and nothing else
        # every parameter of the model takes part in the prediction, so DDP need not look for unused ones
        self.parallel = DistributedDataParallel(self.model, find_unused_parameters=False)
        parameters = [*self.model.parameters(), *self.align.projector.parameters()]  # SRA: the projector
        self.optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)

    def training_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        mine = torch.tensor(self.chosen()[self.rank :: self.world], device=self.device)
        x0, y = self.images[mine], self.labels[mine]  # [B, C, H, W], [B] of this process
        # a function of seed, step and process: so the checkpoint need not hold the state of every process's generator
        seed = np.random.default_rng((self.settings.seed, self.step, self.rank)).integers(2**63)
        draws = torch.Generator(self.device).manual_seed(int(seed))
        y, noise, t = draw(x0, y, self.model.null_class, self.settings.label_dropout, draws)

        prediction = self.parallel(PATH.add_noise(x0, noise, t), t, y)  # [B, C, H, W]
        denoising = F.mse_loss(prediction, PATH.velocity(x0, noise, t))
        alignment = self.align(x0, noise, t) if self.settings.sra else torch.zeros_like(denoising)  # SRA
        (denoising + alignment).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.align.update()  # SRA: on every process
        self.step += 1
        return denoising.detach(), alignment.detach()

    def sample(self, noise: np.ndarray, labels: np.ndarray) -> np.ndarray:
        steps, guidance = self.settings.sampling_steps, self.settings.guidance
        x = sample(self.align.teacher, *tensors(noise, labels, self.device), steps, guidance)
        return x.permute(0, 2, 3, 1).cpu().numpy()

    def fixed(self) -> dict[str, object]:
        return super().fixed() | {"processes": self.world}  # another number of them draws other noise

    def save(self, file: Path) -> None:
        if self.rank == 0:  # the others hold the same
            super().save(file)

    def _parts(self) -> dict[str, nn.Module | torch.optim.Optimizer | SelfAlignment]:
        return {"model": self.model, "optimizer": self.optimizer, "align": self.align}  # the bare model: no "module." in names

    def write(self, file: Path) -> None:
        state = {name: part.state_dict() for name, part in self._parts().items()}
        torch.save(state | {"step": self.step, "settings": self.fixed()}, file)

    def read(self, file: Path) -> None:  # on every process
        state = torch.load(file, weights_only=True, map_location=self.device)
        self.check_fixed(state["settings"])
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.step = state["step"]


# ------------------------------------------------------------------------------------------------------------ the processes


def main(settings: argparse.Namespace, device: torch.device) -> None:
    """What every process runs. The first one also saves, draws and shows the progress."""
    checkpoint = settings.out / f"checkpoint{Run.suffix}"
    run = common.start(settings, checkpoint, lambda data, settings: Run(data, settings, device))
    for _ in track(range(run.step, settings.steps), "training", disable=run.rank > 0):
        denoising, alignment = run.training_step()
        if run.step % settings.save_every == 0 or run.step == settings.steps:
            run.save(checkpoint)
            if run.rank == 0:  # its own share of the batch
                print(f"step {run.step}: denoising {float(denoising):.3f}, SRA {float(alignment):.3f}")
    if run.rank == 0:
        common.finish(run, checkpoint)


PARSER = common.command_line(__doc__, "torch_ddp")

if __name__ == "__main__":
    SETTINGS = common.parse(PARSER)
    if "LOCAL_RANK" not in os.environ:
        raise SystemExit("error: torchrun starts the processes. Received: plain python. See --help for the command.")
    LOCAL_RANK = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        torch.cuda.set_device(LOCAL_RANK)
        distributed.init_process_group("nccl", device_id=torch.device("cuda", LOCAL_RANK))
    else:
        distributed.init_process_group("gloo")
    try:
        main(SETTINGS, torch.device("cuda", LOCAL_RANK) if torch.cuda.is_available() else torch.device("cpu"))
    finally:
        distributed.destroy_process_group()
