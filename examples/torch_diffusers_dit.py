"""diffusers' DiTTransformer2DModel, unedited, with Self-Representation Alignment (SRA).

    python examples/torch_diffusers_dit.py                         scikit-learn's digits, on a CPU
    python examples/torch_diffusers_dit.py --data fashion-mnist    28x28 clothes
    python examples/torch_diffusers_dit.py --data FOLDER           one subfolder per class
    python examples/torch_diffusers_dit.py --no-sra                same weights, batches and noise
    python examples/torch_diffusers_dit.py --resume                from the last checkpoint
    python examples/torch_diffusers_dit.py --resume --guidance 2   samples with guidance

The model predicts DDPM's noise. What SRA adds to the training is marked with "# SRA"; all the rest
is diffusers as usual: its model, its DDPMScheduler for the noise, its DDIMScheduler for the
samples. Data, command line, progress bar and picture are in common.py.

Reference: Jiang et al., "No Other Representation Component Is Needed: Diffusion Transformers Can
Provide Representation Guidance by Themselves", 2025, arXiv 2505.02831; Peebles and Xie, "Scalable
Diffusion Models with Transformers" (DiT), 2022, arXiv 2212.09748; Ho et al., "DDPM", 2020, arXiv
2006.11239; Song et al., "DDIM", 2020, arXiv 2010.02502.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import common
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding

import selfalign
from selfalign.adapters.torch import SelfAlignment

# --------------------------------------------------------------------------------------------------
# The model

SCHEDULER = DDPMScheduler()  # 1000 steps, betas from 1e-4 to 0.02, prediction of the noise
# SRA: the same noise as the scheduler's add_noise, in whole steps from 0 (data) to 999 (noise). The
# scheduler makes the student's sample and this path the teacher's, so the two must agree: build the
# path from the scheduler that you use.
PATH = selfalign.paths.Discrete(SCHEDULER.alphas_cumprod.tolist())  # SRA


def dit(
    label_dropout: float,
    size: int,
    channels: int,
    classes: int,
    patch: int,
    width: int,
    depth: int,
    heads: int,
) -> DiTTransformer2DModel:
    """A DiT that predicts the noise and no variance. Label `classes` means "none", for guidance."""
    model = DiTTransformer2DModel(
        sample_size=size,
        patch_size=patch,
        in_channels=channels,
        num_layers=depth,
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        num_embeds_ada_norm=classes,
    )
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = label_dropout  # 0.1 in diffusers, which has no argument for it
    return model


# --------------------------------------------------------------------------------------------------
# The training

Losses = tuple[torch.Tensor, torch.Tensor]  # the denoising loss, and SRA's term


def tensors(
    images: np.ndarray, labels: np.ndarray, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [N, H, W, C] and labels [N] as PyTorch has them: [N, C, H, W], and int64."""
    x = torch.tensor(images.transpose(0, 3, 1, 2)).contiguous()
    y = torch.tensor(labels).long()
    return x.to(device), y.to(device)


class Run:
    """The parts of a training: model, EMA and optimizer.

    All random numbers are torch's global ones, because the model drops labels with them.
    """

    def __init__(self, data: common.Images, settings: argparse.Namespace) -> None:
        self.settings = settings
        self.step = 0
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.images, self.labels = tensors(data.images, data.labels, self.device)
        torch.manual_seed(settings.seed)
        model = dit(settings.label_dropout, **common.model_sizes(data, settings))
        self.model = model.to(self.device)
        loss = selfalign.SRALoss(  # SRA
            student_layer=settings.student_layer,
            teacher_layer=settings.teacher_layer,
            path=PATH,
            max_gap=settings.max_gap,
            weight=settings.weight,
            decay=selfalign.schedules.DecayWarmup(settings.decay),
        )
        self.align = SelfAlignment(self.model, loss)  # SRA; with --no-sra it keeps the EMA only
        parameters = [*self.model.parameters()]
        parameters += self.align.projector.parameters()  # SRA
        self.optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)

    def parts(self) -> dict[str, DiTTransformer2DModel | torch.optim.Optimizer | SelfAlignment]:
        """All that has a state dict."""
        return {"model": self.model, "optimizer": self.optimizer, "align": self.align}

    def save(self, file: Path) -> None:
        state = {name: part.state_dict() for name, part in self.parts().items()}
        draws = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
        state |= {"step": self.step, "draws": draws}
        state |= {"settings": common.fixed_settings(self.settings)}
        partial = file.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, file)  # at once: whatever happens, `file` is a whole checkpoint

    def load(self, file: Path) -> None:
        common.check_exists(file)
        state = torch.load(file, weights_only=True, map_location="cpu")
        common.check_settings(state["settings"], common.fixed_settings(self.settings))
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.step = state["step"]
        torch.set_rng_state(state["draws"]["cpu"])
        torch.cuda.set_rng_state_all(state["draws"]["cuda"])


