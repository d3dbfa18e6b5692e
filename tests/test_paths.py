"""Noise paths against the oracle, and the laws that hold on all of them."""

import dataclasses
import json
import math

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import (
    BACKEND,
    CONTINUOUS,
    FLOATS,
    PATHS,
    UNIT_TIME,
    array,
    draws,
    dtype_of,
    generators,
    is_tensor,
    tensor,
    times,
)

from selfalign import SRALoss, paths, time_gap
from selfalign.time_gap import gap_range

ALL = pytest.mark.parametrize("name", PATHS)


def sample(rng, *shape):
    return rng.normal(size=shape).astype("float32")


def sample_and_noise(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return sample(rng, *shape), sample(rng, *shape)


def some_times(name):
    if name == "discrete":
        return np.array([0, 1, 500, 999])
    return np.array([0.002, 0.25, 0.5, 0.999], "float32")


def exact(path, t):
    """Times as the oracle takes them."""
    return t if path.discrete else t.astype("float64")


# Coefficients, samples, velocities


@ALL
def test_coefficients_equal_the_oracle(name):
    path, expected = PATHS[name]

    @given(times(name))
    def law(t):
        alpha, sigma = path.coefficients(tensor(t))
        wide = exact(path, t)
        np.testing.assert_allclose(array(alpha), expected.alpha(wide), rtol=1e-6, atol=2e-7)
        np.testing.assert_allclose(array(sigma), expected.sigma(wide), rtol=1e-6, atol=2e-7)

    law()


@ALL
@pytest.mark.parametrize("function", ["add_noise", "velocity"])
def test_add_noise_and_velocity_equal_the_oracle(name, function):
    path, expected = PATHS[name]

    @given(times(name), generators)
    def law(t, rng):
        x0, noise = sample(rng, 8, 3, 2), sample(rng, 8, 3, 2)
        got = getattr(path, function)(tensor(x0), tensor(noise), tensor(t))
        wide = x0.astype("float64"), noise.astype("float64"), exact(path, t)
        wanted = getattr(oracle, function)(expected, *wide)
        np.testing.assert_allclose(array(got), wanted, rtol=1e-5, atol=1e-5)

    law()


@ALL
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("function", ["add_noise", "velocity"])
def test_results_have_the_shape_and_dtype_of_x0(name, dtype, function):
    x0 = tensor(np.ones((4, 2)), dtype)
    result = getattr(PATHS[name][0], function)(x0, x0, tensor(some_times(name)))
    assert is_tensor(result)
    assert (dtype_of(result), tuple(result.shape)) == (dtype, (4, 2))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_half_precision_is_computed_in_float32(name, dtype):
    path, _ = PATHS[name]
    values = np.random.default_rng(0).uniform(0.1, 0.9, size=(3, 64))
    x0, noise, t = (tensor(x, dtype) for x in values)
    wide = path.add_noise(*(tensor(array(x)) for x in (x0, noise, t)))
    assert np.array_equal(array(path.add_noise(x0, noise, t)), array(tensor(array(wide), dtype)))


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3, 2, 2), (4, 2, 1, 3, 2)])
def test_samples_of_any_rank(shape):
    x0, noise = sample_and_noise(*shape)
    t = some_times("linear")
    got = paths.Linear().add_noise(tensor(x0), tensor(noise), tensor(t))
    wanted = oracle.add_noise(oracle.linear(1), x0, noise, t)
    np.testing.assert_allclose(array(got), wanted, rtol=1e-5, atol=1e-6)


@ALL
def test_targets_are_velocity_noise_and_data(name):
    path, _ = PATHS[name]
    x0, noise = map(tensor, sample_and_noise(4, 3))
    t = tensor(some_times(name))
    assert np.array_equal(array(path.target(x0, noise, t)), array(path.velocity(x0, noise, t)))
    assert np.array_equal(array(path.target(x0, noise, t, "noise")), array(noise))
    assert np.array_equal(array(path.target(x0, noise, t, "data")), array(x0))


