"""Whatever pytree a library has for a model: teacher, taps, optimizers, donation, checkpoints, precision."""

import functools
import os
import pickle
import subprocess
import sys
from typing import NamedTuple

import equinox as eqx
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax_loop import apply_at, make_loop
from jax_models import (
    DEPTH,
    WIDTH,
    EquinoxModel,
    LinenModel,
    LinenScannedModel,
    NnxModel,
    forward,
    make_batch,
)

import selfalign
from selfalign.adapters import jax as sra


class Pair(NamedTuple):
    kernel: jax.Array
    rest: list


def trees():
    """One model's parameters in the form that each library has for them."""
    x0, _, t, y = make_batch()
    return {
        "nest": {"a": Pair(jnp.ones((2, 3)), [jnp.ones(4), (jnp.zeros(2),)])},
        "nnx.State": nnx.state(NnxModel(nnx.Rngs(0)), nnx.Param),
        "nnx.Module": NnxModel(nnx.Rngs(0)),
        "linen": LinenModel().init(jax.random.key(0), x0, t, y)["params"],
        "equinox": EquinoxModel(jax.random.key(0)),
        "numpy": [np.ones((2, 3), "float32")],
    }


def floats(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)]


@pytest.mark.parametrize("kind", trees())
def test_teacher_has_the_students_form_and_follows_it(kind, loss):
    student = trees()[kind]
    teacher = sra.init_teacher(student)
    assert type(teacher.average) is type(student)
    assert jax.tree.structure(sra.teacher_params(teacher, student)) == jax.tree.structure(teacher.average)
    for mine, theirs in zip(floats(teacher.average), floats(student), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    ahead = jax.tree.map(lambda x: x + 1 if floats([x]) else x, student)
    after = sra.update_teacher(loss, teacher, ahead)
    assert jax.tree.structure(after) == jax.tree.structure(teacher)
    for mine, theirs in zip(floats(after.average), floats(student), strict=True):
        np.testing.assert_allclose(mine, theirs + 1e-4, rtol=1e-6, atol=1e-7)


def test_other_leaves_are_left_alone(loss):
    odd = {"count": jnp.array(3), "flag": jnp.array(True), "complex": jnp.ones(2, "complex64"), "key": jax.random.key(0),
           "activation": jax.nn.silu, "number": 7, "none": None}  # fmt: skip
    teacher = sra.init_teacher({"w": jnp.zeros(2), **odd})
    student = {"w": jnp.ones(2), **odd, "count": jnp.array(4), "complex": jnp.zeros(2, "complex64"), "number": 8}
    after = sra.update_teacher(loss, teacher, student).average
    assert after["count"] == 3
    assert after["number"] == 7
    assert after["complex"].tolist() == [1, 1]
    assert after["activation"] is jax.nn.silu
    assert after["key"] == odd["key"]
    np.testing.assert_allclose(after["w"], 1e-4, rtol=1e-6)  # not 1 - float32(0.9999) = 1.00017e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_ema_of_half_precision_is_float32_and_moves(loss, dtype):
    student = {"w": jnp.ones(3, dtype)}
    teacher, update = sra.init_teacher(student), jax.jit(functools.partial(sra.update_teacher, loss))
    assert teacher.average["w"].dtype == "float32"
    for _ in range(100):
        teacher = update(teacher, {"w": jnp.full(3, 2, dtype)})
    np.testing.assert_allclose(teacher.average["w"], 2 - 0.9999**100, rtol=1e-5)
    assert sra.teacher_params(teacher, student)["w"].dtype == dtype


# What models capture


def by_hand(model, x, t, y):
    """Tokens after block 3 of the NNX and Linen models' own parts."""
    x = model.embed(x) + (model.labels(y) + t[:, None])[:, None]
    for block in list(model.blocks)[:3]:
        x = block(x)
    return x


def test_nnx_capture_and_sow_give_a_blocks_output():
    x, _, t, y = make_batch()
    model = nnx.view(NnxModel(nnx.Rngs(0)), deterministic=True)
    _, outputs = nnx.capture(model, nnx.Intermediate, method_outputs=nnx.Intermediate)(x, t, y)
    _, sown = nnx.capture(model, nnx.Intermediate)(x, t, y)
    np.testing.assert_array_equal(sra.tap(outputs, "blocks/2/__call__"), by_hand(model, x, t, y))
    np.testing.assert_array_equal(sra.tap(sown, "tokens_2"), by_hand(model, x, t, y))


def test_linen_capture_and_sow_give_a_blocks_output():
    x, _, t, y = make_batch()
    model = LinenModel()
    variables = model.init(jax.random.key(0), x, t, y)
    shallow = {"params": {k: v for k, v in variables["params"].items() if k not in ("block_3", "block_4", "block_5")}}
    _, expected = LinenModel(depth=3).apply(shallow, x, t, y, mutable=["intermediates"])
    blocks = lambda module, method: (module.name or "").startswith("block_")  # noqa: E731
    for options, where in (
        ({"capture_intermediates": True}, "block_2/__call__"),
        ({"capture_intermediates": blocks}, "block_2"),
        ({}, "tokens_2"),
    ):
        _, captured = model.apply(variables, x, t, y, mutable=["intermediates"], **options)
        found = sra.tap(captured["intermediates"], where)
        np.testing.assert_array_equal(found, sra.tap(expected, "intermediates/tokens_2"))


def test_a_list_of_features_is_counted_from_one(params, batch):
    features = forward(params, batch[0], *batch[2:])[1]
    assert sra.tap(features, 1) is features[0]
    assert sra.tap(tuple(features), DEPTH) is features[-1]


def linen_training():
    model, layers = LinenModel(), ("block_1/__call__", "block_3/__call__")

    def captured(params, *inputs):
        prediction, captures = model.apply({"params": params}, *inputs, capture_intermediates=True, mutable=["intermediates"])
        return prediction, [sra.tap(captures["intermediates"], layer) for layer in layers]

    return captured, trees()["linen"]


def nnx_training():
    graph, params, rest = nnx.split(NnxModel(nnx.Rngs(0)), nnx.Param, ...)

    def captured(params, *inputs):
        model = nnx.view(nnx.merge(graph, params, rest), deterministic=True)
        prediction, captures = nnx.capture(model, nnx.Intermediate, method_outputs=nnx.Intermediate)(*inputs)
        return prediction, [sra.tap(captures, f"blocks/{n}/__call__") for n in (1, 3)]

    return captured, params


def equinox_training():
    params, static = eqx.partition(EquinoxModel(jax.random.key(0)), eqx.is_inexact_array)

    def captured(params, *inputs):
        prediction, features = eqx.combine(params, static)(*inputs)
        return prediction, [sra.tap(features, n) for n in (2, 4)]

    return captured, params


TRAINING = {"linen": linen_training, "nnx": nnx_training, "equinox": equinox_training}


@pytest.mark.parametrize("library", TRAINING)
def test_a_jitted_donated_step_trains_model_and_projector(library, loss):
    captured, params = TRAINING[library]()
    optimizer = optax.adam(1e-2)
    trained = {"model": params, "projector": sra.init_projector(jax.random.key(0), WIDTH)}
    state = trained, optimizer.init(trained), sra.init_teacher(params)
    teacher_apply = lambda params, *inputs: captured(params, *inputs)[1][1]  # noqa: E731

    def objective(trained, teacher, x0, noise, t, y, key):
        prediction, (student_tokens, _) = captured(trained["model"], loss.path.add_noise(x0, noise, t), t, y)
        alignment = sra.align(loss, teacher_apply, teacher, trained["model"], trained["projector"], student_tokens,
                              x0, noise, t, y, key=key)  # fmt: skip
        return jnp.mean((prediction - loss.path.velocity(x0, noise, t)) ** 2) + alignment, alignment

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch, key):
        trained, moments, teacher = state
        gradients, alignment = jax.grad(objective, has_aux=True)(trained, teacher, *batch, key)
        updates, moments = optimizer.update(gradients, moments)
        trained = optax.apply_updates(trained, updates)
        return (trained, moments, sra.update_teacher(loss, teacher, trained["model"])), alignment

    terms = []
    for i in range(40):
        state, alignment = step(state, make_batch(16), jax.random.key(i))
        terms.append(float(alignment))
    assert terms[-1] < 0.5 * terms[0]
    assert state[2].step == 40
    assert step._cache_size() == 1


