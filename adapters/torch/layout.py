"""Where the sample and the time stand in a model's call, and in which unit the time is told."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from selfalign.adapting import invalid, paths

from .arguments import Arguments, Place
from .comparing import close, described

Convention = Callable[[torch.Tensor], torch.Tensor]


class Layout(NamedTuple):
    """Where sample and time stand in a call.

    Attributes:
        sample: the sample's place.
        time: the time's place.
        told: gives the time as the model is told it, from the path's time.
        certain: whether only one convention fits; all do where every time is 0.
    """

    sample: Place
    time: Place
    told: Convention
    certain: bool


def find_layout(
    path: paths.Path, module: nn.Module, call: Arguments, x: torch.Tensor, t: torch.Tensor
) -> Layout:
    """Find by value where `x` and `t` stand in a call of `module`.

    Raises:
        ValueError: no argument like them, or several.
    """
    places = call.places()
    tensors = {p: value for p, value in places.items() if isinstance(value, torch.Tensor)}
    shaped = [place for place, value in tensors.items() if value.shape == x.shape]
    equal = [place for place in shaped if close(tensors[place], x)]
    samples = equal or shaped
    _check_single("x_t = path.add_noise(x0, noise, t)", len(samples), tensors)

    times = _times(path, tensors, samples, t)
    if len(times) > 1:  # a label may equal the time by chance: names decide
        names: dict[Any, str] = dict(enumerate(inspect.signature(module.forward).parameters))
        times = {p: ways for p, ways in times.items() if str(names.get(p, p)).startswith("t")}
    _check_single("t (as it is, in thousandths, or reversed)", len(times), tensors)
    ((time, conventions),) = times.items()
    return Layout(samples[0], time, conventions[0], len(conventions) == 1)


def _times(
    path: paths.Path, tensors: dict[Place, torch.Tensor], samples: list[Place], t: torch.Tensor
) -> dict[Place, list[Convention]]:
    """The places of what may be the time, with the conventions that fit."""
    found = {}
    for place, value in tensors.items():
        if value.numel() == t.numel() and place not in samples:
            conventions = fitting_conventions(path, value, t)
            if conventions:
                found[place] = conventions
    return found


def fitting_conventions(path: paths.Path, value: torch.Tensor, t: torch.Tensor) -> list[Convention]:
    """The path's conventions that give this value for the times `t`."""
    flat = value.flatten()
    for group in path.time_conventions():
        fitting = [told for told in group if close(flat, told(t).to(value.dtype))]
        if fitting:
            return fitting
    return []


def _check_single(wanted: str, count: int, tensors: dict[Place, torch.Tensor]) -> None:
    if count != 1:
        listed = ", ".join(f"{place}: {described(tensor)}" for place, tensor in tensors.items())
        raise invalid(
            "The model must have been called with the x0, noise and t of align()",
            f"{count or 'no'} arguments like {wanted}, among {listed or 'none'}",
            "Pass align() what the student saw, and the loss a path with your direction of time. "
            "If your call arranges or scales them otherwise, pass call=.",
        )
