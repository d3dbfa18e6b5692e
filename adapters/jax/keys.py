"""Random draws: keys are checked, and the gaps have a stream of their own."""

from __future__ import annotations

from typing import TypeAlias

import jax
import jax.numpy as jnp

from selfalign.adapting import Draws, Step, Times, invalid

# folded into every key: gaps are independent of the noise, even where both come from one key
_STREAM = 0x535241

AxisName: TypeAlias = str | tuple[str, ...]
"""Names of axes that a call is mapped over."""


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


def gap_draws(
    key: jax.Array | None, u: Draws | None, t: Times, step: Step, axis_name: AxisName = ()
) -> Draws:
    """Draws for the gaps [B]: `u` as given, or from the key, the step and the device's index."""
    if (key is None) == (u is None):
        raise invalid(
            "The gaps need either key= or u=",
            "neither" if key is None else "both",
            "Pass key=, a new key for each call, or u=, draws uniform in [0, 1).",
        )
    if key is None:
        return u
    check_key(key)
    key = _of_device(key, axis_name)
    _check_new_in_each_run(key, t)
    key = _own_in_each_part(key, t)
    if not axis_name:
        _check_differs_between_devices(key, t)
    # the step as well: a key made inside jit from a constant cannot be told from a new one
    key_of_step = jax.random.fold_in(own_stream(key), step)
    return jax.random.uniform(key_of_step, jnp.shape(t), "float32")


def _of_device(key: jax.Array, axis_name: AxisName) -> jax.Array:
    """The key with the device's index along the axes folded in."""
    for name in (axis_name,) if isinstance(axis_name, str) else axis_name:
        try:
            index = jax.lax.axis_index(name)
        except (NameError, TypeError) as error:
            raise invalid(
                "axis_name= must name axes of a shard_map, pmap or vmap around the call",
                f"{name!r:.60}",
                "Leave it out where the call is not mapped over devices.",
            ) from error
        key = jax.random.fold_in(key, index)
    return key


def _check_new_in_each_run(key: jax.Array, t: Times) -> None:
    if isinstance(t, jax.core.Tracer) and not isinstance(key, jax.core.Tracer):
        raise invalid(
            "The key must be new in each run of a traced function",
            "a key that is a constant of it: whatever is drawn from it is the same in every run",
            "Make the key an argument of the function that is jitted, mapped or scanned.",
        )


@jax.custom_batching.custom_vmap
def _own_in_each_part(key: jax.Array, t: Times) -> jax.Array:
    """The key. A vmap around the call that gives one key to several times refuses it."""
    return key


@_own_in_each_part.def_vmap
def _in_a_vmap(size: int, mapped: list[bool], key: jax.Array, t: Times) -> tuple[jax.Array, bool]:
    key_mapped, t_mapped = mapped
    if t_mapped and not key_mapped:
        raise invalid(
            "The key must differ between the parts of a vmap",
            "times that are mapped, and one key for all of them",
            "Map over keys as well: jax.random.split(key, number).",
        )
    return _own_in_each_part(key, t), key_mapped  # further vmaps around this one are told as well


def _check_differs_between_devices(key: jax.Array, t: Times) -> None:
    untold = [name for name in _mapped_axes() if not _varying(jax.lax.axis_index(name))]
    if untold:
        raise invalid(
            "A key's devices must be told where JAX does not check them",
            f"a key inside pmap or shard_map(check_vma=False), along {', '.join(untold)}",
            "Pass axis_name=, the axes along which the batch is split: the device's index is "
            "folded into the key. Or pass draws of yours, u=.",
        )
    same_along = _varying(t) - _varying(key)
    if same_along:
        raise invalid(
            "The key must differ between the devices of a shard_map",
            f"one key along {', '.join(sorted(same_along))}",
            "Fold the device's index in: jax.random.fold_in(key, jax.lax.axis_index(name)).",
        )


def _mapped_axes() -> tuple[str, ...]:
    """The axes of the mesh that a shard_map or pmap around the call is mapped over."""
    return tuple(getattr(jax.sharding.get_abstract_mesh(), "manual_axes", ()))


def _varying(value: object) -> frozenset[str]:
    """The axes of a shard_map along which a value differs, where this version of JAX tells."""
    kind = jax.typeof(value)
    axes = getattr(kind, "vma", ())
    newer = getattr(getattr(kind, "manual_axis_type", None), "varying", ())
    return frozenset(axes or newer)
