"""A small SiT trained with Self-Representation Alignment (SRA) in plain PyTorch: model, training, sampling in one file.

    python examples/torch_sit.py                                  scikit-learn's digits, a few minutes on a laptop's CPU
    python examples/torch_sit.py --data fashion-mnist             28x28 clothes
    python examples/torch_sit.py --data FOLDER --image-size 32    your own images, one subfolder per class
    python examples/torch_sit.py --no-sra                         the same run without SRA: same weights, batches and noise
    python examples/torch_sit.py --resume                         continue from the last checkpoint, bit for bit

What SRA adds to the training is marked with "# SRA"; all the rest is a flow-matching transformer as usual.

Reference: Jiang et al., "No Other Representation Component Is Needed: Diffusion Transformers Can Provide Representation
Guidance by Themselves", 2025, arXiv 2505.02831; Ma et al., "SiT", 2024, arXiv 2401.08740.
"""

import argparse
import gzip
import itertools
import math
import os
import signal
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import Progress, TextColumn
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

    def __init__(self, size: int, channels: int, classes: int, patch: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        if size % patch or width % heads or width % 4:
            raise ValueError(f"The patch must divide the side; heads, and 4, the width. Received: patch {patch}, side {size}, "
                             f"heads {heads}, width {width}. Choose others, or another --image-size.")  # fmt: skip
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
        for zero in (*(block.modulation[-1] for block in self.blocks), self.modulation[-1], self.head):
            nn.init.zeros_(zero.weight)

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


class Run:
    """One training run: everything that a checkpoint must hold."""

    def __init__(self, data: "Data", settings: argparse.Namespace) -> None:
        self.settings, self.data, self.step = settings, data, 0
        device = data.images.device
        torch.manual_seed(settings.seed)  # the model's first weights; SRA draws from generators of its own
        self.draws = torch.Generator(device).manual_seed(settings.seed + 1)  # noise, times, dropped labels
        _, channels, size, _ = data.images.shape
        shape = {name: getattr(settings, name) for name in ("patch", "width", "depth", "heads")}
        self.model = SiT(size, channels, len(data.classes), **shape).to(device)
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

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and labels of this step; a function of seed and step alone, so that a resumed run sees the same order."""
        count, size = len(self.data.images), min(self.settings.batch_size, len(self.data.images))
        epoch, position = divmod(self.step, count // size)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.settings.seed * 100_003 + epoch))
        chosen = order[position * size : (position + 1) * size].to(self.data.images.device)
        return self.data.images[chosen], self.data.labels[chosen]

    def training_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step. Returns the denoising loss and SRA's term, without gradient."""
        x0, y = self.batch()  # [B, C, H, W], [B]
        dropped = self._uniform(len(y)) < self.settings.label_dropout  # [B]
        y = torch.where(dropped, self.model.null_class, y)  # outside the model: student and teacher see the same labels
        noise = torch.randn(x0.shape, generator=self.draws, device=x0.device)  # [B, C, H, W]
        t = self._uniform(len(x0))  # [B]

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

    def _uniform(self, count: int) -> torch.Tensor:
        return torch.rand(count, generator=self.draws, device=self.draws.device)

    def _parts(self) -> dict[str, nn.Module | torch.optim.Optimizer | SelfAlignment]:
        averaged = {"align": self.align} if self.align else {"average": self.average}
        return {"model": self.model, "optimizer": self.optimizer} | averaged

    def save(self, file: Path) -> None:
        state = {name: part.state_dict() for name, part in self._parts().items()}
        state |= {"step": self.step, "draws": self.draws.get_state(), "settings": fixed(self.settings)}
        partial = file.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, file)  # at once: whatever happens, `file` is a whole checkpoint, the old one or the new one

    def load(self, file: Path) -> None:
        if not file.is_file():
            raise ValueError(f"--resume needs a checkpoint. Received: no file {file}. Train without --resume, or check --out.")
        state = torch.load(file, weights_only=True, map_location=self.data.images.device)
        mine = fixed(self.settings)
        changed = [f"{name}={state['settings'].get(name)}" for name in mine if mine[name] != state["settings"].get(name)]
        if changed:
            raise ValueError(f"A run is resumed with the settings it began with. Received: others than {', '.join(changed)} "
                             f"in {file}. Repeat those, or begin anew with another --out.")  # fmt: skip
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.step = state["step"]
        self.draws.set_state(state["draws"].cpu())


def fixed(settings: argparse.Namespace) -> dict[str, object]:
    """The settings that decide a run's numbers."""
    return {name: value for name, value in vars(settings).items() if name not in FREE}


FREE = ("out", "resume", "short", "steps", "save_every", "data_dir", "guidance", "sampling_steps")


