"""Conditions that a backbone drops inside are noticed; what else it draws does no harm."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from keras_fits import compiled, weights
from keras_models import CHANNELS, TOKENS, WIDTH

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # Keras's, NumPy 2.4


@keras.saving.register_keras_serializable(package="tests")
class Drops(layers.Layer):
    """Replaces a part of the samples' labels, or of their embeddings, in training."""

    def __init__(self, rate=0.2, **options):
        super().__init__(**options)
        self.rate = rate
        self.draws = keras.random.SeedGenerator(0)

    def call(self, x, training=False):
        if not training:
            return x
        kept = keras.random.uniform((ops.shape(x)[0],), seed=self.draws) >= self.rate
        kept = ops.reshape(kept, (-1, *[1] * (len(x.shape) - 1)))
        return x * ops.cast(kept, x.dtype)


def nothing(x):
    return x


def model_of(labels=nothing, embedding=nothing, features=nothing, zero=False):
    """A backbone with a layer for its labels, their embedding or its features."""
    x, t, y = keras.Input((TOKENS, CHANNELS)), keras.Input(()), keras.Input((), dtype="int32")
    embedded = embedding(layers.Embedding(11, WIDTH)(labels(y)))
    condition = layers.Reshape((1, WIDTH))(embedded + layers.Reshape((1,))(t))
    h = layers.Dense(WIDTH)(x)
    for n in range(1, 5):
        gate = layers.Dense(WIDTH, kernel_initializer="zeros" if zero else "normal")(condition)
        h = layers.Dense(WIDTH, "tanh", name=f"block_{n}")(features(h)) + gate
    return keras.Model([x, t, y], layers.Dense(CHANNELS)(h))


HARMLESS = {
    "dropout of features": lambda: {"features": layers.Dropout(0.5)},
    "dropout of an embedding's features": lambda: {"embedding": layers.Dropout(0.2)},
    "noise": lambda: {"features": layers.GaussianNoise(0.5)},
    "paths of a residual": lambda: {"features": lambda h: h + Drops()(h)},
}
DROPPED = {
    "labels": lambda: {"labels": Drops()},
    "embeddings": lambda: {"embedding": Drops()},
    "behind gates of zero": lambda: {"embedding": Drops(), "zero": True},
    "beside dropout of features": lambda: {"labels": Drops(), "features": layers.Dropout(0.5)},
}


@pytest.mark.parametrize("what", DROPPED)
def test_a_dropped_condition_is_refused(what, loss, data):
    model = compiled(model_of(**DROPPED[what]()), loss)
    name = model.backbone.inputs[2].name
    before = weights(model)
    rule = "would see another one. Received: the input "
    with pytest.raises(ValueError, match=f"{rule}'{name}', on which .* of 16 equal samples do not"):
        model.train_on_batch(*data)
    assert all(map(np.array_equal, before, weights(model)))


@pytest.mark.parametrize("what", HARMLESS)
def test_what_is_drawn_for_features_does_no_harm(what, loss, data):
    model = compiled(model_of(**HARMLESS[what]()), loss, blocks="block_{}")
    before = [ops.convert_to_numpy(variable) for variable in model.backbone.variables]
    model.begin()
    after = [ops.convert_to_numpy(variable) for variable in model.backbone.variables]
    assert all(map(np.array_equal, before, after))


def test_the_look_can_be_left_out(loss):
    compiled(model_of(labels=Drops()), loss, checks="off").begin()
