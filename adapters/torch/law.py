"""The law of the first steps: the teacher repeats the student's forward, on weights of its own.

The call: on the student's weights and input, in evaluation mode, it gives the student's tokens.
Conditions that the student drops are dropped alike; dropout of features is left out on both sides.
The weights: the teacher's tokens change with its own weights, and not with the student's. What
breaks the law is refused, whatever the reason.
"""

from __future__ import annotations

import torch

from .arguments import Batch
from .average import HALF
from .comparing import distance
from .drawing import Draws
from .looking import Look
from .parts import Part, Tokens
from .repeating import (
    autocast_as,
    eagerly,
    kept_as_it_was,
    with_buffers,
    with_constants,
    with_open_gates,
    with_weights_of,
)
from .replaying import TeacherCall
from .sharding import resharded
from .student import StudentPass, random_state, same_state

_LOOKS = (0, 1, 2, 7, 15, 31)  # steps that are looked at, until the condition shows
_TOLERANCE = {False: 2e-3, True: 5e-2}  # beside a compiled student, TF32; in half precision

_OTHER_CALL = (
    "Look for hooks and wrappers on one side only, and for what the model does in training mode "
    "only; pass such things as arguments, which are repeated, or pass call=. If the difference is "
    'meant, pass checks="off".'
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
        self.shortened = False
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
                check_weights(look)
            ours = with_weights_of(student, teacher)
            with ours, autocast_as(batch.t.device, seen.autocast):
                if step == 0 and student.training:
                    draws = Draws(look)
                    with with_open_gates(teacher):
                        draws.check()
                    self.noisy = draws.noisy
                    self.shortened = draws.changed
                if not self.noisy:
                    check_call(look, mine | ({} if self.shortened else look.later()))
                self.over = look.time_shows() or step == _LOOKS[-1]


def check_call(look: Look, mine: Tokens) -> None:
    """On the student's weights, the teacher gives the student's own tokens.

    Args:
        look: the teacher's forwards.
        mine: the tokens that the student's forward gave, by the module's path.

    Raises:
        ValueError: it does not.
    """
    call, states = look.call, look.seen.random_states
    begin = states[0] if call.draws_alike else None
    theirs = look.tokens(look.at_t, begin=begin)
    tolerance = _TOLERANCE[_is_half(look, mine)]
    if not look.differ(mine, theirs, tolerance, mine):
        return
    with with_buffers(call.teacher, look.seen.buffers):  # the student wrote into them since
        if not look.differ(mine, look.tokens(look.at_t, begin=begin), tolerance, mine):
            return
    if len(states) == 2 and not same_state(*states) and begin is None:
        theirs = look.tokens(look.at_t, begin=states[0])
        if not look.differ(mine, theirs, tolerance, mine):
            call.draws_alike = True
            return
    off = max(distance(mine[path], theirs[path]) for path in mine)
    raise look.broken(f"tokens that are off by {off:.2g} of their length", _OTHER_CALL)


def check_weights(look: Look) -> None:
    """The teacher's tokens change with its own weights, and not with the student's.

    Raises:
        ValueError: they do, or do not.
    """
    student = list(look.call.student.parameters())
    teacher = list(look.call.teacher.parameters())
    common = {id(p) for p in student} & {id(p) for p in teacher}
    state = random_state()
    tokens = look.tokens(look.at_t, begin=state)
    with with_constants(p for p in student if id(p) not in common):
        after = look.tokens(look.at_t, begin=state)
    if look.differ(tokens, after, _TOLERANCE[False], look.readers):
        raise look.broken("tokens that change with the student's weights", _OTHER_WEIGHTS)
    own = [p for p in teacher if id(p) not in common]
    with with_constants(own):
        after = look.tokens(look.at_t, begin=state)
    if own and not look.differ(tokens, after, paths=look.readers):
        raise look.broken("tokens that do not change with its weights", _OTHER_WEIGHTS)


def _is_half(look: Look, tokens: Tokens) -> bool:
    """Whether the student ran, in part, in half precision."""
    return look.seen.autocast[0] or any(value.dtype in HALF for value in tokens.values())
