"""What one step of SRA computes on a JAX model."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax_loop import apply_at, jitted, make_loop
from jax_models import WIDTH, forward, make_batch, make_params, moved
from support import PATHS, draws, times

import selfalign
from selfalign import schedules
from selfalign.adapters import jax as sra


def term_of(loss, params, student, projector, batch, **options):
    """The term of a student that has moved away from its teacher, whose average is `params`."""
    trained = {"model": student, "projector": projector}
    return jitted(make_loop(loss).term)(trained, sra.init_teacher(params), *batch, **options)


@functools.cache
def tokens_of(loss, layer):
    """Jitted: the student's tokens after a layer, from its parameters and the batch."""

    def tokens(params, x0, noise, t, y):
        return forward(params, loss.path.add_noise(x0, noise, t), t, y)[1][layer - 1]

    return jax.jit(tokens)


def wide(tree):
    """NumPy arrays of the same numbers in float64; integers as they are."""
    arrays = jax.tree.map(np.asarray, tree)
    return jax.tree.map(lambda a: a.astype("float64") if a.dtype.kind == "f" else a, arrays)


def test_term_is_the_papers_formula(loss, params, projector, batch):
    u = jax.random.uniform(jax.random.key(0), (4,))
    term = term_of(loss, params, moved(params), projector, batch, u=u)
    path = oracle.linear(1)
    x0, noise, t, y = wide(batch)
    t_teacher = oracle.teacher_time(path, t, wide(u), 0.2)
    x_teacher = oracle.add_noise(path, x0, noise, t_teacher)
    x_student = oracle.add_noise(path, x0, noise, t)
    target = forward(wide(params), x_teacher, t_teacher, y, np)[1][1]
    student = forward(wide(moved(params)), x_student, t, y, np)[1][0]
    expected = oracle.loss("cosine", 0.5, oracle.project(wide(projector), student), target)
    assert term.dtype == "float32"
    assert term.shape == ()
    np.testing.assert_allclose(term, expected, rtol=1e-5)


# What the teacher sees


def seen_by_teacher(loss, batch, **options):
    """The inputs that `apply` receives: x, t and the condition."""
    seen = []
    params = {"w": jnp.ones(())}

    def apply(params, *inputs):
        seen.append(inputs)
        return jnp.zeros((len(inputs[0]), 1, 1))

    sra.teacher_tokens(loss, apply, sra.init_teacher(params), params, *batch, **options)
    (inputs,) = seen
    return inputs


@pytest.mark.parametrize("name", PATHS)
@hypothesis.given(data=st.data())
def test_teacher_is_never_noisier_and_sees_the_same_noise(name, data):
    path, reference = PATHS[name]
    t = data.draw(times(name))
    u = data.draw(draws)
    x0 = np.ones((8, 3), "float32")
    noise = np.full((8, 3), 2, "float32")
    loss = selfalign.SRALoss(student_layer=1, teacher_layer=2, path=path)
    condition = t
    batch = tuple(map(jnp.asarray, (x0, noise, t, condition)))
    x, t_teacher, y = seen_by_teacher(loss, batch, u=u)
    np.testing.assert_array_equal(y, condition)
    assert t_teacher.dtype == t.dtype
    assert (path.snr(t_teacher) >= path.snr(jnp.asarray(t))).all()
    expected = oracle.add_noise(reference, x0, noise, np.asarray(t_teacher))
    np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-5)


def test_gaps_come_from_the_key_and_the_step(loss):
    batch = (*make_batch(512)[:2], jnp.full(512, 0.9))

    def gaps(key):
        return np.asarray(0.9 - seen_by_teacher(loss, batch, key=key)[1])

    found = gaps(jax.random.key(0))
    np.testing.assert_array_equal(found, gaps(jax.random.key(0)))
    np.testing.assert_array_equal(found, gaps(jax.random.PRNGKey(0)))  # old keys, too
    assert (found != gaps(jax.random.key(1))).mean() > 0.9
    assert found.min() >= -1e-6
    assert found.max() < 0.2
    np.testing.assert_allclose(found.mean(), 0.1, atol=0.01)


