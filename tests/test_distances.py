"""Distances against the oracle, and the laws that make them distances."""

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import FLOATS, array, dtype_of, generators, is_tensor, tensor, token_pairs, tokens

from selfalign import distances

FUNCTIONS = {
    "cosine": distances.cosine,
    "smooth_l1": distances.smooth_l1,
    "l1": distances.l1,
    "l2": distances.l2,
}
PER_TOKEN = pytest.mark.parametrize("name", FUNCTIONS)
ALL = pytest.mark.parametrize("name", distances.DISTANCES)


def pair(rng, shape=(2, 3, 4), scale=1.0):
    student = rng.normal(size=shape).astype("float32") * np.float32(scale)
    return student, rng.normal(size=shape).astype("float32")


def by_name(name, student, target):
    """What the name stands for in an objective."""
    options = {"beta": 0.05} if name == "smooth_l1" else {}
    return distances.DISTANCES[name](tensor(student), tensor(target), **options)


def test_every_distance_has_an_oracle_and_each_of_tokens_a_function():
    assert set(distances.DISTANCES) == set(oracle.DISTANCES)
    assert set(distances.DISTANCES) == {*FUNCTIONS, "token_axis_cosine"}


# The values


@ALL
def test_equals_the_oracle(name):
    @given(generators, st.sampled_from([0.01, 1.0, 30.0]))
    def law(rng, scale):
        student, target = pair(rng, scale=scale)
        wanted = oracle.DISTANCES[name](student.astype("float64"), target.astype("float64"))
        np.testing.assert_allclose(
            array(by_name(name, student, target)), wanted, rtol=1e-5, atol=1e-6
        )

    law()


@PER_TOKEN
def test_the_functions_are_what_the_names_stand_for(name):
    student, target = pair(np.random.default_rng(0))
    got = FUNCTIONS[name](tensor(student), tensor(target))
    assert is_tensor(got)
    assert np.array_equal(array(got), array(by_name(name, student, target)))


@ALL
def test_not_negative_symmetric_and_exactly_zero_for_equal_tokens(name):
    @given(token_pairs)
    def law(both):
        there, back = array(by_name(name, *both)), array(by_name(name, *both[::-1]))
        assert (there >= 0).all()
        assert np.array_equal(there, back)
        assert not array(by_name(name, both[0], both[0])).any()

    law()


@pytest.mark.parametrize("name", ["cosine", "token_axis_cosine"])
def test_cosine_lies_in_0_2(name):
    @given(token_pairs)
    def law(both):
        values = array(by_name(name, *both))
        assert (values >= 0).all()
        assert (values <= 2 + 1e-6).all()

    law()


@given(generators, st.integers(-10, 10), st.integers(-10, 10))
def test_cosine_ignores_the_scale_of_each_token(rng, i, j):
    student, target = pair(rng)
    longer = rng.uniform(0.5, 2, (2, 3, 1)) * 2.0**i * student
    shorter = rng.uniform(0.5, 2, (2, 3, 1)) * 2.0**j * target
    np.testing.assert_allclose(
        array(distances.cosine(tensor(longer), tensor(shorter))),
        array(distances.cosine(tensor(student), tensor(target))),
        atol=2e-6,
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


@PER_TOKEN
@pytest.mark.parametrize("dtype", FLOATS)
def test_float32_for_every_dtype(name, dtype):
    halves = [tensor(x, dtype) for x in pair(np.random.default_rng(0))]
    got = FUNCTIONS[name](*halves)
    assert is_tensor(got)
    assert dtype_of(got) == "float32"
    assert np.array_equal(array(got), array(FUNCTIONS[name](*(tensor(array(x)) for x in halves))))


@ALL
def test_one_value_per_token_or_sample(name):
    student, target = pair(np.random.default_rng(0), (2, 3, 4))
    expected = (2,) if name == "token_axis_cosine" else (2, 3)
    assert tuple(by_name(name, student, target).shape) == expected


@PER_TOKEN
def test_tokens_do_not_see_each_other(name):
    student, target = pair(np.random.default_rng(0), (2, 3, 4))
    whole = array(by_name(name, student, target))
    alone = array(by_name(name, student[1:, 2:], target[1:, 2:]))
    np.testing.assert_allclose(alone, whole[1:, 2:], rtol=1e-6)


def test_the_official_cosine_runs_over_tokens():
    student, target = pair(np.random.default_rng(0), (2, 3, 4))
    over_tokens = array(distances.token_axis_cosine(tensor(student), tensor(target)))
    turned = distances.cosine(tensor(student.swapaxes(1, 2)), tensor(target.swapaxes(1, 2)))
    assert over_tokens.shape == (2, 4)
    np.testing.assert_allclose(over_tokens, array(turned), atol=1e-6)
    named = array(by_name("token_axis_cosine", student, target))
    np.testing.assert_allclose(named, over_tokens.mean(axis=1), rtol=1e-6)


@pytest.mark.parametrize(
    ("d", "expected"), [(0.01, 0.001), (0.025, 0.00625), (0.05, 0.025), (0.1, 0.075), (1, 0.975)]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_smooth_l1_of_the_paper(d, expected, sign):
    student, target = np.full((1, 1, 3), float(sign * d)), np.zeros((1, 1, 3))
    got = distances.smooth_l1(tensor(student), tensor(target))
    np.testing.assert_allclose(array(got), expected, rtol=1e-5)


@pytest.mark.parametrize("beta", [1e-3, 0.05, 1.0, 5])
def test_smooth_l1_for_other_betas(beta):
    student, target = pair(np.random.default_rng(0))
    wanted = oracle.smooth_l1(student.astype("float64"), target.astype("float64"), beta)
    by_place = distances.smooth_l1(tensor(student), tensor(target), beta)
    by_keyword = distances.smooth_l1(tensor(student), tensor(target), beta=beta)
    np.testing.assert_allclose(array(by_place), wanted, rtol=1e-5)
    np.testing.assert_allclose(array(by_keyword), wanted, rtol=1e-5)


# Names and functions of the user's


def test_the_librarys_functions_become_names_and_the_users_stay():
    def mine(student, target):
        return distances.l2(student, target)

    for name, function in FUNCTIONS.items():
        assert distances.checked(function) == name
        assert distances.checked(name) == name
    assert distances.checked(distances.token_axis_cosine) == "token_axis_cosine"
    assert distances.checked(mine) is mine
