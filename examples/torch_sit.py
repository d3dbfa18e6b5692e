"""A small SiT trained with Self-Representation Alignment (SRA) in plain PyTorch: model, training, sampling in one file.

    python examples/torch_sit.py                                  scikit-learn's digits, a few minutes on a laptop's CPU
    python examples/torch_sit.py --data fashion-mnist             28x28 clothes
    python examples/torch_sit.py --data FOLDER --image-size 32    your own images, one subfolder per class
    python examples/torch_sit.py --no-sra                         the same run without SRA: same weights, batches and noise
    python examples/torch_sit.py --resume                         continue from the last checkpoint, bit for bit

What SRA adds to the training is marked with "# SRA"; all the rest is a flow-matching transformer as usual. Images, command line
and progress bar are in common.py.

Reference: Jiang et al., "No Other Representation Component Is Needed: Diffusion Transformers Can Provide Representation
Guidance by Themselves", 2025, arXiv 2505.02831; Ma et al., "SiT", 2024, arXiv 2401.08740.
"""

import argparse
import itertools
import math
from pathlib import Path

import common
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

import selfalign
from selfalign.adapters.torch import SelfAlignment

# ---------------------------------------------------------------------------------------------------------------- the model


def waves(position: torch.Tensor, width: int) -> torch.Tensor:  # [...] -> [..., width]
    """Cosines and sines of a number, from fast to slow: how times and positions enter a transformer."""
    slowness = torch.arange(width // 2, device=position.device) / (width // 2)
    angles = position[..., None] * torch.exp(-math.log(10_000) * slowness)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Block(nn.Module):
    """A transformer block that the condition shifts, scales and gates (adaLN-Zero): the identity at the start."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:  # [B, N, D], [B, D] -> [B, N, D]
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, dim=-1)  # [B, 1, D] each
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, N, D / heads] each
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SiT(nn.Module):
    """A scalable interpolant transformer: the velocity of a noisy image, given its time and its class."""

    positions: torch.Tensor  # [N, D]

    def __init__(self, size: int, channels: int, classes: int, patch: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patch, self.side, self.null_class = patch, size // patch, classes  # one class more: "none", for guidance
        self.patch_embedder = nn.Linear(channels * patch**2, width)
        self.time_embedder = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.class_embedder = nn.Embedding(classes + 1, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.head = nn.Linear(width, channels * patch**2)
        row, column = torch.meshgrid(torch.arange(self.side), torch.arange(self.side), indexing="ij")  # [side, side] each
        positions = torch.cat([waves(row.flatten(), width // 2), waves(column.flatten(), width // 2)], dim=-1)  # [N, D]
        self.register_buffer("positions", positions, persistent=False)
        self.initialise()

    def initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.class_embedder.weight, std=0.02)
        for module in (*self.blocks, self):
            nn.init.zeros_(module.get_parameter("modulation.1.weight"))
        nn.init.zeros_(self.head.weight)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # [B, C, H, W], [B], [B]
        condition = self.time_embedder(waves(1000 * t, self.positions.shape[-1])) + self.class_embedder(y)  # [B, D]
        patches = F.pixel_unshuffle(x, self.patch).flatten(2).transpose(1, 2)  # [B, N, C * patch * patch]
        tokens = self.patch_embedder(patches) + self.positions  # [B, N, D]
        for block in self.blocks:
            tokens = block(tokens, condition)  # [B, N, D]
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)  # [B, 1, D] each
        patches = self.head(self.norm(tokens) * (1 + scale) + shift)  # [B, N, C * patch * patch]
        return F.pixel_shuffle(patches.transpose(1, 2).unflatten(2, (self.side, self.side)), self.patch)  # [B, C, H, W]


# ------------------------------------------------------------------------------------------------------------- the training

PATH = selfalign.paths.Linear()  # x_t = (1 - t) x0 + t noise: t = 0 is data, t = 1 is noise


def tensors(images: np.ndarray, labels: np.ndarray, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [N, H, W, C] and labels [N] as PyTorch has them: [N, C, H, W], and int64."""
    x, y = torch.tensor(images.transpose(0, 3, 1, 2)).contiguous(), torch.tensor(labels).long()
    return x.to(device), y.to(device)


def draw(
    x0: torch.Tensor, y: torch.Tensor, null_class: int, dropout: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Labels [B] of which a share is dropped, noise [B, C, H, W] and times [B], from one stream of random numbers."""
    dropped = torch.rand(y.shape, generator=generator, device=y.device) < dropout  # [B]
    y = torch.where(dropped, null_class, y)  # outside the model: student and teacher see the same labels
    noise = torch.randn(x0.shape, generator=generator, device=x0.device)  # [B, C, H, W]
    return y, noise, torch.rand(y.shape, generator=generator, device=y.device)


class Run(common.Run):
    """The model, its EMA, the optimizer, and the stream of random numbers."""

    suffix = ".pt"

    def __init__(self, data: common.Data, settings: argparse.Namespace) -> None:
        super().__init__(data, settings)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        held_out = tensors(data.held_out_images, data.held_out_labels, self.device)
        self.tensors = common.Data(*tensors(data.images, data.labels, self.device), *held_out, data.classes)
        torch.manual_seed(settings.seed)  # the model's first weights; SRA draws from generators of its own
        self.draws = torch.Generator(self.device).manual_seed(settings.seed + 1)  # noise, times, dropped labels
        self.model = SiT(**common.shape(data, settings)).to(self.device)
        self.align, parameters = None, [*self.model.parameters()]
        decay = selfalign.schedules.DecayWarmup(settings.decay)
        if settings.sra:
            loss = selfalign.SRALoss(student_layer=settings.student_layer, teacher_layer=settings.teacher_layer, path=PATH,
                                     max_gap=settings.max_gap, weight=settings.weight, decay=decay)  # SRA  # fmt: skip
            self.align = SelfAlignment(self.model, loss)  # SRA
            parameters += self.align.projector.parameters()  # SRA
        else:  # what is sampled from is an EMA in any case; with SRA it is the teacher
            average = lambda old, new, count: torch._foreach_lerp_(old, new, 1 - decay(int(count)))  # noqa: E731
            self.average = AveragedModel(self.model, multi_avg_fn=average)
        self.optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)

    @property
    def ema(self) -> nn.Module:
        """The averaged model, for sampling."""
        return self.align.teacher if self.align else self.average.module

    def training_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.tensor(self.chosen(), device=self.device)
        x0, y = self.tensors.images[chosen], self.tensors.labels[chosen]  # [B, C, H, W], [B]
        y, noise, t = draw(x0, y, self.model.null_class, self.settings.label_dropout, self.draws)

        prediction = self.model(PATH.add_noise(x0, noise, t), t, y)  # [B, C, H, W]
        denoising = F.mse_loss(prediction, PATH.velocity(x0, noise, t))
        alignment = self.align(x0, noise, t, y) if self.align else torch.zeros_like(denoising)  # SRA
        (denoising + alignment).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.align:
            self.align.update()  # SRA
        else:
            self.average.update_parameters(self.model)
        self.step += 1
        return denoising.detach(), alignment.detach()

    def sample(self, noise: np.ndarray, labels: np.ndarray) -> np.ndarray:
        x = sample(self.ema, *tensors(noise, labels, self.device), self.settings.sampling_steps, self.settings.guidance)
        return x.permute(0, 2, 3, 1).cpu().numpy()

    def _parts(self) -> dict[str, nn.Module | torch.optim.Optimizer | SelfAlignment]:
        averaged = {"align": self.align} if self.align else {"average": self.average}
        return {"model": self.model, "optimizer": self.optimizer} | averaged

    def write(self, file: Path) -> None:
        state = {name: part.state_dict() for name, part in self._parts().items()}
        torch.save(state | {"step": self.step, "draws": self.draws.get_state(), "settings": self.fixed()}, file)

    def read(self, file: Path) -> None:
        state = torch.load(file, weights_only=True, map_location=self.device)
        self.check_fixed(state["settings"])
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.step = state["step"]
        self.draws.set_state(state["draws"].cpu())


# ------------------------------------------------------------------------------------------------------------- the sampling


@torch.no_grad()
def sample(model: nn.Module, noise: torch.Tensor, y: torch.Tensor, steps: int = 25, guidance: float = 1.0) -> torch.Tensor:
    """Images [B, C, H, W] of the classes y [B]: the velocity's ODE by Heun's method, from noise (t = 1) to data (t = 0)."""

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        conditional = model(x, t.expand(len(x)), y)
        if guidance == 1.0:
            return conditional
        free = model(x, t.expand(len(x)), torch.full_like(y, model.null_class))  # type: ignore[arg-type]  # an int
        return free + guidance * (conditional - free)

    x = noise
    for t, later in itertools.pairwise(torch.linspace(1.0, 0.0, steps + 1, device=x.device)):
        slope = velocity(x, t)
        corrected = velocity(x + (later - t) * slope, later)
        x = x + (later - t) * (slope + corrected) / 2
    return x


PARSER = common.command_line(__doc__, "torch_sit")

if __name__ == "__main__":
    common.main(PARSER, Run)
