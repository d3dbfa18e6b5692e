"""Health: each scalar against its formula in NumPy, and the laws that make it a measure."""

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import FLOATS, PATHS, array, dtype_of, generators, tensor

import selfalign
from selfalign import diagnostics

SHAPES = [(12, 3), (5, 8), (2, 4, 3)]  # more samples than features, fewer, and tokens


def rows(x):
    return x.reshape(-1, x.shape[-1]).astype("float64")


def rotation(rng, width):
    return np.linalg.qr(rng.normal(size=(width, width)))[0]


# The oracles, from the papers


def effective_rank(x, center=False):
    x = rows(x) - rows(x).mean(0) * center
    values = np.linalg.svd(x)[1]
    fractions = values[values > 0] / values.sum()
    return np.exp(-(fractions * np.log(fractions)).sum())


def participation_ratio(x):
    variances = np.linalg.svd(rows(x))[1] ** 2
    return variances.sum() ** 2 / (variances**2).sum()


# The laws


@pytest.mark.parametrize("shape", SHAPES)
def test_norm_rank_and_ratio_equal_the_oracle(shape):
    @given(generators, st.sampled_from([1e-8, 1.0, 1e8]))
    def law(rng, scale):
        x = (scale * (rng.normal(size=shape) + 0.5)).astype("float32")
        given_x = tensor(x)
        centred = diagnostics.effective_rank(given_x, center=True)
        for got, wanted in (
            (diagnostics.feature_norm(given_x), np.linalg.norm(rows(x), axis=1).mean()),
            (diagnostics.effective_rank(given_x), effective_rank(x)),
            (centred, effective_rank(x, center=True)),
            (diagnostics.participation_ratio(given_x), participation_ratio(x)),
        ):
            np.testing.assert_allclose(array(got), wanted, rtol=1e-3)

    law()


@pytest.mark.parametrize("measure", [diagnostics.effective_rank, diagnostics.participation_ratio])
@pytest.mark.parametrize("shape", SHAPES)
def test_ranks_lie_between_1_and_the_smaller_side_and_know_no_scale_or_rotation(measure, shape):
    @given(generators)
    def law(rng):
        x = rng.normal(size=shape).astype("float32")
        got = array(measure(tensor(x)))
        assert 1 - 1e-5 <= got <= min(rows(x).shape) + 1e-4
        turned = 8 * x @ rotation(rng, shape[-1])
        np.testing.assert_allclose(array(measure(tensor(turned))), got, rtol=1e-4)

    law()


@pytest.mark.parametrize("measure", [diagnostics.effective_rank, diagnostics.participation_ratio])
def test_ranks_of_isotropic_and_of_one_dimensional_features(measure):
    rng = np.random.default_rng(0)
    isotropic = np.linalg.qr(rng.normal(size=(20, 6)))[0]
    np.testing.assert_allclose(array(measure(tensor(isotropic))), 6, rtol=1e-4)
    line = rng.normal(size=(20, 1)) * rng.normal(size=6)
    np.testing.assert_allclose(array(measure(tensor(line))), 1, rtol=1e-3)
    assert array(measure(tensor(line + 100), center=True)) == pytest.approx(1, rel=1e-2)
    assert np.isfinite(array(measure(tensor(np.zeros((4, 3))))))


@pytest.mark.parametrize("dtype", FLOATS)
def test_float32_scalars_for_every_dtype(dtype):
    x = tensor(np.eye(6), dtype)
    for got in (
        diagnostics.feature_norm(x),
        diagnostics.effective_rank(x),
        diagnostics.participation_ratio(x),
        diagnostics.cka(x, x),
        diagnostics.drift([x], [x]),
    ):
        assert (dtype_of(got), tuple(got.shape)) == ("float32", ())


@given(generators, st.sampled_from([0.5, 1.0, 1.5, 4.0]))
def test_drift(rng, scale):
    student = {
        "a": [tensor(rng.normal(size=(2, 3)))],
        "b": tensor(rng.normal(size=4)),
        "count": tensor(np.array(7)),
    }
    teacher = {
        "a": [scale * student["a"][0]],
        "b": scale * student["b"],
        "count": tensor(np.array(9)),
    }
    assert array(diagnostics.drift(student, student)) == 0
    there = array(diagnostics.drift(teacher, student))
    back = array(diagnostics.drift(student, teacher))
    np.testing.assert_allclose(there, abs(scale - 1), rtol=1e-5)
    np.testing.assert_allclose(back, abs(scale - 1) / scale, rtol=1e-5)


def test_drift_weighs_all_leaves_as_one_vector():
    student = {"small": tensor([3.0]), "large": tensor([4.0])}
    teacher = {"small": tensor([3.0]), "large": tensor([5.0])}
    np.testing.assert_allclose(array(diagnostics.drift(teacher, student)), 0.2, rtol=1e-6)


@pytest.mark.parametrize("name", PATHS)
def test_the_teacher_has_the_larger_signal(name):
    path, known = PATHS[name]
    loss = selfalign.SRALoss(student_layer=1, teacher_layer=2, path=path)
    t = np.array([100, 400, 800]) if path.discrete else np.array([0.2, 0.5, 0.9], "float32")
    student = array(diagnostics.snr_decibels(path, tensor(t)))
    np.testing.assert_allclose(student, (10 * np.log10(oracle.snr(known, t))).mean(), atol=1e-3)
    moved = loss.teacher_time(tensor(t), tensor(np.full(3, 0.5, "float32")))
    assert array(diagnostics.snr_decibels(path, moved)) > student


def test_the_ends_of_the_path_are_cut():
    path = selfalign.paths.Linear()
    got = [array(diagnostics.snr_decibels(path, tensor([t]), limit=40)).item() for t in (0.0, 1.0)]
    assert got == [pytest.approx(40), pytest.approx(-40)]


@pytest.mark.only("torch")
def test_what_a_loop_logs_carries_no_graph():
    import torch

    x = torch.randn(4, 3, requires_grad=True)
    values = (
        diagnostics.feature_norm(x),
        diagnostics.effective_rank(x),
        diagnostics.participation_ratio(x),
        diagnostics.cka(x, x),
        diagnostics.drift([x], [x]),
    )
    assert not any(value.requires_grad for value in values)


@pytest.mark.only("jax")
def test_health_and_cka_under_jit():
    import jax

    x = tensor(np.random.default_rng(0).normal(size=(6, 4)))
    for measure in (
        diagnostics.feature_norm,
        diagnostics.effective_rank,
        diagnostics.participation_ratio,
        lambda x: diagnostics.cka(x, x),
        lambda x: diagnostics.drift([2 * x], [x]),
    ):
        np.testing.assert_allclose(array(jax.jit(measure)(x)), array(measure(x)), rtol=1e-5)
