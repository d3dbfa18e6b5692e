"""The arguments of a call: by position and by name, in parts, and the tensors in them."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

Nest: TypeAlias = Any  # dicts, lists, tuples and dataclasses, with tensors in them
Place = int | str  # of an argument: its position, or its name


class Arguments(NamedTuple):
    """What a module was called with.

    Attributes:
        args: by position.
        kwargs: by name.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}  # noqa: RUF012  (never written to)

    def places(self) -> dict[Place, Any]:
        """The arguments by their positions, then by their names."""
        places: dict[Place, Any] = dict(enumerate(self.args))
        places.update(self.kwargs)
        return places

    def named(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """The tensors in the arguments, by the names of the parameters of `module.forward`."""
        try:
            bound = inspect.signature(module.forward).bind(*self.args, **self.kwargs)
            given: dict[str, Any] = bound.arguments
        except (TypeError, ValueError):
            given = {f"argument {n}": value for n, value in enumerate(self.args)} | self.kwargs
        return dict(tensors_in(given))

    def first(self, count: int, batch: int) -> Arguments:
        """The same for the first `count` samples of a batch."""
        return Arguments(*first_samples((self.args, self.kwargs), count, batch))


class Batch(NamedTuple):
    """What align() was given.

    Attributes:
        x0: clean samples [B, ...].
        noise: of their shape.
        t: the student's times [B].
        u: draws [B] for the gap; None where no teacher needs them.
        condition: what else was given, by position and by name.
    """

    x0: torch.Tensor
    noise: torch.Tensor
    t: torch.Tensor
    u: torch.Tensor | None
    condition: Arguments

    def first(self, count: int) -> Batch:
        """The same for the first samples: of every tensor that is as long as the batch."""
        batch = len(self.t)
        x0, noise, t, u = first_samples(tuple(self[:4]), count, batch)
        return Batch(x0, noise, t, u, self.condition.first(count, batch))


def tensors_by_place(
    value: Nest, place: tuple[Any, ...] = ()
) -> Iterator[tuple[tuple[Any, ...], torch.Tensor]]:
    """The tensors in a nest, each with its indices, keys and names of fields."""
    if isinstance(value, torch.Tensor):
        yield place, value
    for key, inner in parts_of(value).items():
        yield from tensors_by_place(inner, (*place, key))


def at_place(value: Nest, place: tuple[Any, ...]) -> Any:
    """What is at a place of `tensors_by_place`."""
    for key in place:
        value = parts_of(value)[key]
    return value


def cloned(value: Nest) -> Any:
    """The nest with copies of its tensors, in lists and dicts of its own."""
    return mapped(torch.clone, value)


def anew(value: Nest) -> Any:
    """The nest with the same tensors, in lists and dicts of its own."""
    return mapped(lambda tensor: tensor, value)


def mapped(function: Callable[[torch.Tensor], torch.Tensor], value: Nest) -> Any:
    """The nest with a function of each tensor in its place."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, (list, dict)) and not value:
        return copy.copy(value)
    parts = {key: mapped(function, part) for key, part in parts_of(value).items()}
    return with_parts(value, parts) if parts else value


def written(value: Nest, place: tuple[Any, ...]) -> str:
    """How what is at a place is taken, as it is written in Python."""
    if not place:
        return ""
    first, *rest = place
    indexed = isinstance(value, (tuple, list, dict))
    taken = f"[{first!r}]" if indexed else f".{first}"
    return taken + written(parts_of(value)[first], tuple(rest))


def with_tensor(value: Nest, place: tuple[Any, ...], tensor: torch.Tensor) -> Any:
    """The nest with another tensor at a place."""
    if not place:
        return tensor
    first, *rest = place
    parts = parts_of(value)
    return with_parts(value, parts | {first: with_tensor(parts[first], tuple(rest), tensor)})


def parts_of(value: Nest) -> dict[Any, Any]:
    """The parts of a nest by their indices, keys or names of fields; none of what is no nest."""
    if isinstance(value, (tuple, list)):
        return dict(enumerate(value))
    if isinstance(value, dict):
        return dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {}


def with_parts(value: Nest, parts: Mapping[Any, Any]) -> Any:
    """A nest of the same kind with other parts."""
    if isinstance(value, (tuple, list)):
        make = getattr(value, "_make", type(value))  # named tuples have a function for it
        return make(parts.values())
    if isinstance(value, dict) and hasattr(type(value), "__getattr__"):
        new = type(value).__new__(type(value))  # copy() would take entries for its own hooks
    else:
        new = copy.copy(value)
    for key, part in parts.items():
        if isinstance(value, dict):
            new[key] = part
        else:
            object.__setattr__(new, key, part)  # fields may be frozen
    return new


def tensors_in(value: Nest, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in a nest of dicts, lists and tuples, each with where it is, in words."""
    for place, tensor in tensors_by_place(value):
        where = name
        for key in place:
            where = f"{where}[{key!r}]" if where or not isinstance(key, str) else key
        yield where, tensor


def samples(value: Nest, part: slice, batch: int) -> Any:
    """Some samples: these rows of every tensor in the nest that is as long as the batch.

    And of every list of strings that is, such as prompts.
    """
    if isinstance(value, torch.Tensor):
        return value[part] if value.ndim and len(value) == batch else value
    if isinstance(value, Mapping):
        return {key: samples(inner, part, batch) for key, inner in value.items()}
    if type(value) in (list, tuple):
        if len(value) == batch and all(isinstance(entry, str) for entry in value):
            return value[part]
        return type(value)(samples(inner, part, batch) for inner in value)
    return value


def first_samples(value: Nest, count: int, batch: int) -> Any:
    """The first `count` samples, see `samples`."""
    return samples(value, slice(count), batch)
