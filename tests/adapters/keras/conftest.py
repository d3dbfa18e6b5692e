"""Fixtures of the Keras adapter's tests: settings, a backbone, data."""

import keras
import numpy as np
import pytest
from keras_models import functional

import selfalign


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(tmp_path_factory):
    """On jax most of the time is XLA's: it optimizes less here, and equal programs compile once."""
    if keras.backend.backend() != "jax":
        yield
        return
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    wanted = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(tmp_path_factory.getbasetemp() / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in wanted}
    for settings in (wanted, before):
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # it looks at its folder once
        if settings is wanted:
            yield


@pytest.fixture(autouse=True)
def seeded():
    keras.utils.set_random_seed(0)


@pytest.fixture
def loss():
    return selfalign.SRALoss(student_layer=2, teacher_layer=4)


@pytest.fixture
def backbone():
    return functional(depth=4)


@pytest.fixture
def data():
    """x0 [32, 5, 4] and labels [32]."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(32, 5, 4)).astype("float32"), rng.integers(0, 10, 32).astype("int32")
