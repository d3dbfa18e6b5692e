"""Buffers: they may grow, come, go, be replaced, and be made in inference mode."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Buffers = dict[str, torch.Tensor | None]
Owner = tuple[nn.Module, nn.Module]  # a module of the teacher, and the model's in its place

_SMALL = 2**12  # numbers; a frozen parameter of fewer may be a counter or statistics


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
    """Meanwhile the model writes into copies of its buffers, and of small frozen parameters.

    The tensors themselves are back afterwards and nothing was written to them: a backward may be
    waiting for them.
    """
    kept = [_Held(module) for module in model.modules()]
    copies: dict[int, torch.Tensor] = {}  # a tensor that several modules hold is one afterwards
    for held in kept:
        for tensors in held.now():
            for name, tensor in tensors.items():
                if tensor is not None and is_state(tensor):
                    if id(tensor) not in copies:
                        copies[id(tensor)] = _copy(tensor)
                    tensors[name] = copies[id(tensor)]
    try:
        yield
    finally:
        for held in kept:
            held.put_back()


class _Held:
    """What a module holds, to be put back."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.before = [dict(tensors) for tensors in self.now()]
        self.hidden = set(module._non_persistent_buffers_set)

    def now(self) -> tuple[Any, Any]:
        """The buffers and the parameters that it holds."""
        return self.module._buffers, self.module._parameters

    def put_back(self) -> None:
        """Hold the tensors again that were there at first."""
        for held, before in zip(self.now(), self.before, strict=True):
            held.clear()
            held.update(before)
        self.module._non_persistent_buffers_set = self.hidden


def is_state(tensor: torch.Tensor) -> bool:
    """Whether a forward may write into a tensor: a buffer, or a small frozen parameter."""
    if not isinstance(tensor, nn.Parameter):
        return True
    return not tensor.requires_grad and tensor.numel() <= _SMALL and type(tensor) is nn.Parameter


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    copied = tensor.detach().clone()
    return nn.Parameter(copied, requires_grad=False) if isinstance(tensor, nn.Parameter) else copied
