"""The plateau rule against an oracle, its laws, and its use under compile, jit and scan."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import BACKEND, MODULES, array, dtype_of, floats, framework, is_tensor, tensor

import selfalign
from selfalign.plateau import Plateau, PlateauState

cosines = st.lists(floats(-1, 1), min_size=1, max_size=12)
rules = st.builds(
    Plateau,
    patience=st.integers(1, 4),
    min_gain=st.sampled_from([0.0, 0.05]),
    smoothing=st.sampled_from([0.0, 0.5, 0.9]),
    warmup=st.integers(0, 3),
    shrink=st.sampled_from([0.0, 0.5, 1.0]),
)


def run(rule, values):
    """(states, factors) after each cosine."""
    state, states, factors = rule.init(), [], []
    for value in values:
        state, factor = rule(state, tensor(np.float32(value)))
        states.append(state)
        factors.append(float(array(factor)))
    return states, factors


def oracle(rule, values):
    """The factors once more, by looking back over all that has been seen."""
    mean, best, since, factor, factors = 0.0, -math.inf, 0, 1.0, []
    for step, value in enumerate(values, 1):
        weight = max(1 - rule.smoothing, 1 / step)
        mean = (1 - weight) * mean + weight * value
        if step <= rule.warmup or mean > max(best, -1) + rule.min_gain:
            best, since = mean, 0
        else:
            since += 1
        if since == rule.patience:
            factor, best, since = factor * rule.shrink, mean, 0
        factors.append(factor)
    return factors, mean


@given(rules, st.lists(st.integers(-8, 8).map(lambda i: i / 8), min_size=1, max_size=12))
def test_equals_the_oracle(rule, values):
    if rule.smoothing == 0.9:  # a tie that rounding decides is no law
        values = [value + 0.001 * i for i, value in enumerate(values)]
    states, factors = run(rule, values)
    wanted, mean = oracle(rule, values)
    assert factors == wanted
    np.testing.assert_allclose(array(states[-1].smoothed), mean, atol=1e-5)


@given(rules, cosines)
def test_the_factor_never_rises_and_stays_in_0_1(rule, values):
    factors = [1.0, *run(rule, values)[1]]
    assert all(0 <= after <= before for before, after in itertools.pairwise(factors))


@given(cosines)
def test_no_plateau_before_the_patience_is_over(values):
    assert set(run(Plateau(patience=12, warmup=1), values)[1]) == {1.0}


def test_a_cosine_that_rises_keeps_the_factor_and_one_that_stalls_stops_it():
    rule = Plateau(patience=5, min_gain=0.001, smoothing=0.5, warmup=2)
    assert set(run(rule, np.linspace(0, 0.9, 40))[1]) == {1.0}
    factors = run(rule, [*np.linspace(0, 0.5, 10), *[0.5] * 30])[1]
    assert factors[-1] == 0
    assert factors.index(0) > 13


def test_it_halves_at_each_plateau():
    factors = run(Plateau(patience=2, warmup=1, shrink=0.5), [0.5] * 7)[1]
    assert factors == [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125]


def test_an_early_peak_does_not_count():
    """Teacher and student are alike at the start: to be beaten is what the cosine falls to."""
    early = [0.9, 0.9, 0.1, 0.1]
    assert run(Plateau(patience=3, smoothing=0, warmup=0), [*early, 0.2, 0.3])[1][-1] == 0
    assert run(Plateau(patience=3, smoothing=0, warmup=4), [*early, 0.2, 0.3])[1][-1] == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_step_that_is_not_finite_is_left_out(bad):
    rule = Plateau(patience=2, warmup=1)
    with_it, without = (run(rule, values)[0][-1] for values in ([0.25, bad, 0.5], [0.25, 0.5]))
    assert [float(array(x)) for x in with_it] == [float(array(x)) for x in without]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtypes(dtype):
    state, factor = Plateau()(PlateauState(), tensor(np.float32(0.5), dtype))
    assert is_tensor(factor)
    kinds = ["int32", "float32", "float32", "int32", "float32"]
    assert [dtype_of(x) for x in state] == kinds
    assert dtype_of(factor) == "float32"


def test_a_state_of_plain_numbers_resumes_exactly():
    rule = Plateau(patience=3, warmup=1, shrink=0.5)
    values = [0.1, 0.4, 0.4, 0.3, 0.4, 0.2, 0.4, 0.1]
    states, factors = run(rule, values)
    state = PlateauState(*(array(x).item() for x in states[3]))
    for value, factor in zip(values[4:], factors[4:], strict=True):
        state, got = rule(state, tensor(np.float32(value)))
        assert float(array(got)) == factor
    assert [float(array(x)) for x in state] == [float(array(x)) for x in states[-1]]


def test_beside_the_loss():
    loss = selfalign.SRALoss(student_layer=1, teacher_layer=2)
    rule = Plateau(patience=1, warmup=1)
    student = tensor(np.ones((2, 3, 4)))
    teacher = tensor(np.ones((2, 3, 4)) * [1, 0, 0, 0])
    state = rule.init()
    terms = []
    for _ in range(2):
        state, factor = rule(state, loss.metrics(student, teacher)["cosine"])
        terms.append(float(array(factor * loss(student, teacher))))
    assert terms == [pytest.approx(0.25), 0]


@pytest.mark.only("torch")
def test_torch_no_graph_and_compiled_whole():
    import torch

    rule = Plateau(patience=2, smoothing=0, warmup=1, shrink=0.5)
    values = [0.5, 0.75, 0.7, 0.7, 0.7, 0.7]
    called = lambda state, cosine: rule(state, cosine)  # noqa: E731
    compiled = torch.compile(called, fullgraph=True, backend="eager")
    eager_state = state = PlateauState(*map(torch.tensor, PlateauState()))
    for value in values:
        cosine = torch.tensor(value, requires_grad=True)
        eager_state, eager = rule(eager_state, cosine)
        state, factor = compiled(state, cosine)
        assert not any(x.requires_grad for x in (*state, factor))
        assert factor == eager
    assert factor < 1


@pytest.mark.only("jax")
def test_jax_jit_and_scan():
    import jax
    import jax.numpy as jnp

    rule = Plateau(patience=2, smoothing=0, warmup=1, shrink=0.5)
    values = [0.5, 0.75, 0.7, 0.7, 0.7, 0.7]
    _, wanted = run(rule, values)
    step = jax.jit(lambda state, cosine: rule(state, cosine))
    state, jitted = rule.init(), []
    for value in values:
        state, factor = step(state, jnp.float32(value))
        jitted.append(float(factor))
    _, scanned = jax.lax.scan(rule, rule.init(), jnp.asarray(values, "float32"))
    assert jitted == scanned.tolist() == wanted
    assert step._cache_size() <= 2  # plain numbers first, tensors from then on


@pytest.mark.only("torch", "jax")
def test_numpy_and_tensors_alike():
    _, factor = Plateau()(PlateauState(), np.array(0.5, "float32"))
    assert framework(factor) in MODULES[BACKEND]
