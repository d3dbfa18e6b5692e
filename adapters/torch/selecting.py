"""A function for `select=` as an error tells it: one that was tried out."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .arguments import at_place, tensors_by_place, written
from .reading import Place, Runs, Undecided
from .tokens import Output, TokenReader, most_tokens

if TYPE_CHECKING:
    from .probing import Probe

_STREAMS = 4  # a first axis that is longer is of samples


class Choice(NamedTuple):
    """A tensor in an output, or a part of it.

    Attributes:
        place: of the tensor.
        index: into it; () takes all of it.
    """

    place: Place
    index: Any = ()

    def __call__(self, output: Output) -> torch.Tensor:
        """Take it."""
        return at_place(output, self.place)[self.index]

    def spelled(self, output: Output) -> str:
        """How it is taken, as it is written in Python."""
        index = "" if self.index == () else f"[{self.index}]"
        return f"output{written(output, self.place)}{index}"


def example(probe: Probe, reader: TokenReader) -> str:
    """A function that takes the sample's tokens out of a block's output, as it is written.

    The largest tensors come first. Empty where none of them does.
    """
    output = probe.outputs[reader.where]
    choices = list(_choices(output))
    for choice in choices:
        try:
            return f"lambda output: {choice.spelled(output)}{_places(probe, reader, choice)}"
        except Undecided:
            continue
    return ""


def spelled(places: Any) -> str:
    """Places of tokens as they are written in Python."""
    if places is None:
        return ""
    if isinstance(places, slice):
        return f"[:, {places.start}:{places.stop}]"
    return f"[:, {places.tolist()}]"


def _choices(output: Output) -> Iterator[Choice]:
    """What may be the sample's tokens in an output."""
    found = dict(tensors_by_place(output))
    for place in sorted(found, key=lambda place: -found[place].numel()):
        tensor = found[place]
        yield Choice(place, None) if tensor.ndim == 2 else Choice(place)
        if tensor.ndim == 4 and len(tensor) <= _STREAMS:
            yield from (Choice(place, index) for index in range(len(tensor)))


def _places(probe: Probe, reader: TokenReader, choice: Choice) -> str:
    """Of the sample's tokens in what is chosen, as they are written.

    Raises:
        Undecided: it has none, or they differ from sample to sample.
    """
    tried = copy.copy(reader)
    tried.select = choice.__call__
    try:
        stream = probe.stream(tried)
    except ValueError as error:
        raise Undecided("no tokens") from error
    tokens = stream.reading(choice(probe.outputs[reader.where]))
    if isinstance(stream.reading.places, Runs) or tokens.shape[1] > most_tokens(probe.x):
        raise Undecided("other tokens among them")
    return spelled(stream.reading.places)
