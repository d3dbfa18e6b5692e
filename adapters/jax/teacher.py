"""The EMA teacher: an average of the student's parameters, and the number of steps."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from selfalign.adapting import (
    Tensor,
    Tree,
    check_same,
    ema_update,
    invalid,
    named_objectives,
    schedules,
)

from .by_name import Loss, teacher_of
from .trees import floating, is_floating, replaced


class Teacher(NamedTuple):
    """The EMA teacher: a pytree to carry through jitted steps and into checkpoints.

    Attributes:
        average: the EMA of the student's parameters, of their structure and sharding; float32, or
            float64 where they are.
        step: the number of optimizer steps done, an int32 scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> from selfalign.adapters import jax as sra
        >>> sra.init_teacher({"w": jnp.ones(3)})._fields
        ('average', 'step')
    """

    average: Tree
    step: jax.Array


def init_teacher(params: Tree) -> Teacher:
    """A teacher that equals the student: a float32 copy of the parameters, and step 0.

    Args:
        params: the student's parameters, any pytree. Arrays are copied, so that both sides can be
            donated. Floating-point ones are averaged; all other leaves (integers, complex numbers,
            PRNG keys, functions) stay as they are now.

    Returns:
        A `Teacher`, sharded like `params`.

    Raises:
        ValueError: no floating-point array in `params`.

    Example:
        >>> import jax.numpy as jnp
        >>> from selfalign.adapters import jax as sra
        >>> teacher = sra.init_teacher({"w": jnp.ones(3, "bfloat16"), "count": 7})
        >>> str(teacher.average["w"].dtype), teacher.average["count"], int(teacher.step)
        ('float32', 7, 0)
    """
    if not floating(params):
        raise invalid(
            "params must hold floating-point arrays",
            jax.tree.structure(params),
            "Pass the model's parameters.",
        )
    return Teacher(jax.tree.map(_copy, params), jnp.zeros((), "int32"))


def _copy(leaf: Any) -> Any:
    if is_floating(leaf):
        return jnp.array(leaf, jnp.promote_types(leaf.dtype, "float32"), copy=True)
    return leaf.copy() if isinstance(leaf, jax.Array) else leaf


def update_teacher(loss: Loss, teacher: Teacher, params: Tree) -> Teacher:
    """One EMA step toward the student, once per optimizer step and after it.

        average <- decay * average + (1 - decay) * params

    Args:
        loss: the objective, or a list of them; its decay is taken at `teacher.step`.
        teacher: before this step. Donate it to jit: the update is in place then.
        params: the student's parameters after the optimizer's step, of the structure that
            `init_teacher` got.

    Returns:
        The new teacher, its step one further. Leaves that are no floating-point arrays are the
        teacher's own.

    Raises:
        ValueError: parameters whose structure or shapes differ; the message names the first path.
            No objective with an EMA teacher.
        TypeError: `teacher` is no `Teacher`.

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
    decay = source.decay_at(teacher.step)
    if isinstance(source.decay, schedules.Every):
        # without the arithmetic in the steps between
        moved = jax.lax.cond(decay < 1, lambda: ema_update(old, new, decay), lambda: old)
    else:
        moved = ema_update(old, new, decay)
    return Teacher(replaced(teacher.average, moved), teacher.step + 1)


def teacher_params(teacher: Teacher, params: Tree) -> Tree:
    """The teacher's parameters in the dtypes of the student's.

    With them the teacher runs at the student's cost. They are also what to sample from.

    Args:
        teacher: the EMA.
        params: the student's parameters; only their dtypes are looked at.

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
    return replaced(teacher.average, cast)


def check_teacher(teacher: object) -> None:
    """`teacher` is a `Teacher`."""
    if not isinstance(teacher, Teacher):
        raise TypeError(
            f"teacher must be a Teacher. Received: {type(teacher).__name__}. "
            "Build it with init_teacher(params)."
        )


def _both_sides(teacher: Teacher, params: Tree) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The floating-point arrays of teacher and student, checked to fit each other."""
    check_teacher(teacher)
    average = floating(teacher.average)
    student = floating(params)
    check_same(average, student)
    return average, student
