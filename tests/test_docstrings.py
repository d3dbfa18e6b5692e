"""Docstrings: every public name has one, and every example in them is true."""

import doctest
import importlib
import inspect
import pkgutil

import pytest
from support import BACKEND

import selfalign
from selfalign import adapters

FRAMEWORKS = {"torch": ("torch", "keras"), "jax": ("jax", "keras"), "numpy": ()}[BACKEND]


def modules_below(package):
    """The full names of a package and of all modules in it."""
    found = [package.__name__]
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        inner = importlib.import_module(module.name) if module.ispkg else None
        found += modules_below(inner) if inner else [module.name]
    return found


def importable(name):
    """Whether a module may be imported here: no adapter of another framework, and no program."""
    last = name.rpartition(".")[2]
    needed = [framework for framework in ("torch", "jax", "keras") if framework in last]
    return last != "__main__" and set(needed) <= set(FRAMEWORKS)


CORE = [
    name
    for module in pkgutil.iter_modules(selfalign.__path__, "selfalign.")
    if module.name not in ("selfalign.adapters", "selfalign.__main__")
    for name in (
        modules_below(importlib.import_module(module.name)) if module.ispkg else [module.name]
    )
    if importable(name)
]
ADAPTERS = [
    name
    for framework in FRAMEWORKS
    for name in modules_below(importlib.import_module(f"{adapters.__name__}.{framework}"))
]
MODULES = ["selfalign", *CORE, *ADAPTERS]
PUBLIC = [name for name in MODULES if not name.rpartition(".")[2].startswith("_")]
# of an adapter and of the command line only what the package offers is for users
INNER = [name for name in MODULES if name in ADAPTERS or name.startswith("selfalign.cli.")]
OFFERED = [
    name for name in PUBLIC if name not in INNER or (name.count(".") == 2 and name in ADAPTERS)
]


def functions(module):
    """(qualified name, function) of the public functions and methods that a module offers."""
    for name, value in vars(module).items():
        if name.startswith("_") or not offers(module, name, value):
            continue
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value):
            yield from methods(name, value)


def offers(module, name, value):
    """Whether the name is the module's own; inside a package, one that the package offers."""
    package = module.__name__ if hasattr(module, "__path__") else module.__name__.rpartition(".")[0]
    offered = getattr(importlib.import_module(package), "__all__", None)
    if module.__name__ in ADAPTERS and hasattr(module, "__path__"):
        return name in offered
    own = getattr(value, "__module__", None) == module.__name__
    return own and (package == "selfalign" or offered is None or name in offered)


def methods(name, kind):
    members = inspect.getmembers(kind, lambda m: inspect.isfunction(m) or inspect.ismethod(m))
    for member, function in members:
        own = function.__module__ == kind.__module__
        if own and (not member.startswith("_") or member == "__call__"):
            yield f"{name}.{member}", function


def test_the_modules_are_found():
    wanted = {
        "selfalign.paths.path",
        "selfalign.objectives.sra",
        "selfalign._backend",
        "selfalign.adapting",
        "selfalign.diagnostics.health",
        "selfalign.cli.command",
    }
    assert wanted <= set(MODULES)
    assert {f"selfalign.adapters.{framework}" for framework in FRAMEWORKS} <= set(MODULES)


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # Keras's own, with NumPy 2.4
@pytest.mark.parametrize("name", MODULES)
def test_examples_are_true(name):
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, optionflags=doctest.REPORT_NDIFF)
    assert failed == 0


def test_examples_are_run():
    """The check above runs something: each public module with functions or classes has examples."""
    finder = doctest.DocTestFinder()
    for name in OFFERED:
        module = importlib.import_module(name)
        examples = sum(len(test.examples) for test in finder.find(module))
        offered = list(functions(module))
        offered = [f for _, f in offered if f.__module__ == name]
        assert examples > 0 or not offered, name


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
    classes = [
        (label, value)
        for label, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == name and not label.startswith("_")
    ]
    documented = [*functions(module), *classes]
    assert [label for label, value in documented if not inspect.getdoc(value)] == []


@pytest.mark.parametrize("name", MODULES)
def test_the_first_line_is_one_sentence_that_fits(name):
    """A summary is one line of at most 100 columns, and ends with a period or a colon."""
    module = importlib.import_module(name)
    for label, value in [("the module", module), *functions(module)]:
        summary = (inspect.getdoc(value) or "").partition("\n\n")[0]
        assert "\n" not in summary, f"{label}: {summary}"
        assert summary == "" or summary.rstrip()[-1] in ".:?", f"{label}: {summary}"


def test_what_takes_tensors_shows_an_example():
    entrances = {
        f"{name}.{label}": inspect.getdoc(function)
        for name in OFFERED
        if name not in ADAPTERS
        for label, function in functions(importlib.import_module(name))
        if hasattr(function, "__wrapped__")
    }
    wanted = {
        "selfalign.ema.ema_update",
        "selfalign.objective.Objective.__call__",
        "selfalign.paths.path.Path.add_noise",
        "selfalign.normalise.standardise",
    }
    assert wanted <= set(entrances)
    without = [label for label, text in entrances.items() if ">>>" not in text]
    assert without == []
