"""The tokens [B, N, D] in what a tapped block returned."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from selfalign.adapting import invalid

from .families import has_known_stream, sample_stream

Output: TypeAlias = Any
"""What a block returned: a tensor, or a nest of them."""

Select = Callable[[Output], torch.Tensor]


class BlockOutput(NamedTuple):
    """What a tapped block returned, and what it was called with where that tells its streams apart.

    Attributes:
        output: as the block returned it.
        args: the block's arguments by position, where the output is no tensor.
        kwargs: the same by name.
    """

    output: Output
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}  # noqa: RUF012  (never written to)

    @classmethod
    def of(cls, output: Output, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BlockOutput:
        """The record of a call; without its arguments where they need not be kept alive."""
        return cls(output, args, kwargs) if isinstance(output, (tuple, list)) else cls(output)


class TokenReader:
    """Takes the tokens out of one block's output.

    They are what `select` takes from it; or the output itself; or in a tuple the only tensor
    [B, N, D]. Of a block that takes and gives several streams, they have the shape of its argument
    that is named like a sample. Features on a grid, [B, D, ...] or, where only the last axis has
    the width, [B, ..., D], become tokens.

    Args:
        model: the whole model: what its family is known for decides first.
        where: path of the block.
        select: the user's function, or None.
        width: feature width D, where it is known.
    """

    def __init__(self, model: nn.Module, where: str, select: Select | None, width: int | None):
        self.model = model
        self.where = where
        self.block = model.get_submodule(where)
        self.select = select
        self.width = width
        self.direct = select is None and not has_known_stream(model, self.block)

    def __call__(
        self, found: BlockOutput, x0: torch.Tensor, condition: Mapping[str, Any]
    ) -> torch.Tensor:
        """The tokens [B, N, D].

        Args:
            found: the block's output.
            x0: the sample.
            condition: what else the model was called with, by name.

        Raises:
            ValueError: an output that has no tokens, or that has several candidates.
        """
        output = found.output
        select = self.select or sample_stream(self.model, self.block, x0, condition)
        if select is not None:
            tokens = select(output)
        elif isinstance(output, (tuple, list)):
            tokens = self._only_stream(found)
        else:
            tokens = output
        if not is_features(tokens):
            raise invalid(
                "A tapped block must give tokens [B, N, D], or features [B, D, H, W] or "
                "[B, D, T, H, W]",
                f"{self.where}: {shapes(tokens)}",
                "Pass select=, a function from the block's output to its tokens.",
            )
        return tokens if tokens.ndim == 3 else self._flattened(tokens)

    def _only_stream(self, found: BlockOutput) -> torch.Tensor:
        """The only tensor [B, N, D] among several outputs, or the one like the sample."""
        features = [part for part in found.output if is_features(part)]
        streams = [part for part in features if part.ndim == 3] or features
        if len(streams) > 1:
            streams = _like_the_sample(streams, self.block, found)
        if len(streams) != 1:
            raise invalid(
                "A block that returns a tuple must hold one tensor [B, N, D], or give back the "
                "streams that it takes",
                f"{self.where}: {shapes(found.output)}",
                "Pass select=, such as select=lambda output: output[1].",
            )
        return streams[0]

    def _flattened(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens out of features on a grid."""
        widths = {self.width} if self.width else _layer_widths(self.block)
        axes = [axis for axis in (1, -1) if tokens.shape[axis] in widths]
        if len(axes) != 1:
            raise invalid(
                "Features on a grid must have the width on one axis, the second or the last",
                f"{self.where}: {shapes(tokens)}, width {self.width or 'unknown'}",
                "Pass width=, and select=, a function from the block's output to its tokens.",
            )
        if axes == [1]:
            return tokens.flatten(2).transpose(1, 2)
        return tokens.flatten(1, -2)


def is_features(part: Output) -> bool:
    """Whether this is a floating tensor of three to five axes."""
    return isinstance(part, torch.Tensor) and part.is_floating_point() and 3 <= part.ndim <= 5


def _layer_widths(block: nn.Module) -> set[int]:
    """Numbers of features that the block's layers give."""
    linear = {m.out_features for m in block.modules() if isinstance(m, nn.Linear)}
    convolutions = [m for m in block.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    return linear | {m.out_channels for m in convolutions}


def _like_the_sample(
    streams: list[torch.Tensor], block: nn.Module, found: BlockOutput
) -> list[torch.Tensor]:
    """The streams that have the shape of the sample's tokens among a block's arguments.

    All of them, where the block did not take them in.
    """
    try:
        bound = inspect.signature(block.forward).bind(*found.args, **found.kwargs)
    except TypeError:
        return streams
    given = bound.arguments
    names = ("hidden_states", "x", "img", "image", "latents")
    sample = next((given[name] for name in names if is_features(given.get(name))), None)
    taken = [value.shape for value in given.values() if isinstance(value, torch.Tensor)]
    if sample is None or any(stream.shape not in taken for stream in streams):
        return streams
    return [stream for stream in streams if stream.shape == sample.shape]


def shapes(output: Output) -> str:
    """An output in an error's text: its shapes."""
    if isinstance(output, torch.Tensor):
        return f"shape {tuple(output.shape)}"
    if isinstance(output, (tuple, list)):
        return f"{type(output).__name__} of ({', '.join(map(shapes, output))})"
    return type(output).__name__
