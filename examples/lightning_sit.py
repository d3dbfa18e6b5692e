"""torch_sit.py's SiT with Self-Representation Alignment (SRA) as a LightningModule: Lightning trains, loads and saves.

    python examples/lightning_sit.py                                  scikit-learn's digits, a few minutes on a laptop's CPU
    python examples/lightning_sit.py --data FOLDER --image-size 32    your own images, one subfolder per class
    python examples/lightning_sit.py --precision bf16-mixed           or 16-mixed, on a GPU
    python examples/lightning_sit.py --accumulate 4                   four backwards for each optimizer step
    python examples/lightning_sit.py --devices 2                      several GPUs, or CPU processes
    python examples/lightning_sit.py --resume                         continue from the last checkpoint, bit for bit

--batch-size is that of an optimizer step, over all devices and micro-batches together. What SRA adds to the training is
marked with "# SRA"; all the rest is Lightning as usual. Model and sampling are torch_sit.py's, images and command line are
in common.py.

Reference: Jiang et al., "No Other Representation Component Is Needed: Diffusion Transformers Can Provide Representation
Guidance by Themselves", 2025, arXiv 2505.02831; Falcon et al., "PyTorch Lightning", 2019, github.com/Lightning-AI.
"""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Sampler, TensorDataset
from torch_sit import PATH, SiT, draw, sample, tensors

import selfalign
from selfalign.adapters.torch import SelfAlignment

# -------------------------------------------------------------------------------------------------------------- the module


class AlignedSiT(L.LightningModule):
    """The model, its EMA and the projector."""

    def __init__(self, run: common.Run) -> None:
        super().__init__()
        torch.manual_seed(run.settings.seed)
        self.model = SiT(**common.shape(run.data, run.settings))
        self.settings, self.fixed = run.settings, run.fixed()
        loss = selfalign.SRALoss(
            student_layer=run.settings.student_layer, teacher_layer=run.settings.teacher_layer, path=PATH,
            max_gap=run.settings.max_gap, weight=run.settings.weight,
            decay=selfalign.schedules.DecayWarmup(run.settings.decay))  # SRA  # fmt: skip
        # SRA: no nn.Module, so that Lightning does not see the teacher, which is not trained, and no business of DDP's
        self.align = SelfAlignment(self.model, loss)  # SRA; with --no-sra it keeps the EMA and nothing else
        if run.settings.sra:
            self.projector = self.align.projector  # SRA: a submodule, for optimizer, device and strategy

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.settings.lr, weight_decay=0.0)  # SRA: the projector's are in it

    def on_fit_start(self) -> None:
        self.align.teacher.to(self.device)  # SRA: Lightning has moved the model there just now

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        x0, y = batch  # [B, C, H, W], [B]
        # a function of seed, step, micro-batch and process, since Lightning's checkpoints hold no generators
        where = (self.settings.seed, self.global_step, batch_idx % self.settings.accumulate, self.global_rank)
        draws = torch.Generator(self.device).manual_seed(int(np.random.default_rng(where).integers(2**63)))
        y, noise, t = draw(x0, y, self.model.null_class, self.settings.label_dropout, draws)

        prediction = self.model(PATH.add_noise(x0, noise, t), t, y)  # [B, C, H, W]
        denoising = F.mse_loss(prediction, PATH.velocity(x0, noise, t))
        alignment = self.align(x0, noise, t) if self.settings.sra else torch.zeros_like(denoising)  # SRA
        self.log_dict({"denoising": denoising, "SRA": alignment}, prog_bar=True)
        return denoising + alignment

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)  # runs training_step and backward, too
        self.align.update()  # SRA: Lightning comes here once per optimizer step, not per micro-batch

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["settings"] = self.fixed
        checkpoint["align"] = self.align.state_dict()  # SRA

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.align.load_state_dict(checkpoint["align"])  # SRA


# ---------------------------------------------------------------------------------------------------------------- the data


class Batches(Sampler[list[int]]):
    """Endlessly, the images of each micro-batch of this process, from the trainer's step on; `chosen` shuffles."""

    def __init__(self, run: common.Run, trainer: L.Trainer) -> None:
        self.run, self.trainer = run, trainer

    def __iter__(self) -> Iterator[list[int]]:
        for step in itertools.count(self.trainer.global_step):
            self.run.step = step
            mine = self.run.chosen()[self.trainer.global_rank :: self.trainer.world_size]
            yield from (part.tolist() for part in np.split(mine, self.trainer.accumulate_grad_batches))


# ------------------------------------------------------------------------------------------------------------- the training


class Run(common.Run):
    """The settings and the module; all that changes in training is the trainer's to save."""

    def __init__(self, data: common.Data, settings: argparse.Namespace) -> None:
        super().__init__(data, settings)
        parts = settings.devices * settings.accumulate
        if min(settings.batch_size, len(data.images)) % parts:
            raise ValueError(f"A batch is divided evenly. Received: --batch-size {settings.batch_size} for {parts} parts, "
                             "--devices times --accumulate. Choose a multiple.")  # fmt: skip
        self.module = AlignedSiT(self)

    def read(self, file: Path) -> None:  # all the rest is read by the trainer
        self.check_fixed(torch.load(file, weights_only=True, map_location="cpu")["settings"])

    def sample(self, noise: np.ndarray, labels: np.ndarray) -> np.ndarray:
        teacher = self.module.align.teacher
        x, y = tensors(noise, labels, next(teacher.parameters()).device)
        x = sample(teacher, x, y, self.settings.sampling_steps, self.settings.guidance)
        return x.permute(0, 2, 3, 1).cpu().numpy()


def main(settings: argparse.Namespace) -> None:
    checkpoint = settings.out / "checkpoint.ckpt"
    run = common.start(settings, checkpoint, Run)
    saving = ModelCheckpoint(settings.out, "checkpoint", every_n_train_steps=settings.save_every, enable_version_counter=False)
    trainer = L.Trainer(
        max_steps=settings.steps, accumulate_grad_batches=settings.accumulate, precision=settings.precision,
        accelerator="gpu" if torch.cuda.is_available() else "cpu", devices=settings.devices, callbacks=[saving],
        logger=False, enable_model_summary=False, use_distributed_sampler=False)  # Batches does that  # fmt: skip
    loader = DataLoader(TensorDataset(*tensors(run.data.images, run.data.labels, "cpu")), batch_sampler=Batches(run, trainer))
    trainer.fit(run.module, loader, ckpt_path=checkpoint if settings.resume else None)
    if trainer.global_step < settings.steps:
        raise SystemExit(f"Stopped at step {trainer.global_step}; with --resume, it continues from the last checkpoint.")
    trainer.save_checkpoint(checkpoint, weights_only=False)
    if trainer.is_global_zero:
        common.finish(run, checkpoint)


PARSER = common.command_line(__doc__, "lightning_sit")
PARSER.add_argument("--precision", default="32-true", help="Lightning's: 32-true, bf16-mixed, 16-mixed")
PARSER.add_argument("--accumulate", type=int, default=1, help="micro-batches for each optimizer step")
PARSER.add_argument("--devices", type=int, default=1, help="GPUs, or CPU processes")

if __name__ == "__main__":
    main(common.parse(PARSER))