def test_gaps_are_independent_of_what_else_the_key_serves_for(loss):
    batch = (*make_batch(512)[:2], jnp.full(512, 0.9))
    key = jax.random.key(0)
    _, t_teacher = seen_by_teacher(loss, batch, key=key)
    same_key = jax.random.uniform(key, (512,))
    assert abs(np.corrcoef(same_key, 0.9 - t_teacher)[0, 1]) < 0.15


def test_gaps_change_with_the_step_under_one_key(loss, batch):
    params = {"w": jnp.ones(())}
    apply = lambda params, x, t, y: t[:, None, None]  # noqa: E731
    first = sra.init_teacher(params)
    later = first._replace(step=jnp.int32(1))
    key = jax.random.key(0)
    times = [sra.teacher_tokens(loss, apply, at, params, *batch, key=key) for at in (first, later)]
    assert (times[0] != times[1]).all()


def test_a_fixed_gap_needs_no_key(batch):
    fixed = selfalign.SRALoss(student_layer=2, teacher_layer=4, random_gap=False, max_gap=0.1)
    expected = np.maximum(batch[2] - 0.1, 0)
    np.testing.assert_allclose(seen_by_teacher(fixed, batch)[1], expected, atol=1e-7)


def test_conditions_by_name_reach_the_model(loss, params, batch):
    x0, noise, t, y = batch
    teacher = sra.init_teacher(params)
    positional = jitted(apply_at(2))

    def named(params, x, t, *, labels):
        return positional(params, x, t, labels)

    found = sra.teacher_tokens(loss, named, teacher, params, x0, noise, t, labels=y, u=t)
    expected = sra.teacher_tokens(loss, positional, teacher, params, *batch, u=t)
    np.testing.assert_array_equal(found, expected)


# Gradients


def test_no_gradient_to_the_teacher_nor_to_later_blocks(loop, projector, batch):
    params = {name: jnp.asarray(value) for name, value in make_params(depth=3).items()}
    gradient = jax.jit(jax.grad(loop.term, argnums=(0, 1), allow_int=True))
    trained = {"model": moved(params), "projector": projector}
    teacher = sra.init_teacher(params)
    of_trained, of_teacher = gradient(trained, teacher, *batch, key=jax.random.key(1))
    assert not any(leaf.any() for leaf in of_teacher.average.values())
    for name, value in of_trained["model"].items():
        later = name.startswith(("blocks.1", "blocks.2", "final"))
        # a softmax does not feel the bias of its keys; every other parameter up to the block moves
        assert value.any() != later, name
    assert all(leaf.any() for leaf in of_trained["projector"].values())


@pytest.mark.parametrize("weight", [0, schedules.Stop(0)])
def test_weight_zero_keeps_every_parameter_in_the_graph(params, projector, batch, weight):
    loss = selfalign.SRALoss(student_layer=1, teacher_layer=2, weight=weight)
    trained = {"model": moved(params), "projector": projector}
    gradient = jax.jit(jax.value_and_grad(make_loop(loss).term))
    value, found = gradient(trained, sra.init_teacher(params), *batch, key=jax.random.key(0))
    assert value == 0
    assert jax.tree.structure(found) == jax.tree.structure(trained)
    assert not any(leaf.any() for leaf in jax.tree.leaves(found))


# The term


def test_same_layer_without_gap_is_exactly_zero(params, batch):
    loss = selfalign.SRALoss(student_layer=2, teacher_layer=2, allow_same_layer=True, max_gap=0)
    apply = jitted(apply_at(2))
    teacher = sra.init_teacher(params)
    target = sra.teacher_tokens(loss, apply, teacher, params, *batch, key=jax.random.key(0))
    x0, noise, t, y = batch
    student = apply(params, loss.path.add_noise(x0, noise, t), t, y)
    assert loss(student, target) == 0.0


@pytest.mark.parametrize("shape", [(4,), (4, 5)])
def test_mask_leaves_out_samples_or_tokens(loss, params, projector, batch, shape):
    mask = jnp.arange(np.prod(shape)).reshape(shape) % 2 == 0
    term = term_of(loss, params, moved(params), projector, batch, u=batch[2], loss_mask=mask)
    apply = jitted(apply_at(2))
    target = sra.teacher_tokens(loss, apply, sra.init_teacher(params), params, *batch, u=batch[2])
    student = tokens_of(loss, 1)(moved(params), *batch)
    expected = loss(selfalign.project(projector, student), target, mask=mask)
    np.testing.assert_allclose(term, expected, rtol=1e-6)
    unmasked = term_of(loss, params, moved(params), projector, batch, u=batch[2])
    assert abs(term - unmasked) > 1e-4