def train(run: Run, checkpoint: Path | None = None) -> Iterator[Losses]:
    """Train from `run.step` to the last step. Yields the losses of each step, to be shown."""
    settings = run.settings
    align = run.align  # SRA
    for step in range(run.step, settings.steps):
        indices = torch.tensor(common.batch_indices(len(run.images), step, settings))
        x0 = run.images[indices]  # [B, C, H, W]
        y = run.labels[indices]  # [B]
        noise = torch.randn_like(x0)  # [B, C, H, W]
        t = torch.randint(SCHEDULER.config.num_train_timesteps, y.shape, device=run.device)  # [B]

        # In training mode every block of this model drops labels anew; SRA shows each block of the
        # teacher the labels that the student's block has seen.
        prediction = run.model(SCHEDULER.add_noise(x0, noise, t), t, y).sample  # [B, C, H, W]
        denoising = F.mse_loss(prediction, noise)
        alignment = align(x0, noise, t) if settings.sra else torch.zeros_like(denoising)  # SRA
        (denoising + alignment).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        align.update()  # SRA

        run.step = step + 1
        if checkpoint and run.step % settings.save_every == 0:
            run.save(checkpoint)
        yield denoising.detach(), alignment.detach()


# --------------------------------------------------------------------------------------------------
# The sampling


@torch.no_grad()
def sample(
    model: DiTTransformer2DModel,
    noise: torch.Tensor,
    y: torch.Tensor,
    steps: int = 25,
    guidance: float = 1.0,
) -> torch.Tensor:
    """Images [B, C, H, W] of the classes y [B], by DDIM from pure noise."""
    # "trailing" begins at pure noise
    scheduler = DDIMScheduler.from_config(SCHEDULER.config, timestep_spacing="trailing")
    scheduler.set_timesteps(steps, device=noise.device)
    no_class = torch.full_like(y, model.config.num_embeds_ada_norm)  # the index after the classes

    x = noise
    for t in scheduler.timesteps:
        prediction = model(x, t.expand(len(x)), y).sample
        if guidance != 1.0:
            free = model(x, t.expand(len(x)), no_class).sample
            prediction = free + guidance * (prediction - free)
        x = scheduler.step(prediction, t, x).prev_sample
    return x


def main(settings: argparse.Namespace) -> None:
    """Load the data, train or go on training, and draw samples."""
    checkpoint = settings.out / "checkpoint.pt"
    picture = settings.out / "samples.png"
    with common.errors_as_sentences():
        data = common.load_data(settings)
        run = Run(data, settings)
        if settings.resume:
            run.load(checkpoint)
    settings.out.mkdir(parents=True, exist_ok=True)

    with common.Progress(settings, run.step) as progress:
        for denoising, alignment in train(run, checkpoint):
            progress.show(run.step, denoising, alignment)
            if progress.interrupted:
                break
        run.save(checkpoint)
    if progress.interrupted:
        raise SystemExit(f"Stopped at step {run.step}; the same command with --resume continues.")

    noise, y = tensors(*common.sampling_inputs(data), run.device)
    x = sample(run.align.teacher, noise, y, settings.sampling_steps, settings.guidance)
    common.draw_samples(x.permute(0, 2, 3, 1).cpu().numpy(), data.classes, picture)
    print(f"Checkpoint: {checkpoint}\nSamples:    {picture}")


PARSER = common.command_line(__doc__, "torch_diffusers_dit")

if __name__ == "__main__":
    main(common.parse(PARSER))
