"""The sample's tokens [B, N, D] in what a tapped block returned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from selfalign.adapting import invalid

from .arguments import Arguments, parts_of, tensors_by_place
from .ragged import Arrangement, Following, arrangement
from .reading import Place, Reading

Output: TypeAlias = Any
"""What a block returned: a tensor, or a nest of them."""

Select = Callable[[Output], torch.Tensor]


class Stream(NamedTuple):
    """The sample's tokens in one kind of output.

    Attributes:
        place: of the tensor in the output.
        reading: how the tokens lie in it.
        shape: the tensor's, when this was found.
        sample: sizes of a sample then, without the batch's.
        following: takes them out where they follow each sample's own text.
        arrangement: of the call, where text may stand before them: another one is another kind.
    """

    place: Place
    reading: Reading
    shape: torch.Size
    sample: torch.Size
    following: Following | None = None
    arrangement: Arrangement | None = None

    def fits(self, streams: dict[Place, torch.Tensor], sample: torch.Size, any_size: bool) -> bool:
        """Whether an output has this stream, in whatever number of samples.

        Args:
            streams: the output's.
            sample: sizes of a sample.
            any_size: whether there may be more or fewer tokens, where all are the sample's.
        """
        tensor = streams.get(self.place)
        if tensor is None or tensor.ndim != len(self.shape):
            return False
        free = {self.reading.axes[0]}
        if any_size and self.reading.places is None:
            free.update(self.reading.axes[1:-1])
        elif sample != self.sample:
            return False
        pairs = enumerate(zip(tensor.shape, self.shape, strict=True))
        return all(size == mine or axis in free for axis, (size, mine) in pairs)


class TokenReader:
    """Takes the sample's tokens out of one block's output.

    Which they are is found by `probing`, once for each kind of output. `select` may take a part of
    the output before.

    Args:
        model: the whole model.
        where: path of the block.
        select: the user's function, or None.
        width: feature width D, where it is known.

    Attributes:
        streams: the tokens, for each kind of output that was seen.
        plain: sizes, without the batch's, of a sample and of an output that is its tokens as it is.
        any_size: see `Stream.fits`; a sharded model cannot be looked at anew.
    """

    def __init__(
        self, model: nn.Module, where: str, select: Select | None, width: int | None
    ) -> None:
        self.where = where
        self.block = model.get_submodule(where)
        self.select = select
        self.width = width
        self.streams: list[Stream] = []
        self.plain: set[tuple[int, ...]] = set()
        self.any_size = False

    def __call__(
        self, output: Output, x0: torch.Tensor, call: Arguments | None = None
    ) -> torch.Tensor:
        """The tokens [B, N, D].

        Args:
            output: the block's.
            x0: the samples.
            call: what the model was called with.

        Raises:
            ValueError: an output that has no tokens, or that has several candidates.
        """
        found = self.features(output)
        stream = self._known(found, x0, call) or self.by_shape(output, x0)
        if stream.following is not None and call is not None:
            return stream.following(found[stream.place], call)
        return stream.reading(found[stream.place])

    def features(self, output: Output) -> dict[Place, torch.Tensor]:
        """What may be tokens in an output: floating tensors of three to five axes."""
        if self.select is not None:
            output = self.select(output)
            if not is_features(output):
                raise self._no_tokens(output)
        return dict(features_in(output))

    def knows(self, output: Output, x0: torch.Tensor, call: Arguments | None = None) -> bool:
        """Whether it has been found where this kind of output has the sample's tokens."""
        return self._known(self.features(output), x0, call) is not None

    def learn(self, stream: Stream) -> None:
        """From now on, read this kind of output so."""
        self.streams.append(stream)
        if self.select is None and stream.place == () and stream.reading.is_plain():
            self.plain.add((*stream.sample, *stream.shape[1:]))

    def by_shape(self, output: Output, x0: torch.Tensor) -> Stream:
        """How the tokens lie, told by shapes alone: where there is nothing else to go by.

        They are the only tensor [B, N, D]. Features on a grid, [B, D, ...] or [B, ..., D], become
        tokens where only one of these axes has the width.

        Raises:
            ValueError: no such tensor, or several.
        """
        found = self.features(output)
        flat = {place: tensor for place, tensor in found.items() if tensor.ndim == 3}
        candidates = flat or found
        if not candidates:
            raise self._no_tokens(output)
        if len(candidates) > 1:
            raise invalid(
                "A block that returns several streams must tell which one is the sample's",
                f"{self.where}: {shapes(output)}",
                "Pass select=, such as select=lambda output: output[1].",
            )
        ((place, tensor),) = candidates.items()
        axes = (0, 1, 2) if tensor.ndim == 3 else self._grid_axes(tensor)
        return Stream(place, Reading(axes), tensor.shape, x0.shape[1:])

    def width_of(self, output: Output) -> int:
        """The width D of the tokens in an output, told by shapes alone."""
        found = self.features(output)
        last = {tensor.shape[-1] for tensor in found.values() if tensor.ndim == 3}
        if len(found) > 1 and len(last) == 1:  # several streams of one width
            return last.pop()
        stream = self.by_shape(output, torch.empty(0))
        return stream.reading(found[stream.place]).shape[-1]

    def widths(self) -> set[int]:
        """Numbers of features that the tokens may have."""
        return {self.width} if self.width else _layer_widths(self.block)

    def _known(
        self, found: dict[Place, torch.Tensor], x0: torch.Tensor, call: Arguments | None
    ) -> Stream | None:
        sample = x0.shape[1:]
        for stream in self.streams:
            if stream.fits(found, sample, self.any_size):
                known = stream.arrangement
                if known is None or call is None or known == arrangement(call, len(x0)):
                    return stream
        return None

    def _grid_axes(self, tensor: torch.Tensor) -> tuple[int, ...]:
        last = tensor.ndim - 1
        width = [axis for axis in (1, last) if tensor.shape[axis] in self.widths()]
        if len(width) != 1:
            raise invalid(
                "Features on a grid must have the width on one axis, the second or the last",
                f"{self.where}: {shapes(tensor)}, width {self.width or 'unknown'}",
                "Pass width=, and select=, a function from the block's output to its tokens.",
            )
        return (0, *(axis for axis in range(1, last + 1) if axis != width[0]), width[0])

    def _no_tokens(self, output: Output) -> ValueError:
        return invalid(
            "A tapped block must give tokens [B, N, D], or features [B, D, H, W] or "
            "[B, D, T, H, W]",
            f"{self.where}: {shapes(output)}",
            "Pass select=, a function from the block's output to its tokens.",
        )


