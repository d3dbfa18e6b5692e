"""The target of an objective with an EMA teacher: the teacher's tokens, at less noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from selfalign.adapting import Draws, Tensor, Times, Tree, named_objectives, paths

from .by_name import ByName, Loss, entries, is_list, teacher_of, with_teacher
from .evaluation import in_evaluation
from .keys import AxisName, gap_draws
from .teacher import Teacher, check_teacher, teacher_params
from .trees import floating, replaced


def teacher_tokens(
    loss: Loss,
    apply: Callable[..., Any],
    teacher: Teacher,
    params: Tree,
    x0: Tensor,
    noise: Tensor,
    t: Times,
    *condition: Any,
    key: jax.Array | None = None,
    u: Draws | None = None,
    axis_name: AxisName = (),
    **conditions: Any,
) -> ByName:
    """The teacher's tokens: same sample, noise and condition, a little less noise, no gradient.

    Under jit, XLA drops the blocks after the one whose output `apply` returns, so that the teacher
    costs what it must; a model that scans over its blocks needs `split_blocks` for that. Outside
    jit the whole model runs.

    Args:
        loss: the objective, which has the path and the gap; or a list of objectives.
        apply: (params, x, t, *condition) -> the tokens [B, N, D] after the teacher's layer, in
            evaluation mode; a whole module of NNX or Equinox is handed to it in that mode. For a
            list of objectives: a dict of tokens, with an entry for each objective that has an EMA
            teacher.
        teacher: the EMA.
        params: the student's parameters, for their dtypes.
        x0: clean samples [B, ...], the ones the student saw noised.
        noise: the same noise as the student's.
        t: the student's times [B].
        *condition, **conditions: what else the model is called with, after classifier-free dropout:
            drop labels before the student's call, not inside the model, and hand the same ones to
            both sides.
        key: a key for the gaps, new for each call; not needed where the gap is none or always the
            same. It may serve for your noise as well: the streams are independent.
        u: the draws for the gaps themselves, uniform in [0, 1), [B], instead of a key.
        axis_name: inside `shard_map` or `pmap` the axes along which the batch is split: the
            device's index is folded into the key.

    Returns:
        Tokens [B, N, D]; for a list of objectives, the dict that `apply` returned.

    Raises:
        ValueError: neither key nor u, or both; a key that is the same in every run of a traced
            function, in every part of a vmap or on every device; parameters whose structure
            differs; shapes that do not fit; no objective with an EMA teacher.
        TypeError: no JAX key; times of the wrong kind for the path; `apply` returns something else
            than arrays.

    Example: see `align`; with `metrics` these tokens give what to log.

    Reference: Jiang et al., SRA, 2025, arXiv 2505.02831.
    """
    objectives = named_objectives(loss)
    source = teacher_of(objectives)
    check_teacher(teacher)
    random_gap = source.random_gap and source.largest_gap > 0
    if random_gap:
        u = gap_draws(key, u, t, teacher.step, axis_name)
    path = paths.resolve(source.path)
    gap = (source.largest_gap, random_gap)
    x_teacher, t_teacher = path.add_less_noise(x0, noise, t, u, *gap)
    # frozen leaves are the student's: no derivative is traced through them
    average = in_evaluation(teacher_params(teacher, _without_gradients(params)))
    tokens = apply(average, x_teacher, t_teacher, *condition, **conditions)
    if not is_list(loss):
        return _without_gradient(tokens)
    found = entries("what apply returns", tokens, with_teacher(objectives))
    return {name: _without_gradient(value) for name, value in found.items()}


def _without_gradients(params: Tree) -> Tree:
    stopped = {path: jax.lax.stop_gradient(leaf) for path, leaf in floating(params).items()}
    return replaced(params, stopped)


def _without_gradient(tokens: object) -> jax.Array:
    if not isinstance(tokens, jax.Array):
        raise TypeError(
            "apply must return the teacher's tokens, one array [B, N, D]. Received: a "
            f"{type(tokens).__name__}. Return the tapped block's output alone; `tap` picks it out."
        )
    return jax.lax.stop_gradient(tokens)
