"""Which tensor of the model each average follows, looked up once and checked at every step."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from selfalign.adapting import invalid

from .buffers import Owner, follow
from .sharding import local
from .stopping import Cut

T = TypeVar("T")
_DTYPE = operator.attrgetter("dtype")
_DEVICE = operator.attrgetter("device")
_TRAINS = operator.attrgetter("requires_grad")
_WRAPPED = {"_orig_mod", "_checkpoint_wrapped_module"}  # what wrappers call the block inside


class Pairing:
    """Averages and the model's parameters in one order.

    Walking through a model costs more than an EMA step of a small one. So the lists are kept, and
    `is_fresh` sees whether modules or parameters have been replaced since.

    Args:
        student: the model. Its blocks may be wrapped by now: names are those inside wrappers.
        teacher: its EMA.
        frozen: names of the parameters that the teacher has in common with the model.
        beside: averages of the teacher's parameters that are not averages themselves, by name.
        dtypes: the model's, when the teacher was made.

    Raises:
        ValueError: parameters that have vanished, train now, or have another dtype or shape.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        frozen: set[str],
        beside: Mapping[str, torch.Tensor],
        dtypes: Mapping[str, torch.dtype],
    ) -> None:
        named = named_inside(student.named_parameters())
        teachers = named_inside(teacher.named_parameters())
        own = {name: p for name, p in teachers.items() if name not in frozen}
        _check_kept(named, frozen | own.keys())
        self.frozen = {name: named[name] for name in frozen}
        self.students: list[torch.Tensor] = [named[name] for name in own]
        self.names = list(own)
        self.averages = [local(beside.get(name, p)) for name, p in own.items()]
        self.copies = [(p, beside[name]) for name, p in own.items() if name in beside]
        self.sharded = any(hasattr(p, "to_local") for p in (*named.values(), *own.values()))
        self.dtypes = [dtypes[name] for name in own]
        self.frozen_dtypes = [dtypes[name] for name in self.frozen]
        self.slots = _slots(student, teacher)
        self.owners = buffer_owners(student, teacher)
        self.average_dtypes = list(map(_DTYPE, self.averages))
        self.check()
        sources = self.sources()
        self.alike_at_first = self.average_dtypes == self.dtypes and (
            list(map(_DEVICE, self.averages)) == list(map(_DEVICE, sources))
        )
        for name, average, source in zip(own, self.averages, sources, strict=True):
            if average.shape != source.shape:
                raise self._other_shape(name, average, source)

    def _other_shape(self, name: str, average: torch.Tensor, source: torch.Tensor) -> ValueError:
        """Only sharding may change a shape after attaching, on both sides."""
        received = f"{name!r} {tuple(average.shape)} here, {tuple(source.shape)} in the model"
        if self.sharded:
            rule = "The teacher must be sharded as the model is"
            return invalid(rule, received, "Apply fully_shard to align.teacher in the same way.")
        rule = "The model's parameters must keep the shapes that they had at attaching"
        return invalid(rule, received, "Change the model first, then build SelfAlignment.")

    def is_fresh(self) -> bool:
        """Whether the lists still hold; never for a sharded model, whose parts come and go."""
        if self.sharded:
            return False
        owners, names, values = self.slots
        return all(map(operator.is_, map(dict.get, owners, names), values))

    def check(self) -> None:
        """Dtypes are the model's own, and what was frozen still is: raises ValueError otherwise."""
        if any(map(_TRAINS, self.frozen.values())):
            thawed = next(name for name, p in self.frozen.items() if p.requires_grad)
            raise invalid(
                "What was frozen when SelfAlignment was built must stay frozen: the teacher has "
                "it in common with the model",
                f"{thawed!r}, which trains now",
                "Build SelfAlignment after unfreezing.",
            )
        now = list(map(_DTYPE, [*self.students, *self.frozen.values()]))
        if now != [*self.dtypes, *self.frozen_dtypes]:
            names = [*self.names, *self.frozen]
            pairs = zip(names, [*self.dtypes, *self.frozen_dtypes], now, strict=True)
            name, then, other = next(pair for pair in pairs if pair[1] != pair[2])
            raise invalid(
                "The model must keep the dtype that SelfAlignment was built with",
                f"{name!r}, {then} then and {other} now",
                "Convert the model first, and add hooks that cast before; or train under autocast.",
            )

    def sources(self) -> list[torch.Tensor]:
        """The model's parameters, as far as this process holds them."""
        return [local(p) for p in self.students] if self.sharded else self.students

    def alike(self) -> bool:
        """Whether averages and parameters have the same dtypes and devices.

        Of the devices the first is looked at again: models move as a whole.
        """
        if not (self.alike_at_first and self.averages):
            return False
        moved = self.averages[0].device != self.students[0].device
        return not moved and list(map(_DTYPE, self.averages)) == self.average_dtypes

    def copy_buffers(self) -> None:
        """Make the teacher's buffers those of the model, as they are now."""
        follow(self.owners.values())


def _check_kept(named: Mapping[str, torch.Tensor], wanted: set[str]) -> None:
    missing = next((name for name in sorted(wanted) if name not in named), None)
    if missing is not None:
        raise invalid(
            "The model must keep the parameters that SelfAlignment was built with",
            f"no {missing!r} any more",
            "Build SelfAlignment after adding adapters or parametrizations.",
        )


def _slots(*models: nn.Module) -> tuple[list[Any], list[str], list[Any]]:
    """Every child module and parameter: the dicts where they are kept, their names, and they."""
    owners: list[Any] = []
    names: list[str] = []
    values: list[Any] = []
    for module in (module for model in models for module in model.modules()):
        for kept in (module._modules, module._parameters):
            owners += [kept] * len(kept)
            names += kept.keys()
            values += kept.values()
    return owners, names, values


def buffer_owners(student: nn.Module, teacher: nn.Module) -> dict[str, Owner]:
    """The teacher's modules, each with the model's in its place; without what was cut."""
    modules = named_inside(student.named_modules(remove_duplicate=False))
    owners = {}
    for path, module in named_inside(teacher.named_modules()).items():
        if path in modules and not isinstance(module, Cut):
            owners[path] = (module, modules[path])
    return owners


def named_inside(named: Iterable[tuple[str, T]]) -> dict[str, T]:
    """By name, as if no block was wrapped by torch.compile or for checkpointing.

    A wrapper has its block's name; the block comes after it, and stays.
    """
    return {name_inside(name): value for name, value in named}


def name_inside(name: str) -> str:
    """A name without wrappers' parts of it."""
    if not any(part in name for part in _WRAPPED):
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)
