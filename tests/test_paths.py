"""Noise paths against the oracle, and the laws that hold on all of them."""

import dataclasses
import json
import math

import numpy as np
import oracle
import pytest
from hypothesis import given
from support import CONTINUOUS, FLOATS, PATHS, UNIT_TIME, array, draws, dtype_of, generators, is_tensor, tensor, times

from selfalign import SRALoss, paths, time_gap

ALL = pytest.mark.parametrize("name", PATHS)


def sample(rng, *shape):
    return rng.normal(size=shape).astype("float32")


def some_times(name):
    return np.array([0, 1, 500, 999]) if name == "discrete" else np.array([0.002, 0.25, 0.5, 0.999], "float32")


@ALL
def test_coefficients_equal_the_oracle(name):
    path, expected = PATHS[name]

    @given(times(name))
    def law(t):
        alpha, sigma = path.coefficients(tensor(t))
        t = t if path.discrete else t.astype("float64")
        np.testing.assert_allclose(array(alpha), expected.alpha(t), rtol=1e-6, atol=2e-7)
        np.testing.assert_allclose(array(sigma), expected.sigma(t), rtol=1e-6, atol=2e-7)

    law()


@ALL
@pytest.mark.parametrize("function", ["add_noise", "velocity"])
def test_add_noise_and_velocity_equal_the_oracle(name, function):
    path, expected = PATHS[name]

    @given(times(name), generators)
    def law(t, rng):
        x0, noise = sample(rng, 8, 3, 2), sample(rng, 8, 3, 2)
        got = getattr(path, function)(tensor(x0), tensor(noise), tensor(t))
        t = t if path.discrete else t.astype("float64")
        wanted = getattr(oracle, function)(expected, x0.astype("float64"), noise.astype("float64"), t)
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
    x0, noise, t = (tensor(x, dtype) for x in np.random.default_rng(0).uniform(0.1, 0.9, size=(3, 64)))
    wide = path.add_noise(*(tensor(array(x)) for x in (x0, noise, t)))
    assert np.array_equal(array(path.add_noise(x0, noise, t)), array(tensor(array(wide), dtype)))


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3, 2, 2), (4, 2, 1, 3, 2)])
def test_samples_of_any_rank(shape):
    rng = np.random.default_rng(0)
    x0, noise, t = sample(rng, *shape), sample(rng, *shape), some_times("linear")
    got = paths.Linear().add_noise(tensor(x0), tensor(noise), tensor(t))
    np.testing.assert_allclose(array(got), oracle.add_noise(oracle.linear(1), x0, noise, t), rtol=1e-5, atol=1e-6)


@ALL
def test_targets_are_velocity_noise_and_data(name):
    path, _ = PATHS[name]
    rng = np.random.default_rng(0)
    x0, noise, t = tensor(sample(rng, 4, 3)), tensor(sample(rng, 4, 3)), tensor(some_times(name))
    assert np.array_equal(array(path.target(x0, noise, t)), array(path.velocity(x0, noise, t)))
    assert np.array_equal(array(path.target(x0, noise, t, "noise")), array(noise))
    assert np.array_equal(array(path.target(x0, noise, t, "data")), array(x0))


def test_linear_velocity_is_noise_minus_data():
    rng = np.random.default_rng(0)
    x0, noise, t = sample(rng, 4, 3), sample(rng, 4, 3), tensor(some_times("linear"))
    assert np.array_equal(array(paths.Linear().velocity(tensor(x0), tensor(noise), t)), noise - x0)
    assert np.array_equal(array(paths.Linear(noise_at=0).velocity(tensor(x0), tensor(noise), t)), x0 - noise)


@given(draws, draws, generators)
def test_samples_differ_by_the_gap_times_the_velocity_on_the_linear_path(t, u, rng):
    """x_t - x_t' = (t - t') (noise - x0): the teacher's input is truly re-noised."""
    path, x0, noise = paths.Linear(), sample(rng, 8, 5), sample(rng, 8, 5)
    moved = time_gap.teacher_time(path, tensor(t), tensor(u))
    difference = array(path.add_noise(tensor(x0), tensor(noise), tensor(t))) - array(
        path.add_noise(tensor(x0), tensor(noise), moved)
    )
    gap = t.astype("float64") - array(moved)
    np.testing.assert_allclose(difference, gap[:, None] * (noise - x0).astype("float64"), atol=2e-6)