def test_linear_velocity_is_noise_minus_data():
    x0, noise = sample_and_noise(4, 3)
    arguments = tensor(x0), tensor(noise), tensor(some_times("linear"))
    assert np.array_equal(array(paths.Linear().velocity(*arguments)), noise - x0)
    assert np.array_equal(array(paths.Linear(noise_at=0).velocity(*arguments)), x0 - noise)


@given(draws, draws, generators)
def test_samples_differ_by_the_gap_times_the_velocity_on_the_linear_path(t, u, rng):
    """x_t - x_t' = (t - t') (noise - x0): the teacher's input is truly re-noised."""
    path = paths.Linear()
    x0, noise = sample(rng, 8, 5), sample(rng, 8, 5)
    moved = time_gap.teacher_time(path, tensor(t), tensor(u))
    ahead = array(path.add_noise(tensor(x0), tensor(noise), moved))
    difference = array(path.add_noise(tensor(x0), tensor(noise), tensor(t))) - ahead
    gap = t.astype("float64") - array(moved)
    np.testing.assert_allclose(difference, gap[:, None] * (noise - x0).astype("float64"), atol=2e-6)


@pytest.mark.parametrize("name", UNIT_TIME)
def test_the_ends_are_the_sample_itself_and_the_noise(name):
    path, _ = PATHS[name]
    x0, noise = sample_and_noise(2, 3)
    clean, noisy = (
        array(path.add_noise(tensor(x0), tensor(noise), tensor(np.full(2, float(end)))))
        for end in (path.clean_at, path.noise_at)
    )
    assert np.array_equal(clean, x0)
    np.testing.assert_allclose(noisy, noise, atol=1e-6)


@pytest.mark.parametrize("kind", [paths.Linear, paths.Cosine])
def test_reversing_time_mirrors_the_path_and_turns_the_velocity(kind):
    x0, noise = map(tensor, sample_and_noise(4, 3))
    t = np.array([0.0, 0.25, 0.5, 1.0])
    ahead, back = kind(), kind(noise_at=0)
    for function, sign in (("add_noise", 1), ("velocity", -1)):
        plain = array(getattr(ahead, function)(x0, noise, tensor(t)))
        mirrored = array(getattr(back, function)(x0, noise, tensor(1 - t)))
        assert np.array_equal(plain, sign * mirrored), function


@pytest.mark.parametrize("name", ["cosine", "cosine-reversed", "discrete"])
def test_variance_is_preserved(name):
    alpha, sigma = PATHS[name][0].coefficients(tensor(some_times(name)))
    np.testing.assert_allclose(array(alpha) ** 2 + array(sigma) ** 2, 1, atol=1e-6)


# The teacher's view


