"""Normalisations of a target against the oracle, and what they make the term blind to."""

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import (
    FLOATS,
    array,
    dtype_of,
    floats,
    generators,
    gradients,
    is_tensor,
    tensor,
    token_arrays,
)

from selfalign import LayerSyncLoss, REPALoss, SRALoss, normalise

NAMES = pytest.mark.parametrize("name", ["standardise", "centre"])
SHAPE = (3, 4, 5)
MASKS = {
    "none": None,
    "samples": np.array([True, False, True]),
    "tokens": np.arange(12).reshape(3, 4) % 3 != 0,
    "weights of samples": np.array([0.5, 2.0, 1.0]),
    "weights of tokens": np.linspace(0.1, 1, 12).reshape(3, 4),
}
EACH_MASK = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
KINDS = {
    "sra": lambda **options: SRALoss(student_layer=1, teacher_layer=2, **options),
    "layersync": lambda **options: LayerSyncLoss(student_layer=1, teacher_layer=2, **options),
    "repa": lambda **options: REPALoss(student_layer=1, width=5, **options),
}
EACH_KIND = pytest.mark.parametrize("kind", KINDS)
generic = st.integers(0, 2**32 - 1).map(lambda s: np.random.default_rng(s).normal(size=SHAPE))


def normalised(name, target, mask=None):
    function = {"standardise": normalise.standardise, "centre": normalise.centre}[name]
    return function(tensor(target), None if mask is None else tensor(mask))


def term(kind, name, student, target, mask=None, **options):
    loss = KINDS[kind](normalise=name, **options)
    return loss(tensor(student), tensor(target), mask=None if mask is None else tensor(mask))


# The values


@NAMES
@EACH_MASK
def test_equals_the_oracle(name, mask):
    @given(generic, st.sampled_from([0.01, 1.0, 100.0]))
    def law(target, scale):
        got = normalised(name, scale * target, mask)
        wanted = oracle.NORMALISATIONS[name](scale * target, mask)
        assert is_tensor(got)
        assert tuple(got.shape) == SHAPE
        np.testing.assert_allclose(array(got), wanted, rtol=1e-4, atol=1e-5 * max(1, scale))

    law()


@EACH_MASK
def test_standardised_features_have_mean_0_and_deviation_1_over_what_counts(mask):
    weights = oracle._token_weights(np.empty(SHAPE), mask)[..., None]
    target = 3 + 2 * np.random.default_rng(0).normal(size=SHAPE)
    got = array(normalised("standardise", target, mask))
    mean = (weights * got).sum((0, 1)) / weights.sum()
    variance = (weights * (got - mean) ** 2).sum((0, 1)) / weights.sum()
    np.testing.assert_allclose(mean, 0, atol=1e-5)
    np.testing.assert_allclose(variance, 1, rtol=1e-4)


@EACH_MASK
def test_centred_places_have_mean_0_over_the_samples_that_count(mask):
    weights = oracle._token_weights(np.empty(SHAPE), mask)[..., None]
    target = 3 + np.random.default_rng(0).normal(size=SHAPE)
    got = array(normalised("centre", target, mask))
    np.testing.assert_allclose((weights * got).sum(0), 0, atol=1e-5)


def test_a_feature_that_never_changes_becomes_0():
    target = np.random.default_rng(0).normal(size=SHAPE)
    target[..., 2] = 7.0
    got = array(normalised("standardise", target))
    assert not got[..., 2].any()
    assert got[..., 1].any()


@NAMES
def test_everything_left_out_is_defined(name):
    got = array(normalised(name, np.ones(SHAPE), np.zeros(3)))
    assert np.isfinite(got).all()
    assert array(term("sra", name, np.ones(SHAPE), np.ones(SHAPE), np.zeros(3))) == 0


@NAMES
@pytest.mark.parametrize("dtype", FLOATS)
def test_float32_at_least(name, dtype):
    target = tensor(np.random.default_rng(0).normal(size=SHAPE), dtype)
    got = getattr(normalise, name)(target)
    assert dtype_of(got) == ("float64" if dtype == "float64" else "float32")
    np.testing.assert_allclose(
        array(got), oracle.NORMALISATIONS[name](array(target)), rtol=1e-3, atol=1e-4
    )


@NAMES
def test_twice_is_once(name):
    once = array(normalised(name, np.random.default_rng(0).normal(size=SHAPE)))
    np.testing.assert_allclose(array(normalised(name, once)), once, rtol=1e-4, atol=1e-5)


# In the term


