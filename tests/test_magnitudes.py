"""Numbers that float32 holds, and whose squares it does not; tokens that have hardly a length."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import BACKEND, array, generators, gradients, tensor

from selfalign import SRALoss, distances, masks, normalise

SHAPE = (2, 5, 8)
COSINES = {"cosine": distances.cosine, "token_axis_cosine": distances.token_axis_cosine}
EACH_COSINE = pytest.mark.parametrize("cosine", COSINES.values(), ids=COSINES)
WITH_GRADIENTS = pytest.mark.only("torch", "jax")
factors = st.floats(-30, 30).map(lambda power: 10.0**power)
exact_factors = st.integers(-100, 100).map(lambda power: 2.0**power)


def pair(rng, shape=SHAPE):
    return [rng.normal(size=shape).astype("float32") for _ in range(2)]


def values(function, *inputs):
    return array(function(*(tensor(np.asarray(x, "float32")) for x in inputs)))


# Directions


@EACH_COSINE
def test_the_distance_is_that_of_directions(cosine):
    @given(generators, exact_factors, exact_factors)
    def law(rng, s, r):
        a, b = pair(rng)
        assert np.array_equal(values(cosine, s * a, r * b), values(cosine, a, b))

    law()


@given(generators, factors, factors)
def test_so_it_is_for_each_token(rng, s, r):
    a, b = pair(rng)
    lengths = np.ones((2, 5, 1))
    lengths[0, 0] = s
    lengths[1, 3] = r
    want = values(distances.cosine, a, b)
    np.testing.assert_allclose(values(distances.cosine, lengths * a, b), want, atol=1e-6)
    np.testing.assert_allclose(values(distances.cosine, a, lengths * b), want, atol=1e-6)


@pytest.mark.parametrize("name", [*distances.DISTANCES])
@pytest.mark.parametrize("s", [1e19, 1e38])
def test_large_features_do_not_look_aligned(name, s):
    a, b = pair(np.random.default_rng(0))
    a, b = np.clip(a, -1, 1) * s, np.clip(b, -1, 1) * s
    loss = SRALoss(student_layer=1, teacher_layer=2, distance=name)
    with np.errstate(over="ignore"):  # the square of 1e38 is infinite
        assert float(loss(tensor(a), tensor(b))) > 0.3


def test_what_float32_has_no_digits_for_counts_as_zero():
    a, b = pair(np.random.default_rng(0))
    np.testing.assert_allclose(values(distances.cosine, 1e-40 * a, b), 0.5, rtol=1e-6)


# Gradients


def gradient(student, target, distance="cosine"):
    """Of the term, for the student's tokens."""
    loss = SRALoss(student_layer=1, teacher_layer=2, weight=1.0, distance=distance)
    return gradients(lambda s, t: loss(s, t).sum(), student, target)[0]


def shortened(tokens, length):
    """The tokens, one of them of another length."""
    lengths = np.ones((2, 5, 1), "float32")
    lengths[0, 2] = length
    return (lengths * tokens).astype("float32")


@WITH_GRADIENTS
@pytest.mark.parametrize("length", [0.0, 1e-45, 1e-30, 1e-12, 1e-7, 1e-3])
def test_a_short_token_counts_no_more_than_the_others(length):
    a, b = pair(np.random.default_rng(0))
    usual = gradient(a, b)
    found = gradient(shortened(a, length), b)
    others = np.ones((2, 5), bool)
    others[0, 2] = False
    assert np.array_equal(found[others], usual[others])
    sizes = np.linalg.norm(found, axis=-1)
    assert 0 < sizes[0, 2] < 2 * sizes[others].max()


@WITH_GRADIENTS
@pytest.mark.parametrize("short", [0.0, 1e-20])
@pytest.mark.parametrize("count", [1, 7, 9])
def test_nor_do_many_of_them(count, short):
    """Padding, up to all tokens but one."""
    if count > 7 and short:
        short = 0.0  # of so many short tokens only those of length 0 are told from the usual
    a, b = pair(np.random.default_rng(0))
    lengths = np.where(np.arange(10) < count, short, 1).reshape(2, 5, 1)
    sizes = np.linalg.norm(gradient((lengths * a).astype("float32"), b), axis=-1)
    usual = np.linalg.norm(gradient(a, b), axis=-1)
    assert sizes.max() < 2 * usual.max()


