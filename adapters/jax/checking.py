"""One look before training: do student and teacher run the same model, on the same sample?"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from selfalign.adapting import (
    EMATeacher,
    Tensor,
    Times,
    Tokens,
    Tree,
    invalid,
    named_objectives,
    paths,
    with_source,
)

from .by_name import Loss, is_list, teacher_of
from .targets import teacher_tokens
from .teacher import init_teacher
from .trees import is_floating, map_with_path

Tap: TypeAlias = Callable[[Any], tuple[Callable[..., Any], Callable[..., Any]]]
"""From the loss, which has the layers, to the student's call and the teacher's `apply`."""

_RULE = "With equal weights, no gap and one layer student and teacher must give the same tokens"


def check(
    loss: Loss,
    tap: Tap,
    params: Tree,
    x0: Tensor,
    noise: Tensor,
    t: Times,
    *condition: Any,
    x: Tensor | None = None,
    **conditions: Any,
) -> None:
    """Refuse what would go wrong in silence. Call it once, before training and outside jit.

    With equal weights, at the same time and after the same layer both sides must give the same
    tokens: after the student's layer, and after the teacher's. Tokens must change with the sample,
    with the time and with the weights. Weights are moved a little for it, so that gates that begin
    at zero hide nothing; yours stay as they are.

    Args:
        loss: the objective, or a list of them.
        tap: (loss) -> (student, apply), as you call them in training:
            lambda loss: sra.tap_nnx(loss, "blocks/{}"). The layers are the loss's, since it is
            called with other ones. Arguments that only the student gets are bound to it:
            functools.partial(student, train=True, rngs=rngs).
        params, x0, noise, t, condition, conditions: what `align` gets. A batch of eight or more
            samples shows a condition that is dropped for some.
        x: the noisy sample that your model gets; it must lie on the loss's path.

    Raises:
        ValueError: labels that are dropped inside the model; dropout on one side; another layer or
            call; an `apply` that does not run its own parameters; tokens that do not depend on the
            sample or the time, or have no shape [B, N, D]; a path that runs the other way, sample
            and noise in each other's place, noise that is drawn anew; a call inside jit.

    Example:
        >>> import jax, jax.numpy as jnp, selfalign
        >>> from selfalign.adapters import jax as sra
        >>> loss = selfalign.SRALoss(student_layer=1, teacher_layer=3)
        >>> def features(params, x, t):
        ...     return [x := x + jnp.tanh(x @ kernel + t[:, None, None]) for kernel in params]
        >>> def tap(loss):
        ...     student, teacher = loss.layers(depth=4)
        ...     return (
        ...         lambda *inputs: (features(*inputs)[-1], features(*inputs)[student - 1]),
        ...         lambda *inputs: features(*inputs)[teacher - 1],
        ...     )
        >>> params = list(0.1 * jax.random.normal(jax.random.key(0), (4, 8, 8)))
        >>> x0, noise = jax.random.normal(jax.random.key(1), (2, 8, 5, 8))
        >>> t = jax.random.uniform(jax.random.key(2), (8,))
        >>> sra.check(loss, tap, params, x0, noise, t, x=loss.path.add_noise(x0, noise, t))

    Reference: Jiang et al., SRA, 2025, arXiv 2505.02831.
    """
    objectives = named_objectives(loss)
    path = paths.resolve(teacher_of(objectives).path)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((params, x0, noise, t))):
        fix = "Call it once before training, outside of jit."
        raise invalid("check looks at values", "traced arrays", fix)
    if x is not None:
        _check_on_path(path, x, x0, noise, t)
    look = _Look(loss, tap, _moved(params, 0), condition, conditions)
    noisy = path.add_noise(x0, noise, t)
    for layers in ("student_layer", "teacher_layer"):
        _check_same(look, layers, noisy, t)
    _check_dependence(look, path, noisy, noise, t, _moved(params, 1))
    teacher = init_teacher(params)
    _, apply = tap(loss)
    inputs = (x0, noise, t, *condition)
    teacher_tokens(loss, apply, teacher, params, *inputs, u=jnp.full(t.shape, 0.5), **conditions)


class _Look(NamedTuple):
    """What both sides are called with."""

    loss: Loss
    tap: Tap
    params: Tree
    condition: tuple[Any, ...]
    conditions: Mapping[str, Any]

    def sides(self, loss: Loss) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The student's tokens and the teacher's, by name: functions of (params, x, t)."""
        student, apply = self.tap(loss)
        several = is_list(loss)
        names = with_source(named_objectives(loss), EMATeacher)

        def by_name(found: Any) -> dict[str, Any]:
            return {name: found[name] if several else found for name in names}

        def student_tokens(params: Tree, x: Tensor, t: Times) -> dict[str, Any]:
            return by_name(student(params, x, t, *self.condition, **self.conditions)[1])

        def taught_tokens(params: Tree, x: Tensor, t: Times) -> dict[str, Any]:
            return by_name(apply(params, x, t, *self.condition, **self.conditions))

        return student_tokens, taught_tokens


def _check_same(look: _Look, layers: str, x: Tensor, t: Times) -> None:
    """Both sides after one layer: the student's, or the teacher's."""
    one_layer = _with_layers(look.loss, layers)
    student, taught = (side(look.params, x, t) for side in look.sides(one_layer))
    for name, mine in student.items():
        theirs = taught[name]
        _check_shape(name, mine, t)
        if getattr(theirs, "shape", None) != mine.shape:
            received = f"{mine.shape} and {getattr(theirs, 'shape', type(theirs).__name__)}"
            raise invalid(_RULE, f"shapes {received} of {name!r}", "Tap both sides alike.")
        off = _differing(mine, theirs)
        if off.all():
            received, fix = _other_tokens(look, name, layers, mine, x, t)
            raise invalid(_RULE, received, fix)
        if off.any():
            raise invalid(
                _RULE,
                f"other tokens for {int(off.sum())} of {len(off)} samples, after {layers}",
                "The model drops labels or whole samples inside. Drop them before the student's "
                "call, and hand the same ones to both sides.",
            )


