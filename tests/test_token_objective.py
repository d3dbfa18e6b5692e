"""The term of SRA, LayerSync and REPA: its value, its gradients, masks and broken numbers."""

import math

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import FLOATS, array, dtype_of, generators, gradients, is_tensor, tensor, token_pairs

import selfalign
from selfalign import LayerSyncLoss, REPALoss, SRALoss, distances, schedules

DISTANCES = list(distances.DISTANCES)
PER_TOKEN = [name for name in DISTANCES if name != "token_axis_cosine"]
KINDS = {
    "sra": lambda **options: SRALoss(**({"student_layer": 1, "teacher_layer": 2} | options)),
    "layersync": lambda **options: LayerSyncLoss(student_layer=1, teacher_layer=2, **options),
    "repa": lambda **options: REPALoss(student_layer=1, width=4, **options),
}
EACH_DISTANCE = pytest.mark.parametrize("distance", DISTANCES)
EACH_KIND = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
make_sra = KINDS["sra"]


def pair(seed=0, shape=(2, 3, 4)):
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape), rng.normal(size=shape)


def tensors(seed=0, shape=(2, 3, 4), dtype=None):
    return tuple(tensor(x, dtype) for x in pair(seed, shape))


def largest(x):
    from keras import ops

    return ops.max(ops.abs(x), axis=-1)


def largest_difference(student, target):
    """A distance of the user's own, [B, N]."""
    return largest(student - target)


def largest_of_sample(student, target):
    """The same, [B]: it does not tell tokens apart."""
    return largest(largest(student - target))


# The value


@EACH_KIND
@EACH_DISTANCE
def test_equals_the_oracle(make, distance):
    @given(generators, st.sampled_from([0.5, 0.2, 2]))
    def law(rng, weight):
        student, target = rng.normal(size=(2, 2, 3, 4))
        got = make(distance=distance, weight=weight)(tensor(student), tensor(target))
        wanted = oracle.loss(distance, weight, student, target)
        np.testing.assert_allclose(array(got), wanted, rtol=1e-5, atol=1e-6)

    law()


@EACH_KIND
@EACH_DISTANCE
def test_exactly_zero_for_equal_tokens_and_never_negative(make, distance):
    loss = make(distance=distance)

    @given(token_pairs)
    def law(both):
        a, b = map(tensor, both)
        assert array(loss(a, a)) == 0
        assert array(loss(a, b)) >= 0

    law()


@EACH_DISTANCE
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_float32_scalar_for_every_dtype(distance, dtype):
    student, target = tensors(dtype=dtype)
    term = make_sra(distance=distance)(student, target)
    assert is_tensor(term)
    assert (dtype_of(term), tuple(term.shape)) == ("float32", ())
    wide = make_sra(distance=distance)(tensor(array(student)), tensor(array(target)))
    assert array(term) == array(wide)


def test_sides_of_two_precisions():
    student, target = pair()
    half = tensor(student, "bfloat16")
    mixed = make_sra()(half, tensor(target))
    assert dtype_of(mixed) == "float32"
    assert array(mixed) == array(make_sra()(tensor(array(half)), tensor(target)))


@EACH_KIND
def test_beta_reaches_smooth_l1(make):
    student, target = pair()
    got = make(distance="smooth_l1", beta=1.0, weight=1)(tensor(student), tensor(target))
    wanted = oracle.smooth_l1(student, target, 1.0).mean()
    np.testing.assert_allclose(array(got), wanted, rtol=1e-5)


# A distance of your own


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_distance_of_your_own_gets_float32(dtype):
    seen = []

    def distance(student, target):
        seen.extend((dtype_of(student), dtype_of(target)))
        return largest_difference(student, target)

    student, target = tensors(dtype=dtype)
    got = make_sra(distance=distance, weight=2)(student, target)
    assert seen == ["float32", "float32"]
    wanted = 2 * abs(array(student) - array(target)).max(-1).mean()
    np.testing.assert_allclose(array(got), wanted, rtol=1e-5)


