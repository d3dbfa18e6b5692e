"""SRA for JAX models: pure functions on pytrees, for any jit, grad, vmap, shard_map and sharding.

    projector = init_projector(key, width)            trained beside the model's parameters
    teacher = init_teacher(params)                    the EMA, in float32, and the number of steps done
    term = align(loss, ..., x0, noise, t, y, key=key) inside your own loss function
    teacher = update_teacher(loss, teacher, params)   after each optimizer step

`params` is whatever pytree your library has for a model: Linen's dicts, an `nnx.State` or a whole `nnx.Module`, an
`equinox.Module`, lists of arrays. Nothing here holds state, so that everything can be jitted, donated, sharded and saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from selfalign import ema_update, project
from selfalign import projector as _projector
from selfalign._checks import check_features, check_same, invalid
from selfalign.loss import SRALoss
from selfalign.schedules import Every

from ._jax_taps import path_of, split_blocks, tap

__all__ = [
    "Teacher",
    "align",
    "init_projector",
    "init_teacher",
    "split_blocks",
    "tap",
    "teacher_params",
    "teacher_tokens",
    "term",
    "update_teacher",
]

_STREAM = 0x535241  # folded into every key: gaps are independent of the noise, even where both come from one key


class Teacher(NamedTuple):
    """The EMA teacher: a pytree to carry through jitted steps and into checkpoints.

    Attributes:
        average: the EMA of the student's parameters, of their structure and sharding; float32, or float64 where they are.
        step: the number of optimizer steps done, an int32 scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> from selfalign.adapters import jax as sra
        >>> sra.init_teacher({"w": jnp.ones(3)})._fields
        ('average', 'step')
    """

    average: Any
    step: jax.Array


def init_projector(key: jax.Array, width: int, dtype: Any = "float32") -> dict[str, jax.Array]:
    """The projector's first parameters, to be trained beside the model's: Linear(D, 2D) - SiLU - Linear(2D, D).

    Args:
        key: a JAX key.
        width: feature width D of the tapped blocks; a Python int, also inside jit.
        dtype: of the parameters; `term` computes in the tokens' dtype whatever it is.

    Returns:
        "hidden_kernel" [D, 2D], "hidden_bias" [2D], "output_kernel" [2D, D] and "output_bias" [D].

    Raises:
        TypeError: no JAX key, or a width that is no Python int (a traced one, say).
        ValueError: a width below 1.

    Example:
        >>> import jax
        >>> from selfalign.adapters import jax as sra
        >>> sra.init_projector(jax.random.key(0), width=8)["hidden_kernel"].shape
        (8, 16)

    Reference: Jiang et al., SRA, 2025, arXiv 2505.02831.
    """
    _check_key(key)
    keys = jax.random.split(jax.random.fold_in(key, _STREAM))
    draws = [jax.random.uniform(k, s, "float32") for k, s in zip(keys, _projector.draw_shapes(width), strict=True)]
    return {name: value.astype(dtype) for name, value in _projector.init_projector(*draws).items()}


def init_teacher(params: Any) -> Teacher:
    """A teacher that equals the student: a float32 copy of the parameters, where they lie, and step 0.

    Args:
        params: the student's parameters, any pytree. Arrays are copied, so that both sides can be donated. Floating-point ones
            are averaged; all other leaves (integers, complex numbers, PRNG keys, functions) stay as they are now.

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
    if not _floating(params):
        raise invalid("params must hold floating-point arrays", jax.tree.structure(params), "Pass the model's parameters.")
    return Teacher(jax.tree.map(_copy, params), jnp.zeros((), "int32"))


def _copy(leaf: Any) -> Any:
    if _is_floating(leaf):
        return jnp.array(leaf, jnp.promote_types(leaf.dtype, "float32"), copy=True)
    return leaf.copy() if isinstance(leaf, jax.Array) else leaf


def update_teacher(loss: SRALoss, teacher: Teacher, params: Any) -> Teacher:
    """One EMA step toward the student, once per optimizer step and after it; `loss.decay` is taken at `teacher.step`.

    Args:
        loss: the settings.
        teacher: before this step. Donate it to jit: the update is in place then.
        params: the student's parameters after the optimizer's step, of the structure that `init_teacher` got.

    Returns:
        The new teacher, its step one further. Leaves that are no floating-point arrays are the teacher's own.

    Raises:
        ValueError: parameters whose structure or shapes differ; the message names the first path.
        TypeError: `teacher` is no `Teacher`.

    Example:
        >>> import jax.numpy as jnp, selfalign
        >>> from selfalign.adapters import jax as sra
        >>> loss = selfalign.SRALoss(student_layer=2, teacher_layer=4, decay=0.75)
        >>> teacher = sra.update_teacher(loss, sra.init_teacher({"w": jnp.zeros(2)}), {"w": jnp.ones(2)})
        >>> teacher.average["w"].tolist(), int(teacher.step)
        ([0.25, 0.25], 1)

    Reference: Jiang et al., SRA, 2025, arXiv 2505.02831.
    """
    old, new = _both(teacher, params)
    decay = loss.decay_at(teacher.step)
    if isinstance(loss.decay, Every):
        moved = jax.lax.cond(decay < 1, lambda: ema_update(old, new, decay), lambda: old)
    else:
        moved = ema_update(old, new, decay)
    return Teacher(_with(teacher.average, moved), teacher.step + 1)


