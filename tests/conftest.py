"""The suite runs once per backend: `KERAS_BACKEND=torch pytest tests`, then with jax and numpy.

Without KERAS_BACKEND one is chosen, and the header says which.
"""

import importlib
import importlib.util
import os
import re
from pathlib import Path

import hypothesis
import pytest

BACKENDS = ("torch", "jax", "numpy", "tensorflow")
ADAPTERS = {
    "torch": ("minimal", "torch", "keras"),
    "jax": ("jax", "keras"),
    "numpy": (),
    "tensorflow": ("keras",),  # a run of its own: make test-tensorflow
}
FOLDER = Path(__file__).parent / "adapters"

# read by the workers of pytest-xdist and by all that the tests start
FIRST = str(Path(__file__).parent / "processes")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [FIRST, os.environ.get("PYTHONPATH")]))


def pytest_configure(config):
    asked = os.environ.get("KERAS_BACKEND")
    backend = asked or chosen_backend(config.args)
    config.stash[CHOSEN] = f"selfalign: Keras backend {backend}, " + (
        "by KERAS_BACKEND" if asked else "chosen: KERAS_BACKEND is not set"
    )
    if backend not in BACKENDS:
        raise pytest.UsageError(
            "KERAS_BACKEND must name a backend that the suite knows, one of "
            f"{', '.join(BACKENDS)}. Received: KERAS_BACKEND={backend!r}. Run for instance: "
            "KERAS_BACKEND=torch pytest tests"
        )
    os.environ["KERAS_BACKEND"] = backend
    if not config.option.collectonly:
        import_backend(backend)
    config.addinivalue_line(
        "markers", "only(*backends): the law makes sense on these backends alone"
    )
    config.addinivalue_line("markers", "heavy: of a run of its own, with --heavy")


CHOSEN = pytest.StashKey[str]()


def chosen_backend(paths):
    """The framework of the adapter whose tests are asked for; else the first that is installed."""
    named = [n for n in ("torch", "jax") if any(f"adapters/{n}" in path for path in paths)]
    if len(named) == 1:
        return named[0]
    return next((n for n in ("torch", "jax") if importlib.util.find_spec(n)), "numpy")


def import_backend(backend):
    """A backend that was asked for and is missing is an error: nothing is ever skipped."""
    # Compiling is most of what JAX's tests cost, and their programs are small: LLVM's optimisations
    # cost more than they save. It must be said before JAX runs anything, and holds for what the
    # tests start, too.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0"
    try:
        framework = importlib.import_module(backend)
        if backend == "jax":
            # for the tests of sharding; arrays go to the first device unless told
            framework.config.update("jax_num_cpu_devices", 8)
        importlib.import_module("keras")
    except ImportError as error:
        raise pytest.UsageError(
            f"The backend {backend} must be installed. Received: {error}. Install the package "
            'with its development extras: pip install -e ".[dev]"'
        ) from error


def pytest_report_header(config):
    return config.stash[CHOSEN]


def pytest_ignore_collect(collection_path):
    """The tests of an adapter that does not run on this backend are not there; None: no opinion."""
    if not collection_path.is_relative_to(FOLDER) or collection_path == FOLDER:
        return None
    adapter = collection_path.relative_to(FOLDER).parts[0]
    known = adapter in ("minimal", "torch", "jax", "keras")
    return True if known and adapter not in ADAPTERS[os.environ["KERAS_BACKEND"]] else None


def pytest_collection_modifyitems(config, items):
    """Some tests are of another backend or another run, and do not exist here; none is skipped."""
    backend = os.environ["KERAS_BACKEND"]
    heavy = config.getoption("--heavy")
    here = []
    elsewhere = []
    for item in items:
        marker = item.get_closest_marker("only")
        of_this_backend = marker is None or backend in marker.args
        of_this_run = heavy == (item.get_closest_marker("heavy") is not None)
        (here if of_this_backend and of_this_run else elsewhere).append(item)
    items[:] = here
    if elsewhere:
        config.hook.pytest_deselected(items=elsewhere)


# The table of models in the docs

TABLE = "docs/models.md"
CELL = re.compile(r"adapters/torch/test_\w*families\.py::test_(\w+)\[(\w+)\]")
COLUMNS = ["attach", "forward", "backward", "update", "compile", "checkpointing", "state_dict"]


def pytest_addoption(parser):
    parser.addoption(
        "--heavy",
        action="store_true",
        help="run the tests that take long and look at what seldom changes, and no others",
    )
    parser.addoption(
        "--write-models",
        action="store_true",
        help=f"write what the tests of model families found into {TABLE}",
    )


def pytest_terminal_summary(terminalreporter, config):
    """The table of models in the docs is the outcome of the tests that it names."""
    if not config.getoption("--write-models"):
        return
    cells = {}
    for outcome, mark in (("passed", "yes"), ("failed", "NO")):
        for report in terminalreporter.stats.get(outcome, ()):
            if found := CELL.search(report.nodeid):
                cells.setdefault(found[2], {})[found[1]] = mark
    file = config.rootpath / TABLE
    head, _, rest = file.read_text().partition("<!-- table -->\n")
    _, _, tail = rest.partition("<!-- end -->\n")
    table = "\n".join(table_of_models(cells))
    file.write_text(f"{head}<!-- table -->\n{table}\n<!-- end -->\n{tail}")
    terminalreporter.write_line(f"{len(cells)} models written into {file}")


def table_of_models(cells):
    """The lines of the table, in Markdown."""
    titles = " | ".join(column.replace("_", " ") for column in COLUMNS)
    yield f"| model | {titles} |"
    yield "| --- |" + " --- |" * len(COLUMNS)
    for name, row in sorted(cells.items()):
        yield f"| `{name}` | {' | '.join(row[column] for column in COLUMNS)} |"


# How hard hypothesis looks; HYPOTHESIS_PROFILE=search looks for more

# A law is searched for counterexamples on NumPy, where it costs least; elsewhere it is confirmed.
SUITE = {"deadline": None, "derandomize": True, "database": None}
hypothesis.settings.register_profile("suite", max_examples=30, **SUITE)
hypothesis.settings.register_profile("confirm", max_examples=15, **SUITE)
hypothesis.settings.register_profile("search", deadline=None, max_examples=500)
USUAL = "suite" if os.environ.get("KERAS_BACKEND") == "numpy" else "confirm"
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", USUAL))
