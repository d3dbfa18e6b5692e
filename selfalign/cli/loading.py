"""Functions and models that the command line names, such as package.module:factory."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from .usage import WrongUsage, running, wrong_usage


def built_model(settings: Namespace) -> Any:
    """What the factory returns that MODEL names, with the arguments of --kwargs."""
    options = _arguments(settings.kwargs)
    factory = named_function(settings.model)
    fix = "Pass what it needs with --kwargs, or let it need nothing."
    with running("The factory must return a model", fix):
        return factory(**options)


def _arguments(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if isinstance(options, dict):
        return options
    fix = """Write for instance --kwargs '{"depth": 12}'."""
    raise wrong_usage("--kwargs must be a JSON object", text, fix)


def named_function(target: str) -> Callable[..., Any]:
    """What "package.module:name" or "path/to/file.py:name" names."""
    place, _, name = target.rpartition(":")
    if not place or not name:
        raise wrong_usage(
            "A function is named like package.module:name or path/to/file.py:name",
            repr(target),
            "Put a colon between the module and the name.",
        )
    with running("The module must import", "Import it in Python to see more."):
        module: Any = _import(place)
    try:
        found: Callable[..., Any] = functools.reduce(getattr, name.split("."), module)
    except AttributeError:
        raise _missing(module, place, name) from None
    return found


def _missing(module: ModuleType, place: str, name: str) -> WrongUsage:
    public = [(n, value) for n, value in vars(module).items() if not n.startswith("_")]
    names = [n for n, value in public if callable(value)]
    return wrong_usage(
        "The module must hold what is named after the colon",
        f"{place} without {name!r}",
        f"It has: {', '.join(names[:20]) or 'nothing to call'}.",
    )


def _import(place: str) -> ModuleType:
    """The module at a dotted name or in a file, with the folder on the path that Python would."""
    file = Path(place).resolve()
    if file.suffix == ".py":
        sys.path.insert(0, str(file.parent))  # as `python file.py` does
        return _from_file(file, place)
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        its_own_import = not f"{place}.".startswith(f"{error.name}.")
        if its_own_import:
            raise
        raise wrong_usage(
            "The module must exist",
            f"no module {error.name!r} from {Path.cwd()}",
            "Check the spelling, or name a file: path/to/file.py:name.",
        ) from error


def _from_file(file: Path, place: str) -> ModuleType:
    if not file.is_file():
        raise wrong_usage("The file must exist", place, "Check the path.")
    name = str(file)  # one that no other module has
    if name not in sys.modules:
        specification: Any = importlib.util.spec_from_file_location(name, file)
        sys.modules[name] = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(sys.modules[name])
    return sys.modules[name]
