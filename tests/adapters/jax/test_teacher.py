"""The EMA teacher over whatever pytree a library has for a model: form, numbers, donation."""

import functools
import re
from typing import NamedTuple

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import nnx
from jax_loop import apply_at
from jax_models import WIDTH, EquinoxModel, LinenModel, NnxModel, make_batch, make_params, moved

import selfalign
from selfalign import schedules
from selfalign.adapters import jax as sra


class Pair(NamedTuple):
    kernel: jax.Array
    rest: list


def linen_params():
    x0, _, t, y = make_batch()
    return LinenModel().init(jax.random.key(0), x0, t, y)["params"]


# one model's parameters in the form that each library has for them
TREES = {
    "nest": lambda: {"a": Pair(jnp.ones((2, 3)), [jnp.ones(4), (jnp.zeros(2),)])},
    "nnx.State": lambda: nnx.state(NnxModel(nnx.Rngs(0)), nnx.Param),
    "nnx.Module": lambda: NnxModel(nnx.Rngs(0)),
    "linen": linen_params,
    "equinox": lambda: EquinoxModel(jax.random.key(0)),
    "numpy": lambda: [np.ones((2, 3), "float32")],
}


def is_floating(leaf):
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def floats(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if is_floating(leaf)]


@pytest.mark.parametrize("kind", TREES)
def test_teacher_has_the_students_form_and_follows_it(kind, loss):
    student = TREES[kind]()
    teacher = sra.init_teacher(student)
    structure = jax.tree.structure(teacher.average)
    assert type(teacher.average) is type(student)
    assert jax.tree.structure(sra.teacher_params(teacher, student)) == structure
    for mine, theirs in zip(floats(teacher.average), floats(student), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    ahead = jax.tree.map(lambda x: x + 1 if is_floating(x) else x, student)
    after = sra.update_teacher(loss, teacher, ahead)
    assert jax.tree.structure(after) == jax.tree.structure(teacher)
    for mine, theirs in zip(floats(after.average), floats(student), strict=True):
        np.testing.assert_allclose(mine, theirs + 1e-4, rtol=1e-6, atol=1e-7)


def test_other_leaves_are_left_alone(loss):
    odd = {
        "count": jnp.array(3),
        "flag": jnp.array(True),
        "complex": jnp.ones(2, "complex64"),
        "key": jax.random.key(0),
        "activation": jax.nn.silu,
        "number": 7,
        "none": None,
    }
    teacher = sra.init_teacher({"w": jnp.zeros(2), **odd})
    other = {"count": jnp.array(4), "complex": jnp.zeros(2, "complex64"), "number": 8}
    after = sra.update_teacher(loss, teacher, {"w": jnp.ones(2), **odd, **other}).average
    assert after["count"] == 3
    assert after["number"] == 7
    assert after["complex"].tolist() == [1, 1]
    assert after["activation"] is jax.nn.silu
    assert after["key"] == odd["key"]
    np.testing.assert_allclose(after["w"], 1e-4, rtol=1e-6)  # not 1 - float32(0.9999) = 1.00017e-4


def test_linen_metadata_boxes_are_pytrees_too(loss):
    boxed = {"w": nn.Partitioned(jnp.ones((2, 2)), names=(None, "model"))}
    teacher = sra.update_teacher(loss, sra.init_teacher(boxed), boxed)
    assert teacher.average["w"].names == (None, "model")


# Numbers


@hypothesis.given(decay=st.floats(0, 1), by=st.floats(-1, 1))
def test_update_is_the_ema(decay, by):
    loss = selfalign.SRALoss(student_layer=2, teacher_layer=4, decay=decay)
    before = {name: jnp.asarray(value) for name, value in make_params(depth=1).items()}
    after = moved(before, by)
    teacher = sra.update_teacher(loss, sra.init_teacher(before), after)
    assert teacher.step == 1
    for name, value in teacher.average.items():
        old = np.asarray(before[name], "float64")
        expected = oracle.ema(old, np.asarray(after[name], "float64"), decay)
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def test_decay_follows_the_step():
    loss = selfalign.SRALoss(student_layer=2, teacher_layer=4, decay=schedules.DecayWarmup(0.999))
    update = jax.jit(functools.partial(sra.update_teacher, loss))
    values = np.random.default_rng(0).normal(size=(21, 50)).astype("float32")
    teacher = sra.init_teacher({"w": jnp.asarray(values[0])})
    expected = values[0].astype("float64")
    for step in range(20):
        teacher = update(teacher, {"w": values[step + 1]})
        decay = min(0.999, (1 + step) / (10 + step))
        expected = oracle.ema(expected, values[step + 1].astype("float64"), decay)
    assert teacher.step == 20
    np.testing.assert_allclose(teacher.average["w"], expected, rtol=1e-5, atol=1e-6)


def test_the_average_moves_in_every_third_step_only():
    """Without work in between: the compiled program branches on the step."""
    loss = selfalign.SRALoss(student_layer=2, teacher_layer=4, decay=schedules.Every(3, 0.5))
    update = functools.partial(sra.update_teacher, loss)
    teacher = sra.init_teacher({"w": jnp.zeros(3)})
    assert "cond" in str(jax.make_jaxpr(update)(teacher, teacher.average))
    expected = np.zeros(3)
    for step in range(1, 7):
        student = np.arange(3, dtype="float32") * step
        teacher = jax.jit(update)(teacher, {"w": student})
        if step % 3 == 0:
            expected = oracle.ema(expected, student, 0.5**3)
        np.testing.assert_allclose(teacher.average["w"], expected, rtol=1e-6)
    assert teacher.step == 6


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_ema_of_half_precision_is_float32_and_moves(loss, dtype):
    student = {"w": jnp.ones(3, dtype)}
    teacher = sra.init_teacher(student)
    assert teacher.average["w"].dtype == "float32"
    update = jax.jit(functools.partial(sra.update_teacher, loss))
    for _ in range(100):
        teacher = update(teacher, {"w": jnp.full(3, 2, dtype)})
    np.testing.assert_allclose(teacher.average["w"], 2 - 0.9999**100, rtol=1e-5)
    assert sra.teacher_params(teacher, student)["w"].dtype == dtype


# Donation


@pytest.mark.parametrize(
    "init", [sra.init_teacher, jax.jit(sra.init_teacher)], ids=["eager", "jit"]
)
def test_donating_the_student_leaves_the_teacher_alone(init):
    student = {"w": jnp.ones((64, 64))}
    teacher = init(student)
    jax.jit(lambda tree: jax.tree.map(lambda x: x * 2, tree), donate_argnums=0)(student)
    assert student["w"].is_deleted()
    assert float(teacher.average["w"].sum()) == 64 * 64


def test_both_sides_can_be_donated_together():
    student = {"w": jnp.ones((4, 4)), "count": jnp.array(3), "key": jax.random.key(0)}
    same = jax.jit(lambda student, teacher: (student, teacher), donate_argnums=(0, 1))
    same(student, sra.init_teacher(student))
    assert student["w"].is_deleted()


def test_a_donated_teacher_is_updated_in_place(loss):
    student = {"w": jnp.ones((64, 64)), "half": jnp.ones((64, 64), "bfloat16")}
    teacher = sra.init_teacher(student)
    before = {name: leaf.unsafe_buffer_pointer() for name, leaf in teacher.average.items()}
    update = jax.jit(functools.partial(sra.update_teacher, loss), donate_argnums=0)
    after = update(teacher, student)
    assert teacher.average["w"].is_deleted()
    assert {name: leaf.unsafe_buffer_pointer() for name, leaf in after.average.items()} == before


# What is no step, what is frozen, what is tied


@hypothesis.settings(max_examples=20)
@hypothesis.given(st.lists(st.booleans(), min_size=1, max_size=8))
def test_the_teacher_follows_the_optimizers_steps(made):
    """Steps that were not made leave everything as it was, under jit and outside of it."""
    loss = selfalign.SRALoss(student_layer=2, teacher_layer=4, decay=schedules.Every(2, 0.5))
    expected = sra.init_teacher({"w": jnp.zeros(2)})
    found = traced = expected
    for number, stepped in enumerate(made):
        params = {"w": jnp.full(2, number + 1.0)}
        if stepped:
            expected = UPDATE(loss, expected, params)
        found = sra.update_teacher(loss, found, params, stepped=stepped)
        traced = UPDATE(loss, traced, params, stepped=jnp.array(stepped))
    for each in (found, traced):
        assert each.step == sum(made)
        np.testing.assert_array_equal(each.average["w"], expected.average["w"])


UPDATE = jax.jit(sra.update_teacher, static_argnums=0)


def test_accumulated_gradients_are_one_step(loss):
    loss = selfalign.SRALoss(student_layer=2, teacher_layer=4, decay=0.5)
    optimizer = optax.MultiSteps(optax.sgd(1.0), 2)
    params = {"w": jnp.zeros(3)}

    @jax.jit
    def step(params, state, teacher):
        updates, state = optimizer.update({"w": -jnp.ones(3)}, state, params)
        params = optax.apply_updates(params, updates)
        stepped = optimizer.has_updated(state)
        return params, state, sra.update_teacher(loss, teacher, params, stepped=stepped)

    carried = params, optimizer.init(params), sra.init_teacher(params)
    for _ in range(4):
        carried = step(*carried)
    assert carried[2].step == 2
    assert carried[2].average["w"].tolist() == [1.25] * 3


@pytest.mark.parametrize("stepped", [1, None, jnp.ones(()), jnp.ones(2, bool)])
def test_whether_it_stepped_is_one_boolean(loss, stepped):
    teacher = sra.init_teacher({"w": jnp.zeros(2)})
    with pytest.raises(TypeError, match=r"stepped must be one boolean\. Received: .* made"):
        sra.update_teacher(loss, teacher, {"w": jnp.ones(2)}, stepped=stepped)


LORA = {"base": [jnp.ones((4, 4), "bfloat16")], "lora": jnp.ones((4, 2)), "gate": jnp.ones(())}


@pytest.mark.parametrize(
    "trained",
    [
        {"base": False, "lora": True, "gate": False},
        {"base": [False], "lora": True, "gate": False},
        lambda path, leaf: path.startswith("lora"),
    ],
)
def test_frozen_leaves_are_the_students_own(loss, trained):
    teacher = sra.init_teacher(LORA, trained)
    moved_on = jax.tree.map(lambda leaf: leaf + 1, LORA)
    teacher = jax.jit(functools.partial(sra.update_teacher, loss))(teacher, moved_on)
    assert sum(leaf.size for leaf in jax.tree.leaves(teacher.average)) == 8 + 2
    assert teacher.average["base"][0].dtype == "bfloat16"
    found = sra.teacher_params(teacher, moved_on)
    assert found["base"][0] is moved_on["base"][0]
    assert found["gate"] is moved_on["gate"]
    np.testing.assert_allclose(found["lora"], 1 + 1e-4, rtol=1e-6)
    both = jax.jit(lambda *sides: sides, donate_argnums=(0, 1))  # nothing is held twice
    both(jax.tree.map(jnp.copy, moved_on), teacher)


def test_no_gradient_comes_through_what_is_frozen(loss):
    x0, noise, t, _ = make_batch()
    params = {"base": jnp.ones((4, 4)), "lora": jnp.ones((4, 4))}
    teacher = sra.init_teacher(params, {"base": False, "lora": True})

    def target(params):
        apply = lambda p, x, t: x @ (p["base"] + p["lora"])  # noqa: E731
        u = jnp.zeros_like(t)
        return sra.teacher_tokens(loss, apply, teacher, params, x0, noise, t, u=u).sum()

    assert not any(leaf.any() for leaf in jax.tree.leaves(jax.grad(target)(params)))


def test_nnx_filters_say_what_is_trained():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.LoRALinear(4, 4, lora_rank=2, rngs=rngs)

    model = Model(nnx.Rngs(0))
    for params in (model, nnx.state(model)):
        average = sra.init_teacher(params, nnx.LoRAParam).average
        found = sra.teacher_params(sra.init_teacher(params, nnx.LoRAParam), params)
        assert sum(leaf.size for leaf in floats(average)) == 16 + 2  # two frozen stand-ins
        np.testing.assert_array_equal(floats(found)[0], floats(params)[0])


@pytest.mark.parametrize(
    ("trained", "kind", "text"),
    [
        ({"base": False}, ValueError, "trained= must be booleans at the places of the parameters"),
        ({**LORA, "gate": 1}, TypeError, "trained= must be booleans, or a function"),
        (False, ValueError, "There must be trained floating-point arrays. Received: trained=False"),
    ],
)
def test_what_says_no_frozen_leaves_is_refused(trained, kind, text):
    with pytest.raises(kind, match=text):
        sra.init_teacher(LORA, trained)


def test_tied_weights_of_nnx_stay_tied(loss):
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(4, 8, rngs=rngs)
            self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs), self.embed])

    model = Tied(nnx.Rngs(0))
    teacher = sra.init_teacher(model)
    updated = nnx.jit(functools.partial(sra.update_teacher, loss))(teacher, model)
    for average in (teacher.average, updated.average, sra.teacher_params(updated, model)):
        assert average.layers[1] is average.embed
        assert average.embed is not model.embed


