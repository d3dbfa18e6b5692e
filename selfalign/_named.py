"""The objectives that a user passed, by their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ._checks import check_mapping, incomplete, invalid
from .heads import Head
from .objective import Objective
from .sources import Source


def check_objective(objective: object) -> Objective:
    """An objective that an adapter can serve.

    Raises:
        TypeError: no `Objective`, or one whose class lacks something.

    Example:
        >>> import selfalign
        >>> from selfalign import adapting
        >>> loss = selfalign.LayerSyncLoss(student_layer=8, teacher_layer=16)
        >>> adapting.check_objective(loss) is loss
        True
    """
    if not isinstance(objective, Objective):
        raise TypeError(
            "An objective must derive from selfalign.Objective. Received: "
            f"{type(objective).__name__} {objective!r:.60}. Pass for instance selfalign.SRALoss, "
            "or derive your class from Objective."
        )
    if type(objective).compare is Objective.compare:
        raise incomplete(type(objective), "compare", "a method (student, target, mask) -> scalar")
    if not objective.kind:
        raise incomplete(type(objective), "kind", 'a name such as "sra"')
    if not isinstance(objective.source, Source):
        raise incomplete(type(objective), "source", "one of selfalign.sources")
    if not isinstance(objective.head, Head):
        raise incomplete(type(objective), "head", "one of selfalign.heads")
    return objective


def named_objectives(loss: Objective | Sequence[Objective]) -> dict[str, Objective]:
    """The objectives that a user passed, one or a list, by their names.

    Raises:
        ValueError: an empty list, or two objectives of one name.
        TypeError: something that is no objective.

    Example:
        >>> import selfalign
        >>> from selfalign import adapting
        >>> loss = selfalign.LayerSyncLoss(student_layer=8, teacher_layer=16)
        >>> list(adapting.named_objectives([loss]))
        ['layersync']
    """
    given = list(loss) if isinstance(loss, (list, tuple)) else [loss]
    if not given:
        fix = "Pass an objective, or a list of at least one."
        raise invalid("There must be an objective", "an empty list", fix)
    named: dict[str, Objective] = {}
    for objective in given:
        checked = check_objective(objective)
        name = checked.name or checked.kind
        if name in named:
            raise invalid(
                "Objectives of one model must have different names",
                f"two objectives named {name!r}",
                'Give one of them a name of its own: name="deep".',
            )
        named[name] = checked
    return named


def check_named(objectives: Mapping[str, Objective]) -> None:
    """Objectives by their names, see `named_objectives`."""
    if not isinstance(objectives, Mapping):
        check_mapping("objectives", objectives)
    for objective in objectives.values():
        if not isinstance(objective, Objective):
            check_objective(objective)
