"""The law of the first steps: the teacher repeats the student's forward, on weights of its own.

The call: on the student's weights and input, in evaluation mode, it gives the student's tokens.
Conditions that the student drops are dropped alike; dropout of features is left out on both sides.
The weights: the teacher's tokens change with its own weights, and not with the student's. What
breaks the law is refused, whatever the reason.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from selfalign.adapting import invalid

from .arguments import Batch
from .average import HALF
from .comparing import alike, distance
from .parts import Part, Tokens
from .repeating import (
    as_in_training,
    autocast_as,
    eagerly,
    idle_leaves,
    kept_as_it_was,
    own_generators,
    with_constants,
    with_open_gates,
    with_weights_of,
)
from .replaying import TeacherCall
from .sharding import any_process, is_sharded, resharded
from .stopping import never_ran
from .student import Indices, StudentPass, random_state, random_streams_kept, same_state
from .tokens import TokenReader

_TRIALS = 32  # a condition dropped with probability 0.1 escapes them all with probability 0.03
_ENOUGH = 3  # trials in which something was dropped
_LOOKS = (0, 1, 2, 7, 15, 31)  # steps that are looked at, until the condition shows
_ROUNDING = 1e-5  # between two forwards of one module
_TOLERANCE = {False: 2e-3, True: 5e-2}  # beside a compiled student, TF32; in half precision

_OTHER_CALL = (
    "Look for hooks and wrappers on one side only, and for what the model does in training mode "
    "only; pass such things as arguments, which are repeated, or pass call=. If the difference is "
    'meant, pass checks="off".'
)
_OTHER_DRAWS = (
    "Drop labels, or draw tokens, before calling the model, pass what was drawn as an argument, "
    "and switch the model's own drawing off; where tokens are routed, tap a student's block before "
    'the route. If what is drawn is noise on features only, pass checks="off".'
)
_OTHER_WEIGHTS = (
    "Look for functions and hooks that reach a module of the model by a global name or a registry: "
    "let them hold it instead (closures, defaults, attributes and functools.partial are made anew)."
)


class Law:
    """Looks at the first steps, until the time shows in the tokens.

    Gates that begin at zero hide it at first. What is drawn is tried out with open gates.

    Args:
        call: the teacher's calls.
        parts: the objectives with this teacher.
        needed: False: the model is trusted.
    """

    def __init__(self, call: TeacherCall, parts: list[Part], needed: bool) -> None:
        self.call = call
        self.over = not needed
        self.steps = 0
        self.noisy = False
        self.readers = {reader.where: reader for part in parts for reader in part.readers()}
        self.students = {part.student.where: part.name for part in parts}

    @torch.no_grad()
    def __call__(self, batch: Batch, seen: StudentPass, students: Tokens) -> None:
        """Look at a step of the student, before the teacher runs in it.

        Raises:
            ValueError: the law is broken.
        """
        step = self.steps
        self.steps += 1
        if step not in _LOOKS:
            return
        student, teacher = self.call.student, self.call.teacher
        look = Look(self.call, self.readers, list(self.students), batch, seen)
        mine = {path: students[name].detach() for path, name in self.students.items()}
        with eagerly(), resharded(student), kept_as_it_was(teacher):
            if student.training:
                look.find_condition_embeddings()
            if step == 0:
                look.check_weights()
            ours = with_weights_of(student, teacher)
            with ours, autocast_as(batch.t.device, seen.autocast):
                if step == 0 and student.training:
                    with with_open_gates(teacher):
                        self.noisy = look.check_draws()
                look.check_call(mine, self.noisy)
                self.over = look.time_shows() or step == _LOOKS[-1]


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
        self.at_t = functools.partial(call.call, batch, seen, x, batch.t)
        self.at_clean = functools.partial(call.call, batch, seen, x, clean)
        self.idle: set[nn.Module] | None = None

    def tokens(
        self,
        run: Callable[[], Any],
        indices: Indices | None = None,
        begin: list[Any] | None = None,
        trains: bool = False,
    ) -> Tokens:
        """The sample's tokens at the tapped blocks in one forward of the teacher.

        Args:
            run: the forward.
            indices: of embeddings, to be replayed; the student's by default.
            begin: the random numbers' state, to begin at; the present one by default, and then the
                random streams go on.
            trains: leave the teacher in training mode.
        """
        replayed = self.seen.indices if indices is None else indices
        with nullcontext() if begin is None else random_streams_kept(begin):
            outputs = self.call.reach(run, replayed, self.taps, trains)
        for path in self.taps:
            if path not in outputs:
                raise never_ran(path)
        called = self.seen.call
        return {
            path: self.readers[path](output, self.x0, called) for path, output in outputs.items()
        }

    def differ(
        self,
        some: Tokens,
        others: Tokens,
        tolerance: float = _ROUNDING,
        everywhere: bool = False,
    ) -> bool:
        """Whether tokens of the student's blocks, or of all tapped ones, differ on any process."""
        paths = self.readers if everywhere else self.students
        here = any(not alike(some[path], others[path], tolerance) for path in paths)
        return any_process(here, self.device) if self.sharded else here

    # The call

    def find_condition_embeddings(self) -> None:
        """Embeddings whose indices stay the same at another time embed a condition."""
        if not self.call.unknown_embeddings:
            return
        state = random_state()  # what is dropped falls alike in both
        _, at_t = self._with_indices(self.at_t, begin=state)
        _, at_clean = self._with_indices(self.at_clean, begin=state)
        for name in self.call.unknown_embeddings:
            if same_state(at_t.get(name), at_clean.get(name)):
                self.call.condition_embeddings.add(name)

    def time_shows(self) -> bool:
        """Whether another time gives other tokens."""
        state = random_state()
        at_t = self.tokens(self.at_t, begin=state)
        return self.differ(at_t, self.tokens(self.at_clean, begin=state))

    def check_draws(self) -> bool:
        """What training mode draws must be repeated; whether it makes the features noisy."""
        teacher = self.call.teacher
        undropped = self.tokens(self.at_t, {})
        if self.idle is None:
            self.idle = idle_leaves(teacher, functools.partial(self.tokens, self.at_t, {}))
        noisy = False
        dropped = 0
        for _ in range(_TRIALS):
            state = random_state()
            with as_in_training(teacher, self.idle) as dropout:
                trained, indices = self._with_indices(self.at_t, trains=True)
            noisy |= dropout.found
            if same_state(state, random_state()) and not own_generators(teacher):
                break  # nothing is drawn, nothing is dropped
            if self.differ(trained, self.tokens(self.at_t, indices)):
                self._check_same_draws(trained, indices, state, noisy)
            dropped += self.differ(trained, undropped)
            if dropped == _ENOUGH:
                break
        return noisy

    def _check_same_draws(
        self, trained: Tokens, indices: Indices, state: list[Any], noisy: bool
    ) -> None:
        """What is drawn in evaluation mode as well can be drawn alike: from the student's state."""
        recorded = len(self.seen.random_states) == 2
        if noisy or not recorded or self.differ(trained, self.tokens(self.at_t, indices, state)):
            raise self._broken("other tokens where the model draws random numbers", _OTHER_DRAWS)
        self.call.draws_alike = True

    def check_call(self, mine: Tokens, noisy: bool) -> None:
        """The student's own tokens, unless dropout made them noisy."""
        begin = self.seen.random_states[0] if self.call.draws_alike else None
        theirs = self.tokens(self.at_t, begin=begin)
        tolerance = _TOLERANCE[self._is_half(mine)]
        if noisy or not self.differ(mine, theirs, tolerance):
            return
        states = self.seen.random_states
        if len(states) == 2 and not same_state(*states) and begin is None:
            theirs = self.tokens(self.at_t, begin=states[0])
            if not self.differ(mine, theirs, tolerance):
                self.call.draws_alike = True
                return
        off = max(distance(mine[path], theirs[path]) for path in mine)
        raise self._broken(f"tokens that are off by {off:.2g} of their length", _OTHER_CALL)

    def _is_half(self, tokens: Tokens) -> bool:
        """Whether the student ran, in part, in half precision."""
        return self.seen.autocast[0] or any(value.dtype in HALF for value in tokens.values())

    # The weights

    def check_weights(self) -> None:
        """The teacher's tokens change with its own weights, and not with the student's."""
        student = list(self.call.student.parameters())
        teacher = list(self.call.teacher.parameters())
        common = {id(p) for p in student} & {id(p) for p in teacher}
        state = random_state()
        tokens = self.tokens(self.at_t, begin=state)
        with with_constants(p for p in student if id(p) not in common):
            after = self.tokens(self.at_t, begin=state)
        if self.differ(tokens, after, _TOLERANCE[False], everywhere=True):
            raise self._broken("tokens that change with the student's weights", _OTHER_WEIGHTS)
        own = [p for p in teacher if id(p) not in common]
        with with_constants(own):
            after = self.tokens(self.at_t, begin=state)
        if own and not self.differ(tokens, after, everywhere=True):
            raise self._broken("tokens that do not change with its weights", _OTHER_WEIGHTS)

    def _broken(self, received: str, fix: str) -> ValueError:
        return invalid(
            "The teacher must repeat the student's forward, on weights of its own",
            f"{type(self.call.teacher).__name__}, as the teacher, gave {received}",
            fix,
        )

    def _with_indices(
        self, run: Callable[[], Any], trains: bool = False, begin: list[Any] | None = None
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
            return self.tokens(run, {}, begin, trains), found
        finally:
            for handle in handles:
                handle.remove()