def test_whole_modules_go_through_the_librarys_own_jit(loss):
    x0, noise, t, y = make_batch()
    model = EquinoxModel(jax.random.key(0))
    projector = sra.init_projector(jax.random.key(1), WIDTH)

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def objective(trained, teacher, key):
        model, projector = trained
        features = model(loss.path.add_noise(x0, noise, t), t, y)[1]
        apply = lambda model, *inputs: model(*inputs)[1][3]  # noqa: E731
        return sra.align(loss, apply, teacher, model, projector, features[1], x0, noise, t, y, key=key)

    teacher = sra.init_teacher(model)
    value, (gradients, _) = objective((model, projector), teacher, jax.random.key(0))
    assert value > 0
    assert gradients.blocks[1].layers[0].weight.any()
    assert not gradients.blocks[2].layers[0].weight.any()
    assert teacher.average(x0, t, y)[0].shape == x0.shape  # the average is a model, to sample from


def test_optax_trains_the_projector_and_not_the_teacher(loop, params, batch):
    trained, _, teacher = loop.start(params)
    everything = {**trained, "teacher": teacher.average}
    labels = {"model": "train", "projector": "train", "teacher": "freeze"}
    step = jnp.zeros((), "int32")

    def objective(everything, key):
        return loop.objective(everything, sra.Teacher(everything["teacher"], step), *batch, key=key)

    gradients = jax.jit(jax.grad(objective))(everything, jax.random.key(0))
    for optimizer in (
        optax.multi_transform({"train": optax.adamw(1e-2), "freeze": optax.set_to_zero()}, labels),
        optax.chain(optax.adam(1e-2), optax.masked(optax.set_to_zero(), {k: v == "freeze" for k, v in labels.items()})),
    ):
        updates, _ = optimizer.update(gradients, optimizer.init(everything), everything)
        moved = jax.tree.map(lambda u: bool(jnp.any(u != 0)), updates)
        assert not any(jax.tree.leaves(moved["teacher"]))
        assert all(jax.tree.leaves(moved["projector"]))
        assert moved["model"]["blocks.1.qkv.weight"]


