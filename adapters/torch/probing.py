"""Which tokens are the sample's: found once, by changing the sample.

Attention mixes all tokens, so after one block everything depends on the sample. Therefore the
blocks are passed over meanwhile: each gives back what it was given. A token then depends on its own
part of the sample alone. Text, time, class and padding tokens do not depend on it at all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from selfalign.adapting import invalid

from .arguments import parts_of, with_parts
from .reading import Changes, Place, Reading, Undecided, clear_peaks, find_reading
from .selecting import example, spelled
from .tokens import (
    Output,
    Stream,
    TokenReader,
    features_in,
    is_features,
    most_tokens,
    shapes,
)

Run = Callable[[torch.Tensor], Mapping[str, Output]]  # a sample -> what the tapped blocks return
Difference = dict[Place, torch.Tensor]

_SPOTS = 2  # runs in which one number of each sample is another


class Probe:
    """What changes at the tapped blocks when the sample changes.

    Args:
        run: a forward with its blocks passed over.
        x: a batch of samples as the model sees them.
        readers: of the tapped blocks.
    """

    def __init__(self, run: Run, x: torch.Tensor, readers: Iterable[TokenReader]) -> None:
        self.batch = len(x)
        self.sample = x.shape[1:]
        self.grid = tuple(x.shape[2:])
        self.run = run
        self.x = x
        self.outputs = run(x)
        self.readers = [reader for reader in readers if reader.where in self.outputs]
        first = x.clone()
        another = another_sample(x)
        first[0] = another[0]
        self.others = [run(sample) for sample in (first, another, *_spotted(x))]

    def changes(self, reader: TokenReader) -> dict[Place, Changes]:
        """What depends on the sample in this block's output."""
        first, every, *spots = (self._differences(reader, outputs) for outputs in self.others)
        return {
            place: Changes(first[place], change, [spot[place] for spot in spots])
            for place, change in every.items()
            if change.any()
        }

    def _differences(self, reader: TokenReader, outputs: Mapping[str, Output]) -> Difference:
        """How much each tensor of a block differs from what it was."""
        before = reader.features(self.outputs[reader.where])
        after = reader.features(outputs[reader.where])
        return {
            place: (after[place].float() - tensor.float()).abs().nan_to_num(0.0, 0.0)
            for place, tensor in before.items()
            if place in after and after[place].shape == tensor.shape
        }

    def stream(self, reader: TokenReader) -> Stream:
        """Where this block's output has the sample's tokens.

        Raises:
            Undecided: nowhere, or that cannot be told.
        """
        changes = self.changes(reader)
        if len(changes) != 1:
            raise Undecided(f"{len(changes)} parts of it depend on the sample")
        ((place, change),) = changes.items()
        chosen = reader.select is not None
        reading = find_reading(change, self.batch, reader.widths(), self.grid, chosen)
        tensor = reader.features(self.outputs[reader.where])[place]
        return Stream(place, reading, tensor.shape, self.sample)

    def has_sample(self, reader: TokenReader) -> bool:
        """Whether this block's output has the sample's tokens."""
        try:
            self.stream(reader)
        except Undecided:
            return False
        return True

    def repeats(self, reader: TokenReader) -> bool:
        """Whether this block gives the same for the same samples."""
        differences = self._differences(reader, self.run(self.x))
        return not any(change.any() for change in differences.values())

    def peaks(self, reader: TokenReader) -> list[int | None]:
        """At which token each spot shows most."""
        stream = self.stream(reader)
        return clear_peaks(stream.reading, self.changes(reader)[stream.place].spots)