def test_a_fraction_of_the_batch_is_the_term_of_the_first_samples(loss, params, projector, batch):
    """Who wants to save a part of the cost hands over the first samples of everything."""
    u = jax.random.uniform(jax.random.key(0), (4,))
    student = moved(params)
    mask = jnp.array([1.0, 1, 0, 0])
    masked = term_of(loss, params, student, projector, batch, u=u, loss_mask=mask)
    first = [part[:2] for part in batch]
    alone = term_of(loss, params, student, projector, first, u=u[:2])
    np.testing.assert_allclose(alone, masked, rtol=1e-6)


def test_metrics_come_from_the_same_tokens(loss, projector):
    student, target = jax.random.normal(jax.random.key(0), (2, 4, 5, WIDTH))
    logged = jitted(functools.partial(sra.metrics, loss))(projector, student, target)
    term = sra.term(loss, projector, student, target)
    np.testing.assert_allclose(0.5 * logged["distance"], term, rtol=1e-5)
    expected = loss.metrics(selfalign.project(projector, student), target)
    assert logged.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(logged[name], value, rtol=1e-5, err_msg=name)


def test_the_tokens_dtype_is_the_projectors_and_the_loss_is_float32(params, projector, batch):
    loss = selfalign.SRALoss(student_layer=1, teacher_layer=2)
    half = jax.tree.map(lambda p: p.astype("bfloat16"), params)
    x0, noise, t, y = batch
    rounded = x0.astype("bfloat16"), noise.astype("bfloat16"), t, y

    def run(params, x, t, y):
        return forward(params, x, t.astype("bfloat16"), y)[1]

    def term(projector, student, key):
        features = run(student, loss.path.add_noise(*rounded[:3]), t, y)
        apply = lambda *inputs: run(*inputs)[1]  # noqa: E731
        sides = sra.init_teacher(half), student, projector, features[0]
        return sra.align(loss, apply, *sides, *rounded, key=key)

    key = jax.random.key(0)
    equations = jax.make_jaxpr(term)(projector, half, key).jaxpr.eqns
    products = [each for each in equations if each.primitive.name == "dot_general"]
    assert len(products) > 20
    assert {str(out.aval.dtype) for each in products for out in each.outvars} == {"bfloat16"}
    value, gradients = jax.jit(jax.value_and_grad(term))(projector, half, key)
    assert value.dtype == "float32"
    assert {leaf.dtype.name for leaf in gradients.values()} == {"float32"}
    widened = [part.astype("float32") for part in rounded[:2]]
    single = term_of(loss, params, params, projector, (*widened, t, y), key=key)
    np.testing.assert_allclose(value, single, rtol=0.05)


# Training


def test_schedules_follow_the_teachers_step_without_compiling_anew(params, batch):
    weight = 0.5 * schedules.Stop(2)
    decay = schedules.DecayWarmup(0.99)
    loss = selfalign.SRALoss(student_layer=1, teacher_layer=2, weight=weight, decay=decay)

    @jax.jit
    def step(teacher, trained):  # the student stands still: all that changes is the step
        term = make_loop(loss).term(trained, teacher, *batch, u=batch[2])
        return sra.update_teacher(loss, teacher, trained["model"]), term

    trained, _, teacher = make_loop(loss).start(params)
    terms = []
    for _ in range(4):
        teacher, term = step(teacher, trained)
        terms.append(float(term))
    assert terms[0] > 0.01
    np.testing.assert_allclose(terms, [terms[0], terms[0], 0, 0], rtol=1e-6)
    assert teacher.step == 4
    assert step._cache_size() == 1


def test_training_moves_the_term_down(loop, params, batch):
    def term(state):
        trained, _, teacher = state
        return jitted(loop.term)(trained, teacher, *batch, u=batch[2] * 0)

    state = loop.start(params)
    before = term(state)
    for i in range(30):
        state, _ = jitted(loop.step)(state, *batch, key=jax.random.key(i))
    assert term(state) < 0.5 * before
