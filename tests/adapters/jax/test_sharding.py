"""SRA on eight devices: one device's numbers, the student's sharding, no gather of the teacher."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax_loop import SGD, apply_at, jitted, make_loop
from jax_models import WIDTH, forward, make_batch

import selfalign
from selfalign import schedules
from selfalign.adapters import jax as sra

COLLECTIVES = re.compile(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter")


def data_parallel(tree, mesh):
    """Parameters on every device; the batch is split."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, PartitionSpec()), tree)


def fully_sharded(tree, mesh):
    """Each matrix split over both axes of the mesh where its sides allow it.

    That is FSDP with tensor parallelism.
    """

    def spec(leaf):
        sides = zip(("data", "model"), leaf.shape, strict=False)
        axes = [name if size % mesh.shape[name] == 0 else None for name, size in sides]
        return NamedSharding(mesh, PartitionSpec(*axes[: leaf.ndim]))

    return jax.tree.map(spec, tree)


LAYOUTS = {
    "data parallel": ((8,), ("data",), data_parallel),
    "2D, parameters sharded": ((4, 2), ("data", "model"), fully_sharded),
}


def meshed(layout):
    shape, names, shardings = LAYOUTS[layout]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names)), shardings


def specs(tree):
    """The axes of the mesh along which each leaf is split, None for those that it is not."""

    def spec(leaf):
        given = tuple(leaf.sharding.spec)
        return given + (None,) * (leaf.ndim - len(given))

    return [spec(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_gives_the_numbers_of_one_device_and_keeps_the_sharding(params, layout):
    """Three steps, the last one at weight 0."""
    weight = 0.5 * schedules.Stop(2)
    loop = make_loop(selfalign.SRALoss(student_layer=1, teacher_layer=2, weight=weight), SGD)
    mesh, shardings = meshed(layout)
    placed = jax.device_put(params, shardings(params, mesh))
    sharded = loop.start(placed)
    alone = loop.start(params)
    assert specs(sharded[2].average) == specs(placed)  # from the start
    for i in range(3):
        batch = make_batch(16, seed=i)
        split = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
        alone, expected = jitted(loop.step)(alone, *batch, key=jax.random.key(i))
        sharded, value = jitted(loop.step)(sharded, *split, key=jax.random.key(i))
        np.testing.assert_allclose(value, expected, rtol=1e-4)
    average = sharded[2].average
    assert specs(average) == specs(placed)
    assert len(average["blocks.0.qkv.weight"].sharding.device_set) == 8
    for mine, theirs in zip(*map(jax.tree.leaves, (sharded[2], alone[2])), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_init_and_update_of_the_teacher_need_no_communication(loss, params, layout):
    mesh, shardings = meshed(layout)
    placed = jax.device_put(params, shardings(params, mesh))
    teacher = sra.init_teacher(placed)
    update = functools.partial(sra.update_teacher, loss)
    programs = (
        jax.jit(sra.init_teacher).lower(placed).compile(),
        jax.jit(update).lower(teacher, placed).compile(),
    )
    for program in programs:
        assert not COLLECTIVES.search(program.as_text())
        outputs = program.output_shardings.average
        for name, leaf in placed.items():
            assert outputs[name].is_equivalent_to(leaf.sharding, leaf.ndim)


def test_the_check_for_communication_can_fail(params):
    mesh, shardings = meshed("2D, parameters sharded")
    placed = jax.device_put(params, shardings(params, mesh))
    whole = NamedSharding(mesh, PartitionSpec())
    gather = jax.jit(lambda tree: tree, out_shardings=whole).lower(placed).compile()
    assert COLLECTIVES.search(gather.as_text())


def gathered(text):
    """Elements of each all-gather's result in a compiled program."""
    shapes = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather", text)
    return [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes]


def test_the_teachers_forward_gathers_no_more_than_the_students_prefix(loss, params):
    """Under FSDP weights are gathered where they are used, one by one.

    So the whole teacher is never gathered at once, nor weights of its that are not used.
    """
    mesh, shardings = meshed("2D, parameters sharded")
    placed = jax.device_put(params, shardings(params, mesh))
    x0, noise, t, y = jax.device_put(make_batch(16), NamedSharding(mesh, PartitionSpec("data")))
    teacher = sra.init_teacher(placed)

    def target(teacher, params, key):
        return sra.teacher_tokens(loss, apply_at(2), teacher, params, x0, noise, t, y, key=key)

    def prefix(params):
        return apply_at(2)(params, loss.path.add_noise(x0, noise, t), t, y)

    of_target = jax.jit(target).lower(teacher, placed, jax.random.key(0)).compile()
    of_prefix = jax.jit(prefix).lower(placed).compile()
    mine = gathered(of_target.as_text())
    plain = gathered(of_prefix.as_text())
    assert plain
    assert sum(mine) <= sum(plain)
    assert max(mine) <= max(plain)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_both_kinds_of_mesh_axes_are_served(loss, params, kind):
    """Explicit axes make sharding part of an array's type.

    Every operation of the term must type-check.
    """
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    replicated = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec("data"))
    batch = make_batch(16)
    sides = sra.init_teacher(params), params, sra.init_projector(jax.random.key(0), WIDTH)
    tokens = np.random.default_rng(0).normal(size=(16, 5, WIDTH)).astype("float32")

    def apply(params, x, t, y):
        return jnp.tanh(x @ params["x_embedder.weight"].T) + t[:, None, None]

    def term(teacher, params, projector, tokens, x0, noise, t, y, key):
        return sra.align(loss, apply, teacher, params, projector, tokens, x0, noise, t, y, key=key)

    step = jax.jit(jax.value_and_grad(term, argnums=(2, 3)))
    expected = step(*sides, jnp.asarray(tokens), *batch, jax.random.key(0))
    with jax.set_mesh(mesh):
        placed = jax.device_put(sides, replicated)
        inputs = jax.device_put((tokens, *batch), split)
        got = step(*placed, *inputs, jax.random.key(0))
    for mine, theirs in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)


def test_shard_map_gives_the_mean_over_devices(loss, params):
    """By hand: every device its own part of the batch, its own gaps, and a mean at the end."""
    mesh = jax.make_mesh((8,), ("data",))
    batch = make_batch(16)
    projector = sra.init_projector(jax.random.key(0), WIDTH)
    teacher = sra.init_teacher(params)
    key = jax.random.key(0)

    def term(params, projector, teacher, key, x0, noise, t, y):
        features = forward(params, loss.path.add_noise(x0, noise, t), t, y)[1]
        sides = teacher, params, projector, features[0]
        return sra.align(loss, apply_at(2), *sides, x0, noise, t, y, key=key)

    def on_device(params, projector, teacher, key, *batch):
        key = jax.random.fold_in(key, jax.lax.axis_index("data"))
        return jax.lax.pmean(term(params, projector, teacher, key, *batch), "data")

    replicated, split = PartitionSpec(), PartitionSpec("data")
    in_specs = (replicated,) * 4 + (split,) * 4
    mapped = jax.shard_map(on_device, mesh=mesh, in_specs=in_specs, out_specs=replicated)
    placed = jax.device_put(batch, NamedSharding(mesh, split))
    of_all = jax.jit(jax.value_and_grad(mapped, argnums=1))
    value, gradient = of_all(params, projector, teacher, key, *placed)
    of_part = jax.jit(jax.value_and_grad(term, argnums=1))
    values, gradients = [], []
    for i in range(8):
        part = [x[2 * i : 2 * i + 2] for x in batch]
        own_key = jax.random.fold_in(key, i)
        own_value, own_gradient = of_part(params, projector, teacher, own_key, *part)
        values.append(own_value)
        gradients.append(own_gradient)
    np.testing.assert_allclose(value, np.mean(values), rtol=1e-5)
    for name in projector:
        expected = np.mean([own[name] for own in gradients], axis=0)
        np.testing.assert_allclose(gradient[name], expected, rtol=1e-4, atol=1e-6)
