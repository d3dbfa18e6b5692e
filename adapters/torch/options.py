"""The options of SelfAlignment: what they were called before, and which go together."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from selfalign.adapting import EMATeacher as TeacherSource
from selfalign.adapting import check_choice, check_function, check_number, check_switch, invalid

from .average import Average, EMATeacher
from .following import Followed

OPTIONS = (
    "blocks",
    "taps",
    "width",
    "select",
    "call",
    "seed",
    "compile",
    "log_metrics",
    "teacher",
    "checks",
)
CHECKS = ("on", "off", "finite")

_RENAMED = {
    "student": "taps=(student, teacher), paths of two modules",
    "example": "`with align.recording(): model(...)` after building it, or nothing: the width is "
    "found at the first forward",
    "truncate": "teacher=EMATeacher(truncate=True)",
    "offload": "teacher=EMATeacher(offload=True)",
    "teacher_dtype": "teacher=EMATeacher(dtype=torch.bfloat16)",
    "batch_share": "teacher=EMATeacher(batch_fraction=0.5)",
    "check_condition": 'checks="on" or "off"',
    "check_finite": 'checks="finite"',
}


def refuse_unknown(given: Mapping[str, Any]) -> None:
    """Refuse options that do not exist; of those of the first edition, name the new one.

    Raises:
        TypeError: an option that does not exist.
    """
    for name, value in given.items():
        if name in _RENAMED:
            raise TypeError(
                f"SelfAlignment's option {name}= must be written as in the second edition. "
                f"Received: {name}={value!r:.60}. Pass {_RENAMED[name]}."
            )
        raise TypeError(
            f"SelfAlignment must be given options that it has. Received: {name}={value!r:.60}. It "
            f"has: {', '.join(OPTIONS)}."
        )


def check_model(model: Any) -> None:
    """What can be attached: a module whose parameters have values that can be trained.

    Raises:
        ValueError: lazy modules that have not run, or inference mode.
        TypeError: something else than a module.
    """
    if not isinstance(model, nn.Module):
        kind = "the class" if isinstance(model, type) else f"a {type(model).__name__},"
        raise TypeError(
            "model must be a torch.nn.Module, the one that is trained. Received: "
            f"{kind} {model!r:.60}. Pass the module itself."
        )
    if any(isinstance(p, nn.UninitializedParameter) for p in model.parameters()):
        raise invalid(
            "The model's parameters must have values",
            f"{type(model).__name__} with lazy modules that have not run",
            "Call the model once, without gradient, before attaching.",
        )
    if torch.is_inference_mode_enabled():
        raise invalid(
            "A model must be attached where it can be trained",
            "torch.inference_mode()",
            "Attach outside of it.",
        )


def check_values(
    blocks: Any,
    width: int | None,
    select: Callable[..., Any] | None,
    call: Callable[..., Any] | None,
    seed: int | None,
) -> None:
    """Options that may be left out, where they are given.

    Raises:
        ValueError: a width below 1, or a seed that a generator does not take.
        TypeError: something else than whole numbers and functions.
    """
    paths = [blocks] if isinstance(blocks, str) else blocks
    listed = isinstance(paths, (list, tuple)) and all(isinstance(path, str) for path in paths)
    if blocks is not None and not listed:
        raise TypeError(
            f"blocks= must be a path, or several in a list. Received: {blocks!r:.60}. Pass for "
            'instance "blocks", the attribute that holds the list of blocks.'
        )
    if width is not None:
        check_number("width", width, 1, fix="It is the width D of the tokens.", integer=True)
    if seed is not None:
        fix = "Pass a whole number, or leave it out."
        check_number("seed", seed, 0, 2**63 - 1, fix, integer=True)
    for name, function in (("select", select), ("call", call)):
        if function is not None:
            check_function(name, function)


def check_options(checks: str, compile: Any, log_metrics: Any) -> Mapping[str, Any] | None:
    """Options of torch.compile, or None where nothing is compiled.

    Raises:
        ValueError: a word that checks= does not know.
        TypeError: something else than booleans or options.
    """
    check_choice("checks", checks, CHECKS)
    check_switch("log_metrics", log_metrics)
    if isinstance(compile, Mapping):
        known = set(inspect.signature(torch.compile).parameters) - {"model"}
        unknown = [name for name in compile if name not in known]
        if unknown:
            raise TypeError(
                "compile must hold options that torch.compile has. Received: "
                f"{unknown[0]!r}. It has: {', '.join(sorted(known))}."
            )
        return dict(compile)
    if not isinstance(compile, bool):
        raise TypeError(
            "compile must be True, False, or a dict of options of torch.compile. Received: "
            f"{compile!r:.60}. Pass a boolean or a dict."
        )
    return {} if compile else None


def make_teacher(
    model: nn.Module,
    source: TeacherSource | None,
    given: Any,
    later: list[str],
) -> tuple[Average | Followed | None, float]:
    """The teacher that the objectives need, and the fraction of a batch that it sees.

    Args:
        model: the user's.
        source: the teacher's settings, or None where no objective has one.
        given: the option teacher=.
        later: paths of the blocks after the teacher's last layer.

    Raises:
        ValueError: options that do not go together.
    """
    if isinstance(given, str):
        raise invalid(
            "teacher= must be an EMATeacher or an EMA of yours",
            f"teacher={given!r}",
            "Pass paths of modules as taps=(student, teacher).",
        )
    if source is None:
        if given is not None:
            raise invalid(
                "teacher= is for objectives with an EMA teacher",
                f"a {type(given).__name__}, and no such objective",
                "Leave teacher= out.",
            )
        return None, 1.0
    options = given if isinstance(given, EMATeacher) else EMATeacher(model=given)
    if options.model is not None:
        followed = Followed(model, options.model)
        if any(part is model for part in followed.module.modules()):
            raise _the_model_itself()
        return followed, options.batch_fraction
    if options.truncate and not later:
        raise invalid(
            "truncate= cuts the blocks after the teacher's layer off a teacher of ours",
            "no blocks that are known to run after it",
            "Leave truncate= out.",
        )
    return Average(model, options, later), options.batch_fraction


def _the_model_itself() -> ValueError:
    return invalid(
        "The teacher must be another model than the student",
        "teacher=model",
        "For the model's own later layer in the same forward pass the objective "
        "selfalign.LayerSyncLoss, with projector=True if you want SRA's head; for a second "
        "forward of the model as it is pass SRALoss(decay=0) and leave teacher= out.",
    )
