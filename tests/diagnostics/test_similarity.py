"""Similarities against the papers' formulas, and the laws that make them similarities."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import BACKEND, MODULES, array, framework, generators, tensor

from selfalign import diagnostics

OFFLINE = pytest.mark.only("torch")  # NumPy alone: once


def rows(x):
    return x.reshape(-1, x.shape[-1]).astype("float64")


def rotation(rng, width):
    return np.linalg.qr(rng.normal(size=(width, width)))[0]


# The oracles, from the papers


def cka(x, y):
    """By Gram matrices and the centering matrix, tr(K H L H), and the same of each side alone."""
    x, y = rows(x), rows(y)
    h = np.eye(len(x)) - 1 / len(x)
    k, l = h @ x @ x.T @ h, h @ y @ y.T @ h  # noqa: E741
    return np.trace(k @ l) / np.sqrt(np.trace(k @ k) * np.trace(l @ l))


def cknna(x, y, k):
    """Pair by pair."""
    sides = [cosines(x), cosines(y)]
    near = [neighbours(side, k) for side in sides]

    def aligned(p, q):
        total = 0.0
        for i in range(len(x)):
            for j in near[p][i] & near[q][i]:
                mine = sides[p][i][j] - np.mean(sides[p][i])
                total += mine * (sides[q][i][j] - np.mean(sides[q][i]))
        return total

    return aligned(0, 1) / np.sqrt(aligned(0, 0) * aligned(1, 1))


def cosines(x):
    return [[float(a @ b) / np.sqrt((a @ a) * (b @ b)) for b in x] for a in x]


def neighbours(kernel, k):
    """For each sample, which others are its k nearest."""
    found = []
    for i, row in enumerate(kernel):
        others = [j for j in range(len(row)) if j != i]
        found.append(set(sorted(others, key=lambda j, row=row: -row[j])[:k]))
    return found


# The laws


@pytest.mark.parametrize(("n", "widths"), [(12, (3, 4)), (4, (8, 9))])
def test_cka_equals_the_oracle_and_lies_in_0_1(n, widths):
    @given(generators, st.sampled_from([1e-8, 1.0, 1e8]))
    def law(rng, scale):
        x, y = (rng.normal(size=(n, width)).astype("float32") for width in widths)
        got = array(diagnostics.cka(tensor(scale * x), tensor(y)))
        np.testing.assert_allclose(got, cka(x, y), rtol=1e-3, atol=1e-5)
        assert 0 <= got <= 1
        assert array(diagnostics.cka(tensor(y), tensor(scale * x))) == pytest.approx(got, rel=1e-5)

    law()


@given(generators, st.sampled_from([0.01, 3.0]))
def test_cka_knows_no_rotation_scale_or_shift_and_is_1_for_equal_features(rng, scale):
    x, y = rng.normal(size=(12, 4)), rng.normal(size=(12, 4))
    got = array(diagnostics.cka(tensor(x), tensor(y)))
    moved = scale * x @ rotation(rng, 4) + scale
    np.testing.assert_allclose(array(diagnostics.cka(tensor(moved), tensor(y))), got, atol=1e-4)
    np.testing.assert_allclose(array(diagnostics.cka(tensor(moved), tensor(x))), 1, atol=1e-4)


def test_cka_of_tokens_and_of_a_constant():
    x = np.random.default_rng(0).normal(size=(3, 4, 5))
    flat = array(diagnostics.cka(tensor(rows(x)), tensor(rows(x)[::-1].copy())))
    assert array(diagnostics.cka(tensor(x), tensor(rows(x)[::-1].reshape(x.shape).copy()))) == flat
    assert array(diagnostics.cka(tensor(x), tensor(np.ones_like(x)))) == 0


@OFFLINE
@given(generators, st.integers(1, 8))
def test_cknna_equals_the_oracle_and_is_symmetric(rng, k):
    x, y = rng.normal(size=(9, 4)), rng.normal(size=(9, 3))
    got = diagnostics.cknna(x, y, k)
    np.testing.assert_allclose(got, cknna(x, y, k), atol=1e-12)
    assert diagnostics.cknna(y, x, k) == pytest.approx(got, abs=1e-12)
    assert -1 <= got <= 1 + 1e-12


@OFFLINE
@given(generators, st.sampled_from([0.01, 3.0]))
def test_cknna_is_1_for_equal_features_and_knows_no_rotation_or_scale(rng, scale):
    x = rng.normal(size=(15, 4))
    assert diagnostics.cknna(x, x, 3) == pytest.approx(1)
    assert diagnostics.cknna(x, scale * x @ rotation(rng, 4), 3) == pytest.approx(1)


@OFFLINE
def test_cknna_of_unrelated_and_of_constant_features():
    x, y = np.random.default_rng(0).normal(size=(2, 400, 16))
    assert abs(diagnostics.cknna(x, y)) < 0.1
    assert diagnostics.cknna(np.ones((20, 3)), x[:20]) == 0


@OFFLINE
def test_compare_is_a_table():
    import torch

    torch.manual_seed(0)
    layers = [torch.randn(20, width) for width in (3, 4, 5)]
    for measure in (diagnostics.cka, diagnostics.cknna):
        table = diagnostics.compare(layers[:2], layers, measure)
        assert table.shape == (2, 3)
        assert table[1, 2] == float(measure(layers[1], layers[2]))
        np.testing.assert_allclose(table[[0, 1], [0, 1]], 1, rtol=1e-5)


def test_the_backend_is_the_one_under_test():
    """NumPy arrays are converted, as everywhere."""
    x = np.random.default_rng(0).normal(size=(6, 3)).astype("float32")
    assert framework(diagnostics.cka(x, x)) in MODULES[BACKEND]
