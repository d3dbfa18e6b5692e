"""Buffers: they may grow, come, go, be replaced, and be made in inference mode."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

Buffers = dict[str, torch.Tensor | None]
Owner = tuple[nn.Module, nn.Module]  # a module of the teacher, and the model's in its place


def follow(owners: Iterable[Owner]) -> None:
    """Make the teacher's buffers those of the model, as they are now."""
    for mine, theirs in owners:
        if mine._buffers or theirs._buffers:
            _replace(mine._buffers, theirs._buffers)
            mine._non_persistent_buffers_set = set(theirs._non_persistent_buffers_set)


def _replace(kept: Buffers, values: Buffers) -> None:
    """Keep these buffers, and no others."""
    for name in kept.keys() - values.keys():
        del kept[name]
    for name, value in values.items():
        put(kept, name, value)


@torch.no_grad()
def put(kept: Buffers, name: str, value: torch.Tensor | None) -> None:
    """Keep a copy of a buffer: in place where that is possible, since others may hold it."""
    old = kept.get(name)
    if value is None:
        kept[name] = None
    elif old is not None and _takes(old, value):
        old.copy_(value)
    else:
        kept[name] = value.detach().clone()


def saved_buffers(owners: Mapping[str, Owner]) -> Iterator[tuple[str, Buffers, str]]:
    """What a state holds of buffers: path, where the teacher keeps it, and its name there."""
    for path, (mine, theirs) in owners.items():
        hidden = mine._non_persistent_buffers_set | theirs._non_persistent_buffers_set
        for name in {**mine._buffers, **theirs._buffers}:
            if name not in hidden:
                yield f"{path}.{name}".lstrip("."), mine._buffers, name


def _takes(old: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `value` can be written into `old`: not into inference or expanded tensors."""
    alike = old.shape == value.shape and old.dtype == value.dtype
    return (
        alike and not old.is_inference() and (old.layout != torch.strided or 0 not in old.stride())
    )


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put the model's buffers back afterwards."""
    kept: list[tuple[nn.Module, Buffers, Buffers, set[str]]] = []
    for module in model.modules():
        buffers = dict(module._buffers)
        values = {name: _copy(buffer) for name, buffer in buffers.items()}
        kept.append((module, buffers, values, set(module._non_persistent_buffers_set)))
    try:
        yield
    finally:
        for module, buffers, values, hidden in kept:
            module._buffers.clear()
            module._buffers.update(buffers)  # the tensors themselves, then their values
            _replace(module._buffers, values)
            module._non_persistent_buffers_set = hidden


def _copy(buffer: torch.Tensor | None) -> torch.Tensor | None:
    return None if buffer is None else buffer.detach().clone()
