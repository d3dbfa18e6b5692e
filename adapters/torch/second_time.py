"""A second time beside the time: what is a function of the time is told by its order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from selfalign.adapting import invalid

_SAMPLES = 12  # one of 1000 columns is in the times' order by chance in 1 of 240,000 runs
_MOST = 64  # samples that are looked at where times repeat
_WIDEST = 2048  # numbers per sample
_FEW = 8  # of a tensor of more than two axes
_CHANCE = 1e-3


def refused(received: str) -> ValueError:
    """The error of a second time, which would stay the student's in the teacher's call."""
    return invalid(
        "Each time that the model is told must be the teacher's own",
        received,
        "Pass call=, a function that tells the teacher both; if it is a condition and no time, "
        "hand it to align() as well.",
    )


class Told(NamedTuple):
    """What a model was told of some samples.

    Attributes:
        times: the path's [samples].
        columns: numbers of each sample [samples, columns].
    """

    times: torch.Tensor
    columns: torch.Tensor

    def after(self, before: Told | None) -> Told:
        """With what it was told before, where that had as many columns."""
        if before is None or before.columns.shape[1] != self.columns.shape[1]:
            return self
        return Told(*(torch.cat(pair) for pair in zip(before, self, strict=True)))

    def is_over(self) -> bool:
        """Whether enough was seen."""
        return len(self.times.unique()) >= _SAMPLES or len(self.times) >= _MOST


class FirstTimes:
    """Collects the times of the first samples, and what else the model was told of each.

    What is in the order of the times, or in the reverse one, is a function of the time, unless so
    few samples may be in that order by chance: then more of them are waited for.

    Attributes:
        full: whether nothing is waited for.
    """

    def __init__(self) -> None:
        self.told: dict[str, Told] = {}
        self.full = False

    def add(self, t: torch.Tensor, arguments: Mapping[str, torch.Tensor]) -> str | None:
        """Look at one more batch, of times [B]: the name of what is a function of the time."""
        times = t.detach().double().cpu()
        waiting = {}
        for name, value in arguments.items():
            columns = _columns(value, len(t))
            if columns is None:
                continue
            told = Told(times, columns).after(self.told.get(name))
            ordered = ordered_columns(*told)
            if is_no_chance(ordered, told.columns.shape[1]):
                return name
            if ordered.shape[1] and not told.is_over():
                waiting[name] = told
        self.told = waiting
        self.full = not waiting
        return None


def ordered_columns(times: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Those columns of numbers [samples, columns] that rise or fall with the times throughout."""
    times, order = times.sort()
    columns = columns[order]
    rises = columns.diff(dim=0)
    same = times.diff() == 0
    functions = (rises[same] == 0).all(0)
    ordered = (rises >= 0).all(0) | (rises <= 0).all(0)
    first = torch.cat([torch.ones(1, dtype=torch.bool), ~same])
    return columns[first][:, functions & ordered]


def is_no_chance(ordered: torch.Tensor, of: int) -> bool:
    """Whether one of these columns would seldom be in the times' order, of so many columns."""
    return any(_chance(column) * of < _CHANCE for column in ordered.T)


def _chance(column: torch.Tensor) -> float:
    """The probability that these numbers, shuffled, rise or fall throughout."""
    _, counts = column.unique(return_counts=True)
    ways = math.lgamma(len(column) + 1) - float(torch.lgamma(counts.double() + 1).sum())
    return 2 * math.exp(-ways)


def _columns(value: torch.Tensor, batch: int) -> torch.Tensor | None:
    """The numbers of each sample, [B, columns]; None of what is no few numbers per sample."""
    if value.is_complex() or batch not in value.shape or value.numel() == 0:
        return None
    axis = value.shape.index(batch) if value.numel() == batch else 0
    width = value.numel() // batch
    if (len(value) != batch and axis == 0) or width > (_FEW if value.ndim > 2 else _WIDEST):
        return None
    return value.detach().movedim(axis, 0).reshape(batch, width).double().cpu()
