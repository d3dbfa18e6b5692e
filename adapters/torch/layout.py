"""Where the sample and the time stand in a model's call, and in which unit the time is told."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from selfalign.adapting import invalid, paths

from .arguments import Batch, Place, tensors_in
from .comparing import close, described
from .second_time import refused
from .student import StudentPass

Convention = Callable[[torch.Tensor], torch.Tensor]

_TIME = re.compile(r"(t|times?|timesteps?|sigmas?|noise_labels|noise_levels?|c_noise)")
_SECOND_TIME = re.compile(r"(r|s|h|dt|\w*time(step)?s?(_\w+)?|(t|sigma|delta)_\w+|\w+_(t|sigma))")
_FEW = 8  # more numbers per sample are an embedding
_WHOLE_STEPS = 100  # a time that is told in whole numbers has at least so many of them


class Layout(NamedTuple):
    """Where sample and time stand in a call.

    Attributes:
        sample: the sample's place.
        time: the time's place.
        told: gives the time as the model is told it, from the path's time.
        shape: of the time, -1 where the samples are: it is repeated along the other axes.
        certain: whether only one convention fits; all do where every time is 0.
    """

    sample: Place
    time: Place
    told: Convention
    shape: tuple[int, ...]
    certain: bool


def find_layout(
    path: paths.Path,
    module: nn.Module,
    seen: StudentPass,
    x: torch.Tensor,
    batch: Batch,
) -> Layout:
    """Find by value where the sample and the time stand in a call of `module`.

    Args:
        path: the noise path.
        module: whose forward was called.
        seen: its forward.
        x: the noisy samples.
        batch: what align() was given: their times, and what the user says to be a condition.

    Raises:
        ValueError: no argument like them, or several; a second argument that may be a time, or a
            sample.
    """
    t, condition = batch.t, batch.condition
    tensors = {p: v for p, v in seen.call.places().items() if isinstance(v, torch.Tensor)}
    shaped = [place for place, value in tensors.items() if value.shape == x.shape]
    equal = [place for place in shaped if close(tensors[place], x)]
    samples = equal or shaped
    _check_single("x_t = path.add_noise(x0, noise, t)", len(samples), tensors)

    others = {place: value for place, value in tensors.items() if place not in samples}
    given = [value for _, value in tensors_in([condition.args, condition.kwargs])]
    unknown = {place: value for place, value in others.items() if not _is_among(value, given)}
    times = _times(path, unknown, t) or _times(path, others, t)
    names = _names(module, others)
    if not times:
        _check_a_time_each(path, module, seen.call.places(), t)
    if len(times) > 1:  # a label may equal the time by chance: the name decides
        named = [place for place in times if _TIME.fullmatch(names[place])]
        doubtful = [place for place in times if others[place].is_floating_point()]
        if len(named) == 1 and set(doubtful) <= set(named):
            times = {named[0]: times[named[0]]}
    _check_single("t (as it is, in thousandths, or reversed)", len(times), tensors)
    ((time, (conventions, shape)),) = times.items()
    unknown.pop(time, None)
    _check_no_second_time(path, conventions[0], unknown, names, t)
    _check_no_second_sample(seen.predicted, x, unknown, names)
    return Layout(samples[0], time, conventions[0], shape, len(conventions) == 1)


def _names(module: nn.Module, places: dict[Place, torch.Tensor]) -> dict[Place, str]:
    """What the arguments at these places are called."""
    parameters: dict[Any, str] = dict(enumerate(inspect.signature(module.forward).parameters))
    return {place: str(parameters.get(place, place)) for place in places}


def _times(
    path: paths.Path, tensors: dict[Place, torch.Tensor], t: torch.Tensor
) -> dict[Place, tuple[list[Convention], tuple[int, ...]]]:
    """The places of what may be the time, with the conventions that fit and its shape."""
    found = {}
    for place, value in tensors.items():
        shape = _repeated_shape(value, len(t))
        if shape is not None:
            axis = shape.index(-1) if shape else 0
            first = value.movedim(axis, 0).flatten(1)[:, 0] if value.ndim > 1 else value.reshape(-1)
            conventions = fitting_conventions(path, first, t)
            if conventions:
                found[place] = (conventions, shape)
    return found


def _repeated_shape(value: torch.Tensor, batch: int) -> tuple[int, ...] | None:
    """1 for each axis, -1 for that of the samples, where each sample has one number throughout."""
    if batch == 1 and value.ndim == 0:
        return ()
    axes = [axis for axis, size in enumerate(value.shape) if size == batch]
    if not axes or value.dtype == torch.bool or value.is_complex():
        return None
    if value.numel() != batch and (value.ndim > 2 or axes[0] != 0):
        return None  # features and the like: no need to look at their values
    rows = value.movedim(axes[0], 0).reshape(batch, -1)
    if not torch.equal(rows, rows[:, :1].expand_as(rows)):
        return None
    shape = [1] * value.ndim
    shape[axes[0]] = -1
    return tuple(shape)


def fitting_conventions(path: paths.Path, value: torch.Tensor, t: torch.Tensor) -> list[Convention]:
    """The path's conventions that give these values [B] for the times `t`."""
    for index, group in enumerate(path.time_conventions()):
        rounded = index > 0
        fitting = [told for told in group if _fits(path, told, value, t, rounded)]
        if fitting:
            return fitting
    return []


