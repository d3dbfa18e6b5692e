"""One look at the teacher's forwards: its tokens in other circumstances, side by side."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from selfalign.adapting import invalid

from .arguments import Batch, cloned
from .buffers import buffers_kept
from .comparing import alike
from .parts import Tokens
from .probing import another_sample
from .replaying import TeacherCall
from .sharding import any_process, is_sharded
from .stopping import never_ran
from .student import Indices, StudentPass, random_state, random_streams_kept, same_state
from .tokens import Output, TokenReader

ROUNDING = 1e-5  # between two forwards of one module


class Look:
    """One look at the teacher's call, beside a step of the student.

    Args:
        call: the teacher's calls.
        readers: of the tapped blocks, by path.
        students: paths of the student's blocks.
        batch: what align() was given.
        seen: the student's pass.
    """

    def __init__(
        self,
        call: TeacherCall,
        readers: Mapping[str, TokenReader],
        students: list[str],
        batch: Batch,
        seen: StudentPass,
    ) -> None:
        self.call = call
        self.readers = readers
        self.students = students
        self.seen = seen
        self.x0 = batch.x0
        self.device = batch.t.device
        self.sharded = is_sharded(call.teacher)
        self.taps = {path: call.teacher.get_submodule(path) for path in readers}
        call.prepare(batch, seen)
        x = call.students_sample(batch, seen)
        clean = torch.full_like(batch.t, call.path.clean_at)
        self.at_t = functools.partial(self._run, batch, x, batch.t)
        self.at_clean = functools.partial(self._run, batch, x, clean)
        self.at_another = functools.partial(self._run, batch, another_sample(x), batch.t)

    def _run(self, batch: Batch, x: torch.Tensor, t: torch.Tensor) -> Any:
        """A forward of the teacher; a model may write into what it is given."""
        seen = self.seen.called_with(cloned(self.seen.call))
        self.call.give(seen.call, batch.condition)
        return self.call.call(batch, seen, x.clone(), t)

    def tokens(
        self,
        run: Callable[[], Any],
        indices: Indices | None = None,
        begin: list[Any] | None = None,
        trains: bool = False,
        writes: bool = False,
    ) -> Tokens:
        """The sample's tokens at the tapped blocks in one forward of the teacher.

        Args:
            run: the forward.
            indices: of embeddings, to be replayed; the student's by default.
            begin: the random numbers' state, to begin at; the present one by default, and then the
                random streams go on.
            trains: leave the teacher in training mode.
            writes: leave what the forward writes into buffers.
        """
        replayed = self.seen.indices if indices is None else indices
        begins = nullcontext() if begin is None else random_streams_kept(begin)
        with begins, nullcontext() if writes else buffers_kept(self.call.teacher):
            outputs = self.call.reach(run, replayed, self.taps, trains)
        for path in self.taps:
            if path not in outputs:
                raise never_ran(path)
        return {path: self._read(path, output, trains) for path, output in outputs.items()}

    def _read(self, path: str, output: Output, trains: bool) -> torch.Tensor:
        """The sample's tokens; none where training mode left some out after it."""
        reader = self.readers[path]
        if trains and path not in self.students and not reader.knows(output, self.x0):
            return torch.empty(0)
        return reader(output, self.x0, self.seen.call)

    def later(self) -> Tokens:
        """The sample's tokens that the student's forward gave where the teacher is tapped."""
        outputs = self.seen.later
        return {path: self._read(path, output, True) for path, output in outputs.items()}

    def differ(
        self,
        some: Tokens,
        others: Tokens,
        tolerance: float = ROUNDING,
        paths: Iterable[str] | None = None,
    ) -> bool:
        """Whether tokens of the student's blocks, or of others, differ on any process."""
        paths = self.students if paths is None else paths
        here = any(not alike(some[path], others[path], tolerance) for path in paths)
        return any_process(here, self.device) if self.sharded else here

    def find_condition_embeddings(self) -> None:
        """Embeddings whose indices stay the same at another time embed a condition."""
        if not self.call.unknown_embeddings:
            return
        state = random_state()  # what is dropped falls alike in both
        _, at_t = self.with_indices(self.at_t, begin=state)
        _, at_clean = self.with_indices(self.at_clean, begin=state)
        for name in self.call.unknown_embeddings:
            if same_state(at_t.get(name), at_clean.get(name)):
                self.call.condition_embeddings.add(name)

    def time_shows(self) -> bool:
        """Whether another time gives other tokens."""
        state = random_state()
        at_t = self.tokens(self.at_t, begin=state)
        return self.differ(at_t, self.tokens(self.at_clean, begin=state))

    def with_indices(
        self,
        run: Callable[[], Any],
        trains: bool = False,
        begin: list[Any] | None = None,
        writes: bool = False,
    ) -> tuple[Tokens, Indices]:
        """The tokens without replaying, and the indices that the teacher's embeddings received."""
        found: Indices = {}

        def record(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
            found.setdefault(name, []).append(args[0])

        handles = []
        for name, module in self.call.teacher.named_modules():
            if isinstance(module, nn.Embedding):
                hook = functools.partial(record, name)
                handles.append(module.register_forward_pre_hook(hook))
        try:
            return self.tokens(run, {}, begin, trains, writes), found
        finally:
            for handle in handles:
                handle.remove()

    def broken(self, received: str, fix: str) -> ValueError:
        """The error where the law does not hold."""
        return invalid(
            "The teacher must repeat the student's forward, on weights of its own",
            f"{type(self.call.teacher).__name__}, as the teacher, gave {received}",
            fix,
        )
