"""torch_sit.py's SiT with Self-Representation Alignment (SRA) as a LightningModule.

    python examples/lightning_sit.py                           the digits, minutes on a CPU
    python examples/lightning_sit.py --data FOLDER             your images, a subfolder per class
    python examples/lightning_sit.py --precision bf16-mixed    or 16-mixed, on a GPU
    python examples/lightning_sit.py --accumulate 4            four backwards per optimizer step
    python examples/lightning_sit.py --devices 2               several GPUs, or CPU processes
    python examples/lightning_sit.py --resume                  from the last checkpoint, bit for bit

--batch-size is that of an optimizer step, over all devices and micro-batches together. What SRA
adds to the training is marked with "# SRA"; all the rest is Lightning as usual: it trains, loads
and saves. Model and sampling are torch_sit.py's; data, command line and picture are in common.py.

Reference: Jiang et al., "No Other Representation Component Is Needed: Diffusion Transformers Can
Provide Representation Guidance by Themselves", 2025, arXiv 2505.02831; Falcon et al., "PyTorch
Lightning", 2019, github.com/Lightning-AI.
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

# --------------------------------------------------------------------------------------------------
# The module


class AlignedSiT(L.LightningModule):
    """The model, its EMA and the projector."""

    def __init__(self, data: common.Images, settings: argparse.Namespace) -> None:
        super().__init__()
        self.settings = settings
        torch.manual_seed(settings.seed)
        self.model = SiT(**common.model_sizes(data, settings))
        loss = selfalign.SRALoss(  # SRA
            student_layer=settings.student_layer,
            teacher_layer=settings.teacher_layer,
            path=PATH,
            max_gap=settings.max_gap,
            weight=settings.weight,
            decay=selfalign.schedules.DecayWarmup(settings.decay),
        )
        # SRA: no nn.Module, so that Lightning and DDP do not see the teacher, which is not trained
        self.align = SelfAlignment(self.model, loss)  # SRA; with --no-sra it keeps the EMA only
        if settings.sra:
            # SRA: a submodule, for optimizer, device and strategy
            self.projector = self.align.projector  # SRA

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = self.parameters()  # SRA: the projector's are among them
        return torch.optim.AdamW(parameters, lr=self.settings.lr, weight_decay=0.0)

    def on_fit_start(self) -> None:
        self.align.teacher.to(self.device)  # SRA: Lightning has just moved the model there

    def training_step(
        self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int
    ) -> torch.Tensor:
        x0, labels = batch  # [B, C, H, W], [B]
        draws = self.generator(batch_idx % self.settings.accumulate)
        y, noise, t = draw(x0, labels, self.model.null_class, self.settings.label_dropout, draws)

        prediction = self.model(PATH.add_noise(x0, noise, t), t, y)  # [B, C, H, W]
        denoising = F.mse_loss(prediction, PATH.velocity(x0, noise, t))
        alignment = torch.zeros_like(denoising)
        if self.settings.sra:
            alignment = self.align(x0, noise, t)  # SRA
        self.log_dict({"denoising": denoising, "SRA": alignment}, prog_bar=True)
        return denoising + alignment

    def generator(self, micro_batch: int) -> torch.Generator:
        """A function of where the training is: Lightning's checkpoints hold no generators."""
        where = (self.settings.seed, self.global_step, micro_batch, self.global_rank)
        seed = np.random.default_rng(where).integers(2**63)
        return torch.Generator(self.device).manual_seed(int(seed))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)  # runs training_step and backward, too
        # SRA: Lightning comes here once per optimizer step, not per micro-batch
        self.align.update()  # SRA

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["settings"] = common.fixed_settings(self.settings)
        checkpoint["align"] = self.align.state_dict()  # SRA

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.align.load_state_dict(checkpoint["align"])  # SRA


# --------------------------------------------------------------------------------------------------
# The batches


