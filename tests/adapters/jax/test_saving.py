"""Checkpoints, and 64-bit mode."""

import pickle

import equinox as eqx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax_loop import SGD, jitted, make_loop
from jax_models import make_batch

import selfalign
from selfalign import schedules
from selfalign.adapters import jax as sra


def through_pickle(state, like, folder):
    return pickle.loads(pickle.dumps(jax.device_get(state)))


def through_orbax(state, like, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "checkpoint", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "checkpoint", jax.eval_shape(lambda: like))


def through_flax(state, like, folder):
    return flax.serialization.from_bytes(like, flax.serialization.to_bytes(state))


def through_equinox(state, like, folder):
    eqx.tree_serialise_leaves(folder / "state.eqx", state)
    return eqx.tree_deserialise_leaves(folder / "state.eqx", like)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
@pytest.mark.parametrize("through", [through_pickle, through_orbax, through_flax, through_equinox])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(params, tmp_path, through):
    weight = 0.5 * schedules.Warmup(4)
    decay = schedules.DecayWarmup(0.99)
    loss = selfalign.SRALoss(student_layer=1, teacher_layer=2, weight=weight, decay=decay)
    loop = make_loop(loss, SGD)

    def run(state, first, last):
        for i in range(first, last):
            state, _ = jitted(loop.step)(state, *make_batch(seed=i), key=jax.random.key(i))
        return state

    halfway = run(loop.start(params), 0, 3)
    empty = jax.tree.map(jnp.zeros_like, halfway)
    restored = through(halfway, empty, tmp_path)
    assert isinstance(restored[2], sra.Teacher)
    resumed = jax.tree.leaves(run(restored, 3, 6))
    uninterrupted = jax.tree.leaves(run(halfway, 3, 6))
    for mine, theirs in zip(resumed, uninterrupted, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_64_bit_mode_keeps_64_bit_averages_and_the_same_gaps(loss, params, batch, dtype):
    loop = make_loop(loss)
    _, expected = jitted(loop.step)(loop.start(params), *batch, key=jax.random.key(0))
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(value, dtype) for name, value in params.items()}
        inputs = [part.astype(dtype) if part.dtype.kind == "f" else part for part in batch]
        step = jax.jit(loop.step)
        state, value = step(loop.start(wide), *inputs, key=jax.random.key(0))
        (trained, _, teacher), _ = step(state, *inputs, key=jax.random.key(0))
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    assert {leaf.dtype.name for leaf in teacher.average.values()} == {dtype}
    assert {leaf.dtype.name for leaf in trained["projector"].values()} == {"float32"}
    assert teacher.step.dtype == "int32"
    assert step._cache_size() == 1
