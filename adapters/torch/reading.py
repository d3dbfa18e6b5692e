"""How a sample's tokens lie in a tensor: which axes, which places, told from what changes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

_CHANGED = 1e-3  # of the largest change: what is less is rounding
_CLEAR = 2.0  # times the second largest change


Place = tuple[Any, ...]  # of a tensor in a nest: indices and keys, from the outside in


class Undecided(Exception):
    """What was seen does not tell how the tokens lie; the reason is its text."""


class Runs(NamedTuple):
    """A run of tokens in each sample, as long in all of them.

    Attributes:
        starts: where it begins, [B].
        size: number of tokens N.
    """

    starts: torch.Tensor
    size: int

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """The runs [B, N, D]."""
        places = self.starts[:, None] + torch.arange(self.size, device=tokens.device)
        return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))


class Reading(NamedTuple):
    """Takes the tokens [B, N, D] of the sample out of a tensor.

    Attributes:
        axes: the tensor's axes in the order batch, tokens (one axis or several), features.
        each: entries of the first axis that belong to one sample.
        places: of the sample's tokens among all; None where all are the sample's; `Runs` where they
            differ from sample to sample: they hold for one batch.
    """

    axes: tuple[int, ...]
    each: int = 1
    places: torch.Tensor | slice | Runs | None = None

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """The sample's tokens [B, N, D]."""
        tokens = self.all_tokens(features)
        if self.places is None:
            return tokens
        if isinstance(self.places, Runs):
            return self.places(tokens)
        return tokens[:, self.places]

    def all_tokens(self, features: torch.Tensor) -> torch.Tensor:
        """All tokens [B, N, D], those that are not the sample's among them."""
        if self.axes != tuple(range(features.ndim)):
            features = features.permute(self.axes)
        if features.ndim == 3 and self.each == 1:
            return features
        batch = len(features) // self.each
        return features.reshape(batch, -1, features.shape[-1])

    def is_plain(self) -> bool:
        """Whether the tensor is the tokens as it is."""
        return self == Reading((0, 1, 2))


class Changes(NamedTuple):
    """How much each entry of a tensor changed.

    Attributes:
        first: where the first sample was another one.
        all: where every sample was another one.
        spots: where one number in each sample was another one; several such runs.
    """

    first: torch.Tensor
    all: torch.Tensor
    spots: list[torch.Tensor]


def find_reading(
    changes: Changes,
    batch: int,
    widths: Iterable[int],
    grid: tuple[int, ...] = (),
    chosen: bool = False,
) -> Reading:
    """How the sample's tokens lie in a tensor that changed so.

    Args:
        changes: the tensor's.
        batch: number of samples.
        widths: numbers of features that the block may have.
        grid: sizes of the sample's grid.
        chosen: whether the user took these tokens.

    Raises:
        Undecided: several readings fit, or none.
    """
    samples = _batch_axis(changes.first, batch)
    rest = [axis for axis in range(changes.first.ndim) if axis != samples]
    each = changes.first.shape[samples] // batch
    spot = changes.spots[0].narrow(samples, 0, each)
    width = _feature_axis(spot, rest, set(widths), grid)
    rest.remove(width)
    reading = Reading((samples, *rest, width), each)
    changed = reading.all_tokens(changes.all).amax(-1)  # [B, N]
    mine = changed > _CHANGED * changed.max()
    alike = torch.equal(mine, mine[:1].expand_as(mine))
    return reading._replace(places=_places(mine[0]) if alike else _uneven(mine, chosen))


def clear_peaks(reading: Reading, spots: list[torch.Tensor]) -> list[int | None]:
    """At which of the sample's tokens each changed number shows; None where that is not clear."""
    peaks: list[int | None] = []
    for spot in spots:
        changed = reading(spot).amax(-1)  # [B, N]
        largest, where = changed.topk(min(2, changed.shape[1]))
        for sizes, tokens in zip(largest.tolist(), where.tolist(), strict=True):
            clear = sizes[0] > _CLEAR * sizes[-1] or len(sizes) == 1
            peaks.append(tokens[0] if clear else None)
    return peaks


def _indices(change: torch.Tensor) -> list[set[int]]:
    """For each axis, the indices at which something changed."""
    changed = change > _CHANGED * change.max()
    found = []
    for axis in range(change.ndim):
        others = [other for other in range(change.ndim) if other != axis]
        found.append(set(changed.sum(others).nonzero().flatten().tolist()))
    return found


def _batch_axis(first: torch.Tensor, batch: int) -> int:
    """The axis of the samples: along it, the first one changed alone."""
    shape = first.shape
    if batch == 1:
        return 1 if shape[0] > 1 and shape[1] == 1 else 0
    indices = _indices(first)
    for axis in (0, 1):
        if shape[axis] == batch and indices[axis] == {0}:
            return axis
    each, over = divmod(shape[0], batch)
    if not over and each > 1 and indices[0] and max(indices[0]) < each:
        return 0
    raise Undecided("no axis of it is the samples'")


def _feature_axis(
    spot: torch.Tensor, rest: list[int], widths: set[int], grid: tuple[int, ...]
) -> int:
    """The axis of the features: one number of the sample changes all of them, and few tokens.

    Where it changes more, the widths tell, or the others' being the sample's grid.
    """
    indices = _indices(spot)
    shape = spot.shape
    whole = [axis for axis in rest if shape[axis] > 1 and len(indices[axis]) == shape[axis]]
    known = [axis for axis in rest if shape[axis] in widths]
    beside = [axis for axis in rest if _is_grid([shape[a] for a in rest if a != axis], grid)]
    for candidates in (whole, [axis for axis in whole if axis in known], known, beside):
        if len(candidates) == 1:
            return candidates[0]
    raise Undecided("no axis of it is the features' alone")


def _is_grid(sizes: list[int], grid: tuple[int, ...]) -> bool:
    """Whether these are the sizes of the sample's grid, in whatever patches."""
    if len(sizes) != len(grid) or len(grid) < 2:
        return False
    patches = {whole / size for whole, size in zip(grid, sizes, strict=True)}
    return len(patches) == 1


def _uneven(mine: torch.Tensor, chosen: bool) -> Runs | None:
    """Runs of one length, which begin at other tokens from sample to sample; or samples padded.

    A padded sample's own tokens are fewer. All are taken where each is some sample's, or where the
    user took them.
    """
    counts = mine.sum(1)
    runs = Runs(mine.float().argmax(1), int(counts[0]))
    if (counts == counts[0]).all() and runs(mine[..., None]).all():
        return runs
    if chosen or mine.any(0).all():
        return None
    raise Undecided("its tokens at other places from sample to sample")


def _places(mine: torch.Tensor) -> torch.Tensor | slice | None:
    """Which of the tokens are the sample's: all, a run of them, or single ones."""
    places = mine.nonzero().flatten()
    if len(places) == len(mine):
        return None
    start, stop = int(places[0]), int(places[-1]) + 1
    return slice(start, stop) if stop - start == len(places) else places
