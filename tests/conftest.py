"""The suite runs once per backend: `KERAS_BACKEND=torch pytest tests`, and the same with jax and numpy."""

import importlib
import os

import hypothesis
import pytest

BACKENDS = ("numpy", "torch", "jax")


def pytest_configure(config):
    backend = os.environ.get("KERAS_BACKEND")
    if backend not in BACKENDS:
        raise pytest.UsageError(
            f"The suite runs once per backend, which KERAS_BACKEND names: one of {', '.join(BACKENDS)}. "
            f"Received: KERAS_BACKEND={backend!r}. Run for instance: KERAS_BACKEND=torch pytest tests"
        )
    try:
        framework = importlib.import_module(backend)
        if backend == "jax":
            framework.config.update("jax_num_cpu_devices", 8)  # for the tests of sharding; arrays go to the first unless told
        importlib.import_module("keras")
    except ImportError as error:
        raise pytest.UsageError(
            f"KERAS_BACKEND={backend} was asked for and cannot be imported. Received: {error}. "
            'Install the package with its development extras: pip install -e ".[dev]"'
        ) from error
    config.addinivalue_line("markers", "only(*backends): the law makes sense on these backends alone")


def pytest_collection_modifyitems(config, items):
    """A test marked `only` does not exist on the other backends; nothing is ever skipped."""
    backend = os.environ["KERAS_BACKEND"]
    here, elsewhere = [], []
    for item in items:
        marker = item.get_closest_marker("only")
        (elsewhere if marker and backend not in marker.args else here).append(item)
    items[:] = here
    if elsewhere:
        config.hook.pytest_deselected(items=elsewhere)


hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=30, database=None)
hypothesis.settings.register_profile("search", deadline=None, max_examples=500)  # HYPOTHESIS_PROFILE=search: look for more
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))
