"""The adapter under jit, grad, checkpoint, scan and vmap, and outside of all of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_loop import apply_at, jitted, make_loop
from jax_models import WIDTH, make_batch, make_params, moved

import selfalign
from selfalign.adapters import jax as sra

LOSS = selfalign.SRALoss(student_layer=1, teacher_layer=2)


def in_scan(gradient):
    """The function of its last argument alone, once, as the body of a scan."""

    def call(*arguments):
        *others, key = arguments
        body = lambda carry, key: (carry, gradient(*others, key))  # noqa: E731
        _, stacked = jax.lax.scan(body, 0, key[None])
        return jax.tree.map(lambda leaf: leaf[0], stacked)

    return call


def under_vmap(gradient):
    """The second of two equal runs."""

    def call(*arguments):
        *others, key = arguments
        mapped = jax.vmap(gradient, in_axes=(None,) * len(others) + (0,))
        return jax.tree.map(lambda leaf: leaf[1], mapped(*others, jnp.stack([key, key])))

    return call


TRANSFORMED = {"checkpointed": jax.checkpoint, "scan": in_scan, "vmap": under_vmap}


@functools.cache
def step_and_arguments():
    """The gradient of a step, its arguments, and what it gives under jit alone."""
    loop = make_loop(LOSS)

    def gradient(trained, teacher, x0, noise, t, y, key):
        return loop.gradient(trained, teacher, x0, noise, t, y, key=key)

    params = {name: jnp.asarray(value) for name, value in make_params(depth=2).items()}
    trained, _, teacher = loop.start(params)
    trained = {**trained, "model": moved(params)}
    arguments = trained, teacher, *make_batch(), jax.random.key(7)
    return gradient, arguments, jax.jit(gradient)(*arguments)


def all_close(found, expected, rtol=1e-4, atol=1e-6):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for mine, theirs in pairs:
        np.testing.assert_allclose(mine, theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("transform", TRANSFORMED)
def test_transformed_numbers_equal_jitted_ones(transform):
    gradient, arguments, expected = step_and_arguments()
    all_close(jax.jit(TRANSFORMED[transform](gradient))(*arguments), expected)


def test_eager_numbers_equal_jitted_ones(params, batch):
    """The adapter outside of jit, step by step; the model is jitted on its own."""
    teacher = sra.init_teacher(moved(params))
    projector = sra.init_projector(jax.random.key(0), WIDTH)
    tokens = jax.random.normal(jax.random.key(1), (4, 5, WIDTH))

    def term(projector, tokens, teacher, key):
        apply = jitted(apply_at(2))
        sides = teacher, params, projector, tokens
        return sra.align(LOSS, apply, *sides, *batch, key=key)

    gradient = jax.value_and_grad(term, argnums=(0, 1))
    arguments = projector, tokens, teacher, jax.random.key(2)
    all_close(gradient(*arguments), jax.jit(gradient)(*arguments))


def test_an_ensemble_is_trained_under_vmap(params, batch):
    loop = make_loop(LOSS)
    first, second = loop.start(params), loop.start(moved(params), seed=1)
    members = jax.tree.map(lambda *leaves: np.stack(leaves), first, second)
    keys = jax.random.split(jax.random.key(0))
    together = jax.vmap(loop.step, in_axes=(0, None, None, None, None))
    states, values = jax.jit(together)(members, *batch, key=keys)
    for i, member in enumerate((first, second)):
        alone, value = jitted(loop.step)(member, *batch, key=keys[i])
        np.testing.assert_allclose(values[i], value, rtol=1e-5)
        all_close(jax.tree.map(lambda leaf, i=i: leaf[i], states[2]), alone[2], atol=1e-5)