# An average of the user's, and where it lies


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_average_in_half_precision_is_refused(loss, dtype):
    params = {"w": jnp.ones(3, dtype)}
    teacher = sra.Teacher(params, 0)
    text = f"EMA of decay 0.9999 never moves. Received: {dtype} at 'w'. Start it from init_teacher"
    for call in (sra.teacher_params, functools.partial(sra.update_teacher, loss)):
        with pytest.raises(ValueError, match=re.escape(text)):
            call(teacher, params)


def test_an_average_of_the_users_teaches_with_metrics_in_one_call(loss, params, batch):
    average = jax.tree.map(lambda leaf: leaf + 0.1, params)
    teacher = sra.Teacher(average, 7)
    projector = sra.init_projector(jax.random.key(0), WIDTH)
    options = {"u": jnp.zeros(4)}
    tokens = apply_at(1)(params, *batch[::2], batch[3])
    sides = teacher, params, projector, tokens
    value, logged = sra.align(loss, apply_at(2), *sides, *batch, **options, log_metrics=True)
    target = sra.teacher_tokens(loss, apply_at(2), teacher, params, *batch, **options)
    assert value == sra.term(loss, projector, tokens, target, step=7)
    assert logged == sra.metrics(loss, projector, tokens, target)


def test_the_average_may_lie_in_the_hosts_memory(loss):
    on_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    on_host = on_device.with_memory_kind("pinned_host")
    start, params = sra.init_teacher({"w": jnp.zeros(3)}), {"w": jnp.ones(3)}
    expected = sra.update_teacher(loss, start, params)

    @functools.partial(jax.jit, donate_argnums=0)
    def update(teacher):
        average = jax.device_put(teacher.average, on_device)
        teacher = sra.update_teacher(loss, teacher._replace(average=average), params)
        return teacher._replace(average=jax.device_put(teacher.average, on_host))

    found = update(start._replace(average=jax.device_put(start.average, on_host)))
    assert found.average["w"].sharding.memory_kind == "pinned_host"
    np.testing.assert_allclose(found.average["w"], expected.average["w"], rtol=1e-6)