@EACH_KIND
@NAMES
@EACH_MASK
def test_the_term_equals_the_oracle(kind, name, mask):
    rng = np.random.default_rng(0)
    student, target = rng.normal(size=(2, *SHAPE))
    got = term(kind, name, student, target, mask, weight=1.0)
    wanted = oracle.term(student, target, normalise=name, mask=mask)
    np.testing.assert_allclose(array(got), wanted, rtol=1e-4)


@pytest.mark.parametrize("distance", ["cosine", "smooth_l1", "l1", "l2", "token_axis_cosine"])
@NAMES
def test_the_term_of_every_distance_equals_the_oracle(distance, name):
    student, target = np.random.default_rng(1).normal(size=(2, *SHAPE))
    got = term("sra", name, student, target, weight=1.0, distance=distance)
    wanted = oracle.term(student, target, distance=distance, normalise=name)
    np.testing.assert_allclose(array(got), wanted, rtol=1e-4)


@EACH_KIND
@pytest.mark.parametrize("mask", [None, MASKS["tokens"]], ids=["no mask", "mask"])
def test_standardise_ignores_a_shift_and_a_scale_of_each_target_feature(kind, mask):
    @given(generators, st.integers(-6, 6), floats(-3, 3))
    def law(rng, power, shift):
        student, target = rng.normal(size=(2, *SHAPE))
        scales = 2.0**power * rng.uniform(0.5, 2, size=SHAPE[-1])
        shifts = scales * (shift + rng.normal(size=SHAPE[-1]))
        plain = array(term(kind, "standardise", student, target, mask))
        changed = array(term(kind, "standardise", student, scales * target + shifts, mask))
        np.testing.assert_allclose(changed, plain, rtol=2e-3, atol=2e-4)

    law()


@EACH_KIND
@pytest.mark.parametrize("mask", [None, MASKS["tokens"]], ids=["no mask", "mask"])
def test_centre_ignores_what_every_sample_has_at_a_place(kind, mask):
    @given(generators, token_arrays((1, *SHAPE[1:]), -10, 10))
    def law(rng, common):
        student, target = rng.normal(size=(2, *SHAPE))
        plain = array(term(kind, "centre", student, target, mask))
        changed = array(term(kind, "centre", student, target + common, mask))
        np.testing.assert_allclose(changed, plain, rtol=2e-3, atol=2e-4)

    law()


@NAMES
@given(generic)
def test_what_is_left_out_has_no_say(name, target):
    """Tokens that the mask leaves out may hold anything finite."""
    mask = MASKS["tokens"]
    student = np.random.default_rng(0).normal(size=SHAPE)
    changed = np.where(mask[..., None], target, 5.0)
    first = array(term("sra", name, student, target, mask))
    assert array(term("sra", name, student, changed, mask)) == pytest.approx(first, rel=1e-4)


@NAMES
def test_the_students_side_is_left_as_it_is(name):
    """A student that differs from the normalised target by nothing has nothing to learn."""
    target = np.random.default_rng(0).normal(size=SHAPE)
    student = array(normalised(name, target))
    assert array(term("sra", name, student, target, distance="l2")) < 1e-9
    assert array(term("sra", name, student + 1, target, distance="l2")) > 0.4


def test_normalise_none_changes_no_bit():
    student, target = np.random.default_rng(0).normal(size=(2, *SHAPE))
    plain = KINDS["sra"]()(tensor(student), tensor(target))
    assert array(term("sra", "none", student, target)) == array(plain)
    assert normalise.NORMALISATIONS["none"] is None


@NAMES
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_distance_of_your_own_gets_the_normalised_target(name, dtype):
    seen = []

    def distance(student, target):
        seen.append((dtype_of(target), array(target)))
        return ((student - target) ** 2).mean(-1)

    student, target = np.random.default_rng(0).normal(size=(2, *SHAPE))
    KINDS["sra"](normalise=name, distance=distance)(tensor(student, dtype), tensor(target, dtype))
    wanted = oracle.NORMALISATIONS[name](array(tensor(target, dtype)))
    assert seen[0][0] == "float32"
    np.testing.assert_allclose(seen[0][1], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.only("torch", "jax")
@NAMES
def test_gradients_reach_the_student_alone(name):
    student, target = np.random.default_rng(0).normal(size=(2, *SHAPE))
    loss = KINDS["sra"](normalise=name, weight=1.0)
    to_student, to_target = gradients(loss, student, target)
    assert to_target is None or not to_target.any()
    wanted = oracle.gradient(lambda x: oracle.term(x, target, normalise=name), student)
    np.testing.assert_allclose(to_student, wanted, rtol=1e-3, atol=1e-6)


@NAMES
def test_settings_keep_the_normalisation(name):
    loss = KINDS["layersync"](normalise=name)
    assert loss.settings()["normalise"] == name
    assert LayerSyncLoss.from_settings(loss.settings()) == loss