def teacher_params(teacher: Teacher, params: Any) -> Any:
    """The teacher's parameters in the dtypes of the student's: to run it at the student's cost, and to sample from it.

    Args:
        teacher: the EMA.
        params: the student's parameters; only their dtypes are looked at.

    Raises:
        ValueError, TypeError: as in `update_teacher`.

    Example:
        >>> import jax.numpy as jnp
        >>> from selfalign.adapters import jax as sra
        >>> params = {"w": jnp.ones(3, "bfloat16")}
        >>> str(sra.teacher_params(sra.init_teacher(params), params)["w"].dtype)
        'bfloat16'
    """
    average, like = _both(teacher, params)
    return _with(teacher.average, {path: leaf.astype(like[path].dtype) for path, leaf in average.items()})


def teacher_tokens(
    loss: SRALoss,
    apply: Callable[..., Any],
    teacher: Teacher,
    params: Any,
    x0: Any,
    noise: Any,
    t: Any,
    *condition: Any,
    key: Any = None,
    u: Any = None,
    **conditions: Any,
) -> jax.Array:
    """The teacher's tokens [B, N, D]: the same sample, noise and condition, a little less noise, no gradient.

    Under jit, XLA drops the blocks after the one whose output `apply` returns, so that the teacher costs what it must; a model
    that scans over its blocks needs `split_blocks` for that. Outside jit the whole model runs.

    Args:
        loss: the settings; they draw the gap and hold the path.
        apply: (params, x, t, *condition) -> the tokens [B, N, D] after the teacher's layer, in evaluation mode.
        teacher: the EMA.
        params: the student's parameters, for their dtypes.
        x0: clean samples [B, ...], the ones the student saw noised.
        noise: the same noise as the student's.
        t: the student's times [B].
        *condition, **conditions: what else the model is called with, after classifier-free dropout: drop labels before the
            student's call, not inside the model, and hand the same ones to both sides.
        key: a key for the gaps, new for each call. The same one may serve for your noise: the streams are independent.
        u: the draws for the gaps themselves, uniform in [0, 1), [B], instead of a key.

    Raises:
        ValueError: neither key nor u, or both; a key that is the same in every run of a traced function, or on every device
            of a shard_map; parameters whose structure differs; shapes that do not fit.
        TypeError: no JAX key; times of the wrong kind for the path; `apply` returns something else than an array.

    Example: see `align`; with `selfalign.SRALoss.metrics` these tokens give what to log.

    Reference: Jiang et al., SRA, 2025, arXiv 2505.02831.
    """
    _check_teacher(teacher)
    if loss.random_gap:
        u = _draws(key, u, t, teacher)
    t_teacher = loss.teacher_time(t, u)
    x_teacher = loss.path.add_noise(x0, noise, t_teacher)
    tokens = apply(teacher_params(teacher, params), x_teacher, t_teacher, *condition, **conditions)
    if not isinstance(tokens, jax.Array):
        raise TypeError("apply must return the teacher's tokens, one array [B, N, D]. Received: a "
                        f"{type(tokens).__name__}. Return the tapped block's output alone; `tap` picks it out.")  # fmt: skip
    return jax.lax.stop_gradient(tokens)


def term(
    loss: SRALoss,
    projector: Mapping[str, Any],
    student_tokens: Any,
    teacher_tokens: Any,
    *,
    step: Any = None,
    mask: Any = None,
) -> jax.Array:
    """The weighted term from tokens of both sides, a float32 scalar: the student's are projected here.

    Args:
        loss: the settings.
        projector: the parameters from `init_projector`; cast to the tokens' dtype.
        student_tokens: [B, N, D] after the student's layer, not yet projected.
        teacher_tokens: [B, N, D], from `teacher_tokens`.
        step: optimizer steps done (`teacher.step`), needed where `loss.weight` is a schedule.
        mask: booleans or weights over samples [B] or tokens [B, N].

    Raises:
        ValueError, TypeError: tokens that do not fit each other or the projector, as in `SRALoss`.

    Example:
        >>> import jax, selfalign
        >>> from selfalign.adapters import jax as sra
        >>> loss = selfalign.SRALoss(student_layer=2, teacher_layer=4)
        >>> tokens = jax.random.normal(jax.random.key(0), (2, 5, 8))
        >>> bool(sra.term(loss, sra.init_projector(jax.random.key(1), width=8), tokens, tokens) > 0)
        True
    """
    check_features("student", student_tokens)
    cast = {name: jnp.asarray(value, student_tokens.dtype) for name, value in projector.items()}
    return loss(project(cast, student_tokens), teacher_tokens, step=step, mask=mask)


