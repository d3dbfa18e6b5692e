"""The teacher's forward: the student's call again, with another sample, at another time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from selfalign.adapting import EMATeacher, invalid, paths

from .arguments import Arguments, Batch, anew, cloned
from .comparing import Comparison
from .hooks import Hooks
from .layout import Layout, find_layout
from .sharding import is_sharded, release
from .stopping import Stopped, evaluating, never_ran
from .student import Indices, StudentPass, random_streams_kept
from .tokens import Output

Outputs = dict[str, Output]  # of the tapped blocks, by their paths


class TeacherCall(Hooks):
    """Runs the teacher up to its tapped blocks.

    Without a function of the user's, the student's own call is repeated: where sample and time
    stand in it, and in which unit, is found by value in the first step. A condition that the user
    gives beside it is only compared. On the CPU this happens in every step, elsewhere in the first
    one only, since it waits for the device.

    A student in training mode may replace labels by the null class (classic DiT does). The teacher,
    in evaluation mode, would not. Labels reach an `nn.Embedding` as indices: those of the student
    are handed to the teacher's embeddings, where these embed the condition and not the time.

    Args:
        student: the model.
        teacher: its EMA.
        source: the teacher's settings.
        taps: paths of the blocks whose output is wanted.
        function: the user's (module, x, t, *condition, **conditions) -> anything, or None.
        compared: compare the call with what align() is given.
        compiled: options of torch.compile for the teacher's forward, or None.

    Attributes:
        condition_embeddings: embeddings that were found not to depend on time.
        unknown_embeddings: those that may embed a time: their indices were not replayed.
        draws_alike: begin with the student's random numbers: the model draws in its forward.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        source: EMATeacher,
        taps: Iterable[str],
        function: Callable[..., Any] | None,
        compared: bool,
        compiled: Mapping[str, Any] | None,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.source = source
        self.path = paths.resolve(source.path)
        self.taps = {path: teacher.get_submodule(path) for path in taps}
        self.function = function
        self.compared = compared
        self.run_compiled = run_to_end
        self.compiles = compiled is not None
        if compiled is not None:
            self.run_compiled = torch.compile(run_to_end, **compiled)
        self.layout: Layout | None = None
        self.comparison = Comparison(self.path)
        self.was_compared = False
        self.sharded: bool | None = None
        # what replaying indices needs to know
        self.replaying: Indices | None = None
        self.given: set[int] = set()
        self.condition_embeddings: set[str] = set()
        self.unknown_embeddings: set[str] = set()
        self.replayed_embeddings: set[str] = set()
        self.settled = False
        self.has_run = False
        self.draws_alike = False
        for name, module in teacher.named_modules():
            if isinstance(module, nn.Embedding):
                hook = functools.partial(self._replay_indices, name)
                self.handles.append(module.register_forward_pre_hook(hook))

    @torch.no_grad()
    def __call__(self, batch: Batch, seen: StudentPass, explored: bool) -> Outputs:
        """What the tapped blocks return: same sample, noise and condition, a little less noise.

        Args:
            batch: what align() was given.
            seen: the student's pass.
            explored: whether the forward may be compiled: in training, after the trial that finds
                out which embeddings embed what.
        """
        x, t = self.path.add_less_noise(
            batch.x0, batch.noise, batch.t, batch.u, self.source.largest_gap, self.source.random_gap
        )
        self.prepare(batch, seen)
        # a compiled forward cannot look where a tensor lies: an earlier one has found out
        self.settled = self.compiles and explored and self.has_run and self._is_known()
        run = functools.partial(self.call, batch, seen, x, t)
        if self.draws_alike:
            with random_streams_kept(seen.random_states[0]):
                return self.reach(run, seen.indices)
        return self.reach(run, seen.indices)

    def prepare(self, batch: Batch, seen: StudentPass) -> None:
        """Find the layout where it is not certain, and compare the student's call."""
        self.give(seen.call, batch.condition)
        layout = self.layout
        known = self.function is not None
        if layout is not None:
            places = {*range(len(seen.call.args)), *seen.call.kwargs}
            known = layout.certain and {layout.sample, layout.time} <= places
        settled = not self.compared or (self.was_compared and batch.t.device.type != "cpu")
        if settled and known:
            return
        x = self.path.noised(batch.x0, batch.noise, batch.t)  # checked just before
        if not known:
            layout = find_layout(self.path, self.teacher, seen, x, batch)
            self.layout = layout
        if settled:
            return
        if layout is not None:
            self.comparison.check(layout, seen.call, x, batch)
            self.was_compared = self.comparison.times.full
        else:
            run = functools.partial(self.call, batch, seen, x, batch.t)
            self.comparison.check_function(self.teacher, run, seen.call, x, batch)
            self.was_compared = True

    def give(self, *calls: Arguments) -> None:
        """Note what the model is given from outside: what is looked up in it is no time."""
        self.given = set()
        for args, kwargs in calls:
            for value in (*args, *kwargs.values()):
                if isinstance(value, torch.Tensor):
                    self.given.add(value.untyped_storage().data_ptr())

    def on_samples(
        self, batch: Batch, seen: StudentPass
    ) -> tuple[torch.Tensor, Callable[[list[str], torch.Tensor], Outputs]]:
        """The student's sample, and the teacher's forward from other samples to other taps."""
        self.prepare(batch, seen)
        self.settled = False

        def run(paths: list[str], sample: torch.Tensor) -> Outputs:
            taps = {path: self.teacher.get_submodule(path) for path in paths}
            called = functools.partial(self.call, batch, seen, sample, batch.t)
            return self.reach(called, seen.indices, taps)

        return self.students_sample(batch, seen), run

    def students_sample(self, batch: Batch, seen: StudentPass) -> torch.Tensor:
        """The noisy samples that the student saw."""
        if self.function is not None:
            return self.path.noised(batch.x0, batch.noise, batch.t)
        return seen.call.places()[self.layout.sample]  # type: ignore[union-attr]

    def call(self, batch: Batch, seen: StudentPass, x: torch.Tensor, t: torch.Tensor) -> Any:
        """Call the teacher on the sample `x` at the times `t` of the path."""
        if self.function is not None:
            condition = batch.condition
            return self.function(self.teacher, x, t, *condition.args, **condition.kwargs)
        layout: Any = self.layout
        args, kwargs = list(seen.call.args), dict(seen.call.kwargs)
        if any(isinstance(value, (list, dict)) for value in (*args, *kwargs.values())):
            args, kwargs = anew(args), anew(kwargs)  # a model may fill or empty what it is given
        old_x = args[layout.sample] if isinstance(layout.sample, int) else kwargs[layout.sample]
        old_t = args[layout.time] if isinstance(layout.time, int) else kwargs[layout.time]
        if x.shape != old_x.shape:
            raise invalid(
                "align() must get the student's batch",
                f"x0 of shape {tuple(x.shape)}, after a model's call with {tuple(old_x.shape)}",
                "Pass the x0, noise and t of the model's last forward.",
            )
        new_t = layout.told(t).to(old_t.dtype).reshape(layout.shape).expand(old_t.shape)
        for place, value in ((layout.sample, x.to(old_x.dtype)), (layout.time, new_t)):
            if isinstance(place, int):
                args[place] = value
            else:
                kwargs[place] = value
        return self.teacher(*args, **kwargs)

    def reach(
        self,
        run: Callable[[], Any],
        indices: Indices,
        taps: Mapping[str, nn.Module] | None = None,
        trains: bool = False,
    ) -> Outputs:
        """Run a forward of the teacher until all tapped blocks have run.

        Args:
            run: calls the teacher.
            indices: of the student's embeddings, to be replayed.
            taps: other blocks than the target's; those that do not run are left out.
            trains: leave the teacher in training mode.
        """
        self.has_run = True
        self.replaying = {}
        for name, calls in indices.items():
            if not self.settled or name in self.replayed_embeddings:
                self.replaying[name] = list(calls)
        if self.settled and taps is None:
            run = functools.partial(self.run_compiled, run)
        try:
            # a teacher of ours is in evaluation mode; a user's own EMA gets its modes back
            evaluated = self.teacher.training and not trains
            with evaluating(self.teacher) if evaluated else nullcontext():
                found = run_until(self.taps if taps is None else taps, run)
        finally:
            self.replaying = None
            if self.sharded is not False:
                self.release()
        if taps is None and len(found) < len(self.taps):
            raise never_ran(next(path for path in self.taps if path not in found))
        return found

    def release(self) -> None:
        """Give back what a sharded teacher has gathered."""
        if self.sharded is None:
            self.sharded = is_sharded(self.teacher)
        if self.sharded:
            release(self.teacher)

    # Replaying indices

    def _replay_indices(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> Any:
        waiting = self.replaying if self.alive else None
        if not (waiting and waiting.get(name) and args):
            return None
        students, received = waiting[name].pop(0), args[0]
        if not self.settled:
            # it embeds the condition where it is fed what the model was called with, or where it
            # was found not to depend on time
            given = received.untyped_storage().data_ptr() in self.given
            if not given and name not in self.condition_embeddings:
                self.unknown_embeddings.add(name)
                return None
            self.replayed_embeddings.add(name)
        if students.shape != received.shape:
            raise invalid(
                "align() must get the student's batch",
                f"{name} looked up {tuple(students.shape)} for the student, now "
                f"{tuple(received.shape)}",
                "Pass the x0, noise, t and condition of the model's last forward.",
            )
        return (students, *args[1:])

    def _is_known(self) -> bool:
        """Whether of every replayed embedding it is known what it embeds."""
        doubtful = self.unknown_embeddings - self.condition_embeddings
        return not self.replayed_embeddings & doubtful


def run_to_end(run: Callable[[], Any]) -> None:
    """Run a forward that a hook may end; apart, so that it can be compiled whole."""
    try:
        run()
    except Stopped:
        return


def run_until(modules: Mapping[str, nn.Module], run: Callable[[], Any]) -> dict[str, Any]:
    """Run a forward until all these modules, by path, have run: what they returned."""
    found: dict[str, Any] = {}
    missing = set(modules)

    def capture(path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        missing.discard(path)
        found[path] = cloned(output) if missing else output  # a model may write into it
        if not missing:
            raise Stopped

    handles = []
    for path, module in modules.items():
        handles.append(module.register_forward_hook(functools.partial(capture, path)))
    fast = torch.backends.mha.get_fastpath_enabled()
    # PyTorch's own way of inference: padded tokens vanish in it
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        run()
    except Stopped:
        return found
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()
    return found
