"""An EMA that the user keeps up to date, as the teacher."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from selfalign.adapting import invalid

from .average import HALF, check_same_tensors, plain_names
from .buffers import follow
from .copying import copied
from .pairing import buffer_owners
from .standing import Standing


class Followed:
    """The module inside an EMA of the user's. It is read, never written to.

    It is torch's AveragedModel, ema-pytorch's, timm's or diffusers' EMA, or a plain module.

    Args:
        student: the model.
        given: the user's.

    Raises:
        ValueError: an EMA with other tensors than the model's, or in half precision.
    """

    owned = False
    started = False
    dtype: torch.dtype | None = None

    def __init__(self, student: nn.Module, given: Any) -> None:
        self.student = student
        self.shadow = given if hasattr(given, "shadow_params") else None
        self.module = _shadowed(student, given) if self.shadow is not None else _inner(given)
        if self.shadow is None:
            theirs = plain_names(dict(self.module.named_parameters(remove_duplicate=False)))
            mine = plain_names(dict(student.named_parameters(remove_duplicate=False)))
            check_same_tensors("teacher=", theirs, mine)  # its buffers are the user's business
            _check_precision(self.module)
        self.standing = Standing(given, student, self._averages)

    def _averages(self) -> Iterable[torch.Tensor]:
        """The tensors that the user keeps up to date."""
        if self.shadow is None:
            return self.module.parameters()
        averages: list[torch.Tensor] = self.shadow.shadow_params
        return averages

    def start(self, trains: bool) -> None:
        """Before a forward of the teacher: diffusers' EMA is a list, whose tensors may change."""
        if self.shadow is None:
            return
        for p, average in zip(self.module.parameters(), self.shadow.shadow_params, strict=True):
            p.data = average  # EMAModel replaces its tensors when it is loaded or moved

    def update(self, decay: float) -> None:
        """The user does it; buffers beside a list of parameters are the model's."""
        self.standing.note()
        if self.shadow is not None:
            follow(buffer_owners(self.student, self.module).values())

    def state(self) -> dict[str, torch.Tensor]:
        """Empty: the user saves it."""
        return {}

    def buffers(self) -> dict[str, torch.Tensor | None]:
        """None that are saved."""
        return {}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Nothing."""


def _shadowed(student: nn.Module, given: Any) -> nn.Module:
    """A copy of the model for diffusers' EMA, which keeps a list of tensors."""
    module = copied(student, {})
    expected = [p.shape for p in module.parameters()]
    if [p.shape for p in given.shadow_params] != expected:
        raise invalid(
            "teacher= must have the same tensors as this model",
            f"{len(given.shadow_params)} tensors",
            "Build EMAModel from model.parameters().",
        )
    return module


def _inner(given: Any) -> nn.Module:
    """The module inside an EMA."""
    candidates = [getattr(given, name, None) for name in ("ema_model", "module")]
    for candidate in (*candidates, given):
        if isinstance(candidate, nn.Module):
            return candidate
    raise invalid(
        "teacher= must be an EMATeacher, a module, or an EMA around one",
        f"{type(given).__name__} {given!r:.60}",
        "Pass a module, an EMA of torch, ema-pytorch, timm or diffusers, or EMATeacher(...); paths "
        "of modules are taps=.",
    )


def _check_precision(module: nn.Module) -> None:
    half = next((name for name, p in module.named_parameters() if p.dtype in HALF), None)
    if half is not None:
        raise invalid(
            "An EMA must be kept in float32 at least: in half precision it never moves",
            f"{half!r} in half precision",
            "Keep it in float32, or let SelfAlignment keep the EMA.",
        )
