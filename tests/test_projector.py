"""The projector against the oracle."""

import numpy as np
import oracle
import pytest
from hypothesis import given
from support import FLOATS, array, dtype_of, generators, is_tensor, tensor, tree

import selfalign
from selfalign import projector

KEYS = ["hidden_bias", "hidden_kernel", "output_bias", "output_kernel"]


def random_params(rng, width=4, hidden=8, out=4):
    shapes = {"hidden_kernel": (width, hidden), "hidden_bias": (hidden,), "output_kernel": (hidden, out), "output_bias": (out,)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


@given(generators)
def test_project_equals_the_oracle(rng):
    params, x = random_params(rng), rng.normal(size=(2, 3, 4))
    got = selfalign.project(tree(params), tensor(x))
    assert is_tensor(got)
    np.testing.assert_allclose(array(got), oracle.project(params, x), rtol=1e-4, atol=1e-5)


def test_project_to_another_width():
    rng = np.random.default_rng(0)
    params, x = random_params(rng, width=4, hidden=6, out=5), rng.normal(size=(2, 3, 4))
    np.testing.assert_allclose(
        array(selfalign.project(tree(params), tensor(x))), oracle.project(params, x), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("dtype", FLOATS)
def test_project_computes_in_the_dtype_it_gets(dtype):
    params = random_params(np.random.default_rng(0))
    got = selfalign.project(tree(params, dtype), tensor(np.ones((2, 3, 4)), dtype))
    assert dtype_of(got) == dtype
    np.testing.assert_allclose(array(got), oracle.project(params, np.ones((2, 3, 4))), rtol=0.1, atol=0.15)


@pytest.mark.parametrize("width", [768, 1024, 1152])
def test_four_squares_and_three_widths_of_parameters(width):
    params = selfalign.init_projector(*(tensor(np.zeros(shape)) for shape in projector.draw_shapes(width)))
    count = sum(array(value).size for value in params.values())
    assert count == 4 * width**2 + 3 * width == {768: 2_361_600, 1024: 4_197_376, 1152: 5_311_872}[width]


@given(generators)
def test_kernels_are_xavier_uniform_and_biases_zero(rng):
    draws = [rng.random(shape) for shape in projector.draw_shapes(4)]
    params = selfalign.init_projector(*map(tensor, draws))
    assert sorted(params) == KEYS
    np.testing.assert_allclose(array(params["hidden_kernel"]), oracle.xavier_uniform(draws[0]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(array(params["output_kernel"]), oracle.xavier_uniform(draws[1]), rtol=1e-5, atol=1e-6)
    assert array(params["hidden_bias"]).tolist() == [0] * 8
    assert array(params["output_bias"]).tolist() == [0] * 4


@pytest.mark.parametrize("dtype", FLOATS)
def test_parameters_have_the_dtype_of_the_draws(dtype):
    params = selfalign.init_projector(tensor(np.full((2, 4), 0.25), dtype), tensor(np.full((4, 2), 0.25), dtype))
    assert {dtype_of(value) for value in params.values()} == {dtype}


@pytest.mark.parametrize(("arguments", "shapes"), [((4,), ((4, 8), (8, 4))), ((4, 3), ((4, 3), (3, 4)))])
def test_shapes_of_the_draws(arguments, shapes):
    assert projector.draw_shapes(*arguments) == shapes


def test_fresh_projector_keeps_the_size_of_its_tokens():
    """Xavier's reason: neither vanishing nor exploding at the start."""
    rng = np.random.default_rng(0)
    params = selfalign.init_projector(*(tensor(rng.random(shape)) for shape in projector.draw_shapes(64)))
    out = array(selfalign.project(params, tensor(rng.normal(size=(4, 16, 64)))))
    assert 0.2 < out.std() < 2
