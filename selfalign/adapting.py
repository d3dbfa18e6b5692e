"""All that an adapter may import of the core, ours or a stranger's.

An adapter knows models, not methods. It reads the student's tokens, finds the target where the
objective's source says, and hands both to the objective:

    named_objectives(loss)                what the user passed, by name, checked
    given_targets(objectives, ...)        the tokens that the caller gives, by name
    objective.layers(depth)               which layers to tap
    objective.source                      where the target comes from, one of `sources`
    head_shapes, init_head, apply_head    the head's parameters, from draws of the adapter's
    path.add_less_noise(...)              what an EMA teacher sees
    objective.evaluate(params, ...)       the unweighted term and what to log
    objective.weigh(distance, step)       the term
    ema_update, schedules.Every           the average

An adapter holds weights, draws random numbers and runs models. It contains no formula.
docs/extending.md describes how to write one, tests/adapters/contract.py holds it to the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import paths, schedules
from ._backend import converted, host_randomness_kept, load_keras, on_backend, tensors_in
from ._checks import (
    check_array,
    check_choice,
    check_function,
    check_mapping,
    check_number,
    check_same,
    check_steps,
    check_switch,
    invalid,
)
from ._named import check_named
from ._named import check_objective as check_objective
from ._named import named_objectives as named_objectives
from .distances import check_features
from .ema import ema_update
from .heads import PROJECTOR, Head, check_params
from .masks import check_mask, check_weights
from .objective import Objective
from .objectives import from_settings
from .sources import EMATeacher, Given, LaterLayer, Nothing, Source
from .time_gap import gap_range
from .typing import (
    Draws,
    Mask,
    Metrics,
    Parameters,
    Scalar,
    Settings,
    Step,
    Tensor,
    Times,
    Tokens,
    Tree,
)

__all__ = [
    "PROJECTOR",
    "Draws",
    "EMATeacher",
    "Given",
    "Head",
    "LaterLayer",
    "Mask",
    "Metrics",
    "Nothing",
    "Objective",
    "Parameters",
    "Scalar",
    "Settings",
    "Source",
    "Step",
    "Tensor",
    "Times",
    "Tokens",
    "Tree",
    "apply_head",
    "check_choice",
    "check_features",
    "check_function",
    "check_mask",
    "check_number",
    "check_objective",
    "check_same",
    "check_steps",
    "check_switch",
    "check_weights",
    "converted",
    "ema_update",
    "from_settings",
    "gap_range",
    "given_targets",
    "head_shapes",
    "host_randomness_kept",
    "init_head",
    "invalid",
    "load_keras",
    "named_objectives",
    "on_backend",
    "paths",
    "schedules",
    "shared_teacher",
    "tensors_in",
    "with_source",
]


_WIDTH = "It is the feature width D of the student's block."


def shared_teacher(objectives: Mapping[str, Objective]) -> EMATeacher | None:
    """The source of those objectives that have an EMA teacher: they share one. None: no teacher.

    Raises:
        ValueError: objectives that disagree on path, gap or decay.

    Example:
        >>> import selfalign
        >>> from selfalign import adapting
        >>> loss = selfalign.SRALoss(student_layer=8, teacher_layer=20)
        >>> adapting.shared_teacher({"sra": loss}).decay_at(0)
        0.9999
    """
    check_named(objectives)
    first: EMATeacher | None = None
    for name, objective in objectives.items():
        source = objective.source
        if not isinstance(source, EMATeacher):
            continue
        first = first or source
        for setting in ("path", "max_gap", "random_gap", "decay"):
            mine = getattr(source, setting)
            theirs = getattr(first, setting)
            if mine != theirs:
                raise invalid(
                    "Objectives share one EMA teacher, and must agree on path, gap and decay",
                    f"{setting} {mine} of {name!r}, and {theirs}",
                    "Give them the same, or train with one of them.",
                )
    return first


def with_source(objectives: Mapping[str, Objective], kind: type[Source]) -> list[str]:
    """The names of the objectives whose target comes from this kind of source.

    Example:
        >>> import selfalign
        >>> from selfalign import adapting
        >>> objectives = {"repa": selfalign.REPALoss(student_layer=4, width=8)}
        >>> adapting.with_source(objectives, adapting.Given)
        ['repa']
    """
    check_named(objectives)
    if not (isinstance(kind, type) and issubclass(kind, Source)):
        raise TypeError(
            f"kind must be a class of selfalign.sources. Received: {kind!r:.60}. Pass for instance "
            "sources.EMATeacher."
        )
    return [name for name, each in objectives.items() if isinstance(each.source, kind)]


def given_targets(
    objectives: Mapping[str, Objective], given: Any, several: bool
) -> dict[str, Tensor]:
    """The caller's target tokens, by the names of the objectives that take them.

    Args:
        objectives: by name.
        given: one array, or for a list of objectives a dict by name; None: nothing.
        several: whether the user passed a list of objectives.

    Raises:
        ValueError: a target that is missing, or one for an objective that takes none.
        TypeError: no array.

    Example:
        >>> import numpy as np, selfalign
        >>> from selfalign import adapting
        >>> objectives = {"repa": selfalign.REPALoss(student_layer=4, width=8)}
        >>> list(adapting.given_targets(objectives, np.ones((2, 3, 8)), several=False))
        ['repa']
    """
    several = check_switch("several", several)
    wanting = set(with_source(objectives, Given))
    named = {} if given is None else given
    if given is not None and not several:
        named = {next(iter(objectives)): given}
    if not isinstance(named, Mapping) or set(named) != wanting:
        form = ", a dict by name for a list of them" if several else ""
        received = f"a {type(given).__name__}"
        if isinstance(given, Mapping):
            received = f"a dict with {sorted(map(str, given))}"
        wanted = f"the objectives {sorted(wanting)}" if wanting else "objectives that take none"
        raise invalid(
            f"target_tokens= must be the targets that the objectives take{form}",
            f"{'none' if given is None else received}, for {wanted}",
            "Pass the encoder's tokens [B, N, width] for each that takes them, and nothing else.",
        )
    for name, tokens in named.items():
        check_array(f"target_tokens= of {name!r}", tokens)
    return dict(named)


def head_shapes(objective: Objective, width: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the draws for the objective's head, by name, for tokens of `width`.

    Example:
        >>> import selfalign
        >>> from selfalign import adapting
        >>> loss = selfalign.SRALoss(student_layer=8, teacher_layer=20)
        >>> adapting.head_shapes(loss, width=8)
        {'hidden_kernel': (8, 16), 'output_kernel': (16, 8)}
    """
    check_objective(objective)
    check_number("width", width, 1, fix=_WIDTH, integer=True)
    return objective.head.draw_shapes(width, objective.source.target_width(width))


