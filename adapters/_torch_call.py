"""How the teacher is called: as the student was, with another sample and another time."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
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
    is found by value in the first step. With one, the first step checks that it calls the model as the student was called.
    So a time, a condition or a direction of time that differs between the sides does not go unseen.

    Args:
        path: the noise path.
        function: the user's (module, x, t, *condition, **conditions) -> anything, or None.
        trusted: look for nothing; without a function, call module(x, t, *condition, **conditions).
    """

    def __init__(self, path: Path, function: Callable[..., Any] | None, trusted: bool) -> None:
        self.path, self.function, self.checked = path, function, trusted
        self.layout: Layout | None = None

    def prepare(self, module: nn.Module, called: Called, noised: Callable[[], Any], t: Any, condition: Called) -> None:
        """Once, with the student's noised sample and its time: find the layout, and compare the calls of both sides.

        Raises:
            ValueError: the student was called with another time or condition. Another sample is a warning.
        """
        if self.checked:
            return
        x, unique = noised(), True
        if self.function is None:
            self.layout, unique = self._find(module, called, x, t)
        args, kwargs = run_before(lambda: self(module, called, x, t, condition), module, "the model")
        _compare(_named(module, *called), _named(module, args, kwargs), x)
        self.checked = unique

    def __call__(self, module: nn.Module, called: Called, x: Any, t: Any, condition: Called) -> Any:
        """The teacher's forward on x at t; `called` is the student's call, `condition` what the user gave beside x and t."""
        if self.function is not None:
            return self.function(module, x, t, *condition[0], **condition[1])
        if self.layout is None:
            return module(x, t, *condition[0], **condition[1])
        given = _places(called)
        rest = [place for place, value in given.items() if place not in self.layout[:2] and isinstance(value, torch.Tensor)]
        if len(condition[0]) > len(rest):
            raise invalid("align() takes the condition in the order of the model's call, or none of it",
                          f"{len(condition[0])} tensors for {len(rest)} of the call", "Leave the condition out.")  # fmt: skip
        sample, time = given[self.layout.sample], given[self.layout.time]
        if x.shape != sample.shape:
            raise invalid("align() must get the student's batch",
                          f"x0 of shape {tuple(x.shape)}, after a model's call with {tuple(sample.shape)}",
                          "Pass the x0, noise, t and condition of the model's last forward.")  # fmt: skip
        given.update(zip(rest, condition[0], strict=False))
        given.update(condition[1].items())
        given[self.layout.sample] = x.to(sample.dtype)
        given[self.layout.time] = self.layout.unit(t).to(time.dtype).reshape(time.shape)
        args = [given.pop(place) for place in range(len(called[0]))]
        return module(*args, **{str(name): value for name, value in given.items()})

    def _find(self, module: nn.Module, called: Called, x: torch.Tensor, t: torch.Tensor) -> tuple[Layout | None, bool]:
        """The layout, and whether only one unit of time fits."""
        tensors = {place: value for place, value in _places(called).items() if isinstance(value, torch.Tensor)}
        shaped = [place for place, value in tensors.items() if value.shape == x.shape]
        samples = [place for place in shaped if _close(tensors[place], x)]
        times = [(place, unit) for place, value in tensors.items() if value.numel() == t.numel() and place not in samples
                 for unit in _units(self.path) if _close(value.flatten(), unit(t).to(value.dtype))]  # fmt: skip
        if len({place for place, _ in times}) > 1:  # a label may equal the time by chance: names decide
            names: dict[Any, str] = dict(enumerate(inspect.signature(module.forward).parameters))
            times = [(place, unit) for place, unit in times if str(names.get(place, place)).startswith("t")]
        if len(samples or shaped) != 1 or (samples and not times):
            wrong = "t: as it is, in thousandths, or reversed" if samples else "x_t = path.add_noise(x0, noise, t)"
            raise invalid("The model must have been called with the x0, noise and t of align()",
                          f"not exactly one argument like {wrong}, among {_described(tensors)}",
                          "Pass align() what the student saw, and the loss a path with your direction of time. If your call "
                          "arranges them otherwise, pass call=.")  # fmt: skip
        return (Layout((samples or shaped)[0], *times[0]), len(times) == 1) if times else (None, True)


def _places(called: Called) -> dict[int | str, Any]:
    """The arguments of a call by their positions, then by their names."""
    places: dict[int | str, Any] = dict(enumerate(called[0]))
    places.update(called[1].items())
    return places


def _units(path: Path) -> list[Unit]:
    """Usual ways of telling a model the time: the path's, the other scale, and both with data at the far end."""
    low, high = map(float, path.bounds)
    if path.discrete:
        count = high + 1
        return [lambda t: t, lambda t: t / count, lambda t: 1 - t / count]
    if (low, high) != (0.0, 1.0):
        return [lambda t: t, lambda t: torch.log(t) / 4]  # EDM's sigma, and its noise conditioning
    return [lambda t: t, lambda t: 1000 * t, lambda t: 1 - t, lambda t: 1000 - 1000 * t]


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
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


def _compare(student: dict[str, torch.Tensor], teacher: dict[str, torch.Tensor], x: torch.Tensor) -> None:
    """Both sides' calls, at the student's sample and time."""
    for name, mine in teacher.items():
        if mine.shape == x.shape and _close(mine, x) and name in student and not _same(student[name], mine):
            warnings.warn(
                f"align() must be given the sample that the model saw. Received: {name} {_value(student[name])} in the model's "
                f"call, not path.add_noise(x0, noise, t) {_value(x)}. Student and teacher see different noise now. Pass the "
                "student's x0, noise and t, and the loss a path with your direction of time."
            )
            return
    for name in [*student, *teacher]:
        if not _same(student.get(name), teacher.get(name)):
            raise invalid("The teacher must be called as the student was",
                          f"{name}: {_value(student.get(name))} for the student, {_value(teacher.get(name))} for the teacher "
                          "at the student's time",
                          "Pass align() the t and the condition that the model got, after label dropout; call= must arrange "
                          "them in the same way. If the difference is meant, pass check_condition=False.")  # fmt: skip


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape and _close(a, b)


def _value(tensor: torch.Tensor | None) -> str:
    if tensor is None:
        return "nothing"
    first = ", ".join(f"{value:.4g}" for value in tensor.detach().flatten()[:3].tolist())
    return f"shape {tuple(tensor.shape)} [{first}{', ...' if tensor.numel() > 3 else ''}]"


def _described(given: dict[Any, Any]) -> str:
    return ", ".join(f"{name}: {_value(value) if isinstance(value, torch.Tensor) else type(value).__name__}"
                     for name, value in given.items()) or "none"  # fmt: skip