def _other_tokens(
    look: _Look, name: str, layers: str, tokens: Tokens, x: Tensor, t: Times
) -> tuple[str, str]:
    """What was received and what to do where no sample agrees."""
    for layer in range(1, 100):
        try:
            _, taught = look.sides(_with_layers(look.loss, layer))
            found = taught(look.params, x, t)[name]
        except (ValueError, IndexError):  # there are no more layers
            break
        if found.shape == tokens.shape and not _differing(tokens, found).any():
            return (
                f"tokens of {name!r} that the teacher has after layer {layer}, for {layers}",
                "Count layers from 1 on both sides, and let tap use the layers of the loss.",
            )
    return (
        f"other tokens of {name!r} for all samples, after {layers}",
        "Look for other arguments, another order of inputs, or another layer. Dropout of features "
        "and batch norm are right in the student alone: check once with them off.",
    )


def _check_dependence(
    look: _Look, path: paths.Path, x: Tensor, noise: Tensor, t: Times, other: Tree
) -> None:
    student, taught = look.sides(look.loss)
    low, high = path.bounds
    middle = (low + high) / 2
    later = jnp.where(t < middle, t + path.span / 4, t - path.span / 4).astype(t.dtype)
    changed = {
        "sample": (look.params, x + noise, t),
        "time": (look.params, x, later),
        "parameters": (other, x, t),
    }
    for side, tokens in {"student": student, "teacher": taught}.items():
        before = tokens(look.params, x, t)
        for what, inputs in changed.items():
            for name, found in tokens(*inputs).items():
                if not _differing(before[name], found, least=True).any():
                    raise invalid(
                        f"The {side}'s tokens must depend on the {what}",
                        f"tokens of {name!r} that stay the same",
                        "Tap a block that they run through, and compute with the arguments of the "
                        "call, not with values from outside of it.",
                    )


def _check_shape(name: str, tokens: Any, t: Times) -> None:
    shape: tuple[int, ...] = getattr(tokens, "shape", ())
    if len(shape) != 3 or shape[0] != len(t):
        raise invalid(
            "Tokens must have the shape [B, N, D]",
            f"{shape or type(tokens).__name__} of {name!r}, for {len(t)} samples",
            "Select the sample's tokens: select=, or in your own function.",
        )


def _check_on_path(path: paths.Path, x: Tensor, x0: Tensor, noise: Tensor, t: Times) -> None:
    """`x` is the noisy sample of this path."""
    rule = "x must be the loss's path between x0 and noise, at t"
    if jnp.shape(x) != jnp.shape(x0):
        raise invalid(rule, f"shapes {jnp.shape(x)} and {jnp.shape(x0)}", "Pass one batch.")

    def is_x(candidate: Tensor) -> bool:
        return not bool(_differing(x, candidate).any())

    if is_x(path.add_noise(x0, noise, t)):
        return
    mirrored = (path.noise_at + path.clean_at - t).astype(t.dtype)
    if is_x(path.add_noise(x0, noise, mirrored)):
        raise invalid(
            rule,
            "the path's sample at the opposite end's time, or sample and noise in each other's "
            "place",
            "Give the loss a path that runs as your loop's, and pass x0 first, then noise.",
        )
    if is_x(path.add_noise(noise, x0, t)):
        fix = "Pass x0 first, then noise."
        raise invalid(rule, "sample and noise in each other's place", fix)
    raise invalid(
        rule,
        "something else",
        "Pass the noise that x was made with, do not scale x, and choose the loop's path.",
    )


def _with_layers(loss: Loss, which: str | int) -> Loss:
    """The loss with one layer for both sides: a number, or that of one of its settings."""

    def one(objective: Any) -> Any:
        names = {field.name for field in dataclasses.fields(objective)}
        if not {"student_layer", "teacher_layer", "allow_same_layer"} <= names:
            return objective
        layer = getattr(objective, which) if isinstance(which, str) else which
        changes = {"student_layer": layer, "teacher_layer": layer, "allow_same_layer": True}
        return dataclasses.replace(objective, **changes)

    return [one(each) for each in loss] if isinstance(loss, (list, tuple)) else one(loss)


def _moved(params: Tree, seed: int) -> Tree:
    """Weights a little elsewhere; those that begin near zero as if they had been drawn."""
    count = itertools.count()

    def move(path: str, leaf: Any) -> Any:
        if not is_floating(leaf):
            return leaf
        key = jax.random.fold_in(jax.random.key(seed), next(count))
        value = jnp.asarray(leaf, "float32")
        drawn = value.shape[-2] ** -0.5 if value.ndim > 1 else 0.5
        length = jnp.sqrt(jnp.mean(value**2))
        size = jnp.where(length < drawn / 4, drawn, length / 10)
        return (value + size * jax.random.normal(key, value.shape)).astype(leaf.dtype)

    return map_with_path(move, params)


def _differing(mine: Tensor, theirs: Tensor, least: bool = False) -> jax.Array:
    """For each sample whether it differs, by more than rounding; `least`: at all."""
    half = jnp.finfo(mine.dtype).bits < 32
    tolerance = 0.0 if least else 0.05 if half else 0.002
    first = jnp.asarray(mine, "float32").reshape(len(mine), -1)
    second = jnp.asarray(theirs, "float32").reshape(len(mine), -1)
    length = jnp.linalg.norm(first, axis=1)
    return jnp.linalg.norm(first - second, axis=1) > tolerance * length + 1e-12
