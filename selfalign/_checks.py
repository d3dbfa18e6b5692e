"""Checks at the public entrances. Every error says the rule, what was received, and what to do."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any

from ._backend import dtype_of, framework_of, is_floating, readable


def invalid(rule: str, received: object, fix: str) -> ValueError:
    """The ValueError of this library: three sentences under one form."""
    return ValueError(f"{rule}. Received: {received}. {fix}")


def check_number(name: str, value: Any, low: float, high: float = math.inf, fix: str = "", integer: bool = False) -> Any:
    """A finite number in [low, high], as a Python int or float."""
    kind = "an integer" if integer else "a number"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral if integer else numbers.Real):
        raise TypeError(f"{name} must be {kind}. Received: {value!r}. {fix or 'Pass a Python int or float.'}")
    if not (math.isfinite(value) and low <= float(value) <= high):
        bounds = f"in [{low:g}, {high:g}]" if math.isfinite(high) else f"finite and at least {low:g}"
        raise invalid(f"{name} must be {bounds}", value, fix or "Pass a value inside these bounds.")
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def keep(settings: object, **values: Any) -> None:
    """Write checked values into a frozen dataclass."""
    for name, value in values.items():
        object.__setattr__(settings, name, value)


def build(what: str, kinds: dict[str, Any], settings: dict[str, Any]) -> Any:
    """The object that plain settings describe: "name" picks the dataclass, the rest are its fields."""
    name: Any = settings.get("name")
    check_choice(what, name, tuple(kinds))
    given, fields = {k: v for k, v in settings.items() if k != "name"}, dataclasses.fields(kinds[name])
    needed = {field.name for field in fields if field.default is dataclasses.MISSING}
    if not needed <= given.keys() <= {field.name for field in fields}:
        raise invalid(f"The settings of the {what} {name!r} must be {', '.join(field.name for field in fields)}",
                      ", ".join(sorted(given)) or "none", "Take them from settings().")  # fmt: skip
    return kinds[name](**given)


def check_array(what: str, value: Any) -> None:
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        raise TypeError(f"{what} must be a tensor. Received: {type(value).__name__} {value!r:.60}. Convert it first.")


def check_choice(name: str, value: object, choices: Any) -> None:
    if value not in choices:
        raise invalid(f"{name} must be one of {', '.join(map(repr, choices))}", repr(value), "Check the spelling.")


def check_features(side: str, tokens: Any) -> None:
    """Tokens of one side, "student" or "teacher": [B, N, D], floating, not empty."""
    check_array(f"The {side}'s tokens", tokens)
    shape = tuple(tokens.shape)
    if len(shape) != 3:
        raise invalid("Tokens must have the shape [B, N, D]", f"{side} tokens of shape {shape}",
                      "Flatten the token grid, or select the features in the adapter.")  # fmt: skip
    if 0 in shape:
        raise invalid("Tokens must not be empty", f"{side} tokens of shape {shape}", "Skip empty batches in the training loop.")
    if not is_floating(tokens):
        raise TypeError(f"Tokens must be floating point. Received: {side} tokens of dtype {dtype_of(tokens)}. "
                        "Pass a block's features, not indices.")  # fmt: skip


def check_tokens(student: Any, teacher: Any) -> None:
    """Student and teacher tokens: both [B, N, D], of one shape."""
    check_features("student", student)
    check_features("teacher", teacher)
    if tuple(student.shape) != tuple(teacher.shape):
        raise invalid(
            "Student and teacher tokens must have the same shape [B, N, D]",
            f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}",
            "Tap both sides of one model on the same batch, and give the projector the teacher's width.",
        )


def check_time(path: Any, t: Any, batch: int | None = None) -> None:
    """Times of one sample each, [B], of the path's kind (integer steps or continuous) and inside it.

    Values are looked at only where that is free (see `readable`): traced times and times on a GPU pass.
    """
    shape = tuple(getattr(t, "shape", ()))
    if len(shape) != 1 or (batch is not None and shape != (batch,)):
        expected = "[B]" if batch is None else f"[B] = ({batch},)"
        raise invalid(f"t must hold one time per sample, shape {expected}", f"shape {shape}", "Pass a vector of times.")
    if shape == (0,):
        raise invalid("t must not be empty", f"shape {shape}", "Skip empty batches in the training loop.")
    check_kind(path, t)


def check_kind(path: Any, t: Any) -> None:
    """Times of any shape: of the path's kind and inside it."""
    if path.discrete == is_floating(t) or dtype_of(t) == "bool":
        kind = "integer steps" if path.discrete else "floating-point times"
        raise TypeError(f"The {path.name} path takes {kind}. Received: t of dtype {dtype_of(t)}. "
                        "Check which path the model is trained with, and the scale of its time.")  # fmt: skip
    low, high = path.bounds
    check_values("t", t, low, high, f"The {path.name} path counts time in [{low:g}, {high:g}]: check the model's time scale.")


def check_draws(u: Any, t: Any) -> None:
    """Uniform draws in [0, 1), one for each time in `t`."""
    shape = tuple(u.shape) if hasattr(u, "shape") else u
    if shape != tuple(t.shape):
        raise invalid("u must hold one draw per sample, of t's shape", f"u {shape}, t {tuple(t.shape)}",
                      "Draw u like t: uniform in [0, 1).")  # fmt: skip
    if not is_floating(u):
        raise TypeError(f"u must be floating point. Received: dtype {dtype_of(u)}. Draw u uniform in [0, 1).")
    check_values("u", u, 0.0, 1.0, "Draw u uniform in [0, 1): the loss scales it to the gap.")


def check_values(name: str, values: Any, low: float, high: float, fix: str) -> None:
    """All `values` in [low, high], NaN excluded, where looking costs nothing."""
    if not readable(values):
        return
    import numpy

    # not through keras.ops: inside jit that would trace a constant
    values = values.detach() if framework_of(values) == "torch" else numpy.asarray(values)
    smallest, largest = float(values.min()), float(values.max())
    if not (low <= smallest and largest <= high):
        raise invalid(f"{name} must lie in [{low:g}, {high:g}]", f"values from {smallest:g} to {largest:g}", fix)


def check_same(teacher: Mapping[str, Any], student: Mapping[str, Any]) -> None:
    """Leaves by their paths, arrays or numbers: the same paths and shapes on both sides."""
    for path, leaf in [*teacher.items(), *student.items()]:
        if not isinstance(leaf, numbers.Number):
            check_array(f"The leaf at {path!r}", leaf)
        sides = [tuple(getattr(side[path], "shape", ())) if path in side else "missing" for side in (teacher, student)]
        if sides[0] != sides[1]:
            raise invalid("Teacher and student must have the same structure and shapes",
                          f"at {path!r}: teacher {sides[0]}, student {sides[1]}",
                          "Build the teacher as a copy of the student's parameters.")  # fmt: skip
