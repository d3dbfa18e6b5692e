"""The EMA teacher: an average of the student's parameters, and the number of steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from selfalign.adapting import (
    Scalar,
    Tensor,
    Tree,
    check_same,
    ema_update,
    invalid,
    named_objectives,
    schedules,
)

from .by_name import Loss, teacher_of
from .frozen import Trained, is_placeholder, placeholder, trained_paths
from .trees import floating, is_floating, map_with_path, replaced

Averages: TypeAlias = dict[str, Tensor]
"""Arrays by their paths."""


class Teacher(NamedTuple):
    """The EMA teacher: a pytree to carry through jitted steps and into checkpoints.

    Attributes:
        average: the EMA of the student's parameters, of their structure and sharding; float32, or
            float64 where they are. A frozen leaf is the student's own: one number of its dtype
            stands in its place.
        step: the number of optimizer steps done, an int32 scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> from selfalign.adapters import jax as sra
        >>> sra.init_teacher({"w": jnp.ones(3)})._fields
        ('average', 'step')
    """

    average: Tree
    step: jax.Array


def init_teacher(params: Tree, trained: Trained | None = None) -> Teacher:
    """A teacher that equals the student: a float32 copy of the parameters, and step 0.

    Args:
        params: the student's parameters, any pytree. Arrays are copied, so that both sides can be
            donated. Floating-point ones are averaged; all other leaves (integers, complex numbers,
            PRNG keys, functions) stay as they are now.
        trained: which arrays are averaged; None: all. The others are frozen: they are the student's
            own and take no memory here. A tree of booleans, or of some of its upper levels; or a
            function (path, leaf) -> bool with paths such as "blocks/0/kernel". For an `nnx.Module`
            or `nnx.State` a filter of NNX, such as `nnx.LoRAParam`.

    Returns:
        A `Teacher`, sharded like `params`.

    Raises:
        ValueError: no floating-point array in `params`, or none that is trained; booleans of
            another structure.
        TypeError: `trained` is something else.

    Example:
        >>> import jax.numpy as jnp
        >>> from selfalign.adapters import jax as sra
        >>> teacher = sra.init_teacher({"w": jnp.ones(3, "bfloat16"), "count": 7})
        >>> str(teacher.average["w"].dtype), teacher.average["count"], int(teacher.step)
        ('float32', 7, 0)
        >>> params = {"base": jnp.ones((9, 9), "bfloat16"), "lora": jnp.ones((9, 2))}
        >>> teacher = sra.init_teacher(params, trained={"base": False, "lora": True})
        >>> sra.teacher_params(teacher, params)["base"] is params["base"]
        True
    """
    averaged = set(floating(params))
    if not averaged:
        raise invalid(
            "params must hold floating-point arrays",
            jax.tree.structure(params),
            "Pass the model's parameters.",
        )
    if trained is not None:
        averaged &= trained_paths(params, trained)
        if not averaged:
            raise invalid(
                "There must be trained floating-point arrays",
                f"trained={trained!r:.80}, which keeps none",
                "Leave trained= out to average all parameters.",
            )

    def start(path: str, leaf: Any) -> Any:
        if is_floating(leaf):
            return _copy(leaf) if path in averaged else placeholder(leaf)
        return leaf.copy() if isinstance(leaf, jax.Array) else leaf

    return Teacher(map_with_path(start, params), jnp.zeros((), "int32"))


def _copy(leaf: Tensor) -> jax.Array:
    return jnp.array(leaf, jnp.promote_types(leaf.dtype, "float32"), copy=True)


def update_teacher(
    loss: Loss, teacher: Teacher, params: Tree, *, stepped: bool | jax.Array = True
) -> Teacher:
    """One EMA step toward the student, once per optimizer step and after it.

        average <- decay * average + (1 - decay) * params

    Args:
        loss: the objective, or a list of them; its decay is taken at `teacher.step`.
        teacher: before this step. Donate it to jit: the update is in place then.
        params: the student's parameters after the optimizer's step, of the structure that
            `init_teacher` got.
        stepped: whether the optimizer made a step; a boolean, traced or not. Where it did not, the
            teacher stays as it is. For gradients that `optax.MultiSteps` accumulates:
            `optimizer.has_updated(state)`; for steps that `optax.apply_if_finite` skips:
            `state.last_finite`.

    Returns:
        The new teacher, its step one further. Leaves that are no floating-point arrays are the
        teacher's own.

    Raises:
        ValueError: parameters whose structure or shapes differ; the message names the first path.
            An average in half precision. No objective with an EMA teacher.
        TypeError: `teacher` is no `Teacher`; `stepped` is no boolean.

    Example:
        >>> import jax.numpy as jnp, selfalign
        >>> from selfalign.adapters import jax as sra
        >>> loss = selfalign.SRALoss(student_layer=2, teacher_layer=4, decay=0.75)
        >>> teacher = sra.init_teacher({"w": jnp.zeros(2)})
        >>> teacher = sra.update_teacher(loss, teacher, {"w": jnp.ones(2)})
        >>> teacher.average["w"].tolist(), int(teacher.step)
        ([0.25, 0.25], 1)

    Reference: Jiang et al., SRA, 2025, arXiv 2505.02831.
    """
    source = teacher_of(named_objectives(loss))
    old, new = _both_sides(teacher, params)
    _check_boolean(stepped)
    decay = source.decay_at(teacher.step)
    moves = stepped
    if isinstance(source.decay, schedules.Every):
        moves = jnp.logical_and(stepped, decay < 1)
    # without the arithmetic where nothing moves
    moved = ema_update(old, new, decay) if moves is True else _if(moves, old, new, decay)
    return Teacher(replaced(teacher.average, moved), teacher.step + jnp.asarray(stepped, "int32"))


def _if(moves: Any, old: Averages, new: Averages, decay: Scalar) -> Averages:
    moved: Averages = jax.lax.cond(moves, lambda: ema_update(old, new, decay), lambda: old)
    return moved


def _check_boolean(stepped: object) -> None:
    if isinstance(stepped, bool):
        return
    if getattr(stepped, "dtype", None) != "bool" or getattr(stepped, "shape", None) != ():
        raise TypeError(
            f"stepped must be one boolean. Received: {type(stepped).__name__} {stepped!r:.60}. "
            "Pass whether the optimizer made a step, such as optimizer.has_updated(state)."
        )


def teacher_params(teacher: Teacher, params: Tree) -> Tree:
    """The teacher's parameters in the dtypes of the student's.

    With them the teacher runs at the student's cost. They are also what to sample from.

    Args:
        teacher: the EMA.
        params: the student's parameters: their dtypes, and those of them that are frozen.

    Returns:
        A pytree of the structure of `params`.

    Raises:
        ValueError, TypeError: as in `update_teacher`.

    Example:
        >>> import jax.numpy as jnp
        >>> from selfalign.adapters import jax as sra
        >>> params = {"w": jnp.ones(3, "bfloat16")}
        >>> str(sra.teacher_params(sra.init_teacher(params), params)["w"].dtype)
        'bfloat16'
    """
    average, student = _both_sides(teacher, params)
    cast = {path: leaf.astype(student[path].dtype) for path, leaf in average.items()}
    frozen = {path: leaf for path, leaf in floating(params).items() if path not in average}
    return replaced(teacher.average, cast | frozen)


def check_teacher(teacher: object) -> None:
    """`teacher` is a `Teacher`."""
    if isinstance(teacher, Teacher):
        return
    fix = "Build it with init_teacher(params)."
    if isinstance(teacher, Mapping) and "average" in teacher:
        fix = "What was restored becomes one by restore_teacher(loss, params, restored)."
    raise TypeError(f"teacher must be a Teacher. Received: {type(teacher).__name__}. {fix}")


def _both_sides(teacher: Teacher, params: Tree) -> tuple[Averages, Averages]:
    """The averaged arrays of teacher and student, checked to fit each other."""
    check_teacher(teacher)
    average = floating(teacher.average)
    student = floating(params)
    for path in average.keys() & student.keys():
        if is_placeholder(average[path], student[path]):
            del average[path], student[path]
    check_same(average, student)
    half = [path for path, leaf in average.items() if jnp.finfo(leaf.dtype).bits < 32]
    if half:
        raise invalid(
            "The average must be float32: in half precision an EMA of decay 0.9999 never moves",
            f"{average[half[0]].dtype} at {half[0]!r}",
            "Start it from init_teacher(params), or keep your own in float32.",
        )
    return average, student
