"""Fixtures of the JAX adapter's tests: settings, a model of two blocks, a batch, and the loop."""

import jax
import jax.numpy as jnp
import pytest
from jax_loop import make_loop
from jax_models import WIDTH, make_batch, make_params

import selfalign
from selfalign.adapters import jax as sra


@pytest.fixture
def loss():
    return selfalign.SRALoss(student_layer=1, teacher_layer=2)


@pytest.fixture
def params():
    return {name: jnp.asarray(value) for name, value in make_params(depth=2).items()}


@pytest.fixture
def projector():
    return sra.init_projector(jax.random.key(3), WIDTH)


@pytest.fixture
def batch():
    return make_batch()


@pytest.fixture
def loop(loss):
    return make_loop(loss)
