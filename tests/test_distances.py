"""Distances against the oracle, and the laws that make them distances."""

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import FLOATS, array, dtype_of, generators, is_tensor, tensor, token_pairs, tokens

from selfalign import distances

ALL = pytest.mark.parametrize("name", distances.NAMES)
PER_TOKEN = ["cosine", "smooth_l1", "l1", "l2"]


def pair(rng, shape=(2, 3, 4), scale=1.0):
    return rng.normal(size=shape).astype("float32") * np.float32(scale), rng.normal(size=shape).astype("float32")


def test_every_distance_has_an_oracle():
    assert set(distances.NAMES) == set(oracle.DISTANCES)


@ALL
def test_equals_the_oracle(name):
    @given(generators, st.sampled_from([0.01, 1.0, 30.0]))
    def law(rng, scale):
        student, teacher = pair(rng, scale=scale)
        got = distances.NAMES[name](tensor(student), tensor(teacher))
        wanted = oracle.DISTANCES[name](student.astype("float64"), teacher.astype("float64"))
        np.testing.assert_allclose(array(got), wanted, rtol=1e-5, atol=1e-6)

    law()


@ALL
def test_not_negative_symmetric_and_exactly_zero_for_equal_tokens(name):
    distance = distances.NAMES[name]

    @given(token_pairs)
    def law(both):
        a, b = map(tensor, both)
        there, back = array(distance(a, b)), array(distance(b, a))
        assert (there >= 0).all()
        assert np.array_equal(there, back)
        assert not array(distance(a, a)).any()

    law()


@pytest.mark.parametrize("name", ["cosine", "official-2026-07"])
def test_cosine_lies_in_0_2(name):
    @given(token_pairs)
    def law(both):
        values = array(distances.NAMES[name](*map(tensor, both)))
        assert (values >= 0).all()
        assert (values <= 2 + 1e-6).all()

    law()


@given(generators, st.integers(-10, 10), st.integers(-10, 10))
def test_cosine_ignores_the_scale_of_each_token(rng, i, j):
    student, teacher = pair(rng)
    scaled = rng.uniform(0.5, 2, (2, 3, 1)) * 2.0**i * student, rng.uniform(0.5, 2, (2, 3, 1)) * 2.0**j * teacher
    np.testing.assert_allclose(
        array(distances.cosine(*map(tensor, scaled))), array(distances.cosine(tensor(student), tensor(teacher))), atol=2e-6
    )


@given(tokens)
def test_opposite_tokens_are_at_2(x):
    norms = np.linalg.norm(x, axis=-1)
    got = array(distances.cosine(tensor(x), tensor(-x)))
    np.testing.assert_allclose(got[norms > 1e-3], 2, rtol=1e-5)


def test_cosine_of_tokens_of_norm_zero():
    zero, other = tensor(np.zeros((1, 1, 3))), tensor(np.ones((1, 1, 3)))
    assert array(distances.cosine(zero, zero)) == 0
    np.testing.assert_allclose(array(distances.cosine(zero, other)), 0.5, rtol=1e-6)
    np.testing.assert_allclose(array(distances.cosine(other, zero)), 0.5, rtol=1e-6)


@ALL
@pytest.mark.parametrize("dtype", FLOATS)
def test_float32_for_every_dtype(name, dtype):
    student, teacher = pair(np.random.default_rng(0))
    halves = tensor(student, dtype), tensor(teacher, dtype)
    got = distances.NAMES[name](*halves)
    assert is_tensor(got)
    assert dtype_of(got) == "float32"
    assert np.array_equal(array(got), array(distances.NAMES[name](*(tensor(array(x)) for x in halves))))


@pytest.mark.parametrize("name", PER_TOKEN)
def test_one_value_per_token(name):
    student, teacher = pair(np.random.default_rng(0), (2, 3, 4))
    assert tuple(distances.NAMES[name](tensor(student), tensor(teacher)).shape) == (2, 3)


@pytest.mark.parametrize("name", PER_TOKEN)
def test_tokens_do_not_see_each_other(name):
    student, teacher = pair(np.random.default_rng(0), (2, 3, 4))
    whole = array(distances.NAMES[name](tensor(student), tensor(teacher)))
    alone = array(distances.NAMES[name](tensor(student[1:, 2:]), tensor(teacher[1:, 2:])))
    np.testing.assert_allclose(alone, whole[1:, 2:], rtol=1e-6)


