"""A second time beside the time: what is a function of the time is told by its order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

_SAMPLES = 12  # one of 1000 columns is in the times' order by chance in 1 of 240,000 runs
_MOST = 64  # samples that are looked at where times repeat
_WIDEST = 2048  # numbers per sample
_FEW = 8  # of a tensor of more than two axes
_CHANCE = 1e-3


class Told(NamedTuple):
    """What a model was told in one batch.

    Attributes:
        times: the path's [B].
        columns: numbers per sample [B, columns], by the argument's name.
    """

    times: torch.Tensor
    columns: dict[str, torch.Tensor]


class FirstTimes:
    """Collects the times of the first samples, and what else the model was told of each.

    What is in the order of the times, or in the reverse one, is a function of the time, unless so
    few samples may be in that order by chance: then more of them are waited for.

    Attributes:
        full: whether enough was seen.
    """

    def __init__(self) -> None:
        self.batches: list[Told] = []
        self.full = False

    def add(self, t: torch.Tensor, told: Mapping[str, torch.Tensor]) -> str | None:
        """Look at one more batch, of times [B]: the name of what is a function of the time."""
        columns = {name: _columns(value, len(t)) for name, value in told.items()}
        known = {name: found for name, found in columns.items() if found is not None}
        self.batches.append(Told(t.detach().double().cpu(), known))
        times = torch.cat([batch.times for batch in self.batches])
        self.full = len(times.unique()) >= _SAMPLES or len(times) >= _MOST
        return next((name for name in known if self._follows(name)), None)

    def _follows(self, name: str) -> bool:
        width = self.batches[-1].columns[name].shape[1]
        having = [batch for batch in self.batches if name in batch.columns]
        alike = [batch for batch in having if batch.columns[name].shape[1] == width]
        times = torch.cat([batch.times for batch in alike])
        return in_order(times, torch.cat([batch.columns[name] for batch in alike]))


def in_order(times: torch.Tensor, columns: torch.Tensor) -> bool:
    """Whether a column of numbers [samples, columns] is in the times' order, not by chance."""
    times, order = times.sort()
    columns = columns[order]
    rises = columns.diff(dim=0)
    same = times.diff() == 0
    functions = (rises[same] == 0).all(0)
    ordered = (rises >= 0).all(0) | (rises <= 0).all(0)
    candidates = columns[:, functions & ordered]
    first = torch.cat([torch.ones(1, dtype=torch.bool), ~same])
    return any(_chance(column[first]) * columns.shape[1] < _CHANCE for column in candidates.T)


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
