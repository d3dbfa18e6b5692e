"""REPA: tokens of an encoder that the caller runs, through a head of three layers."""

import numpy as np
import oracle
import pytest
from hypothesis import given
from support import array, generators, gradients, tensor, tree

import selfalign
from selfalign import REPALoss, adapting, heads, sources


def make(**settings):
    return REPALoss(**({"student_layer": 8, "width": 6, "hidden": 10} | settings))


def shapes(width=4):
    return oracle.mlp_shapes(3, width, 10, 6)


@given(generators)
def test_equals_the_oracle(rng):
    student, encoder = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 3, 6))
    params = {name: 0.5 * rng.normal(size=shape) for name, shape in shapes().items()}
    distance, _ = make().evaluate(tree(params), tensor(student), tensor(encoder))
    wanted = oracle.term(oracle.mlp(3, params, student), encoder)
    np.testing.assert_allclose(array(distance), wanted, rtol=1e-4)
    np.testing.assert_allclose(array(make().weigh(distance)), 0.5 * wanted, rtol=1e-4)


@pytest.mark.only("torch", "jax")
def test_gradients_of_the_head_and_of_the_tokens():
    rng = np.random.default_rng(0)
    student, encoder = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 3, 6))
    params = {name: 0.5 * rng.normal(size=shape) for name, shape in shapes().items()}
    values = {"tokens": student, "encoder": encoder} | params

    def term(*inputs):
        named = dict(zip(values, inputs, strict=True))
        head = {name: named[name] for name in params}
        return make().evaluate(head, named["tokens"], named["encoder"])[0]

    def wanted_term(name, x):
        changed = values | {name: x}
        return oracle.term(oracle.mlp(3, changed, changed["tokens"]), encoder)

    found = dict(zip(values, gradients(term, *values.values()), strict=True))
    assert found["encoder"] is None or not found["encoder"].any()
    for name in ("tokens", *params):
        wanted = oracle.gradient(lambda x, name=name: wanted_term(name, x), values[name])
        np.testing.assert_allclose(found[name], wanted, rtol=1e-3, atol=1e-5, err_msg=name)


def test_the_target_is_given_and_the_head_leads_to_its_width():
    loss = make()
    assert loss.source == sources.Given(width=6)
    assert loss.head == heads.MLP(layers=3, hidden=10)
    kernels = {name: shape for name, shape in shapes().items() if name.endswith("kernel")}
    assert adapting.head_shapes(loss, 4) == kernels
    drawn = {name: np.full(shape, 0.25) for name, shape in kernels.items()}
    params = adapting.init_head(loss, drawn)
    assert {name: tuple(value.shape) for name, value in params.items()} == shapes()
    assert loss.layers(28) == (8,)


def test_the_published_head_is_2048_wide():
    loss = REPALoss(student_layer=8, width=768)
    assert adapting.head_shapes(loss, 1152) == {
        "hidden_kernel": (1152, 2048),
        "hidden_2_kernel": (2048, 2048),
        "output_kernel": (2048, 768),
    }


def test_presets():
    wanted = REPALoss(student_layer=8, width=768, weight=0.5)
    assert selfalign.REPALoss.preset("SiT-XL/2") == wanted
    assert selfalign.REPALoss.preset("SiT-B/2", width=1024).width == 1024