def _fits(
    path: paths.Path, told: Convention, value: torch.Tensor, t: torch.Tensor, rounded: bool
) -> bool:
    """Whether the model was told `t` so; whole numbers must be fine enough to tell times apart."""
    times = told(t)
    whole = rounded or not value.is_floating_point()
    if whole and times.is_floating_point():
        low, high = _range(path, told)
        if high - low < _WHOLE_STEPS:
            return False
    return close(value, times.to(value.dtype))


def _range(path: paths.Path, told: Convention) -> tuple[float, float]:
    """The smallest and the largest time that the model is told."""
    ends = [float(told(torch.tensor(float(end)))) for end in path.bounds]
    return min(ends), max(ends)


def _check_single(wanted: str, count: int, tensors: dict[Place, torch.Tensor]) -> None:
    if count != 1:
        listed = ", ".join(f"{place}: {described(tensor)}" for place, tensor in tensors.items())
        raise invalid(
            "The model must have been called with the x0, noise and t of align()",
            f"{count or 'no'} arguments like {wanted}, among {listed or 'none'}",
            "Pass align() what the student saw, and the loss a path with your direction of time. "
            "If your call arranges or scales them otherwise, pass call=.",
        )


def _check_a_time_each(
    path: paths.Path, module: nn.Module, places: dict[Place, Any], t: torch.Tensor
) -> None:
    """Refuse one time for a whole batch: each sample's teacher has a time of its own."""
    numbers = {place: v for place, v in places.items() if isinstance(v, (float, int, torch.Tensor))}
    tensors = {place: torch.as_tensor(v, device=t.device) for place, v in numbers.items()}
    names = _names(module, tensors)
    for place, value in tensors.items():
        if value.numel() == 1 and fitting_conventions(path, value.reshape(1).expand(len(t)), t):
            raise invalid(
                "The model must be told a time for each sample",
                f"argument {names[place]!r}, {described(value)}, for {len(t)} samples",
                "Repeat it where you call the model: t.expand(len(x)).",
            )


def _check_no_second_time(
    path: paths.Path,
    told: Convention,
    others: dict[Place, torch.Tensor],
    names: dict[Place, str],
    t: torch.Tensor,
) -> None:
    """Refuse a call with a second number per sample that may be a time: it would stay behind.

    Such a number has a time's name, or differs from sample to sample within the range of times; or
    the time is one of a few numbers per sample, such as the ends of an interval.
    """
    for place, value in others.items():
        may_be = _may_be_time(path, told, value, len(t), names[place])
        if may_be or _has_time_among(value, told(t)):
            received = (
                f"argument {names[place]!r}, {described(value)}, beside the time that was found"
            )
            raise refused(received)


def _check_no_second_sample(
    predicted: list[torch.Size],
    x: torch.Tensor,
    others: dict[Place, torch.Tensor],
    names: dict[Place, str],
) -> None:
    """Refuse a call with a second sample: the model predicts something of its shape, too."""
    beside = [shape for shape in predicted if len(shape) > 2]
    if beside:
        beside.remove(x.shape if x.shape in beside else beside[0])
    for place, value in others.items():
        if value.is_floating_point() and value.shape in beside:
            raise invalid(
                "Each sample that the model is given must be the teacher's own",
                f"argument {names[place]!r}, {described(value)}, for which it predicts something, "
                "too",
                "Pass call=, a function that gives the teacher both with less noise; if it is a "
                "condition, hand it to align() as well.",
            )


def _is_among(value: torch.Tensor, given: list[torch.Tensor]) -> bool:
    """Whether the user said that this is a condition."""
    return any(
        value is other or (value.shape == other.shape and close(value, other)) for other in given
    )


def _has_time_among(value: torch.Tensor, times: torch.Tensor) -> bool:
    """Whether one of a few numbers per sample is the time that the model is told."""
    few = value.ndim == 2 and len(value) == len(times) and 1 < value.shape[1] <= _FEW
    if not few or not value.is_floating_point() or bool((times == times[0]).all()):
        return False
    return any(close(column, times) for column in value.unbind(1))


def _may_be_time(
    path: paths.Path, told: Convention, value: torch.Tensor, batch: int, name: str
) -> bool:
    if _repeated_shape(value, batch) is None:
        return False
    if _SECOND_TIME.fullmatch(name):
        return True
    low, high = _range(path, told)
    flat = value.detach().float().flatten()
    inside = bool(((flat >= low) & (flat <= high)).all())
    return value.is_floating_point() and inside and bool((flat != flat[0]).any())
