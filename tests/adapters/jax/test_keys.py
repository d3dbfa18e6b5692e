"""Keys for the gaps: those that would give the same gaps again and again are refused."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from jax_models import make_batch

from selfalign.adapters import jax as sra

CONSTANT = jax.random.key(0)
PARAMS = {"w": jnp.ones(())}


def apply(params, x, t, y):
    return x * params["w"] + t[:, None, None]


def tokens(loss, key, x0, noise, t, y):
    teacher = sra.init_teacher(PARAMS)
    return sra.teacher_tokens(loss, apply, teacher, PARAMS, x0, noise, t, y, key=key)


TRACED = {
    "jit": lambda function, t: jax.jit(function)(t),
    "scan": lambda function, t: jax.lax.scan(lambda carry, t: (carry, function(t)), 0, t[None]),
    "vmap": lambda function, t: jax.vmap(function)(t[None]),
}


@pytest.mark.parametrize("transform", TRACED)
def test_a_key_that_is_a_constant_of_a_traced_function_is_refused(loss, batch, transform):
    x0, noise, t, y = batch
    text = (
        "The key must be new in each run of a traced function. Received: a key that is a constant "
        "of it: whatever is drawn from it is the same in every run. Make the key an argument"
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        TRACED[transform](lambda t: tokens(loss, CONSTANT, x0, noise, t, y), t)


def on_devices(function, batch):
    """`function(key, *batch)` on four devices, each with its part of the batch and the same key."""
    mesh = jax.make_mesh((4,), ("data",))
    split = PartitionSpec("data")
    placed = jax.device_put(batch, NamedSharding(mesh, split))
    in_specs = (PartitionSpec(), *(split,) * 4)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=split)
    return jax.jit(mapped)(CONSTANT, *placed)


def test_one_key_for_all_devices_of_a_shard_map_is_refused(loss):
    batch = make_batch(8)

    def same(key, *batch):
        return tokens(loss, key, *batch)

    def folded(key, *batch):
        return tokens(loss, jax.random.fold_in(key, jax.lax.axis_index("data")), *batch)

    text = (
        "The key must differ between the devices of a shard_map. Received: one key along data. "
        "Fold the device's index in: jax.random.fold_in(key, jax.lax.axis_index(name))."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        on_devices(same, batch)
    assert on_devices(folded, batch).shape == (8, 5, 4)
