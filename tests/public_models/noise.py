"""Noise paths written out by hand: what a student sees, and what its teacher is to see."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import selfalign

GAP = 0.2  # the largest, as a fraction of the path's time axis


class Noise(NamedTuple):
    """One path.

    Attributes:
        path: selfalign's name for it, or its object.
        draw: size -> times.
        mix: (clean sample, noise, times that broadcast) -> noised sample.
        earlier: (times, draws) -> the teacher's times.
    """

    path: Any
    draw: Callable[[int], torch.Tensor]
    mix: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    earlier: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    def noised(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.mix(x0, noise, t.reshape(-1, *[1] * (x0.ndim - 1)))


def _unit_times(size: int) -> torch.Tensor:
    return 0.25 + 0.5 * torch.rand(size)


# Noise at time 1
LINEAR = Noise(
    "linear",
    _unit_times,
    lambda x0, noise, t: (1 - t) * x0 + t * noise,
    lambda t, u: t - GAP * u,
)
# Noise at time 0
REVERSED = Noise(
    selfalign.paths.Linear(noise_at=0),
    _unit_times,
    lambda x0, noise, t: t * x0 + (1 - t) * noise,
    lambda t, u: t + GAP * u,
)


def _kept(steps: int = 1000) -> torch.Tensor:
    """The fraction of the sample's variance that is kept at each step of DDPM's schedule."""
    betas = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64)
    return torch.cumprod(1 - betas, dim=0).float()


# 1000 steps, of whole numbers
DDPM = Noise(
    selfalign.paths.Discrete(),
    lambda size: torch.randint(300, 900, (size,)),
    lambda x0, noise, t: _kept()[t].sqrt() * x0 + (1 - _kept()[t]).sqrt() * noise,
    lambda t, u: t - (1000 * GAP * u).floor().long(),
)
EDM = Noise(
    selfalign.paths.EDM(),
    lambda size: torch.exp(torch.randn(size)),
    lambda x0, noise, t: x0 + t * noise,
    lambda t, u: t * torch.exp(-GAP * u * math.log(80 / 0.002)),
)
