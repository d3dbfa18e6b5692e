"""Docstrings: every public name has one, and every example in them is true."""

import doctest
import importlib
import inspect
import pkgutil

import pytest
from support import BACKEND

import selfalign
from selfalign import diagnostics

ADAPTERS = {
    "torch": ["selfalign.adapters.torch", "selfalign.adapters._torch_features", "selfalign.adapters.keras"],
    "jax": ["selfalign.adapters.jax", "selfalign.adapters._jax_taps", "selfalign.adapters.keras"],
    "numpy": [],
}[BACKEND]
CORE = [f"selfalign.{m.name}" for m in pkgutil.iter_modules(selfalign.__path__) if m.name != "adapters"]
CORE += [f"selfalign.diagnostics.{m.name}" for m in pkgutil.iter_modules(diagnostics.__path__)]
MODULES = ["selfalign", *CORE, *ADAPTERS]
PUBLIC = [name for name in MODULES if not name.rpartition(".")[2].startswith("_")]


def functions(module):
    """(qualified name, function) of the public functions and methods defined in `module`."""
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value):
            for member, function in inspect.getmembers(value, lambda m: inspect.isfunction(m) or inspect.ismethod(m)):
                if function.__module__ == module.__name__ and (not member.startswith("_") or member == "__call__"):
                    yield f"{name}.{member}", function


def test_the_modules_are_found():
    assert {"selfalign.paths", "selfalign.loss", "selfalign._backend", "selfalign.diagnostics.health"} <= set(MODULES)


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # Keras's own, with NumPy 2.4
@pytest.mark.parametrize("name", MODULES)
def test_examples_are_true(name):
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, optionflags=doctest.REPORT_NDIFF)
    assert failed == 0


def test_examples_are_run():
    """The check above runs something: each public module with functions or classes has examples."""
    finder = doctest.DocTestFinder()
    for name in PUBLIC:
        module = importlib.import_module(name)
        examples = sum(len(test.examples) for test in finder.find(module))
        assert examples > 0 or not list(functions(module)), name


def test_a_false_example_would_be_found():
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "false", None, None)
    assert doctest.DocTestRunner(verbose=False).run(test, out=lambda text: None).failed == 1


@pytest.mark.parametrize("name", selfalign.__all__)
def test_public_names_are_documented(name):
    assert len(inspect.getdoc(getattr(selfalign, name)) or "") > 20


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions_and_classes_are_documented(name):
    module = importlib.import_module(name)
    assert inspect.getdoc(module)
    classes = [(n, c) for n, c in vars(module).items() if inspect.isclass(c) and c.__module__ == name and not n.startswith("_")]
    missing = [label for label, value in [*functions(module), *classes] if not inspect.getdoc(value)]
    assert missing == []


def test_what_takes_tensors_shows_an_example():
    entrances = {
        f"{name}.{label}": inspect.getdoc(function)
        for name in PUBLIC
        for label, function in functions(importlib.import_module(name))
        if hasattr(function, "__wrapped__")
    }
    assert {"selfalign.teacher.ema_update", "selfalign.loss.SRALoss.__call__", "selfalign.paths.Path.add_noise"} <= set(
        entrances
    )
    assert [label for label, text in entrances.items() if "Example:" not in text or ">>>" not in text] == []
