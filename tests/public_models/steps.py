"""Three steps of training with one model, and the same tokens taken by hand."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from entry import Entry
from noise import GAP
from torch import nn

import selfalign
from selfalign.adapters.torch import SelfAlignment

STEPS = 3
DECAY = 0.5
CLOSE = 1e-4  # of the tokens' standard deviation


class Differs(Exception):
    """Tokens that are not those taken by hand."""


class Pairs:
    """A distance that keeps what it is given: the projected tokens and the target's."""

    def __init__(self) -> None:
        self.last: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self.last = (student.detach(), target.detach())
        return (student - target).square().mean(dim=-1)


class Run:
    """The user's loop around one model, and the same by hand beside it."""

    def __init__(self, entry: Entry) -> None:
        torch.manual_seed(0)
        self.entry = entry
        self.model = entry.build()
        self.model.train()  # which may return None
        self.plain = copy.deepcopy(self.model)  # the teacher by hand
        self.plain.eval()
        self.pairs = Pairs()
        self.student = self.teacher = 0.0
        self.blocks: list[str] = []
        self.tokens = 0
        self.labels: dict[str, list[torch.Tensor]] = {}

    def go(self, **options: Any) -> None:
        """Attach, and train for some steps.

        Raises:
            ValueError, TypeError: what selfalign says.
            Differs: other tokens than those taken by hand.
        """
        student, teacher = self.entry.layers
        loss = selfalign.SRALoss(
            student_layer=student,
            teacher_layer=teacher,
            path=self.entry.noise.path,
            distance=self.pairs,
            max_gap=GAP,
            decay=DECAY,
        )
        align = SelfAlignment(self.model, loss, seed=1, **options)
        self.blocks = list(align.taps)
        try:
            for step in range(STEPS):
                self.step(align, step)
        finally:
            align.detach()

    def step(self, align: SelfAlignment, number: int) -> None:
        """One step of training, compared."""
        entry = self.entry
        torch.manual_seed(100 + number)
        x0, condition = entry.batch(entry.size)
        noise = torch.randn_like(x0)
        t = entry.noise.draw(entry.size)
        u = 0.5 + 0.5 * torch.rand(entry.size)
        x_t = entry.noise.noised(x0, noise, t)
        with captured(self.model, entry.taps[0]) as outputs, self.labels_kept():
            prediction = entry.run(self.model, x_t, t, condition)
        if number == 0:  # a model may normalise its weights in its forward
            self.plain.load_state_dict(self.model.state_dict())
        term = align(x0, noise, t, u=u, **self.told(condition))
        own = entry.pick(outputs[0], condition).detach()

        earlier = entry.noise.earlier(t, u)
        x_s = entry.noise.noised(x0, noise, earlier)
        target = self.by_hand(x_s, earlier, condition)
        assert self.pairs.last is not None
        projected, given = self.pairs.last
        with torch.no_grad():
            expected = align.projector(own)
        self.tokens = given.shape[0] * given.shape[1] // entry.size
        self.student = max(self.student, difference(projected, expected, "student"))
        self.teacher = max(self.teacher, difference(given, target, "teacher"))
        if number:  # before, zero-initialised gates may hide what a block is told
            self.check_that_errors_show(x_s, t, earlier, condition, target)

        (first_tensor(prediction).float().square().mean() + term).backward()
        self.move(align)

    def told(self, condition: dict[str, Any]) -> dict[str, Any]:
        """What `call=` is handed beside sample and time."""
        return {"condition": condition} if self.with_call else {}

    with_call = False

    def by_hand(self, x: torch.Tensor, t: torch.Tensor, condition: dict[str, Any]) -> Any:
        """The teacher's tokens, by a plain forward of a plain copy."""
        taps = captured(self.plain, self.entry.taps[1])
        with torch.no_grad(), taps as outputs, self.labels_given():
            self.entry.run(self.plain, x, t, condition)
        return self.entry.pick(outputs[0], condition)

    def check_that_errors_show(
        self,
        x: torch.Tensor,
        students_time: torch.Tensor,
        time: torch.Tensor,
        condition: dict[str, Any],
        target: torch.Tensor,
    ) -> None:
        """Another time and other weights give other tokens: else the comparison sees nothing."""
        other_time = self.by_hand(x, students_time, condition)
        average = copy.deepcopy(self.plain.state_dict())
        self.plain.load_state_dict(self.model.state_dict())
        other_weights = self.by_hand(x, time, condition)
        self.plain.load_state_dict(average)
        for name, other in (("time", other_time), ("weights", other_weights)):
            if relative(other, target) < 2 * CLOSE:
                raise AssertionError(f"{self.entry.name}: the teacher's tokens hide its {name}")

    def move(self, align: SelfAlignment) -> None:
        """A step of an optimizer, with an EMA by hand."""
        with torch.no_grad():
            for p in (*self.model.parameters(), *align.projector.parameters()):
                if p.requires_grad and p.is_floating_point():
                    p.add_(0.1 * torch.randn_like(p))
            align.update()
            for mine, theirs in zip(self.plain.parameters(), self.model.parameters(), strict=True):
                if theirs.requires_grad:
                    mine.mul_(DECAY).add_(theirs, alpha=1 - DECAY)
            for mine, theirs in zip(self.plain.buffers(), self.model.buffers(), strict=True):
                mine.copy_(theirs)
        self.model.zero_grad()
        align.projector.zero_grad()

    @contextmanager
    def labels_kept(self) -> Iterator[None]:
        """Keep the labels that the student looks up, after its own dropping."""
        self.labels = {path: [] for path in self.entry.dropped}

        def keep(path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
            self.labels[path].append(args[0].detach().clone())

        with hooked(self.model, self.entry.dropped, keep):
            yield

    @contextmanager
    def labels_given(self) -> Iterator[None]:
        """The same labels for the teacher by hand."""
        left = {path: list(labels) for path, labels in self.labels.items()}

        def give(path: str, module: nn.Module, args: tuple[Any, ...]) -> Any:
            return (left[path].pop(0), *args[1:])

        with hooked(self.plain, self.entry.dropped, give):
            yield


@contextmanager
def hooked(model: nn.Module, paths: tuple[str, ...], hook: Callable[..., Any]) -> Iterator[None]:
    """A hook before modules, which is told their path."""
    handles = [
        model.get_submodule(path).register_forward_pre_hook(functools.partial(hook, path))
        for path in paths
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def captured(model: nn.Module, path: str) -> Iterator[list[Any]]:
    """What a block returns in the forwards inside."""
    outputs: list[Any] = []
    handle = model.get_submodule(path).register_forward_hook(
        lambda module, args, output: outputs.append(output)
    )
    try:
        yield outputs
    finally:
        handle.remove()


def first_tensor(output: Any) -> torch.Tensor:
    """Of what a model returns."""
    if isinstance(output, torch.Tensor):
        return output
    parts = output.values() if isinstance(output, dict) else output
    return first_tensor(next(part for part in parts if part is not None))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, in standard deviations of what was expected."""
    scale = expected.float().std().clamp(min=1e-12)
    return float((found.float() - expected.float()).abs().max() / scale)


def difference(found: torch.Tensor, expected: torch.Tensor, side: str) -> float:
    """The largest difference between tokens.

    Raises:
        Differs: it is too large, or they are not as many.
    """
    wanted = expected.reshape(-1, expected.shape[-1])
    tokens = found.reshape(-1, found.shape[-1])
    if tokens.shape != wanted.shape:
        raise Differs(f"{side}: {tuple(found.shape)}, by hand {tuple(expected.shape)}")
    largest = relative(tokens, wanted)
    if not largest < CLOSE:
        raise Differs(f"{side}: tokens differ by {largest:.2g} standard deviations")
    return largest
