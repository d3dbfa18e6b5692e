"""Schedules: the paper's numbers, and the same numbers for Python steps and tensor steps."""

import json

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import INTEGERS, array, dtype_of, is_tensor, tensor

from selfalign import schedules
from selfalign.schedules import Constant, DecayWarmup, Every, PaperDecay, Product, Stop, Warmup

SCHEDULES = {
    "constant": Constant(0.5),
    "warmup": Warmup(100),
    "stop": Stop(250),
    "paper_decay": PaperDecay(steps_per_epoch=1000),
    "decay_warmup": DecayWarmup(0.999),
    "every": Every(7, 0.9999),
    "every_after_warmup": Every(3, DecayWarmup(0.999)),
    "product": 0.5 * Warmup(1000) * Stop(5000),
}
ALL = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
steps = st.integers(0, 1_000_000)


@pytest.mark.parametrize(
    ("epoch", "weight"),
    [(0, 0.2), (149, 0.2), (150, 0.19954), (200, 0.17784), (400, 0.11221), (800, 0.04467)],
)
def test_the_papers_weight_at_256_pixels(epoch, weight):
    schedule = 0.2 * PaperDecay(steps_per_epoch=5004)
    for step in (epoch * 5004, epoch * 5004 + 5003):  # flat within an epoch
        assert round(schedule(step), 5) == weight
        np.testing.assert_allclose(schedule(step), oracle.paper_weight(0.2, epoch), rtol=1e-12)


@given(st.integers(0, 2000), st.sampled_from([256, 512]), st.sampled_from([0.2, 0.04]))
def test_the_papers_decay(epoch, resolution, base):
    flat, decade = {256: (149, 1000), 512: (99, 800)}[resolution]
    schedule = base * PaperDecay(7, flat, decade)
    wanted = oracle.paper_weight(base, epoch, resolution)
    np.testing.assert_allclose(schedule(7 * epoch), wanted, rtol=1e-12)


@pytest.mark.parametrize(
    ("step", "value"), [(0, 0), (1, 0.01), (50, 0.5), (100, 1), (101, 1), (10**9, 1)]
)
def test_warmup_rises_and_stays(step, value):
    assert Warmup(100)(step) == value


@pytest.mark.parametrize(("step", "value"), [(0, 1), (249, 1), (250, 0), (10**9, 0)])
def test_stop_stops(step, value):
    assert Stop(250)(step) == value


def test_stop_at_once():
    assert Stop(0)(0) == 0


@given(steps)
def test_decay_warmup_is_the_formula_and_never_above_the_decay(step):
    value = DecayWarmup(0.999)(step)
    assert value == min(0.999, (1 + step) / (10 + step))
    assert 0.1 <= value <= 0.999


@given(st.integers(1, 20), st.floats(0.5, 0.9999), st.integers(0, 400))
def test_every_moves_in_every_kth_step_by_as_much_as_k_steps_would(k, decay, step):
    expected = decay**k if (step + 1) % k == 0 else 1.0
    np.testing.assert_allclose(Every(k, decay)(step), expected, rtol=1e-12)
    assert Every(1, decay)(step) == decay


@given(st.integers(2, 20), st.floats(0.9, 0.999), st.integers(0, 2**32 - 1))
def test_every_is_at_most_half_its_steps_from_the_ema_of_every_step(k, decay, seed):
    """Of weights that walk at a steady pace, once the start is forgotten."""
    start, pace = np.random.default_rng(seed).normal(size=2)
    schedule = Every(k, decay)
    rare = exact = start
    for step in range(k * round(20 / (1 - decay) / k)):  # ends with an update
        weight = start + pace * step
        rare = schedule(step) * rare + (1 - schedule(step)) * weight
        exact = decay * exact + (1 - decay) * weight
    ahead = (rare - exact) / pace
    assert 0 < ahead <= (k - 1) / 2 + 1e-3


@given(steps)
def test_products_multiply(step):
    assert (0.5 * Warmup(1000) * Stop(5000))(step) == 0.5 * Warmup(1000)(step) * Stop(5000)(step)
    assert (Warmup(1000) * 0.5)(step) == (0.5 * Warmup(1000))(step)
    assert (Warmup(10) * Warmup(1000))(step) == Warmup(10)(step) * Warmup(1000)(step)


@ALL
def test_integers_and_tensors_give_the_same_numbers(schedule):
    @given(steps)
    def law(step):
        number, result = schedule(step), schedule(tensor(np.array(step)))
        assert isinstance(number, float)
        assert dtype_of(result) == "float32"
        np.testing.assert_allclose(array(result), number, rtol=2e-6)

    law()


@ALL
@pytest.mark.parametrize("dtype", [dtype for dtype in INTEGERS if dtype.endswith(("32", "64"))])
@pytest.mark.parametrize("step", [0, 1, 120, 300_000])
def test_a_step_of_any_integer_dtype(schedule, dtype, step):
    """Unsigned counters do not wrap."""
    found = array(schedule(tensor(np.array(step), dtype)))
    np.testing.assert_allclose(found, schedule(step), rtol=1e-6)


@ALL
@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint32])
def test_a_numpy_integer_is_a_python_integer(schedule, kind):
    value = schedule(kind(7))
    assert isinstance(value, float)
    assert value == schedule(7)


@ALL
def test_schedules_round_trip_through_json(schedule):
    assert schedules.resolve(json.loads(json.dumps(schedule.settings()))) == schedule


@ALL
def test_schedules_are_hashable(schedule):
    assert hash(schedule) == hash(schedules.resolve(schedule.settings()))


def test_resolve_takes_numbers_settings_schedules_and_functions():
    def mine(step):
        return 2.0 * step

    assert schedules.resolve(0.25) == Constant(0.25)
    assert schedules.resolve({"name": "stop", "step": 3}) == Stop(3)
    assert schedules.resolve(SCHEDULES["product"]) is SCHEDULES["product"]
    assert schedules.resolve(mine) is mine


def test_a_product_remembers_its_factors():
    product = 0.5 * Warmup(1000)
    assert isinstance(product, Product)
    assert product.settings()["name"] == "product"
    assert {factor["name"] for factor in product.settings()["factors"]} == {"constant", "warmup"}


@pytest.mark.only("jax")
def test_steps_may_be_traced():
    import jax

    for schedule in SCHEDULES.values():
        traced = jax.jit(schedule)(tensor(np.array(700)))
        np.testing.assert_allclose(array(traced), schedule(700), rtol=1e-6)


@pytest.mark.only("torch")
def test_steps_may_be_compiled():
    import torch

    for schedule in SCHEDULES.values():
        called = lambda step, schedule=schedule: schedule(step)  # noqa: E731
        compiled = torch.compile(called, fullgraph=True, backend="aot_eager")
        found = array(compiled(tensor(np.array(700))))
        np.testing.assert_allclose(found, schedule(700), rtol=1e-6)


def test_a_step_on_the_backend_stays_there():
    assert is_tensor(Warmup(10)(tensor(np.array(5))))