# ------------------------------------------------------------------------------------------------------------- the sampling


@torch.no_grad()
def sample(model: nn.Module, noise: torch.Tensor, y: torch.Tensor, steps: int = 25, guidance: float = 1.0) -> torch.Tensor:
    """Images [B, C, H, W] of the classes y [B]: the velocity's ODE by Heun's method, from noise (t = 1) to data (t = 0)."""

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        conditional = model(x, t.expand(len(x)), y)
        if guidance == 1.0:
            return conditional
        free = model(x, t.expand(len(x)), torch.full_like(y, model.null_class))
        return free + guidance * (conditional - free)

    x = noise
    for t, later in itertools.pairwise(torch.linspace(1.0, 0.0, steps + 1, device=x.device)):
        slope = velocity(x, t)
        corrected = velocity(x + (later - t) * slope, later)
        x = x + (later - t) * (slope + corrected) / 2
    return x


def draw_samples(run: Run, file: Path, columns: int = 10) -> None:
    """A picture of samples, one row per class."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    names = run.data.classes[:20]
    noise = torch.randn((len(names) * columns, *run.data.images.shape[1:]), generator=torch.Generator().manual_seed(0))
    y = torch.arange(len(names)).repeat_interleave(columns)
    device, options = run.data.images.device, (run.settings.sampling_steps, run.settings.guidance)
    images = sample(run.ema, noise.to(device), y.to(device), *options).cpu().add(1).div(2).clamp(0, 1)
    figure, axes = pyplot.subplots(len(names), 1, figsize=(columns * 0.6 + 1.2, len(names) * 0.62), squeeze=False)
    for axis, name, row in zip(axes[:, 0], names, images.split(columns), strict=True):
        strip = torch.cat([F.pad(image, (0, 1), value=1.0) for image in row], dim=2)  # [C, H, columns * (W + 1)]
        axis.imshow(strip.permute(1, 2, 0).squeeze(2).numpy(), cmap="gray", vmin=0, vmax=1)
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.savefig(file, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


# ----------------------------------------------------------------------------------------------------------------- the data


class Data(NamedTuple):
    """Training and held-out images [N, C, H, W] in [-1, 1] with labels [N], and the names of the classes."""

    images: torch.Tensor
    labels: torch.Tensor
    held_out_images: torch.Tensor
    held_out_labels: torch.Tensor
    classes: list[str]


def load_data(settings: argparse.Namespace) -> Data:
    if settings.data == "digits":
        data = digits()
    elif settings.data == "fashion-mnist":
        data = fashion_mnist(Path(settings.data_dir))
    else:
        data = image_folder(Path(settings.data), settings.image_size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Data(*(part.to(device) for part in data[:4]), data.classes)


def digits() -> Data:
    """1,797 handwritten digits of 8x8 pixels, inside scikit-learn."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)  # [1797, 64] from 0 to 16, [1797]
    return split(images.reshape(-1, 1, 8, 8) * (255 / 16), labels, [str(digit) for digit in range(10)])


def fashion_mnist(folder: Path) -> Data:
    """60,000 + 10,000 pictures of clothes, 28x28 pixels: Xiao et al., 2017, arXiv 1708.07747."""
    names = ["T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot"]
    parts = []
    for part in ("train", "t10k"):
        for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
            file = folder / f"{part}-{kind}-ubyte.gz"
            if not file.is_file():
                raise ValueError(
                    f"Fashion-MNIST must lie in a folder as its four .gz files. Received: {folder}, without {file.name}. "
                    "Install the Debian package dataset-fashion-mnist, or say with --data-dir where the files are."
                )
            parts.append(np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8, offset=header))
    images, labels, held_out_images, held_out_labels = parts
    scaled = (scale(part.reshape(-1, 1, 28, 28)) for part in (images, held_out_images))
    return Data(next(scaled), torch.tensor(labels).long(), next(scaled), torch.tensor(held_out_labels).long(), names)


def image_folder(folder: Path, size: int) -> Data:
    """Your images, cropped to a square in the middle and resized; the subfolder is the class."""
    from PIL import Image, ImageOps

    if not folder.is_dir():
        raise ValueError("--data must be digits, fashion-mnist, or a folder of images with one subfolder per class. "
                         f"Received: {str(folder)!r}, which is no folder. Check the spelling.")  # fmt: skip
    suffixes = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
    files = sorted(file for file in folder.glob("*/*") if file.suffix.lower() in suffixes)
    if len(files) < 10:
        raise ValueError(f"A folder of images must have one subfolder per class, and ten images at least. Received: {folder} "
                         f"with {len(files)} images in subfolders. Put them in as FOLDER/CLASS/NAME.png or .jpg.")  # fmt: skip
    names = sorted({file.parent.name for file in files})
    images = [np.asarray(ImageOps.fit(Image.open(file).convert("RGB"), (size, size))) for file in files]
    return split(np.stack(images).transpose(0, 3, 1, 2), np.array([names.index(file.parent.name) for file in files]), names)