# Donation


@pytest.mark.parametrize("init", [sra.init_teacher, jax.jit(sra.init_teacher)], ids=["eager", "jitted"])
def test_donating_the_student_leaves_the_teacher_alone(init):
    student = {"w": jnp.ones((64, 64))}
    teacher = init(student)
    jax.jit(lambda tree: jax.tree.map(lambda x: x * 2, tree), donate_argnums=0)(student)
    assert student["w"].is_deleted()
    assert float(teacher.average["w"].sum()) == 64 * 64


def test_both_sides_can_be_donated_together():
    student = {"w": jnp.ones((4, 4)), "count": jnp.array(3), "key": jax.random.key(0)}
    jax.jit(lambda student, teacher: jax.tree.map(lambda x: x, (student, teacher)), donate_argnums=(0, 1))(
        student, sra.init_teacher(student)
    )
    assert student["w"].is_deleted()


def test_blocks_split_into_first_and_rest():
    stacked = {"kernel": jnp.arange(12.0).reshape(6, 2), "activation": jax.nn.silu}
    for layer in range(1, 7):
        first, rest = sra.split_blocks(stacked, layer)
        np.testing.assert_array_equal(jnp.concatenate([first["kernel"], rest["kernel"]]), stacked["kernel"])
        assert len(first["kernel"]) == layer
        assert first["activation"] is rest["activation"] is jax.nn.silu


