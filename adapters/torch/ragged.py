"""Tokens that follow each sample's own text: where they begin is told by a mask or by lengths."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .arguments import Arguments, at_place, tensors_by_place, with_tensor
from .reading import Place, Reading, Runs


class Following(NamedTuple):
    """Tokens that begin after each sample's own text.

    Attributes:
        reading: of all tokens.
        lengths: place in the model's call of a mask [B, L], or of lengths [B].
        size: number of the sample's tokens N.
    """

    reading: Reading
    lengths: Place
    size: int

    def __call__(self, features: torch.Tensor, call: Arguments) -> torch.Tensor:
        """The sample's tokens [B, N, D]."""
        tokens = self.reading.all_tokens(features)
        starts = _lengths(at_place(call, self.lengths)).to(tokens.device)
        return Runs(starts, self.size)(tokens)


def lengths_like(call: Arguments, starts: torch.Tensor) -> list[Place]:
    """Places of the masks and lengths in a call that say where tokens begin, [B]."""
    found = []
    for place, tensor in tensors_by_place(call):
        if tensor.is_floating_point() or tensor.ndim not in (1, 2) or len(tensor) != len(starts):
            continue
        if torch.equal(_lengths(tensor).cpu(), starts.cpu()):
            found.append(place)
    return found


def shortened(call: Arguments, place: Place) -> Arguments:
    """The call with one text token less in the first sample."""
    tensor = at_place(call, place).clone()
    if tensor.ndim == 1:
        tensor[0] -= 1
    else:
        tensor[0, int(tensor[0].nonzero()[-1])] = 0
    return with_tensor(call, place, tensor)


def _lengths(tensor: Any) -> torch.Tensor:
    """Lengths [B]: as they are, or the numbers of places that a mask keeps."""
    if tensor.ndim == 1:
        return tensor.long()
    return (tensor != 0).sum(dim=1)
