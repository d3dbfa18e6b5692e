"""Keras's parallelism on eight devices of the jax backend: the numbers of one device."""

import keras
import numpy as np
import pytest
from keras_fits import compiled, fitted, weights
from keras_models import unconditional

import selfalign

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # Keras's, NumPy 2.4


def trained():
    keras.utils.set_random_seed(0)
    losses = [
        selfalign.SRALoss(student_layer=1, teacher_layer=3),
        selfalign.LayerSyncLoss(student_layer=1, teacher_layer=2),
    ]
    model = compiled(unconditional(), losses)
    images = np.random.default_rng(0).normal(size=(64, 5, 4)).astype("float32")
    history = fitted(model, (images,), epochs=2, batch_size=16)
    devices = model.average.weights[0].value.sharding.device_set
    return [*weights(model), *weights(model.ema_backbone())], history["loss"], len(devices)


@pytest.mark.only("jax")
def test_model_parallel_gives_the_numbers_of_one_device():
    """Kernels are cut between devices, the average's as the student's."""
    one, losses, _ = trained()
    devices = keras.distribution.list_devices("cpu")
    mesh = keras.distribution.DeviceMesh((2, 4), ("batch", "model"), devices)
    layout = keras.distribution.LayoutMap(mesh)
    layout["block_.*kernel"] = (None, "model")
    parallel = keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")
    with parallel.scope():
        cut, parallel_losses, count = trained()
    assert count == 8
    np.testing.assert_allclose(parallel_losses, losses, rtol=1e-4)
    for mine, theirs in zip(cut, one, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.only("jax")
def test_data_parallel_gives_the_numbers_of_one_device():
    one, losses, devices = trained()
    assert devices == 1
    parallel = keras.distribution.DataParallel(devices=keras.distribution.list_devices("cpu"))
    with parallel.scope():
        eight, parallel_losses, devices = trained()
    assert devices == 8
    np.testing.assert_allclose(parallel_losses, losses, rtol=1e-4)
    for mine, theirs in zip(eight, one, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)
