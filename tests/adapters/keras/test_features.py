"""Features of a backbone after each block, for the diagnostics."""

import keras
import numpy as np
import pytest
from keras_models import functional, subclassed
from support import array

import selfalign
from selfalign.adapters.keras import features

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # Keras's, NumPy 2.4


def test_features_are_those_of_the_blocks_at_each_time(data):
    backbone = functional(depth=3)
    noise = np.random.default_rng(1).normal(size=data[0].shape).astype("float32")
    found = features(backbone, data[0], noise, data[1], times=[0.25, 0.5], batch_size=20)
    whole = features(backbone, data[0], noise, data[1], times=[0.25], mean=False)
    assert list(found) == [0.25, 0.5]
    tapped = keras.Model(backbone.inputs, backbone.get_layer("block_2").output)
    t = np.full(len(noise), 0.25, "float32")
    x = array(selfalign.paths.Linear().add_noise(data[0], noise, t))
    tokens = array(tapped([x, t, data[1]]))
    np.testing.assert_allclose(whole[0.25][1], tokens, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found[0.25][1], tokens.mean(1), rtol=1e-4, atol=1e-6)
    assert [len(layers) for layers in found.values()] == [3, 3]


def test_what_features_cannot_take_is_refused(data):
    rule = (
        r"features\(\) needs a functional backbone, whose layers it taps. Received: Subclassed\. An"
    )
    with pytest.raises(ValueError, match=rule):
        features(subclassed(), data[0], data[0], data[1], times=[0.5])
    with pytest.raises(TypeError, match=r"times must be a list of numbers. Received: '0.5'. Pass"):
        features(functional(), data[0], data[0], data[1], times="0.5")