@EACH_KIND
def test_a_distance_of_samples(make):
    """[B]: a distance that does not tell tokens apart, under no mask and under one of samples."""
    student, target = pair(shape=(3, 3, 4))
    loss = make(distance=largest_of_sample, weight=1)
    values = abs(student - target).max((1, 2))
    got = array(loss(tensor(student), tensor(target)))
    np.testing.assert_allclose(got, values.mean(), rtol=1e-5)
    mask = np.array([True, False, True])
    masked = array(loss(tensor(student), tensor(target), mask=tensor(mask)))
    np.testing.assert_allclose(masked, values[mask].mean(), rtol=1e-5)


@pytest.mark.only("torch", "jax")
@pytest.mark.parametrize("distance", [largest_difference, largest_of_sample])
def test_no_gradient_reaches_the_target_through_a_distance_of_your_own(distance):
    to_student, to_target = gradients(make_sra(distance=distance), *pair())
    assert to_student.any()
    assert to_target is None or not to_target.any()


# Masks

OWN = {"own": largest_difference, "own, of samples": largest_of_sample}
EVERY_DISTANCE = {name: name for name in DISTANCES} | OWN
WITHOUT_TOKENS = ("token_axis_cosine", "own, of samples")


@pytest.mark.parametrize("name", EVERY_DISTANCE)
@pytest.mark.parametrize("kind", ["bool", "int32", "float32"])
def test_a_mask_of_ones_is_no_mask(name, kind):
    loss = make_sra(distance=EVERY_DISTANCE[name])
    student, target = tensors()
    plain = array(loss(student, target))
    shapes = [(2,)] if name in WITHOUT_TOKENS else [(2,), (2, 3)]
    for shape in shapes:
        masked = loss(student, target, mask=tensor(np.ones(shape), kind))
        np.testing.assert_allclose(array(masked), plain, rtol=1e-6)


@EACH_KIND
@pytest.mark.parametrize("distance", PER_TOKEN)
def test_leaving_tokens_out_is_the_loss_of_the_others(make, distance):
    loss = make(distance=distance)
    student, target = pair()
    mask = np.array([[True, False, True], [False, False, True]])
    got = loss(tensor(student), tensor(target), mask=tensor(mask))
    others = loss(tensor(student[mask][None]), tensor(target[mask][None]))
    np.testing.assert_allclose(array(got), array(others), rtol=1e-5)


@EACH_KIND
@EACH_DISTANCE
def test_leaving_samples_out_is_the_loss_of_the_others(make, distance):
    loss = make(distance=distance)
    student, target = pair(shape=(3, 3, 4))
    got = loss(tensor(student), tensor(target), mask=tensor([True, False, True]))
    others = loss(tensor(student[[0, 2]]), tensor(target[[0, 2]]))
    np.testing.assert_allclose(array(got), array(others), rtol=1e-5)


@EACH_DISTANCE
@given(generators)
def test_a_mask_of_weights_equals_the_oracle(distance, rng):
    student, target = rng.normal(size=(2, 2, 3, 4))
    shape = (2,) if distance == "token_axis_cosine" else (2, 3)
    mask = rng.uniform(0.1, 2, size=shape)
    got = make_sra(distance=distance, weight=1)(tensor(student), tensor(target), mask=tensor(mask))
    wanted = oracle.term(student, target, distance=distance, mask=mask)
    np.testing.assert_allclose(array(got), wanted, rtol=1e-5)


@EACH_DISTANCE
def test_a_mask_of_zeros_gives_zero(distance):
    loss = make_sra(distance=distance)
    assert array(loss(*tensors(), mask=tensor([False, False]))) == 0


@pytest.mark.only("torch", "jax")
def test_what_is_left_out_gets_no_gradient():
    mask = np.array([[True, False, True], [False, False, False]])
    loss = make_sra()
    found, _ = gradients(lambda s, t: loss(s, t, mask=tensor(mask)), *pair())
    assert not found[~mask].any()
    assert found[mask].any(axis=-1).all()
    nothing, _ = gradients(lambda s, t: loss(s, t, mask=tensor(np.zeros(2))), *pair())
    assert not nothing.any()


# Broken numbers


