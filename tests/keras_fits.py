"""A short fit, and what models are compared by."""

import keras
import numpy as np
from support import array

from selfalign.adapters.keras import SelfAligned


def weights(model):
    return [array(variable.value) for variable in model.weights]


def same(a, b):
    """Whether two models have the same weights, bit for bit."""
    return all(np.array_equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


def compiled(backbone, loss, optimizer=None, **options):
    """A SelfAligned model that is ready to fit."""
    model = SelfAligned(backbone, loss, seed=1, **options)
    model.compile(optimizer=optimizer or keras.optimizers.SGD(0.1))
    return model


def fitted(model, data, epochs=1, batch_size=8):
    """The history of a short fit."""
    options = {"batch_size": batch_size, "epochs": epochs, "verbose": 0, "shuffle": False}
    return model.fit(*data, **options).history
