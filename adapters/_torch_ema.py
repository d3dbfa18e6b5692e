"""The EMA teacher of a PyTorch model: an exact copy, or one that the user keeps, with averages in float32 at least."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn

from selfalign._checks import invalid


class Teacher:
    """The teacher module and its averages.

    A half-precision parameter has a float32 average beside it, since 1 - decay is lost in half precision; any other parameter
    of the teacher is its own average.
    """

    def __init__(self, student: nn.Module, given: nn.Module | None) -> None:
        self.student, self.owned = student, given is None
        if given is None:
            self.module = copy.deepcopy(student).requires_grad_(False).eval()
            parameters = [p.detach() for p in self.module.parameters()]
            self.averages = [p if p.dtype in (torch.float32, torch.float64) else p.float() for p in parameters]
        else:
            self.module = given.module if isinstance(given, torch.optim.swa_utils.AveragedModel) else given
            check_same_tensors("teacher=", self.module.state_dict(), student.state_dict())
            self.averages = []

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """One EMA step; buffers are copied. A teacher that the user keeps is left alone."""
        if not self.owned:
            return
        students = [p.detach().to(a.dtype) for a, p in zip(self.averages, self.student.parameters(), strict=True)]
        # lerp is the framework's own fused form of selfalign.ema_update; a test holds the two equal
        torch._foreach_lerp_(self.averages, students, 1.0 - decay)
        self._write_back()
        for mine, theirs in zip(self.module.buffers(), self.student.buffers(), strict=True):
            mine.copy_(theirs)

    def _write_back(self) -> None:
        for parameter, average in zip(self.module.parameters(), self.averages, strict=True):
            if parameter.dtype != average.dtype:
                parameter.copy_(average)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The teacher's tensors, averages in place of half-precision parameters; empty where the user keeps the EMA."""
        if not self.owned:
            return {}
        names = [name for name, _ in self.module.named_parameters()]
        return {**self.module.state_dict(), **dict(zip(names, self.averages, strict=True))}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])
        if self.owned:
            self._write_back()


def check_same_tensors(what: str, given: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Both hold tensors of the same names and shapes; the error names the first that differs."""
    for name in [*expected, *given]:
        shapes = [tuple(side[name].shape) if name in side else "missing" for side in (given, expected)]
        if shapes[0] != shapes[1]:
            raise invalid(f"{what} must have the same tensors as this model", f"{name!r} {shapes[0]} instead of {shapes[1]}",
                          "Use the model, and the wrappers around it, that the tensors were saved from.")  # fmt: skip