@EACH_DISTANCE
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_broken_feature_breaks_the_loss_and_metrics_name_the_side(distance, bad, side):
    both = dict(zip(("student", "teacher"), pair(), strict=True))
    for index in ((0, 0, 0), (1, 2, 3)):
        broken = {name: x.copy() for name, x in both.items()}
        broken[side][index] = bad
        loss = make_sra(distance=distance)
        with np.errstate(all="ignore"):
            student, target = tensor(broken["student"]), tensor(broken["teacher"])
            assert not np.isfinite(array(loss(student, target)))
            assert not np.isfinite(array(make_sra(distance=distance, weight=0)(student, target)))
            info = loss.metrics(student, target)
        found = {name: bool(array(info[f"{name}_finite"])) for name in both}
        assert found == {name: name != side for name in both}


@EACH_DISTANCE
@pytest.mark.parametrize("normalise", ["none", "standardise", "centre"])
def test_a_broken_target_breaks_every_normalised_loss(distance, normalise):
    student, target = pair()
    target[0, 0, 0] = math.nan
    with np.errstate(all="ignore"):
        term = make_sra(distance=distance, normalise=normalise)(tensor(student), tensor(target))
    assert np.isnan(array(term))


@EACH_DISTANCE
def test_both_sides_broken_alike_is_still_broken(distance):
    x = pair()[0]
    x[0, 0, 0] = math.inf
    loss = make_sra(distance=distance)
    with np.errstate(all="ignore"):
        info = loss.metrics(tensor(x), tensor(x))
        assert not np.isfinite(array(loss(tensor(x), tensor(x))))
    assert not array(info["student_finite"]).any()
    assert not array(info["teacher_finite"]).any()


# Gradients


@pytest.mark.only("torch", "jax")
@EACH_KIND
@EACH_DISTANCE
def test_no_gradient_reaches_the_target_and_the_students_is_right(make, distance):
    student, target = pair()
    to_student, to_target = gradients(make(distance=distance, weight=0.5), student, target)
    assert to_target is None or not to_target.any()
    wanted = oracle.gradient(lambda x: oracle.loss(distance, 0.5, x, target), student)
    np.testing.assert_allclose(to_student, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.only("torch", "jax")
@EACH_DISTANCE
def test_gradients_of_equal_and_zero_tokens_are_zero(distance):
    """An EMA teacher equals the student at step 0: neither NaN nor a push."""
    for x in (pair()[0], np.zeros((2, 3, 4))):
        found, _ = gradients(make_sra(distance=distance), x, x)
        assert not found.any()


@pytest.mark.only("torch", "jax")
@given(st.integers(-300, 0))
def test_a_token_of_any_length_has_a_finite_gradient(power):
    """The cosine's gradient grows as a token shrinks, to a floor of the length: 1e-6."""
    student, target = pair()
    usual = abs(gradients(make_sra(), student, target)[0][0, 0]).max()
    student[0, 0] *= 2.0**power
    found = gradients(make_sra(), student, target)[0]
    assert np.isfinite(found).all()
    assert abs(found[0, 0]).max() <= 1e7 * usual


@pytest.mark.only("torch", "jax")
@EACH_KIND
@pytest.mark.parametrize("weight", [0, 0.0, schedules.Stop(0)])
def test_weight_zero_keeps_the_students_gradient_defined(make, weight):
    loss = make(weight=weight)
    found, _ = gradients(lambda s, t: loss(s, t, step=5), *pair())
    assert found is not None
    assert not found.any()


@pytest.mark.only("torch", "jax")
@pytest.mark.parametrize("layers", [2, 3])
def test_the_head_gets_the_gradient(layers):
    """SRA's projector, and REPA's head toward a target of another width."""
    rng = np.random.default_rng(0)
    student, target = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 3, 5))
    shapes = oracle.mlp_shapes(layers, 4, 8, 5)
    params = {name: 0.5 * rng.normal(size=shape) for name, shape in shapes.items()}

    def term(*values):
        given_params = dict(zip(params, values, strict=True))
        projected = selfalign.project(given_params, tensor(student))
        return make_sra()(projected, tensor(target))

    def wanted_term(name, value):
        projected = oracle.mlp(layers, params | {name: value}, student)
        return oracle.loss("cosine", 0.5, projected, target)

    for name, found in zip(params, gradients(term, *params.values()), strict=True):
        wanted = oracle.gradient(lambda x, name=name: wanted_term(name, x), params[name])
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5)
