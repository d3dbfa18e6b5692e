"""The same condition on both sides, also for models that drop labels inside their own forward.

A student in training mode may replace labels by the null class (classic DiT does); the teacher, in eval mode, would not.
Dropped labels reach an `nn.Embedding` as indices: the student's indices are recorded and replayed in the teacher. A model
whose forward draws random numbers is tried out once, before the first term: where replaying does not cover what it does
before its first block, it is refused.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy
import torch
from torch import nn

from selfalign._backend import host_randomness_kept
from selfalign._checks import invalid

from ._torch_taps import Hooks, Reached, Tap, reached, run_before, run_until, stopping_after

Indices = dict[str, list[torch.Tensor]]  # what each nn.Embedding received, in the order of its calls

_TRIALS = 64  # a condition dropped with probability 0.1, once per batch, escapes them all with probability 0.001
_MODE_IRRELEVANT = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)


class Recorded(NamedTuple):
    """What was seen of one forward of the student."""

    indices: Indices
    marks: list[Any]  # states of the random streams: before the forward, at its first block, after it


class Condition(Hooks):
    """Runs the teacher up to its tapped block, on the indices that the student's embeddings received.

    Args:
        student, teacher: the model and its EMA.
        tap: the student's tap, which knows when the student's forward runs.
        first, last: paths of the first block (all before it embeds inputs and condition) and of the teacher's tapped block.
        trusted: do not try the model out.
        compiled: options of torch.compile for the teacher's forward, or None: not compiled.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, tap: Tap, first: str, last: str, trusted: bool,
                 compiled: Mapping[str, Any] | None) -> None:  # fmt: skip
        self.alive = True
        self.compiled = reached if compiled is None else torch.compile(reached, **compiled)
        self.student, self.teacher, self.tap, self.checked = student, teacher, tap, trusted
        self.first, self.last, self.where = teacher.get_submodule(first), teacher.get_submodule(last), last
        self.seen: Indices = {}
        self.replaying: Indices | None = None
        self.given: set[int] = set()  # storages of the condition's tensors: an embedding that receives one is not of time
        self.timeless: set[str] = set()  # further embeddings that were found not to depend on time
        self.unknown: set[str] = set()
        self.carrying: set[str] = set()  # embeddings whose indices were replayed
        self.ran = self.settled = False  # settled: which carry the condition is not asked any more
        self.marks: list[Any] = []
        self.handles = [student.register_forward_pre_hook(self._begin)]
        for name in [name for name, module in student.named_modules() if isinstance(module, nn.Embedding)]:
            for side, hook in ((student, self._record), (teacher, self._replay)):
                self.handles.append(side.get_submodule(name).register_forward_pre_hook(functools.partial(hook, name)))
        if not trusted:
            self.handles.append(student.get_submodule(first).register_forward_pre_hook(self._mark))
            self.handles.append(student.register_forward_hook(self._mark))

    def run(self, forward: Callable[[Any], Any], t: Any, t_teacher: Any, clean: Any, given: Iterable[Any],
            recorded: Recorded) -> Reached:  # fmt: skip
        """The output of the teacher's tapped block.

        Args:
            forward: runs the teacher at given times [B], on the teacher's noisy input.
            t, t_teacher, clean: the student's times, the teacher's, and the clean end of the path [B].
            given: the condition's tensors.
            recorded: of the student's forward, from `take`.
        """
        indices, marks = recorded
        self.given = {x.untyped_storage().data_ptr() for x in given if isinstance(x, torch.Tensor)}
        # a compiled forward cannot look where a tensor lies: an earlier one has found out
        known = self.ran and self.checked and not self.carrying & (self.unknown - self.timeless)
        self.settled = known and self.compiled is not reached
        output = self._reach(forward, t_teacher, indices)
        if self.checked or not self.student.training:
            return output
        # Where did the student's forward draw random numbers? Without marks (a compiled model leaves none): anywhere
        before_blocks, anywhere = (not _same(marks[0], m) for m in marks[1:]) if len(marks) == 3 else (True, True)
        if anywhere and self.unknown:  # its dropped labels may be among indices that were not replayed, for they might be times
            self._find_timeless(forward, t, clean)
            output = self._reach(forward, t_teacher, indices)
        if before_blocks:  # in another way than by indices, perhaps
            self._try_out(functools.partial(forward, t))
        # done for good, unless all times were the clean end, where no embedding can be told to depend on time
        self.checked = not (anywhere and self.unknown and torch.equal(t, clean))
        return output

    def _reach(self, forward: Callable[[Any], Any], t: Any, indices: Indices) -> Reached:
        run = functools.partial(forward, t)
        if self.settled:
            indices = {name: calls for name, calls in indices.items() if name in self.carrying}
        with self._replayed(indices), stopping_after(self.last):
            self.ran = True
            return (self.compiled if self.settled else reached)(run, self.where)

    # What the student's hooks see

    def _begin(self, module: nn.Module, args: Any) -> None:
        if self.alive:
            self.forget()
            self._mark()

    def _mark(self, *_: Any) -> None:
        if self.alive and not self.checked and not torch.compiler.is_compiling():
            self.marks.append(_random_state())

    def _record(self, name: str, module: nn.Module, args: Any) -> None:
        if self.alive and self.tap.running and args:
            self.seen.setdefault(name, []).append(args[0])

    def take(self) -> Recorded:
        """What was seen of the student's last forward, once."""
        recorded = Recorded(dict(self.seen), list(self.marks))
        self.forget()
        return recorded

    def forget(self) -> None:
        self.seen.clear()
        self.marks.clear()

    # What the teacher's hooks do

    @contextmanager
    def _replayed(self, indices: Indices) -> Iterator[None]:
        self.replaying = {name: list(calls) for name, calls in indices.items()}
        try:
            yield
        finally:
            self.replaying = None

    def _replay(self, name: str, module: nn.Module, args: Any) -> Any:
        if not (self.alive and self.replaying and self.replaying.get(name) and args):
            return None
        students = self.replaying[name].pop(0)
        if not self.settled and not self._carries_condition(name, args[0]):
            return None
        if students.shape != args[0].shape:
            raise invalid("align() must get the student's batch",
                          f"{name} looked up {tuple(students.shape)} for the student, now {tuple(args[0].shape)}",
                          "Pass the x0, noise, t and condition of the model's last forward.")  # fmt: skip
        return (students, *args[1:])

    def _carries_condition(self, name: str, received: torch.Tensor) -> bool:
        """Whether an embedding is one of the condition: of what the model was called with, or found not to depend on time."""
        carries = name in self.timeless or received.untyped_storage().data_ptr() in self.given
        (self.carrying if carries else self.unknown).add(name)
        return carries

    # Trying out, once

    def _find_timeless(self, forward: Callable[[Any], Any], t: Any, clean: Any) -> None:
        """Embeddings whose indices stay the same at other times carry a condition, not the time."""
        runs = (functools.partial(run_until, functools.partial(forward, time), self.last, self.where) for time in (t, clean))
        at_t, at_clean = (self._indices(run)[1] for run in runs)
        self.timeless = {name for name in self.unknown if _same(at_t.get(name), at_clean.get(name))}

    def _try_out(self, forward: Callable[[], Any]) -> None:
        """Drop conditions as the student does, and see whether replaying the indices gives the first block the same inputs."""
        embed = functools.partial(run_before, forward, self.first, "the first block")
        with host_randomness_kept(), torch.random.fork_rng():
            for _ in range(_TRIALS):
                before = _random_state()
                with _training(self.teacher, self.first):
                    inputs, indices = self._indices(embed)
                if _same(before, _random_state()):
                    return  # nothing is drawn, nothing is dropped
                with self._replayed(indices):
                    replay = embed()
                if not _same(inputs, replay):
                    raise invalid(
                        "Student and teacher must see the same condition",
                        f"{type(self.teacher).__name__} draws random numbers before its first block in training mode, and "
                        "replaying the student's label indices in the teacher does not repeat their effect",
                        "Drop labels before calling the model and switch the model's own dropping off. If the draws are not "
                        "the condition's, pass check_condition=False.",
                    )

    def _indices(self, run: Callable[[], Any]) -> tuple[Any, Indices]:
        """What `run` returns, and the indices that the teacher's embeddings receive in it."""
        seen: Indices = {}
        handles = [
            module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
            for name, module in self.teacher.named_modules()
            if isinstance(module, nn.Embedding)
        ]
        try:
            return run(), seen
        finally:
            for handle in handles:
                handle.remove()

    def remove(self) -> None:
        self.forget()
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