def test_the_official_cosine_runs_over_tokens():
    student, teacher = pair(np.random.default_rng(0), (2, 3, 4))
    over_tokens = array(distances.token_axis_cosine(tensor(student), tensor(teacher)))
    turned = distances.cosine(tensor(student.swapaxes(1, 2)), tensor(teacher.swapaxes(1, 2)))
    assert over_tokens.shape == (2, 4)
    np.testing.assert_allclose(over_tokens, array(turned), atol=1e-6)


@pytest.mark.parametrize(("d", "expected"), [(0.01, 0.001), (0.025, 0.00625), (0.05, 0.025), (0.1, 0.075), (1, 0.975)])
@pytest.mark.parametrize("sign", [1, -1])
def test_smooth_l1_of_the_paper(d, expected, sign):
    got = distances.smooth_l1(tensor(np.full((1, 1, 3), float(sign * d))), tensor(np.zeros((1, 1, 3))))
    np.testing.assert_allclose(array(got), expected, rtol=1e-5)


@pytest.mark.parametrize("beta", [1e-3, 0.05, 1.0, 5])
def test_smooth_l1_for_other_betas(beta):
    student, teacher = pair(np.random.default_rng(0))
    wanted = oracle.smooth_l1(student.astype("float64"), teacher.astype("float64"), beta)
    np.testing.assert_allclose(array(distances.smooth_l1(tensor(student), tensor(teacher), beta)), wanted, rtol=1e-5)
    np.testing.assert_allclose(array(distances.smooth_l1(tensor(student), tensor(teacher), beta=beta)), wanted, rtol=1e-5)


values = token_pairs.map(lambda both: abs(both[0][..., 0]))  # [B, N]


@given(values)
def test_a_mask_of_ones_is_no_mask(x):
    plain = array(distances.masked_mean(tensor(x)))
    np.testing.assert_allclose(plain, x.astype("float64").mean(), rtol=1e-5)
    for shape in (x.shape, x.shape[:1]):
        for kind in ("bool", "int32", "float32"):
            np.testing.assert_allclose(array(distances.masked_mean(tensor(x), tensor(np.ones(shape), kind))), plain, rtol=1e-5)


@given(values, st.lists(st.booleans(), min_size=2, max_size=2))
def test_a_mask_over_samples_is_that_mask_over_their_tokens(x, kept):
    mask = np.array(kept)[: len(x)]
    spread = np.repeat(mask[:, None], x.shape[1], axis=1)
    np.testing.assert_allclose(
        array(distances.masked_mean(tensor(x), tensor(mask))),
        array(distances.masked_mean(tensor(x), tensor(spread))),
        rtol=1e-5,
    )


@given(values, st.lists(st.booleans(), min_size=6, max_size=6))
def test_leaving_tokens_out_is_the_mean_of_the_others(x, kept):
    mask = np.array(kept)[: x.size].reshape(x.shape)
    expected = x[mask].astype("float64").mean() if mask.any() else 0.0
    np.testing.assert_allclose(array(distances.masked_mean(tensor(x), tensor(mask))), expected, rtol=1e-5)


@given(values, generators, st.sampled_from([0.001, 1.0, 1000.0]))
def test_a_mask_of_weights_is_a_weighted_mean(x, rng, scale):
    weights = rng.uniform(0.1, 1, x.shape)
    expected = (weights * x).sum() / weights.sum()
    np.testing.assert_allclose(array(distances.masked_mean(tensor(x), tensor(scale * weights))), expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2,), (2, 3)])
def test_a_mask_of_zeros_gives_zero(shape):
    got = distances.masked_mean(tensor(np.ones((2, 3))), tensor(np.zeros(shape)))
    assert array(got) == 0
    assert dtype_of(got) == "float32"


def test_a_token_left_out_must_still_be_finite():
    x = np.array([[1.0, np.nan], [2.0, 3.0]])
    assert np.isnan(array(distances.masked_mean(tensor(x), tensor([[True, False], [True, True]]))))
