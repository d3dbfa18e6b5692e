"""The teacher's forward of a step: on the student's batch or the first samples of it, called as the student was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from selfalign._checks import invalid
from selfalign.loss import SRALoss

from ._torch_call import Call, Called, close, samples
from ._torch_condition import Condition, Recorded
from ._torch_distributed import release
from ._torch_families import stream
from ._torch_taps import Reached, Select, Tap, evaluating, tokens_of


class Inputs(NamedTuple):
    """What a step's term is made of, beside the student's features."""

    x0: torch.Tensor
    noise: torch.Tensor
    t: torch.Tensor
    u: torch.Tensor
    called: Called  # the student's call
    condition: Called  # what the user gave beside x0, noise and t
    recorded: Recorded

    def first(self, count: int) -> Inputs:
        """The same for the first samples: of every tensor whose first axis is as long as the batch."""
        batch, part, (indices, marks) = len(self.t), slice(count), self.recorded
        parts = {name: samples(getattr(self, name), batch, part) for name in self._fields}
        return self._replace(**parts | {"recorded": Recorded(samples(indices, batch, part), marks)})


class Forward:
    """Computes the teacher's tokens.

    Args:
        student, teacher: the model and its EMA.
        loss: the settings.
        tap: the student's tap.
        start, end: paths of the first block and of the teacher's tapped one.
        width: feature width D.
        select, call: the user's functions, or None.
        trusted: compare nothing, try nothing out.
        compiled: options of torch.compile, or None.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, loss: SRALoss, tap: Tap, start: str, end: str, width: int,
                 select: Select | None, call: Callable[..., Any] | None, trusted: bool,
                 compiled: Mapping[str, Any] | None) -> None:  # fmt: skip
        self.student, self.teacher, self.loss = student, teacher, loss
        self.end, self.width, self.select = end, width, select
        self.call = Call(loss.path, call, trusted)
        self.condition = Condition(student, teacher, tap, start, end, trusted, compiled)

    @torch.no_grad()
    def __call__(self, inputs: Inputs) -> torch.Tensor:
        """The teacher's tokens [B, N, D]: same sample, noise and condition, a little less noise."""
        x0, noise, t, u, called, condition, recorded = inputs
        path = self.loss.path
        t_teacher = self.loss.teacher_time(t, u)
        x_teacher = path.add_noise(x0, noise, t_teacher)
        self.call.prepare(self.teacher, called, lambda: path.add_noise(x0, noise, t), t, condition)

        def forward(time: torch.Tensor) -> Any:
            return self.call(self.teacher, called, x_teacher, time, condition)

        clean = torch.full_like(t, path.clean_at)
        given = [*condition[0], *condition[1].values(), *called[0], *called[1].values()]
        with _as_teacher(self.teacher):
            reached = self.condition.run(forward, t, t_teacher, clean, given, recorded)
        block = self.teacher.get_submodule(self.end)
        select = self.select or stream(self.student, block, x0, {**called[1], **condition[1]})
        return tokens_of(reached, select, block, self.end, self.width)


def check_share(tokens: torch.Tensor, expected: torch.Tensor) -> None:
    """Refuse a model whose first samples do not have the tokens that they have amid the whole batch."""
    if tokens.shape != expected.shape or not close(tokens, expected):
        raise invalid("batch_share= needs samples that do not depend on each other",
                      f"tokens {tuple(tokens.shape)} that differ from those of the whole batch, {tuple(expected.shape)}",
                      "A tensor of the model's call may have the batch's length by chance, or not be sample by sample: "
                      "leave batch_share= out.")  # fmt: skip


@contextmanager
def _as_teacher(teacher: nn.Module) -> Iterator[None]:
    """Eval mode, and what a forward that ends early has gathered is given back."""
    fast = torch.backends.mha.get_fastpath_enabled()  # PyTorch's own way of inference: padded tokens vanish in it
    torch.backends.mha.set_fastpath_enabled(False)
    try:  # a teacher of ours is in eval mode; a user's own EMA gets its modes back
        with evaluating(teacher) if teacher.training else nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        release(teacher)


def own_tokens(model: nn.Module, where: str, reached: Reached | None, select: Select | None, width: int, x0: torch.Tensor,
               condition: dict[str, Any]) -> torch.Tensor:  # fmt: skip
    """The target without a teacher: the model's own tokens, from the student's forward."""
    block = model.get_submodule(where)
    if reached is None:
        raise invalid("The teacher's layer must run in the student's forward", f"no output of {where}",
                      "Choose a layer that runs for every input.")  # fmt: skip
    return tokens_of(reached, select or stream(model, block, x0, condition), block, where, width).detach()


def autocasting(device: torch.device, autocast: tuple[bool, torch.dtype]) -> torch.autocast:
    """A context in the precision that a tap has recorded."""
    return torch.autocast(device.type, dtype=autocast[1], enabled=autocast[0])
