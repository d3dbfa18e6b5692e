"""A short fit, and what models are compared by."""

import keras
import numpy as np
from support import array

from selfalign.adapters.keras import SelfAligned


def weights(model):
    return [array(variable.value) for variable in model.weights]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


def trained(backbone, loss, data, epochs=1, optimizer=None, compile_options=None, **options):
    model = SelfAligned(backbone, loss, seed=1, **options)
    model.compile(optimizer=optimizer or keras.optimizers.AdamW(1e-2), **(compile_options or {}))
    history = model.fit(*data, batch_size=8, epochs=epochs, verbose=0, shuffle=False)
    return model, history.history
