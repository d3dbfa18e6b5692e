"""How the teacher is called: as the student was, with another sample and another time."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from selfalign._checks import invalid
from selfalign.paths import Path

from ._torch_taps import run_before

Called = tuple[tuple[Any, ...], dict[str, Any]]  # arguments by position and by name
Unit = Callable[[torch.Tensor], torch.Tensor]


class Layout(NamedTuple):
    """Where sample and time stand in a call, and the model's unit of time."""

    sample: int | str
    time: int | str
    unit: Unit


class Call:
    """Calls the teacher.

    Without a function of the user's, the student's own call is repeated: where sample and time stand in it, and in which unit,
    is found by value in the first step. A condition that the user gives beside it is compared only. With a function, what it
    would call the model with is compared with the student's call. On the CPU this happens in every step, elsewhere in the
    first one only, since it waits for the device.

    Args:
        path: the noise path.
        function: the user's (module, x, t, *condition, **conditions) -> anything, or None.
        trusted: compare nothing.
    """

    def __init__(self, path: Path, function: Callable[..., Any] | None, trusted: bool) -> None:
        self.path, self.function, self.trusted = path, function, trusted
        self.layout: Layout  # once it was looked for; again, as long as it is not certain
        self.certain = self.compared = self.warned = False

    def prepare(self, module: nn.Module, called: Called, noised: Callable[[], Any], t: Any, condition: Called) -> None:
        """Before a teacher's forward, with the student's noised sample and its time: find the layout, and compare.

        Raises:
            ValueError: the student was called with another time or condition. Another sample is a warning.
        """
        given = _places(called)
        unknown = self.function is None and not (self.certain and {*self.layout[:2]} <= given.keys())
        settled = self.trusted or (self.compared and t.device.type != "cpu")
        if settled and not unknown:
            return
        x = noised()
        if unknown:
            self.layout, self.certain = self._find(module, given, x, t)
        if settled:
            return
        if self.function is not None:
            args, kwargs = run_before(lambda: self(module, called, x, t, condition), module, "the model")
            self._compare(_named(module, *called), _named(module, args, kwargs), x)
        else:
            self._compare_layout(self.layout, given, x, t, condition)
        self.compared = True

    def __call__(self, module: nn.Module, called: Called, x: Any, t: Any, condition: Called) -> Any:
        """The teacher's forward on x at t; `called` is the student's call, `condition` what the user gave beside x and t."""
        if self.function is not None:
            return self.function(module, x, t, *condition[0], **condition[1])
        given, (sample, time, unit) = _places(called), self.layout
        if x.shape != given[sample].shape:
            raise invalid("align() must get the student's batch",
                          f"x0 of shape {tuple(x.shape)}, after a model's call with {tuple(given[sample].shape)}",
                          "Pass the x0, noise and t of the model's last forward.")  # fmt: skip
        given[sample] = x.to(given[sample].dtype)
        given[time] = unit(t).to(given[time].dtype).reshape(given[time].shape)
        args = [given.pop(place) for place in range(len(called[0]))]
        return module(*args, **{str(name): value for name, value in given.items()})

    def _find(self, module: nn.Module, given: dict[int | str, Any], x: torch.Tensor, t: torch.Tensor) -> tuple[Layout, bool]:
        """The layout, and whether only one unit of time fits (all do where every time is 0)."""
        tensors = {place: value for place, value in given.items() if isinstance(value, torch.Tensor)}
        shaped = [place for place, value in tensors.items() if value.shape == x.shape]
        samples = [place for place in shaped if close(tensors[place], x)] or shaped
        times = {place: units for place, value in tensors.items() if value.numel() == t.numel() and place not in samples
                 if (units := _units(self.path, value, t))}  # fmt: skip
        if len(times) > 1:  # a label may equal the time by chance: names decide
            names: dict[Any, str] = dict(enumerate(inspect.signature(module.forward).parameters))
            times = {place: units for place, units in times.items() if str(names.get(place, place)).startswith("t")}
        for found, wanted in (
            (samples, "x_t = path.add_noise(x0, noise, t)"),
            (times, "t (as it is, in thousandths, or reversed)"),
        ):
            if len(found) != 1:
                raise invalid("The model must have been called with the x0, noise and t of align()",
                              f"{len(found) or 'no'} arguments like {wanted}, among {_described(tensors)}",
                              "Pass align() what the student saw, and the loss a path with your direction of time. If your "
                              "call arranges or scales them otherwise, pass call=.")  # fmt: skip
        ((place, units),) = times.items()
        return Layout(samples[0], place, units[0]), len(units) == 1

    def _compare_layout(self, layout: Layout, given: dict[int | str, Any], x: Any, t: Any, condition: Called) -> None:
        """The student's sample and time with the caller's, and the caller's condition with the student's."""
        sample, time, unit = layout
        self._check_sample(f"argument {sample}" if isinstance(sample, int) else sample, given[sample], x)
        expected = unit(t).to(given[time].dtype).reshape(given[time].shape)
        if not close(given[time], expected):
            raise _differing("the time", given[time], expected)
        mine = [value for place, value in given.items() for _, value in _tensors("", value) if place not in (sample, time)]
        for name, value in _tensors("the condition", [*condition[0], *condition[1].values()]):
            if not any(value is other or _same(value, other) for other in mine):
                raise _differing(name, next((other for other in mine if other.shape == value.shape), None), value)

    def _compare(self, student: dict[str, torch.Tensor], teacher: dict[str, torch.Tensor], x: torch.Tensor) -> None:
        """Both sides' calls, at the student's sample and time."""
        for name in [*student, *teacher]:
            theirs, mine = student.get(name), teacher.get(name)
            if theirs is not None and mine is not None and mine.shape == x.shape and close(mine, x):
                self._check_sample(name, theirs, mine)
            elif not _same(theirs, mine):
                raise _differing(name, theirs, mine)

    def _check_sample(self, name: str, student: torch.Tensor, x: torch.Tensor) -> None:
        if student.shape != x.shape:
            raise _differing(name, student, x)
        if self.warned or close(student, x):
            return
        flat, other = student.detach().float().flatten(1), x.float().flatten(1)
        scale = (flat * other).sum(dim=1, keepdim=True) / other.square().sum(dim=1, keepdim=True).clamp(min=1e-12)
        if flat.shape[1] > 1 and bool((scale.abs() > 1e-3).all()) and close(flat, scale * other):
            raise invalid("The model must have been called with path.add_noise(x0, noise, t) itself",
                          f"{name}, a multiple of it",
                          "Attach to the model that scales it, or pass call=, which scales for the teacher.")  # fmt: skip
        self.warned = True
        warnings.warn(
            f"align() must be given the sample that the model saw. Received: {name} {_value(student)} in the model's call, "
            f"not path.add_noise(x0, noise, t) {_value(x)}. Student and teacher see different noise now. Pass the student's "
            "x0, noise and t, and the loss a path with your direction of time."
        )


