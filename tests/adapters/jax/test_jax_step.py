"""What one step of SRA computes on a JAX model, under every transformation."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax_loop import apply_at, make_loop
from jax_models import WIDTH, forward, make_batch, make_params
from support import PATHS, draws, times

import selfalign
from selfalign import schedules
from selfalign.adapters import jax as sra


def moved(params, by=0.01):
    """A student that has moved away from its teacher."""
    return jax.tree.map(lambda p: p + by * jnp.sin(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape), params)


def term_of(loss, params, student, projector, batch, teacher_layer=4, **draws):
    _, features = forward(student, loss.path.add_noise(*batch[:3]), *batch[2:])
    return sra.align(loss, apply_at(teacher_layer), sra.init_teacher(params), student, projector, features[1], *batch, **draws)


@pytest.fixture
def projector():
    return sra.init_projector(jax.random.key(3), WIDTH)


def test_term_is_the_papers_formula(loss, params, projector, batch):
    u = jax.random.uniform(jax.random.key(0), (4,))
    term = term_of(loss, params, moved(params), projector, batch, u=u)
    wide = functools.partial(jax.tree.map, lambda p: np.asarray(p, "float64"))
    x0, noise, t, y = (*wide(batch[:3]), np.asarray(batch[3]))
    t_teacher = oracle.teacher_time(oracle.linear(1), t, np.asarray(u, "float64"), 0.2)
    target = forward(wide(params), oracle.add_noise(oracle.linear(1), x0, noise, t_teacher), t_teacher, y, np)[1][3]
    student = forward(wide(moved(params)), oracle.add_noise(oracle.linear(1), x0, noise, t), t, y, np)[1][1]
    expected = oracle.loss("cosine", 0.5, oracle.project(wide(projector), student), target)
    assert term.dtype == "float32"
    assert term.shape == ()
    np.testing.assert_allclose(term, expected, rtol=1e-5)


def test_projector_starts_as_the_core_draws_it(projector):
    bound = np.sqrt(6 / (3 * WIDTH))
    for name, shape in {"hidden_kernel": (WIDTH, 2 * WIDTH), "output_kernel": (2 * WIDTH, WIDTH)}.items():
        assert projector[name].shape == shape
        assert np.abs(projector[name]).max() <= bound
        np.testing.assert_allclose(np.std(projector[name]), bound / np.sqrt(3), rtol=0.1)
    assert not projector["hidden_bias"].any()
    assert not projector["output_bias"].any()
    assert sra.init_projector(jax.random.key(3), WIDTH, "bfloat16")["output_bias"].dtype == "bfloat16"


def seen_by_teacher(loss, batch, **draws):
    """The inputs that `apply` receives."""
    seen = []
    params = {"w": jnp.ones(())}

    def apply(params, *inputs):
        seen.append(inputs)
        return jnp.zeros((len(inputs[0]), 1, 1))

    sra.teacher_tokens(loss, apply, sra.init_teacher(params), params, *batch, **draws)
    (inputs,) = seen
    return inputs


@pytest.mark.parametrize("name", PATHS)
@hypothesis.given(data=st.data())
def test_teacher_is_never_noisier_and_sees_the_same_noise(name, data):
    path, reference = PATHS[name]
    t, u = data.draw(times(name)), data.draw(draws)
    x0, noise = np.ones((8, 3), "float32"), np.full((8, 3), 2, "float32")
    x, t_teacher, y = seen_by_teacher(
        selfalign.SRALoss(student_layer=1, teacher_layer=2, path=path), tuple(map(jnp.asarray, (x0, noise, t, t))), u=u
    )
    np.testing.assert_array_equal(y, t)  # the condition, as it was given
    assert t_teacher.dtype == t.dtype
    assert (path.snr(t_teacher) >= path.snr(jnp.asarray(t))).all()
    np.testing.assert_allclose(x, oracle.add_noise(reference, x0, noise, np.asarray(t_teacher)), rtol=1e-4, atol=1e-5)


def test_gaps_come_from_the_key_and_the_step(loss, batch):
    batch = (*make_batch(512)[:2], jnp.full(512, 0.9))
    gaps = {seed: 0.9 - seen_by_teacher(loss, batch, key=jax.random.key(seed))[1] for seed in (0, 0, 1)}
    np.testing.assert_array_equal(gaps[0], 0.9 - seen_by_teacher(loss, batch, key=jax.random.key(0))[1])
    assert (gaps[0] != gaps[1]).mean() > 0.9
    assert gaps[0].min() >= -1e-6
    assert gaps[0].max() < 0.2
    np.testing.assert_allclose(gaps[0].mean(), 0.1, atol=0.01)
    # the key may have served for noise and times before: the stream for the gaps is another one
    same = jax.random.uniform(jax.random.key(0), (512,))
    assert abs(np.corrcoef(same, gaps[0])[0, 1]) < 0.15
    np.testing.assert_array_equal(seen_by_teacher(loss, batch, key=jax.random.PRNGKey(0))[1], 0.9 - gaps[0])  # old keys, too


def test_a_fixed_gap_needs_no_key(batch):
    fixed = selfalign.SRALoss(student_layer=2, teacher_layer=4, random_gap=False, max_gap=0.1)
    np.testing.assert_allclose(seen_by_teacher(fixed, batch)[1], np.maximum(batch[2] - 0.1, 0), atol=1e-7)


def test_no_gradient_to_the_teacher_nor_to_later_blocks(loss, params, projector, batch):
    def objective(student, teacher, projector):
        features = forward(student, loss.path.add_noise(*batch[:3]), *batch[2:])[1]
        return sra.align(loss, apply_at(4), teacher, student, projector, features[1], *batch, key=jax.random.key(1))

    teacher = sra.init_teacher(params)
    student, averages, head = jax.grad(objective, argnums=(0, 1, 2), allow_int=True)(moved(params), teacher, projector)
    assert not any(leaf.any() for leaf in averages.average.values())
    for name, gradient in student.items():
        later = name.startswith(("blocks.2", "blocks.3", "blocks.4", "blocks.5", "final"))
        # a softmax does not feel the bias of its keys; every other parameter up to the block moves
        assert gradient.any() != later, name
    assert all(leaf.any() for leaf in head.values())


@pytest.mark.parametrize("weight", [0, schedules.Stop(0)])
def test_weight_zero_keeps_every_parameter_in_the_graph(params, projector, batch, weight):
    loss = selfalign.SRALoss(student_layer=2, teacher_layer=4, weight=weight)
    value, gradients = jax.value_and_grad(
        lambda trained: term_of(loss, params, trained[0], trained[1], batch, key=jax.random.key(0))
    )((moved(params), projector))
    assert value == 0
    assert jax.tree.structure(gradients) == jax.tree.structure((params, projector))
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradients))


def test_same_layer_without_gap_is_exactly_zero(params, batch):
    loss = selfalign.SRALoss(student_layer=3, teacher_layer=3, allow_same_layer=True, max_gap=0)
    target = sra.teacher_tokens(loss, apply_at(3), sra.init_teacher(params), params, *batch, key=jax.random.key(0))
    student = forward(params, loss.path.add_noise(*batch[:3]), *batch[2:])[1][2]
    assert loss(student, target) == 0.0


def test_schedules_follow_the_teachers_step_without_compiling_anew(params, batch):
    loss = selfalign.SRALoss(
        student_layer=2, teacher_layer=4, weight=0.5 * schedules.Stop(2), decay=schedules.DecayWarmup(0.99)
    )
    loop = make_loop(loss, lr=0.0)  # the student stands still: all that changes is the step
    state, step = loop.start(params), jax.jit(loop.step)
    plain = make_loop(loss, sra_on=False).objective(*state[::2], *batch)
    terms = []
    for _ in range(4):
        state, value = step(state, *batch, u=batch[2])
        terms.append(float(value - plain))
    assert terms[0] > 0.01
    np.testing.assert_allclose(terms, [terms[0], terms[0], 0, 0], atol=1e-5)  # of a sum of about 10
    assert state[2].step == 4
    assert step._cache_size() == 1


@hypothesis.given(decay=st.floats(0, 1), by=st.floats(-1, 1))
def test_update_is_the_ema(decay, by):
    loss = selfalign.SRALoss(student_layer=2, teacher_layer=4, decay=decay)
    before = {name: jnp.asarray(value) for name, value in make_params(depth=1).items()}
    after = moved(before, by)
    teacher = sra.update_teacher(loss, sra.init_teacher(before), after)
    assert teacher.step == 1
    for name, value in teacher.average.items():
        expected = oracle.ema(np.asarray(before[name], "float64"), np.asarray(after[name], "float64"), decay)
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def test_decay_follows_the_step(params):
    loss = selfalign.SRALoss(student_layer=2, teacher_layer=4, decay=schedules.DecayWarmup(0.999))
    teacher, expected, student = sra.init_teacher(params), {n: np.asarray(p, "float64") for n, p in params.items()}, params
    update = jax.jit(functools.partial(sra.update_teacher, loss))
    for step in range(20):
        student = moved(student, 0.1)
        teacher = update(teacher, student)
        decay = min(0.999, (1 + step) / (10 + step))
        expected = {name: oracle.ema(expected[name], np.asarray(student[name], "float64"), decay) for name in expected}
    assert teacher.step == 20
    for name in expected:
        np.testing.assert_allclose(teacher.average[name], expected[name], rtol=1e-5, atol=1e-6)


def test_the_tokens_dtype_is_the_projectors_and_the_loss_is_float32(loss, params, projector, batch):
    half = jax.tree.map(lambda p: p.astype("bfloat16"), params)
    x0, noise, t, y = batch
    batch = (x0.astype("bfloat16"), noise.astype("bfloat16"), t, y)

    def term(student, projector, key):
        features = forward(student, loss.path.add_noise(*batch[:3]), t.astype("bfloat16"), y)[1]
        apply = lambda params, x, t, y: forward(params, x, t.astype("bfloat16"), y)[1][3]  # noqa: E731
        return sra.align(loss, apply, sra.init_teacher(half), student, projector, features[1], *batch, key=key)

    jaxpr = jax.make_jaxpr(term)(half, projector, jax.random.key(0))
    products = [e for e in jaxpr.jaxpr.eqns if e.primitive.name == "dot_general"]
    assert len(products) > 20
    assert {str(out.aval.dtype) for e in products for out in e.outvars} == {"bfloat16"}
    value, gradients = jax.value_and_grad(term, argnums=1)(half, projector, jax.random.key(0))
    assert value.dtype == "float32"
    assert {leaf.dtype.name for leaf in gradients.values()} == {"float32"}
    x0, noise, t, y = batch
    single = term_of(
        loss, params, params, projector, (x0.astype("float32"), noise.astype("float32"), t, y), key=jax.random.key(0)
    )
    np.testing.assert_allclose(value, single, rtol=0.05)


TRANSFORMED = {
    "jit": lambda step: jax.jit(step),
    "checkpointed": lambda step: jax.jit(jax.checkpoint(step)),
    "scan": lambda step: (
        lambda *args: jax.tree.map(
            lambda x: x[0], jax.lax.scan(lambda carry, key: (carry, step(*args[:-1], key)), 0, args[-1][None])[1]
        )
    ),
    "vmap": lambda step: (
        lambda *args: jax.tree.map(
            lambda x: x[1], jax.vmap(step, in_axes=(None,) * 6 + (0,))(*args[:-1], jnp.stack([args[-1]] * 2))
        )
    ),
}


@pytest.fixture(scope="module")
def eager():
    """A step, its arguments, and what it gives without any transformation."""
    loop = make_loop(selfalign.SRALoss(student_layer=2, teacher_layer=4))

    def step(trained, teacher, x0, noise, t, y, key):
        return jax.value_and_grad(loop.objective)(trained, teacher, x0, noise, t, y, key=key)

    params = {name: jnp.asarray(value) for name, value in make_params().items()}
    trained, _, teacher = loop.start(params)
    arguments = ({**trained, "model": moved(params)}, teacher, *make_batch(), jax.random.key(7))
    return step, arguments, step(*arguments)


@pytest.mark.parametrize("transform", TRANSFORMED)
def test_transformed_numbers_equal_eager_ones(eager, transform):
    step, arguments, expected = eager
    for got, wanted in zip(*map(jax.tree.leaves, (TRANSFORMED[transform](step)(*arguments), expected)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)


def test_an_ensemble_is_trained_under_vmap(loop, params, batch):
    members = jax.tree.map(lambda *leaves: jnp.stack(leaves), loop.start(params), loop.start(moved(params), seed=1))
    keys = jax.random.split(jax.random.key(0))
    together, values = jax.jit(jax.vmap(loop.step, in_axes=(0, None, None, None, None)))(members, *batch, key=keys)
    step = jax.jit(loop.step)
    for i in range(2):
        alone, value = step(jax.tree.map(lambda leaf, i=i: leaf[i], members), *batch, key=keys[i])
        np.testing.assert_allclose(values[i], value, rtol=1e-5)
        for got, wanted in zip(jax.tree.leaves(together[2]), jax.tree.leaves(alone[2]), strict=True):
            np.testing.assert_allclose(got[i], wanted, rtol=1e-4, atol=1e-5)


def test_training_moves_the_term_down(loop, params, batch):
    state, step = loop.start(params), jax.jit(loop.step, donate_argnums=0)
    term = lambda state: term_of(loop.loss, state[2].average, state[0]["model"], state[0]["projector"], batch, u=batch[2] * 0)  # noqa: E731
    before = term(state)
    for i in range(30):
        state, _ = step(jax.tree.map(jnp.copy, state), *batch, key=jax.random.key(i))
    assert term(state) < 0.5 * before


@pytest.mark.parametrize("shape", [(4,), (4, 5)])
def test_mask_leaves_out_samples_or_tokens(loss, params, projector, batch, shape):
    mask = jnp.arange(np.prod(shape)).reshape(shape) % 2 == 0
    term = term_of(loss, params, moved(params), projector, batch, u=batch[2], loss_mask=mask)
    features = forward(moved(params), loss.path.add_noise(*batch[:3]), *batch[2:])[1][1]
    target = sra.teacher_tokens(loss, apply_at(4), sra.init_teacher(params), params, *batch, u=batch[2])
    expected = loss(selfalign.project(projector, features), target, mask=mask)
    assert term == expected != term_of(loss, params, moved(params), projector, batch, u=batch[2])


def test_conditions_by_name_reach_the_model(loss, params, batch):
    x0, noise, t, y = batch
    apply = lambda params, x, t, *, labels: apply_at(4)(params, x, t, labels)  # noqa: E731
    named = sra.teacher_tokens(loss, apply, sra.init_teacher(params), params, x0, noise, t, labels=y, u=t)
    np.testing.assert_array_equal(named, sra.teacher_tokens(loss, apply_at(4), sra.init_teacher(params), params, *batch, u=t))


def test_metrics_come_from_the_same_tokens(loss, params, projector, batch):
    target = sra.teacher_tokens(loss, apply_at(4), sra.init_teacher(params), params, *batch, u=batch[2])
    student = forward(params, loss.path.add_noise(*batch[:3]), *batch[2:])[1][1]
    info = jax.jit(lambda s, t: loss.metrics(selfalign.project(projector, s), t))(student, target)
    np.testing.assert_allclose(0.5 * info["distance"], sra.term(loss, projector, student, target), rtol=1e-5)


def test_the_average_moves_in_every_third_step_only(params):
    """Without work in between: the compiled program branches on the step."""
    loss = selfalign.SRALoss(student_layer=2, teacher_layer=4, decay=schedules.Every(3, 0.5))
    update = jax.jit(functools.partial(sra.update_teacher, loss))
    teacher, expected = sra.init_teacher(params), params
    assert "cond" in str(jax.make_jaxpr(functools.partial(sra.update_teacher, loss))(teacher, params))
    for step in range(1, 7):
        student = moved(params, 0.1 * step)
        teacher = update(teacher, student)
        if step % 3 == 0:
            expected = jax.tree.map(lambda old, new: old + (1 - 0.5**3) * (new - old), expected, student)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), teacher.average, expected)
    assert int(teacher.step) == 6


def test_a_share_of_the_batch_is_the_term_of_the_first_samples(loss, params, projector, batch):
    """What docs/jax.md advises: hand align the first samples of everything."""
    u, mask = jax.random.uniform(jax.random.key(0), (4,)), jnp.array([1.0, 1, 0, 0])
    masked = term_of(loss, params, moved(params), projector, batch, u=u, loss_mask=mask)
    share = term_of(loss, params, moved(params), projector, [part[:2] for part in batch], u=u[:2])
    np.testing.assert_allclose(share, masked, rtol=1e-6)
