"""Fixtures of the Keras adapter's tests: settings, a backbone, data."""

import keras
import numpy as np
import pytest
from keras_models import functional

import selfalign


@pytest.fixture(autouse=True)
def seeded():
    keras.utils.set_random_seed(0)


@pytest.fixture
def loss():
    return selfalign.SRALoss(student_layer=2, teacher_layer=4)


@pytest.fixture
def backbone():
    return functional()


@pytest.fixture
def data():
    """x0 [32, 5, 4] and labels [32]."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(32, 5, 4)).astype("float32"), rng.integers(0, 10, 32).astype("int32")
