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
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=keras.distribution.list_devices("cpu")))
from keras_models import functional
from selfalign.adapters.keras import SelfAligned
keras.utils.set_random_seed(0)
rng = np.random.default_rng(0)
data = rng.normal(size=(64, 5, 4)).astype("float32"), rng.integers(0, 10, 64).astype("int32")
model = SelfAligned(functional(), selfalign.SRALoss(student_layer=2, teacher_layer=4), seed=1)
model.compile(optimizer=keras.optimizers.SGD(0.05))
history = model.fit(*data, batch_size=16, epochs=2, verbose=0, shuffle=False).history
arrays = [np.asarray(v.value) for v in (*model.weights, *model.ema_backbone().weights)]
devices = len(model.average.weights[0].value.sharding.device_set)
np.savez(sys.argv[2], *arrays, losses=history["loss"], devices=devices)
"""


@pytest.mark.only("jax")
def test_data_parallel_gives_the_numbers_of_one_device(tmp_path):
    results = []
    for name in ("one", "eight"):
        command = [sys.executable, "-c", CODE, name, str(tmp_path / f"{name}.npz")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        results.append(dict(np.load(tmp_path / f"{name}.npz")))
    one, eight = results
    assert (one.pop("devices"), eight.pop("devices")) == (1, 8)
    for name, value in one.items():
        np.testing.assert_allclose(eight[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