@on_backend
def init_head(objective: Objective, draws: Mapping[str, Any]) -> dict[str, Tensor]:
    """The head's initial parameters from draws uniform in [0, 1), of the shapes of `head_shapes`.

    Example:
        >>> import numpy as np, selfalign
        >>> from selfalign import adapting
        >>> loss = selfalign.SRALoss(student_layer=8, teacher_layer=20)
        >>> draws = {k: np.zeros(v) for k, v in adapting.head_shapes(loss, width=8).items()}
        >>> sorted(adapting.init_head(loss, draws))
        ['hidden_bias', 'hidden_kernel', 'output_bias', 'output_kernel']
    """
    check_objective(objective)
    check_mapping("draws", draws)
    missing = sorted({name for name in objective.head.names if "kernel" in name} - set(draws))
    if missing and type(objective.head) is type(PROJECTOR):
        raise invalid(
            "draws must be those that head_shapes names",
            f"{', '.join(sorted(draws)) or 'none'}, without {', '.join(missing)}",
            "Draw one array for each of its entries.",
        )
    converted_draws = {name: converted(value) for name, value in draws.items()}
    return objective.head.init(converted_draws)


@on_backend
def apply_head(objective: Objective, params: Parameters, tokens: Tokens) -> Tokens:
    """The student's tokens [B, N, D] through the objective's head.

    Raises:
        ValueError: tokens of another width than the head's, or not of shape [B, N, D].

    Example:
        >>> import numpy as np, selfalign
        >>> from selfalign import adapting
        >>> loss = selfalign.LayerSyncLoss(student_layer=8, teacher_layer=16)
        >>> adapting.apply_head(loss, {}, np.ones((1, 2, 4), "float32")).shape == (1, 2, 4)
        True
    """
    check_objective(objective)
    check_features("student", tokens)
    check_params(objective.head, params, tokens)
    return objective.head.apply(params, tokens)
