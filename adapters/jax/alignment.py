"""The term of objectives with an EMA teacher, in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from selfalign.adapting import Draws, Mask, Tensor, Times, Tree, invalid, named_objectives

from .by_name import ByName, Loss, entries, is_list, teacher_of, with_target, with_teacher
from .keys import AxisName
from .targets import teacher_tokens
from .teacher import Teacher
from .terms import metrics, term


def align(
    loss: Loss,
    apply: Callable[..., Any],
    teacher: Teacher,
    params: Tree,
    projector: Mapping[str, Any],
    student_tokens: ByName,
    x0: Tensor,
    noise: Tensor,
    t: Times,
    *condition: Any,
    key: jax.Array | None = None,
    u: Draws | None = None,
    axis_name: AxisName = (),
    loss_mask: Mask = None,
    target_tokens: ByName = None,
    log_metrics: bool = False,
    **conditions: Any,
) -> Any:
    """The weighted term, for your loss function: `teacher_tokens` and `term` in one call.

    Args:
        loss, apply, teacher, params, x0, noise, t, condition, conditions: see `teacher_tokens`.
        key, u, axis_name: see `teacher_tokens`.
        projector, student_tokens: see `term`. Differentiate with respect to the projector as well
            as the model.
        loss_mask: booleans or weights over samples [B] or tokens [B, N].
        target_tokens: for a list of objectives, the targets of those without an EMA teacher, by
            name; see `term`.
        log_metrics: return what `metrics` gives as well, as `has_aux` of jax.grad takes it.

    Returns:
        A float32 scalar; with `log_metrics` a pair, the scalar and a dict of scalars.

    Raises:
        ValueError, TypeError: as in these two; a target for an objective whose teacher gives it.

    Example:
        >>> import jax, jax.numpy as jnp, selfalign
        >>> from selfalign.adapters import jax as sra
        >>> loss = selfalign.SRALoss(student_layer=1, teacher_layer=3)
        >>> def model(params, x, t):  # returns the features after each block
        ...     features = [x := x + jnp.tanh(x @ kernel) + t[:, None, None] for kernel in params]
        ...     return x, features
        >>> def apply(params, x, t):  # the teacher's tokens
        ...     return model(params, x, t)[1][2]
        >>> def objective(trained, teacher, x0, key):
        ...     params, projector = trained
        ...     noise, t = jax.random.normal(key, x0.shape), jax.random.uniform(key, x0.shape[:1])
        ...     prediction, features = model(params, loss.path.add_noise(x0, noise, t), t)
        ...     denoising = jnp.mean((prediction - loss.path.velocity(x0, noise, t)) ** 2)
        ...     sides = teacher, params, projector, features[0]
        ...     return denoising + sra.align(loss, apply, *sides, x0, noise, t, key=key)
        >>> params = list(0.1 * jax.random.normal(jax.random.key(0), (4, 8, 8)))
        >>> teacher = sra.init_teacher(params)
        >>> trained = params, sra.init_projector(jax.random.key(1), width=8)
        >>> x0, key = jnp.ones((2, 5, 8)), jax.random.key(2)
        >>> gradients = jax.jit(jax.grad(objective))(trained, teacher, x0, key)
        >>> trained = jax.tree.map(lambda p, g: p - 0.1 * g, trained, gradients)  # your optimizer
        >>> teacher = sra.update_teacher(loss, teacher, trained[0])
        >>> int(teacher.step)
        1

    Reference: Jiang et al., SRA, 2025, arXiv 2505.02831.
    """
    given = _given_targets(loss, target_tokens)
    sides = (loss, apply, teacher, params)
    inputs = (x0, noise, t, *condition)
    found = teacher_tokens(*sides, *inputs, key=key, u=u, axis_name=axis_name, **conditions)
    targets = found | given if is_list(loss) else found
    compared = (loss, projector, student_tokens, targets)
    value = term(*compared, step=teacher.step, mask=loss_mask)
    return (value, metrics(*compared)) if log_metrics else value


def _given_targets(loss: Loss, target_tokens: ByName) -> dict[str, Any]:
    """The targets that come from the caller, by name: of the objectives without an EMA teacher."""
    objectives = named_objectives(loss)
    teacher_of(objectives)  # there is one, or an error that says what to call instead
    from_teacher = with_teacher(objectives)
    if not is_list(loss):
        if target_tokens is not None:
            raise invalid(
                "The target of an objective with an EMA teacher is the teacher's tokens",
                f"target_tokens, a {type(target_tokens).__name__}, for {from_teacher[0]!r}",
                "Leave target_tokens out, or call term with them.",
            )
        return {}
    from_caller = [name for name in with_target(objectives) if name not in from_teacher]
    given = {} if target_tokens is None else target_tokens
    return entries("target_tokens", given, from_caller)
