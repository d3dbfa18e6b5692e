"""Fixtures of the JAX adapter's tests: settings, a model's parameters, a batch, and the user's loop."""

import jax.numpy as jnp
import pytest
from jax_loop import make_loop
from jax_models import make_batch, make_params

import selfalign


@pytest.fixture
def loss():
    return selfalign.SRALoss(student_layer=2, teacher_layer=4)


@pytest.fixture
def params():
    return {name: jnp.asarray(value) for name, value in make_params().items()}


@pytest.fixture
def batch():
    return make_batch()


@pytest.fixture
def loop(loss):
    return make_loop(loss)
