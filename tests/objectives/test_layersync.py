"""LayerSync: a later layer of the same forward, without a head or with SRA's."""

import numpy as np
import oracle
import pytest
from hypothesis import given
from support import array, generators, gradients, tensor, tree

import selfalign
from selfalign import LayerSyncLoss, adapting, heads, sources


def make(**settings):
    return LayerSyncLoss(**({"student_layer": 8, "teacher_layer": 16} | settings))


@given(generators)
def test_equals_the_oracle(rng):
    early, later = rng.normal(size=(2, 2, 3, 4))
    wanted = 0.2 * (1 - (unit(early) * unit(later)).sum(-1)).mean()
    np.testing.assert_allclose(array(make()(tensor(early), tensor(later))), wanted, rtol=1e-5)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_it_needs_no_teacher_and_no_head():
    loss = make()
    assert loss.source == sources.LaterLayer(layer=16)
    assert loss.head is heads.NONE
    assert adapting.head_shapes(loss, 768) == {}
    assert adapting.init_head(loss, {}) == {}
    assert adapting.shared_teacher({"layersync": loss}) is None


def test_with_a_projector():
    loss = make(projector=True)
    assert loss.head == heads.PROJECTOR
    rng = np.random.default_rng(0)
    params = {n: rng.normal(size=s) for n, s in oracle.mlp_shapes(2, 4, 8, 4).items()}
    early, later = rng.normal(size=(2, 2, 3, 4))
    got, _ = loss.evaluate(tree(params), tensor(early), tensor(later))
    wanted = oracle.term(oracle.project(params, early), later)
    np.testing.assert_allclose(array(got), wanted, rtol=1e-4)


@pytest.mark.only("torch", "jax")
def test_the_later_layer_gets_no_gradient():
    """One forward gives both: tokens that depend on each other."""
    early = np.random.default_rng(0).normal(size=(2, 3, 4))
    loss = make(weight=1.0)

    def term(x):
        return loss(x, 2 * x * x + 1)

    (found,) = gradients(term, early)
    fixed = 2 * early**2 + 1
    wanted = oracle.gradient(lambda x: oracle.loss("cosine", 1.0, x, fixed), early)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-6)


def test_layers_of_a_third_and_two_thirds():
    assert make(student_layer=1 / 3, teacher_layer=2 / 3).layers(12) == (4, 8)
    assert make(student_layer=1 / 3, teacher_layer=2 / 3).layers(24) == (8, 16)


def test_presets():
    assert selfalign.LayerSyncLoss.preset("SiT-XL/2") == make()
    assert selfalign.LayerSyncLoss.preset("SiT-XL/2", weight=0.1, projector=True) == make(
        weight=0.1, projector=True
    )
