"""One objective or a list of them: what belongs to each, by its name."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

from selfalign.adapting import (
    EMATeacher,
    Nothing,
    Objective,
    invalid,
    shared_teacher,
    with_source,
)

Loss: TypeAlias = Objective | Sequence[Objective]
"""One objective, or a list of them."""

ByName: TypeAlias = Any
"""Of one objective the thing itself; of a list a dict of such things, by the objectives' names."""


def is_list(loss: Loss) -> bool:
    """Whether what belongs to an objective comes in a dict, by its name."""
    return isinstance(loss, (list, tuple))


def with_target(objectives: Mapping[str, Objective]) -> list[str]:
    """The names of the objectives that compare with a target."""
    without = with_source(objectives, Nothing)
    return [name for name in objectives if name not in without]


def with_teacher(objectives: Mapping[str, Objective]) -> list[str]:
    """The names of the objectives whose target is an EMA teacher's."""
    return with_source(objectives, EMATeacher)


def teacher_of(objectives: Mapping[str, Objective]) -> EMATeacher:
    """The EMA teacher that the objectives share: raises ValueError where none has one."""
    source = shared_teacher(objectives)
    if source is None:
        raise invalid(
            "There must be an objective with an EMA teacher",
            _quoted(objectives),
            "Leave the teacher out: call term with target_tokens, and with step= a count of yours.",
        )
    return source


def entries(what: str, given: ByName, names: Collection[str]) -> dict[str, Any]:
    """What was given to a list of objectives: a dict with these entries, and no others."""
    rule = f"For a list of objectives {what} must be a dict with the entries {_quoted(names)}"
    fix = "Each objective's name is its kind, or the name= that it was given."
    if not isinstance(given, Mapping):
        raise TypeError(f"{rule}. Received: {type(given).__name__}. {fix}")
    if set(given) != set(names):
        raise invalid(rule, f"the entries {_quoted(given)}", fix)
    return dict(given)


def _quoted(names: Collection[str]) -> str:
    return ", ".join(map(repr, names)) or "of none"