def samples(value: Any, batch: int, part: slice) -> Any:
    """Some samples of a call: these rows of every tensor in it that is as long as the batch."""
    if isinstance(value, torch.Tensor):
        return value[part] if value.ndim and len(value) == batch else value
    if isinstance(value, Mapping):
        return {key: samples(inner, batch, part) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(samples(inner, batch, part) for inner in value)
    return value


def _places(called: Called) -> dict[int | str, Any]:
    """The arguments of a call by their positions, then by their names."""
    places: dict[int | str, Any] = dict(enumerate(called[0]))
    places.update(called[1].items())
    return places


def _units(path: Path, value: torch.Tensor, t: torch.Tensor) -> list[Unit]:
    """The usual ways of telling a model the time that give this value for t: the path's, another scale, data at the far end."""
    low, high = map(float, path.bounds)
    units: list[Unit] = [lambda t: t, lambda t: 1000 * t, lambda t: 1 - t, lambda t: 1000 - 1000 * t]
    if path.discrete:
        count = high + 1
        units = [lambda t: t, lambda t: t / count, lambda t: 1 - t / count]
    elif (low, high) != (0.0, 1.0):
        units = [lambda t: t, lambda t: torch.log(t) / 4]  # EDM's sigma, and its noise conditioning
    rounded: list[Unit] = [lambda t, unit=unit: unit(t).round() for unit in units]  # type: ignore[misc]
    for ways in (units, rounded):
        if fitting := [unit for unit in ways if close(value.flatten(), unit(t).to(value.dtype))]:
            return fitting
    return []


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for rounding to half precision."""
    if not (a.is_floating_point() and b.is_floating_point()):
        return torch.equal(a, b.to(a.dtype))
    a, b = a.detach().float(), b.detach().float()
    scale = float(b.abs().max().nan_to_num(posinf=1.0)) if b.numel() else 0.0
    return torch.allclose(a, b, rtol=0, atol=0.01 * scale + 1e-6, equal_nan=True)


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a call, by the names of the forward's parameters."""
    try:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        given = {**{f"argument {n}": value for n, value in enumerate(args)}, **kwargs}
    return {name: tensor for name, value in given.items() for name, tensor in _tensors(name, value)}


def _tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _tensors(f"{name}[{key!r}]", inner)
    elif isinstance(value, (list, tuple)):
        for key, inner in enumerate(value):
            yield from _tensors(f"{name}[{key}]", inner)


def _differing(name: str, student: torch.Tensor | None, teacher: torch.Tensor | None) -> ValueError:
    return invalid("The teacher must be called as the student was",
                   f"{name}: {_value(student)} for the student, {_value(teacher)} for the teacher at the student's time",
                   "Pass align() the t and the condition that the model got, after label dropout; call= must arrange them in "
                   "the same way. If the difference is meant, pass check_condition=False.")  # fmt: skip


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape and close(a, b)


def _value(tensor: torch.Tensor | None) -> str:
    if tensor is None:
        return "nothing"
    first = ", ".join(f"{value:.4g}" for value in tensor.detach().flatten()[:3].tolist())
    return f"shape {tuple(tensor.shape)} [{first}{', ...' if tensor.numel() > 3 else ''}]"


def _described(tensors: dict[Any, torch.Tensor]) -> str:
    return ", ".join(f"{name}: {_value(tensor)}" for name, tensor in tensors.items()) or "none"