class Batches(Sampler[list[int]]):
    """The images of each micro-batch of this process, from the trainer's step on, without end."""

    def __init__(self, count: int, settings: argparse.Namespace, trainer: L.Trainer) -> None:
        self.count = count
        self.settings = settings
        self.trainer = trainer

    def __iter__(self) -> Iterator[list[int]]:
        rank = self.trainer.global_rank
        for step in itertools.count(self.trainer.global_step):
            indices = common.batch_indices(self.count, step, self.settings)  # shuffled
            mine = indices[rank :: self.trainer.world_size]
            for part in np.split(mine, self.settings.accumulate):
                yield part.tolist()


def check_divisible(data: common.Images, settings: argparse.Namespace) -> None:
    parts = settings.devices * settings.accumulate
    if min(settings.batch_size, len(data.images)) % parts:
        raise ValueError(
            "A batch is divided evenly. "
            f"Received: --batch-size {settings.batch_size} for {parts} parts, "
            "--devices times --accumulate. Choose a multiple."
        )


def check_resumable(checkpoint: Path, settings: argparse.Namespace) -> None:
    """The trainer reads the checkpoint; here it is looked at first."""
    common.check_exists(checkpoint)
    saved = torch.load(checkpoint, weights_only=True, map_location="cpu")["settings"]
    common.check_settings(saved, common.fixed_settings(settings))


# --------------------------------------------------------------------------------------------------
# The training


def main(settings: argparse.Namespace) -> None:
    """Load the data, train or go on training, and draw samples."""
    checkpoint = settings.out / "checkpoint.ckpt"
    with common.errors_as_sentences():
        data = common.load_data(settings)
        check_divisible(data, settings)
        module = AlignedSiT(data, settings)
        if settings.resume:
            check_resumable(checkpoint, settings)
    settings.out.mkdir(parents=True, exist_ok=True)

    trainer = make_trainer(settings)
    images = TensorDataset(*tensors(data.images, data.labels, "cpu"))
    batches = Batches(len(data.images), settings, trainer)
    loader = DataLoader(images, batch_sampler=batches)
    trainer.fit(module, loader, ckpt_path=checkpoint if settings.resume else None)
    if trainer.global_step < settings.steps:
        raise SystemExit(
            f"Stopped at step {trainer.global_step}; "
            "with --resume, it continues from the last checkpoint."
        )
    trainer.save_checkpoint(checkpoint, weights_only=False)
    if trainer.is_global_zero:
        picture = settings.out / "samples.png"
        draw_samples(module, data, picture)
        print(f"Checkpoint: {checkpoint}\nSamples:    {picture}")


def make_trainer(settings: argparse.Namespace) -> L.Trainer:
    saving = ModelCheckpoint(
        settings.out,
        "checkpoint",
        every_n_train_steps=settings.save_every,
        enable_version_counter=False,
    )
    return L.Trainer(
        max_steps=settings.steps,
        accumulate_grad_batches=settings.accumulate,
        precision=settings.precision,
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=settings.devices,
        callbacks=[saving],
        logger=False,
        enable_model_summary=False,
        use_distributed_sampler=False,  # Batches divides a batch among the processes
    )


def draw_samples(module: AlignedSiT, data: common.Images, picture: Path) -> None:
    teacher = module.align.teacher
    settings = module.settings
    device = next(teacher.parameters()).device
    noise, y = tensors(*common.sampling_inputs(data), device)
    x = sample(teacher, noise, y, settings.sampling_steps, settings.guidance)
    common.draw_samples(x.permute(0, 2, 3, 1).cpu().numpy(), data.classes, picture)


PARSER = common.command_line(__doc__, "lightning_sit")
PARSER.add_argument("--precision", default="32-true", help="32-true, bf16-mixed or 16-mixed")
PARSER.add_argument("--accumulate", type=int, default=1, help="micro-batches per optimizer step")
PARSER.add_argument("--devices", type=int, default=1, help="GPUs, or CPU processes")

if __name__ == "__main__":
    main(common.parse(PARSER))
