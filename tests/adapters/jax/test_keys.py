"""Keys for the gaps: those that would give the same gaps again and again are refused."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from jax_models import make_batch

import selfalign
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


UNTOLD = (
    "A key's devices must be told where JAX does not check them. Received: a key inside pmap or "
    "shard_map(check_vma=False), along data. Pass axis_name=, the axes along which the batch is"
)


def mapped_without_checks(function, batch):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = PartitionSpec("data")
    in_specs = (PartitionSpec(), *(split,) * 4)
    options = {"mesh": mesh, "in_specs": in_specs, "out_specs": split, "check_vma": False}
    return jax.jit(jax.shard_map(function, **options))(CONSTANT, *batch)


def pmapped(function, batch):
    parts = [part.reshape(4, -1, *part.shape[1:]) for part in batch]
    found = jax.pmap(function, axis_name="data", in_axes=(None, 0, 0, 0, 0))(CONSTANT, *parts)
    return found.reshape(-1, *found.shape[2:])


@pytest.mark.parametrize("mapped", [mapped_without_checks, pmapped])
def test_axis_name_is_asked_for_where_jax_does_not_check_and_gives_each_device_its_gaps(
    loss, mapped
):
    x0, noise, t, y = make_batch(8)
    batch = jnp.zeros_like(x0), noise * 0, jnp.full_like(t, 0.9), y  # the times alone are seen

    def same(key, *batch):
        return tokens(loss, key, *batch)

    def named(key, *batch):
        teacher = sra.init_teacher(PARAMS)
        options = {"key": key, "axis_name": "data"}
        return sra.teacher_tokens(loss, apply, teacher, PARAMS, *batch, **options)

    with pytest.raises(ValueError, match=re.escape(UNTOLD)):
        mapped(same, batch)
    assert len(set(mapped(named, batch)[:, 0, 0].tolist())) == 8


def test_an_axis_that_is_not_there_is_refused(loss, batch):
    text = "axis_name= must name axes of a shard_map, pmap or vmap around the call. Received: 'x'."
    teacher = sra.init_teacher(PARAMS)
    with pytest.raises(ValueError, match=re.escape(text)):
        sra.teacher_tokens(
            loss, apply, teacher, PARAMS, *batch, key=jax.random.key(0), axis_name="x"
        )


def test_one_key_for_all_parts_of_a_vmap_is_refused(loss, batch):
    parts = [jnp.stack([part, part]) for part in batch]

    def run(key, *batch):
        return tokens(loss, key, *batch)

    text = (
        "The key must differ between the parts of a vmap. Received: times that are mapped, and "
        "one key for all of them. Map over keys as well: jax.random.split(key, number)."
    )
    mapped = jax.jit(jax.vmap(run, in_axes=(None, 0, 0, 0, 0)))
    with pytest.raises(ValueError, match=re.escape(text)):
        mapped(CONSTANT, *parts)
    keys = jax.random.split(CONSTANT, 2)
    first, second = jax.jit(jax.vmap(run))(keys, *parts)
    assert (first != second).all()


def test_no_key_is_needed_where_nothing_is_drawn(batch):
    for settings in ({"max_gap": 0}, {"random_gap": False}):
        loss = selfalign.SRALoss(student_layer=1, teacher_layer=2, **settings)
        assert tokens(loss, None, *batch).shape == (4, 5, 4)
