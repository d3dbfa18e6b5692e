"""Tokens that follow each sample's own text: where they begin is told by a mask or by lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from .arguments import Arguments, at_place, tensors_by_place, with_tensor
from .reading import Place, Reading, Runs

Arrangement = frozenset[tuple[object, object]]
Count = Callable[[torch.Tensor], torch.Tensor]  # a tensor -> lengths [B]


class Lengths(NamedTuple):
    """What in a call says where each sample's tokens begin.

    Attributes:
        place: of a mask, or of lengths.
        counts: takes the lengths [B] out of it.
        offset: tokens beside the text, such as a token of the time.
    """

    place: Place
    counts: Count
    offset: int = 0

    def starts(self, call: Arguments) -> torch.Tensor:
        """Where the samples' tokens begin, [B]."""
        return self.counts(at_place(call, self.place)) + self.offset

    def shortened(self, call: Arguments) -> Arguments:
        """The call with one text token less in the first sample."""
        tensor = at_place(call, self.place).clone()
        if self.counts is _numbers:
            tensor[0] -= 1
        elif self.counts is _steps:
            tensor[1:] -= 1
        else:
            kept = tensor != 0 if self.counts is _filled else tensor == 0
            last = int(_row(kept)[0].nonzero()[-1])
            tensor[0, ..., last] = 0 if self.counts is _filled else _padding(tensor)
        return with_tensor(call, self.place, tensor)


class Following(NamedTuple):
    """Tokens that begin after each sample's own text.

    Attributes:
        reading: of all tokens.
        lengths: where they begin.
        size: number of the sample's tokens N.
    """

    reading: Reading
    lengths: Lengths
    size: int

    def __call__(self, features: torch.Tensor, call: Arguments) -> torch.Tensor:
        """The sample's tokens [B, N, D]."""
        tokens = self.reading.all_tokens(features)
        starts = self.lengths.starts(call).to(tokens.device)
        return Runs(starts[: len(tokens)], self.size)(tokens)


def lengths_like(call: Arguments, starts: torch.Tensor) -> Iterator[Lengths]:
    """What in a call may say that tokens begin there, [B]: it fits but for a constant number."""
    for place, tensor in tensors_by_place(call):
        for count in _counts(tensor, len(starts)):
            lengths = count(tensor).cpu()
            beside = starts.cpu() - lengths
            if lengths[0] > 0 and bool((beside == beside[0]).all()):
                yield Lengths(place, count, int(beside[0]))


def starts_of(reading: Reading, batch: int) -> torch.Tensor | None:
    """Where the samples' tokens begin, [B]; None where they begin with the sample's."""
    places = reading.places
    if isinstance(places, Runs):
        return places.starts
    if isinstance(places, slice) and places.start > 0:
        return torch.full((batch,), places.start)
    return None


def arrangement(call: Arguments, batch: int) -> Arrangement:
    """Shapes of a call's tensors beside the number of samples, and whole numbers in its lists.

    Where they change, text may have another length.
    """
    found: set[tuple[object, object]] = set()
    for key, argument in call.places().items():
        for _, tensor in tensors_by_place(argument):
            of_samples = tensor.ndim > 0 and len(tensor) == batch
            found.add((key, tensor.shape[1:] if of_samples else tensor.shape))
        if isinstance(argument, (list, tuple)):
            found.update((key, number) for number in argument if isinstance(number, int))
    return frozenset(found)


def _counts(tensor: torch.Tensor, batch: int) -> list[Count]:
    """How a tensor may say lengths, whatever its values."""
    whole = not (tensor.is_floating_point() or tensor.is_complex())
    if tensor.ndim == 1 and whole and tensor.dtype != torch.bool:
        by_size: dict[int, list[Count]] = {batch: [_numbers], batch + 1: [_steps]}
        return by_size.get(len(tensor), [])
    if tensor.ndim < 2 or len(tensor) != batch or tensor.numel() == 0:
        return []
    if _is_mask(tensor):
        return [_filled, _empty]
    return [_filled] if whole and tensor.ndim == 2 else []  # text whose padding is 0


def _is_mask(tensor: torch.Tensor) -> bool:
    """Whether there is one value beside 0 at most."""
    beside = tensor[tensor != 0]
    return bool((beside == beside[:1]).all())


def _padding(mask: torch.Tensor) -> float:
    """What a mask in which text is 0 has at padding."""
    beside = mask[mask != 0]
    if len(beside):
        return beside[0].item()
    return float("-inf") if mask.is_floating_point() else 1


def _row(mask: torch.Tensor) -> torch.Tensor:
    """What a mask says of the last axis, for the first query: [B, L]."""
    return mask.reshape(len(mask), -1, mask.shape[-1])[:, 0]


def _numbers(lengths: torch.Tensor) -> torch.Tensor:
    return lengths.long()


def _steps(cumulative: torch.Tensor) -> torch.Tensor:
    return cumulative.long().diff()


def _filled(mask: torch.Tensor) -> torch.Tensor:
    return (_row(mask) != 0).sum(dim=1)


def _empty(mask: torch.Tensor) -> torch.Tensor:
    return (_row(mask) == 0).sum(dim=1)
