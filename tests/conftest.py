"""The suite runs once per backend: `KERAS_BACKEND=torch pytest tests`, and the same with jax and numpy."""

import importlib
import os
import re

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


TABLE = "docs/models.md"
CELL = re.compile(r"test_torch_families\.py::test_(\w+)\[(\w+)\]")


def pytest_addoption(parser):
    parser.addoption("--write-models", action="store_true", help=f"write what test_torch_families.py found into {TABLE}")


def pytest_terminal_summary(terminalreporter, config):
    """The table of models in the docs is the outcome of the tests that it names."""
    if not config.getoption("--write-models"):
        return
    cells = {}
    for outcome, mark in (("passed", "yes"), ("failed", "NO")):
        for report in terminalreporter.stats.get(outcome, ()):
            if found := CELL.search(report.nodeid):
                cells.setdefault(found[2], {})[found[1]] = mark
    columns = ["attach", "forward", "backward", "update", "compile", "checkpointing", "state_dict"]
    file = config.rootpath / TABLE
    head, _, rest = file.read_text().partition("<!-- table -->\n")
    _, _, tail = rest.partition("<!-- end -->\n")
    lines = [f"| model | {' | '.join(c.replace('_', ' ') for c in columns)} |", "| --- |" + " --- |" * len(columns)]
    lines += [f"| `{name}` | {' | '.join(row[c] for c in columns)} |" for name, row in sorted(cells.items())]
    file.write_text(f"{head}<!-- table -->\n" + "\n".join(lines) + f"\n<!-- end -->\n{tail}")
    terminalreporter.write_line(f"{len(cells)} models written into {file}")


hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=30, database=None)
hypothesis.settings.register_profile("search", deadline=None, max_examples=500)  # HYPOTHESIS_PROFILE=search: look for more
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))
