"""A small SiT trained with Self-Representation Alignment (SRA) in plain PyTorch, all in one file.

    python examples/torch_sit.py                         scikit-learn's digits, minutes on a CPU
    python examples/torch_sit.py --data fashion-mnist    28x28 clothes
    python examples/torch_sit.py --data FOLDER           your images, one subfolder per class
    python examples/torch_sit.py --no-sra                without SRA: same weights, batches, noise
    python examples/torch_sit.py --resume                from the last checkpoint, bit for bit

Model, training, checkpoints and sampling are here, from top to bottom. What SRA adds is marked with
"# SRA"; all the rest is a flow-matching transformer as usual. Data, command line, progress bar and
picture are in common.py.

Reference: Jiang et al., "No Other Representation Component Is Needed: Diffusion Transformers Can
Provide Representation Guidance by Themselves", 2025, arXiv 2505.02831; Ma et al., "SiT", 2024,
arXiv 2401.08740.
"""

import argparse
import itertools
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import common
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

import selfalign
from selfalign.adapters.torch import SelfAlignment

# --------------------------------------------------------------------------------------------------
# The model


def waves(position: torch.Tensor, width: int) -> torch.Tensor:
    """Cosines and sines of a number, from fast to slow: [...] -> [..., width]."""
    slowness = torch.arange(width // 2, device=position.device) / (width // 2)
    angles = position[..., None] * torch.exp(-math.log(10_000) * slowness)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


class Block(nn.Module):
    """A transformer block that the condition shifts, scales and gates (adaLN-Zero)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = norm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = norm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width)
        )
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        modulation = self.modulation(condition)[:, None]  # [B, 1, 6 D]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)  # [B, N, D]
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))  # [B, N, 3, heads, D / heads]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, N, D / heads] each
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.out(attended.transpose(1, 2).flatten(2))


class SiT(nn.Module):
    """A scalable interpolant transformer: the velocity of a noisy image at a time, of a class."""

    positions: torch.Tensor  # [N, D]

    def __init__(
        self, size: int, channels: int, classes: int, patch: int, width: int, depth: int, heads: int
    ) -> None:
        super().__init__()
        self.patch = patch
        self.side = size // patch
        self.null_class = classes  # one class more: "none", for guidance
        self.patch_embedder = nn.Linear(channels * patch**2, width)
        self.time_embedder = nn.Sequential(
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.class_embedder = nn.Embedding(classes + 1, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = norm(width)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.head = nn.Linear(width, channels * patch**2)
        places = torch.arange(self.side)
        row, column = torch.meshgrid(places, places, indexing="ij")  # [side, side] each
        rows_and_columns = [waves(place.flatten(), width // 2) for place in (row, column)]
        self.register_buffer("positions", torch.cat(rows_and_columns, dim=-1), persistent=False)
        self.initialise()

    def initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.class_embedder.weight, std=0.02)
        for module in (*self.blocks, self):  # a block begins as the identity
            nn.init.zeros_(module.get_parameter("modulation.1.weight"))
        nn.init.zeros_(self.head.weight)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        time = self.time_embedder(waves(1000 * t, self.positions.shape[-1]))  # [B, D]
        condition = time + self.class_embedder(y)  # [B, D]
        patches = F.pixel_unshuffle(x, self.patch)  # [B, C * patch * patch, side, side]
        tokens = self.patch_embedder(patches.flatten(2).transpose(1, 2))  # [B, N, D]
        tokens = tokens + self.positions
        for block in self.blocks:
            tokens = block(tokens, condition)  # [B, N, D]
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)  # [B, 1, D] each
        patches = self.head(self.norm(tokens) * (1 + scale) + shift)  # [B, N, C * patch * patch]
        patches = patches.transpose(1, 2).unflatten(2, (self.side, self.side))
        return F.pixel_shuffle(patches, self.patch)  # [B, C, H, W]


# --------------------------------------------------------------------------------------------------
# The training

PATH = selfalign.paths.Linear()  # x_t = (1 - t) x0 + t noise: t = 0 is data, t = 1 is noise
Losses = tuple[torch.Tensor, torch.Tensor]  # the denoising loss, and SRA's term


def tensors(
    images: np.ndarray, labels: np.ndarray, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [N, H, W, C] and labels [N] as PyTorch has them: [N, C, H, W], and int64."""
    x = torch.tensor(images.transpose(0, 3, 1, 2)).contiguous()
    y = torch.tensor(labels).long()
    return x.to(device), y.to(device)


def on_device(data: common.Images, device: torch.device) -> common.Data[torch.Tensor]:
    trained = tensors(data.images, data.labels, device)
    held_out = tensors(data.held_out_images, data.held_out_labels, device)
    return common.Data(*trained, *held_out, data.classes)


def draw(
    x0: torch.Tensor, y: torch.Tensor, null_class: int, dropout: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Labels [B] of which a fraction is dropped, noise [B, C, H, W] and times [B]."""
    dropped = torch.rand(y.shape, generator=generator, device=y.device) < dropout  # [B]
    y = torch.where(dropped, null_class, y)  # here: student and teacher see the same labels
    noise = torch.randn(x0.shape, generator=generator, device=x0.device)
    t = torch.rand(y.shape, generator=generator, device=y.device)
    return y, noise, t


def ema_with(decay: Callable[[int], float]) -> Callable[..., None]:
    """The update of an `AveragedModel`, of all tensors at once. Without SRA, the EMA is that."""

    def update(old: list[torch.Tensor], new: list[torch.Tensor], count: torch.Tensor) -> None:
        torch._foreach_lerp_(old, new, 1 - decay(int(count)))

    return update


class Run:
    """The parts of a training: model, EMA, optimizer, and the stream of random numbers."""

    def __init__(self, data: common.Images, settings: argparse.Namespace) -> None:
        self.settings = settings
        self.step = 0
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.data = on_device(data, self.device)
        self.draws = torch.Generator(self.device).manual_seed(settings.seed + 1)
        torch.manual_seed(settings.seed)  # for the first weights; SRA has generators of its own
        self.model = SiT(**common.model_sizes(data, settings)).to(self.device)
        self.align: SelfAlignment | None = None
        parameters = [*self.model.parameters()]
        decay = selfalign.schedules.DecayWarmup(settings.decay)
        if settings.sra:
            loss = selfalign.SRALoss(  # SRA
                student_layer=settings.student_layer,
                teacher_layer=settings.teacher_layer,
                path=PATH,
                max_gap=settings.max_gap,
                weight=settings.weight,
                decay=decay,
            )
            self.align = SelfAlignment(self.model, loss)  # SRA
            parameters += self.align.projector.parameters()  # SRA
        else:
            self.average = AveragedModel(self.model, multi_avg_fn=ema_with(decay))
        self.optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)

    @property
    def ema(self) -> nn.Module:
        """The averaged model, which is sampled from: with SRA, the teacher."""
        return self.align.teacher if self.align else self.average.module

    def parts(self) -> dict[str, nn.Module | torch.optim.Optimizer | SelfAlignment]:
        """All that has a state dict."""
        average = {"align": self.align} if self.align else {"average": self.average}
        return {"model": self.model, "optimizer": self.optimizer} | average

    def save(self, file: Path) -> None:
        state = {name: part.state_dict() for name, part in self.parts().items()}
        state |= {"step": self.step, "draws": self.draws.get_state()}
        state |= {"settings": common.fixed_settings(self.settings)}
        partial = file.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, file)  # at once: whatever happens, `file` is a whole checkpoint

    def load(self, file: Path) -> None:
        common.check_exists(file)
        state = torch.load(file, weights_only=True, map_location=self.device)
        common.check_settings(state["settings"], common.fixed_settings(self.settings))
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.step = state["step"]
        self.draws.set_state(state["draws"].cpu())


def train(run: Run, checkpoint: Path | None = None) -> Iterator[Losses]:
    """Train from `run.step` to the last step. Yields the losses of each step, to be shown."""
    settings = run.settings
    model = run.model
    align = run.align  # SRA
    for step in range(run.step, settings.steps):
        indices = common.batch_indices(len(run.data.images), step, settings)
        x0 = run.data.images[torch.tensor(indices)]  # [B, C, H, W]
        labels = run.data.labels[torch.tensor(indices)]  # [B]
        y, noise, t = draw(x0, labels, model.null_class, settings.label_dropout, run.draws)

        prediction = model(PATH.add_noise(x0, noise, t), t, y)  # [B, C, H, W]
        denoising = F.mse_loss(prediction, PATH.velocity(x0, noise, t))
        alignment = align(x0, noise, t, y) if align else torch.zeros_like(denoising)  # SRA
        (denoising + alignment).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        if align:
            align.update()  # SRA
        else:
            run.average.update_parameters(model)

        run.step = step + 1
        if checkpoint and run.step % settings.save_every == 0:
            run.save(checkpoint)
        yield denoising.detach(), alignment.detach()


# --------------------------------------------------------------------------------------------------
# The sampling


@torch.no_grad()
def sample(
    model: nn.Module, noise: torch.Tensor, y: torch.Tensor, steps: int = 25, guidance: float = 1.0
) -> torch.Tensor:
    """Images [B, C, H, W] of the classes y [B]: the velocity's ODE, by Heun's method."""
    no_class = torch.full_like(y, model.null_class)  # type: ignore[arg-type]  # an int

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        conditional = model(x, t.expand(len(x)), y)
        if guidance == 1.0:
            return conditional
        free = model(x, t.expand(len(x)), no_class)
        return free + guidance * (conditional - free)

    x = noise
    times = torch.linspace(1.0, 0.0, steps + 1, device=x.device)  # from noise to data
    for t, later in itertools.pairwise(times):
        slope = velocity(x, t)
        corrected = velocity(x + (later - t) * slope, later)
        x = x + (later - t) * (slope + corrected) / 2
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
    x = sample(run.ema, noise, y, settings.sampling_steps, settings.guidance)
    common.draw_samples(x.permute(0, 2, 3, 1).cpu().numpy(), data.classes, picture)
    print(f"Checkpoint: {checkpoint}\nSamples:    {picture}")


PARSER = common.command_line(__doc__, "torch_sit")

if __name__ == "__main__":
    main(common.parse(PARSER))