def is_features(part: Output) -> bool:
    """Whether this is a floating tensor of three to five axes."""
    return isinstance(part, torch.Tensor) and part.is_floating_point() and 3 <= part.ndim <= 5


def features_in(value: Any) -> Iterator[tuple[Place, torch.Tensor]]:
    """What may be tokens in a nest, each with its place."""
    for place, tensor in tensors_by_place(value):
        if is_features(tensor):
            yield place, tensor


def most_tokens(x0: torch.Tensor) -> int:
    """The most tokens that a sample can have: one for each of its positions."""
    sizes = x0.shape[1:]
    return math.prod(sizes) // min(sizes) if len(sizes) > 1 else math.prod(sizes)


def _layer_widths(block: nn.Module) -> set[int]:
    """Numbers of features that the block's layers give."""
    linear = {m.out_features for m in block.modules() if isinstance(m, nn.Linear)}
    convolutions = [m for m in block.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    return linear | {m.out_channels for m in convolutions}


def shapes(output: Output) -> str:
    """An output in an error's text: its shapes."""
    if isinstance(output, torch.Tensor):
        return f"shape {tuple(output.shape)}"
    if isinstance(output, (tuple, list)):
        return f"{type(output).__name__} of ({', '.join(map(shapes, output))})"
    parts = [f"{key!r}: {shapes(part)}" for key, part in parts_of(output).items()]
    return type(output).__name__ + (f" of ({', '.join(parts)})" if parts else "")
