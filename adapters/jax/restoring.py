"""The teacher in a checkpoint: with the settings it was trained by, and back from any form."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from selfalign.adapting import Tensor, Tree, invalid, named_objectives

from .by_name import Loss
from .frozen import is_placeholder
from .teacher import Teacher, check_teacher
from .trees import is_floating, map_with_path, path_of

# What may differ in a resumed run where the caller says so. The rest decides what the average is.
CHANGEABLE = ("weight", "decay", "max_gap", "random_gap")
_PAGE = 4096  # settings fill whole pages, so that their array seldom changes its shape


def teacher_state(loss: Loss, teacher: Teacher) -> dict[str, Any]:
    """What to save of a teacher: a dict of arrays, the objectives' settings among them.

    Args:
        loss: the objective, or a list of them.
        teacher: the EMA.

    Returns:
        "average" and "step" of the teacher, and "settings", JSON as an array of bytes. orbax,
        flax.serialization and the others take it like any state. `restore_teacher` takes it back.

    Raises:
        TypeError: `teacher` is no `Teacher`; no objective.

    Example:
        >>> import jax.numpy as jnp, selfalign
        >>> from selfalign.adapters import jax as sra
        >>> loss = selfalign.SRALoss(student_layer=2, teacher_layer=4)
        >>> sorted(sra.teacher_state(loss, sra.init_teacher({"w": jnp.ones(3)})))
        ['average', 'settings', 'step']
    """
    check_teacher(teacher)
    text = json.dumps(_settings(loss), sort_keys=True).encode()
    padded = text.ljust(-len(text) // _PAGE * -_PAGE)
    settings = np.frombuffer(padded, "uint8")
    return {"average": teacher.average, "step": teacher.step, "settings": settings}


def restore_teacher(
    loss: Loss, params: Tree, state: Any, *, changed: str | Iterable[str] = ()
) -> Teacher:
    """The teacher from a checkpoint, in whatever form it came back.

    Args:
        loss: the objective, or a list of them.
        params: the student's parameters; the teacher gets their form and lies where they lie.
        state: what `teacher_state` gave, or a `Teacher`, or the dicts and lists that a library
            makes of these where it has no target to restore into. A bare `Teacher` has no settings,
            and they are not checked.
        changed: settings that may differ from the saved run's: "weight", "decay", "max_gap",
            "random_gap".

    Returns:
        A `Teacher`.

    Raises:
        ValueError: arrays that are missing or of other shapes, or not finite; other settings.
        TypeError: no such state.

    Example:
        >>> import jax.numpy as jnp, selfalign
        >>> from selfalign.adapters import jax as sra
        >>> loss = selfalign.SRALoss(student_layer=2, teacher_layer=4)
        >>> params = {"blocks": [jnp.ones(3), jnp.ones(3)]}
        >>> restored = {"average": {"blocks": {"0": jnp.zeros(3), "1": jnp.ones(3)}}, "step": 7}
        >>> teacher = sra.restore_teacher(loss, params, restored)
        >>> teacher.average["blocks"][0].tolist(), int(teacher.step)
        ([0.0, 0.0, 0.0], 7)
    """
    parts = state._asdict() if isinstance(state, Teacher) else state
    if not isinstance(parts, Mapping) or not {"average", "step"} <= set(parts):
        received = sorted(map(str, parts)) if isinstance(parts, Mapping) else type(state).__name__
        raise TypeError(
            "state must have the entries average and step. "
            f"Received: {received}. Pass what was saved of teacher_state(loss, teacher)."
        )
    if "settings" in parts:
        _check_settings(_decoded(parts["settings"]), _settings(loss), changed)
    saved = {
        _name(path_of(path)): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(parts["average"])
    }

    def taken(path: str, leaf: Any) -> Any:
        if is_floating(leaf):
            return _average(path, saved.get(_name(path)), leaf)
        return saved.get(_name(path), leaf)

    average = map_with_path(taken, params)
    return Teacher(average, jnp.asarray(parts["step"], "int32"))


def _name(path: str) -> str:
    """A path without what libraries add or drop where they make dicts of variables."""
    return path.removesuffix("/value")


def _average(path: str, saved: Any, leaf: Tensor) -> Tensor:
    """The saved array, of an average's dtype, where the student's lies."""
    fits = is_floating(saved) and saved.shape == leaf.shape
    stands_for_it = is_floating(saved) and is_placeholder(saved, leaf)
    if not fits and not stands_for_it:
        received = "nothing" if saved is None else getattr(saved, "shape", saved)
        raise invalid(
            "The saved average must have the arrays of params",
            f"at {path!r}: {received!s:.60} instead of {tuple(leaf.shape)}",
            "Restore with the model that the average was made of.",
        )
    if not bool(jnp.isfinite(jnp.asarray(saved)).all()):
        fix = "Take an earlier checkpoint, from before the run diverged."
        raise invalid("The saved average must be finite", f"NaN or infinity at {path!r}", fix)
    if stands_for_it:
        return jnp.asarray(saved, leaf.dtype)
    array = jnp.asarray(saved, jnp.promote_types(leaf.dtype, "float32"))
    sharding = getattr(leaf, "sharding", None)
    return array if sharding is None else jax.device_put(array, sharding)


def _settings(loss: Loss) -> dict[str, Any]:
    """All settings, by "objective/setting"."""
    return {
        f"{name}/{setting}": value
        for name, objective in named_objectives(loss).items()
        for setting, value in objective.settings().items()
    }


def _decoded(settings: Any) -> dict[str, Any]:
    try:
        return dict(json.loads(bytes(np.asarray(settings, "uint8"))))
    except (ValueError, TypeError) as error:
        fix = "Pass what was saved of teacher_state(loss, teacher), or leave settings out."
        raise invalid("settings must be JSON as bytes", f"{settings!r:.60}", fix) from error


def _check_settings(
    theirs: dict[str, Any], ours: dict[str, Any], changed: str | Iterable[str]
) -> None:
    allowed = {changed} if isinstance(changed, str) else set(changed)
    if not allowed <= set(CHANGEABLE):
        raise invalid(
            f"changed= takes names of settings that may differ: {', '.join(CHANGEABLE)}",
            ", ".join(map(repr, sorted(allowed))),
            "Build the loss with the other settings as they were saved.",
        )
    mine = json.loads(json.dumps(ours))
    names = sorted(name for name in {*theirs, *mine} if theirs.get(name) != mine.get(name))
    refused = {name.rpartition("/")[2] for name in names} - allowed
    if not refused:
        return
    fix = "Build the loss with the settings that were saved, or start afresh."
    if refused <= set(CHANGEABLE):
        fix = f"If the change is meant, pass changed={tuple(sorted(refused | allowed))}."
    listed = ", ".join(f"{n} {theirs.get(n)!r:.60} instead of {mine.get(n)!r:.60}" for n in names)
    raise invalid("The teacher must come from the same settings", listed, fix)
