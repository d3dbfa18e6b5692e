"""What a user sets beside model and loss, and the checks of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import keras

from selfalign.adapting import (
    EMATeacher,
    Objective,
    Tensor,
    Times,
    check_choice,
    check_function,
    check_number,
    invalid,
    named_objectives,
    paths,
    shared_teacher,
    with_source,
)

Layers: TypeAlias = Sequence[str | int]
"""Two layers of a backbone, the student's and the target's, or the student's alone."""

Select: TypeAlias = Callable[[Tensor], Tensor]
"""A block's output -> tokens [B, N, D]."""

DrawTime: TypeAlias = Callable[[int, keras.random.SeedGenerator], Times]
"""(batch size, seed generator) -> times [B]."""

PREDICTIONS = ("velocity", "noise", "data")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `SelfAligned`, which describes them."""

    blocks: str | None
    taps: Layers | Mapping[str, Layers] | None
    select: Select | None
    width: int | None
    arrange: Callable[..., Any] | None
    path: paths.Path | str | None
    prediction: str
    draw_time: DrawTime | None
    label_dropout: float
    null_label: int | None
    seed: int | None
    checks: str = "on"

    def __post_init__(self) -> None:
        check_choice("prediction", self.prediction, PREDICTIONS)
        check_choice("checks", self.checks, ("on", "off"))
        fix = "It is a fraction of the samples."
        check_number("label_dropout", self.label_dropout, 0, 1, fix)
        if self.label_dropout and self.null_label is None:
            raise invalid(
                "label_dropout needs the label that stands for none",
                "null_label=None",
                "Pass null_label=.",
            )
        whole = {"null_label": self.null_label, "seed": self.seed}
        for name, number in whole.items():
            if number is not None:
                fix = "Pass a whole number, or leave it out."
                check_number(name, number, 0, 2**31 - 1, fix, integer=True)
        functions = {"select": self.select, "arrange": self.arrange, "draw_time": self.draw_time}
        for name, function in functions.items():
            if function is not None:
                check_function(name, function)
        if self.blocks is not None and not isinstance(self.blocks, str):
            raise TypeError(
                f"blocks must be a string. Received: {self.blocks!r:.60}. Pass the blocks' names, "
                'such as "block_{}".'
            )
        if self.width is not None:
            check_number("width", self.width, 1, fix="It is the width D of tokens.", integer=True)


def training_path(objectives: Mapping[str, Objective], path: paths.Path | str | None) -> paths.Path:
    """The path of the training noise: the EMA teacher's, else the one given, else linear."""
    source = shared_teacher(objectives)
    if source is None:
        return paths.resolve("linear" if path is None else path)
    shared = paths.resolve(source.path)
    if path is not None and paths.resolve(path) != shared:
        raise invalid(
            "path= must be the path of the objective that has an EMA teacher",
            f"{paths.resolve(path)}, where the objective has {shared}",
            "Leave path= out, or give the objective the same.",
        )
    return shared


def checked_objectives(
    backbone: object,
    loss: Objective | Sequence[Objective],
    teacher: object,
    options: Mapping[str, object],
) -> dict[str, Objective]:
    """The objectives by name, after a check of what comes with them.

    Raises:
        ValueError: a backbone, a teacher or an option that cannot be used.
        TypeError: something that is no objective.
    """
    _check_backbone(backbone)
    _check_old_names(options)
    objectives = named_objectives(loss)
    _check_teacher(teacher, backbone, objectives)
    return objectives


def _check_backbone(backbone: object) -> None:
    """A built Keras model in float32, on a backend that trains: raises ValueError otherwise."""
    backend = keras.backend.backend()
    if backend not in ("torch", "jax", "tensorflow"):
        raise invalid(
            "SelfAligned needs a Keras backend that trains",
            repr(backend),
            "Set KERAS_BACKEND to torch, jax or tensorflow before Keras is imported.",
        )
    if not isinstance(backbone, keras.Model) or not backbone.built:
        raise invalid(
            "The backbone must be a keras.Model that is built",
            f"{type(backbone).__name__} {backbone!r:.60}",
            "Call it once on a batch first, or give it an Input.",
        )
    half = [v.path for v in backbone.weights if v.dtype in ("float16", "bfloat16")]
    if half:
        raise invalid(
            "Variables must be float32: an EMA in half precision never moves",
            f"{half[0]} in half precision",
            'Use the dtype policy "mixed_float16" or "mixed_bfloat16".',
        )


def _check_teacher(teacher: object, backbone: object, objectives: Mapping[str, Objective]) -> None:
    """`teacher=` is a second backbone, and an objective needs it: raises ValueError otherwise."""
    if teacher is None:
        return
    if not isinstance(teacher, keras.Model) or not teacher.built or teacher is backbone:
        received = f"teacher={teacher!r:.60}" if teacher is not backbone else "the backbone itself"
        raise invalid(
            "teacher= must be a second backbone, a keras.Model that is built",
            received,
            'Pass another instance. Layers are now named by taps=("block_2", "block_4").',
        )
    if not with_source(objectives, EMATeacher):
        raise invalid(
            "teacher= must come with an objective that has an EMA teacher",
            f"objectives {', '.join(objectives)}",
            "Leave teacher= out.",
        )


def _check_old_names(options: Mapping[str, object]) -> None:
    """No option of the first edition: raises ValueError otherwise."""
    if "student" in options:
        raise invalid(
            "The tapped layers must be given together, as taps=(student, teacher)",
            f"student={options['student']!r}",
            'Write for instance taps=("block_2", "block_4").',
        )
