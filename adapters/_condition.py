"""The same condition on both sides, also for models that drop labels inside their own forward.

A student in training mode may replace labels by the null class (classic DiT does); the teacher, in eval mode, would not.
Dropped labels reach an `nn.Embedding` as indices: the student's indices are recorded and replayed in the teacher. Whether
that covers what the model does is tried out once, before the first term; a model that it does not cover is refused.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import nn

from selfalign._checks import invalid

from ._taps import Tap, run_until

_TRIALS = 64  # a condition dropped with probability 0.1, once per batch, escapes them all with probability 0.001
_MODE_IRRELEVANT = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)


class Condition:
    """Records the indices that the student's embeddings receive and replays them in the teacher's."""

    def __init__(self, student: nn.Module, teacher: nn.Module, tap: Tap) -> None:
        self.teacher, self.tap = teacher, tap
        self.seen: dict[str, list[torch.Tensor]] = {}  # of the student's last forward, in the order of calls
        self.replaying: dict[str, list[torch.Tensor]] | None = None
        self.of_time: set[str] | None = None  # embeddings of the time, which must keep the teacher's own; None: not known yet
        self.checked = False
        names = [name for name, module in student.named_modules() if isinstance(module, nn.Embedding)]
        self.handles = [student.register_forward_pre_hook(lambda module, args: self.seen.clear())] if names else []
        for name in names:
            self.handles.append(student.get_submodule(name).register_forward_pre_hook(self._recorder(name)))
            self.handles.append(teacher.get_submodule(name).register_forward_pre_hook(self._replayer(name)))

    def _recorder(self, name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any) -> None:
            if self.tap.running and args:
                self.seen.setdefault(name, []).append(args[0])

        return record

    def _replayer(self, name: str) -> Callable[..., Any]:
        def replay(module: nn.Module, args: Any) -> Any:
            if self.replaying is None or not args:
                return None
            if name not in (self.of_time or ()) and self.replaying.get(name):
                return (self.replaying[name].pop(0), *args[1:])
            return None

        return replay

    @contextmanager
    def replayed(self, indices: dict[str, list[torch.Tensor]]) -> Iterator[None]:
        """Inside, the teacher's embeddings receive these indices instead of their own."""
        self.replaying = {name: list(calls) for name, calls in indices.items()}
        try:
            yield
        finally:
            self.replaying = None

    def check(self, run: Callable[[Any], Any], t: torch.Tensor, clean: torch.Tensor, first: nn.Module, last: nn.Module) -> None:
        """Find out which embeddings depend on time, and refuse a model whose dropped conditions cannot be replayed.

        Args:
            run: runs the teacher at given times, on fixed inputs.
            t: times of the batch [B].
            clean: other times, all at the clean end [B].
            first: the teacher's first block: everything before it is what embeds the condition.
            last: the teacher's tapped block.
        """
        if self.of_time is None and not torch.equal(t, clean):
            reach = functools.partial(run_until, block=last, where="the teacher's block")
            at_t, at_clean = (self._indices(functools.partial(reach, functools.partial(run, time)))[1] for time in (t, clean))
            self.of_time = {name for name in at_t if not _same(at_t[name], at_clean.get(name))}
        if not self.checked and self.of_time is not None:
            self._try_out(lambda: run_until(lambda: run(t), first, "the first block", inputs=True), first)
            self.checked = True

    def _try_out(self, embed: Callable[[], Any], first: nn.Module) -> None:
        with own_randomness(), torch.no_grad():
            for _ in range(_TRIALS):
                before = _random_state()
                with _training(self.teacher, first):
                    inputs, indices = self._indices(embed)
                if _same(before, _random_state()):
                    return  # nothing is drawn, nothing is dropped
                with self.replayed(indices):
                    replay = embed()
                if not _same(inputs, replay):
                    raise invalid(
                        "Student and teacher must see the same condition",
                        f"{type(self.teacher).__name__} draws random numbers before its first block in training mode, and "
                        "replaying the student's label indices in the teacher does not repeat their effect",
                        "Drop labels before calling the model and switch the model's own dropping off. If the draws are not "
                        "the condition's, pass check_condition=False.",
                    )

    def _indices(self, run: Callable[[], Any]) -> tuple[Any, dict[str, list[torch.Tensor]]]:
        """What `run` returns, and the indices that the teacher's embeddings receive in it."""
        seen: dict[str, list[torch.Tensor]] = {}
        embeddings = {name: m for name, m in self.teacher.named_modules() if isinstance(m, nn.Embedding)}
        handles = [
            module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
            for name, module in embeddings.items()
        ]
        try:
            return run(), seen
        finally:
            for handle in handles:
                handle.remove()

    def take(self) -> dict[str, list[torch.Tensor]]:
        """The indices of the student's last forward, once."""
        indices = dict(self.seen)
        self.seen.clear()
        return indices

    def remove(self) -> None:
        self.seen.clear()
        for handle in self.handles:
            handle.remove()


@contextmanager
def _training(model: nn.Module, first_block: nn.Module) -> Iterator[None]:
    """Training mode for what embeds inputs and condition; blocks, dropout and batch norm stay in eval mode."""
    modes = {module: module.training for module in model.modules()}
    parents = [m for m in modes if any(child is first_block for child in m.children())]
    blocks = {inner for parent in parents for child in parent.children() for inner in child.modules()}
    try:
        for module in modes:
            module.training = module not in blocks and not isinstance(module, _MODE_IRRELEVANT)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def own_randomness() -> Iterator[None]:
    """Leaves the random streams of torch, numpy and Python as they were."""
    python, arrays = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    numpy.random.set_state(arrays)


def _random_state() -> list[Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda, random.getstate(), numpy.random.get_state()]


def _same(a: Any, b: Any) -> bool:
    """Equality through nested containers, tensors and arrays by value."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, numpy.ndarray):
        return numpy.array_equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)
