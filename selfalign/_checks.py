"""Checks at the public entrances. Every error says the rule, what was received, and what to do."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from ._backend import dtype_of, extremes
from .typing import Settings, Step, Tensor

T = TypeVar("T")


def invalid(rule: str, received: object, fix: str) -> ValueError:
    """The ValueError of this library: three sentences under one form."""
    return ValueError(f"{rule}. Received: {received}. {fix}")


def incomplete(kind: type, what: str, wanted: str) -> TypeError:
    """The error of an objective whose class lacks something that adapters need."""
    return TypeError(
        f"An objective must have `{what}`, {wanted}. Received: {kind.__name__} without it. Define "
        "it in your class; docs/extending.md shows a whole one."
    )


def check_number(
    name: str,
    value: object,
    low: float,
    high: float = math.inf,
    fix: str = "",
    integer: bool = False,
) -> Any:
    """A finite number in [low, high], as a Python int or float."""
    kind = "an integer" if integer else "a number"
    wanted = numbers.Integral if integer else numbers.Real
    if isinstance(value, bool) or not isinstance(value, wanted):
        advice = fix or "Pass a Python int or float."
        raise TypeError(f"{name} must be {kind}. Received: {value!r}. {advice}")
    if not (_is_finite(value) and low <= float(value) <= high):
        bounds = f"finite and at least {low:g}"
        if math.isfinite(high):
            bounds = f"in [{low:g}, {high:g}]"
        received = value if _is_finite(value) else f"{value!r:.30}"
        fix = fix or "Pass a value inside these bounds."
        raise invalid(f"{name} must be {bounds}", received, fix)
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int of hundreds of digits
        return False


def check_steps(name: str, value: object, low: int) -> int:
    """A number of steps, at least `low`, as an int; 1e4 is one, too."""
    number = check_number(name, value, low)
    if number != int(number):
        raise TypeError(
            f"{name} must be an integer. Received: {value!r}. Pass a whole number of steps."
        )
    return int(number)


def check_step(step: Step) -> None:
    """A step that is a tensor: without axes, and a whole number of at least 0 where it is known."""
    shape, dtype = tuple(step.shape), dtype_of(step)
    number = shape == () and dtype.startswith(("int", "uint", "float", "bfloat"))
    known = extremes(step) if number else None
    if number and (known is None or (known[0] >= 0 and known[0] % 1 == 0)):
        return
    raise invalid(
        "step must be an integer of at least 0, or a scalar tensor that holds one",
        f"shape {shape} of dtype {dtype}" if known is None else known[0],
        "Pass the number of optimizer steps done.",
    )


def check_decay(decay: object, fix: str = "") -> None:
    """A decay that is a number, or a schedule that is constant, lies in [0, 1]."""
    constant = getattr(decay, "constant", decay)
    if isinstance(constant, numbers.Real) and not isinstance(constant, bool):
        check_number("decay", constant, 0, 1, fix)


def check_switch(name: str, value: object) -> bool:
    """True or False, and not a word or number that counts as one of them."""
    if isinstance(value, bool) or type(value).__name__ in ("bool_", "bool"):
        return bool(value)
    raise TypeError(f"{name} must be True or False. Received: {value!r:.60}. Pass a boolean.")


def check_function(name: str, value: object) -> None:
    """`value` can be called."""
    if not callable(value):
        raise TypeError(
            f"{name} must be a function. Received: {type(value).__name__} {value!r:.60}. Pass the "
            "function itself, not its name or its result."
        )


def check_list(name: str, value: object, fix: str) -> None:
    """`value` is a list or tuple."""
    if not isinstance(value, (list, tuple)):
        raise invalid(f"{name} must be a list or tuple", f"{value!r:.60}", fix)


def check_mapping(name: str, value: object) -> None:
    """`value` is a dict, or acts like one, whose keys are names."""
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return
    raise TypeError(
        f"{name} must be a dict by names. Received: {type(value).__name__} {value!r:.60}. Pass a "
        "dict whose keys are strings."
    )


def check_kind(name: str, value: object, kind: type, fix: str) -> None:
    """`value` is an object of this class."""
    if not isinstance(value, kind):
        raise TypeError(
            f"{name} must be an object of {kind.__module__}.{kind.__name__}. Received: "
            f"{type(value).__name__} {value!r:.60}. {fix}"
        )


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """`value` is one of `choices`, words or numbers."""
    scalar = isinstance(value, (str, numbers.Real)) and not isinstance(value, bool)
    if not scalar or value not in choices:
        listed = ", ".join(map(repr, choices))
        raise invalid(f"{name} must be one of {listed}", f"{value!r:.60}", "Check the spelling.")


def check_array(what: str, value: object) -> None:
    """`value` is an array of some framework."""
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        received = f"{type(value).__name__} {value!r:.60}"
        raise TypeError(f"{what} must be a tensor. Received: {received}. Convert it first.")


def check_same(teacher: Mapping[str, Tensor], student: Mapping[str, Tensor]) -> None:
    """Leaves by their paths, arrays or numbers: the same paths and shapes on both sides."""
    for path, leaf in [*teacher.items(), *student.items()]:
        if not isinstance(leaf, numbers.Number):
            check_array(f"The leaf at {path!r}", leaf)
        theirs = _shape_at(path, teacher)
        mine = _shape_at(path, student)
        if theirs != mine:
            raise invalid(
                "Teacher and student must have the same structure and shapes",
                f"at {path!r}: teacher {theirs}, student {mine}",
                "Build the teacher as a copy of the student's parameters.",
            )


def _shape_at(path: str, leaves: Mapping[str, Tensor]) -> object:
    return tuple(getattr(leaves[path], "shape", ())) if path in leaves else "missing"


def set_frozen(settings: object, **values: object) -> None:
    """Write checked values into a frozen dataclass."""
    for name, value in values.items():
        object.__setattr__(settings, name, value)


def changed_fields(settings: Any) -> Settings:
    """The fields of a frozen dataclass that are not at their defaults, as JSON can hold them."""
    changed: Settings = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value != field.default:
            changed[field.name] = list(value) if isinstance(value, tuple) else value
    return changed


def from_settings(what: str, kinds: Mapping[str, type[T]], settings: Settings) -> T:
    """The object that plain settings describe: "name" picks the class, the rest are its fields."""
    check_mapping(f"The settings of a {what}", settings)
    name: Any = settings.get("name")
    check_choice(what, name, tuple(kinds))
    kind: Any = kinds[name]
    fields = dataclasses.fields(kind)
    known = {field.name for field in fields}
    needed = {field.name for field in fields if field.default is dataclasses.MISSING}
    given = {key: value for key, value in settings.items() if key != "name"}
    if not needed <= given.keys() <= known:
        raise invalid(
            f"The settings of the {what} {name!r} must be {', '.join(f.name for f in fields)}",
            ", ".join(sorted(given)) or "none",
            "Take them from settings().",
        )
    built: T = kind(**given)
    return built
