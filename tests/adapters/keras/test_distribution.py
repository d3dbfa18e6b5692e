"""Keras's data parallelism on eight devices of the jax backend: the numbers of one device."""

import os
import subprocess
import sys

import numpy as np
import pytest

CODE = """
import sys, jax
jax.config.update("jax_num_cpu_devices", 8)
import keras, numpy as np, selfalign
if sys.argv[1] == "eight":
    devices = keras.distribution.list_devices("cpu")
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
from keras_fits import compiled
from keras_models import unconditional
keras.utils.set_random_seed(0)
data = np.random.default_rng(0).normal(size=(64, 5, 4)).astype("float32")
losses = [
    selfalign.SRALoss(student_layer=1, teacher_layer=3),
    selfalign.LayerSyncLoss(student_layer=1, teacher_layer=2),
]
model = compiled(unconditional(), losses)
history = model.fit(data, batch_size=16, epochs=2, verbose=0, shuffle=False).history
arrays = [np.asarray(v.value) for v in (*model.weights, *model.ema_backbone().weights)]
devices = len(model.average.weights[0].value.sharding.device_set)
np.savez(sys.argv[2], *arrays, losses=history["loss"], devices=devices)
"""


@pytest.mark.only("jax")
def test_data_parallel_gives_the_numbers_of_one_device(tmp_path):
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    results = []
    for name in ("one", "eight"):
        file = tmp_path / f"{name}.npz"
        command = [sys.executable, "-c", CODE, name, str(file)]
        done = subprocess.run(command, env=os.environ | quick, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        results.append(dict(np.load(file)))
    one, eight = results
    assert (one.pop("devices"), eight.pop("devices")) == (1, 8)
    for name, value in one.items():
        np.testing.assert_allclose(eight[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