def align(
    loss: SRALoss,
    apply: Callable[..., Any],
    teacher: Teacher,
    params: Any,
    projector: Mapping[str, Any],
    student_tokens: Any,
    x0: Any,
    noise: Any,
    t: Any,
    *condition: Any,
    key: Any = None,
    u: Any = None,
    loss_mask: Any = None,
    **conditions: Any,
) -> jax.Array:
    """The weighted term, for your loss function: `teacher_tokens` and `term` in one call.

    Args:
        loss, apply, teacher, params, x0, noise, t, condition, conditions, key, u: see `teacher_tokens`.
        projector, student_tokens: see `term`. Differentiate with respect to the projector as well as the model.
        loss_mask: booleans or weights over samples [B] or tokens [B, N].

    Raises:
        ValueError, TypeError: as in these two.

    Example:
        >>> import jax, jax.numpy as jnp, selfalign
        >>> from selfalign.adapters import jax as sra
        >>> loss = selfalign.SRALoss(student_layer=1, teacher_layer=3)
        >>> def model(params, x, t):  # returns the features after each block
        ...     features = [x := x + jnp.tanh(x @ kernel) + t[:, None, None] for kernel in params]
        ...     return x, features
        >>> def objective(trained, teacher, x0, key):
        ...     params, projector = trained
        ...     noise, t = jax.random.normal(key, x0.shape), jax.random.uniform(key, x0.shape[:1])
        ...     prediction, features = model(params, loss.path.add_noise(x0, noise, t), t)
        ...     apply = lambda params, x, t: model(params, x, t)[1][2]
        ...     alignment = sra.align(loss, apply, teacher, params, projector, features[0], x0, noise, t, key=key)
        ...     return jnp.mean((prediction - loss.path.velocity(x0, noise, t)) ** 2) + alignment
        >>> params = list(0.1 * jax.random.normal(jax.random.key(0), (4, 8, 8)))
        >>> trained, teacher = (params, sra.init_projector(jax.random.key(1), width=8)), sra.init_teacher(params)
        >>> x0, key = jnp.ones((2, 5, 8)), jax.random.key(2)
        >>> gradients = jax.jit(jax.grad(objective))(trained, teacher, x0, key)
        >>> trained = jax.tree.map(lambda p, g: p - 0.1 * g, trained, gradients)  # your optimizer
        >>> teacher = sra.update_teacher(loss, teacher, trained[0])
        >>> int(teacher.step)
        1

    Reference: Jiang et al., SRA, 2025, arXiv 2505.02831.
    """
    target = teacher_tokens(loss, apply, teacher, params, x0, noise, t, *condition, key=key, u=u, **conditions)
    return term(loss, projector, student_tokens, target, step=teacher.step, mask=loss_mask)


def _is_floating(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def _floating(tree: Any) -> dict[str, Any]:
    """The floating-point arrays of a pytree, by path: what an EMA averages."""
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if _is_floating(leaf)}


def _with(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """`tree` with other arrays at the paths in `leaves`."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaves.get(path_of(path), leaf), tree)


def _both(teacher: Teacher, params: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The floating-point arrays of both sides, checked to fit each other."""
    _check_teacher(teacher)
    average, student = _floating(teacher.average), _floating(params)
    check_same(average, student)
    return average, student


def _check_teacher(teacher: Any) -> None:
    if not isinstance(teacher, Teacher):
        raise TypeError(f"teacher must be a Teacher. Received: {type(teacher).__name__}. Build it with init_teacher(params).")


def _draws(key: Any, u: Any, t: Any, teacher: Teacher) -> Any:
    """Draws for the gaps [B]: `u` as given, or from the key and the step."""
    if (key is None) == (u is None):
        raise invalid("The gaps need either key= or u=", "neither" if key is None else "both",
                      "Pass key=, a new key for each call, or u=, draws uniform in [0, 1).")  # fmt: skip
    if u is not None:
        return u
    _check_key(key)
    if isinstance(t, jax.core.Tracer) and not isinstance(key, jax.core.Tracer):
        raise invalid("The key must be new in each run of a traced function",
                      "a key that is a constant of it: whatever is drawn from it is the same in every run",
                      "Make the key an argument of the function that is jitted, mapped or scanned.")  # fmt: skip
    shared = _varying(t) - _varying(key)
    if shared:
        raise invalid("The key must differ between the devices of a shard_map", f"one key along {', '.join(sorted(shared))}",
                      "Fold the device's index in: jax.random.fold_in(key, jax.lax.axis_index(name)).")  # fmt: skip
    # the step as well: a key made inside jit from a constant cannot be told from a new one
    key = jax.random.fold_in(jax.random.fold_in(key, _STREAM), teacher.step)
    return jax.random.uniform(key, jnp.shape(t), "float32")


def _varying(value: Any) -> frozenset[str]:
    """The axes of a shard_map along which a value differs from device to device, where the version of JAX tells."""
    kind = jax.typeof(value)
    axes: Any = getattr(kind, "vma", None) or getattr(getattr(kind, "manual_axis_type", None), "varying", ())
    return frozenset(axes)


def _check_key(key: Any) -> None:
    dtype = getattr(key, "dtype", None)
    if dtype is None or not (jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == jnp.uint32):
        raise TypeError(f"key must be a JAX key. Received: {type(key).__name__} {key!r:.60}. Pass jax.random.key(seed).")