@pytest.mark.parametrize("name", UNIT_TIME)
def test_the_clean_end_is_the_sample_itself(name):
    path, _ = PATHS[name]
    x0, noise = sample(np.random.default_rng(0), 2, 3), sample(np.random.default_rng(1), 2, 3)
    t = tensor(np.full(2, float(path.clean_at)))
    assert np.array_equal(array(path.add_noise(tensor(x0), tensor(noise), t)), x0)


@pytest.mark.parametrize("name", UNIT_TIME)
def test_the_noisy_end_is_the_noise(name):
    path, _ = PATHS[name]
    x0, noise = sample(np.random.default_rng(0), 2, 3), sample(np.random.default_rng(1), 2, 3)
    t = tensor(np.full(2, float(path.noise_at)))
    np.testing.assert_allclose(array(path.add_noise(tensor(x0), tensor(noise), t)), noise, atol=1e-6)


@pytest.mark.parametrize("kind", [paths.Linear, paths.Cosine])
def test_reversing_time_mirrors_the_path_and_turns_the_velocity(kind):
    rng = np.random.default_rng(0)
    x0, noise, t = tensor(sample(rng, 4, 3)), tensor(sample(rng, 4, 3)), np.array([0.0, 0.25, 0.5, 1.0])
    ahead, back = kind(), kind(noise_at=0)
    for function, sign in (("add_noise", 1), ("velocity", -1)):
        mirrored = array(getattr(back, function)(x0, noise, tensor(1 - t)))
        assert np.array_equal(array(getattr(ahead, function)(x0, noise, tensor(t))), sign * mirrored), function


@pytest.mark.parametrize("name", ["cosine", "cosine-reversed", "discrete"])
def test_variance_is_preserved(name):
    alpha, sigma = PATHS[name][0].coefficients(tensor(some_times(name)))
    np.testing.assert_allclose(array(alpha) ** 2 + array(sigma) ** 2, 1, atol=1e-6)


@ALL
def test_snr_equals_the_oracle(name):
    path, expected = PATHS[name]
    t = some_times(name)
    np.testing.assert_allclose(
        array(path.snr(tensor(t))), oracle.snr(expected, t if path.discrete else t.astype("float64")), rtol=2e-4
    )


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

    @given(draws)
    def law(u):
        t = (0.001 + 0.998 * u).astype("float32") * (80 if name == "edm" else 1)
        np.testing.assert_allclose(array(path.time_at_snr(path.snr(tensor(t)))), t, rtol=1e-5, atol=1e-6)
        ratios = 10.0 ** (6 * u.astype("float64") - 3)
        np.testing.assert_allclose(array(path.snr(path.time_at_snr(tensor(ratios)))), ratios, rtol=1e-3)

    law()


@pytest.mark.parametrize("name", UNIT_TIME)
def test_time_at_snr_reaches_both_ends(name):
    path, _ = PATHS[name]
    clean, noisy = array(path.time_at_snr(tensor([math.inf, 0.0])))
    np.testing.assert_allclose([clean, noisy], [path.clean_at, path.noise_at], atol=1e-7)


def test_ddpm_schedule_of_dit():
    abar = paths.Discrete().alphas_cumprod
    facts = {0: 0.9999, 1: 0.99978009, 100: 0.89514159, 200: 0.65634701, 500: 0.07779666, 999: 4.0358e-5}
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
    assert np.array_equal(array(time_gap.teacher_time(path, t, tensor([0.5, 0.5]), 0.5)), [0.25, 0.75])


def test_a_path_of_your_own_does_not_stop_the_settings():
    """Checkpoints keep the settings: as for callables, the name is saved and the object is passed again."""
    loss = SRALoss(student_layer=1, teacher_layer=2, path=Straight())
    settings = json.loads(json.dumps(loss.settings()))
    assert SRALoss.from_settings(settings, path=loss.path) == loss
