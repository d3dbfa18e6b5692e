"""Random draws: keys are checked, and the gaps have a stream of their own."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from selfalign.adapting import Draws, Step, Times, invalid

# folded into every key: gaps are independent of the noise, even where both come from one key
_STREAM = 0x535241


def own_stream(key: jax.Array) -> jax.Array:
    """A key that nobody else draws from."""
    return jax.random.fold_in(key, _STREAM)


def check_key(key: object) -> None:
    """`key` is a JAX key, of the new or the old kind."""
    dtype = getattr(key, "dtype", None)
    is_key = dtype is not None and (
        jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == jnp.uint32
    )
    if not is_key:
        raise TypeError(
            f"key must be a JAX key. Received: {type(key).__name__} {key!r:.60}. "
            "Pass jax.random.key(seed)."
        )


def gap_draws(key: jax.Array | None, u: Draws | None, t: Times, step: Step) -> Draws:
    """Draws for the gaps [B]: `u` as given, or from the key and the step."""
    if (key is None) == (u is None):
        raise invalid(
            "The gaps need either key= or u=",
            "neither" if key is None else "both",
            "Pass key=, a new key for each call, or u=, draws uniform in [0, 1).",
        )
    if key is None:
        return u
    check_key(key)
    _check_new_in_each_run(key, t)
    _check_differs_between_devices(key, t)
    # the step as well: a key made inside jit from a constant cannot be told from a new one
    key_of_step = jax.random.fold_in(own_stream(key), step)
    return jax.random.uniform(key_of_step, jnp.shape(t), "float32")


def _check_new_in_each_run(key: jax.Array, t: Times) -> None:
    if isinstance(t, jax.core.Tracer) and not isinstance(key, jax.core.Tracer):
        raise invalid(
            "The key must be new in each run of a traced function",
            "a key that is a constant of it: whatever is drawn from it is the same in every run",
            "Make the key an argument of the function that is jitted, mapped or scanned.",
        )


def _check_differs_between_devices(key: jax.Array, t: Times) -> None:
    same_along = _varying(t) - _varying(key)
    if same_along:
        raise invalid(
            "The key must differ between the devices of a shard_map",
            f"one key along {', '.join(sorted(same_along))}",
            "Fold the device's index in: jax.random.fold_in(key, jax.lax.axis_index(name)).",
        )


def _varying(value: object) -> frozenset[str]:
    """The axes of a shard_map along which a value differs, where this version of JAX tells."""
    kind = jax.typeof(value)
    axes = getattr(kind, "vma", ())
    newer = getattr(getattr(kind, "manual_axis_type", None), "varying", ())
    return frozenset(axes or newer)