def test_a_donated_teacher_is_updated_in_place(loss):
    student = {"w": jnp.ones((64, 64)), "half": jnp.ones((64, 64), "bfloat16")}
    teacher = sra.init_teacher(student)
    before = {name: leaf.unsafe_buffer_pointer() for name, leaf in teacher.average.items()}
    after = jax.jit(functools.partial(sra.update_teacher, loss), donate_argnums=0)(teacher, student)
    assert teacher.average["w"].is_deleted()
    assert {name: leaf.unsafe_buffer_pointer() for name, leaf in after.average.items()} == before


# Checkpoints


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
    loss = selfalign.SRALoss(
        student_layer=2,
        teacher_layer=4,
        weight=0.5 * selfalign.schedules.Warmup(4),
        decay=selfalign.schedules.DecayWarmup(0.99),
    )
    loop = make_loop(loss)
    step = jax.jit(loop.step)

    def run(state, first, last):
        for i in range(first, last):
            state, _ = step(state, *make_batch(seed=i), key=jax.random.key(i))
        return state

    halfway = run(loop.start(params), 0, 3)
    restored = through(halfway, loop.start(jax.tree.map(jnp.zeros_like, params), seed=1), tmp_path)
    assert isinstance(restored[2], sra.Teacher)
    for mine, theirs in zip(*map(jax.tree.leaves, (run(restored, 3, 6), run(halfway, 3, 6))), strict=True):
        np.testing.assert_array_equal(mine, theirs)


# Models that scan over their blocks


def test_a_scanned_teacher_runs_its_first_blocks_alone(loss):
    x0, noise, t, y = make_batch()
    model = LinenScannedModel()
    params = model.init(jax.random.key(0), x0, t, y)["params"]

    def short(params, *inputs):  # the same model, only shallower: nothing in it is edited
        first, _ = sra.split_blocks(params["blocks"], 4)
        return model.clone(depth=4).apply({"params": {**params, "blocks": first}}, *inputs)[1][-1]

    def whole(params, *inputs):
        return model.apply({"params": params}, *inputs)[1][3]

    teacher, key = sra.init_teacher(params), jax.random.key(0)
    tokens = [sra.teacher_tokens(loss, apply, teacher, params, x0, noise, t, y, key=key) for apply in (short, whole)]
    np.testing.assert_allclose(*tokens, rtol=1e-6)


def test_linen_metadata_boxes_are_pytrees_too(loss):
    boxed = {"w": nn.Partitioned(jnp.ones((2, 2)), names=(None, "model"))}
    teacher = sra.update_teacher(loss, sra.init_teacher(boxed), boxed)
    assert teacher.average["w"].names == (None, "model")


# 64-bit mode

WIDE = """
import jax
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp, selfalign
from jax_loop import make_loop
from jax_models import make_batch, make_params
from selfalign.adapters import jax as sra
loss = selfalign.SRALoss(student_layer=2, teacher_layer=4)
for dtype in ("float32", "float64"):
    loop = make_loop(loss)
    params = {name: jnp.asarray(value, dtype) for name, value in make_params().items()}
    batch = [x.astype(dtype) if x.dtype.kind == "f" else x for x in make_batch()]
    step = jax.jit(loop.step)
    state, value = step(loop.start(params), *batch, key=jax.random.key(0))
    state, _ = step(state, *batch, key=jax.random.key(0))
    teacher = state[2]
    print(dtype, {str(x.dtype) for x in teacher.average.values()}, teacher.step.dtype, step._cache_size(), f"{value:.3f}",
          {str(x.dtype) for x in state[0]["projector"].values()})
"""


def test_64_bit_mode_keeps_64_bit_averages_and_the_same_gaps(loop, params, batch):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", WIDE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _, value = jax.jit(loop.step)(loop.start(params), *batch, key=jax.random.key(0))
    assert done.stdout.splitlines() == [
        f"float32 {{'float32'}} int32 1 {value:.3f} {{'float32'}}",
        f"float64 {{'float64'}} int32 1 {value:.3f} {{'float32'}}",
    ]


def test_apply_may_be_any_callable(loss, params, batch):
    target = sra.teacher_tokens(loss, jax.jit(apply_at(4)), sra.init_teacher(params), params, *batch, key=jax.random.key(0))
    assert target.shape == (4, 5, WIDTH)
