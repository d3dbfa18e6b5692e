"""Means of which a mask leaves samples or tokens out."""

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import array, dtype_of, generators, tensor, token_pairs

from selfalign import distances, masks

values = token_pairs.map(lambda both: abs(both[0][..., 0]))  # [B, N]


def mean(x, mask=None):
    return array(masks.masked_mean(tensor(x), None if mask is None else tensor(mask)))


@given(values)
def test_a_mask_of_ones_is_no_mask(x):
    plain = mean(x)
    np.testing.assert_allclose(plain, x.astype("float64").mean(), rtol=1e-5)
    for shape in (x.shape, x.shape[:1]):
        for kind in ("bool", "int32", "float32"):
            np.testing.assert_allclose(mean(x, np.ones(shape, kind)), plain, rtol=1e-5)


@given(values, st.lists(st.booleans(), min_size=2, max_size=2))
def test_a_mask_over_samples_is_that_mask_over_their_tokens(x, kept):
    mask = np.array(kept)[: len(x)]
    spread = np.repeat(mask[:, None], x.shape[1], axis=1)
    np.testing.assert_allclose(mean(x, mask), mean(x, spread), rtol=1e-5)


@given(values, st.lists(st.booleans(), min_size=6, max_size=6))
def test_leaving_tokens_out_is_the_mean_of_the_others(x, kept):
    mask = np.array(kept)[: x.size].reshape(x.shape)
    expected = x[mask].astype("float64").mean() if mask.any() else 0.0
    np.testing.assert_allclose(mean(x, mask), expected, rtol=1e-5)
    np.testing.assert_allclose(oracle.masked_mean(x.astype("float64"), mask), expected)


@given(values, generators, st.sampled_from([0.001, 1.0, 1000.0]))
def test_a_mask_of_weights_is_a_weighted_mean(x, rng, scale):
    for shape in (x.shape, x.shape[:1]):
        weights = scale * rng.uniform(0.1, 1, shape)
        wanted = oracle.masked_mean(x.astype("float64"), weights)
        np.testing.assert_allclose(mean(x, weights), wanted, rtol=1e-5)


@given(generators)
def test_values_of_samples_take_a_mask_over_samples(rng):
    x, weights = rng.random(3), rng.uniform(0.1, 1, 3)
    np.testing.assert_allclose(mean(x), x.mean(), rtol=1e-5)
    np.testing.assert_allclose(mean(x, weights), np.average(x, weights=weights), rtol=1e-5)
    assert mean(x, np.zeros(3)) == 0


@pytest.mark.parametrize("shape", [(2,), (2, 3)])
def test_a_mask_of_zeros_gives_zero(shape):
    got = masks.masked_mean(tensor(np.ones((2, 3))), tensor(np.zeros(shape)))
    assert array(got) == 0
    assert dtype_of(got) == "float32"


def test_a_token_left_out_must_still_be_finite():
    x = np.array([[1.0, np.nan], [2.0, 3.0]])
    assert np.isnan(mean(x, np.array([[True, False], [True, True]])))


def test_it_is_a_name_of_the_distances_too():
    assert distances.masked_mean is masks.masked_mean
