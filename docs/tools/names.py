"""The public names of the library, read from its sources, and which of them the reference has.

A module's public names are the functions and classes that it defines, without an underscore. Those
of a package (`selfalign.paths`, an adapter) are the ones in its `__all__`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

COMMANDS = ("cli",)  # no functions to call: docs/cli.md

Definition = ast.FunctionDef | ast.ClassDef


def missing(root: Path) -> list[str]:
    """What is wrong with public names.

    They need a docstring with an example, and a place in docs/reference/.
    """
    pages = sorted((root / "docs" / "reference").glob("*.md"))
    text = "\n".join(page.read_text("utf-8") for page in pages)
    placed = set(re.findall(r"^::: (\S+)$", text, re.M))
    wrong = []
    for name, docstring in public(root):
        if not docstring:
            wrong.append(f"{name} has no docstring")
        elif "Example" not in docstring:
            wrong.append(f"{name} has no example")
        if name not in placed:
            wrong.append(f"{name} is not in docs/reference/")
    return wrong


def public(root: Path) -> Iterator[tuple[str, str]]:
    """(full name, docstring) of every public function and class."""
    core = root / "selfalign"
    for file in sorted(core.glob("[!_]*.py")):
        for name, node in definitions(file).items():
            if not name.startswith("_"):
                yield f"selfalign.{file.stem}.{name}", ast.get_docstring(node) or ""
    for package in packages(core):
        yield from exported(f"selfalign.{package.name}", package)
    for package in packages(root / "adapters"):
        yield from exported(f"selfalign.adapters.{package.name}", package)


def packages(folder: Path) -> list[Path]:
    """The packages inside a folder, without the command line."""
    found = [file.parent for file in sorted(folder.glob("*/__init__.py"))]
    return [package for package in found if package.name not in COMMANDS]


def exported(module: str, package: Path) -> Iterator[tuple[str, str]]:
    """(full name, docstring) of the functions and classes in a package's `__all__`."""
    found: dict[str, Definition] = {}
    for file in sorted(package.glob("*.py")):
        found |= definitions(file)
    for name in listed(package / "__init__.py"):
        if name in found:  # constants are not
            yield f"{module}.{name}", ast.get_docstring(found[name]) or ""


def definitions(file: Path) -> dict[str, Definition]:
    """The functions and classes that a file defines, by name."""
    body = ast.parse(file.read_text("utf-8")).body
    return {node.name: node for node in body if isinstance(node, Definition)}


def listed(file: Path) -> list[str]:
    """The names in a module's `__all__`."""
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return list(ast.literal_eval(node.value))
    return []
