"""Heads against the oracle: SRA's projector, perceptrons of any depth, and heads of one's own."""

import numpy as np
import oracle
import pytest
import third_party
from hypothesis import given
from hypothesis import strategies as st
from support import FLOATS, array, dtype_of, generators, is_tensor, tensor, tree

import selfalign
from selfalign import heads
from selfalign.heads import MLP

KEYS = ["hidden_bias", "hidden_kernel", "output_bias", "output_kernel"]
DEPTHS = pytest.mark.parametrize("layers", [2, 3, 4, 6])


def random_params(rng, layers=2, width=4, hidden=8, out=4, scale=1.0):
    shapes = oracle.mlp_shapes(layers, width, hidden, out)
    return {name: scale * rng.normal(size=shape) for name, shape in shapes.items()}


def fresh(width, seed=0):
    """The projector's first parameters, and their draws."""
    rng = np.random.default_rng(seed)
    drawn = [rng.random(shape) for shape in heads.draw_shapes(width)]
    return selfalign.init_projector(*map(tensor, drawn)), drawn


# Applying a head


@given(generators)
def test_project_equals_the_oracle(rng):
    params, x = random_params(rng), rng.normal(size=(2, 3, 4))
    got = selfalign.project(tree(params), tensor(x))
    assert is_tensor(got)
    np.testing.assert_allclose(array(got), oracle.project(params, x), rtol=1e-4, atol=1e-5)


def test_project_to_another_width():
    rng = np.random.default_rng(0)
    params, x = random_params(rng, width=4, hidden=6, out=5), rng.normal(size=(2, 3, 4))
    got = array(selfalign.project(tree(params), tensor(x)))
    np.testing.assert_allclose(got, oracle.project(params, x), rtol=1e-4, atol=1e-5)


@DEPTHS
def test_perceptrons_of_any_depth_equal_the_oracle(layers):
    @given(generators, st.sampled_from([1, 5, 8]))
    def law(rng, hidden):
        params = random_params(rng, layers, width=4, hidden=hidden, out=3, scale=0.5)
        x = rng.normal(size=(2, 3, 4))
        wanted = oracle.mlp(layers, params, x)
        head = MLP(layers, hidden)
        got = array(head.apply(tree(params), tensor(x)))
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
        by_function = array(selfalign.project(tree(params), tensor(x)))
        assert np.array_equal(by_function, got)

    law()


def test_the_head_of_two_layers_is_the_projector():
    rng = np.random.default_rng(0)
    params, x = random_params(rng), rng.normal(size=(2, 3, 4))
    np.testing.assert_allclose(oracle.mlp(2, params, x), oracle.project(params, x), rtol=1e-12)
    assert heads.PROJECTOR == MLP() == MLP(layers=2, hidden=None)


@pytest.mark.parametrize("dtype", FLOATS)
def test_project_computes_in_the_dtype_it_gets(dtype):
    params = random_params(np.random.default_rng(0))
    got = selfalign.project(tree(params, dtype), tensor(np.ones((2, 3, 4)), dtype))
    assert dtype_of(got) == dtype
    wanted = oracle.project(params, np.ones((2, 3, 4)))
    np.testing.assert_allclose(array(got), wanted, rtol=0.1, atol=0.15)


def test_no_head_passes_tokens_as_they_are():
    x = tensor(np.ones((2, 3, 4)))
    assert heads.NONE.apply({}, x) is x
    assert heads.NONE.draw_shapes(4, 4) == {}
    assert heads.NONE.init({}) == {}
    assert heads.NONE.names == ()


# Parameters


@pytest.mark.parametrize(
    ("width", "count"), [(768, 2_361_600), (1024, 4_197_376), (1152, 5_311_872)]
)
def test_four_squares_and_three_widths_of_parameters(width, count):
    drawn = [tensor(np.zeros(shape)) for shape in heads.draw_shapes(width)]
    params = selfalign.init_projector(*drawn)
    assert sum(array(value).size for value in params.values()) == count
    assert count == 4 * width**2 + 3 * width


@given(generators)
def test_kernels_are_xavier_uniform_and_biases_zero(rng):
    drawn = [rng.random(shape) for shape in heads.draw_shapes(4)]
    params = selfalign.init_projector(*map(tensor, drawn))
    assert sorted(params) == KEYS
    for name, draw in zip(("hidden_kernel", "output_kernel"), drawn, strict=True):
        wanted = oracle.xavier_uniform(draw)
        np.testing.assert_allclose(array(params[name]), wanted, rtol=1e-5, atol=1e-6)
    assert array(params["hidden_bias"]).tolist() == [0] * 8
    assert array(params["output_bias"]).tolist() == [0] * 4


@DEPTHS
@pytest.mark.parametrize("hidden", [None, 7])
def test_a_deeper_heads_parameters(layers, hidden):
    head = MLP(layers, hidden)
    wanted = oracle.mlp_shapes(layers, 4, hidden or 8, 5)
    shapes = head.draw_shapes(width=4, target_width=5)
    assert shapes == {name: shape for name, shape in wanted.items() if name.endswith("kernel")}
    rng = np.random.default_rng(0)
    drawn = {name: rng.random(shape) for name, shape in shapes.items()}
    params = head.init(tree(drawn))
    assert {name: tuple(value.shape) for name, value in params.items()} == wanted
    assert tuple(params) == head.names
    for name, draw in drawn.items():
        wanted_kernel = oracle.xavier_uniform(draw)
        np.testing.assert_allclose(array(params[name]), wanted_kernel, rtol=1e-5, atol=1e-6)
    assert not any(array(params[name]).any() for name in params if name.endswith("bias"))


@pytest.mark.parametrize("dtype", FLOATS)
def test_parameters_have_the_dtype_of_the_draws(dtype):
    drawn = [tensor(np.full(shape, 0.25), dtype) for shape in ((2, 4), (4, 2))]
    params = selfalign.init_projector(*drawn)
    assert {dtype_of(value) for value in params.values()} == {dtype}


@pytest.mark.parametrize(
    ("arguments", "shapes"), [((4,), ((4, 8), (8, 4))), ((4, 3), ((4, 3), (3, 4)))]
)
def test_shapes_of_the_draws(arguments, shapes):
    assert heads.draw_shapes(*arguments) == shapes


@DEPTHS
def test_a_fresh_head_keeps_the_size_of_its_tokens(layers):
    """Xavier's reason: neither vanishing nor exploding at the start. SiLU halves small inputs."""
    rng = np.random.default_rng(0)
    head = MLP(layers)
    shapes = head.draw_shapes(64, 64)
    params = head.init({name: tensor(rng.random(shape)) for name, shape in shapes.items()})
    out = array(head.apply(params, tensor(rng.normal(size=(4, 16, 64)))))
    assert 0.2 * 0.5 ** (layers - 2) < out.std() < 2


def test_heads_are_settings():
    assert MLP(3, 6) == MLP(3, 6)
    assert hash(MLP(3, 6)) == hash(MLP(3, 6))
    assert MLP(3, 6) != MLP(3, 7)
    assert MLP(np.int64(3), np.int32(6)) == MLP(3, 6)


def test_a_head_of_your_own():
    head = third_party.LowRank()
    x = np.random.default_rng(0).normal(size=(2, 3, 4))
    drawn = {n: np.full(s, 0.75) for n, s in head.draw_shapes(4, 5).items()}
    params = head.init(tree(drawn))
    got = head.apply(params, tensor(x))
    assert sorted(params) == sorted(head.names)
    np.testing.assert_allclose(array(got), np.repeat(x.sum(-1), 5).reshape(2, 3, 5) / 2, rtol=1e-4)
