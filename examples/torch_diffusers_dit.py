"""diffusers' DiTTransformer2DModel, unedited, trained with Self-Representation Alignment (SRA) to predict DDPM's noise.

    python examples/torch_diffusers_dit.py                                  scikit-learn's digits, minutes on a laptop's CPU
    python examples/torch_diffusers_dit.py --data fashion-mnist             28x28 clothes
    python examples/torch_diffusers_dit.py --data FOLDER --image-size 32    your own images, one subfolder per class
    python examples/torch_diffusers_dit.py --no-sra                         without SRA: same weights, batches and noise
    python examples/torch_diffusers_dit.py --resume                         continue from the last checkpoint, bit for bit
    python examples/torch_diffusers_dit.py --resume --guidance 2            draw samples with classifier-free guidance

What SRA adds to the training is marked with "# SRA"; all the rest is diffusers as usual: its model, its DDPMScheduler for the
noise, its DDIMScheduler for the samples. Images, command line and progress bar are in common.py.

Reference: Jiang et al., "No Other Representation Component Is Needed: Diffusion Transformers Can Provide Representation
Guidance by Themselves", 2025, arXiv 2505.02831; Peebles and Xie, "Scalable Diffusion Models with Transformers" (DiT), 2022,
arXiv 2212.09748; Ho et al., "DDPM", 2020, arXiv 2006.11239; Song et al., "DDIM", 2020, arXiv 2010.02502.
"""

import argparse
from pathlib import Path

import common
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding

import selfalign
from selfalign.adapters.torch import SelfAlignment

# ---------------------------------------------------------------------------------------------------------------- the model

SCHEDULER = DDPMScheduler()  # 1000 steps, betas from 1e-4 to 0.02, prediction of the noise
# SRA: the same noise as the scheduler's add_noise, with the same whole steps from 0 (data) to 999 (noise). The teacher's sample
# is made by this path and the student's by the scheduler, so the two must agree: build the path from the scheduler you use.
PATH = selfalign.paths.Discrete(SCHEDULER.alphas_cumprod.tolist())  # SRA


def dit(
    label_dropout: float, size: int, channels: int, classes: int, patch: int, width: int, depth: int, heads: int
) -> DiTTransformer2DModel:
    """A DiT whose prediction has the image's channels (no learned variance); label `classes` means "none", for guidance."""
    model = DiTTransformer2DModel(
        sample_size=size, patch_size=patch, in_channels=channels, num_layers=depth, num_attention_heads=heads,
        attention_head_dim=width // heads, num_embeds_ada_norm=classes)  # fmt: skip
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = label_dropout  # 0.1 in diffusers, which has no argument for it
    return model


# ------------------------------------------------------------------------------------------------------------- the training


class Run(common.Run):
    """The model, its EMA and the optimizer. All draws are torch's global ones: the model drops labels with them."""

    suffix = ".pt"

    def __init__(self, data: common.Data, settings: argparse.Namespace) -> None:
        super().__init__(data, settings)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.images, self.labels = self._tensors(data.images, data.labels)
        torch.manual_seed(settings.seed)
        self.model = dit(settings.label_dropout, **common.shape(data, settings)).to(self.device)
        loss = selfalign.SRALoss(student_layer=settings.student_layer, teacher_layer=settings.teacher_layer, path=PATH,
                                 max_gap=settings.max_gap, weight=settings.weight,
                                 decay=selfalign.schedules.DecayWarmup(settings.decay))  # SRA  # fmt: skip
        self.align = SelfAlignment(self.model, loss)  # SRA; with --no-sra it keeps the EMA and nothing else
        parameters = [*self.model.parameters(), *self.align.projector.parameters()]  # SRA: the projector
        self.optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)

    def _tensors(self, images: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Images [N, H, W, C] and labels [N] as PyTorch has them: [N, C, H, W], and int64."""
        x, y = torch.tensor(images.transpose(0, 3, 1, 2)).contiguous(), torch.tensor(labels).long()
        return x.to(self.device), y.to(self.device)

    def training_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.tensor(self.chosen(), device=self.device)
        x0, y = self.images[chosen], self.labels[chosen]  # [B, C, H, W], [B]
        noise = torch.randn_like(x0)  # [B, C, H, W]
        t = torch.randint(SCHEDULER.config.num_train_timesteps, y.shape, device=self.device)  # [B], whole steps

        # In training mode every block of this model drops labels anew; SRA shows each block of the teacher the same ones
        prediction = self.model(SCHEDULER.add_noise(x0, noise, t), t, y).sample  # [B, C, H, W]
        denoising = F.mse_loss(prediction, noise)
        alignment = self.align(x0, noise, t) if self.settings.sra else torch.zeros_like(denoising)  # SRA
        (denoising + alignment).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.align.update()  # SRA
        self.step += 1
        return denoising.detach(), alignment.detach()

    def sample(self, noise: np.ndarray, labels: np.ndarray) -> np.ndarray:
        steps, guidance = self.settings.sampling_steps, self.settings.guidance
        x = sample(self.align.teacher, *self._tensors(noise, labels), steps, guidance)
        return x.permute(0, 2, 3, 1).cpu().numpy()

    def _parts(self) -> dict[str, DiTTransformer2DModel | torch.optim.Optimizer | SelfAlignment]:
        return {"model": self.model, "optimizer": self.optimizer, "align": self.align}

    def write(self, file: Path) -> None:
        state = {name: part.state_dict() for name, part in self._parts().items()}
        draws = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
        torch.save(state | {"step": self.step, "draws": draws, "settings": self.fixed()}, file)

    def read(self, file: Path) -> None:
        state = torch.load(file, weights_only=True, map_location="cpu")
        self.check_fixed(state["settings"])
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.step = state["step"]
        torch.set_rng_state(state["draws"]["cpu"])
        torch.cuda.set_rng_state_all(state["draws"]["cuda"])


# ------------------------------------------------------------------------------------------------------------- the sampling


@torch.no_grad()
def sample(
    model: DiTTransformer2DModel, noise: torch.Tensor, y: torch.Tensor, steps: int = 25, guidance: float = 1.0
) -> torch.Tensor:
    """Images [B, C, H, W] of the classes y [B], by DDIM from pure noise."""
    scheduler = DDIMScheduler.from_config(SCHEDULER.config, timestep_spacing="trailing")  # begins at pure noise
    scheduler.set_timesteps(steps, device=noise.device)
    free_label = torch.full_like(y, model.config.num_embeds_ada_norm)  # the one index after the classes

    x = noise
    for t in scheduler.timesteps:
        prediction = model(x, t.expand(len(x)), y).sample
        if guidance != 1.0:
            free = model(x, t.expand(len(x)), free_label).sample
            prediction = free + guidance * (prediction - free)
        x = scheduler.step(prediction, t, x).prev_sample
    return x


PARSER = common.command_line(__doc__, "torch_diffusers_dit")

if __name__ == "__main__":
    common.main(PARSER, Run)