def split(images: np.ndarray, labels: np.ndarray, names: list[str], held_out: float = 0.2) -> Data:
    """A fifth is held out, the same whatever the seed of the run."""
    order = np.random.default_rng(0).permutation(len(images))
    held, rest = np.split(order, [int(held_out * len(order))])
    x, y = scale(images), torch.tensor(labels).long()
    return Data(x[rest], y[rest], x[held], y[held], names)


def scale(images: np.ndarray) -> torch.Tensor:
    return torch.tensor(images, dtype=torch.float32) / 127.5 - 1.0


# --------------------------------------------------------------------------------------------------------- the command line


def layer(text: str) -> int | float:
    return int(text) if text.isdigit() else float(text)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    add = parser.add_argument
    add("--data", default="digits", help="digits, fashion-mnist, or a folder of images with one subfolder per class")
    add("--data-dir", default="/usr/share/datasets/fashion-mnist", help="where Fashion-MNIST's .gz files lie")
    add("--image-size", type=int, default=32, help="images of a folder are resized to this")
    add("--out", type=Path, default=Path("runs/torch_sit"), help="folder of checkpoint.pt and samples.png")
    add("--steps", type=int, default=1500, help="optimizer steps")
    add("--batch-size", type=int, default=128)
    add("--lr", type=float, default=1e-3)
    add("--seed", type=int, default=0)
    add("--no-sra", dest="sra", action="store_false", help="train without SRA, all else equal")
    add("--student-layer", type=layer, default=0.25, help="after this block (from 1), or a fraction of the depth")
    add("--teacher-layer", type=layer, default=0.7, help="the same, of the teacher")
    add("--weight", type=float, default=0.5, help="weight of SRA's term")
    add("--max-gap", type=float, default=0.2, help="the teacher is at most this much nearer to the data, in time")
    add("--decay", type=float, default=0.999, help="decay of the EMA, reached after a warm-up")
    add("--label-dropout", type=float, default=0.1)
    add("--patch", type=int, default=None, help="side of a patch in pixels (default: 2, from 16 pixels on 4)")
    add("--width", type=int, default=96)
    add("--depth", type=int, default=8)
    add("--heads", type=int, default=4)
    add("--guidance", type=float, default=1.0, help="classifier-free guidance of the samples; 1 is none")
    add("--sampling-steps", type=int, default=25)
    add("--save-every", type=int, default=500, help="steps from checkpoint to checkpoint")
    add("--resume", action="store_true", help="continue from the checkpoint in --out")
    add("--short", action="store_true", help="a few seconds: a tiny model, to see that everything runs")
    if parser.parse_args(arguments).short:  # other defaults; what is said on the command line still holds
        parser.set_defaults(steps=20, width=32, depth=4, batch_size=32, sampling_steps=5)
    return parser.parse_args(arguments)


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def train(run: Run, checkpoint: Path) -> bool:
    """Train to the last step, or to the end of the step in which Ctrl-C came. Returns whether it went to the last."""
    stop = []
    before = signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    losses = ""
    with Progress(*Progress.get_default_columns(), TextColumn("{task.fields[losses]}")) as progress:
        bar = progress.add_task("training", total=run.settings.steps, completed=run.step, losses="")
        while run.step < run.settings.steps and not stop:
            denoising, alignment = run.training_step()
            if run.step % 20 == 0:  # reading a loss waits for the device: not in every step
                losses = f"denoising {denoising.item():.3f}" + f", SRA {alignment.item():.3f}" * run.settings.sra
            progress.update(bar, completed=run.step, losses=losses)
            if run.step % run.settings.save_every == 0:
                run.save(checkpoint)
    run.save(checkpoint)
    signal.signal(signal.SIGINT, before)
    return not stop


def main() -> None:
    settings = parse()
    checkpoint = settings.out / "checkpoint.pt"
    try:
        data = load_data(settings)
        settings.patch = settings.patch or (2 if data.images.shape[-1] < 16 else 4)
        run = Run(data, settings)
        if settings.resume:
            run.load(checkpoint)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    settings.out.mkdir(parents=True, exist_ok=True)
    if not train(run, checkpoint):
        raise SystemExit(f"Stopped at step {run.step}; the same command with --resume continues.")
    draw_samples(run, settings.out / "samples.png")
    print(f"Checkpoint: {checkpoint}\nSamples:    {settings.out / 'samples.png'}")


if __name__ == "__main__":
    main()