@ALL
def test_less_noise_equals_the_oracle(name):
    path, expected = PATHS[name]

    @given(times(name), st.lists(st.integers(0, 199), min_size=8, max_size=8), generators)
    def law(t, k, rng):
        u = (np.array(k) + 0.25) / 200  # inside a step, so that rounding cannot change the step
        x0, noise = sample(rng, 8, 3), sample(rng, 8, 3)
        given = [tensor(x) for x in (x0, noise, t, u)]
        x, moved = path.add_less_noise(*given, gap_range(path, 0.2))
        wide = x0.astype("float64"), noise.astype("float64"), exact(path, t), u
        wanted, wanted_times = oracle.add_less_noise(expected, *wide, 0.2)
        np.testing.assert_allclose(array(moved), wanted_times, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(array(x), wanted, rtol=1e-5, atol=2e-5)

    law()


@ALL
@pytest.mark.parametrize("random_gap", [True, False])
def test_less_noise_is_the_teachers_time_and_the_noise_there(name, random_gap):
    """Bit for bit: an adapter that makes one call has the numbers of two."""
    path, _ = PATHS[name]
    x0, noise = map(tensor, sample_and_noise(4, 3))
    t = tensor(some_times(name))
    u = tensor([0.0, 0.3, 0.6, 0.9]) if random_gap else None
    x, moved = path.add_less_noise(x0, noise, t, u, gap_range(path, 0.3), random_gap)
    wanted = time_gap.teacher_time(path, t, u, 0.3, random_gap)
    assert np.array_equal(array(moved), array(wanted))
    assert np.array_equal(array(x), array(path.add_noise(x0, noise, wanted)))
    assert dtype_of(moved) == dtype_of(t)


@ALL
def test_no_gap_is_the_students_own_sample(name):
    path, _ = PATHS[name]
    x0, noise = map(tensor, sample_and_noise(4, 3))
    t = tensor(some_times(name))
    x, moved = path.add_less_noise(x0, noise, t, tensor([0.0, 0.3, 0.6, 0.9]), 0)
    assert np.array_equal(array(moved), array(t))
    assert np.array_equal(array(x), array(path.add_noise(x0, noise, t)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_less_noise_has_the_dtypes_of_x0_and_t(dtype):
    x0, noise = (tensor(x, dtype) for x in sample_and_noise(4, 3))
    x, moved = paths.Linear().add_less_noise(
        x0, noise, tensor(some_times("linear"), dtype), tensor([0.0, 0.3, 0.6, 0.9]), 0.2
    )
    assert (dtype_of(x), dtype_of(moved)) == (dtype, dtype)


# Times for training

MANY = np.random.default_rng(0).random(200_000)


@pytest.mark.parametrize("name", UNIT_TIME)
def test_times_are_drawn_uniformly_over_the_path(name):
    t = array(PATHS[name][0].draw_times(tensor(MANY)))
    counts = np.histogram(t, bins=20, range=(0.0, 1.0))[0]
    assert t.min() >= 0
    assert t.max() <= 1
    np.testing.assert_allclose(counts, 10_000, atol=5 * 10_000**0.5)


@pytest.mark.parametrize("name", UNIT_TIME)
def test_times_reach_both_ends(name):
    lowest, highest = array(PATHS[name][0].draw_times(tensor([0.0, np.nextafter(1, 0, dtype="f")])))
    assert lowest == 0
    assert 1 - 1e-6 < highest <= 1


def test_discrete_times_are_uniform_over_all_steps():
    path = paths.Discrete((0.9, 0.7, 0.5, 0.3, 0.1))
    counts = np.bincount(array(path.draw_times(tensor(MANY))), minlength=5)
    assert len(counts) == 5
    np.testing.assert_allclose(counts, 40_000, atol=5 * 40_000**0.5)


@pytest.mark.parametrize("u", [np.nextafter(np.float32(1), np.float32(0)), 1.0])
def test_discrete_times_stay_on_the_path_at_the_largest_draw(u):
    """u * T rounds up to T; the step is still the last one."""
    t = paths.Discrete().draw_times(tensor([0.0, u]))
    assert array(t).tolist() == [0, 999]
    assert dtype_of(t) == "int32"


def test_edm_draws_the_lognormal_noise_levels_of_its_training():
    u = np.linspace(0.001, 0.995, 200)
    t = array(paths.EDM().draw_times(tensor(u)))
    np.testing.assert_allclose(t, oracle.lognormal(u), rtol=2e-4)
    logarithms = np.log(array(paths.EDM().draw_times(tensor(MANY))))
    assert abs(logarithms.mean() + 1.2) < 0.02
    assert abs(logarithms.std() - 1.2) < 0.02


def test_edm_draws_inside_the_path():
    path = paths.EDM(sigma_min=0.1, sigma_max=1.0)
    t = array(path.draw_times(tensor(MANY)))
    assert t.min() == np.float32(0.1)
    assert t.max() == 1
    ends = paths.EDM().draw_times(tensor([0.0, np.nextafter(1, 0, dtype="f")]))
    np.testing.assert_allclose(array(ends), [0.002, 80], rtol=1e-6)


@ALL
def test_drawn_times_are_times_of_the_path(name):
    path, _ = PATHS[name]

    @given(draws)
    def law(u):
        t = path.draw_times(tensor(u))
        assert is_tensor(t)
        assert tuple(t.shape) == (8,)
        path.check_times(t)

    law()


# How models are told the time

TOLD = {
    "linear": lambda t: [t, 1000 * t, 1 - t, 1000 * (1 - t)],
    "cosine": lambda t: [t, 1000 * t, 1 - t, 1000 * (1 - t)],
    "discrete": lambda t: [t, t / 1000, 1 - t / 1000],
    "edm": lambda t: [t, np.log(t) / 4],
}


@pytest.mark.parametrize("name", TOLD)
def test_conventions_are_the_usual_ones_and_their_rounding(name):
    path, _ = PATHS[name]
    t = np.array([1, 250, 999]) if path.discrete else np.array([0.125, 0.251, 0.876])
    exact_ways, rounded_ways = path.time_conventions()
    wanted = TOLD[name](t.astype("float64"))
    assert len(exact_ways) == len(rounded_ways) == len(wanted)
    for way, values in zip(exact_ways, wanted, strict=True):
        np.testing.assert_allclose(array(way(tensor(t))), values, rtol=1e-5, atol=1e-6)
    for way, values in zip(rounded_ways, wanted, strict=True):
        np.testing.assert_allclose(array(way(tensor(t))), np.round(values), atol=1e-6)


@ALL
def test_conventions_differ_from_each_other_and_keep_times_apart(name):
    path, _ = PATHS[name]
    t = np.array([1, 250, 997]) if path.discrete else np.array([0.125, 0.251, 0.876])
    told = [array(way(tensor(t))) for way in path.time_conventions()[0]]
    assert len({tuple(values) for values in told}) == len(told)
    assert all(len(set(values)) == 3 for values in told)


# Signal and noise


@ALL
def test_snr_equals_the_oracle(name):
    path, expected = PATHS[name]
    t = some_times(name)
    wanted = oracle.snr(expected, exact(path, t))
    np.testing.assert_allclose(array(path.snr(tensor(t))), wanted, rtol=2e-4)


@pytest.mark.parametrize("name", UNIT_TIME)
def test_snr_is_infinite_at_the_clean_end_and_zero_at_noise(name):
    path, _ = PATHS[name]
    clean, noisy = array(path.snr(tensor(np.array([path.clean_at, path.noise_at], "float32"))))
    assert clean == math.inf
    assert 0 <= noisy < 1e-12


@pytest.mark.parametrize("dtype", FLOATS)
def test_snr_of_half_precision_times_has_float32_accuracy(dtype):
    t = tensor([0.25, 0.5], dtype)
    np.testing.assert_allclose(array(paths.Linear().snr(t)), [9, 1], rtol=1e-6)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_time_at_snr_inverts_snr(name):
    path, _ = PATHS[name]
    longest = 80 if name == "edm" else 1

    @given(draws)
    def law(u):
        t = (0.001 + 0.998 * u).astype("float32") * longest
        back = array(path.time_at_snr(path.snr(tensor(t))))
        np.testing.assert_allclose(back, t, rtol=1e-5, atol=1e-6)
        ratios = 10.0 ** (6 * u.astype("float64") - 3)
        again = array(path.snr(path.time_at_snr(tensor(ratios))))
        np.testing.assert_allclose(again, ratios, rtol=1e-3)

    law()


@pytest.mark.parametrize("name", UNIT_TIME)
def test_time_at_snr_reaches_both_ends(name):
    path, _ = PATHS[name]
    clean, noisy = array(path.time_at_snr(tensor([math.inf, 0.0])))
    np.testing.assert_allclose([clean, noisy], [path.clean_at, path.noise_at], atol=1e-7)


# Discrete paths and EDM


def test_ddpm_schedule_of_dit():
    abar = paths.Discrete().alphas_cumprod
    facts = {
        0: 0.9999,
        1: 0.99978009,
        100: 0.89514159,
        200: 0.65634701,
        500: 0.07779666,
        999: 4.0358e-5,
    }
    np.testing.assert_allclose([abar[i] for i in facts], list(facts.values()), rtol=1e-5)
    np.testing.assert_allclose(abar, oracle.alphas_cumprod(), rtol=1e-12)


def test_discrete_coefficients_keep_their_digits_at_the_clean_end():
    _, sigma = paths.Discrete().coefficients(tensor([0, 1, 2]))
    np.testing.assert_allclose(array(sigma), np.sqrt(1 - oracle.alphas_cumprod()[:3]), rtol=2e-7)


def test_discrete_takes_a_schedule_of_your_own():
    path = paths.Discrete(np.array([0.9, 0.5, 0.1]))
    assert (path.noise_at, path.clean_at, path.span, path.bounds) == (2, 0, 3, (0, 2))
    np.testing.assert_allclose(array(path.snr(tensor([0, 1, 2]))), [9, 1, 1 / 9], rtol=1e-5)
    assert path == paths.Discrete([0.9, 0.5, 0.1])


def test_edm_time_is_the_noise_level():
    x0, noise, t = tensor(np.ones((2, 3))), tensor(np.ones((2, 3))), tensor([0.5, 80.0])
    assert np.array_equal(array(paths.EDM().add_noise(x0, noise, t)), [[1.5] * 3, [81.0] * 3])
    assert np.array_equal(array(paths.EDM().velocity(x0, noise, t)), np.ones((2, 3)))


# Paths as settings


@ALL
def test_the_ends_are_where_the_path_says(name):
    path, _ = PATHS[name]
    dtype = "int32" if path.discrete else "float32"
    clean, noisy = (tensor([end], dtype) for end in (path.clean_at, path.noise_at))
    assert array(path.snr(clean))[0] > 4 * array(path.snr(noisy))[0]
    assert path.bounds[0] <= min(path.clean_at, path.noise_at)
    assert path.bounds[1] >= max(path.clean_at, path.noise_at)


@ALL
def test_settings_rebuild_the_path(name):
    path, _ = PATHS[name]
    assert paths.resolve(path.settings()) == path
    assert paths.resolve(path) is path
    assert paths.resolve(path.name) == type(path)()


@ALL
def test_paths_are_immutable_and_hashable(name):
    path, _ = PATHS[name]
    assert hash(path) == hash(paths.resolve(path.settings()))
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field"):
        path.name = "other"


# A path of your own


class Straight(paths.Path):
    """A path of the user's own, as the base class describes it: alpha = 1, sigma = t^2."""

    name = "straight"
    noise_at = 1.0

    def coefficients(self, t):
        return 1 + 0 * t, t * t

    def rates(self, t):
        return 0 * t, 2 * t

    def toward_data(self, t, gap):
        return (t - gap) * (t > gap)


def test_a_path_of_your_own():
    path, t = paths.resolve(Straight()), tensor([0.5, 1.0])
    x0, noise = tensor(np.ones((2, 3))), tensor(np.full((2, 3), 2.0))
    assert np.array_equal(array(path.add_noise(x0, noise, t))[:, 0], [1.5, 3])
    assert np.array_equal(array(path.velocity(x0, noise, t))[:, 0], [2, 4])
    assert np.array_equal(array(path.snr(t)), [16, 1])
    moved = time_gap.teacher_time(path, t, tensor([0.5, 0.5]), 0.5)
    assert np.array_equal(array(moved), [0.25, 0.75])


def test_a_path_of_your_own_draws_times_and_has_one_convention():
    path = Straight()
    assert array(path.draw_times(tensor([0.0, 0.25]))).tolist() == [0, 0.25]
    (told,), (rounded,) = path.time_conventions()
    assert array(told(tensor([0.75]))).tolist() == [0.75]
    assert array(rounded(tensor([0.75]))).tolist() == [1]


def test_a_path_of_your_own_does_not_stop_the_settings():
    """As for callables, the name is saved and the object is passed again."""
    loss = SRALoss(student_layer=1, teacher_layer=2, path=Straight())
    settings = json.loads(json.dumps(loss.settings()))
    assert SRALoss.from_settings(settings, path=loss.path) == loss


@pytest.mark.only("torch", "jax")
@ALL
def test_numpy_draws_give_tensors_of_the_backend(name):
    t = PATHS[name][0].draw_times(np.array([0.25, 0.5], "float32"))
    assert is_tensor(t), (BACKEND, type(t))
