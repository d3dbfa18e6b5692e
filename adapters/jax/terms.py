"""The term, from tokens of both sides, and what to log of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from selfalign.adapting import (
    Mask,
    Metrics,
    Objective,
    Parameters,
    Scalar,
    Step,
    Tokens,
    check_features,
    invalid,
    named_objectives,
    on_backend,
)

from .by_name import ByName, Loss, entries, is_list, with_target


def term(
    loss: Loss,
    projector: Mapping[str, Any],
    student_tokens: ByName,
    target_tokens: ByName,
    *,
    step: Step = None,
    mask: Mask = None,
) -> jax.Array:
    """The weighted term from tokens of both sides, a float32 scalar.

        weight * distance( head(student tokens), stop_gradient(target tokens) )

    The student's tokens are projected here. For a list of objectives the terms add up, and
    `projector`, `student_tokens` and `target_tokens` are dicts, by the objectives' names.

    Args:
        loss: the objective, or a list of them.
        projector: the parameters from `init_projector`; cast to the tokens' dtype. {} for an
            objective without a head.
        student_tokens: [B, N, D] after the student's layer, not yet projected.
        target_tokens: [B, N, D], the target: from `teacher_tokens` (SRA), a later layer's tokens of
            the same forward (LayerSync), an encoder's tokens (REPA). None for an objective without
            a target; a list's dict leaves it out.
        step: optimizer steps done, needed where a weight is a schedule: `teacher.step`, or your own
            count where there is no EMA teacher.
        mask: booleans or weights over samples [B] or tokens [B, N].

    Raises:
        ValueError: tokens that do not fit each other or the head; a target that is missing or not
            wanted; parameters of another head; a schedule without a step; for a list, entries that
            are missing or unknown.
        TypeError: integer tokens, or no arrays; for a list, no dicts.

    Example:
        >>> import jax, selfalign
        >>> from selfalign.adapters import jax as sra
        >>> loss = selfalign.LayerSyncLoss(student_layer=2, teacher_layer=4)
        >>> features = list(jax.random.normal(jax.random.key(0), (4, 2, 5, 8)))  # after each block
        >>> bool(sra.term(loss, {}, features[1], features[3]) > 0)
        True
    """
    terms: list[jax.Array] = []
    for each in _compared(loss, projector, student_tokens, target_tokens).values():
        distance, _ = _evaluated(*each, mask)
        terms.append(each.objective.weigh(distance, step))
    return sum(terms[1:], start=terms[0])


def metrics(
    loss: Loss, projector: Mapping[str, Any], student_tokens: ByName, target_tokens: ByName
) -> Metrics:
    """What to log: scalars without gradient, from the same tokens as `term`.

    Under jit, what both need is computed once.

    Args:
        loss, projector, student_tokens, target_tokens: see `term`.

    Returns:
        "distance", "cosine", "student_norm" and the others of `SRALoss.metrics`. For a list of
        objectives "sra/distance" and so on, by the objectives' names.

    Raises:
        ValueError, TypeError: as in `term`.

    Example:
        >>> import jax.numpy as jnp, selfalign
        >>> from selfalign.adapters import jax as sra
        >>> loss = selfalign.LayerSyncLoss(student_layer=2, teacher_layer=4)
        >>> tokens = jnp.ones((2, 5, 8))
        >>> float(sra.metrics(loss, {}, tokens, tokens)["cosine"])
        1.0
    """
    found: Metrics = {}
    for name, each in _compared(loss, projector, student_tokens, target_tokens).items():
        _, measured = _evaluated(*each, logged=True)
        before = f"{name}/" if is_list(loss) else ""
        found |= {before + key: value for key, value in measured.items()}
    return found


class _Compared(NamedTuple):
    """What one objective compares."""

    objective: Objective
    projector: Parameters
    student: Tokens
    target: Tokens | None


def _compared(
    loss: Loss, projector: Mapping[str, Any], student_tokens: ByName, target_tokens: ByName
) -> dict[str, _Compared]:
    """Each objective with what is its own, by name."""
    objectives = named_objectives(loss)
    if not is_list(loss):
        ((name, objective),) = objectives.items()
        return {name: _Compared(objective, projector, student_tokens, target_tokens)}
    heads = entries("projector", projector, objectives)
    students = entries("student_tokens", student_tokens, objectives)
    targets = entries("target_tokens", target_tokens, with_target(objectives))
    return {
        name: _Compared(objective, heads[name], students[name], targets.get(name))
        for name, objective in objectives.items()
    }


@on_backend
def _evaluated(
    objective: Objective,
    projector: Parameters,
    student: Tokens,
    target: Tokens | None,
    mask: Mask = None,
    logged: bool = False,
) -> tuple[Scalar, Metrics]:
    """The unweighted term of one objective, and its metrics."""
    check_features("student", student)
    _check_head(objective, projector)
    params = {name: jnp.asarray(value, student.dtype) for name, value in projector.items()}
    if isinstance(target, jax.Array):
        target = jax.lax.stop_gradient(target)  # whatever the objective does with it
    return objective.evaluate(params, student, target, mask, logged)


def _check_head(objective: Objective, projector: Parameters) -> None:
    names = objective.head.names
    received = type(projector).__name__
    if isinstance(projector, Mapping):
        if set(projector) == set(names):
            return
        received = ", ".join(sorted(projector)) or "none"
    wanted = ", ".join(names) or "an empty dict"
    raise invalid(
        f"The parameters of the head of {objective.kind!r} must be {wanted}",
        received,
        "Take them from init_projector(key, width, loss=loss).",
    )