@WITH_GRADIENTS
def test_where_no_token_has_a_length_all_have_a_gradient():
    """A head that begins at zero must be able to leave it."""
    _, b = pair(np.random.default_rng(0))
    found = gradient(np.zeros(SHAPE, "float32"), b)
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 0.1, rtol=1e-5)


@WITH_GRADIENTS
@pytest.mark.parametrize("distance", COSINES)
@pytest.mark.parametrize("s", [2.0**-90, 2.0**-27, 2.0**66])
def test_the_gradient_of_all_tokens_scales_as_their_lengths(distance, s):
    a, b = pair(np.random.default_rng(0))
    found = s * gradient((s * a).astype("float32"), b, distance)
    assert np.array_equal(found, gradient(a, b, distance))


@WITH_GRADIENTS
@EACH_COSINE
def test_both_sides_of_the_function_have_a_gradient_in_proportion(cosine):
    a, b = pair(np.random.default_rng(0))
    usual = gradients(lambda s, t: cosine(s, t).sum(), a, b)
    short = np.ones(SHAPE, "float32")
    short[0, 2] = short[:, :, 1] = 0
    for sides in ((a * short, b), (a, b * short)):
        found = gradients(lambda s, t: cosine(s, t).sum(), *sides)
        for mine, size in zip(found, usual, strict=True):
            assert np.abs(mine).max() < 3 * np.abs(size).max()


# Targets


@given(generators)
def test_normalisations_of_large_targets(rng):
    x, _ = pair(rng)
    large = (1e25 * x).astype("float32")
    want = values(normalise.standardise, x)
    np.testing.assert_allclose(values(normalise.standardise, large), want, rtol=1e-3, atol=1e-5)
    want = 1e38 * values(normalise.centre, x / 10)
    got = values(normalise.centre, 1e38 * (x / 10))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e32)


@pytest.mark.parametrize("function", [normalise.standardise, normalise.centre])
def test_a_large_token_that_is_left_out_leaves_the_others_alone(function):
    x, _ = pair(np.random.default_rng(0))
    mask = np.ones((2, 5))
    mask[1, 3] = 0
    kept = mask.astype(bool)
    want = array(function(tensor(x), tensor(mask)))
    x[1, 3] = 1e30
    assert np.array_equal(array(function(tensor(x), tensor(mask)))[kept], want[kept])


# Weights


@given(generators, st.sampled_from([1e-30, 1e-20, 1e20, 1e30]))
def test_only_proportions_of_weights_count(rng, s):
    x, weights = rng.random((2, 3)), rng.uniform(0.1, 1, (2, 3))
    got = array(masks.masked_mean(tensor(x), tensor(s * weights)))
    np.testing.assert_allclose(got, np.average(x, weights=weights), rtol=1e-5)


@WITH_GRADIENTS
@pytest.mark.parametrize("weight", [-1.0, np.nan, np.inf])
def test_weights_that_nobody_looked_at_stay_visible(weight):
    """A traced mask, or one on a GPU."""
    mask = tensor(np.array([1.0, weight]))
    mean = masks.mean_over_mask
    if BACKEND == "jax":
        import jax

        mean = jax.jit(mean)
    assert np.isnan(array(mean(tensor(np.ones((2, 3))), mask)))


def test_the_lengths_that_are_logged():
    a, b = pair(np.random.default_rng(0))
    loss = SRALoss(student_layer=1, teacher_layer=2)
    info = loss.metrics(tensor((1e25 * a).astype("float32")), tensor((1e-25 * b).astype("float32")))
    for side, tokens, s in (("student", a, 1e25), ("teacher", b, 1e-25)):
        want = s * np.linalg.norm(tokens.astype("float64"), axis=-1).mean()
        np.testing.assert_allclose(float(info[f"{side}_norm"]), want, rtol=1e-5)
