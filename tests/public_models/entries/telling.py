"""Picks, calls and small batches that several entries have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers_models import UNITS, _build
from entry import Condition, Entry, first
from torch import nn

Pick = Callable[[Any, Condition], torch.Tensor]
Run = Callable[[nn.Module, torch.Tensor, torch.Tensor, Condition], Any]

TEXT = 7  # text tokens
WIDTH = 24  # their features


def last(count: int) -> Pick:
    """One sequence, the sample's `count` tokens at its end."""
    return lambda output, condition: output[:, -count:]


def begin(count: int) -> Pick:
    """One sequence, the sample's `count` tokens at its start."""
    return lambda output, condition: output[:, :count]


def part(place: int) -> Pick:
    """One of several streams that a block returns."""
    return lambda output, condition: output[place]


def part_or(place: int, pick: Pick) -> Pick:
    """Double blocks return several streams, single ones one sequence."""

    def choose(output: Any, condition: Condition) -> Any:
        return output[place] if isinstance(output, tuple) else pick(output, condition)

    return choose


def told(unit: str, time: str = "timestep") -> Run:
    """The call of a class of diffusers, told the time in this unit by this name."""

    def run(model: nn.Module, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> Any:
        named = {"hidden_states": x, time: UNITS[unit](t)}
        return model(**named, return_dict=False, **condition)

    return run


def text(size: int, **others: Any) -> Condition:
    return {"encoder_hidden_states": torch.randn(size, TEXT, WIDTH), **others}


def ids(height: int, width: int) -> torch.Tensor:
    sides = (1.0, float(height), float(width))
    return torch.cartesian_prod(*(torch.arange(side) for side in sides))


class Entries(list[Entry]):
    """Entries of diffusers' classes, added one by one."""

    def add(
        self,
        name: str,
        shape: tuple[int, ...],
        rest: Callable[[int], Condition],
        tokens: int,
        lists: tuple[str, ...],
        config: dict[str, Any],
        pick: Pick = first,
        unit: str = "unit",
        run: Run | None = None,
        layers: tuple[int, int] | None = None,
        **more: Any,
    ) -> None:
        """Add one class.

        Args:
            name: of the class.
            shape: of a sample.
            rest: size -> forward's other arguments.
            tokens: of a sample.
            lists: paths of the trunk's lists of blocks: of three blocks if it is one, of two
                each if there are two.
            config: of the model.
            pick: takes the sample's tokens out of a block's output.
            unit: in which `timestep` is told.
            run: the call, where it is not by `hidden_states` and `timestep`.
            layers: the student's and the teacher's.
            **more: fields of the entry.
        """
        target = f"{lists[1]}.0" if len(lists) > 1 else f"{lists[0]}.1"
        self.append(
            Entry(
                name,
                lambda: _build(name, config),
                lambda size: (torch.randn(size, *shape), rest(size)),
                tokens,
                (f"{lists[0]}.0", target),
                layers or ((1, 3) if len(lists) > 1 else (1, 2)),
                pick,
                run or told(unit),
                **more,
            )
        )
