"""Bad input to the JAX adapter: the rule, what was received, what to do."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jax_loop import apply_at
from jax_models import WIDTH, LinenModel, NnxModel, forward, make_batch

import selfalign
from selfalign.adapters import jax as sra


@pytest.fixture
def align(loss, params, batch):
    """`align` on good input, of which a test spoils one part."""
    projector = sra.init_projector(jax.random.key(0), WIDTH)
    student = forward(params, batch[0], *batch[2:])[1][1]
    good = {"apply": apply_at(4), "teacher": sra.init_teacher(params), "params": params, "projector": projector,
            "student_tokens": student, "key": jax.random.key(0)}  # fmt: skip

    def call(**bad):
        x0, noise, t, y = bad.pop("batch", batch)
        given = {**good, **bad}
        return sra.align(bad.pop("loss", loss), *map(given.pop, list(good)[:-1]), x0, noise, t, y, **given)

    return call


ONE = "A tap must name one captured array, by its path, or by its number from 1 in a list. Received: "


def check(kind, text):
    return pytest.raises(kind, match=re.escape(text))


@pytest.mark.parametrize(
    ("bad", "kind", "text"),
    [
        ({"key": None}, ValueError, "The gaps need either key= or u=. Received: neither. Pass key=, a new key for each"),
        ({"u": jnp.zeros(4)}, ValueError, "The gaps need either key= or u=. Received: both."),
        ({"key": 0}, TypeError, "key must be a JAX key. Received: int 0. Pass jax.random.key(seed)."),
        ({"key": jnp.zeros(2)}, TypeError, "key must be a JAX key. Received: ArrayImpl Array([0., 0.]"),
        ({"key": None, "u": jnp.zeros(3)}, ValueError, "u must hold one draw per sample, of t's shape. Received: u (3,), t"),
        ({"teacher": {"w": 1}}, TypeError, "teacher must be a Teacher. Received: dict. Build it with init_teacher(params)."),
        ({"student_tokens": None}, TypeError, "The student's tokens must be a tensor. Received: NoneType None."),
        ({"student_tokens": jnp.zeros((4, 5, 3))}, ValueError,
         "Tokens must have the projector's width. Received: width 3, projector of width 16."),
        ({"student_tokens": jnp.zeros((4, 6, WIDTH))}, ValueError,
         "Student and teacher tokens must have the same shape [B, N, D]. Received: student (4, 6, 16), teacher (4, 5, 16)."),
        ({"student_tokens": jnp.zeros((4, 5, WIDTH), "int32")}, TypeError, "Tokens must be floating point. Received: student"),
        ({"apply": lambda *inputs: forward(*inputs)}, TypeError,
         "apply must return the teacher's tokens, one array [B, N, D]. Received: a tuple. Return the tapped block's output"),
        ({"apply": lambda *inputs: forward(*inputs)[1][3][:, 0]}, ValueError,
         "Tokens must have the shape [B, N, D]. Received: teacher tokens of shape (4, 16)."),
        ({"projector": {"kernel": jnp.zeros(2)}}, ValueError, "The projector's parameters must be hidden_kernel, hidden_bias"),
    ],
)  # fmt: skip
def test_align_says_what_is_wrong(align, bad, kind, text):
    with check(kind, text):
        align(**bad)


def test_structures_that_differ_name_the_first_path(loss, params):
    teacher = sra.init_teacher({"blocks": [{"w": jnp.zeros(2)}, {"w": jnp.zeros(2), "b": jnp.zeros(2)}]})
    for student, received in (
        ({"blocks": [{"w": jnp.zeros(2)}, {"w": jnp.zeros(2)}]}, "at 'blocks/1/b': teacher (2,), student missing"),
        ({"blocks": [{"w": jnp.zeros(3)}, teacher.average["blocks"][1]]}, "at 'blocks/0/w': teacher (2,), student (3,)"),
    ):  # fmt: skip
        for call in (functools.partial(sra.update_teacher, loss, teacher), functools.partial(sra.teacher_params, teacher)):
            with check(ValueError, f"Teacher and student must have the same structure and shapes. Received: {received}. Build"):
                call(student)
    with check(TypeError, "teacher must be a Teacher. Received: list."):
        sra.update_teacher(loss, [], params)


def test_parameters_without_floats_are_refused():
    with check(ValueError, "params must hold floating-point arrays. Received: PyTreeDef({'count': *}). Pass the model's"):
        sra.init_teacher({"count": jnp.zeros(3, "int32")})


# Keys


def tokens(loss, params, key, x0, noise, t, y):
    return sra.teacher_tokens(loss, apply_at(4), sra.init_teacher(params), params, x0, noise, t, y, key=key)


TRACED = {
    "jit": lambda function, t: jax.jit(function)(t),
    "scan": lambda function, t: jax.lax.scan(lambda carry, t: (carry, function(t)), 0, t[None]),
    "vmap": lambda function, t: jax.vmap(function)(t[None]),
}


@pytest.mark.parametrize("transform", TRACED)
def test_a_key_that_is_a_constant_of_a_traced_function_is_refused(loss, params, batch, transform):
    x0, noise, t, y = batch
    with check(ValueError, "The key must be new in each run of a traced function. Received: a key that is a constant of it: "
                           "whatever is drawn from it is the same in every run. Make the key an argument"):  # fmt: skip
        TRACED[transform](lambda t: tokens(loss, params, CONSTANT, x0, noise, t, y), t)


CONSTANT = jax.random.key(0)


def on_devices(function, batch):
    mesh = jax.make_mesh((4,), ("data",))
    batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    specs = (PartitionSpec(), *(PartitionSpec("data"),) * 4)
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("data")))(CONSTANT, *batch)


def test_one_key_for_all_devices_of_a_shard_map_is_refused(loss, params):
    batch = make_batch(8)
    with check(ValueError, "The key must differ between the devices of a shard_map. Received: one key along data. "
                           "Fold the device's index in: jax.random.fold_in(key, jax.lax.axis_index(name))."):  # fmt: skip
        on_devices(lambda key, *batch: tokens(loss, params, key, *batch), batch)
    folded = lambda key, *batch: tokens(loss, params, jax.random.fold_in(key, jax.lax.axis_index("data")), *batch)  # noqa: E731
    assert on_devices(folded, batch).shape == (8, 5, WIDTH)


# Static settings


def test_traced_values_are_refused_where_a_setting_belongs():
    with check(TypeError, "width must be an integer. Received: JitTracer"):
        jax.jit(lambda width: sra.init_projector(jax.random.key(0), width))(8)
    with check(TypeError, "layer must be an integer. Received: JitTracer"):
        jax.jit(lambda layer: sra.split_blocks({"w": jnp.ones((4, 2))}, layer)[0])(2)
    with check(TypeError, "max_gap must be a number. Received: JitTracer"):
        jax.jit(lambda gap: selfalign.SRALoss(student_layer=1, teacher_layer=2, max_gap=gap).max_gap)(0.2)
    with check(ValueError, "A schedule must be a number or a function of the step. Received: JitTracer"):
        jax.jit(lambda weight: selfalign.SRALoss(student_layer=1, teacher_layer=2, weight=weight).max_gap)(0.2)
    with check(TypeError, "where must be a block's number or a path. Received: JitTracer"):
        jax.jit(lambda where: sra.tap([jnp.ones(2)], where))(1)


def test_a_projector_needs_a_key_and_a_width():
    with check(TypeError, "key must be a JAX key. Received: int 0."):
        sra.init_projector(0, 8)
    with check(ValueError, "width must be finite and at least 1. Received: 0. It is the feature width D"):
        sra.init_projector(jax.random.key(0), 0)


# Taps


def test_a_missing_tap_lists_what_was_captured(batch):
    x, _, t, y = batch
    model = nnx.view(NnxModel(nnx.Rngs(0)), deterministic=True)
    _, sown = nnx.capture(model, nnx.Intermediate)(x, t, y)
    with check(ValueError, ONE + "'blocks/2/__call__', which names 0. Captured: tokens_0/value/0 (4, 5, 16), tokens_1/value/0"):
        sra.tap(sown, "blocks/2/__call__")
    model = LinenModel()
    _, captured = model.apply(
        model.init(jax.random.key(0), x, t, y), x, t, y, capture_intermediates=True, mutable=["intermediates"]
    )
    with check(ValueError, "Received: 'intermediates/block_2', which names 2. Captured: intermediates/Dense_0/__call__/0"):
        sra.tap(captured, "intermediates/block_2")


@pytest.mark.parametrize(
    ("captured", "where", "received"),
    [
        ([jnp.ones(2)], 2, "2, which names 0. Captured: 0 (2,)."),
        ([jnp.ones(2)], 0, "0, which names 0. Captured: 0 (2,)."),
        ([jnp.ones(2)], -1, "-1, which names 0. Captured: 0 (2,)."),
        ([(jnp.ones(2), jnp.ones(3))], 1, "1, which names 2. Captured: 0/0 (2,), 0/1 (3,)."),
        ({"0": jnp.ones(2)}, 1, "1, which names 1. Captured: 0 (2,)."),
        ({}, "blocks/0", "'blocks/0', which names 0. Captured: nothing."),
        ({"tokens": (jnp.ones(2), jnp.ones(2))}, "tokens", "'tokens', which names 2. Captured: tokens/0 (2,), tokens/1 (2,)."),
    ],
)
def test_a_tap_names_exactly_one_array(captured, where, received):
    with check(
        ValueError, f"A tap must name one captured array, by its path, or by its number from 1 in a list. Received: {received}"
    ):
        sra.tap(captured, where)


@pytest.mark.parametrize(
    ("stacked", "text"),
    [
        (
            {"a": jnp.ones((4, 2)), "b": jnp.ones((3, 2))},
            "the depth as the first axis of every array. Received: a (4,), b (3,).",
        ),
        ({"a": jnp.ones(())}, "Stacked blocks must have the depth as the first axis of every array. Received: a ()."),
        ({}, "Stacked blocks must have the depth as the first axis of every array. Received: no arrays."),
        ({"a": jnp.ones((1, 2))}, "layer must be in [1, 1]. Received: 2. It is a block's number, counted from 1."),
    ],
)
def test_stacked_blocks_have_one_depth(stacked, text):
    with check(ValueError, text):
        sra.split_blocks(stacked, 2)