def another_sample(x: torch.Tensor) -> torch.Tensor:
    """Other samples of the same scale."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(x.shape, generator=generator).to(x)
    return x.float().std(unbiased=False).clamp(min=1e-3).to(x) * noise


def _spotted(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """The samples with another number at one place of each."""
    generator = torch.Generator().manual_seed(1)
    flat = x.flatten(1)
    for _ in range(_SPOTS):
        places = torch.randint(flat.shape[1], (len(x), 1), generator=generator).to(x.device)
        change = 5 * x.float().std(unbiased=False).clamp(min=1e-3).to(x)
        yield flat.scatter_add(1, places, change.expand(len(x), 1)).view(x.shape)


@contextmanager
def passed_over(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Meanwhile, each block gives back what it was given, as far as it returns its like."""
    handles = []
    for block in blocks:
        if not any(True for _ in block.parameters()):
            continue  # it mixes nothing, but may arrange tokens anew
        handles.append(block.register_forward_hook(_give_back, prepend=True, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _give_back(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Output) -> Output:
    given = [tensor for _, tensor in features_in([args, kwargs])]
    return _replaced(output, given)


def _replaced(output: Output, given: list[torch.Tensor]) -> Output:
    """The output with the like among `given` in the place of each tensor.

    Of several like it, the nearest: a block adds to what it is given.
    """
    parts = parts_of(output)
    if parts:
        return with_parts(output, {key: _replaced(part, given) for key, part in parts.items()})
    alike = [tensor for tensor in given if tensor.shape == getattr(output, "shape", None)]
    if not is_features(output) or not alike:
        return output
    return max(alike, key=functools.partial(_nearness, output)).to(output.dtype)


def _nearness(output: torch.Tensor, given: torch.Tensor) -> float:
    pair = (output.detach().flatten().float(), given.detach().flatten().float())
    return float(torch.cosine_similarity(*pair, dim=0))


class Unlike(ValueError):
    """None of a block's tokens depends on the sample.

    Args:
        where: path of the block.
        instead: options that would do, as they are written; empty where none is known.
        reads: whether they read the sample by attention.
    """

    def __init__(self, where: str, instead: str = "", reads: bool = False) -> None:
        self.where = where
        tokens = "are no places of the sample" if reads else "do not depend on the sample"
        fix = f"Pass {instead or 'taps=, paths of two modules that the sample runs through'}."
        latents = (
            "If they are meant (latents, queries that read the sample), pass select=lambda output: "
            "output. Else pass "
        )
        error = invalid(
            "The tokens that are aligned must be the sample's",
            f"{where}, whose tokens {tokens}",
            fix.replace("Pass ", latents) if reads else fix,
        )
        super().__init__(*error.args)


def find_streams(
    probe: Probe, x0: torch.Tensor, reads: Callable[[TokenReader], bool] | None = None
) -> list[Stream]:
    """Where the sample's tokens are, for every reader of a probe.

    Args:
        probe: of all readers.
        x0: the samples.
        reads: whether a block's tokens depend on the sample once all blocks run.

    Raises:
        Unlike: none of a block's tokens depends on the sample.
        ValueError: where its tokens are cannot be told.
    """
    found = []
    for reader in probe.readers:
        output = probe.outputs[reader.where]
        if not reader.features(output):
            raise not_found(probe, reader, "no part of it is [B, N, D]")
        if not probe.changes(reader):
            if reader.select is None or (reads is not None and not reads(reader)):
                raise Unlike(reader.where)
            found.append(_as_selected(reader, output, x0))
            continue
        try:
            stream = probe.stream(reader)
        except Undecided as reason:
            if not probe.repeats(reader):
                raise _unlike_before(reader) from None
            raise not_found(probe, reader, str(reason)) from None
        _check_count(probe, reader, stream, x0)
        found.append(stream)
    return found


def _as_selected(reader: TokenReader, output: Output, x0: torch.Tensor) -> Stream:
    """Latents, which the user took."""
    ((place, tensor),) = reader.features(output).items()
    if tensor.ndim != 3:
        raise invalid(
            "select= must take tokens [B, N, D]",
            f"{reader.where}: {shapes(tensor)}",
            "Reshape them there.",
        )
    return Stream(place, Reading((0, 1, 2)), tensor.shape, x0.shape[1:])


def _unlike_before(reader: TokenReader) -> ValueError:
    return invalid(
        "The model must give the same for the same input",
        f"{reader.where}, which gave something else in another forward",
        "Switch off what it keeps from one forward to the next, such as a cache of features.",
    )


def _check_count(probe: Probe, reader: TokenReader, stream: Stream, x0: torch.Tensor) -> None:
    """Of the sample, a model makes one token a position at most, and `select` keeps no others."""
    tensor = reader.features(probe.outputs[reader.where])[stream.place]
    tokens = stream.reading(tensor).shape[1]
    if tokens > most_tokens(x0):
        raise not_found(
            probe, reader, f"{tokens} tokens depend on a sample of {most_tokens(x0)} positions"
        )
    if reader.select is not None and stream.reading.places is not None:
        of = stream.reading.all_tokens(tensor).shape[1]
        raise invalid(
            "select= must take the sample's tokens only",
            f"{reader.where}: {of} tokens, of which {tokens} depend on the sample",
            "Leave select= out: they are found, or keep these: "
            f"{spelled(stream.reading.places)} of the tokens that it takes.",
        )


def not_found(probe: Probe, reader: TokenReader, reason: str) -> ValueError:
    """The error where the sample's tokens cannot be told."""
    such = example(probe, reader)
    fix = f", such as select={such}." if such else ": reshape them there, and cut other tokens off."
    return invalid(
        "The tokens that are aligned must be the sample's",
        f"{reader.where}: {shapes(probe.outputs[reader.where])}; {reason}",
        f"Pass select=, a function from the block's output to the sample's tokens [B, N, D]{fix}",
    )
