"""Whether the student was called with what the caller of align() says."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from selfalign.adapting import invalid, paths

from .arguments import Arguments, Batch, tensors_in
from .second_time import FirstTimes, refused
from .stopping import run_before

if TYPE_CHECKING:
    from .layout import Layout


class Comparison:
    """Compares a student's call with the sample, the time and the condition of align().

    Another sample is a warning, once: models may scale it. Another time or condition is an error,
    and so is a path that runs the other way.

    Args:
        path: the objectives'.

    Attributes:
        times: of the first samples, until there are enough to tell what is a function of them.
    """

    def __init__(self, path: paths.Path) -> None:
        self.opposite = path.reversed()
        self.warned = False
        self.times = FirstTimes()

    def check(
        self,
        layout: Layout,
        call: Arguments,
        x: torch.Tensor,
        batch: Batch,
    ) -> None:
        """Compare where the student's own call is repeated.

        Args:
            layout: of the call.
            call: the student's.
            x: the student's noisy sample, as align() was told.
            batch: what align() was given.

        Raises:
            ValueError: another time, another condition, or a sample of another shape or scale.
        """
        places: dict[Any, Any] = dict(enumerate(call.args))
        places.update(call.kwargs)
        student = places.pop(layout.sample)
        if student.shape != x.shape or not close(student, x):
            self._check_sample(layout.sample, student, x, batch)
        seen = places.pop(layout.time)
        expected = layout.told(batch.t).to(seen.dtype).reshape(layout.shape).expand(seen.shape)
        if not close(seen, expected):
            raise _differing("the time", seen, expected)
        if not self.times.full:
            self._check_no_second_time(places, batch)
        identical = set(map(id, places.values()))
        for value in (*batch.condition.args, *batch.condition.kwargs.values()):
            if id(value) not in identical:
                self._check_condition(places, batch.condition)
                break

    def check_function(
        self,
        module: nn.Module,
        run: Callable[[], Any],
        call: Arguments,
        x: torch.Tensor,
        batch: Batch,
    ) -> None:
        """Compare where a function of the user's, `run`, calls the module: at the student's time.

        Raises:
            ValueError: arguments that differ from those of the student's call.
        """
        student = call.named(module)
        teacher = run_before(run, module, "the model").named(module)
        for name in [*student, *teacher]:
            theirs = student.get(name)
            mine = teacher.get(name)
            if theirs is not None and mine is not None and _same(mine, x):
                self._check_sample(name, theirs, mine, batch)
            elif not _same(theirs, mine):
                raise _differing(name, theirs, mine)

    def _check_no_second_time(self, places: dict[Any, Any], batch: Batch) -> None:
        """What the user does not say to be a condition is no function of the time."""
        given = [value for _, value in tensors_in([batch.condition.args, batch.condition.kwargs])]
        named = {_name(place): value for place, value in places.items()}
        others = {
            name: value
            for name, value in tensors_in(named)
            if not any(_same(value, mine) for mine in given)
        }
        name = self.times.add(batch.t, others)
        if name is not None:
            raise refused(f"{name}, {described(others[name])}, which is in the order of the times")

    def _check_condition(self, places: dict[Any, Any], condition: Arguments) -> None:
        """Each tensor that the caller gave is among the student's."""
        mine = [value for _, value in tensors_in(places)]
        given = [*condition.args, *condition.kwargs.values()]
        for name, value in tensors_in(given, "the condition"):
            if any(value is other for other in mine):
                continue
            if not any(_same(value, other) for other in mine):
                alike = [other for other in mine if other.shape == value.shape]
                raise _differing(name, alike[0] if alike else None, value)

    def _check_sample(
        self, place: int | str, student: torch.Tensor, x: torch.Tensor, batch: Batch
    ) -> None:
        name = _name(place)
        if student.shape != x.shape:
            raise _differing(name, student, x)
        if self.warned or close(student, x):
            return
        if self._runs_the_other_way(student, batch):
            raise invalid(
                "The path must run in the model's direction of time",
                f"{name}, which is the sample at t on {self.opposite!r}",
                f"Pass the loss path=selfalign.paths.{self.opposite!r}.",
            )
        if _is_multiple(student, x):
            raise invalid(
                "The model must have been called with path.add_noise(x0, noise, t) itself",
                f"{name}, a multiple of it",
                "Attach to the model that scales it, or pass call=, which scales for the teacher.",
            )
        self.warned = True
        warnings.warn(
            f"align() must be given the sample that the model saw. Received: {name} "
            f"{described(student)} in the model's call, not path.add_noise(x0, noise, t) "
            f"{described(x)}. Student and teacher see different noise now. Pass the student's x0, "
            "noise and t, and the loss a path with your direction of time."
        )

    def _runs_the_other_way(self, student: torch.Tensor, batch: Batch) -> bool:
        """Whether the sample is that of the reversed path."""
        if self.opposite is None:
            return False
        x = self.opposite.noised(batch.x0, batch.noise, batch.t)
        return close(student, x) or _is_multiple(student, x)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for rounding to half precision."""
    if not (a.is_floating_point() and b.is_floating_point()):
        return torch.equal(a, b.to(a.dtype))
    if a.dtype == b.dtype and torch.equal(a, b):
        return True
    a = a.detach().float()
    b = b.detach().float()
    scale = float(b.abs().max().nan_to_num(posinf=1.0)) if b.numel() else 0.0
    return torch.allclose(a, b, rtol=0, atol=0.01 * scale + 1e-6, equal_nan=True)


def distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How far the tokens [B, N, D] of each sample are apart [B], in lengths of the second."""
    if a.shape != b.shape:
        return torch.full((len(b),), float("inf"))
    a = a.float().flatten(1).nan_to_num()
    b = b.float().flatten(1).nan_to_num()
    return (a - b).norm(dim=1) / b.norm(dim=1).clamp(min=1e-12)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest distance between two samples' tokens [B, N, D], in lengths of the second."""
    apart = distances(a, b)
    return float(apart.max()) if len(apart) else 0.0


def alike(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    """Whether the tokens of all samples are equal but for rounding."""
    return distance(a, b) <= tolerance


def described(tensor: torch.Tensor | None) -> str:
    """A tensor in an error's text: its shape, and the first of its values."""
    if tensor is None:
        return "nothing"
    first = ", ".join(f"{value:.4g}" for value in tensor.detach().flatten()[:3].tolist())
    dots = ", ..." if tensor.numel() > 3 else ""
    return f"shape {tuple(tensor.shape)} [{first}{dots}]"


def _name(place: int | str) -> str:
    return f"argument {place}" if isinstance(place, int) else place


def _is_multiple(student: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether each sample is a multiple of its counterpart."""
    flat = student.detach().float().flatten(1)
    other = x.float().flatten(1)
    norms = other.square().sum(dim=1, keepdim=True).clamp(min=1e-12)
    scale = (flat * other).sum(dim=1, keepdim=True) / norms
    scaled = flat.shape[1] > 1 and bool((scale.abs() > 1e-3).all())
    return scaled and close(flat, scale * other)


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape and close(a, b)


def _differing(name: str, student: torch.Tensor | None, teacher: torch.Tensor | None) -> ValueError:
    return invalid(
        "The teacher must be called as the student was",
        f"{name}: {described(student)} for the student, {described(teacher)} for the teacher at "
        "the student's time",
        "Pass align() the t and the condition that the model got, after label dropout; call= must "
        'arrange them in the same way. If the difference is meant, pass checks="off".',
    )
